"""A lean decoder for Llama-like models: fused projections, a paged key-value cache, nothing else between the kernels.

Suffixes: T tokens, H query heads, G key-value heads, D head dimension, P pages, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from eff_kernels import add_rms_norm, decode_attention, rms_norm, rope, row_write, swiglu
from torch import Tensor
from torch.nn import functional

from eff_serve.engine.adapters import Adapters, Rows, Tables
from eff_serve.engine.block_pool import untouched
from eff_serve.engine.config import DecoderConfig
from eff_serve.engine.gguf.model import GGUFModel
from eff_serve.engine.linear import Linear
from eff_serve.engine.quantization import describe, settings_for, settings_of_layer, with_threshold
from eff_serve.engine.quantized import head_in_bytes, load_linear
from eff_serve.engine.reuse import LayerReuse
from eff_serve.engine.steered import Steered
from eff_serve.engine.steering import Steerer
from eff_serve.engine.steps import Steps, StepsOf
from eff_serve.engine.weights import Checkpoint
from eff_serve.pictures.prompt import LowRank, PromptPictures

PAGE = 32
"""Keys per page: small enough to waste little memory, large enough to keep block tables short."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block."""

    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """A model with its key-value cache of ``num_pages`` pages.

    Args:
        folder: Model folder (config.json and safetensors), or a GGUF file that was opened.
        quantize: Format to quantise the projections of a float checkpoint to, see `quantization.FORMATS`; None takes
            them as they are.
        threshold: Outlier threshold of int8 layers; 0 takes no outliers out. None is that of the checkpoint where its
            weights are int8, else that of `Int8Config`.
        num_pages: Pages of `PAGE` keys in the cache, shared by all sequences.
        on_layer: Called after each loaded layer, for progress.

    Raises:
        UnsupportedModelError, CheckpointError: the folder does not fit.
        ValueError: the folder is quantised already, or the threshold is for no layer.
    """

    def __init__(
        self,
        folder: Path | GGUFModel,
        *,
        quantize: str | None = None,
        threshold: float | None = None,
        num_pages: int,
        on_layer: Callable[[], object] = lambda: None,
    ) -> None:
        self.config = c = folder.config if isinstance(folder, GGUFModel) else DecoderConfig.from_folder(folder)
        checkpoint = folder if isinstance(folder, GGUFModel) else Checkpoint(folder, c.int4)
        stored = c.quantization
        if c.int4 is not None and quantize:
            raise ValueError(f"{folder} is quantised already ({c.int4.method}); leave out quantize={quantize!r}")
        if stored is None:
            settings = settings_for(quantize, threshold) if quantize else None
            if threshold is not None and settings is None:
                raise ValueError(f"threshold={threshold} is for int8, which the weights are not")
        elif quantize:
            raise ValueError(f"{folder} is quantised already ({describe(stored)}); leave out quantize={quantize!r}")
        else:
            settings, stored = None, with_threshold(stored, threshold)
        h, d = c.hidden_size, c.head_dim

        def linear(names: list[str], sizes: list[int], k: int) -> Linear:
            of_layer = partial(settings_of_layer, stored)
            return load_linear(checkpoint, names, sizes, k, stored=of_layer, quantize=settings)

        self.layers = []
        for i in range(c.num_layers):
            block, attention, mlp = (f"model.layers.{i}{part}" for part in ("", ".self_attn", ".mlp"))
            q_size, kv_size = c.num_heads * d, c.num_kv_heads * d
            names = [f"{attention}.{p}_proj" for p in "qkv"]
            self.layers.append(
                Layer(
                    attention_norm=checkpoint.floats(f"{block}.input_layernorm.weight", (h,)),
                    qkv=linear(names, [q_size, kv_size, kv_size], h),
                    q_norm=checkpoint.floats(f"{attention}.q_norm.weight", (d,)) if c.qk_norm else None,
                    k_norm=checkpoint.floats(f"{attention}.k_norm.weight", (d,)) if c.qk_norm else None,
                    output=linear([f"{attention}.o_proj"], [h], q_size),
                    mlp_norm=checkpoint.floats(f"{block}.post_attention_layernorm.weight", (h,)),
                    gate_up=linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"], [c.intermediate_size] * 2, h),
                    down=linear([f"{mlp}.down_proj"], [h], c.intermediate_size),
                )
            )
            on_layer()
        self.norm = checkpoint.floats("model.norm.weight", (h,))
        self.embedding, self.head = checkpoint.ends(c.vocab_size, h, tied=c.tie_word_embeddings)
        self._one_end = c.tie_word_embeddings
        if settings is not None and (head := head_in_bytes(settings, self.head)) is not None:
            self.head, self._one_end = head, False
        checkpoint.check_all_read("lm_head.weight")  # tied models may store it all the same
        self.cos, self.sin = c.rotary(torch.arange(c.max_model_len))
        self.num_pages = num_pages
        self.reuse: LayerReuse | None = None
        self.behind_pictures: LowRank | None = None
        self.adapters: Adapters | None = None
        self.steerer = Steerer(self)
        widest = min(num_pages, -(-c.max_model_len // PAGE))
        self._steps = Steps(self._plain_step, widest=widest)
        self._adapted_steps = StepsOf(self._adapted_step, widest=widest)
        shape = (num_pages, c.num_kv_heads, PAGE, d)
        self.keys = [untouched(shape) for _ in range(c.num_layers)]
        self.values = [untouched(shape) for _ in range(c.num_layers)]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, the embedding included once."""
        per_layer = sum(w.nbytes for layer in self.layers for w in (layer.qkv, layer.output, layer.gate_up, layer.down))
        low_rank = 0 if self.behind_pictures is None else self.behind_pictures.nbytes
        low_rank += 0 if self.adapters is None else self.adapters.nbytes
        head = 0 if self._one_end else self.head.nbytes
        return per_layer + self.embedding.nbytes + head + low_rank

    def load_adapters(self, folders: Mapping[str, Path]) -> None:
        """Hold LoRA adapters, by the names that requests use; see `Adapters`."""
        self.adapters = Adapters(folders, self.config.projections, self.config.num_layers)

    @torch.inference_mode()
    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        block_table: Tensor,
        behind: Tensor | None = None,
        adapters: Tensor | None = None,
        steered: Mapping[int, Steered] | None = None,
    ) -> Tensor:
        """Next-token logits [T, vocab] of T sequences that each add one token at its position.

        Args:
            tokens: int64 [T].
            positions: int64 [T], the number of keys that each sequence already has.
            block_table: int32 [T, max_pages], with room for the new key.
            behind: int64, the rows of sequences with a picture, where `behind_pictures` acts; None is no row.
            adapters: int64 [T], number of each sequence's adapter, -1 for none; None is none for all.
            steered: Rules of attention of some rows.
        """
        c = self.config
        rows = torch.arange(tokens.size(0))
        pages = block_table[rows, positions // PAGE].long()
        at, written = self._cache_rows(pages, positions), (pages, positions % PAGE + 1)
        lengths = (positions + 1).to(torch.int32)
        step = None if self.reuse is None else self.reuse.step(lengths.tolist(), block_table)
        for row, one in (steered or {}).items():
            one.begin(int(positions[row]), 1)

        def attend(layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
            self._write(layer, at, written, k_TGD, v_TGD)
            keys, values = self.keys[layer], self.values[layer]
            if step is not None:
                return step.attend(layer, q_THD, keys, values)
            out = decode_attention(q_THD, keys, values, lengths, block_table=block_table)
            for row, one in (steered or {}).items():
                held = partial(self._held, layer, block_table[row], int(lengths[row]))
                out[row] = one.attend(layer, q_THD[row, None], out[row, None], held, c.num_kv_heads)[0]
            return out

        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        residual, adapted = self.embedding[tokens].float(), self._adapted(adapters)
        if self.reuse is None and behind is None and not steered:
            given = residual, cos, sin, at, lengths
            if adapted is None:
                return self.head(self._steps(*given, block_table))
            if adapted.slots is not None and not adapted.mixtures:
                return self.head(self._adapted_steps(adapted.tables, adapted.slots, *given, block_table))
        return self.head(self._blocks(residual, partial(_turned_each, cos, sin), attend, behind, adapted))

    def _adapted_step(self, tables: Tables, slots: Tensor, *plain: Tensor) -> Tensor:
        """`_plain_step` of sequences with single adapters of ``tables``."""
        step: Callable[..., Tensor] = self._plain_step
        return step(*plain, adapted=Rows(tables, slots, ()))

    def _plain_step(
        self,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        at: Tensor,
        lengths: Tensor,
        block_table: Tensor,
        adapted: Rows | None = None,
    ) -> Tensor:
        """A decoding step of sequences that ask for nothing more, from embeddings to hidden states; see `Steps`."""

        def attend(layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
            self._write(layer, at, None, k_TGD, v_TGD)
            return decode_attention(q_THD, self.keys[layer], self.values[layer], lengths, block_table=block_table)

        return self._blocks(residual, partial(_turned_each, cos, sin), attend, None, adapted)

    def _adapted(self, numbers: Tensor | None) -> Rows | None:
        """What each row's adapter is, by the adapters' numbers; None if none has one."""
        return None if numbers is None or self.adapters is None else self.adapters.rows(numbers)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Tensor,
        start: int,
        pages: Tensor,
        *,
        all_logits: bool = False,
        pictures: PromptPictures | None = None,
        adapter: int = -1,
        steered: Steered | None = None,
    ) -> Tensor:
        """Add T tokens of one sequence with ``start`` keys; logits of the last [1, vocab], or all [T, vocab].

        Args:
            tokens: int64 [T].
            start: Keys already in the cache.
            pages: int64, the pages of the sequence, enough for start + T keys.
            all_logits: Return the logits after every token.
            pictures: The sequence's pictures; from the first on `behind_pictures` acts.
            adapter: Number of the sequence's adapter; -1 is none.
            steered: Rules of the sequence's attention; they want a prompt in one piece.
        """
        if steered is not None:
            steered.begin(start, tokens.size(0))
        end = start + tokens.size(0)
        positions = torch.arange(start, end)
        at = self._cache_rows(pages[positions // PAGE], positions)
        used = pages[: -(-end // PAGE)]
        # Each token attends as it would in a step of its own, with the same sums in the same order: a text gives the
        # same bits however it is cut into pieces, and whatever of it was in the cache.
        table, lengths = used.to(torch.int32).expand(tokens.size(0), -1).contiguous(), (positions + 1).to(torch.int32)
        new = torch.arange(start // PAGE, used.size(0))
        written = used[new].long(), (end - new * PAGE).clamp(max=PAGE)

        def attend(layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
            self._write(layer, at, written, k_TGD, v_TGD)
            out = decode_attention(q_THD, self.keys[layer], self.values[layer], lengths, block_table=table)
            if steered is None:
                return out
            held = partial(self._held, layer, used, end)
            return steered.attend(layer, q_THD, out, held, self.config.num_kv_heads)

        residual, behind = self.embedding[tokens].float(), None
        if pictures is not None:
            pictures.put_into(residual, start)
            if pictures.first < end:
                behind = torch.arange(max(pictures.first - start, 0), tokens.size(0))
        adapters = None if adapter < 0 else torch.full((tokens.size(0),), adapter)
        turned, watch = partial(self._turned, start), None if steered is None else steered.watch
        hidden = self._blocks(residual, turned, attend, behind, self._adapted(adapters), watch)
        return self.head(hidden if all_logits else hidden[-1:])

    @torch.inference_mode()
    def look(
        self,
        tokens: Tensor,
        *,
        on_hidden: Callable[[int, Tensor], object] | None = None,
        on_output: Callable[[int, Tensor], object] = lambda layer, out: None,
        on_last: Callable[[Tensor], object] = lambda hidden: None,
        behind: Tensor | None = None,
        adapter: int = -1,
        steered: Steered | None = None,
    ) -> None:
        """Read T tokens as a sequence of their own, without the cache, for what goes on inside.

        Args:
            tokens: int64 [T].
            on_hidden: Gets each layer's number and the hidden states [T, hidden] that enter it.
            on_output: Gets each layer's number and the outputs of its heads [T, H, D].
            on_last: Gets the hidden states [T, hidden] behind the last norm.
            behind: int64, the tokens where `behind_pictures` acts.
            adapter: Number of an adapter; -1 is none.
            steered: Rules of attention.
        """
        if steered is not None:
            steered.begin(0, tokens.size(0))

        def attend(layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
            keys, values = k_TGD.transpose(0, 1), v_TGD.transpose(0, 1)
            out = _attended(q_THD, keys, values)
            if steered is not None:
                out = steered.attend(layer, q_THD, out, lambda: (keys, values), self.config.num_kv_heads)
            on_output(layer, out)
            return out

        adapters = None if adapter < 0 else torch.full((tokens.size(0),), adapter)
        residual = self.embedding[tokens].float()
        on_last(self._blocks(residual, partial(self._turned, 0), attend, behind, self._adapted(adapters), on_hidden))

    def copy_page(self, source: int, target: int, count: int) -> None:
        """Copy the first ``count`` keys and values of a page to another, in all layers."""
        for cache in (*self.keys, *self.values):
            cache[target, :, :count] = cache[source, :, :count]

    def _turned(self, start: int, x_TND: Tensor) -> Tensor:
        """Queries and keys of one sequence's tokens from place ``start`` on, after the rotation."""
        end = start + x_TND.size(0)
        cos, sin = self.cos[None, start:end], self.sin[None, start:end]
        return rope(x_TND.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1)

    def _held(self, layer: int, pages: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` keys and values [G, S, D] of a sequence in a layer's cache."""
        used = pages[: -(-count // PAGE)]
        caches = (self.keys[layer], self.values[layer])
        keys, values = (cache[used].transpose(0, 1).flatten(1, 2)[:, :count] for cache in caches)
        return keys, values

    def _cache_rows(self, pages_T: Tensor, positions: Tensor) -> Tensor:
        """Where the keys of T tokens lie in a layer's cache, seen as rows of head_dim numbers: [T * G]."""
        heads = self.config.num_kv_heads
        return (((pages_T[:, None] * heads + torch.arange(heads)) * PAGE) + positions[:, None] % PAGE).flatten()

    def _write(
        self, layer: int, at: Tensor, written: tuple[Tensor, Tensor] | None, k_TGD: Tensor, v_TGD: Tensor
    ) -> None:
        """Put keys and values ``at`` their rows; ``written``: the pages of these, and the keys that each then holds."""
        for cache, new in ((self.keys[layer], k_TGD), (self.values[layer], v_TGD)):
            row_write(cache.view(-1, self.config.head_dim), at, new)
        if self.reuse is not None and written is not None:
            self.reuse.wrote(layer, self.keys[layer], *written)

    def _blocks(
        self,
        residual: Tensor,
        rotate: Callable[[Tensor], Tensor],
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        behind: Tensor | None,
        adapted: Rows | None,
        watch: Callable[[int, Tensor], object] | None = None,
    ) -> Tensor:
        """All layers and the last norm, from embeddings to hidden states [T, hidden]."""
        c = self.config
        count, q_heads, kv_heads, size = residual.size(0), c.num_heads, c.num_kv_heads, c.intermediate_size

        def project(i: int, name: str, linear: Linear, x: Tensor) -> Tensor:
            y = linear(x)
            if behind is not None and self.behind_pictures is not None:
                self.behind_pictures.add(i, name, x, y, behind)
            if adapted is not None:
                y = adapted.add(i, name, x, y)
            return y

        x = rms_norm(residual, self.layers[0].attention_norm, eps=c.rms_norm_eps)
        for i, layer in enumerate(self.layers):
            if watch is not None:
                watch(i, residual)
            qkv_TND = project(i, "qkv", layer.qkv, x).view(count, q_heads + 2 * kv_heads, c.head_dim)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = qkv_TND[:, :q_heads], qkv_TND[:, q_heads : q_heads + kv_heads]
                q, k = rms_norm(q, layer.q_norm, eps=c.rms_norm_eps), rms_norm(k, layer.k_norm, eps=c.rms_norm_eps)
                q, k = rotate(q), rotate(k)
            else:
                qk = rotate(qkv_TND[:, : q_heads + kv_heads])
                q, k = qk[:, :q_heads], qk[:, q_heads:]
            mixed = attend(i, q, k, qkv_TND[:, q_heads + kv_heads :])
            attended = project(i, "output", layer.output, mixed.reshape(count, -1))
            x, residual = add_rms_norm(attended, residual, layer.mlp_norm, eps=c.rms_norm_eps)
            gate_up = project(i, "gate_up", layer.gate_up, x)
            mlp = project(i, "down", layer.down, swiglu(gate_up[:, :size], gate_up[:, size:]))
            norm = self.layers[i + 1].attention_norm if i + 1 < c.num_layers else self.norm
            x, residual = add_rms_norm(mlp, residual, norm, eps=c.rms_norm_eps)
        return x


def _turned_each(cos: Tensor, sin: Tensor, x_TND: Tensor) -> Tensor:
    """Queries and keys of T sequences of one token each, after the rotation by cos and sin [T, 1, D / 2]."""
    return rope(x_TND.unsqueeze(2), cos, sin).squeeze(2)


def _attended(q_THD: Tensor, k_GSD: Tensor, v_GSD: Tensor) -> Tensor:
    """PyTorch's attention [T, H, D] of one sequence from its beginning."""
    out = functional.scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None], k_GSD[None], v_GSD[None], is_causal=True, enable_gqa=True
    )
    return out[0].transpose(0, 1)
