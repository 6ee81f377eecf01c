"""Models of transformers with stacked experts, in each format: what quantising, saving and loading give."""

import copy
import io

import eff_quant.hf  # noqa: F401 - registers the quantiser
import pytest
import torch
from eff_quant import Int8Config, count_parameters, dequantize_, load, quantize_
from eff_quant.experts import QuantizedExperts
from torch import nn

# Bytes of a matrix [n, k], scales included.
BYTES = {
    "int8": lambda n, k: n * k + 4 * n + 1,
    "fp8": lambda n, k: n * k + 4 * n,
    "mxfp4": lambda n, k: n * k // 2 + n * k // 32,
    "nvfp4": lambda n, k: n * k // 2 + n * k // 16 + 4,
}


def test_answers_are_those_of_the_dequantised_model(cell, tools):
    assert cell.experts
    assert not any(isinstance(m, QuantizedExperts) for m in cell.plain.modules())
    assert {type(m) for m in cell.float.modules()} == {type(m) for m in cell.plain.modules()}
    assert tools.distance(cell.logits, tools.logits(cell.plain, cell.ids)) < 1e-5
    assert 0 < tools.distance(cell.logits, tools.logits(cell.float, cell.ids)) < 1


def test_bytes_shrink_and_parameters_count_as_before(cell):
    sizes = {e.name: e for e in (cell.model and cell.report.changed)}
    for name, experts in cell.experts.items():
        shapes = [form.like.weight_shape for form in experts.forms.values()]
        biases = sum(p.numel() * p.element_size() for p in experts.parameters())
        held = sum(experts.num_experts * BYTES[cell.format](n, k) for n, k in shapes) + biases
        floats = sum(experts.num_experts * 4 * n * k for n, k in shapes) + biases
        assert (sizes[name].bytes_before, sizes[name].bytes_after) == (floats, held)
    assert count_parameters(cell.model) == sum(p.numel() for p in cell.float.parameters())


def test_saved_and_loaded_bit_for_bit_in_shards(cell, tools, tmp_path):
    cell.model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load(tmp_path)
    tools.same(again, cell.model)
    assert torch.equal(tools.logits(again, cell.ids), cell.logits)


def test_while_loading_is_as_in_place(cell, tools, tmp_path):
    cell.float.save_pretrained(tmp_path)
    loaded = load(tmp_path, cell.config)
    tools.same(loaded, cell.model)
    assert [e.name for e in loaded.hf_quantizer.report.changed] == [e.name for e in cell.report.changed]
    loaded.save_pretrained(tmp_path / "again")
    tools.same(load(tmp_path / "again"), cell.model)


def test_generation_goes_on_as_a_whole_pass_would(cell):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = cell.model.generate(cell.ids, **options)
    assert found.shape[1] == cell.ids.shape[1] + 4
    assert torch.equal(found, cell.model.generate(cell.ids, **options, use_cache=False))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("format", ["int8", "nvfp4"])
class TestCopies:
    def test_copied_and_pickled(self, cell_of, tools, name, format):
        cell = cell_of(name, format)
        file = io.BytesIO()
        torch.save(cell.model, file)  # pickles; the bytes of float8 need PyTorch's own way
        file.seek(0)
        for again in (copy.deepcopy(cell.model), torch.load(file, weights_only=False)):
            tools.same(again, cell.model)
            assert torch.equal(tools.logits(again, cell.ids), cell.logits)

    def test_cast_to_bfloat16(self, cell_of, tools, name, format):
        cell = cell_of(name, format)
        model, plain = copy.deepcopy(cell.model).bfloat16(), copy.deepcopy(cell.plain).bfloat16()
        for n, experts in cell.experts.items():
            held = model.get_submodule(n)
            assert held.down_proj.dtype == torch.bfloat16
            for key in held.forms:
                found, wanted = held.tensors(key), experts.tensors(key)
                assert all(torch.equal(found[s].view(torch.uint8), wanted[s].view(torch.uint8)) for s in wanted)
        # A rounded router may send a token elsewhere, so both start from the same rounded parts.
        assert tools.distance(tools.logits(model, cell.ids), tools.logits(plain, cell.ids)) < 0.05
        with pytest.raises(TypeError, match="codes cannot be cast"):
            held._apply(lambda t: t.float())

    def test_saved_in_bfloat16(self, cell_of, tools, name, format, tmp_path):
        model = copy.deepcopy(cell_of(name, format).model).bfloat16()
        model.save_pretrained(tmp_path)
        tools.same(load(tmp_path), model)


