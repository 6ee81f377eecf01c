"""One table of methods x properties: what every method of every package must hold, or must refuse in its own words.

A row is a file in ``rows/`` that ends in ``ROWS = [Row(...), ...]``; a property is a function of `properties` or
`language`. A property that a method cannot have is named in the row with the text of its error, which is checked as
well. ``tools/method_table.py`` makes a page of the docs from it.
"""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on a tiny model.

    Attributes:
        name: Of the method; its first word is the sub-package that it lives in.
        kind: An "edit" can be undone; a "rewrite" changes weights for good; a "model" is a class of our own; a
            "measure" looks on, and ``run`` gives what it finds; a "loss" looks on while a model is trained.
        host: Whether the model is a language model, which has caches, padding and ``generate``.
        make: A new model, the same each time.
        apply: Changes the model and returns a handle, or whatever the method returns.
        zero: As ``apply``, but with nothing to do (strength 0); None where a method has no such setting.
        run: ``run(model, data, mask)`` gives a tensor [B, ...]; mask [B, T] is 0 at padding, or None.
        data: ``data(seed)``: inputs of the model, such as ids [B, T].
        train: As ``run``, for gradients; None for ``run`` itself.
        brief: As ``run``, for what is slow, such as compiling; None for ``run`` itself.
        save, load: ``save(model, folder)`` keeps a changed model, ``load(folder)`` gives it back; None where there is
            nothing to keep.
        lora: Linear layers that an adapter goes to.
        loose: Relative error that bfloat16 may cause.
        rounding: Relative error that an adapter may leave when it is switched off: 0 but for models of PyTorch's own
            encoder layers.
        float32: Whether results are float32 whatever the model is in, as losses and measured maps are.
        stride: How far `gradients` steps, as a share of the loss; more where weights or activations are rounded.
        cannot: By property that does not hold: a regular expression that its error fits.
        absent: By property that is not asked for: why.
        package: Where the method lives, from the name of the row's file.
    """

    name: str
    make: Callable[[], nn.Module]
    run: Callable[..., Tensor]
    data: Callable[[int], Tensor]
    apply: Callable[[nn.Module], Any] = lambda model: None
    kind: Literal["edit", "rewrite", "model", "measure", "loss"] = "edit"
    host: Literal["language", "other"] = "language"
    zero: Callable[[nn.Module], Any] | None = None
    save: Callable[[nn.Module, Path], None] | None = None
    load: Callable[[Path], nn.Module] | None = None
    train: Callable[..., Tensor] | None = None
    brief: Callable[..., Tensor] | None = None
    lora: tuple[str, ...] = ("q_proj", "down_proj")
    loose: float = 0.05
    rounding: float = 0.0
    stride: float = 1e-3
    float32: bool = False
    cannot: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    package: str = ""

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
        package = "eff-" + path.stem.partition("_")[0]
        rows += [dataclasses.replace(row, package=package) for row in module.ROWS]
    return rows


def neighbour(path: str) -> Any:
    """The helpers of a package's own tests, by their path from the root."""
    name = "method_rows_" + path.removesuffix(".py").replace("/", "_").replace("-", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def also(row: Row, **changes: Any) -> Row:
    """A row like another."""
    return dataclasses.replace(row, **changes)


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


def logits(model: Any, ids: Tensor, mask: Tensor | None = None, **given: Any) -> Tensor:
    """Logits [B, T, V] of one pass without a cache; ``given`` is for the model."""
    more = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return model(input_ids=ids, use_cache=False, **more, **given).logits


def state_row(name: str, make: Callable[[], nn.Module], run: Callable[..., Tensor], **more: Any) -> Row:
    """The row of a class of our own, kept by its state_dict."""
    return Row(
        name=name, make=make, run=run,
        **{"kind": "model", "host": "other", **kept_by_state(make), **more},
    )  # fmt: skip


def kept_by_state(
    make: Callable[[], nn.Module], apply: Callable[[nn.Module], Any] = lambda model: None
) -> dict[str, Any]:
    """``save`` and ``load`` of a row whose state_dict, in a new model that ``apply`` has changed, is all there is."""

    def new() -> nn.Module:
        model = make()
        apply(model)
        return model

    return {"save": save_state, "load": functools.partial(load_state, new)}


def save_state(model: nn.Module, folder: Path) -> None:
    """Keep a model by its state_dict."""
    torch.save(model.state_dict(), folder / "state.pt")


def load_state(make: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """What `save_state` kept, in a new model with other weights."""
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    model.load_state_dict(torch.load(folder / "state.pt"))
    return model


def normal(*shape: int) -> Callable[[int], Tensor]:
    """``data`` of normal numbers."""
    return lambda seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
