"""Cases that went wrong in use, by kind; most are properties of model classes."""

import copy

import eff_quant.hf  # noqa: F401 - registers the quantiser
import pytest
import torch
import transformers as hf
from eff_quant import (
    FP4Config,
    FP8Config,
    Int8Config,
    W4A8Config,
    dequantize_,
    load,
    merge_lora,
    quantize_,
)
from eff_quant.layer import QuantizedLinear
from safetensors.torch import load_file, save_file
from torch import nn

peft = pytest.importorskip("peft")

# PEFT asks transformers for what that has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

FORMATS = {
    "int8": Int8Config(),
    "fp8": FP8Config(),
    "nvfp4": FP4Config(),
    "mxfp4": FP4Config(format="mxfp4"),
    "w4a8": W4A8Config(activation="dynamic_token"),
}
formats = pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)
IDS = torch.arange(1, 10)[None]
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip


def qwen(cls=hf.Qwen2ForCausalLM, **more):
    torch.manual_seed(0)
    return cls(hf.Qwen2Config(**SIZES, **more)).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0)).eval()


def vit():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    return hf.ViTModel(
        hf.ViTConfig(**{k: v for k, v in sizes.items() if k not in ("vocab_size", "num_key_value_heads")})
    )


def mobilebert():
    torch.manual_seed(0)
    config = hf.MobileBertConfig(
        hidden_size=64, embedding_size=32, intermediate_size=128, intra_bottleneck_size=32, true_hidden_size=32,
        num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
    )  # fmt: skip
    return hf.MobileBertForMaskedLM(config).eval()


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def distance(found, expected):
    return float((found - expected).detach().norm() / expected.detach().norm())


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    for name in x:
        assert torch.equal(x[name].contiguous().view(torch.uint8), y[name].contiguous().view(torch.uint8)), name


def lora(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], **options)).eval()


class TestWhatWeightMeans:
    """To everybody but the layer itself, ``weight`` is a float matrix."""

    @formats
    def test_it_is_the_dequantised_matrix(self, config):
        model = nn.Sequential(nn.Linear(64, 32))
        quantize_(model, config)
        layer = model[0]
        assert layer.weight.shape == (32, 64)
        assert layer.weight.dtype == torch.float32
        x = torch.randn(3, 64, requires_grad=True)
        y = x @ layer.weight.T
        assert torch.equal(y, x @ layer.dequantize().T)
        y.sum().backward()
        assert x.grad is not None
        assert layer.half().weight.dtype == torch.float16
        with pytest.raises(TypeError, match="cannot be changed in place"):
            layer.weight.add_(1)

    @formats
    def test_a_weight_that_is_assigned_is_quantised(self, config):
        torch.manual_seed(0)
        model, new = nn.Sequential(nn.Linear(64, 32)), nn.Linear(64, 32)
        quantize_(model, config)
        wanted = type(model[0]).from_linear(new, config)
        model[0].weight.data = new.weight
        assert torch.equal(model[0].dequantize(), wanted.dequantize())
        with pytest.raises(ValueError, match=r"\[64, 32\], wanted \[32, 64\]"):
            model[0].weight = new.weight.T
        with pytest.raises(TypeError, match="int64"):
            model[0].weight = torch.zeros(32, 64, dtype=torch.int64)

    @formats
    def test_parents_that_read_it_compute_the_same(self, config):
        """T5 casts to the dtype of ``wo``, MobileBERT multiplies by the weight of its head by hand."""
        for model, inputs in (
            (t5(), {"input_ids": IDS, "decoder_input_ids": IDS}),
            (mobilebert(), {"input_ids": IDS}),
        ):
            quantize_(model, config)
            found = model(**inputs).logits
            dequantize_(model)
            # Activations are rounded by some of the formats, so that this is near and not equal.
            assert distance(found, model(**inputs).logits) < 0.05

    @formats
    def test_fused_paths_of_torch_do_not_take_codes(self, config):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0).eval()
        x = torch.randn(2, 5, 64)
        quantize_(model, config, where=("linear1", "linear2"))
        with torch.inference_mode():
            found = model(x)
            dequantize_(model)
            assert distance(found, model(x)) < 0.05


