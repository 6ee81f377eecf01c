"""Record the kernel calls of a function once, and repeat them by one call into C.

A small decoder makes some three hundred kernel calls a token, and Python between them takes longer than some of them.
Their arguments are addresses and sizes, which stay the same from step to step if the tensors do. So a function is run
once on buffers of its own while its kernel calls are noted and every tensor that it makes is kept; from then on new
inputs are copied into the buffers, the calls are repeated, and the output lies where it lay the first time.

That is right only if nothing but compiled kernels computes: whatever PyTorch computes in between would not be repeated,
and is refused.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from eff_kernels.native.build import library
from eff_kernels.native.call import tape

_ALLOCATIONS = frozenset({"empty", "empty_like", "new_empty"})
_recording = threading.Lock()


class NotRecordableError(ValueError):
    """PyTorch computes something between the kernels; the message names it."""


class Recorded:
    """A function whose kernel calls are on tape.

    Args:
        function: From tensors to one tensor, all on the CPU; it must make the same calls whatever the inputs hold.
        inputs: Samples, which are copied. Later inputs may be smaller in every dimension if the function does not look
            at what lies beyond.

    Attributes:
        output: What the function gave for the samples; overwritten by each call.

    Raises:
        NotRecordableError: the function does more than call kernels.
    """

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        self._buffers = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        notes: list[tuple[int, bytes, bool]] = []
        keep = _Keep()
        with _recording:
            tape.owner, tape.notes = threading.get_ident(), notes
            try:
                with keep:
                    self.output = function(*self._buffers)
            finally:
                tape.notes = None
        self._kept = keep.tensors
        self._arguments = [packed for _, packed, _ in notes]
        addresses = [ctypes.cast(ctypes.c_char_p(packed), ctypes.c_void_p).value for packed in self._arguments]
        steps = [(run, at, fallible) for (run, _, fallible), at in zip(notes, addresses, strict=True)]
        self._steps = torch.tensor(steps, dtype=torch.int64).view(-1, 3)
        self._replay = _replay()

    def __len__(self) -> int:
        """Number of kernel calls."""
        return len(self._steps)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute for new inputs; the result is overwritten by the next call."""
        for buffer, x in zip(self._buffers, inputs, strict=True):
            (buffer if buffer.shape == x.shape else buffer[tuple(slice(n) for n in x.shape)]).copy_(x)
        if failed := self._replay(self._steps.data_ptr(), len(self._steps)):
            raise MemoryError(f"kernel call {failed - 1} of {len(self)} on tape failed")
        return self.output


class _Keep(TorchFunctionMode):
    """Keeps every tensor that is made, and refuses what computes."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(out, Tensor):
            given = [a for a in args if isinstance(a, Tensor)]
            in_place = (name.endswith("_") and not name.startswith("__")) or name == "__setitem__"
            view = not in_place and any(
                out.untyped_storage().data_ptr() == a.untyped_storage().data_ptr() for a in given
            )
            if name not in _ALLOCATIONS and not view:
                raise NotRecordableError(
                    f"{resolve_name(func) or name} runs between the compiled kernels, and a tape records only those"
                )
            self.tensors.append(out)
        elif name == "__setitem__":
            raise NotRecordableError("a tensor is written to between the kernels")
        return out


@functools.cache
def _replay() -> Any:
    replay = library().eff_replay
    replay.argtypes, replay.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    return replay
