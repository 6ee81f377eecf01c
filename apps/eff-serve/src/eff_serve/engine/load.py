"""From the name of a model to a running engine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from eff_attention.layer_reuse import Selector
from eff_embedded.language import SMOLLM2_NAME, smollm2_folder, smollm2_gguf

from eff_serve.engine.config import DecoderConfig, UnsupportedModelError
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.engine import BatchEngine
from eff_serve.engine.gguf.model import GGUFModel
from eff_serve.engine.gguf.tokenizer import gguf_folder
from eff_serve.engine.hf import HFConfig, HFDecoder, hf_config
from eff_serve.engine.quantization import FORMATS, describe
from eff_serve.engine.reuse import read_reuse
from eff_serve.engine.threads import give_memory_back, on_a_thread_that_ends
from eff_serve.models.tokenizer import Tokenizer
from eff_serve.names import EYES
from eff_serve.pictures.eyes import Eyes, open_eyes

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An engine, not yet started, with what belongs to it; ``quantization`` names the formats of its weights."""

    engine: BatchEngine
    tokenizer: Tokenizer
    name: str
    description: str
    quantization: str
    fingerprint: str
    eyes: Eyes | None = None


def load_engine(
    model: str | None = None,
    *,
    quantize: str | None = AUTO,
    threshold: float | None = None,
    max_model_len: int | None = None,
    max_batch: int = 16,
    max_waiting: int = 64,
    kv_gib: float = 1.0,
    layer_reuse: Path | None = None,
    reuse_top_k: int | None = None,
    reuse_min_len: int | None = None,
    reuse_selector: Selector | None = None,
    adapters: Mapping[str, Path] | None = None,
    prefix_cache: bool = True,
    lookup: int = 0,
    progress: bool = True,
) -> LoadedModel:
    """Load a model for serving.

    Args:
        model: A folder in transformers' layout, a GGUF file, or the name of a model on the hub; None is the embedded
            model, and "smollm2-eyes" that model with eyes.
        quantize: Format of all projections: "int8" (LLM.int8()), "int4" (groups of 32), "nvfp4", "mxfp4" or "fp8"
            quantise float weights while loading, None takes weights as they are, "auto" takes a quantised folder and a
            GGUF file as they are, and float weights to int8. With int8 and int4 a float head goes to groups of 8 bits;
            the embedding stays. Models that the lean decoder does not run go through transformers, without quantising.
        threshold: Outlier threshold of int8; 0 takes no outliers out. None is that of the folder where its weights are
            int8, else 6.
        max_model_len: Most tokens of a sequence; the model's own limit by default, if the cache has room for it.
        max_batch: Most sequences that run at once.
        max_waiting: Most requests in line behind them.
        kv_gib: Memory for keys and values, in GiB.
        layer_reuse: Policy file of `eff_attention.layer_reuse`: long sequences decode with fewer keys in some layers.
        reuse_top_k: Keys that these layers attend to, instead of what the file says.
        reuse_min_len: Length from which on they do, instead of what the file says.
        reuse_selector: How the layers that they follow choose: "exact" or "pooled", instead of what the file says.
        adapters: Folders of LoRA adapters that PEFT wrote, or of mixtures of them, by the names that requests use.
        prefix_cache: Share keys between texts that begin alike, those of ended requests included; models that run
            through transformers do not.
        lookup: Tokens to guess from the text so far while one sequence runs alone; the answers stay the same. 0: none.
        progress: Show progress bars on standard error.

    Raises:
        FileNotFoundError: there is no such model here.
        ValueError: the model or a setting is not supported.
    """
    if quantize not in (None, AUTO, *FORMATS):
        raise ValueError(f"quantize must be one of {AUTO}, {', '.join(FORMATS)} or None, got {quantize!r}")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold must be 0 or more, got {threshold}")
    opened = _open_gguf(model, quantize)
    config: DecoderConfig | HFConfig
    if opened is not None:
        folder, config = gguf_folder(opened), opened.config
        quantize = None if quantize == AUTO or model is None else quantize
    else:
        folder = smollm2_folder(progress=progress) if model in (None, EYES) else find_folder(model)
        config = _config(folder, quantize)
    if quantize == AUTO:
        floats = isinstance(config, DecoderConfig) and config.quantization is None and config.int4 is None
        quantize = "int8" if floats else None
    if isinstance(config, HFConfig):
        page_bytes = config.bytes_per_key * PAGE
    else:
        page_bytes = 2 * config.num_layers * config.num_kv_heads * PAGE * config.head_dim * 4
    if layer_reuse is None and any(x is not None for x in (reuse_top_k, reuse_min_len, reuse_selector)):
        raise ValueError("reuse_top_k, reuse_min_len and reuse_selector need a policy in layer_reuse")
    num_pages = int(kv_gib * 2**30 / page_bytes)
    if num_pages < 1:
        raise ValueError(f"kv_gib must hold at least one page of {page_bytes} bytes, got {kv_gib} GiB")
    length = min(config.max_model_len, num_pages * PAGE) if max_model_len is None else max_model_len

    def make_decoder() -> Decoder | HFDecoder:
        if isinstance(config, HFConfig):
            return HFDecoder(folder, num_pages=num_pages)
        return _load(opened or folder, quantize, threshold, num_pages, config.num_layers, progress)

    decoder = on_a_thread_that_ends(make_decoder)
    if layer_reuse is not None:
        if not isinstance(decoder, Decoder):
            raise ValueError("layer_reuse is for models that run on eff's own decoder, and this one does not")
        decoder.reuse = read_reuse(
            layer_reuse,
            top_k=reuse_top_k,
            min_seq_len=reuse_min_len,
            num_layers=len(decoder.layers),
            page=PAGE,
            selector=reuse_selector,
        )
    lean = decoder if isinstance(decoder, Decoder) else None
    if adapters:
        if lean is None:
            raise ValueError("adapters are for models that run on eff's own decoder, and this one does not")
        lean.load_adapters(adapters)
    eyes = None if model != EYES or lean is None else on_a_thread_that_ends(lambda: open_eyes(lean))
    engine = BatchEngine(
        decoder,
        tokenizer_file=folder / "tokenizer.json",
        max_model_len=length,
        max_batch=max_batch,
        max_waiting=max_waiting,
        prefix_cache=prefix_cache,
        lookup=lookup,
    )
    name = SMOLLM2_NAME if model is None else Path(model).name if Path(model).is_dir() else model
    if opened is not None and model is not None:
        name = opened.path.stem
    stored = config.quantization if isinstance(config, DecoderConfig) else None
    as_it_is = opened.describe() if opened is not None else describe(stored) if stored else "float weights"
    if isinstance(config, DecoderConfig) and config.int4 is not None:
        as_it_is = f"{config.int4.method} of 4 bits"
    kind = quantize or as_it_is
    weights = f"{kind}, {decoder.weight_bytes / 2**20:.0f} MiB of weights"
    if isinstance(decoder, Decoder) and decoder.reuse is not None:
        weights += f", {decoder.reuse}"
    if adapters:
        weights += f", {len(adapters)} adapters"
    description = f"{name} ({weights}, up to {engine.max_model_len} tokens)"
    tokenizer = Tokenizer(folder, picture=() if eyes is None else eyes.places)
    give_memory_back()
    return LoadedModel(engine, tokenizer, name, description, kind, _fingerprint(folder, description), eyes)


