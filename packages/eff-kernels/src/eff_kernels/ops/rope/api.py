"""rope: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.rope import autograd, cpu, reference
from eff_kernels.ops.rope.args import Args, check

OP = Op(
    "rope",
    schema_of(Args, "Tensor"),
    [
        Backend("cpu", cpu.rope, cpu.reject),
        triton_backend("eff_kernels.ops.rope.triton"),
        Backend("reference", reference.rope),
    ],
    fake=lambda x, *_: x.new_empty(x.shape),
    setup_context=autograd.setup_context,
    backward=autograd.backward_by(lambda *args, **options: _again(*args, **options)),
)


def _again(*args: Any, **options: Any) -> Tensor:
    return OP(*args, **options)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str = "auto") -> Tensor:
    """Rotary position embedding: turn each pair of features by an angle that depends on the token's position.

    (a, b) -> (a cos - b sin, b cos + a sin) (Su et al. 2021, equation 15), computed in float32 and rounded once to
    ``x.dtype``. Differentiable in x.

    Args:
        x: Queries or keys, [B, H, T, D]; any float dtype, any strides (queries and keys of a fused projection may go in
            together, as H + KV heads).
        cos: Cosine of the angle of each pair, [B, T, R/2] or [1, T, R/2], float32. R <= D features are turned, the
            others are copied. From the tables of transformers, which hold each angle twice, take ``[..., : R // 2]``.
        sin: The sines, like ``cos``.
        interleaved: False: pairs are (i, i + R/2), as in Llama checkpoints of transformers. True: pairs are (2i, 2i+1).
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        Contiguous tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: shapes do not fit, or ``cos`` or ``sin`` asks for a gradient, which this op does not give.
        TypeError: ``x`` is not of a float dtype, or ``cos`` or ``sin`` is not float32.
        BackendError: the named backend cannot run this call; the message says why.
    """
    check(x, cos, sin, interleaved, False)
    return OP(x, cos, sin, interleaved, False, backend=backend)
