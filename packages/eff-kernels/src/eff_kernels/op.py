"""Dispatch: one public function, several backends, and a reason for every refusal.

An `Op` holds backends in order of preference. Each backend is a function plus one predicate, ``reject(*args)``: None
means that the backend runs this call, a text says why it does not. The same predicate answers three questions: which
backend ``"auto"`` takes, why a backend that was asked for by name cannot run, and what `explain` prints.

Every op is also registered with torch.library (schema, fake kernel, autograd), which is the way taken under
torch.compile, with tensor subclasses and when a gradient is wanted. A plain inference call skips that boundary, which
costs more than a small kernel.

Autocast does not reach into an op: its sums are as wide as it says, and its outputs have the dtypes that it says.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# Looked up once: a call of an op on one short row takes some five microseconds.
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_is_compiling = torch.compiler.is_compiling
_autocasts = torch._C._is_any_autocast_enabled
_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype})  # isinstance(a, Tensor) is slow
_TENSORS = frozenset({Tensor, Parameter})
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", torch.dtype: "ScalarType", str: "str", float: "float",
    bool: "bool", Sequence[bool]: "bool[]", int: "int", int | None: "int?", Sequence[int]: "int[]",
}  # fmt: skip


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


def never(*_: Any) -> None:
    """The predicate of a backend that runs every valid call."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to run an op: ``run(*args)`` computes, ``reject(*args)`` returns None or the reason why it cannot."""

    name: str
    run: Callable[..., Any]
    reject: Callable[..., str | None] = never


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found: the backend that ``auto`` takes and the reason of each backend that refuses."""

    op: str
    chosen: str | None
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.op}: auto takes {self.chosen or 'nothing'}"]
        lines += [f"  {name}: {'runs' if reason is None else reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


class _Answer(Exception):
    """Carries what `explain` asked for out of a public function."""


class _Name(str):
    __slots__ = ()


_ASK = _Name("auto")  # known by its identity; to all else it is a valid name of a backend


class Op:
    """An operation with several backends.

    Args:
        name: Name of the op; it is registered as ``eff_kernels::<name>``.
        schema: torch.library schema without the backend, such as ``"(Tensor x, Tensor weight, float eps) -> Tensor"``.
        backends: In order of preference; the last is the reference.
        fake: Like a backend's run, but only allocates the outputs (torch.library's fake kernel).
        setup_context, backward: As for ``torch.library.register_autograd``; ``backward(ctx, *grads)`` returns one
            gradient for each argument of the schema and finds the name of the forward's backend in ``ctx.backend``.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        backends: Sequence[Backend],
        fake: Callable[..., Any],
        *,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.name = name
        self.backends = tuple(backends)
        self._arguments = re.findall(r"(\w+)[,)=]", schema.partition(" ->")[0])
        self._registered = torch.library.custom_op(
            f"eff_kernels::{name}",
            self._run_with_backend_last,
            mutates_args=(),
            schema=schema.replace(") ->", ", str backend) ->", 1),
        )

        def fake_on_one_device(*args: Any) -> Any:
            self._check_devices(args)
            return fake(*args[:-1])

        self._registered.register_fake(fake_on_one_device)
        if backward is not None:

            def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                ctx.backend = inputs[-1]
                if setup_context is not None:
                    setup_context(ctx, inputs[:-1], output)

            self._registered.register_autograd(
                lambda ctx, *grads: (*backward(ctx, *grads), None), setup_context=remember
            )

    def __call__(self, *args: Any, backend: str = "auto") -> Any:
        """Run on the chosen backend; ``args`` are those of the schema, in order and complete.

        Raises:
            ValueError: tensors on different devices; or as `select_backend`.
            BackendError: as `select_backend`.
        """
        if backend is _ASK:
            raise _Answer(self.explain(*args))
        if needs_torch_dispatch(args):
            if forward_ad._current_level >= 0 and any(_has_tangent(a) for a in args):
                raise NotImplementedError(f"{self.name} has no forward-mode derivative; use reverse mode")
            return self._registered(*args, backend)
        self._check_devices(args)
        if backend == "auto":  # as in `select_backend`, without the calls, whose cost shows in small kernels
            for candidate in self.backends:
                if candidate.reject(*args) is None:
                    return _without_autocast(candidate.run, args) if _autocasts() else candidate.run(*args)
        return _without_autocast(self.select_backend(*args, backend=backend).run, args)

    def select_backend(self, *args: Any, backend: str = "auto") -> Backend:
        """Return the backend that runs this call.

        Raises:
            ValueError: no backend of that name, or tensors on different devices.
            BackendError: the named backend, or with ``"auto"`` every backend, refuses.
        """
        self._check_devices(args)
        if backend == "auto":
            for candidate in self.backends:
                if candidate.reject(*args) is None:
                    return candidate
            raise BackendError(f"no backend of {self.name} runs this call.\n{self.explain(*args)}")
        for candidate in self.backends:
            if candidate.name == backend:
                reason = candidate.reject(*args)
                if reason is not None:
                    raise BackendError(f"{self.name}: backend {backend!r} cannot run this call: {reason}")
                return candidate
        names = ", ".join(repr(b.name) for b in self.backends)
        raise ValueError(f"{self.name}: unknown backend {backend!r}; use 'auto', {names}")

    def explain(self, *args: Any) -> Explanation:
        """Say for each backend whether it would run this call, and if not, why.

        Raises:
            ValueError: tensors on different devices.
        """
        self._check_devices(args)
        reasons = {b.name: b.reject(*args) for b in self.backends}
        chosen = next((name for name, reason in reasons.items() if reason is None), None)
        return Explanation(self.name, chosen, reasons)

    @property
    def registered(self) -> Any:
        """The op as torch.library knows it; its arguments are those of the schema and the backend's name."""
        return self._registered

    def _check_devices(self, args: tuple[Any, ...]) -> None:
        """Raise ValueError unless all tensors are on one device: backends take the address of each for granted."""
        for a in args:
            kind = type(a)
            if kind not in _PLAIN and not (kind in _TENSORS and a.is_cpu):  # else nothing is to be said, and quickly
                break
        else:
            return
        tensors = {n: a for n, a in zip(self._arguments, args, strict=False) if isinstance(a, Tensor)}
        if len({a.device for a in tensors.values()}) > 1:
            where = ", ".join(f"{name} on {a.device}" for name, a in tensors.items())
            raise ValueError(f"{self.name}: all tensors must be on one device, got {where}")

    def _run_with_backend_last(self, *args: Any) -> Any:
        return _without_autocast(self.select_backend(*args[:-1], backend=args[-1]).run, args[:-1])


