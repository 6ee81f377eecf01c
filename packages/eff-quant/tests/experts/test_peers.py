"""What others do with a model whose experts are codes: adapters, other ways of running experts, compiling, training."""

import copy

import pytest
import torch
from eff_quant import dequantize_, merge_lora, quantize_
from eff_quant.experts import QuantizedExperts

peft = pytest.importorskip("peft")

# PEFT asks transformers for what that has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def adapted(model, **options):
    torch.manual_seed(3)
    options = {"target_modules": ["q_proj", "o_proj"], **options}
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, **options))
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.05)
    return wrapped


def gradients(model, ids):
    model(ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("format", ["int8", "fp8", "mxfp4", "nvfp4"])
def test_adapters_on_attention_train_as_over_the_dequantised_model(cell_of, tools, name, format):
    cell = cell_of(name, format)
    found, wanted = (gradients(adapted(m).train(), cell.ids) for m in (cell.model, cell.plain))
    assert found.keys() == wanted.keys()
    assert all("lora_" in n for n in found)
    for n, g in wanted.items():
        assert tools.distance(found[n], g) < 1e-4, n


def test_checkpointing_of_activations(cell_of, tools):
    cell = cell_of("mixtral", "nvfp4")
    wanted = gradients(adapted(cell.model).train(), cell.ids)
    model = adapted(cell.model).train()
    inner = model.get_base_model()
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    found = gradients(model, cell.ids)
    assert all(tools.distance(found[n], g) < 1e-6 for n, g in wanted.items())


def test_a_step_changes_adapters_alone_and_merging_leaves_the_experts(cell_of, tools):
    cell = cell_of("mixtral", "int8")
    model = adapted(cell.model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(cell.ids, labels=cell.ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    merged, report = merge_lora(model.eval())
    assert {e.name.rpartition(".")[2] for e in report.changed} == {"q_proj", "o_proj"}
    for name, experts in cell.experts.items():
        tools.same(merged.get_submodule(name), experts)


@pytest.mark.parametrize("target", ["experts.down_proj", "down_proj", "model.layers.1.mlp.experts.gate_up_proj"])
@pytest.mark.parametrize("modules", [[], ["q_proj"]])
def test_adapters_on_the_experts_themselves_are_refused(cell_of, target, modules):
    """PEFT looks for parameters, and codes are none: nothing may be left out in silence."""
    says = r"target_parameters has .*mlp\.experts\.(down|gate_up)_proj holds codes.*dequantize_"
    for name in ("mixtral", "qwen3_moe"):
        with pytest.raises(ValueError, match=says):
            adapted(cell_of(name, "int8").model, target_modules=modules, target_parameters=[target])


def test_adapters_where_some_experts_are_codes(cell_of):
    """Those of the float layer alone would be found; with its full name that is what is asked for."""
    model = copy.deepcopy(cell_of("mixtral", "int8").model)
    dequantize_(model, where="*.0.mlp.experts")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj holds codes"):
        adapted(model, target_modules=[], target_parameters=["experts.down_proj"])
    whole = adapted(model, target_modules=[], target_parameters=["model.layers.0.mlp.experts.down_proj"])
    assert [n for n, p in whole.named_parameters() if "lora_" in n and ".layers.0." not in n] == []
    assert any("lora_" in n for n, p in whole.named_parameters())


def test_other_parameters_beside_codes_take_adapters(cell_of):
    """Biases and routers are floats still."""
    model = cell_of("mixtral", "int8").model
    wrapped = adapted(model, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    assert any("gate.lora_A" in n for n, p in wrapped.named_parameters())


def test_experts_that_have_adapters_already_are_left(cell_of):
    model = adapted(cell_of("mixtral", "int8").float, target_modules=[], target_parameters=["experts.down_proj"])
    report = quantize_(model, cell_of("mixtral", "int8").config)
    assert not any(isinstance(m, QuantizedExperts) for m in model.modules())
    assert any("has adapters on its parameters (PEFT's target_parameters)" in e.reason for e in report.skipped)


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_ways_of_running_experts_of_transformers_change_nothing(cell_of, tools, way):
    cell = cell_of("qwen3_moe", "nvfp4")
    model = copy.deepcopy(cell.model)
    model.set_experts_implementation(way)
    assert torch.equal(tools.logits(model, cell.ids), cell.logits)


def test_a_fused_path_that_reads_the_stacks_computes_with_floats(cell_of, tools):
    """Whoever multiplies by the parameters himself gets what they stand for."""
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    cell = cell_of("gpt_oss", "mxfp4")
    name, experts = next(iter(cell.experts.items()))
    torch.manual_seed(5)
    x, ids, weights = torch.randn(6, 64), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    with torch.no_grad():
        wanted = cell.plain.get_submodule(name)(x, ids, weights)
        experts = copy.deepcopy(experts)
        experts._apply_gate = lambda y: experts.source._apply_gate(experts, y)
        for way in (batched_mm_experts_forward, grouped_mm_experts_forward):
            assert tools.distance(way(experts, x, ids, weights), wanted) < 1e-5


def test_a_static_cache_is_not_compiled(cell_of):
    cell = cell_of("mixtral", "fp8")
    assert not cell.model.hf_quantizer.is_compileable
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = cell.model.generate(cell.ids, **options, cache_implementation="static")
    assert torch.equal(found, cell.model.generate(cell.ids, **options))


def test_compiled_around_the_experts(cell_of, tools):
    cell = cell_of("mixtral", "fp8")
    compiled = torch.compile(cell.model.model.layers[1].mlp, backend="eager")
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        assert tools.distance(compiled(x), cell.model.model.layers[1].mlp(x)) < 1e-6


def test_autocast(cell_of, tools):
    cell = cell_of("mixtral", "fp8")
    with torch.autocast("cpu", torch.bfloat16):
        assert tools.distance(tools.logits(cell.model, cell.ids), tools.logits(cell.plain, cell.ids)) < 0.05


def test_adapters_on_experts_after_dequantising(cell_of):
    """The way out: float experts take PEFT's adapters again."""
    model = copy.deepcopy(cell_of("mixtral", "int8").model)
    dequantize_(model, where="*.experts")
    wrapped = adapted(model, target_modules=[], target_parameters=["experts.down_proj"])
    assert any(type(m).__name__ == "ParamWrapper" for m in wrapped.modules())
