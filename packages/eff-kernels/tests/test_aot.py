"""The ahead-of-time gate finds what it promises to find, and nothing in kernels that are well."""

import os
import types
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from eff_kernels.aot import AotCase  # noqa: E402
from eff_kernels.testing import aot  # noqa: E402

SAMPLES = Path(__file__).with_name("aot_samples.py")


@pytest.fixture(scope="module")
def results():
    """What the child process finds for the sample kernels, by case and target; also under TRITON_INTERPRET=1."""
    return {(r.name, r.target): r for r in aot.compile_module(SAMPLES)}


@pytest.fixture(scope="module")
def samples():
    return aot.load(SAMPLES)


def test_every_case_is_compiled_for_each_of_its_targets(results, samples):
    assert list(results) == [(c.name, t) for c in samples.AOT_CASES for t in c.targets]


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(("name", "mma"), [("scale", None), ("fp16", "any")])
def test_good_kernels_pass_on_every_target(results, name, mma, target):
    found = results[name, target]
    assert found.problems(mma) == []
    assert 0 < found.registers <= 512
    assert (found.shared > 0) == (name == "fp16")


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma_f32")],
)
def test_names_the_matrix_instruction_of_the_target(results, target, instruction):
    assert any(name.startswith(instruction) for name in results["fp16", target].mma)
    assert results["scale", target].mma == ()


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_int8_products_are_told_from_floating_ones(results, target):
    assert results["int8", target].problems("int8") == []
    assert "no int8 matrix instruction" in results["fp16", target].problems("int8")[0]


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_finds_spills(results, target):
    (text,) = [p for p in results["spills", target].problems() if "spills" in p]
    assert f"spills {results['spills', target].spill}" in text


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_finds_a_missing_matrix_instruction(results, target):
    assert results["no-matrix-instruction", target].problems("any") == ["has no matrix instruction; found none at all"]


@pytest.mark.parametrize(("name", "target"), [("shared", "sm_80"), ("shared-hip", "gfx942")])
def test_finds_too_much_shared_memory(results, name, target):
    limit = aot.TARGETS[target].shared_limit
    assert results[name, target].shared > limit
    assert any(f"{target} has {limit}" in p for p in results[name, target].problems())


def test_reports_the_compilers_error_and_goes_on(results):
    assert "BLOCK is too small" in results["static-assert", "sm_80"].error
    assert "arguments without a type or value: ['BLOCK']" in results["missing-argument", "sm_80"].error


def test_assert_compiles_lists_exactly_what_is_wrong(samples):
    with pytest.raises(AssertionError) as caught:
        aot.assert_compiles(SAMPLES)
    bad = {(c.name, t) for c in samples.BAD for t in c.targets}
    every = {(c.name, t) for c in samples.AOT_CASES for t in c.targets}
    assert {(name, t) for name, t in every if f"  {name} on {t} " in str(caught.value)} == bad


def test_assert_compiles_can_keep_to_some_targets():
    results = aot.assert_compiles(SAMPLES, ["sm_100"])
    assert [(r.name, r.target) for r in results] == [("scale", "sm_100"), ("fp16", "sm_100")]


def test_a_module_that_cannot_be_imported_raises_with_its_text(tmp_path):
    broken = tmp_path / "broken_module.py"
    broken.write_text("raise ValueError('no such thing')\n")
    with pytest.raises(RuntimeError, match="no such thing"):
        aot.compile_module(broken)


def test_compile_for_says_when_the_kernel_belongs_to_the_interpreter(samples):
    case = samples.GOOD[0]
    with pytest.raises(ValueError, match="unknown target 'sm_70'; use sm_80"):
        aot.compile_for(case.kernel, case.signature, case.constexprs, "sm_70")
    if os.environ.get("TRITON_INTERPRET") == "1":
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            aot.compile_for(case.kernel, case.signature, case.constexprs, "sm_80")
    else:
        assert aot.compile_for(case.kernel, case.signature, case.constexprs, "sm_80").name == "_scale_kernel"


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ([], "has no AOT_CASES"),
        (
            [AotCase(name="a", kernel=None, signature={}), AotCase(name="a", kernel=None, signature={})],
            r"repeat: \['a'\]",
        ),
        ([AotCase(name="a", kernel=None, signature={}, targets=("sm_70",))], r"unknown targets \['sm_70'\]"),
    ],
)
def test_lists_of_cases_are_checked(cases, message):
    module = types.ModuleType("some_module")
    module.AOT_CASES = cases
    with pytest.raises(ValueError, match=message):
        aot.aot_cases(module)


def test_a_kernel_without_a_case_is_named(samples):
    module = types.ModuleType(samples.__name__)
    vars(module).update({name: value for name, value in vars(samples).items() if name.endswith("_kernel")})
    module.AOT_CASES = [samples.matmul("one", 64)]
    with pytest.raises(ValueError, match="AOT_CASES has no case of _broken_kernel, _scale_kernel"):
        aot.aot_cases(module)