class TestHeads:
    @formats
    def test_heads_stay_float_and_train(self, config, tmp_path):
        qwen().save_pretrained(tmp_path)
        model = hf.Qwen2ForSequenceClassification.from_pretrained(
            tmp_path, num_labels=3, pad_token_id=0, quantization_config=config
        )
        assert type(model.score) is nn.Linear
        assert torch.isfinite(model(IDS).logits).all()
        in_place = qwen(hf.Qwen2ForSequenceClassification, num_labels=3, pad_token_id=0)
        report = quantize_(in_place, config)
        assert [e.name for e in report.skipped if "head on the base model" in e.reason] == ["score"]
        assert layers(model).keys() == layers(in_place).keys()
        adapted = lora(in_place, task_type="SEQ_CLS")
        assert [k for k, p in adapted.named_parameters() if p.requires_grad and "score" in k]

    def test_no_skip_list_takes_them_in(self):
        model = qwen(hf.Qwen2ForSequenceClassification, num_labels=3, pad_token_id=0)
        quantize_(model, Int8Config(skip=()))
        assert isinstance(model.score, QuantizedLinear)


class TestPlans:
    @formats
    @pytest.mark.parametrize("make", [qwen, t5, vit, mobilebert])
    def test_in_place_and_while_loading_are_the_same(self, make, config, tmp_path):
        model = make()
        model.save_pretrained(tmp_path / "float")
        loaded = load(tmp_path / "float", config)
        report = quantize_(model, config)
        assert sorted(e.name for e in loaded.hf_quantizer.report.changed) == sorted(e.name for e in report.changed)
        same(loaded, model)
        model.save_pretrained(tmp_path / "quantised")
        same(load(tmp_path / "quantised"), model)

    def test_a_container_on_the_skip_list_takes_in_what_is_inside(self):
        report = quantize_(qwen(), Int8Config(skip=("mlp", "lm_head")))
        assert report.changed
        assert not [e for e in report.changed if ".mlp." in e.name]

    @pytest.mark.parametrize(
        ("config", "where", "says"),
        [(Int8Config(skip=("mpl",)), "*", "skip: 'mpl' matches no module"), (Int8Config(), "layer.*", "where: 'layer")],
    )
    def test_patterns_that_fit_nothing_are_refused(self, config, where, says):
        with pytest.raises(ValueError, match=says):
            quantize_(qwen(), config, where=where)

    def test_a_token_is_no_expert(self):
        quantize_(vit(), Int8Config(), strict=True)

    @formats
    def test_names_that_end_alike(self, config, tmp_path):
        class K(hf.PretrainedConfig):
            model_type = "k"

        class M(hf.PreTrainedModel):
            config_class = K

            def __init__(self, c):
                super().__init__(c)
                self.block = nn.ModuleDict({"fc": nn.Linear(64, 64)})
                self.fc = nn.Linear(64, 64)
                self.post_init()

        model = M(K())
        quantize_(model, config, where="block.*")
        model.save_pretrained(tmp_path)
        same(M.from_pretrained(tmp_path), model)
        other = FP8Config() if config != FP8Config() else Int8Config()
        mixed = M(K())
        quantize_(mixed, {"block.fc": config, "fc": other})
        mixed.save_pretrained(tmp_path / "mixed")
        again = M.from_pretrained(tmp_path / "mixed")
        same(again, mixed)
        assert again.fc.config.quant_method == other.quant_method


class TestCheckpoints:
    @formats
    def test_what_is_missing_or_misshapen_is_named(self, config, tmp_path):
        model = qwen()
        quantize_(model, config)
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        whole = load_file(file)
        name = "model.layers.1.mlp.up_proj"
        keys = [k for k in whole if k.startswith(name + ".") and not k.endswith(("bias", "weight_format"))]
        assert len(keys) >= 2
        for key in keys:
            save_file({k: t for k, t in whole.items() if k != key}, file, {"format": "pt"})
            with pytest.raises((KeyError, ValueError, TypeError), match=name):
                load(tmp_path)
            if whole[key].numel() > 1:
                save_file({**whole, key: whole[key][:-1].clone()}, file, {"format": "pt"})
                with pytest.raises(ValueError, match=rf"{name}: .*shape"):
                    load(tmp_path)

    @formats
    def test_state_dicts_can_be_saved_as_they_are(self, config, tmp_path):
        model = nn.Sequential(nn.Linear(64, 40))
        quantize_(model, config)
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        fresh = nn.Sequential(nn.Linear(64, 40))
        quantize_(fresh, config)
        fresh.load_state_dict(load_file(tmp_path / "w.safetensors"))
        same(fresh, model)