@pytest.mark.parametrize("format", ["int8", "fp8", "mxfp4", "nvfp4"])
def test_state_dicts_load_and_what_is_wrong_in_them_is_named(cell_of, tools, format):
    cell = cell_of("gpt_oss", format)
    other = copy.deepcopy(cell.model)
    for experts in (m for m in other.modules() if isinstance(m, QuantizedExperts)):
        experts.down_proj = torch.zeros(experts.down_proj.shape)
    state = cell.model.state_dict()
    other.load_state_dict(state)
    tools.same(other, cell.model)
    name = "model.layers.1.mlp.experts"
    codes = next(k for k in state if k.startswith(f"{name}.down_proj_weight"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: .* has shape \[3, .*wanted \[4, "):
        other.load_state_dict({**state, codes: state[codes][:3]})
    with pytest.raises(TypeError, match=r"experts\.down_proj: .* has dtype torch\.int64, wanted"):
        other.load_state_dict({**state, codes: torch.zeros(state[codes].shape, dtype=torch.int64)})
    with pytest.raises(KeyError, match=r"experts\.down_proj: the checkpoint holds it quantised, but has no"):
        other.load_state_dict({k: t for k, t in state.items() if k != codes})
    with pytest.raises(TypeError, match=r"holds down_proj in torch\.float32, wanted codes"):
        other.load_state_dict({**state, f"{name}.down_proj": torch.zeros(4, 64, 64)})


def test_a_folder_without_a_scale_is_refused(cell_of, tmp_path):
    from safetensors.torch import load_file, save_file

    cell_of("mixtral", "fp8").model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    key = next(k for k in state if k.endswith("layers.1.block_sparse_moe.experts.down_proj_weight_scale"))
    del state[key]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(KeyError, match=r"layers\.1\.mlp\.experts\.down_proj: .*but has no weight_scale"):
        load(tmp_path)


def test_a_base_model_reads_what_the_whole_model_saved(cell_of, tools, tmp_path):
    import transformers

    cell = cell_of("mixtral", "nvfp4")
    cell.model.save_pretrained(tmp_path)
    base = transformers.MixtralModel.from_pretrained(tmp_path)
    tools.same(base, cell.model.model)


def test_dynamic_int8_is_near(cell_of, tools):
    cell = cell_of("qwen3_moe", "int8")
    model = copy.deepcopy(cell.float)
    quantize_(model, Int8Config(), strict=True)
    assert 0 < tools.distance(tools.logits(model, cell.ids), cell.logits) < 0.1


class Routed(nn.Module):
    """Experts beside a router that is a linear layer, and a layer that is none."""

    def __init__(self, experts):
        super().__init__()
        self.router = nn.Linear(64, 5)
        self.shared_expert_gate = nn.Linear(64, 1)
        self.out = nn.Linear(64, 5)
        self.experts = experts


def test_routers_stay_float(experts):
    model = nn.Sequential(Routed(experts()), nn.Linear(64, 5))
    report = quantize_(model, Int8Config(), strict=True)
    assert [e.name for e in report.changed] == ["0.out", "0.experts", "1"]
    assert {e.name: e.reason for e in report.skipped} == dict.fromkeys(
        ("0.router", "0.shared_expert_gate"), "chooses between experts (routers stay float)"
    )


def test_experts_alone_and_all_but_experts(tools):
    model = tools.make("qwen2_moe")
    report = quantize_(model, Int8Config(), where="*.experts")
    assert [e.name for e in report.changed] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    again = quantize_(model, Int8Config())
    assert not any(e.name.endswith(".experts") for e in again.changed)
    model = tools.make("qwen2_moe")
    report = quantize_(model, Int8Config(skip=("experts", "lm_head")))
    assert not any(isinstance(m, QuantizedExperts) for m in model.modules())
    assert {e.reason for e in report.skipped if e.name.endswith("experts")} == {"on the skip list (experts)"}


def test_several_formats_in_one_model(tools, tmp_path):
    model = tools.make("qwen3_moe")
    rules = {"*.0.mlp.experts": tools.formats["nvfp4"], "*.experts": tools.formats["fp8"], "*": Int8Config()}
    quantize_(model, rules)
    assert [m.quantization for m in model.modules() if isinstance(m, QuantizedExperts)] == [
        tools.formats["nvfp4"], tools.formats["fp8"],
    ]  # fmt: skip
    model.save_pretrained(tmp_path)
    tools.same(load(tmp_path), model)
    dequantize_(model, where="*.experts")
    assert not any(isinstance(m, QuantizedExperts) for m in model.modules())
    model.save_pretrained(tmp_path / "part")
    tools.same(load(tmp_path / "part"), model)
