"""What a Triton kernel module declares: configurations to tune over, cases to compile without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from eff_kernels.op import triton_interprets

INTERPRET = triton_interprets()
"""Whether kernels run under Triton's interpreter, fixed at import as in triton.jit.

The interpreter computes on bfloat16 values as if they were 16-bit integers. Pass this flag to a kernel as a constexpr
and widen what was loaded: ``if INTERPRET: x = x.to(tl.float32)``.
"""

CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")
ALL_TARGETS = (*CUDA_TARGETS, "gfx942")


def autotune(
    configs: Sequence[Any], *, key: Sequence[str], hip: Sequence[Any] = (), **options: Any
) -> Callable[..., Any]:
    """``triton.autotune`` that takes the list of the vendor at hand, and one configuration under the interpreter.

    The interpreter has no device to time on and fails with two or more configurations.

    Args:
        configs: ``triton.Config`` objects for NVIDIA GPUs; the first is the one that the interpreter runs.
        key: Names of the arguments whose values ask for a new choice.
        hip: Configurations for AMD GPUs, where ``configs`` do not fit; empty means the same ones.
        **options: Passed on to ``triton.autotune``.
    """
    import triton

    if INTERPRET:
        chosen = list(configs)[:1]
    elif hip and on_hip():
        chosen = list(hip)
    else:
        chosen = list(configs)
    decorate: Callable[..., Any] = triton.autotune(configs=chosen, key=list(key), **options)
    return decorate


@dataclass(frozen=True, slots=True, kw_only=True)
class AotCase:
    """One way in which a kernel is launched, to be compiled without a GPU; see `eff_kernels.testing.aot`.

    Attributes:
        name: Short and unique in the module.
        kernel: The decorated kernel, with or without an autotuner around it.
        signature: Triton's type of each argument that is no constexpr: "*fp16", "*bf16", "*fp32", "*i8", "i32", "fp32".
        constexprs: Value of each other argument. A stride that is 1 belongs here.
        options: Options of the launch such as num_warps and num_stages.
        mma: "any" or "int8": a matrix instruction (of that kind) must be in the code. None: none is asked for.
        targets: Names of the targets to compile for.
        unaligned: Arguments that are not known to be multiples of 16; all others are.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    mma: Literal["any", "int8"] | None = None
    targets: tuple[str, ...] = ALL_TARGETS
    unaligned: tuple[str, ...] = ()

    def with_configs(self, configs: Sequence[Any], targets: tuple[str, ...] | None = None) -> list[AotCase]:
        """One case for each ``triton.Config``, named by its values."""
        return [
            replace(
                self,
                name="-".join([self.name, *(f"{v}" for v in c.kwargs.values()), f"w{c.num_warps}", f"s{c.num_stages}"]),
                constexprs={**self.constexprs, **c.kwargs},
                options={**self.options, "num_warps": c.num_warps, "num_stages": c.num_stages},
                targets=targets or self.targets,
            )
            for c in configs
        ]


def on_hip() -> bool:
    """Whether this PyTorch is for AMD GPUs."""
    import torch

    return torch.version.hip is not None
