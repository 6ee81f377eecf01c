"""Steer where a vision-language model looks, and take the change back bit for bit.

uv run --extra pictures examples/attention_steer_eyes.py
"""

import torch
from eff_attention.grounded_attention import PAIConfig, apply_paint
from eff_embedded import collages, load_smollm2_eyes

model, processor = load_smollm2_eyes()
collage = collages.sample(7)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=[collage.picture], text=text, return_tensors="pt")


def describe() -> str:
    """Greedy answer."""
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


print("in the picture:", ", ".join(collage.names))
with torch.no_grad():
    before = model(**inputs).logits
    print("as it is:      ", describe())
    with apply_paint(model, PAIConfig(alpha=0.5)):
        print("steered:       ", describe())
    assert torch.equal(model(**inputs).logits, before)
