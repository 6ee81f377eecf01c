"""Matching of attention scales: known factors, folding, undoing."""

import copy
import json

import pytest
import torch
from eff_quant.quantvla import (
    AttentionStats,
    ModuleScales,
    ModuleStats,
    QuantLayout,
    ScaleMatchConfig,
    ScaleTable,
    W4A8Config,
    W4A8Linear,
    apply_scale_table,
    calibrate_scales,
    calibrate_vla,
    collect_attention_stats,
    quantize_layout_,
)
from torch import nn

HEADS, DIM, WIDTH = 4, 8, 32
ALPHA = (1.25, 0.8, 1.0, 1.1)


def run(model, batch):
    return model["attn"](batch)


def measure(model, batches):
    return collect_attention_stats(model, batches, ["attn"], run=run)


def table_for(teacher, student, batches, **settings):
    return calibrate_scales(measure(teacher, batches), measure(student, batches), ScaleMatchConfig(**settings))


@torch.no_grad()
def scale_rows(linear, factor, rows=slice(None)):
    linear.weight[rows] *= factor
    if linear.bias is not None:
        linear.bias[rows] *= factor


def test_temperatures_are_restored(plain, tokens):
    teacher, student = plain(), plain()
    for head, factor in enumerate((0.8, 0.5, 0.99, 2.0)):
        scale_rows(student["attn"].q, factor, slice(head * DIM, (head + 1) * DIM))
    alpha = table_for(teacher, student, tokens).modules["attn"].alpha
    assert alpha[0] == pytest.approx(1.25, abs=1e-4)
    assert alpha[1:] == (1.4, 1.0, 0.7)
    apply_scale_table(student, ScaleTable({"attn": ModuleScales((alpha[0], 1.0, 1.0, 1.0), 1.0)}))
    x = tokens[0]
    with torch.no_grad():
        head = slice(0, DIM)
        wanted, got = (m["attn"].q(x)[..., head] @ m["attn"].k(x)[..., head].mT for m in (teacher, student))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("factor", "beta"), [(1.2, 1 / 1.2), (2.0, 0.7408182), (0.3, 1.3498588), (1.02, 1.0)])
def test_output_energy_is_restored_within_limits(plain, tokens, factor, beta):
    teacher, student = plain(), plain()
    scale_rows(student["attn"].out, factor)
    assert table_for(teacher, student, tokens).modules["attn"].beta == pytest.approx(beta, abs=1e-5)


def test_a_model_is_its_own_teacher(plain, tokens):
    scales = table_for(plain(), plain(), tokens).modules["attn"]
    assert scales == ModuleScales((1.0,) * HEADS, 1.0)


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-5])
def test_a_head_of_almost_equal_logits_is_left(spread):
    """The released code adds 1e-6 to the student's spread and so clips such a head to 0.7 or 0.9."""
    stats = AttentionStats({"a": ModuleStats((spread,), 0.0, 1)}, "global")
    assert calibrate_scales(stats, stats).modules["a"] == ModuleScales((1.0,), 1.0)


def test_the_neutral_band_may_be_of_the_logarithm():
    teacher, student = (AttentionStats({"a": ModuleStats((s,), 1.0, 1)}, "global") for s in (1.0295, 1.0))
    for distance, wanted in (("linear", 1.0295), ("log", 1.0)):
        config = ScaleMatchConfig(alpha_neutral=0.0293, alpha_distance=distance)
        assert calibrate_scales(teacher, student, config).modules["a"].alpha == (wanted,)


def test_statistics_that_do_not_belong_together_are_refused():
    one = ModuleStats((1.0,), 1.0, 1)
    base = AttentionStats({"a": one}, "global")
    with pytest.raises(ValueError, match=r"measured at different modules: \['b'\]"):
        calibrate_scales(base, AttentionStats({"a": one, "b": one}, "global"))
    with pytest.raises(ValueError, match="the teacher has 1 heads, the student 2"):
        calibrate_scales(base, AttentionStats({"a": ModuleStats((1.0, 1.0), 1.0, 1)}, "global"))
    with pytest.raises(ValueError, match="spread is 'global', the student's 'row'"):
        calibrate_scales(base, AttentionStats({"a": one}, "row"))


