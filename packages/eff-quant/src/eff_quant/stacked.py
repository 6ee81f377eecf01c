"""How transformers keeps the experts of a mixture, and which modules are kept so.

Since version 5 the experts of a layer are one module with a 3-D parameter for each of their matrices. Its class says by
attributes how these lie (``is_transposed``, ``has_bias``, ``has_gate``) and has ``_apply_gate`` for what stands between
the two products, so that one way of running them serves all of these classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

STACKS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the parameters that hold one matrix for each expert."""


# What the class of a module of experts says of itself; quantised ones say it as well.
_MARKS = ("is_transposed", "has_bias", "num_experts")


def is_experts(module: nn.Module) -> bool:
    """Whether this is a module of stacked experts, told by what its class says of itself."""
    return all(hasattr(module, mark) for mark in (*_MARKS, "_apply_gate")) and bool(stacks_of(module))


def routers_of(model: nn.Module) -> set[nn.Module]:
    """Linear layers that choose between experts: gates and routers next to a module of experts, shared ones included.

    A rounded router sends tokens elsewhere, and has next to no weights; most are no linear layers at all.
    """
    found: set[nn.Module] = set()
    for name, module in model.named_modules():
        if not all(hasattr(module, mark) for mark in _MARKS):
            continue
        name = re.sub(r"(\.base_layer)+$", "", name)  # of PEFT's wrappers
        beside = model.get_submodule(name.rpartition(".")[0])
        for child_name, child in beside.named_modules():
            first = child_name.partition(".")[0]
            chooses = isinstance(child, nn.Linear) and child.out_features in (module.num_experts, 1)
            if chooses and ("gate" in first or "router" in first):
                found.add(child)
    return found


def stacks_of(module: nn.Module) -> dict[str, Tensor]:
    """The 3-D parameters of a module, by name, in the order in which they are used."""
    held = module._parameters
    return {name: p for name in STACKS if (p := held.get(name)) is not None and p.ndim == 3}


def matrices(module: nn.Module, weight: Tensor) -> Tensor:
    """The matrices of all experts as [E, N, K], whichever way the module's class keeps them."""
    return weight.transpose(1, 2) if module.is_transposed else weight


def matrix_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(N, K) of the matrices of each stack, by name."""
    shapes = {name: matrices(module, p).shape for name, p in stacks_of(module).items()}
    return {name: (n, k) for name, (_, n, k) in shapes.items()}


def refusal(module: nn.Module) -> str:
    """Why the experts of this module cannot be held as codes, whatever the format; "" if they can."""
    stacks, name = stacks_of(module), type(module).__name__
    if not hasattr(type(module).forward, "__wrapped__"):
        return f"is a {name}, which runs its experts in a way of its own (not transformers' experts interface)"
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return "has a forward of its own on the instance"
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    if tuple(stacks) != (first, "down_proj"):
        return f"has the 3-D parameters {list(stacks)}, wanted {[first, 'down_proj']}"
    if others := [n for n, p in module._parameters.items() if p is not None and p.ndim > 2 and n not in stacks]:
        return f"has the 3-D parameter {others[0]} beside {first} and down_proj"
    shapes = {n: tuple(matrices(module, p).shape) for n, p in stacks.items()}
    if reason := _sizes_refusal(shapes, module.num_experts, 2 if first == "gate_up_proj" else 1):
        return reason
    for stack in stacks:
        bias = module._parameters.get(f"{stack}_bias")
        if module.has_bias and (bias is None or tuple(bias.shape) != shapes[stack][:2]):
            found = None if bias is None else list(bias.shape)
            return f"has {stack}_bias of shape {found}, wanted {list(shapes[stack][:2])}"
    if getattr(module, "_is_expert_parallel", False):
        return "holds a part of the experts of a parallel model; quantise before that"
    if hasattr(module, "parametrizations"):
        return "has parametrised weights; remove the parametrisation first"
    for n, p in stacks.items():
        if type(p) not in (Tensor, nn.Parameter):
            return f"{n} is a {type(p).__name__}, not a plain tensor"
        if not p.is_floating_point() or p.dtype.itemsize < 2:
            return f"{n} has dtype {p.dtype}, not a floating one"
    return ""


def _sizes_refusal(shapes: Mapping[str, tuple[int, ...]], num_experts: object, halves: int) -> str:
    (first, up), (_, down) = shapes.items()
    if num_experts != up[0] or up[0] != down[0]:
        return f"has num_experts={num_experts}, but {up[0]} matrices in {first} and {down[0]} in down_proj"
    if (up[1], up[2]) != (halves * down[2], down[1]):
        return f"has matrices of {list(up[1:])} in {first} and {list(down[1:])} in down_proj, which do not fit"
    return ""
