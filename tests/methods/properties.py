"""What is asked of each method: `asked` names the properties of a row, `PROPERTIES` has them all."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from language import GREEDY, LANGUAGE
from method_table import Row
from torch import Tensor, nn


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
def nothing(row: Row, folder: Path) -> None:
    """With strength 0 the model is as before, bit for bit."""
    model, data = row.make(), row.data(0)
    before = row.run(model, data)
    assert row.zero is not None
    row.zero(model)
    assert torch.equal(row.run(model, data), before)


@torch.no_grad()
def leaves(row: Row, folder: Path) -> None:
    """Looking on changes no output and leaves nothing behind."""
    model, data = row.make(), row.data(0)
    before, state = row.run(model, data), {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules() if name}
    found = row.apply(model)
    assert torch.equal(row.run(model, data), before)
    if row.kind == "loss":
        found.remove()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert {name: set(vars(m)) for name, m in model.named_modules() if name in attributes} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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
def twice(row: Row, folder: Path) -> None:
    """A method that is applied twice is undone in the order of application as well."""
    model, first = row.changed()
    second = row.apply(model)
    first.remove()
    second.remove()
    data = row.data(0)
    assert torch.equal(row.run(model, data), row.run(row.make(), data))


def stranger(row: Row, folder: Path) -> None:
    """A model of linear layers alone can be changed, and still computes."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    row.apply(model)
    with torch.no_grad():
        assert model(torch.ones(2, 8)).isfinite().all()


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
    if row.kind == "edit":
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
    assert row.float32 or found.dtype == torch.bfloat16
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
def alone(row: Row, folder: Path) -> None:
    """Each sample of a batch gives what it gives alone."""
    model, _ = row.changed()
    data = row.data(0)
    together = row.run(model, data)
    for i in range(len(data)):
        found = row.run(model, data[i : i + 1])
        assert (found - together[i : i + 1]).norm() < 1e-4 * found.norm()


def gradients(row: Row, folder: Path) -> None:
    """The loss changes along the gradient as fast as the gradient says."""
    model, _ = row.changed()
    run, data = row.train or row.run, row.data(0)
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())

    def loss() -> Tensor:
        return run(model, data).float().square().mean()

    value = loss()
    value.backward()
    found = [(p, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    slope = float(sum(g.square().sum() for _, g in found))
    assert 0 < slope < float("inf")
    step, ends = row.stride * float(value) / slope, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, g in found:
                p.add_(g, alpha=sign * step)
            ends.append(float(loss()))
    assert 0.7 < (ends[0] - ends[1]) / (2 * step * slope) < 1.3


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
        without = row.run(adapted, row.data(0))
    assert (without - wanted).norm() <= row.rounding * wanted.norm()
    assert torch.equal(row.run(adapted, row.data(0)), found)


def threads(row: Row, folder: Path) -> None:
    """Two threads on one model get what each gets alone."""
    model, _ = row.changed()
    inputs = [row.data(0), row.data(1)]
    language = row.host == "language" and row.kind != "measure"
    inputs[1] = inputs[1][:, :-7] if row.host == "language" else inputs[1][:1]

    @torch.no_grad()
    def use(data: Tensor) -> Tensor:
        return model.generate(data, **GREEDY) if language else row.run(model, data)

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


_GENERAL = (
    changes, nothing, leaves, undo, twice, stranger, save_load, deepcopy, pickle, bf16, autocast, alone, gradients,
    compiled, under_peft, threads,
)  # fmt: skip
PROPERTIES: dict[str, Callable[[Row, Path], None]] = {f.__name__: f for f in (*_GENERAL, *LANGUAGE)}

_OF_ALL = {"bf16", "autocast", "alone", "threads"}
_OF_MODELS = {*_OF_ALL, "deepcopy", "pickle", "gradients", "compiled", "under_peft"}
_OF_KIND = {
    "edit": {*_OF_MODELS, "changes", "undo", "twice", "stranger"},
    "rewrite": {*_OF_MODELS, "changes", "stranger"},
    "model": _OF_MODELS,
    "measure": {*_OF_ALL, "leaves"},
    "loss": {"leaves", "deepcopy", "pickle", "bf16", "autocast", "gradients"},
}
_WATCHED = {"gqa", "left_padding"}
"""Of the properties of language models, those of what only looks on."""


def asked(row: Row) -> list[str]:
    """Names of the properties that are asked of a row."""
    names = set(_OF_KIND[row.kind])
    if row.host == "language":
        names |= _WATCHED if row.kind == "measure" else {f.__name__ for f in LANGUAGE}
    names |= {"nothing"} if row.zero else set()
    names |= {"save_load"} if row.save else set()
    return [name for name in PROPERTIES if name in names and name not in row.absent]
