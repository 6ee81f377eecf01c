"""The op test base finds the faults that it is there for: each op here has one."""

import math
import os

import pytest
import torch
from eff_kernels.op import Backend, Op
from eff_kernels.testing import Spec
from eff_kernels.testing.op_tests import OpTests, poisoned_memory
from torch.autograd.gradcheck import GradcheckError

SPEC = Spec("rows", lambda draw: (draw.normal(6, 40),), tags=frozenset())
EMPTY = Spec("empty", lambda draw: (draw.normal(0, 40),), tags=frozenset({"empty"}))


def right(x):
    return (x * 3.0).contiguous()


def make_tests(name, run=right, *, fake=torch.empty_like, backward=lambda ctx, grad: (grad * 3.0,), reject=None):
    """Test class of the op 3 x, whose backend "cpu" is ``run``."""
    backends = [Backend("cpu", run, reject or (lambda x: None if x.is_cpu else f"on {x.device}"))]
    op = Op(f"faulty_{name}", "(Tensor x) -> Tensor", [*backends, Backend("reference", right)], fake, backward=backward)

    class Tests(OpTests):
        function = staticmethod(lambda x, backend="auto": op(x, backend=backend))
        reference = staticmethod(right)
        specs = (SPEC, EMPTY)
        differentiable = ("x",)

    Tests.op = op
    return Tests()


