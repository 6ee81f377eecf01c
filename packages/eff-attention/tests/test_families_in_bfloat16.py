"""Methods that steer attention to pictures, in bfloat16: every family, padded, at once and by `generate`."""

import torch
from eff_attention.grounded_attention import PAIConfig, apply_paint
from eff_attention.head_reinforcement import VHRConfig, apply_vhr
from eff_attention.visual_sinks import VARConfig, apply_var

PROMPTS = [(1, 5, "P", 6, 7, 8), (1, "P", 9, 10, 11, 12, 13, 14)]
GREEDY = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
METHODS = {
    "VAR": lambda model: apply_var(model, VARConfig(dims=tuple(range(20)), tau=2.2, min_image_mass=0.0, rho=0.0)),
    "VHR": lambda model: apply_vhr(model, VHRConfig(layers=(1, 2, 3), alpha=1.5)),
    "PAI": lambda model: apply_paint(model, PAIConfig(alpha=1.0)),
}


@torch.no_grad()
def test_bfloat16(zoo, family):
    model, inputs = zoo(family).bfloat16(), zoo.ask(family, *PROMPTS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    real = inputs["attention_mask"].bool()
    plain = model(**inputs).logits
    for name, apply in METHODS.items():
        with apply(model):
            found = model(**inputs).logits
            written = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
        assert found.dtype == torch.bfloat16, name
        assert found[real].isfinite().all(), name
        assert not torch.equal(found[real], plain[real]), name
        first, last = written.logits[0].float(), found[:, -1].float()
        assert (first - last).norm() < 0.1 * last.norm(), name  # padding moves positions, and bfloat16 rounds them
        assert torch.equal(model(**inputs).logits, plain), name
