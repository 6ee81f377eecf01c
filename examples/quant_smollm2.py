"""Quantise a language model in place, three formats: size, an answer, and how far the next token's odds moved.

uv run examples/quant_smollm2.py
"""

import copy

import torch
from eff_embedded import load_smollm2
from eff_quant import FP4Config, FP8Config, Int8Config, quantize_

model, tokenizer = load_smollm2()
question = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def size(module: torch.nn.Module) -> int:
    """Bytes of the decoder's weights (the embedding stays as it is)."""
    layers = module.model.layers
    return sum(t.nbytes for t in (*layers.parameters(), *layers.buffers()))


with torch.no_grad():
    before = model(**prompt).logits[0, -1].float().log_softmax(-1)
    print(f"{'as loaded':10} {size(model) / 2**20:4.0f} MiB")
    for config in (Int8Config(), FP8Config(), FP4Config()):
        small = copy.deepcopy(model)
        quantize_(small, config)
        after = small(**prompt).logits[0, -1].float().log_softmax(-1)
        moved = float((before.exp() * (before - after)).sum())
        ids = small.generate(**prompt, max_new_tokens=10, do_sample=False)
        answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{type(config).__name__:10} {size(small) / 2**20:4.0f} MiB, KL {moved:.4f}: {answer!r}")
