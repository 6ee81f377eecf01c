"""One table of methods x properties: what every method of every package must hold, or must refuse in its own words.

A row is a file in ``rows/`` that ends in ``ROWS = [Row(...), ...]``; a property is a function here. A property that a
method cannot have is named in the row with the text of its error, which is checked as well.
"""

import copy
import dataclasses
import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from eff_kernels.edit.caches import cache_kwargs
from torch import Tensor, nn

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on a tiny model.

    Attributes:
        name: Of the method.
        make: A new model, the same each time.
        apply: Changes the model and returns a handle, or whatever the method returns.
        run: ``run(model, data, mask)`` gives a tensor [B, ...]; mask [B, T] is 0 at padding, or None.
        data: ``data(seed)``: inputs of the model, such as ids [B, T].
        train: As ``run``, for gradients; None for ``run`` itself.
        brief: As ``run``, for what is slow, such as compiling; None for ``run`` itself.
        save, load: ``save(model, folder)`` keeps a changed model, ``load(folder)`` gives it back.
        lora: Linear layers that an adapter goes to.
        loose: Relative error that bfloat16 may cause.
        cannot: By property that does not hold: a regular expression that its error fits.
    """

    name: str
    make: Callable[[], nn.Module]
    apply: Callable[[nn.Module], Any]
    run: Callable[..., Tensor]
    data: Callable[[int], Tensor]
    save: Callable[[nn.Module, Path], None]
    load: Callable[[Path], nn.Module]
    train: Callable[..., Tensor] | None = None
    brief: Callable[..., Tensor] | None = None
    lora: tuple[str, ...] = ("q_proj", "down_proj")
    loose: float = 0.05
    cannot: Mapping[str, str] = field(default_factory=dict)

    def changed(self) -> tuple[Any, Any]:
        """A model that the method has changed, and what the method returned."""
        model = self.make()
        return model, self.apply(model)


def load_rows() -> list[Row]:
    """The rows of all files, in order of their names."""
    rows: list[Row] = []
    for path in sorted((HERE / "rows").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"method_rows_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where pickles look for its classes
        spec.loader.exec_module(module)
        rows += module.ROWS
    return rows


# --- small models ---------------------------------------------------------------------------------------------------


def llama(kv_heads: int = 2, layers: int = 2, **more: Any) -> nn.Module:
    """A Llama of 97 tokens with grouped heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, initializer_range=0.2, pad_token_id=0, eos_token_id=None, bos_token_id=None,
        max_position_embeddings=256, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def token_ids(seed: int, batch: int = 2, length: int = 24) -> Tensor:
    """Ids [B, T] without the one that stands for padding."""
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of one pass without a cache."""
    more = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return model(input_ids=ids, use_cache=False, **more).logits


GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


# --- properties -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def undo(row: Row, folder: Path) -> None:
    """``remove()`` gives the model back bit for bit."""
    model, data = row.make(), row.data(0)
    before, state = row.run(model, data), {k: v.clone() for k, v in model.state_dict().items()}
    handle = row.apply(model)
    handle.remove()
    handle.remove()
    assert torch.equal(row.run(model, data), before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert not any("forward" in vars(m) for m in model.modules())


@torch.no_grad()
def changes(row: Row, folder: Path) -> None:
    """The method does something."""
    model, data = row.make(), row.data(0)
    before = row.run(model, data)
    row.apply(model)
    after = row.run(model, data)
    assert after.isfinite().all()
    assert after.shape == before.shape
    assert not torch.equal(after, before)


@torch.no_grad()
def save_load(row: Row, folder: Path) -> None:
    """What is saved gives the same results when it is loaded."""
    model, _ = row.changed()
    wanted = row.run(model, row.data(0))
    row.save(model, folder)
    assert torch.equal(row.run(row.load(folder).eval(), row.data(0)), wanted)


@torch.no_grad()
def deepcopy(row: Row, folder: Path) -> None:
    """A copy gives the same results, and goes on doing so whatever becomes of the model."""
    model, handle = row.changed()
    wanted = row.run(model, row.data(0))
    twin = copy.deepcopy(model)
    assert torch.equal(row.run(twin, row.data(0)), wanted)
    if hasattr(handle, "remove"):
        handle.remove()
    for p in (*model.parameters(), *model.buffers()):
        p.zero_()
    assert torch.equal(row.run(twin, row.data(0)), wanted)


@torch.no_grad()
def pickle(row: Row, folder: Path) -> None:
    """``torch.save`` and ``torch.load`` of the whole model."""
    model, _ = row.changed()
    wanted = row.run(model, row.data(0))
    torch.save(model, folder / "model.pt")
    assert torch.equal(row.run(torch.load(folder / "model.pt", weights_only=False), row.data(0)), wanted)


@torch.no_grad()
def bf16(row: Row, folder: Path) -> None:
    """A changed model in bfloat16 gives about the same results."""
    model, _ = row.changed()
    wanted = row.run(model, row.data(0))
    data = row.data(0)
    found = row.run(model.bfloat16(), data.bfloat16() if data.is_floating_point() else data)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < row.loose * wanted.norm()


@torch.no_grad()
def autocast(row: Row, folder: Path) -> None:
    """The same under autocast, of a model in float32."""
    model, _ = row.changed()
    wanted = row.run(model, row.data(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = row.run(model, row.data(0)).float()
    assert (found - wanted).norm() < row.loose * wanted.norm()
    assert torch.equal(row.run(model, row.data(0)), wanted)


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


@torch.no_grad()
def compiled(row: Row, folder: Path) -> None:
    """``torch.compile`` (graph breaks allowed) changes nothing."""
    model, _ = row.changed()
    run = row.brief or row.run
    wanted = run(model, row.data(0))
    torch._dynamo.reset()
    found = run(torch.compile(model, backend="eager"), row.data(0))
    torch._dynamo.reset()
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


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


@torch.no_grad()
def under_peft(row: Row, folder: Path) -> None:
    """An adapter on a changed model works, and without it the model is as before."""
    import peft

    model, _ = row.changed()
    wanted = row.run(model, row.data(0))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(row.lora), init_lora_weights=False)).eval()
    found = row.run(adapted, row.data(0))
    assert not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(row.run(adapted, row.data(0)), wanted)
    assert torch.equal(row.run(adapted, row.data(0)), found)


def threads(row: Row, folder: Path) -> None:
    """Two threads on one model get what each gets alone."""
    model, _ = row.changed()
    inputs = [row.data(0), row.data(1)]
    inputs[1] = inputs[1][:, :-7] if inputs[1].dim() < 4 else inputs[1][:1]

    @torch.no_grad()
    def use(data: Tensor) -> Tensor:
        return model.generate(data, **GREEDY) if hasattr(model, "generate") else row.run(model, data)

    wanted, found = [use(data) for data in inputs], []

    def work(i: int) -> None:
        try:
            found.append(torch.equal(use(inputs[i]), wanted[i]))
        except Exception as error:
            found.append(error)

    for _ in range(3):
        both = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    assert found == [True] * 6


PROPERTIES: dict[str, Callable[[Row, Path], None]] = {
    f.__name__: f
    for f in (
        changes, undo, save_load, deepcopy, pickle, bf16, autocast, gqa, left_padding, generate, static_cache, beams,
        compiled, checkpointing, reentrant_checkpointing, under_peft, threads,
    )
}  # fmt: skip


def also(row: Row, **changes: Any) -> Row:
    """A row like another."""
    return dataclasses.replace(row, **changes)