def check_folding(model, name, forward, table, **tolerance):
    """Folded and at run time agree, do something, and leave the weights bit for bit as they were."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = forward(model)
    outputs = []
    for fold in (True, False):
        handle = apply_scale_table(model, table, fold=fold)
        outputs.append(forward(model))
        assert [e.name for e in handle.report.changed] == [name]
        with pytest.raises(ValueError, match="have been applied already"):
            apply_scale_table(model, table, fold=fold)
        with pytest.raises(ValueError, match="have been applied already"):
            apply_scale_table(copy.deepcopy(model), table)
        handle.remove()
        assert torch.equal(forward(model), plain)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not any(m._forward_hooks or hasattr(m, "eff_scales_applied") for m in model.modules())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    assert (outputs[0] - plain).abs().max() > 1e-3
    apply_scale_table(model, table).remove()


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_folding_into_plain_projections(plain, tokens, bias):
    table = ScaleTable({"attn": ModuleScales(ALPHA, 1.2)})
    check_folding(plain(bias=bias), "attn", lambda m: run(m, tokens[0]), table)


@torch.no_grad()
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_folding_into_a_norm_with_an_entry_for_each_row(diffusers_attention, tokens, norm):
    model = diffusers_attention()
    attention, x = model["attn"], tokens[0]
    attention.norm_q, attention.norm_k = norm(WIDTH), norm(WIDTH)
    for p in attention.norm_q.parameters():
        nn.init.normal_(p)

    def forward(m):
        # diffusers' own processors normalise across heads before the heads are split (LTX); so here
        a = m["attn"]
        q, k, v = a.norm_q(a.to_q(x)), a.norm_k(a.to_k(x)), a.to_v(x)
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (q, k, v))
        return a.to_out[0](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    before = attention.to_q.weight.clone()
    table = ScaleTable({"attn": ModuleScales(ALPHA, 1.2)})
    check_folding(model, "attn", forward, table)
    apply_scale_table(model, table)
    assert torch.equal(attention.to_q.weight, before)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_a_norm_that_heads_share_takes_one_alpha_only(diffusers_attention, tokens, norm):
    model = diffusers_attention(qk_norm=norm)
    same = ScaleTable({"attn": ModuleScales((1.25,) * HEADS, 1.2)})
    check_folding(model, "attn", lambda m: run(m, tokens[0]), same)
    different = ScaleTable({"attn": ModuleScales(ALPHA, 1.2)})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="that all heads share, and alpha differs between them; use fold=False"):
        apply_scale_table(model, different)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with apply_scale_table(model, different, fold=False):
        after = measure(model, tokens[:1]).modules["attn"].std
    ratios = torch.tensor(after) / torch.tensor(measure(model, tokens[:1]).modules["attn"].std)
    torch.testing.assert_close(ratios, torch.tensor(ALPHA), rtol=1e-5, atol=0)


def test_a_norm_that_uses_one_plus_its_weight_is_refused(plain):
    class Gemma(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(DIM))

        def forward(self, x):
            return x * (1 + self.weight)

    model = plain()
    model["attn"].q_norm = Gemma()
    with pytest.raises(ValueError, match="not proportional to its weight; use fold=False"):
        apply_scale_table(model, ScaleTable({"attn": ModuleScales((1.25,) * HEADS, 1.0)}))
    assert not model["attn"].q_norm.weight.any()


@torch.no_grad()
def test_folding_commutes_with_rope_and_grouped_heads(llama, ids):
    model = llama()
    name = "model.layers.1.self_attn"
    check_folding(model, name, lambda m: m(ids).logits, ScaleTable({name: ModuleScales(ALPHA, 1.2)}))
    before = collect_attention_stats(model, [{"input_ids": ids}], [name]).modules[name]
    apply_scale_table(model, ScaleTable({name: ModuleScales(ALPHA, 1.0)}))
    after = collect_attention_stats(model, [{"input_ids": ids}], [name]).modules[name]
    torch.testing.assert_close(torch.tensor(after.std) / torch.tensor(before.std), torch.tensor(ALPHA))


@torch.no_grad()
def test_folding_into_quantised_projections_changes_scales_alone(plain, tokens):
    model = plain()
    quantize_layout_(model, QuantLayout(include=("re:attn.*",)), W4A8Config())
    codes = model["attn"].q.weight_packed.clone()
    table = ScaleTable({"attn": ModuleScales(ALPHA, 1.2)})
    check_folding(model, "attn", lambda m: run(m, tokens[0]), table)
    apply_scale_table(model, table)
    assert torch.equal(model["attn"].q.weight_packed, codes)


def test_rotated_rows_that_mix_heads_are_refused(plain):
    model = plain()
    quantize_layout_(model, QuantLayout(include=("re:attn.*",)), W4A8Config(row_rotation=True, block=16))
    with pytest.raises(ValueError, match="rotated output rows that mix heads of different alpha"):
        apply_scale_table(model, ScaleTable({"attn": ModuleScales(ALPHA, 1.0)}))
    apply_scale_table(model, ScaleTable({"attn": ModuleScales((1.2, 1.2, 0.9, 0.9), 1.1)}))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"other": ModuleScales(ALPHA, 1.0)}, "the table names 'other', and the model has no such module"),
        ({"attn": ModuleScales((1.1, 1.0), 1.0)}, "attn: the table has 2 heads, the module 4"),
    ],
)
def test_a_table_of_another_model_is_refused(plain, table, says):
    with pytest.raises(ValueError, match=says):
        apply_scale_table(plain(), ScaleTable(table))


def test_tables_travel_as_the_papers_json(tmp_path):
    table = ScaleTable({"head.attn1": ModuleScales(ALPHA, 1.125)})
    table.save(tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == {"head.attn1": {"all": list(ALPHA), "beta": 1.125}}
    assert ScaleTable.load(tmp_path / "table.json") == table
    (tmp_path / "bad.json").write_text('{"a": {"all": [1.0, -1.0]}}')
    with pytest.raises(ValueError, match="a has a factor that is not above 0"):
        ScaleTable.load(tmp_path / "bad.json")


class Policy(nn.Module):
    """An encoder and a head of two attention modules with an MLP, all of it noisy by dropout."""

    def __init__(self, attention):
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": attention(), "mlp": nn.Linear(WIDTH, WIDTH)}) for _ in "ab")
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.dropout(self.encoder(x)) + 0.1 * torch.randn_like(x)
        for block in self.blocks:
            x = x + block["attn"](x)
            x = x + block["mlp"](x)
        return x


LAYOUT = QuantLayout(include=("encoder", "mlp"), attention=("re:blocks.*attn",))


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("activation", ["dynamic_token", "static_folded"])
def test_all_in_one_call(plain, tokens, sequential, activation):
    teacher = Policy(lambda: plain()["attn"]).train()
    model = copy.deepcopy(teacher)
    before = copy.deepcopy(teacher.state_dict())
    limits = ScaleMatchConfig(alpha_neutral=0, beta_neutral=0, sequential=sequential)
    config = W4A8Config(activation=activation)
    result = calibrate_vla(teacher, model, tokens, LAYOUT, config, match=limits)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert {n for n, m in model.named_modules() if isinstance(m, W4A8Linear)} == {
        "encoder",
        "blocks.0.mlp",
        "blocks.1.mlp",
    }
    names = ["blocks.0.attn", "blocks.1.attn"]
    wanted, got = (collect_attention_stats(m, tokens, LAYOUT.attention) for m in (teacher, model))
    result.handle.remove()
    without = collect_attention_stats(model, tokens, LAYOUT.attention)

    def error(stats):
        spreads = [torch.tensor(stats.modules[n].std) / torch.tensor(wanted.modules[n].std) for n in names]
        return float(torch.cat(spreads).log().abs().max())

    assert error(got) < 0.3 * error(without) or (not sequential and error(got) < error(without))
    assert list(result.table.modules) == names
    assert (result.calibration is None) == (activation == "dynamic_token")


def test_teacher_and_model_are_two(plain, tokens):
    model = Policy(lambda: plain()["attn"])
    with pytest.raises(ValueError, match=r"quantise a copy\.deepcopy"):
        calibrate_vla(model, model, tokens, LAYOUT)
