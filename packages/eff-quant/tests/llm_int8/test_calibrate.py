import json

import pytest
import torch
from eff_quant import Int8Config, OutlierReport, outlier_report, quantize_
from torch import nn


def test_it_counts_what_a_loop_would_count():
    x = torch.randn(3, 40, 16) * 2.5
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    report = outlier_report(model, [(x[0],), x[1], {"input": x[2]}], threshold=6.0)
    assert (report.threshold, report.tokens) == (6.0, 120)
    rows = x.reshape(-1, 16)
    columns = [k for k in range(16) if any(abs(v) >= 6.0 for v in rows[:, k].tolist())]
    first = report.modules["0"]
    assert first.in_features == 16
    assert 0 < len(columns) < 16
    assert list(first.columns) == columns
    for k, share, largest in zip(columns, first.share, first.largest, strict=True):
        assert share == sum(abs(v) >= 6.0 for v in rows[:, k].tolist()) / 120
        assert largest == max(abs(v) for v in rows[:, k].tolist())
    assert report.modules["2"].in_features == 8


def test_padding_does_not_count(llama, ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model = llama()
    report = outlier_report(model, [{"input_ids": ids, "attention_mask": mask}], threshold=2.0)
    assert report.tokens == 19
    assert set(report.modules) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_it_survives_its_file(tmp_path):
    model = nn.Sequential(nn.Linear(16, 8))
    report = outlier_report(model, [torch.randn(50, 16) * 3], threshold=6.0)
    report.save(tmp_path / "outliers.json")
    assert OutlierReport.load(tmp_path / "outliers.json") == report
    values = json.loads((tmp_path / "outliers.json").read_text())
    (tmp_path / "new.json").write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        OutlierReport.load(tmp_path / "new.json")


def test_columns_are_chosen_by_share_and_size():
    x = torch.zeros(100, 8)
    x[:50, 1], x[:4, 2], x[:7, 5], x[:, 6] = 7.0, 100.0, 9.0, 8.0
    report = outlier_report(nn.Sequential(nn.Linear(8, 2)), [x])
    assert report.modules["0"].columns == (1, 2, 5, 6)
    assert report.static_columns() == {"0": (1, 5, 6)}
    assert report.static_columns(min_share=0.0, max_columns=2) == {"0": (2, 5)}
    assert report.static_columns(min_share=0.9) == {"0": (6,)}
    text = str(report)
    assert "100 tokens" in text
    assert text.splitlines()[2].split() == ["0", "4", "8", "100.0%", "100.0"]


def test_its_columns_go_into_the_config(llama, ids):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[9] = 40.0
    report = outlier_report(model, [{"input_ids": ids}])
    columns = report.static_columns(min_share=0.5)
    assert columns == {f"model.layers.0.self_attn.{p}_proj": (9,) for p in "qkv"}
    quantize_(model, Int8Config(threshold=0.0, outlier_weights="original", outlier_columns=columns))
    assert model.model.layers[0].self_attn.q_proj.outlier_columns.tolist() == [9]
    again = outlier_report(model, [{"input_ids": ids}])  # a quantised model can be looked at, too
    assert again.modules["model.layers.0.self_attn.q_proj"] == report.modules["model.layers.0.self_attn.q_proj"]


def test_nothing_seen_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no batches"):
        outlier_report(model, [])
    with pytest.raises(ValueError, match="saw no tokens"):
        outlier_report(model, [torch.ones(1, 4)], where="nowhere")
    with pytest.raises(ValueError, match="threshold=0"):
        outlier_report(model, [torch.ones(1, 4)], threshold=0)
