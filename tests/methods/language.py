"""Properties of methods on language models: heads, padding, caches, generation, checkpointing."""

import copy
from pathlib import Path
from typing import Any

import torch
from eff_kernels.edit.caches import cache_kwargs
from method_table import Row
from torch import Tensor

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@torch.no_grad()
def gqa(row: Row, folder: Path) -> None:
    """Shared key-value heads give what heads of their own with the same weights give."""
    small = row.make()
    config = copy.deepcopy(small.config)
    times = config.num_attention_heads // config.num_key_value_heads
    assert times > 1
    config.num_key_value_heads = config.num_attention_heads
    config.head_dim = config.hidden_size // config.num_attention_heads
    large = type(small)(config).eval()
    state = small.state_dict()
    for name in state:
        if ".k_proj." in name or ".v_proj." in name:
            heads = state[name].unflatten(0, (-1, config.head_dim))
            state[name] = heads.repeat_interleave(times, 0).flatten(0, 1)
    large.load_state_dict(state)
    row.apply(small)
    row.apply(large)
    found, wanted = row.run(small, row.data(0)), row.run(large, row.data(0))
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@torch.no_grad()
def left_padding(row: Row, folder: Path) -> None:
    """A row behind padding gives what it gives alone."""
    model, _ = row.changed()
    data = row.data(0)
    mask = torch.ones(data.shape[:2], dtype=torch.long)
    pad = data.shape[1] // 4
    mask[1, :pad] = 0
    together = row.run(model, data, mask)
    alone = row.run(model, data[1:, pad:])
    found = together[1:, -alone.shape[1] :]
    assert (found - alone).norm() < 1e-3 * alone.norm()
    noise = data.clone()
    noise[1, :pad] = row.data(9)[1, :pad]
    assert torch.equal(row.run(model, noise, mask)[mask[:, -together.shape[1] :].bool()],
                       together[mask[:, -together.shape[1] :].bool()])  # fmt: skip


def generate(row: Row, folder: Path) -> None:
    """``generate`` gives what a loop of steps with a cache gives."""
    from transformers import DynamicCache

    model, _ = row.changed()
    ids = row.data(0)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    cache, new, line = DynamicCache(config=model.config), ids, ids
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            out = model(input_ids=new, **cache_kwargs(model, cache), use_cache=True)
            new = out.logits[:, -1:].argmax(-1)
            line = torch.cat([line, new], 1)
    assert torch.equal(found, line)


def static_cache(row: Row, folder: Path) -> None:
    """A static cache gives the tokens that a dynamic one gives."""
    model, _ = row.changed()
    ids = row.data(0)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    kinds = {k: {"cache_implementation": k, "disable_compile": True} for k in ("dynamic", "static")}
    found = [model.generate(ids, attention_mask=mask, **GREEDY, **kind) for kind in kinds.values()]
    assert torch.equal(*found)


def beams(row: Row, folder: Path) -> None:
    """Beam search of two prompts gives what it gives for each alone: the cache is reordered with the beams."""
    model, _ = row.changed()
    ids = row.data(0)
    together = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, **GREEDY)
    for i in range(len(ids)):
        own = ids[i : i + 1]
        assert torch.equal(
            model.generate(own, attention_mask=torch.ones_like(own), num_beams=3, **GREEDY)[0], together[i]
        )


def _gradients(row: Row, model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    (row.train or row.run)(model, row.data(0)).float().square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _checkpointing(row: Row, reentrant: bool) -> None:
    model, _ = row.changed()
    model.train()
    wanted = _gradients(row, model)
    assert wanted
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
    found = _gradients(row, model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def checkpointing(row: Row, folder: Path) -> None:
    """Gradients are those without checkpointing."""
    _checkpointing(row, reentrant=False)


def reentrant_checkpointing(row: Row, folder: Path) -> None:
    """The same with PyTorch's older kind."""
    _checkpointing(row, reentrant=True)


LANGUAGE = (gqa, left_padding, generate, static_cache, beams, checkpointing, reentrant_checkpointing)
