"""What cannot be held as codes is left whole, and says what was found and what is wanted."""

import copy
import re

import pytest
import torch
from eff_kernels.edit import SkippedModulesError
from eff_quant import (
    FP4Config,
    FP8Config,
    Int8Config,
    W4A8Config,
    quantize_,
    save_bnb_int8,
    save_compressed_fp8,
    save_fp4_checkpoint,
)
from eff_quant.experts import QuantizedExperts
from eff_quant.stacked import refusal
from torch import nn


def reason_of(report, name="experts"):
    return {e.name: e.reason for e in report.skipped}[name]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (W4A8Config(), "which W4A8Config has no form for; use Int8Config, FP8Config or FP4Config"),
        (FP4Config(activations="static"), "activations='static', and stacked experts have no scale of their inputs"),
    ],
)
def test_settings_that_do_not_fit(experts, config, says):
    model = nn.ModuleDict({"experts": experts()})
    before = copy.deepcopy(model.state_dict())
    assert says in reason_of(quantize_(model, config))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    with pytest.raises(SkippedModulesError, match="experts"):
        quantize_(nn.ModuleDict({"linear": nn.Linear(64, 64), "experts": experts()}), config, strict=True)


def test_outlier_columns_of_experts(experts):
    model = nn.ModuleDict({"experts": experts()})
    config = Int8Config(outlier_weights="original", outlier_columns={"experts": (3,)})
    with pytest.raises(ValueError, match=r"outlier_columns names 'experts'.*stacked experts do not have"):
        quantize_(model, config)


def test_sizes_that_are_no_whole_blocks_leave_all_of_a_module(experts):
    source = experts()
    source.down_proj = nn.Parameter(torch.randn(5, 64, 24))
    source.gate_up_proj = nn.Parameter(torch.randn(5, 48, 64))
    model = nn.ModuleDict({"experts": source})
    for config in (FP4Config(format="mxfp4"), FP4Config()):
        block = 32 if config.format == "mxfp4" else 16
        says = f"down_proj: in_features=24 is not a multiple of {block}, the block of {config.format}"
        assert reason_of(quantize_(model, config)) == says
    assert model.experts is source
    quantize_(model, FP8Config(), strict=True)


def test_a_number_that_is_none_leaves_a_module_as_it_was(experts):
    source = experts()
    with torch.no_grad():
        source.down_proj[2, 5, 1] = torch.nan
    model = nn.ModuleDict({"experts": source})
    for config in (Int8Config(), FP8Config(), FP4Config()):
        with pytest.raises(ValueError, match="down_proj, expert 2: weight row 5 holds inf or NaN"):
            quantize_(model, config)
        assert model.experts is source


def with_changes(module, **changes):
    for name, value in changes.items():
        setattr(module, name, value)
    return module


def test_modules_of_other_kinds(experts):
    class Own(nn.Module):
        """Has the marks, and runs in its own way."""

        is_transposed, has_bias, num_experts = False, False, 5

        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = (
                nn.Parameter(torch.zeros(5, 64, 64)),
                nn.Parameter(torch.zeros(5, 64, 32)),
            )

        def _apply_gate(self, x):
            return x

        def forward(self, x):
            return x

    big = nn.Parameter(torch.zeros(5, 64, 64))
    for module, says in (
        (Own(), "runs its experts in a way of its own"),
        (with_changes(experts(), num_experts=6), "has num_experts=6, but 5 matrices in gate_up_proj and 5 in"),
        (with_changes(experts(), third=big), "has the 3-D parameter third beside gate_up_proj and down_proj"),
        (with_changes(experts(), has_gate=False), r"has the 3-D parameters \['gate_up_proj', 'down_proj'\], wanted"),
        (with_changes(experts(), down_proj=big), r"matrices of \[64, 64\] in gate_up_proj and \[64, 64\] in down_proj"),
        (with_changes(experts(), has_bias=True), r"has gate_up_proj_bias of shape None, wanted \[5, 64\]"),
        (with_changes(experts(), _is_expert_parallel=True), "holds a part of the experts of a parallel model"),
        (with_changes(experts(), forward=lambda *a: a[0]), "has a forward of its own on the instance"),
        (experts().to(torch.float8_e4m3fn), r"gate_up_proj has dtype torch\.float8_e4m3fn, not a floating one"),
    ):  # fmt: skip
        model = nn.ModuleDict({"experts": module})
        found = reason_of(quantize_(model, Int8Config()))
        assert found == refusal(module)
        with pytest.raises(TypeError, match=says):
            QuantizedExperts.from_experts(module, Int8Config())
        assert model.experts is module


def test_tied_offloaded_and_adapted(experts):
    a, b = experts(), experts()
    b.down_proj = a.down_proj
    model = nn.ModuleDict({"a": a, "b": b})
    report = quantize_(model, Int8Config())
    assert reason_of(report, "a") == "down_proj is tied to b.down_proj"
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "experts": experts().to("meta")})
    assert "offloaded (on the meta device)" in reason_of(quantize_(model, Int8Config()))


def test_folders_of_other_libraries(tools, tmp_path):
    for config, save in (
        (Int8Config(activation_group=None), save_bnb_int8),
        (FP8Config(), save_compressed_fp8),
        (FP4Config(), save_fp4_checkpoint),
    ):
        model = tools.make("qwen3_moe")
        quantize_(model, config)
        with pytest.raises(ValueError, match=r"mlp\.experts holds stacked experts in our own form, .*skip"):
            save(model, tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_experts_for_another_model(tools, tmp_path):
    import transformers
    from eff_quant import load

    model = tools.make("qwen3_moe")
    quantize_(model, FP4Config())
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"format": "nvfp4"', '"format": "mxfp4"'))
    with pytest.raises((TypeError, ValueError), match=r"weight_scale has (dtype|shape)"):
        load(tmp_path)
    file.write_text(re.sub(r'("num_(local_)?experts"): 4', r"\1: 8", file.read_text()).replace("mxfp4", "nvfp4"))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: weight_packed has shape \[4, .*wanted \[8, "):
        load(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).num_experts == 8


def test_old_transformers_do_not_save_experts_under_changed_names(tmp_path, tools, monkeypatch):
    import eff_quant.hf as hf

    saved = [quantize_(model := tools.make(name), FP8Config()) and model for name in ("mixtral", "gpt_oss")]
    monkeypatch.setattr(hf, "_names_are_whole", lambda: False)
    with pytest.raises(NotImplementedError, match="changes the names of stored experts when it saves them"):
        saved[0].save_pretrained(tmp_path / "no")
    saved[1].save_pretrained(tmp_path / "yes")  # of a class whose names stay