def _fingerprint(folder: Path, description: str) -> str:
    """A short name for what decides the answers: our version, the model's config, and the format of its weights."""
    facts = (metadata.version("eff-serve"), description, (folder / "config.json").read_text(encoding="utf-8"))
    return "eff-" + hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _open_gguf(model: str | None, quantize: str | None) -> GGUFModel | None:
    """The GGUF file of that name, or the embedded model's, whose codes are int4 already; None for anything else."""
    if model is None and quantize == "int4":
        return GGUFModel(smollm2_gguf())
    if model is None or not model.lower().endswith(".gguf") or Path(model).is_dir():
        return None
    if not Path(model).is_file():
        raise FileNotFoundError(f"no such file: {model}")
    return GGUFModel(Path(model), keep_codes=quantize in (None, AUTO))


def _config(folder: Path, quantize: str | None) -> DecoderConfig | HFConfig:
    """The lean decoder's config where it runs the model, else that of transformers."""
    try:
        return DecoderConfig.from_folder(folder)
    except UnsupportedModelError as error:
        if quantize not in (None, AUTO):
            raise ValueError(f"this model runs only through transformers, without {quantize}: {error}") from error
        return hf_config(folder)


def find_folder(model: str) -> Path:
    """The folder of a model: a path, or the hub's snapshot of a name (cached, fetched where the hub is in reach).

    Raises:
        FileNotFoundError: neither exists.
    """
    if Path(model).is_dir():
        return Path(model)
    if os.sep in model and model.count("/") != 1:
        raise FileNotFoundError(f"no such folder: {model}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # the hub library raises a dozen kinds
        raise FileNotFoundError(f"{model!r} is neither a folder nor a model that the hub can give: {error}") from error


def _load(
    folder: Path | GGUFModel,
    quantize: str | None,
    threshold: float | None,
    num_pages: int,
    layers: int,
    progress: bool,
) -> Decoder:
    def load(on_layer: Callable[[], object]) -> Decoder:
        return Decoder(folder, quantize=quantize, threshold=threshold, num_pages=num_pages, on_layer=on_layer)

    if not progress:
        return load(lambda: None)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Loading weights", total=layers)
        return load(lambda: bar.advance(task))
