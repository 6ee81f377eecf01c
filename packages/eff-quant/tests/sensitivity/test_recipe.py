import pytest
import torch
from eff_quant import FP4Linear, FP8Linear, SensitivityReport, quantize_, sensitivity_sweep
from eff_quant.sensitivity.fake import FORMATS
from eff_quant.sensitivity.measure import Layer
from eff_quant.sensitivity.report import Pass

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate-up", "up_proj": "gate-up"}
SHAPES = {
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "v_proj": (32, 64),
    "o_proj": (64, 64),
    "gate_proj": (128, 64),
    "up_proj": (128, 64),
    "down_proj": (64, 128),
}
WEIGHTS = 3 * sum(n * k for n, k in SHAPES.values())


@pytest.fixture
def report():
    """Three blocks whose cost rises with depth; (1, down_proj) is the worst layer of all."""

    def error(block, component):
        return (block + 1) * (20.0 if (block, component) == (1, "down_proj") else 1.0)

    layers = [
        Layer(f"layers.{b}.{c}", b, c, *SHAPES[c], 1.0, 1.0, {}, {}, {"mxfp4": error(b, c), "fp8": error(b, c) / 100})
        for b in range(3)
        for c in SHAPES
    ]
    passes = [
        Pass("base", "only", "", None, None, (3.0,), (0.0,)),
        Pass("full", "only", "mxfp4", None, None, (4.0,), (8.0,)),
    ]
    for b in range(3):
        kl = sum(error(b, c) for c in SHAPES) / 10
        passes.append(Pass("block", "only", "mxfp4", b, None, (3.0,), (kl,)))
    return SensitivityReport(
        tuple(passes), tuple(layers), (10,), ("mxfp4",), ("a", "b", "c"), tuple(SHAPES), True, True, None
    )


def bytes_of(recipe):
    total = 0.0
    for name, format in recipe.formats.items():
        n, k = SHAPES[name.split(".")[-1]]
        total += 2 * n * k if format is None else FORMATS[format].size(n, k)
    return total


@pytest.mark.parametrize("bits", [4.25, 4.75, 5.0, 6.0, 9.0, 16.0])
def test_a_budget_of_bytes_is_kept_and_used(report, bits):
    recipe = report.recipe("mxfp4", budget_bytes=WEIGHTS * bits / 8)
    assert recipe.num_bytes == pytest.approx(bytes_of(recipe))
    assert recipe.bits == pytest.approx(8 * bytes_of(recipe) / WEIGHTS)
    assert bits - 1.0 < recipe.bits <= bits
    for block in range(3):
        of = {}
        for c in SHAPES:
            of.setdefault(FUSED.get(c, c), set()).add(recipe.formats[f"layers.{block}.{c}"])
        assert all(len(f) == 1 for f in of.values())
    if bits == 4.25:
        assert set(recipe.formats.values()) == {"mxfp4"}
        assert recipe.predicted_kl == pytest.approx(0.8)  # that of the full pass
    if bits == 4.75:
        assert recipe.formats["layers.1.down_proj"] == "fp8"  # the worst is raised first
    if bits == 16.0:
        assert set(recipe.formats.values()) == {None}
        assert recipe.quantized() == {}
        assert recipe.predicted_kl == 0.0


def test_more_room_never_predicts_worse(report):
    found = [report.recipe("mxfp4", budget_bytes=WEIGHTS * b / 8).predicted_kl for b in (4.25, 4.6, 5, 6, 8, 12, 16)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[2] > found[4]


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.2, 0.7, 0.8, 5.0])
def test_a_budget_of_kl_is_kept_and_no_more_is_spent_on_it(report, budget):
    recipe = report.recipe("mxfp4", budget_kl=budget)
    assert recipe.predicted_kl <= budget
    assert recipe.num_bytes == pytest.approx(bytes_of(recipe))
    bits = {0.0: (16, 16), 0.05: (6, 9), 0.2: (5, 6), 0.7: (4.5, 4.6), 0.8: (4.25, 4.25), 5.0: (4.25, 4.25)}[budget]
    assert bits[0] - 1e-6 <= recipe.bits <= bits[1] + 1e-6
    assert (set(recipe.formats.values()) == {None}) == (budget == 0.0)


