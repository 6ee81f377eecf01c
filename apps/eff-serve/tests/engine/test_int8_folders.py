"""Folders that are quantised already: ours and those of bitsandbytes run as they are, others are refused by name."""

import json

import eff_quant.hf
import pytest
import torch
from eff_quant import Int8Config, load, save_bnb_int8
from eff_serve.engine.config import DecoderConfig, UnsupportedModelError
from eff_serve.engine.decoder import Decoder
from eff_serve.engine.hf import HFDecoder
from eff_serve.engine.linear import FloatLinear
from eff_serve.engine.quantized import Int8Linear
from eff_serve.engine.weights import CheckpointError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

IDS = torch.randint(3, 131, (40,), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def make(tiny_model, tmp_path):
    """``make(writer, **settings)``: an int8 folder of the tiny Llama, and what transformers computes from it."""

    def write(writer, **settings):
        config = Int8Config(**{"activation_group": None if writer == "bitsandbytes" else 32, **settings})
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model("llama"), quantization_config=eff_quant.hf.EffConfig(config), dtype=torch.float32
        )
        save_bnb_int8(model, tmp_path) if writer == "bitsandbytes" else model.save_pretrained(tmp_path)
        with torch.inference_mode():
            return tmp_path, load(tmp_path)(IDS[None]).logits[0].float()

    return write


@pytest.mark.parametrize("writer", ["eff", "bitsandbytes"])
def test_int8_folders_run_as_they_are(make, writer):
    folder, wanted = make(writer, threshold=0.0)
    decoder = Decoder(folder, num_pages=2)
    assert decoder.layers[0].down.config.threshold == 0
    assert decoder.layers[0].down.config.activation_group == (None if writer == "bitsandbytes" else 32)
    stored = load_file(folder / "model.safetensors")
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer.qkv, Int8Linear)
        names = [f"model.layers.{i}.self_attn.{p}_proj" for p in "qkv"]
        assert torch.equal(layer.qkv.weight, torch.cat([stored[f"{n}.weight"] for n in names]))
        assert torch.equal(layer.qkv.absmax, torch.cat([stored[f"{n}.SCB"] for n in names]))
    got = decoder.prefill(IDS, 0, torch.tensor([0, 1]), all_logits=True)
    # A rounding of the activations that falls on the other side moves a logit by far more than float32 does.
    assert (got - wanted).norm() < 0.01 * wanted.norm()


def test_the_threshold_is_that_of_the_folder_unless_given(make):
    folder, _ = make("bitsandbytes", threshold=2.5)
    assert Decoder(folder, num_pages=2).layers[0].down.config.threshold == 2.5
    assert Decoder(folder, threshold=4.0, num_pages=2).layers[0].down.config.threshold == 4.0


def test_weights_in_a_gpus_order_are_refused(make):
    folder, _ = make("bitsandbytes")
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    save_file({**tensors, "model.layers.1.mlp.down_proj.weight_format": torch.tensor(1, dtype=torch.uint8)}, path)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight_format must be 0 \(row-major\), got 1"):
        Decoder(folder, num_pages=2)


def test_float_layers_beside_int8_layers_are_not_mixed_up(make):
    folder, wanted = make("eff", threshold=0.0, skip=("lm_head", "k_proj"))
    decoder = Decoder(folder, num_pages=2)
    assert [type(part) for part in decoder.layers[0].qkv.layers] == [Int8Linear, FloatLinear, Int8Linear]
    got = decoder.prefill(IDS, 0, torch.tensor([0, 1]), all_logits=True)
    assert (got - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq", "bits": 4}, "'hqq' is not one of"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' is not one of"),
        ({"quant_method": "fp8"}, "'fp8' is not one of"),
    ],
)
def test_other_quantisations_are_refused(tiny_model, tmp_path, settings, message):
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(UnsupportedModelError, match=message):
        DecoderConfig.from_folder(tmp_path)


def test_settings_that_the_decoder_lacks_run_through_transformers(make):
    columns = {"model.layers.0.mlp.down_proj": (3, 7)}
    folder, wanted = make("eff", outlier_weights="original", outlier_columns=columns)
    with pytest.raises(UnsupportedModelError, match="outlier_weights='original'"):
        Decoder(folder, num_pages=2)
    got = HFDecoder(folder, num_pages=2).prefill(IDS, 0, torch.tensor([0, 1]), all_logits=True)
    assert torch.equal(got, wanted)
