"""Writing a model as ONNX, and running what was written against the model itself."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOLERANCE = 1e-3
"""Largest difference from PyTorch, as a share of the largest value of an output: a float32 sum in another order."""


class Chosen(nn.Module):
    """A model of one input, of whose output only a tuple of tensors is asked for."""

    def __init__(self, model: nn.Module, choose: Callable[[Any], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.model, self.choose = model, choose

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of the model's input."""
        return self.choose(self.model(x))


def write_onnx(model: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...], file: Path) -> float:
    """Write ``model`` as one ONNX file of opset 18 and run it with onnx's reference evaluator.

    Shapes are those of ``inputs``: the file takes a batch of that size. Weights lie in the file.

    Args:
        model: In evaluation mode on the CPU; takes ``inputs`` in their order, gives a tensor or a tuple of tensors.
        inputs: An example of each input by name.
        outputs: Names of the outputs.
        file: To be written.

    Returns:
        Largest difference of an output from PyTorch's, as a share of that output's largest value.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the written model gives something else than the model.
    """
    from onnx.reference import ReferenceEvaluator

    values = tuple(inputs.values())
    # The exporter writes to standard output and to its logger about each step; errors are raised.
    quiet = logging.getLogger("torch.onnx")
    before = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _plain_attention(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with torch.no_grad():
                torch.onnx.export(
                    model, values, str(file), input_names=list(inputs), output_names=list(outputs), opset_version=18,
                    dynamo=True, external_data=False, verbose=False,
                )  # fmt: skip
    finally:
        quiet.setLevel(before)
    with torch.no_grad():
        wanted = model(*values)
    wanted = (wanted,) if isinstance(wanted, Tensor) else tuple(wanted)
    found = ReferenceEvaluator(str(file)).run(None, {n: v.numpy() for n, v in inputs.items()})
    worst = 0.0
    for name, mine, theirs in zip(outputs, wanted, found, strict=True):
        other = torch.from_numpy(theirs).to(mine.dtype)
        if other.shape != mine.shape:
            raise ValueError(f"{file}: {name} is {list(other.shape)}, from PyTorch {list(mine.shape)}")
        finite = mine.isfinite()
        if not torch.equal(finite, other.isfinite()):
            raise ValueError(f"{file}: {name} is not finite in the same places as in PyTorch")
        apart = (mine - other)[finite].abs().max() / mine[finite].abs().max().clamp_min(1e-9)
        worst = max(worst, float(apart))
    if not worst <= TOLERANCE:
        raise ValueError(f"{file} differs from PyTorch by {worst:.2g} of the largest value, wanted at most {TOLERANCE}")
    return worst


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as products and a softmax: the exporter knows the fused one for four dimensions alone."""
    functional: Any = F
    fused, fast = functional.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = fused
        torch.backends.mha.set_fastpath_enabled(fast)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    scores = query @ key.mT * (query.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value
