"""From the name of a model to a running engine."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from eff_embedded.language import smollm2_folder, smollm2_gguf
from eff_quant.hub import headers
from safetensors import SafetensorError

from eff_serve.engine.config import DecoderConfig, UnsupportedModelError
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.engine import BatchEngine
from eff_serve.engine.gguf.model import GGUFModel
from eff_serve.engine.gguf.tokenizer import gguf_folder
from eff_serve.engine.hf import HFConfig, HFDecoder, hf_config
from eff_serve.engine.quantization import describe
from eff_serve.engine.reuse import read_reuse
from eff_serve.engine.threads import give_memory_back, on_a_thread_that_ends
from eff_serve.engine_config import EngineConfig
from eff_serve.models.tokenizer import Tokenizer
from eff_serve.names import EYES, model_name
from eff_serve.pictures.eyes import Eyes, open_eyes

AUTO = "auto"
_BYTES_PER_WEIGHT = {"int8": 1.0, "fp8": 1.0, "int4": 0.625, "nvfp4": 0.5625, "mxfp4": 0.53125}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An engine, not yet started, with what belongs to it.

    Attributes:
        quantization: Formats of its weights.
        memory: Bytes of its weights and of its room for keys and values.
    """

    engine: BatchEngine
    tokenizer: Tokenizer
    name: str
    description: str
    quantization: str
    fingerprint: str
    memory: int
    eyes: Eyes | None = None


def load_engine(config: EngineConfig | None = None, *, progress: bool = True) -> LoadedModel:
    """Load a model for serving.

    Args:
        config: Which model, and how; by default the embedded one in int8.
        progress: Show progress bars on standard error.

    Raises:
        FileNotFoundError: there is no such model here.
        ValueError: the model or a setting is not supported.
    """
    config = config or EngineConfig()
    source = _find(config, progress)
    num_pages = int(config.kv_gib * 2**30 / source.page_bytes)
    if num_pages < 1:
        raise ValueError(f"kv_gib must hold at least one page of {source.page_bytes} bytes, got {config.kv_gib} GiB")
    if config.max_model_len is None:
        config = replace(config, max_model_len=min(source.config.max_model_len, num_pages * PAGE))
    decoder = on_a_thread_that_ends(lambda: _decoder(source, config, num_pages, progress))
    eyes = None
    if config.model == EYES and isinstance(decoder, Decoder):
        lean = decoder
        eyes = on_a_thread_that_ends(lambda: open_eyes(lean))
    engine = BatchEngine(decoder, config, tokenizer_file=source.folder / "tokenizer.json")
    name = model_name(config.model)
    description = f"{name} ({_weights(source, config, decoder)}, up to {engine.max_model_len} tokens)"
    tokenizer = Tokenizer(source.folder, picture=() if eyes is None else eyes.places)
    give_memory_back()
    kind = source.quantize or source.stored
    fingerprint = _fingerprint(source.folder, description)
    memory = decoder.weight_bytes + num_pages * source.page_bytes
    return LoadedModel(engine, tokenizer, name, description, kind, fingerprint, memory, eyes)


def load_tokenizer(config: EngineConfig) -> Tokenizer:
    """The tokenizer of a model alone, for a server whose replicas hold the weights.

    Raises:
        FileNotFoundError, ValueError: as `load_engine`.
    """
    return Tokenizer(_find(config, progress=False).folder)