class TestAdapters:
    @formats
    @pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
    def test_merged_is_what_ran(self, config, options):
        model = qwen()
        quantize_(model, config)
        model = lora(model, **options)
        torch.manual_seed(0)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.1)
        wanted = model(IDS).logits
        theirs = copy.deepcopy(model)
        theirs.merge_adapter()
        merged, _ = merge_lora(model)
        # Quantising the sum again moves the weights by up to half a step; 4 bits have coarse ones.
        bound = 0.02 if config.quant_method in ("eff_int8",) else 0.3
        assert distance(merged(IDS).logits, wanted) < bound
        assert distance(theirs(IDS).logits, wanted) < bound

    @formats
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_initialisations_that_change_the_base_keep_the_model(self, config, init):
        """They take the largest directions out of the base weight; what is left is quantised again."""
        model = qwen()
        quantize_(model, config)
        before = model(IDS).logits
        adapted = lora(model, init_lora_weights=init)
        assert 0 < distance(adapted(IDS).logits, before) < 0.2

    def test_trainable_copies_stay_float(self):
        model = peft.get_peft_model(
            qwen(), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"])
        )
        count = len([k for k, p in model.named_parameters() if p.requires_grad and "modules_to_save" in k])
        report = quantize_(model, Int8Config())
        assert len([k for k, p in model.named_parameters() if p.requires_grad and "modules_to_save" in k]) == count == 2
        assert {e.reason for e in report.skipped if "modules_to_save" in e.name} == {"belongs to an adapter"}

    def test_a_module_called_lora_is_no_adapter(self):
        model = nn.ModuleDict({"lora_block": nn.Linear(64, 64)})
        assert quantize_(model, Int8Config()).changed

    def test_a_failed_merge_leaves_quantised_layers(self):
        model = qwen()
        quantize_(model, Int8Config())
        model = lora(model)
        model.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"].weight.data.fill_(float("nan"))
        count = len(layers(model))
        with pytest.raises(ValueError, match="NaN"):
            merge_lora(model)
        assert len(layers(model)) == count


class TestLayers:
    @formats
    def test_offloaded_weights_are_not_quantised(self, config):
        from accelerate import cpu_offload

        model = qwen()
        wanted = model(IDS).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        report = quantize_(model, config)
        assert not report.changed
        assert all("offload" in e.reason for e in report.skipped if e.name != "lm_head")
        assert torch.equal(model(IDS).logits, wanted)

    @formats
    def test_models_without_values(self, config):
        with torch.device("meta"):
            model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES))
        report = quantize_(model, config)
        assert len(report.changed) == 14
        real = quantize_(qwen(), config)
        assert report.bytes_after == real.bytes_after

    @formats
    def test_inputs(self, config):
        model = nn.Sequential(nn.Linear(64, 8))
        quantize_(model, config)
        x = torch.randn(2, 64)
        assert torch.equal(model[0](input=x), model[0](x))
        with pytest.raises(TypeError, match="int64"):
            model(torch.ones(1, 64, dtype=torch.long))

    @formats
    def test_weights_that_are_not_finite(self, config):
        model = nn.Sequential(nn.Linear(64, 8))
        model[0].weight.data[3, 2] = float("nan")
        with pytest.raises(ValueError, match="row 3 holds inf or NaN"):
            quantize_(model, config)

    @formats
    def test_hooks_stay(self, config):
        model = nn.Sequential(nn.Linear(64, 8))
        seen = []
        handle = model[0].register_forward_hook(lambda m, args, out: seen.append(m))
        quantize_(model, config)
        model(torch.randn(2, 64))
        assert seen == [model[0]]
        handle.remove()
        model(torch.randn(2, 64))
        assert len(seen) == 1

    def test_a_model_of_torchao_is_left(self):
        torchao = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(nn.Linear(64, 64))
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        (entry,) = quantize_(model, Int8Config()).skipped
        assert "not a plain tensor" in entry.reason


class TestDiffusers:
    @pytest.fixture
    def sd3(self):
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        return diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=48, out_channels=4,
            pos_embed_max_size=8,
        ).eval()  # fmt: skip

    @formats
    def test_saved_it_loads_as_it_was(self, sd3, config, tmp_path):
        sd3.save_pretrained(tmp_path / "float")
        quantize_(sd3, config)
        sd3.save_pretrained(tmp_path / "quantised")
        same(load(tmp_path / "quantised"), sd3)
        same(type(sd3).from_pretrained(tmp_path / "quantised"), sd3)
        half = load(tmp_path / "quantised", torch_dtype=torch.bfloat16)
        for name, layer in layers(half).items():
            assert torch.equal(layer.dequantize(), layers(sd3)[name].dequantize())
        same(load(tmp_path / "float", config), sd3)
        with pytest.raises(ValueError, match="quantised already"):
            load(tmp_path / "quantised", config)
        dequantize_(sd3)
        sd3.save_pretrained(tmp_path / "again")
        assert not layers(type(sd3).from_pretrained(tmp_path / "again"))

    def test_layers_with_different_settings(self, sd3, tmp_path):
        quantize_(sd3, {"*.attn.*": Int8Config(), "*.ff.*": FP4Config()})
        sd3.save_pretrained(tmp_path)
        same(load(tmp_path), sd3)