def _without_autocast(run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if not _autocasts():
        return run(*args)
    device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
    with torch.autocast(device, enabled=False):
        return run(*args)


def explain(function: Callable[..., Any], *args: Any, **options: Any) -> Explanation:
    """Say which backend a function of eff_kernels takes for a call, and why each of the others would refuse it.

    The arguments are checked as in a call; nothing is computed by a backend. A function that runs several ops answers
    for the first.

    Args:
        function: A public function with an argument ``backend``, such as `eff_kernels.rms_norm`.
        *args: Its positional arguments.
        **options: Its keyword arguments, without ``backend``.

    Raises:
        TypeError: ``function`` runs no op.
        ValueError, TypeError: as ``function`` itself, for arguments that do not fit.

    Example:
        >>> import torch, eff_kernels
        >>> print(explain(eff_kernels.rms_norm, torch.ones(2, 3, dtype=torch.float64), torch.ones(3)))
        rms_norm: auto takes reference
          cpu: takes float32, bfloat16 and float16, got torch.float64
          triton: needs a CUDA or ROCm tensor, got one on cpu
          reference: runs
    """
    if "backend" in inspect.signature(function).parameters:
        try:
            function(*args, **options, backend=_ASK)
        except _Answer as answer:
            explanation: Explanation = answer.args[0]
            return explanation
    raise TypeError(f"{getattr(function, '__name__', function)} runs no op of eff_kernels, so it has no backends")


def schema_of(arguments: type[tuple[Any, ...]], returns: str) -> str:
    """The torch.library schema of a NamedTuple of arguments, ``returns`` being "Tensor" or "(Tensor, Tensor)"."""
    kinds = typing.get_type_hints(arguments)
    return f"({', '.join(f'{_SCHEMA_TYPES[kind]} {name}' for name, kind in kinds.items())}) -> {returns}"


def triton_backend(module: str, *, run: str = "run", reject: str = "reject") -> Backend:
    """Backend "triton" from a module that is imported only once a call can use it.

    Triton runs on GPUs; with ``TRITON_INTERPRET=1`` in the environment its interpreter also takes CPU tensors, for
    tests.

    Args:
        module: Dotted name of the module.
        run: Name of the function in it that computes.
        reject: Name of the function in it that says why it cannot.
    """

    @functools.cache
    def load() -> ModuleType:
        return importlib.import_module(module)

    def refuses(*args: Any) -> str | None:
        tensor = next((a for a in args if isinstance(a, Tensor)), None)
        if tensor is not None and not tensor.is_cuda and not (tensor.is_cpu and triton_interprets()):
            return f"needs a CUDA or ROCm tensor, got one on {tensor.device.type}"
        if not _has_triton():
            return "triton is not installed; pip install 'eff-kernels[triton]'"
        return getattr(load(), reject)(*args)

    return Backend("triton", lambda *args: getattr(load(), run)(*args), refuses)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_interprets() -> bool:
    """Whether Triton kernels run under the interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def needs_torch_dispatch(args: tuple[Any, ...]) -> bool:
    """Whether a call is more than plain inference: a gradient, a tensor subclass, tracing, vmap, forward-mode AD."""
    if _is_compiling():
        return True
    grad = _is_grad_enabled()
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            if grad and a.requires_grad:
                return True
        elif kind not in _PLAIN and isinstance(a, Tensor):
            return True
    return _dispatch_modes() > 0 or _functorch_level() is not None or forward_ad._current_level >= 0
