"""Finding the linear layers of a model, and saying of each one that stays as it is why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eff_kernels.edit import Where, fits
from torch import Tensor, nn

Choice = Callable[[Sequence[str], nn.Module], str]
"""Why the caller wants a layer with these names left as it is; "" if it is to be quantised."""


@dataclass(frozen=True, slots=True)
class Found:
    """A linear layer, or a weight that acts as one.

    Attributes:
        names: All names under which the model reaches it; the first is the one to report.
        module: The layer, or the module that owns the weight.
        reason: Empty if the layer can be quantised, otherwise why not.
        wanted: Whether the caller asked to leave it (skip list, output embedding, ``where``); such a layer is no
            surprise.
        size: Bytes of its parameters and buffers.
        config: Settings with which it is to be quantised.
    """

    names: tuple[str, ...]
    module: nn.Module
    reason: str = ""
    wanted: bool = False
    size: int = 0
    config: Any = None


def find_linears(
    model: nn.Module,
    *,
    where: Where = "*",
    leave: Choice = lambda names, module: "",
    done: tuple[type[nn.Module], ...] = (),
    keep: Mapping[str, str] | None = None,
) -> list[Found]:
    """List the linear layers of a model in its order, each with a reason if it cannot be quantised.

    Args:
        model: Any module; its tensors may be on the meta device.
        where: Layers to quantise; others are left as the caller wants.
        leave: Says which layers the caller wants left, and why.
        done: Classes of layers that are quantised already.
        keep: More modules to leave as they are, by name, with the reason.
    """
    names = _names_by_module(model)
    users = _users_of_parameters(model)
    found = []
    for module, where_it_is in names.items():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        size = sum(t.numel() * t.element_size() for t in tensors)
        plain = [without_wrapper(name) for name in where_it_is]
        if not _is_linear(module):
            found += _other_weights(where_it_is[0], module)
        elif not any(fits(where, name, module) for name in plain):
            found.append(Found(where_it_is, module, "not asked for (where)", wanted=True, size=size))
        elif isinstance(module, done):
            found.append(Found(where_it_is, module, "is quantised already", size=size))
        elif reason := leave(plain, module):
            found.append(Found(where_it_is, module, reason, wanted=True, size=size))
        else:
            reason = _refusal(where_it_is, module, users) or next((keep[n] for n in plain if keep and n in keep), "")
            found.append(Found(where_it_is, module, reason, size=size))
    return found


def on_skip_list(model: nn.Module, skip: Sequence[str], names: Sequence[str], module: nn.Module) -> str:
    """Why a skip list takes a layer in; "" if it does not. ``"lm_head"`` also means the output embedding."""
    if pattern := next((p for p in skip if any(fits(p, name, module) for name in names)), None):
        return f"on the skip list ({pattern})"
    if "lm_head" in skip and module is _output_embedding(model):
        return "is the output embedding (lm_head)"
    return ""


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, a linear layer with a transposed weight (GPT-2), told by its name."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def linear_weight(linear: nn.Module) -> Tensor:
    """The weight [N, K] of an `nn.Linear` or a ``Conv1D``."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(linear) else weight


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _refusal(names: tuple[str, ...], module: nn.Module, users: Mapping[int, list[str]]) -> str:
    weight = module.weight
    if _is_adapter(names[0]):
        return "belongs to an adapter"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"is a {type(module).__name__}, a subclass of nn.Linear that may use its weight in another way"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"weight has dtype {getattr(weight, 'dtype', type(weight).__name__)}, not a floating one"
    if len(users[id(weight)]) > 1:
        others = ", ".join(u for u in users[id(weight)] if u.rpartition(".")[0] not in names)
        return f"weight is tied to {others}"
    return ""


def _names_by_module(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name)
    return names


def _users_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """For each parameter, by its id, the name under each module that holds it: two or more if it is tied."""
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                users[id(parameter)].append(f"{name}.{leaf}" if name else leaf)
    return users


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def without_wrapper(name: str) -> str:
    """The name that a layer had before PEFT wrapped it as ``base_layer``."""
    return name.removesuffix(".base_layer")


def _is_adapter(name: str) -> bool:
    """Whether a linear layer is a low-rank factor that PEFT put beside a base layer."""
    return any(part.startswith("lora_") for part in name.split("."))


def _other_weights(name: str, module: nn.Module) -> list[Found]:
    """Weights of a mixture of experts that are stacked in one 3-D parameter, which is no linear layer to exchange."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return []
    return [
        Found(
            (f"{name}.{leaf}" if name else leaf,),
            module,
            f"is a 3-D parameter {list(p.shape)} of a {type(module).__name__}, not an nn.Linear (stacked experts)",
            size=p.numel() * p.element_size(),
        )
        for leaf, p in module._parameters.items()
        if p is not None and p.ndim == 3 and p.is_floating_point()
    ]
