"""A tiny Llama: saved, loaded, adapted with LoRA, and exchanged with compressed-tensors."""

import json
import sys

import pytest
import torch
from eff_quant import (
    FP8Config,
    FP8Linear,
    FP8QATConfig,
    FP8Spec,
    convert_qat_,
    load,
    load_compressed_fp8,
    merge_lora,
    prepare_qat_,
    quantize_,
    save_compressed_fp8,
)
from eff_quant.fp8_qat.files import fp8_config
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

# Libraries that are deprecated here and there by those they build on
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ACTIVATIONS = ["none", "dynamic"]


def fp8_bytes(model):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FP8Linear)}
    return {n: (m.codes.view(torch.uint8).clone(), m.weight_scale.clone()) for n, m in layers.items()}


def same_bytes(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_saved_and_loaded_it_is_the_same_model(llama, ids, tmp_path, activations):
    model = llama()
    quantize_(model, FP8Config(activations=activations))
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same_bytes(fp8_bytes(model), fp8_bytes(again))
    assert torch.equal(again(ids).logits, expected)
    assert again.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 15)


def test_float_weights_are_quantised_as_they_are_read(llama, ids, tmp_path):
    model = llama(torch.bfloat16)
    model.save_pretrained(tmp_path)
    quantize_(model, FP8Config())
    loaded = load(tmp_path, FP8Config(), dtype=torch.bfloat16)
    assert same_bytes(fp8_bytes(model), fp8_bytes(loaded))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_row_is_the_same_alone_and_in_a_padded_batch(llama, ids):
    model = llama()
    quantize_(model, FP8Config(activations="dynamic"))
    alone = model(ids[:1]).logits
    torch.testing.assert_close(model(ids).logits[:1], alone, rtol=1e-4, atol=1e-5)


def test_prepared_converted_saved_and_loaded(llama, ids, tmp_path):
    model = llama()
    handle = prepare_qat_(model, FP8QATConfig(activation=None))
    assert len(handle.replaced) == 14
    assert [e.reason for e in handle.report.skipped] == ["on the skip list (lm_head)"]
    expected = model(ids).logits
    convert_qat_(model)
    converted = model(ids).logits
    torch.testing.assert_close(converted, expected, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(ids).logits, converted)


def test_tied_weights_stay_tied_and_are_left(llama, ids):
    model = llama(tie_word_embeddings=True)
    handle = prepare_qat_(model, FP8QATConfig(skip=()))
    assert any("tied" in e.reason for e in handle.report.skipped)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("order", ["prepare, then LoRA", "LoRA, then prepare"])
def test_adapters_learn_under_the_noise(llama, order):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=True)
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # a random head of the usual size is too flat to say anything with certainty
    if order.startswith("prepare"):
        prepare_qat_(model)
        adapted = peft.get_peft_model(model, settings)
    else:
        adapted = peft.get_peft_model(model, settings)
        handle = prepare_qat_(adapted)
        assert not any("lora_" in name for name in handle.replaced)
    prepared = [m for m in adapted.modules() if type(m).__name__ == "FP8QATLinear"]
    assert len(prepared) == 14
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    frozen = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    ids = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(7))
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(40):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.named_parameters() if n in frozen)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_adapters_learn_on_stored_fp8(llama, activations):
    peft = pytest.importorskip("peft")
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    quantize_(model, FP8Config(activations=activations))
    before = fp8_bytes(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    ids = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(7))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(40):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = {n.removeprefix("base_model.model.").replace(".base_layer", ""): b for n, b in fp8_bytes(adapted).items()}
    assert same_bytes(before, after)


def test_adapters_are_merged_into_stored_fp8(llama, ids):
    peft = pytest.importorskip("peft")
    model = llama()
    quantize_(model, FP8Config())
    base, before = model(ids).logits, fp8_bytes(model)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    expected = adapted(ids).logits
    merged, report = merge_lora(adapted)
    assert len(report.changed) == 2
    assert (merged(ids).logits - expected).abs().max() < 0.3 * (expected - base).abs().max()
    changed = {e.name for e in report.changed}
    after = fp8_bytes(merged)
    assert all(torch.equal(before[n][0], after[n][0]) == (n not in changed) for n in before)


