"""The tests that every op passes: subclass `OpTests`, name the op, its reference and its specs.

    class TestRMSNorm(OpTests):
        function = staticmethod(rms_norm)
        reference = staticmethod(reference.rms_norm)
        op = api.OP
        specs = SPECS
        differentiable = ("x", "weight")

Each check runs for every backend, spec and dtype. "cpu" and "reference" run on CPU tensors. "triton" runs on CUDA; with
``TRITON_INTERPRET=1`` in the environment of the whole run, on CPU tensors under Triton's interpreter. That interpreter
takes bfloat16 values for integers in arithmetic, so a kernel that does not widen them right after the load fails here.

This module imports pytest; nothing else in eff_kernels does.
"""

from __future__ import annotations

import ctypes
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from eff_kernels import native
from eff_kernels.op import BackendError, Op, triton_interprets
from eff_kernels.testing.budget import to_float64, within_budget
from eff_kernels.testing.specs import NON_CONTIGUOUS, Spec


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make ``torch.empty`` return NaN (integers: the largest value), so that what a kernel forgets to write shows.

    Fresh memory is often zero, which hides such a fault. Warnings of PyTorch's deterministic mode are silenced.
    """
    was_on, was_warning = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warning)


def device_for(backend: str) -> torch.device:
    """The device on which this machine can test a backend; skips the running test where there is none."""
    if backend != "triton" or triton_interprets():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("triton needs a CUDA or ROCm device, or TRITON_INTERPRET=1 for its interpreter")
    return torch.device("cuda")


class OpTests:
    """Base of an op's tests.

    Attributes:
        function: The public function (as ``staticmethod``).
        reference: The reference in plain PyTorch, with the arguments of the op's schema; computes in float64 when its
            inputs are float64 (as ``staticmethod``).
        op: The `Op` behind the function.
        specs: Sample calls; at least one tagged "empty". The first serves for what one spec shows, the first four that
            are not empty are tried in each memory layout; those tagged "slow" get pytest's mark of that name.
        dtypes: Of the inputs that a spec draws.
        differentiable: Names of the arguments that have a gradient; none for an op without backward.
        factor: See `eff_kernels.testing.budget`.
        integer_steps: Difference allowed in integer outputs.
        may_refuse: For each backend, a regular expression of the reasons for which it may refuse a spec, in addition
            to what the machine lacks. Any other refusal is a failure, so that a backend cannot drop out unseen.
        layouts: Which of `eff_kernels.testing.specs.NON_CONTIGUOUS` are tried.
        gradcheck: Whether the backward is the true derivative (a straight-through estimator is not).
    """

    # Triton's interpreter computes with numpy, which warns where a GPU gives infinity or NaN without a word.
    pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

    function: ClassVar[Callable[..., Any]]
    reference: ClassVar[Callable[..., Any]]
    op: ClassVar[Op]
    specs: ClassVar[Sequence[Spec]]
    dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float32, torch.bfloat16, torch.float16)
    differentiable: ClassVar[Sequence[str]] = ()
    factor: ClassVar[float] = 2.0
    integer_steps: ClassVar[int] = 0
    may_refuse: ClassVar[Mapping[str, str]] = {}
    layouts: ClassVar[Sequence[str]] = tuple(NON_CONTIGUOUS)
    gradcheck: ClassVar[bool] = True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make one test for each backend, spec and dtype that a check asks for.

        Where nothing in the code could tell more combinations apart they take turns: each layout meets each spec and
        each dtype once (`together`); gradients are tried for each spec in the first dtype and in one of the others.
        """
        full = [s for s in self.specs if "empty" not in s.tags]
        first, *others = self.dtypes
        turns = [[first, *others[i % len(others) :][:1]] if others else [first] for i in range(len(self.specs))]
        together: dict[tuple[str, ...], list[tuple[Any, ...]]] = {
            ("layout", "leading_spec", "layout_dtype"): [
                (layout, spec, self.dtypes[(i + k) % len(self.dtypes)])
                for i, layout in enumerate(self.layouts)
                for k, spec in enumerate(full[:4])
            ],
            ("gradient_spec", "gradient_dtype"): [
                (spec, dtype) for spec, dtypes in zip(self.specs, turns, strict=True) for dtype in dtypes
            ],
        }
        values: dict[str, Sequence[Any]] = {
            "backend": [b.name for b in self.op.backends],
            "spec": self.specs,
            "one_spec": full[:1],
            "dtype": self.dtypes,
            "first_dtype": self.dtypes[:1],
        }
        if "layout" not in metafunc.fixturenames:
            values["leading_spec"] = full[:4]
        for name, items in values.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, [pytest.param(i, id=_label(i), marks=_marks((i,))) for i in items])
        for names, rows in together.items():
            if names[0] in metafunc.fixturenames:
                params = [pytest.param(*row, id="-".join(map(_label, row)), marks=_marks(row)) for row in rows]
                metafunc.parametrize(names, params)

    def schema_args(self, spec: Spec, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of the op's schema for a call of the public function; override if the two differ."""
        bound = inspect.signature(self.function).bind(*args, **spec.kwargs)
        bound.apply_defaults()
        return tuple(value for name, value in bound.arguments.items() if name != "backend")

    def expected(self, schema_args: tuple[Any, ...]) -> tuple[Any, Any]:
        """Outputs of the reference in the given dtypes, and in float64."""
        with torch.no_grad():
            return self.reference(*schema_args), self.reference(*to_float64(schema_args))

    def expected_gradients(
        self, schema_args: tuple[Any, ...], cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of `differentiable` by autograd through the reference, in the given dtypes and in float64."""
        leaves = self._with_leaves(schema_args)
        wide_leaves = self._with_leaves(to_float64(schema_args))
        return (
            _gradients(self.reference(*leaves[0]), leaves[1], cotangents),
            _gradients(self.reference(*wide_leaves[0]), wide_leaves[1], to_float64(list(cotangents))),
        )

    def test_specs_have_unique_names_and_an_empty_one(self) -> None:
        """Names choose the random values; empty input is a case of its own in each kernel."""
        names = [s.name for s in self.specs]
        assert len(set(names)) == len(names)
        assert any("empty" in s.tags for s in self.specs)

    def test_forward(self, backend: str, spec: Spec, dtype: torch.dtype) -> None:
        """Each output keeps to the budget, every element is written, and no input changes."""
        args = self._args(spec, dtype, backend)
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        with poisoned_memory():
            actual = self.function(*args, **spec.kwargs, backend=backend)
        self._assert_budget(actual, self.expected(self.schema_args(spec, args)))
        for old, new in zip(before, args, strict=True):
            if isinstance(old, Tensor):
                torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)

    def test_non_contiguous(self, backend: str, layout: str, leading_spec: Spec, layout_dtype: torch.dtype) -> None:
        """The values count and not their place in memory; nothing outside the view is read."""
        args = self._args(leading_spec, layout_dtype, backend)
        views = tuple(NON_CONTIGUOUS[layout](a) if isinstance(a, Tensor) else a for a in args)
        self._skip_or_fail_if_refused(leading_spec, views, backend)
        actual = self.function(*views, **leading_spec.kwargs, backend=backend)
        self._assert_budget(actual, self.expected(self.schema_args(leading_spec, args)))

    def test_gradients(self, backend: str, gradient_spec: Spec, gradient_dtype: torch.dtype) -> None:
        """Each gradient keeps to the budget."""
        self._skip_without_backward()
        args = self._args(gradient_spec, gradient_dtype, backend)
        schema_args = self.schema_args(gradient_spec, args)
        leaves, wanted = self._with_leaves(schema_args)
        with poisoned_memory():
            output = self.op(*leaves, backend=backend)
            cotangents = _cotangents(output)
            actual = _gradients(output, wanted, cotangents)
        self._assert_budget(actual, self.expected_gradients(schema_args, cotangents))

    def test_gradcheck(self, one_spec: Spec) -> None:
        """The backward is the derivative of the forward, in float64 on the reference."""
        self._skip_without_backward()
        if not self.gradcheck:
            pytest.skip("this backward is not the derivative of the forward, by design")
        schema_args, wanted = self._with_leaves(to_float64(self.schema_args(one_spec, one_spec.args(torch.float64))))
        indices = [i for i, a in enumerate(schema_args) if any(a is w for w in wanted)]

        def run(*inputs: Tensor) -> Any:
            full = list(schema_args)
            for i, value in zip(indices, inputs, strict=True):
                full[i] = value
            return self.op(*full, backend="reference")

        assert torch.autograd.gradcheck(run, wanted, fast_mode=True)

    def test_opcheck(self, backend: str, one_spec: Spec) -> None:
        """Schema, fake kernel and autograd registration agree with what the op does (torch.library.opcheck)."""
        args = self._args(one_spec, self.dtypes[0], backend)
        schema_args = self.schema_args(one_spec, args)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # opcheck's own doing
            torch.library.opcheck(self.op.registered, (*schema_args, backend))
            if self.differentiable:
                torch.library.opcheck(self.op.registered, (*self._with_leaves(schema_args)[0], backend))

    def test_fake_kernel_tells_the_outputs(self, spec: Spec, dtype: torch.dtype) -> None:
        """torch.compile is told the shapes, dtypes and order in memory that come out."""
        args = self.schema_args(spec, self._args(spec, dtype, "reference"))
        real = self.op.registered(*args, "reference")
        with FakeTensorMode() as mode:
            told = self.op.registered(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args), "reference")
        for one, other in zip(*([r] if isinstance(r, Tensor) else r for r in (real, told)), strict=True):
            assert (one.shape, one.dtype, _strides(one)) == (other.shape, other.dtype, _strides(other))

    def test_compiles_to_one_graph(self, backend: str, one_spec: Spec, first_dtype: torch.dtype) -> None:
        """torch.compile(fullgraph=True) gives the same bits, forward and backward."""
        args = self._args(one_spec, first_dtype, backend)
        schema_args, wanted = self._with_leaves(self.schema_args(one_spec, args))
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: self.op(*a, backend=backend), fullgraph=True, backend="aot_eager")
        eager_out, compiled_out = self.op(*schema_args, backend=backend), compiled(*schema_args)
        torch.testing.assert_close(compiled_out, eager_out, rtol=0, atol=0)
        if wanted:
            cotangents = _cotangents(eager_out)
            compiled_gradients = _gradients(compiled_out, wanted, cotangents)
            torch.testing.assert_close(compiled_gradients, _gradients(eager_out, wanted, cotangents), rtol=0, atol=0)

    def test_autocast_changes_nothing(self, backend: str, one_spec: Spec, first_dtype: torch.dtype) -> None:
        """Of a forward under autocast the results and gradients are the same bits."""
        args = self._args(one_spec, first_dtype, backend)
        schema_args, wanted = self._with_leaves(self.schema_args(one_spec, args))
        found = []
        for enabled in (False, True):
            with torch.autocast(device_for(backend).type, torch.bfloat16, enabled=enabled):
                output = self.op(*schema_args, backend=backend)
                plain = self.op(*self.schema_args(one_spec, args), backend=backend)
            found.append([output, plain])
            if wanted:
                found[-1].append(_gradients(output, wanted, _cotangents(output)))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)

    def test_refusal_names_its_reason(self, backend: str, one_spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
        """A backend that is asked for by name and cannot run raises; it never hands over to another."""
        if backend == "reference":
            pytest.skip("the reference runs every valid call")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        args = one_spec.args(self.dtypes[0], "meta")
        reason = self.op.explain(*self.schema_args(one_spec, args)).reasons[backend]
        assert reason
        with pytest.raises(BackendError, match=re.escape(reason)):
            self.function(*args, **one_spec.kwargs, backend=backend)

    def test_tensors_on_two_devices_are_refused(self, one_spec: Spec) -> None:
        """Whichever tensor lies elsewhere, no backend is given addresses that it cannot read."""
        args = self.schema_args(one_spec, one_spec.args(self.dtypes[0]))
        places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        for i in places if len(places) > 1 else []:
            mixed = [a.to("meta") if i == n else a for n, a in enumerate(args)]
            for backend in ("auto", *(b.name for b in self.op.backends)):
                with pytest.raises(ValueError, match=r"must be on one device, got .* on meta"):
                    self.op(*mixed, backend=backend)
            with pytest.raises((ValueError, RuntimeError), match="device"):
                self.op.registered(*mixed, "auto")

    def test_memory_that_runs_out_is_an_error(self, leading_spec: Spec) -> None:
        """Whichever request for scratch memory fails, the compiled code says so; nothing crashes, nothing is wrong."""
        if self.op.backends[0].name != "cpu":
            pytest.skip("no compiled code")
        args = self._args(leading_spec, self.dtypes[-1], "cpu")
        limit = native.library().eff_limit_scratch
        limit.argtypes, limit.restype = [ctypes.c_int64], None

        def run() -> list[Any]:
            leaves, wanted = self._with_leaves(self.schema_args(leading_spec, args))
            output = self.op(*leaves, backend="cpu")
            return [output, *(_gradients(output, wanted, _cotangents(output)) if wanted else [])]

        whole = run()
        try:
            for requests in (*range(16), 24, 60, 250, 1000, 4000):
                limit(requests)
                try:
                    found = run()
                except MemoryError:
                    continue
                torch.testing.assert_close(found, whole, rtol=0, atol=0, equal_nan=True)
                return
        finally:
            limit(-1)
        pytest.fail("4000 requests for memory are not enough for one small call")

    def test_unknown_backend(self, one_spec: Spec) -> None:
        """An unknown name is an error that lists the known ones."""
        args = one_spec.args(self.dtypes[0])
        with pytest.raises(ValueError, match="'reference'"):
            self.function(*args, **one_spec.kwargs, backend="no such backend")

    def test_explain(self, one_spec: Spec) -> None:
        """`Op.explain` speaks of each backend and names the one that ``auto`` takes."""
        args = self.schema_args(one_spec, one_spec.args(self.dtypes[0]))
        explanation = self.op.explain(*args)
        assert list(explanation.reasons) == [b.name for b in self.op.backends]
        assert explanation.chosen == self.op.select_backend(*args).name
        assert all(name in str(explanation) for name in explanation.reasons)

    def _args(self, spec: Spec, dtype: torch.dtype, backend: str) -> tuple[Any, ...]:
        args = spec.args(dtype, device_for(backend))
        self._skip_or_fail_if_refused(spec, args, backend)
        return args

    def _skip_or_fail_if_refused(self, spec: Spec, args: tuple[Any, ...], backend: str) -> None:
        reason = self.op.explain(*self.schema_args(spec, args)).reasons[backend]
        if reason is None:
            return
        allowed = "|".join(filter(None, ("not installed", "no C compiler", self.may_refuse.get(backend))))
        if not re.search(allowed, reason):
            pytest.fail(f"backend {backend!r} refuses {spec.name}: {reason}; if that is meant, name it in may_refuse")
        pytest.skip(f"{backend}: {reason}")

    def _skip_without_backward(self) -> None:
        if not self.differentiable:
            pytest.skip("this op has no backward")

    def _with_leaves(self, schema_args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
        names = [n for n in inspect.signature(self.function).parameters if n != "backend"]
        full, wanted = list(schema_args), []
        for i, name in enumerate(names):
            if name in self.differentiable and full[i] is not None:
                full[i] = full[i].detach().clone(memory_format=torch.preserve_format).requires_grad_()
                wanted.append(full[i])
        return tuple(full), wanted

    def _assert_budget(self, actual: Any, expected: tuple[Any, Any]) -> None:
        problems = within_budget(actual, *expected, factor=self.factor, integer_steps=self.integer_steps)
        assert not problems, "\n".join(problems)


def _strides(x: Tensor) -> list[int]:
    """Those of which something depends: not of axes of one element, nor of an empty tensor."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1] if x.numel() else []


def _label(item: Any) -> str:
    return item.name if isinstance(item, Spec) else str(item).removeprefix("torch.")


def _marks(items: Sequence[Any]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if any(isinstance(i, Spec) and "slow" in i.tags for i in items) else []


def _cotangents(output: Any) -> list[Tensor]:
    outputs = [output] if isinstance(output, Tensor) else [o for o in output if o.requires_grad]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(o.shape, generator=generator).to(o) for o in outputs]


def _gradients(output: Any, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    outputs = [output] if isinstance(output, Tensor) else [o for o in output if o.requires_grad]
    return list(torch.autograd.grad(outputs, list(inputs), list(cotangents)))
