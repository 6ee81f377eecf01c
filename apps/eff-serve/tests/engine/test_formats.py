"""Each format of ``--quantize``: the numbers of eff-quant's layers in transformers, from floats and from folders."""

import json

import eff_quant.hf  # noqa: F401 - registers the methods
import pytest
import torch
from eff_quant import FP4Config, FP8Config, Int8Config, load, quantize_
from eff_quant.fp4 import save_fp4_checkpoint
from eff_quant.fp8_qat import save_compressed_fp8
from eff_serve.engine import EngineConfig, load_engine
from eff_serve.engine.decoder import Decoder
from eff_serve.engine.linear import Separate
from eff_serve.engine.quantization import settings_for
from eff_serve.engine.weights import CheckpointError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

IDS = torch.randint(3, 131, (40,), generator=torch.Generator().manual_seed(3))
CONFIGS = {
    "int8": Int8Config(threshold=0.0),
    "int8 weights": Int8Config(activation="none"),
    "nvfp4": FP4Config(format="nvfp4"),
    "mxfp4": FP4Config(format="mxfp4"),
    "mxfp4 both": FP4Config(format="mxfp4", activations="dynamic", scale_rounding="even"),
    "fp8": FP8Config(),
    "fp8 both": FP8Config(activations="dynamic"),
}


def transformers_model(folder, config=None):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def logits(decoder):
    return decoder.prefill(IDS, 0, torch.tensor([0, 1]), all_logits=True)


def close(got, wanted):
    # A rounding that falls on the other side moves a logit by far more than float32 does.
    return (got - wanted).norm() < 0.01 * wanted.norm()


@pytest.fixture
def truth():
    def run(model):
        with torch.inference_mode():
            return model(IDS[None]).logits[0].float()

    return run


@pytest.mark.parametrize("name", ["int8", "nvfp4", "mxfp4", "fp8"])
@pytest.mark.parametrize("kind", ["llama", "llama-untied-biased", "qwen3"])
def test_float_weights_are_quantised_on_the_way(tiny_model, truth, name, kind):
    wanted = truth(transformers_model(tiny_model(kind), CONFIGS[name]))
    threshold = 0.0 if name == "int8" else None  # outliers are taken out by the token here, by the column there
    decoder = Decoder(tiny_model(kind), quantize=name, threshold=threshold, num_pages=2)
    assert close(logits(decoder), wanted)
    plain = Decoder(tiny_model(kind), num_pages=2)
    assert not close(logits(plain), wanted)  # the test can tell
    assert decoder.layers[0].qkv.nbytes < 0.6 * plain.layers[0].qkv.nbytes


@pytest.mark.parametrize("name", CONFIGS)
def test_folders_run_as_they_are(tiny_model, tmp_path, truth, name):
    transformers_model(tiny_model("llama"), CONFIGS[name]).save_pretrained(tmp_path)
    decoder = Decoder(tmp_path, num_pages=2)
    assert close(logits(decoder), truth(load(tmp_path, dtype=torch.float32)))
    assert not isinstance(decoder.layers[0].qkv, Separate)
    with pytest.raises(ValueError, match="is quantised already"):
        Decoder(tmp_path, quantize="fp8", num_pages=2)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8", "fp8 both"])
def test_folders_of_compressed_tensors(tiny_model, tmp_path, truth, name):
    model = transformers_model(tiny_model("llama"), CONFIGS[name])
    (save_compressed_fp8 if "fp8" in name else save_fp4_checkpoint)(model, tmp_path)
    assert close(logits(Decoder(tmp_path, num_pages=2)), truth(model))


def test_a_folder_of_several_formats(tiny_model, tmp_path, truth):
    rules = {"q_proj": CONFIGS["nvfp4"], "*.mlp.*": CONFIGS["mxfp4"], "v_proj": CONFIGS["fp8"]}
    model = transformers_model(tiny_model("llama"))
    quantize_(model, rules)
    model.save_pretrained(tmp_path)
    decoder = Decoder(tmp_path, num_pages=2)
    assert close(logits(decoder), truth(model))
    assert [type(part).__name__ for part in decoder.layers[0].qkv.layers] == ["FP4Linear", "FloatLinear", "FP8Linear"]
    assert not isinstance(decoder.layers[0].gate_up, Separate)
    stored = sum(t.nbytes for n, t in load_file(tmp_path / "model.safetensors").items() if "layers.0.self_attn" in n)
    layer = decoder.layers[0]
    assert abs(layer.qkv.nbytes + layer.output.nbytes - stored) <= 8  # but for the global scale and its like


def test_layers_with_global_scales_of_their_own_stay_apart(tiny_model, tmp_path, truth):
    model = transformers_model(tiny_model("llama"))
    quantize_(model, FP4Config(format="nvfp4", fuse_groups=()))
    model.save_pretrained(tmp_path)
    decoder = Decoder(tmp_path, num_pages=2)
    assert isinstance(decoder.layers[0].qkv, Separate)
    assert close(logits(decoder), truth(model))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8"])
def test_rows_do_not_depend_on_their_neighbours(tiny_model, name):
    layer = Decoder(tiny_model("llama"), quantize=name, num_pages=1).layers[0].gate_up
    x = torch.randn(7, 64)
    together = layer(x)
    assert all(torch.equal(layer(x[i : i + 1])[0], together[i]) for i in range(7))


def test_what_does_not_fit_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="quantize must be one of"):
        load_engine(EngineConfig(model=str(tiny_model("llama")), quantize="int3"), progress=False)
    with pytest.raises(ValueError, match=r"threshold=3\.0 is for int8, not for nvfp4"):
        settings_for("nvfp4", 3.0)
    transformers_model(tiny_model("llama"), CONFIGS["nvfp4"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is for int8, which the folder does not hold"):
        Decoder(tmp_path, threshold=3.0, num_pages=2)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(CheckpointError, match=f"has no tensor {name}"):
        Decoder(tmp_path, num_pages=2)
    save_file({**tensors, name: tensors[name].view(torch.uint8)}, path)
    with pytest.raises(CheckpointError, match=r"weight_scale of nvfp4 must be torch\.float8_e4m3fn, got torch\.uint8"):
        Decoder(tmp_path, num_pages=2)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = Int8Config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is stored in FP4, but its settings are Int8Config"):
        Decoder(tmp_path, num_pages=2)