class TestCompressedTensors:
    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("compressed_tensors")

    @staticmethod
    def written_by_the_library(model, path, activations):
        """What llm-compressor does: scales of the largest magnitude, then the library's own compressor."""
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

        scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
        if activations == "none":
            scheme.input_activations = None
        settings = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
        apply_quantization_config(model, settings)
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                module.weight_scale.data = (module.weight.detach().abs().amax(1, keepdim=True) / 448).to(
                    module.weight_scale.dtype
                )
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(path)
        compressor.update_config(path)

    @pytest.mark.parametrize("activations", ACTIVATIONS)
    def test_our_folder_loads_through_the_library(self, llama, ids, tmp_path, activations):
        from transformers import AutoModelForCausalLM

        model = llama()
        quantize_(model, FP8Config(activations=activations))
        expected = model(ids).logits
        save_compressed_fp8(model, tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert type(theirs.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-3, atol=1e-4)
        ours = load_compressed_fp8(tmp_path)
        assert same_bytes(fp8_bytes(ours), fp8_bytes(model))
        assert torch.equal(ours(ids).logits, expected)
        assert model.config.quantization_config.quant_method == "eff_fp8"

    @pytest.mark.parametrize("activations", ACTIVATIONS)
    def test_its_folder_loads_here(self, llama, ids, tmp_path, activations):
        from transformers import AutoModelForCausalLM

        self.written_by_the_library(llama(), tmp_path, activations)
        ours = load_compressed_fp8(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        name = "model.layers.1.mlp.up_proj"
        layer = ours.get_submodule(name)
        assert layer.config.activations == activations
        assert torch.equal(layer.codes.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
        assert type(ours.lm_head) is torch.nn.Linear
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-3, atol=1e-4)

    def test_bfloat16_scales_are_read_as_they_are(self, llama, ids, tmp_path):
        model = llama(torch.bfloat16)
        quantize_(model, FP8Config())
        save_compressed_fp8(model, tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        stored = {n: t.bfloat16() if n.endswith("weight_scale") else t for n, t in stored.items()}
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        ours = load_compressed_fp8(tmp_path)
        layer = ours.model.layers[0].mlp.up_proj
        assert layer.weight_scale.dtype == torch.float32
        assert torch.equal(layer.weight_scale, stored["model.layers.0.mlp.up_proj.weight_scale"].float())

    def test_it_is_not_needed_to_load_its_folders(self, llama, ids, tmp_path, monkeypatch):
        model = llama()
        quantize_(model, FP8Config(activations="dynamic"))
        save_compressed_fp8(model, tmp_path)
        monkeypatch.setitem(sys.modules, "compressed_tensors", None)
        assert torch.equal(load_compressed_fp8(tmp_path)(ids).logits, model(ids).logits)

    def test_what_it_ignores_stays_as_it_is(self, llama, ids, tmp_path):
        model = llama()
        quantize_(model, FP8Config(skip=("lm_head", "*.self_attn.*", "model.layers.0.mlp.up_proj")))
        save_compressed_fp8(model, tmp_path)
        settings = json.loads((tmp_path / "config.json").read_text())
        ignored = ["re:.*self_attn", "model.layers.0.mlp.up_proj", "lm_head"]
        settings["quantization_config"]["ignore"] = ignored
        (tmp_path / "config.json").write_text(json.dumps(settings))
        ours = load_compressed_fp8(tmp_path)
        assert same_bytes(fp8_bytes(ours), fp8_bytes(model))
        assert torch.equal(ours(ids).logits, model(ids).logits)

    def test_its_schemes_are_ours(self):
        from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

        scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
        settings = QuantizationConfig(config_groups={"g": scheme}, ignore=["lm_head"], format="float-quantized")
        assert fp8_config(settings.to_dict()) == FP8Config(activations="dynamic")
        for name, message in (("FP8", "input_activations: .*'tensor'|weights: .*'tensor'"), ("FP8_BLOCK", "weights")):
            other = QuantizationConfig(
                config_groups={"g": preset_name_to_scheme(name, ["Linear"])}, format="float-quantized"
            )
            with pytest.raises(ValueError, match=message):
                fp8_config(json.loads(json.dumps(other.to_dict(), default=str)))


def test_what_compressed_tensors_does_not_have_is_refused(llama, tmp_path):
    model = llama()
    with pytest.raises(ValueError, match="no FP8 layers"):
        save_compressed_fp8(model, tmp_path)
    quantize_(model, FP8Config(dtype="e5m2"))
    with pytest.raises(ValueError, match="dtype='e5m2'"):
        save_compressed_fp8(model, tmp_path)
    with pytest.raises(TypeError, match="takes a transformers model, got Linear"):
        save_compressed_fp8(torch.nn.Linear(2, 2), tmp_path)
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quant_method=None"):
        load_compressed_fp8(tmp_path)


def test_prepared_models_save_and_load_as_plain_ones(llama, ids, tmp_path):
    model = llama()
    handle = prepare_qat_(model, FP8QATConfig(weight=FP8Spec(dtype="e5m2")))
    model.save_pretrained(tmp_path)
    handle.remove()
    plain = type(model).from_pretrained(tmp_path)
    assert torch.equal(plain(ids).logits, model(ids).logits)
