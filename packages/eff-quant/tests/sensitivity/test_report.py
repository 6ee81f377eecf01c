import dataclasses
import json
import math

import pytest
import torch
from eff_quant import SensitivityReport, sensitivity_sweep
from eff_quant.sensitivity.fake import FORMATS
from eff_quant.sensitivity.score import SEGMENT, interval, mean, score, segments
from torch import nn


@pytest.fixture(scope="module")
def report(trained_once, windows):
    return sensitivity_sweep(trained_once, windows, modes=("component", "block", "grid"), grid_top=3, num_bytes=266)


def test_scores_are_those_of_the_formulas_in_float64():
    torch.manual_seed(0)
    logits, base, ids = torch.randn(150, 40) * 3, torch.randn(150, 40) * 3, torch.randint(0, 40, (150,))
    found = score(logits, base, ids)
    q, p = logits.double().log_softmax(-1), base.double().log_softmax(-1)
    nll = [-q[t, ids[t + 1]].item() for t in range(149)]
    kl = [sum(p[t, v].exp() * (p[t, v] - q[t, v]) for v in range(40)).item() for t in range(149)]
    assert segments(150) == [(0, SEGMENT), (SEGMENT, 2 * SEGMENT), (2 * SEGMENT, 149)]
    for i, (a, b) in enumerate(segments(150)):
        assert found.nll[i] == pytest.approx(math.fsum(nll[a:b]), rel=1e-6)
        assert found.kl[i] == pytest.approx(math.fsum(kl[a:b]), rel=1e-6)
    assert set(score(base, base, ids).kl) == {0.0}


def test_the_interval_is_that_of_the_mean():
    torch.manual_seed(0)
    counts = [64] * 400
    values = (torch.randn(400) * 10 + 100).tolist()
    low, high = interval(values, counts)
    center, spread = mean(values, counts), 1.96 * torch.tensor(values).std().item() / 64 / math.sqrt(400)
    assert low < center < high
    assert high - low == pytest.approx(2 * spread, rel=0.1)
    assert interval([3.0] * 5, [2] * 5) == (1.5, 1.5)
    narrow = interval(values, counts, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_metrics_of_a_pass(report):
    p = report.full("mxfp4")
    assert sum(report.counts) == 99 + 99 + 69
    assert report.perplexity(p) == pytest.approx(math.exp(sum(p.nll) / 267))
    assert report.bits_per_byte(p) == pytest.approx(sum(p.nll) / math.log(2) / 266)
    low, high = report.kl_interval(p)
    assert 0 < low < report.kl(p) < high
    low, high = report.nll_interval(p)
    assert low < report.nll_change(p) < high
    assert report.kl(report.base) == 0.0
    assert report.kl(report.full("nvfp4")) > 0
    restored = report.rank("component", "mxfp4", "restore")
    assert report.gain(restored[0]) == max(report.gain(r) for r in restored)
    assert len(report.rank("block", "nvfp4")) == 4


def test_layers_are_what_can_be_computed_beside_the_model(report, trained_once, windows):
    seen = {}
    layer = trained_once.model.layers[2].mlp.down_proj
    block = trained_once.model.layers[2]
    hooks = [
        layer.register_forward_hook(lambda m, a, out: seen.setdefault("layer", []).append((a[0], out))),
        block.register_forward_hook(lambda m, a, out: seen.setdefault("block", []).append(out)),
    ]
    with torch.no_grad():
        for w in windows:
            trained_once(w[None])
    for hook in hooks:
        hook.remove()
    found = next(la for la in report.layers if la.name == "model.layers.2.mlp.down_proj")
    x = torch.cat([x.flatten() for x, _ in seen["layer"]]).abs()
    assert found.largest == pytest.approx(x.max().item())
    usual = x.kthvalue(math.ceil(0.999 * len(x))).values
    assert found.outlier_ratio == pytest.approx((x.max() / usual).item(), rel=2**-7)  # bfloat16's precision
    for format in ("mxfp4", "nvfp4", "fp8"):
        fake = FORMATS[format].round
        weight = layer.weight.detach()
        wrong = fake(weight)
        noise = (wrong - weight).square().sum() / weight.square().sum()
        assert found.weight_sqnr[format] == pytest.approx(-10 * math.log10(noise), abs=1e-3)
        error = [nn.functional.linear(fake(x), wrong) - y for x, y in seen["layer"]]
        error = sum(e.square().sum() for e in error)
        signal = sum(y.square().sum() for _, y in seen["layer"])
        assert found.output_sqnr[format] == pytest.approx(10 * math.log10(signal / error), abs=1e-2)
        # down_proj is the last of a block: its error is that of the block's output.
        whole = sum(y.square().sum() for y in seen["block"])
        assert found.block_error[format] == pytest.approx((error / whole).item(), rel=1e-3)


def test_it_survives_its_file(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert SensitivityReport.load(tmp_path / "report.json") == report
    values = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "new.json").write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(ValueError, match="SensitivityReport of version 2"):
        SensitivityReport.load(tmp_path / "new.json")


def test_the_table_names_each_pass(report):
    lines = report.table().splitlines()
    assert len(lines) == 1 + len(report.passes)
    assert lines[0].split()[-3:] == ["bits", "per", "byte"]
    assert lines[1].split()[:3] == ["-", "nothing", "0"]
    assert "mxfp4   all but block 3 " in report.table("block")
    assert f"{report.kl(report.full('nvfp4')):.3g}" in next(x for x in lines if x.startswith("nvfp4   all "))


def test_estimates_share_out_what_a_block_costs(report):
    cost = report.estimates("mxfp4")
    measured = {(p.block, p.component): report.kl(p) for p in report.select("grid", format="mxfp4")}
    assert len(measured) == 3
    assert len(cost) == 28
    assert all(cost[key] == value for key, value in measured.items())
    block = next(b for b in range(4) if not any(key[0] == b for key in measured))
    (p,) = report.select("block", "only", format="mxfp4", block=block)
    assert sum(v for (b, _), v in cost.items() if b == block) == pytest.approx(report.kl(p))
    with pytest.raises(ValueError, match="'int8' was not swept; the report has 'mxfp4', 'nvfp4'"):
        report.estimates("int8")
    passes = tuple(p for p in report.passes if p.mode != "block")
    with pytest.raises(ValueError, match=r"no pass in 'nvfp4' over its block; sweep with mode 'block' or 'grid'"):
        dataclasses.replace(report, passes=passes).estimates("nvfp4")


def test_the_heat_map_is_drawn(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.heatmap(tmp_path / "map.png", "mxfp4")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
