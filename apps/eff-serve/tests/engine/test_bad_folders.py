"""Folders that cannot be served: one line that names the file and the reason."""

import json
import shutil

import pytest
from eff_serve.cli import main
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(tiny_model, smollm2, tmp_path):
    made = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, made)
    return made


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def one_layer_less(folder):
    edit(folder, num_hidden_layers=json.loads((folder / "config.json").read_text())["num_hidden_layers"] - 1)


def cut_config(folder):
    (folder / "config.json").write_text((folder / "config.json").read_text()[:-20])


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def less_a_tensor(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path)


def without_heads(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["num_attention_heads"]
    path.write_text(json.dumps(config))


CASES = {
    "one layer less than the weights have": (one_layer_less, "belong to no layer of its config.json"),
    "cut config": (cut_config, "config.json is not JSON"),
    "cut weights": (cut_weights, "model.safetensors is damaged"),
    "a tensor less": (less_a_tensor, "mlp.up_proj"),
    "no heads": (without_heads, "num_attention_heads"),
    "gptq": (lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 3}), "gptq"),
    "foreign code": (
        lambda f: edit(
            f,
            architectures=["Mine"],
            model_type="mine",
            auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
        ),
        "custom code",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line(folder, case, monkeypatch):
    change, says = CASES[case]
    change(folder)
    (folder / "mine.py").write_text("raise SystemExit('this code ran')\n")
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked a question"))
    with pytest.raises(SystemExit) as end:
        main(["generate", "hi", "--model", str(folder)])
    text = str(end.value.code)
    assert text.startswith("eff-serve: ")
    assert says in text
    assert "\n" not in text
    assert "this code ran" not in text
