"""Finding the linear layers and the experts of a model, and saying of each one that stays as it is why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eff_kernels.edit import Where, fits
from torch import Tensor, nn

from eff_quant.alike import computes_as_linear
from eff_quant.stacked import is_experts, stacks_of
from eff_quant.stacked import refusal as stacked_refusal

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
    loading: bool = False,
    experts: bool = False,
) -> list[Found]:
    """List the linear layers of a model in its order, each with a reason if it cannot be quantised.

    Args:
        model: Any module; its tensors may be on the meta device.
        where: Layers to quantise; others are left as the caller wants.
        leave: Says which layers the caller wants left, and why.
        done: Classes of layers that are quantised already.
        loading: Whether weights on the meta device are still to be read, and not held elsewhere.
        experts: List modules of stacked experts as well, each as one entry; otherwise their parameters are listed, as
            no linear layers.
    """
    names = _names_by_module(model)
    users = _users_of_parameters(model)
    tied = _tied(model)
    adapters = _adapters(model)
    # If only some are on the meta device, those have their values elsewhere, unless they are still to be read.
    offloaded = not loading and not all(p.is_meta for p in model.parameters())
    found = []
    for module, where_it_is in names.items():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        size = sum(t.numel() * t.element_size() for t in tensors)
        plain = [without_wrapper(name) for name in where_it_is]
        stacked = experts and is_experts(module)
        if not (is_linear(module) or stacked or isinstance(module, done)):
            found += _stacked_experts(where_it_is[0], module)
        elif not any(fits(where, name, module) for name in plain):
            found.append(Found(where_it_is, module, "not asked for (where)", wanted=True, size=size))
        elif isinstance(module, done):
            found.append(Found(where_it_is, module, "is quantised already", size=size))
        elif reason := leave(plain, module):
            found.append(Found(where_it_is, module, reason, wanted=True, size=size))
        else:
            refusal = _experts_refusal if stacked else _refusal
            reason = "belongs to an adapter" if module in adapters else refusal(where_it_is, module, users)
            if not reason and any(name in tied for name in where_it_is):
                reason = "is tied"
            if not reason and (_is_offloaded(module) or (offloaded and any(w.is_meta for w in weights_of(module)))):
                reason = "its weight is offloaded (on the meta device); quantise before that"
            found.append(Found(where_it_is, module, reason, size=size))
    return found


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, a linear layer with a transposed weight (GPT-2), told by its name."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether this is an `nn.Linear`, of a subclass too, or a ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_weight(linear: nn.Module) -> Tensor:
    """The weight [N, K] of an `nn.Linear` or a ``Conv1D``."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(linear) else weight


def weights_of(module: nn.Module) -> list[Tensor]:
    """The weights of a linear layer or of stacked experts."""
    return [linear_weight(module)] if is_linear(module) else list(stacks_of(module).values())


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module that takes another's place the hooks of that: those of torch, and accelerate's."""
    for name in _HOOKS:
        if getattr(old, name, None):
            setattr(new, name, getattr(old, name))
    if (hook := getattr(old, "_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]

        add_hook_to_module(new, hook)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _refusal(names: tuple[str, ...], module: nn.Module, users: Mapping[int, list[str]]) -> str:
    weight: Any = module.weight
    if not is_conv1d(module) and not computes_as_linear(module):
        return f"is a {type(module).__name__}, a subclass of nn.Linear that may use its weight in another way"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"weight is a {type(weight).__name__}, not a plain tensor"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"weight has dtype {weight.dtype}, not a floating one"
    if len(users[id(weight)]) > 1:
        others = ", ".join(u for u in users[id(weight)] if u.rpartition(".")[0] not in names)
        return f"weight is tied to {others}"
    return ""


def _experts_refusal(names: tuple[str, ...], module: nn.Module, users: Mapping[int, list[str]]) -> str:
    if any(name.endswith(".base_layer") for name in names):
        return "has adapters on its parameters (PEFT's target_parameters); merge them or quantise before"
    for name, weight in stacks_of(module).items():
        if len(users[id(weight)]) > 1:
            return f"{name} is tied to {', '.join(u for u in users[id(weight)] if u.rpartition('.')[0] not in names)}"
    return stacked_refusal(module)


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate fetches the weights of a module for each call."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))


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


def _tied(model: nn.Module) -> set[str]:
    """Layers whose weights transformers ties, by name; while a model is loaded they are not the same tensors yet."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name.removesuffix(".weight") for pair in tied.items() for name in pair} if isinstance(tied, dict) else set()


def without_wrapper(name: str) -> str:
    """The name that a layer had before PEFT wrapped it as ``base_layer``, or as ``original_module``."""
    return name.removesuffix(".base_layer").removesuffix(".original_module")


def _adapters(model: nn.Module) -> set[nn.Module]:
    """All modules that PEFT added to the layers of a model: low-rank factors, trainable copies of whole layers."""
    added: set[nn.Module] = set()
    for module in model.modules():
        if any(
            c.__module__.startswith("peft.tuners.") or c.__module__ == "peft.utils.other" for c in type(module).__mro__
        ):
            base = "base_layer" if hasattr(module, "base_layer") else "original_module"
            if base in module._modules:
                for name, child in module.named_children():
                    if name != base:
                        added.update(child.modules())
    return added


def _stacked_experts(name: str, module: nn.Module) -> list[Found]:
    """Weights of a mixture of experts that are stacked in one 3-D parameter, which is no linear layer to exchange."""
    count = next(
        (getattr(module, n) for n in ("num_experts", "num_local_experts", "n_routed_experts") if hasattr(module, n)),
        None,
    )
    if count is None and "expert" not in type(module).__name__.lower():
        return []
    return [
        Found(
            (f"{name}.{leaf}" if name else leaf,),
            module,
            f"is a 3-D parameter {list(p.shape)} of a {type(module).__name__}, not an nn.Linear (stacked experts)",
            size=p.numel() * p.element_size(),
        )
        for leaf, p in module._parameters.items()
        if p is not None and p.ndim == 3 and p.is_floating_point() and count in (None, p.shape[0])
    ]
