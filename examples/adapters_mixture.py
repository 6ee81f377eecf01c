"""Three LoRA adapters in one model, chosen token by token, saved and taken off again.

uv run examples/adapters_mixture.py
"""

import tempfile

import torch
from eff_adapters.lora_mixer import FreshExpert, LoraMixerConfig, apply_lora_mixer
from eff_embedded import load_smollm2

torch.manual_seed(0)
model, tokenizer = load_smollm2()
inputs = tokenizer(["2 + 2 =", "The opposite of hot is"], return_tensors="pt", padding=True)
with torch.no_grad():
    before = model(**inputs).logits

# Experts are usually folders that PEFT wrote; fresh ones start without effect, to be trained here.
experts = {name: FreshExpert(rank=8) for name in ("sums", "words", "names")}
mixer = apply_lora_mixer(model, LoraMixerConfig(top_k=2), experts=experts)
mixer.set_mode("soft")
with mixer.route(domain_ids=["sums", "words"]):  # what each row is about; in training only
    loss = model(**inputs, labels=inputs["input_ids"]).loss + mixer.losses().total
loss.backward()
trained = [p for p in model.parameters() if p.grad is not None]
print(f"loss {loss.item():.3f}; gradients in {len(trained)} tensors, {sum(p.numel() for p in trained):,} numbers")

with tempfile.TemporaryDirectory() as folder:
    mixer.save_pretrained(folder)
mixer.remove()
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, before)
