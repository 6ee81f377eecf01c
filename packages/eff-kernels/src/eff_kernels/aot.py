"""What modules of Triton kernels share: whether they are interpreted, and cases to compile without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from eff_kernels.op import triton_interprets

INTERPRET = triton_interprets()
"""Whether kernels run under Triton's interpreter, fixed at import as in triton.jit.

The interpreter computes on bfloat16 values as if they were 16-bit integers. Pass this flag to a kernel as a constexpr
and widen what was loaded: ``if INTERPRET: x = x.to(tl.float32)``.
"""

CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")
ALL_TARGETS = (*CUDA_TARGETS, "gfx942")


@dataclass(frozen=True, slots=True, kw_only=True)
class AotCase:
    """One way in which a kernel is launched, to be compiled without a GPU; see `eff_kernels.testing.aot`.

    Attributes:
        name: Short and unique in the module.
        kernel: The kernel, decorated by ``triton.jit``.
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


def on_hip() -> bool:
    """Whether this PyTorch is for AMD GPUs."""
    import torch

    return torch.version.hip is not None