def test_groups_can_be_set_free(report):
    fused = report.recipe("mxfp4", budget_bytes=WEIGHTS * 5 / 8)
    free = report.recipe("mxfp4", budget_bytes=WEIGHTS * 5 / 8, fuse=())
    assert free.predicted_kl <= fused.predicted_kl
    assert len({free.formats[f"layers.2.{c}_proj"] for c in "qkvo"} | {"mxfp4", "fp8"}) >= 2


def test_budgets_that_cannot_be_are_named(report):
    for changes, text in (
        ({}, "give exactly one"),
        ({"budget_bytes": 1e6, "budget_kl": 1.0}, "give exactly one"),
        ({"budget_bytes": 100.0}, "is below the"),
        ({"budget_kl": -1.0}, "budget_kl=-1.0"),
        ({"budget_kl": 1.0, "fallback": "int8"}, "fallback 'int8' was not measured"),
        ({"budget_kl": 1.0, "fallback": "fp5"}, "format 'fp5'"),
        ({"budget_kl": 1.0, "kept_bits": 8}, "each has to be larger"),
    ):
        with pytest.raises(ValueError, match=text):
            report.recipe("mxfp4", **changes)
    with pytest.raises(ValueError, match="'nvfp4' was not swept; the report has 'mxfp4'"):
        report.recipe("nvfp4", budget_kl=1.0)


@pytest.mark.parametrize("activations", [True, False])
def test_quantize_takes_it(trained, windows, activations):
    report = sensitivity_sweep(
        trained, windows, formats=("nvfp4",), modes=("block",), directions=("only",), activations=activations
    )
    recipe = report.recipe("nvfp4", budget_bytes=sum(la.rows * la.columns for la in report.layers) * 7 / 8)
    assert set(recipe.formats.values()) >= {"nvfp4", "fp8"}
    base = trained(windows[0][None]).logits.log_softmax(-1)
    changed = quantize_(trained, recipe.configs()).changed
    assert {e.name for e in changed} == set(recipe.quantized())
    for name, format in recipe.formats.items():
        kind = {"nvfp4": FP4Linear, "fp8": FP8Linear, None: torch.nn.Linear}[format]
        assert type(trained.get_submodule(name)) is kind
    with torch.no_grad():
        found = trained(windows[0][None]).logits.log_softmax(-1)
    kl = (base.exp() * (base - found)).sum(-1)[0, :-1].mean().item()
    assert recipe.predicted_kl / 6 < kl < 6 * recipe.predicted_kl  # noise of several layers may cancel or add


def test_a_recipe_is_better_than_the_first_blocks_in_fp8(trained, windows, plant):
    plant(trained)
    report = sensitivity_sweep(trained, windows, formats=("mxfp4",), modes=("block",), directions=("only",))
    weights = sum(la.rows * la.columns for la in report.layers)
    recipe = report.recipe("mxfp4", budget_bytes=weights * 5.3 / 8)
    assert recipe.formats["model.layers.1.mlp.down_proj"] in ("fp8", None)
    first = {la.name: "fp8" if la.block == 0 else "mxfp4" for la in report.layers}  # 5.3 bits, too
    mixed = {"recipe": recipe.quantized(), "first": first, "all fp8": {"re:.*": "fp8"}}
    measured = sensitivity_sweep(trained, windows, formats=("mxfp4",), modes=(), mixed=mixed)
    kl = {p.format: measured.kl(p) for p in measured.select("mixed")}
    assert kl["all fp8"] < kl["recipe"] < 0.6 * kl["first"]
    assert recipe.predicted_kl / 6 < kl["recipe"] < 6 * recipe.predicted_kl
    assert torch.isfinite(torch.tensor(list(kl.values()))).all()
