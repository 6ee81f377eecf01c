"""One head that was made to depend on the picture is found alone, and what is done to it is its output doubled."""

import pytest
import torch
from eff_attention.head_reinforcement import VHRConfig, apply_vhr, chosen_heads, head_outputs
from eff_kernels.edit.attention import decoder_attention, intercept_attention


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@torch.no_grad()
@pytest.mark.parametrize("head", [2, 7])
def test_the_head_that_depends_on_the_picture_is_found_alone(zoo, head):
    """In layer 1 all heads give zeros but one, which gives the mean of all values so far, pictures' included."""
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, 5, "P", 6, 7), (2, "P", 8))

    def planted(factor):
        def rule(call, attend):
            out = torch.zeros_like(attend(call).out)
            seen = call.v[:, head // 4].cumsum(1) / torch.arange(1, call.num_keys + 1)[:, None]
            out[:, head] = factor * seen[:, -call.num_queries :]
            return out

        return intercept_attention(model, rule, where=decoder_attention(model)[1], order=2.0)

    with planted(2.0):
        wanted = model(**inputs).logits
    with planted(1.0):
        before = model(**inputs).logits
        with apply_vhr(model, VHRConfig(layers=(1,), alpha=2.0, outlier_filter=False), order=1.0):
            out = model(**inputs, use_cache=True)
    found = chosen_heads(out.past_key_values, order=1.0)[1]
    assert found.nonzero()[:, 1].tolist() == [head, head]
    assert (out.logits - wanted).norm() < 1e-6 * wanted.norm()
    assert (before - wanted).norm() > 1e-3 * wanted.norm()


@torch.no_grad()
def test_leaving_a_picture_out_is_masking_it_and_counting_positions_anew(zoo):
    model, inputs = zoo("Llava"), zoo.ask("Llava", (1, 5, "P", 6, 7, 8))
    bare = zoo.ask("Llava", (1, 5, 6, 7, 8))
    kept = (inputs["input_ids"] != zoo.image).long()
    masked = {**inputs, "attention_mask": kept}
    counted = {**masked, "position_ids": (kept.cumsum(-1) - 1).clamp(min=0)}
    there, same, other = (head_outputs(model, given) for given in (bare, counted, masked))
    for layer in range(4):
        torch.testing.assert_close(same[layer], there[layer], atol=1e-4, rtol=0)
    assert max(float((other[n] - there[n]).abs().max()) for n in range(4)) > 1e-2
