"""SmolLM2's forward pass as the training wants it: pictures first, then all turns about them side by side.

The opening of the chat is the same in every sample and has no LoRA: its keys and values are computed once. Each turn
sees the opening, the picture and itself, as if it had been asked alone. Written out, so that one compiled function
serves all layers; a test compares it with transformers' own forward pass.

Suffixes: B pictures, R rows of a picture, L tokens of a row, S earlier keys, H query heads, G key-value heads, D head
dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from eff_kernels.edit.caches import returned_cache
from torch import Tensor, nn
from torch.nn import functional as F


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm, in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [B, R, L, heads, D] with cos and sin [B, R, L, 1, D]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def low_rank(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A projection with its LoRA."""
    return F.linear(x, weight) + F.linear(F.linear(x, a), b)


def block(
    x: Tensor, w: tuple[Tensor, ...], cos: Tensor, sin: Tensor, bias: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer with LoRA: hidden states, new keys and new values [B, R, G, L, D].

    Args:
        x: [B, R, L, hidden].
        w: Weights in the order of `layer_weights`.
        cos: Cosine of the tokens' positions, [B, R, L, 1, D].
        sin: Sine of the same.
        bias: Added to the scores of keys of the same row, [B, R, 1, L, L].
        k_BGSD: Keys that all rows of a picture see.
        v_BGSD: Values of the same.
        eps: Of the norms.
    """
    norm, wq, aq, bq, wk, ak, bk, wv, av, bv, wo, ao, bo, norm2, gate, up, down, ad, bd = w
    B, R, L, _ = x.shape
    G, D = k_BGSD.shape[1], k_BGSD.shape[3]
    h = rms(x, norm, eps)
    q = turn(low_rank(h, wq, aq, bq).view(B, R, L, -1, D), cos, sin)
    k_new = turn(low_rank(h, wk, ak, bk).view(B, R, L, G, D), cos, sin).transpose(2, 3)
    v_new = low_rank(h, wv, av, bv).view(B, R, L, G, D).transpose(2, 3)
    n = q.shape[3] // G
    q = q.view(B, R, L, G, n, D) * D**-0.5
    early = q.permute(0, 3, 1, 4, 2, 5).reshape(B, G, R * n * L, D) @ k_BGSD.transpose(-1, -2)
    early = early.view(B, G, R, n, L, -1).permute(0, 2, 1, 3, 4, 5)
    own = q.permute(0, 1, 3, 4, 2, 5).reshape(B, R, G, n * L, D) @ k_new.transpose(-1, -2)
    own = own.view(B, R, G, n, L, L) + bias[:, :, None]
    p = torch.softmax(torch.cat([early, own], -1).float(), -1).to(x.dtype)
    p_early, p_own = p.split([k_BGSD.shape[2], L], -1)
    seen = p_early.permute(0, 2, 1, 3, 4, 5).reshape(B, G, R * n * L, -1) @ v_BGSD
    seen = seen.view(B, G, R, n, L, D).permute(0, 2, 4, 1, 3, 5)
    mine = (p_own.reshape(B, R, G, n * L, L) @ v_new).view(B, R, G, n, L, D).permute(0, 1, 4, 2, 3, 5)
    x = x + low_rank((seen + mine).reshape(B, R, L, -1), wo, ao, bo)
    h = rms(x, norm2, eps)
    return x + low_rank(F.silu(F.linear(h, gate)) * F.linear(h, up), down, ad, bd), k_new, v_new


def layer_weights(layer: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Weights of a layer for `block`; those that are trained are cast again at each step."""
    a, m = layer.self_attn, layer.mlp
    found: list[Tensor] = [layer.input_layernorm.weight]
    for linear in (a.q_proj, a.k_proj, a.v_proj, a.o_proj):
        found += [linear.weight, linear.lora_a, linear.lora_b]
    found += [layer.post_attention_layernorm.weight, m.gate_proj.weight, m.up_proj.weight]
    found += [m.down_proj.weight, m.down_proj.lora_a, m.down_proj.lora_b]
    return tuple(t.to(dtype) for t in found)


class Forward:
    """Hidden states behind pictures.

    Args:
        language: The Llama model whose layers carry LoRA.
        opening: Token ids in front of the picture.
        compiled: Compile `block`, which halves the time of a step.
    """

    def __init__(self, language: Any, opening: list[int], *, compiled: bool = True) -> None:
        self.language = language
        self.eps = language.config.rms_norm_eps
        self.dtype = language.embed_tokens.weight.dtype
        self.block = torch.compile(block, dynamic=False) if compiled else block
        with torch.no_grad():
            cache = returned_cache(language(input_ids=torch.tensor([opening]), use_cache=True))
        self.opening = len(opening)
        self.prefix = [(layer.keys, layer.values) for layer in cache.layers]

    def __call__(self, picture: Tensor, tokens: Tensor, places: Tensor, turns: Tensor) -> Tensor:
        """Last hidden states [B, R, L, hidden].

        Args:
            picture: Embeddings of the patches, [B, patches, hidden].
            tokens: int64 [B, R, L]; this and the others as in `eff_train.recipes.smollm2_eyes.data.Batch`.
            places: int64 [B, R, L].
            turns: int64 [B, R, L].
        """
        B, P, _ = picture.shape
        first = self.opening + P
        self_seen = torch.full((P, P), -torch.inf, dtype=self.dtype).triu(1)[None, None, None]
        cos_p, sin_p = self._rotary(torch.arange(self.opening, first)[None, None])
        cos, sin = self._rotary(places + first)
        same = (turns[..., :, None] == turns[..., None, :]).tril()
        bias = torch.zeros(same.shape, dtype=self.dtype).masked_fill(~same, -torch.inf)[:, :, None]
        x = picture[:, None].to(self.dtype)
        y = self.language.embed_tokens(tokens)
        for layer, (k0, v0) in zip(self.language.layers, self.prefix, strict=True):
            w = layer_weights(layer, self.dtype)
            k0, v0 = k0.expand(B, -1, -1, -1), v0.expand(B, -1, -1, -1)
            x, k, v = self.block(x, w, cos_p, sin_p, self_seen, k0, v0, self.eps)
            k, v = torch.cat([k0, k[:, 0]], 2), torch.cat([v0, v[:, 0]], 2)
            y, _, _ = self.block(y, w, cos, sin, bias, k, v, self.eps)
        return rms(y, self.language.norm.weight, self.eps)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.language.rotary_emb(self.language.embed_tokens.weight[:1], positions.flatten()[None])
        shape = (*positions.shape, 1, cos.shape[-1])
        return cos.view(shape), sin.view(shape)


def answer_loss(hidden: Tensor, head: nn.Linear, tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers' tokens, and the share of them that would be chosen."""
    at = answers[..., :-1]
    logits = head(hidden[..., :-1, :][at]).float()
    wanted = tokens[..., 1:][at]
    return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean()
