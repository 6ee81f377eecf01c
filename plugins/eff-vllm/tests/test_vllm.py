"""vLLM's answers with eff's layers are those of the same layers under transformers."""

import dataclasses

import pytest
import torch
from eff_quant import FP4Config, Int8Config, quantize_
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

# A server batches rows of strangers: the plugin looks for outliers in each row by itself, whatever the settings say.
INT8 = Int8Config(per_token_outliers=True)
PROMPTS = [[5, 9, 13, 40, 77], [1, 3, 3, 7, 100, 101, 44, 20, 8]]


def scores(folder, quantization):
    """Log-probability of each prompt token but the first, and twelve greedy tokens, of each prompt."""
    llm = LLM(
        str(folder), quantization=quantization, dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
        max_model_len=128, max_num_seqs=4, seed=0,
    )  # fmt: skip
    options = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], options, use_tqdm=False)
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    kinds = {type(m.quant_method).__name__ for m in model.modules() if hasattr(m, "quant_method")}
    found = [
        ([d[t].logprob for d, t in zip(o.prompt_logprobs[1:], p[1:], strict=True)], list(o.outputs[0].token_ids))
        for o, p in zip(outputs, PROMPTS, strict=True)
    ]
    return found, kinds


def wanted(folder, config):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantize_(model, config)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits = model(ids).logits[0].log_softmax(-1)
            made = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
        found.append(([float(logits[i, t]) for i, t in enumerate(prompt[1:])], made[0, len(prompt) :].tolist()))
    return model, found


def same(found, expected):
    for (scores, tokens), (right, chosen) in zip(found, expected, strict=True):
        assert scores == pytest.approx(right, abs=2e-3)  # float32 sums in another order
        assert tokens == chosen


@pytest.mark.parametrize("quantization", ["eff_int8", "eff_fp4"])
def test_float_folders_are_quantised_while_loading(tiny, quantization):
    config = INT8 if quantization == "eff_int8" else FP4Config(format="nvfp4")
    found, kinds = scores(tiny, quantization)
    same(found, wanted(tiny, config)[1])
    assert kinds >= {"Int8Method" if quantization == "eff_int8" else "FP4Method"}


def test_a_folder_that_eff_quant_saved(tiny, tmp_path):
    model, expected = wanted(tiny, dataclasses.replace(INT8, threshold=3.0))
    model.save_pretrained(tmp_path)
    found, kinds = scores(tmp_path, None)
    same(found, expected)
    assert "StoredInt8Method" in kinds
