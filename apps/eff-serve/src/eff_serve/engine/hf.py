"""Any other causal language model, run by transformers behind the same two functions as the lean decoder.

Each sequence has a cache object of transformers' own, so that every kind of attention and position works as its authors
wrote it; the price is one forward pass for each sequence and step. The engine's pages only count memory here, and a
sequence is known by its first page, which no other sequence holds at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from eff_attention.sink_calibration import ACTConfig, ACTHandle, apply_act
from eff_attention.sink_calibration.apply import treated_heads
from eff_kernels.edit.caches import cache_name
from torch import Tensor

from eff_serve.engine.steering import Steering, check_takes
from eff_serve.engine.watch import PictureWatch
from eff_serve.models.files import read_json
from eff_serve.pictures.prompt import PromptPictures


@dataclass(frozen=True, slots=True)
class HFConfig:
    """What the engine wants to know of a model; see `DecoderConfig`."""

    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    bytes_per_key: int
    """Memory of one token in the caches of all layers."""


class HFDecoder:
    """A transformers model with the interface of `Decoder`.

    Args:
        folder: Model folder.
        num_pages: Pages that the engine may hand out.

    Raises:
        ValueError: transformers cannot run it as a causal language model, or it does not say how long a text may be.
    """

    def __init__(self, folder: Path, *, num_pages: int) -> None:
        import eff_quant.hf  # noqa: F401 - transformers learns to read int8 folders of eff-quant
        from transformers import AutoModelForCausalLM

        self.config = hf_config(folder)
        self.num_pages = num_pages
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        model, info = loaded
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found := sorted(map(str, info.get(kind) or ())):
                raise ValueError(f"the weights in {folder} are not those of its config: {kind} {', '.join(found[:3])}")
        self._model: Any = model.eval()
        self._cache_name = cache_name(self._model)
        self._caches: dict[int, tuple[Any, int]] = {}  # first page -> cache and its length
        self.steerer = HFSteerer(self._model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(t.nbytes for t in (*self._model.parameters(), *self._model.buffers()))

    @torch.inference_mode()
    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        block_table: Tensor,
        steered: Mapping[int, ACTConfig] | None = None,
    ) -> Tensor:
        """Next-token logits [T, vocab] of T sequences; see `Decoder.decode`."""
        rows = zip(tokens, positions.tolist(), block_table[:, 0].tolist(), strict=True)
        logits = []
        for row, (token, start, page) in enumerate(rows):
            self.steerer.use((steered or {}).get(row))
            logits.append(self._forward(token[None], start, page, last_only=True))
        return torch.cat(logits)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Tensor,
        start: int,
        pages: Tensor,
        *,
        all_logits: bool = False,
        steered: ACTConfig | None = None,
    ) -> Tensor:
        """Add T tokens of one sequence that already has ``start`` keys; see `Decoder.prefill`."""
        self.steerer.use(steered)
        return self._forward(tokens, start, int(pages[0]), last_only=not all_logits)

    def _forward(self, tokens: Tensor, start: int, page: int, *, last_only: bool) -> Tensor:
        cache, length = self._caches.pop(page, (None, 0)) if start else (None, 0)
        if length != start:
            raise RuntimeError(f"a sequence goes on at token {start}, but its cache holds {length}")
        out = self._model(
            input_ids=tokens[None],
            position_ids=torch.arange(start, start + tokens.numel())[None],
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
            **{self._cache_name: cache},
        )
        self._caches[page] = (out[self._cache_name], start + tokens.numel())
        logits: Tensor = out.logits[0]
        return (logits[-1:] if last_only else logits).float()


class HFSteerer:
    """Steering of a model of transformers: calibrated attention, put in for the passes of the sequences that ask.

    What is known of a sequence's sinks stays with its cache.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._now: tuple[ACTConfig, ACTHandle] | None = None
        try:
            apply_act(model, ACTConfig(layers=":")).remove()
            self.takes: tuple[str, ...] = ("act",)
        except (NotImplementedError, ValueError):  # no decoder on transformers' interface, or no full attention
            self.takes = ()

    def check(
        self, steering: Steering | None, pictures: PromptPictures | None, watch: PictureWatch | None = None
    ) -> None:
        """See `Steerer.check`."""
        if watch is not None:
            raise ValueError("this model reads text only, and where an answer looks in a picture cannot be watched")
        if steering is None:
            return
        check_takes(steering, self.takes)
        if steering.act is not None:
            treated_heads(self._model, steering.act)

    def begin(
        self,
        steering: Steering | None,
        prompt: Tensor,
        pictures: PromptPictures | None,
        adapter: int = -1,
        watch: PictureWatch | None = None,
    ) -> ACTConfig | None:
        """See `Steerer.begin`."""
        return None if steering is None else steering.act

    def use(self, config: ACTConfig | None) -> None:
        """Calibrate by these settings from now on, or not at all."""
        if self._now is not None and self._now[0] != config:
            self._now[1].remove()
            self._now = None
        if config is not None and self._now is None:
            self._now = config, apply_act(self._model, config)


def hf_config(folder: Path) -> HFConfig:
    """Read a model folder's limits through transformers.

    Raises:
        ValueError: transformers does not know the model, or the config names no length.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    length = next(
        (n for k in ("max_position_embeddings", "n_positions", "max_seq_len") if (n := getattr(config, k, None))), None
    )
    if not length:
        raise ValueError(f"the config of {folder} does not say how many tokens the model takes")
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    eos = read_json(folder / "generation_config.json").get("eos_token_id")
    ids = {i for v in (eos, config.eos_token_id) for i in ([v] if isinstance(v, int) else v or [])}
    return HFConfig(
        architecture=(config.architectures or [config.model_type])[0],
        vocab_size=config.vocab_size,
        max_model_len=length,
        eos_token_ids=frozenset(ids),
        bytes_per_key=2 * 4 * config.num_hidden_layers * kv_heads * size,
    )