def expected_memory(config: EngineConfig) -> int:
    """Bytes of weights and of room for keys and values that `load_engine` would take, from the headers of its files.

    Raises:
        FileNotFoundError: there is no such model here.
        ValueError: the model is not supported, or a file is damaged.
    """
    source = _find(config, progress=False)
    cache = int(config.kv_gib * 2**30 / source.page_bytes) * source.page_bytes
    if source.gguf is not None:
        return cache + source.gguf.path.stat().st_size
    try:
        weights = headers(sorted(source.folder.glob("*.safetensors")))
    except SafetensorError as error:
        raise ValueError(f"{source.folder} holds a damaged file: {error}") from error
    if isinstance(source.config, HFConfig):
        return cache + 4 * sum(w.numel() for w in weights.values())  # transformers holds them in float32
    small = _BYTES_PER_WEIGHT.get(source.quantize or "")
    projections = {n: w for n, w in weights.items() if n.endswith("_proj.weight") and small is not None}
    kept = sum(w.nbytes for n, w in weights.items() if n not in projections)
    return cache + kept + int((small or 0) * sum(w.numel() for w in projections.values()))


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a model comes from.

    Attributes:
        folder: With its config and tokenizer.
        config: Its shape.
        quantize: Format that its float weights are to have; None leaves all as they are.
        gguf: The file, if it is one.
    """

    folder: Path
    config: DecoderConfig | HFConfig
    quantize: str | None
    gguf: GGUFModel | None = None

    @property
    def page_bytes(self) -> int:
        """Memory of a page of keys and values, in all layers."""
        c = self.config
        if isinstance(c, HFConfig):
            return c.bytes_per_key * PAGE
        return 2 * c.num_layers * c.num_kv_heads * PAGE * c.head_dim * 4

    @property
    def stored(self) -> str:
        """The formats of the weights as they are, in a few words."""
        if self.gguf is not None:
            return self.gguf.describe()
        if isinstance(self.config, DecoderConfig) and self.config.int4 is not None:
            return f"{self.config.int4.method} of 4 bits"
        stored = self.config.quantization if isinstance(self.config, DecoderConfig) else None
        return describe(stored) if stored else "float weights"


def _find(config: EngineConfig, progress: bool) -> _Source:
    quantize = None if config.quantize == "none" else config.quantize
    if (gguf := _open_gguf(config.model, quantize)) is not None:
        as_it_is = quantize == AUTO or config.model is None
        return _Source(gguf_folder(gguf), gguf.config, None if as_it_is else quantize, gguf)
    embedded = config.model in (None, EYES)
    folder = smollm2_folder(progress=progress) if embedded else find_folder(str(config.model))
    shape = _config(folder, quantize)
    if quantize == AUTO:
        floats = isinstance(shape, DecoderConfig) and shape.quantization is None and shape.int4 is None
        quantize = "int8" if floats else None
    return _Source(folder, shape, quantize)


def _decoder(source: _Source, config: EngineConfig, num_pages: int, progress: bool) -> Decoder | HFDecoder:
    if isinstance(source.config, HFConfig):
        if config.layer_reuse is not None or config.adapters:
            what = "adapters are" if config.layer_reuse is None else "layer_reuse is"
            raise ValueError(f"{what} for models that run on eff's own decoder, and this one does not")
        return HFDecoder(source.folder, num_pages=num_pages)
    with _progress(progress, source.config.num_layers) as on_layer:
        decoder = Decoder(
            source.gguf or source.folder,
            quantize=source.quantize,
            threshold=config.threshold,
            num_pages=num_pages,
            on_layer=on_layer,
        )
    if config.layer_reuse is not None:
        decoder.reuse = read_reuse(
            config.layer_reuse,
            top_k=config.reuse_top_k,
            min_seq_len=config.reuse_min_len,
            selector=config.reuse_selector,
            num_layers=len(decoder.layers),
            page=PAGE,
        )
    if config.adapters:
        decoder.load_adapters(config.adapters)
    return decoder


def _weights(source: _Source, config: EngineConfig, decoder: Decoder | HFDecoder) -> str:
    """The weights in a few words, for the banner."""
    words = [source.quantize or source.stored, f"{decoder.weight_bytes / 2**20:.0f} MiB of weights"]
    if isinstance(decoder, Decoder) and decoder.reuse is not None:
        words.append(str(decoder.reuse))
    if config.adapters:
        words.append(f"{len(config.adapters)} adapters")
    return ", ".join(words)


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


@contextmanager
def _progress(shown: bool, layers: int) -> Iterator[Callable[[], object]]:
    """A bar on standard error, if that is a terminal, and what moves it by one layer."""
    if not (shown and sys.stderr.isatty()):  # nobody watches a log, and its disk may be full
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Loading weights", total=layers)
        yield lambda: bar.advance(task)