@pytest.fixture(scope="module")
def sound():
    return make_tests("not_at_all")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sound_op_passes(sound, backend, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        for spec in (SPEC, EMPTY):
            sound.test_forward(backend, spec, dtype)
            sound.test_gradients(backend, spec, dtype)
        for layout in sound.layouts:
            sound.test_non_contiguous(backend, layout, SPEC, dtype)
        sound.test_compiles_to_one_graph(backend, SPEC, dtype)
    sound.test_opcheck(backend, SPEC)
    sound.test_gradcheck(SPEC)
    sound.test_unknown_backend(SPEC)
    sound.test_explain(SPEC)
    sound.test_specs_have_unique_names_and_an_empty_one()
    sound.test_refusal_names_its_reason("cpu", SPEC, monkeypatch)


def test_what_a_kernel_does_not_write():
    def forgets_the_last_row(x):
        out = torch.empty(x.shape, dtype=x.dtype)
        out[:-1] = x[:-1] * 3.0
        return out

    with pytest.raises(AssertionError, match="NaN or infinite"):
        make_tests("unwritten", forgets_the_last_row).test_forward("cpu", SPEC, torch.float32)


def test_wrong_value():
    with pytest.raises(AssertionError, match="over its error budget"):
        make_tests("value", lambda x: x * 3.001).test_forward("cpu", SPEC, torch.float32)


def test_rounding_twice():
    def coarse(x):
        return ((x / 7).bfloat16().to(x.dtype) * 21.0).contiguous()

    with pytest.raises(AssertionError, match="over its error budget"):
        make_tests("coarse", coarse).test_forward("cpu", SPEC, torch.float32)


def test_wrong_dtype():
    with pytest.raises(AssertionError, match="dtype"):
        make_tests("dtype", lambda x: x.float() * 3.0).test_forward("cpu", SPEC, torch.bfloat16)


def test_changed_input():
    def in_place(x):
        y = x * 3.0
        x += 1
        return y

    with pytest.raises(AssertionError):
        make_tests("input", in_place).test_forward("cpu", SPEC, torch.float32)


@pytest.mark.parametrize("layout", ["padded_rows", "strided_columns", "swapped_dims"])
def test_ignored_strides(layout):
    def ignores_strides(x):
        return x.as_strided(x.shape, (x.size(1), 1)) * 3.0

    with pytest.raises(AssertionError):
        make_tests(f"strides_{layout}", ignores_strides).test_non_contiguous("cpu", layout, SPEC, torch.float32)


def test_wrong_gradient():
    tests = make_tests("gradient", backward=lambda ctx, grad: (grad * 2.9,))
    with pytest.raises(AssertionError, match="over its error budget"):
        tests.test_gradients("cpu", SPEC, torch.float32)
    with pytest.raises(GradcheckError):
        tests.test_gradcheck(SPEC)


def test_wrong_fake_kernel():
    tests = make_tests("fake", fake=lambda x: x.new_empty(x.size(0)))
    with pytest.raises(Exception, match=r"(?i)shape|size|mismatch"):
        tests.test_opcheck("cpu", SPEC)


def test_fake_kernel_with_another_dtype_or_order_in_memory():
    def wide(x):
        return x.new_empty(x.shape, dtype=torch.float32)

    def turned(x):
        return x.new_empty(x.shape[::-1]).t()

    make_tests("told").test_fake_kernel_tells_the_outputs(SPEC, torch.bfloat16)
    for name, fake in (("told_wide", wide), ("told_turned", turned)):
        with pytest.raises(AssertionError):
            make_tests(name, fake=fake).test_fake_kernel_tells_the_outputs(SPEC, torch.bfloat16)


def test_backend_that_drops_out_unseen():
    tests = make_tests("shy", reject=lambda x: "not on Tuesdays")
    with pytest.raises(pytest.fail.Exception, match="'cpu' refuses rows: not on Tuesdays"):
        tests.test_forward("cpu", SPEC, torch.float32)
    type(tests).may_refuse = {"cpu": "Tuesdays"}
    with pytest.raises(pytest.skip.Exception, match="not on Tuesdays"):
        tests.test_forward("cpu", SPEC, torch.float32)


def test_specs_that_share_a_name_or_lack_an_empty_one(sound):
    class Twice(type(sound)):
        specs = (SPEC, SPEC, EMPTY)

    class Never(type(sound)):
        specs = (SPEC,)

    for tests in (Twice(), Never()):
        with pytest.raises(AssertionError):
            tests.test_specs_have_unique_names_and_an_empty_one()


def test_poisoned_memory_and_its_end():
    with poisoned_memory():
        assert torch.empty(100).isnan().all()
        assert (torch.empty(100, dtype=torch.int8) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), poisoned_memory():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("widens", [True, False])
def test_kernel_that_computes_in_bfloat16_under_the_interpreter(widens):
    triton = pytest.importorskip("triton")
    tl = pytest.importorskip("triton.language")

    @triton.jit
    def kernel(x_ptr, out_ptr, n, WIDEN: tl.constexpr, N: tl.constexpr):
        at = tl.program_id(0) * N + tl.arange(0, N)
        x = tl.load(x_ptr + at, at < n, other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
        tl.store(out_ptr + at, (x * 3.0).to(out_ptr.dtype.element_ty), at < n)

    def run(x):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernel[(math.ceil(x.numel() / 64),)](x.contiguous(), out, x.numel(), WIDEN=widens, N=64)
        return out

    tests = make_tests(f"narrow_{widens}", run)
    tests.test_forward("cpu", SPEC, torch.float32)
    if widens:
        tests.test_forward("cpu", SPEC, torch.bfloat16)
    else:
        with pytest.raises(AssertionError):
            tests.test_forward("cpu", SPEC, torch.bfloat16)


def test_names_of_the_generated_tests():
    """Backends, specs and dtypes show in the ids, so that one of them can be chosen with -k."""
    asked = {}

    class Metafunc:
        fixturenames = ("backend", "spec", "dtype", "one_spec")

        def parametrize(self, name, params):
            asked[name] = [p.id for p in params]

    make_tests("ids").pytest_generate_tests(Metafunc())
    assert asked == {
        "backend": ["cpu", "reference"],
        "spec": ["rows", "empty"],
        "dtype": ["float32", "bfloat16", "float16"],
        "one_spec": ["rows"],
    }


def test_layouts_and_gradients_take_turns():
    asked = {}

    class Metafunc:
        fixturenames = ("layout", "leading_spec", "layout_dtype", "gradient_spec", "gradient_dtype")

        def parametrize(self, names, params):
            asked[names[0]] = [p.id for p in params]

    tests = make_tests("turns")
    other = Spec("other", SPEC.make, tags=frozenset())
    type(tests).specs = (SPEC, other, EMPTY)
    tests.pytest_generate_tests(Metafunc())
    assert asked["layout"] == [
        "padded_rows-rows-float32",
        "padded_rows-other-bfloat16",
        "strided_columns-rows-bfloat16",
        "strided_columns-other-float16",
        "swapped_dims-rows-float16",
        "swapped_dims-other-float32",
    ]
    assert asked["gradient_spec"] == [
        "rows-float32",
        "rows-bfloat16",
        "other-float32",
        "other-float16",
        "empty-float32",
        "empty-bfloat16",
    ]
    type(tests).dtypes = (torch.float32,)
    tests.pytest_generate_tests(Metafunc())
    assert asked["gradient_spec"] == ["rows-float32", "other-float32", "empty-float32"]


def test_slow_specs_are_marked():
    marks = {}

    class Metafunc:
        fixturenames = ("spec",)

        def parametrize(self, name, params):
            marks.update({p.id: [m.name for m in p.marks] for p in params})

    tests = make_tests("slow")
    type(tests).specs = (SPEC, EMPTY, Spec("long", SPEC.make, tags=frozenset({"slow"})))
    tests.pytest_generate_tests(Metafunc())
    assert marks == {"rows": [], "empty": [], "long": ["slow"]}
