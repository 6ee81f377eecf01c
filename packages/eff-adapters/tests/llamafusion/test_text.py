"""What is promised to text: bit-identity, and no influence from later tokens."""

import pytest
import torch

KINDS = ("Llama", "Mistral", "Qwen3", "Qwen2", "Phi3")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_is_bit_identical_before_and_after_training(tiny, tower, batch, copies, kind, attention):
    model = tiny(kind, attn_implementation=attention)
    base = copies(model)
    mm = tower(model=model)
    ids = torch.randint(1, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        wanted, behind = base(ids).logits, base(ids, attention_mask=mask).logits
    adam = torch.optim.AdamW(mm.param_groups(lr=1e-2), betas=(0.9, 0.95))
    for step in range(3):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, wanted)
            assert torch.equal(mm(ids).logits, wanted)
            assert torch.equal(model(ids, attention_mask=mask).logits, behind)
        mm(**batch(), generator=torch.Generator().manual_seed(step)).loss.backward()
        adam.step()
        adam.zero_grad()
    for name, value in mm.text_parameters().items():
        assert torch.equal(value, base.get_parameter(name)), name
    greedy = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **greedy), base.generate(ids, **greedy))


def test_padded_text_is_read_as_it_is_alone(tiny, tower, copies):
    model = tiny("Llama")
    base, mm = copies(model), tower(model=model)
    ids = torch.randint(1, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        found, alone = mm(ids, attention_mask=mask).logits, base(ids[1:, 3:]).logits
    torch.testing.assert_close(found[1:, 3:], alone)
    assert not torch.allclose(mm(ids).logits[1:, 3:], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_remove_gives_the_model_back(tiny, tower, kind):
    model = tiny(kind)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    mm = tower(model=model)
    mm.remove()
    mm.remove()
    assert [type(m) for m in model.modules()] == classes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[n], v) for n, v in state.items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_remove_takes_back_what_training_did_to_text(tiny, tower, batch):
    model = tiny()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    mm = tower(model=model, text_lr_ratio=0.1, stir=False)
    adam = torch.optim.AdamW(mm.param_groups(lr=1e-2))
    mm(**batch()).loss.backward()
    adam.step()
    assert any(not torch.equal(p, before[n]) for n, p in mm.text_parameters().items())
    mm.remove()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_text_before_a_picture_is_read_as_the_plain_model_reads_it(tiny, tower, copies):
    from eff_adapters.llamafusion import Context

    base = tiny()
    mm = tower(model=copies(base))
    ids = torch.randint(1, 64, (2, 7))
    context = Context(mm)
    found = context.read_text(ids)[:, :64]
    with torch.no_grad():
        out = base(ids, use_cache=True)
    assert torch.equal(found, out.logits[:, -1])
    context.read_picture(torch.randn(2, 2, 4, 4))
    for mine, theirs in zip(context.cache.layers, out.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys[:, :, :7], theirs.keys)
        assert torch.equal(mine.values[:, :, :7], theirs.values)


def test_generated_text_is_the_plain_models_until_a_picture_opens(tiny, tower, copies):
    from eff_adapters.llamafusion import generate

    base = tiny()
    mm = tower(model=copies(base), boi_token_id=70, eoi_token_id=71)
    with torch.no_grad():
        mm.marker_out.zero_()
    prompt = torch.tensor([[1, 5, 6]])
    wanted = base.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)[0, 3:]
    (found,) = generate(mm, prompt, max_new_tokens=8, allow_images=False)
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_later_tokens_never_reach_earlier_text(tower, batch, fixed):
    mm = tower()
    data, given = batch(rows=(2,)), fixed(2)
    is_text = data["modality_ids"][0] == 0
    plain = mm(**data, **given)
    second = int(torch.nonzero(~is_text).flatten()[4])  # first token of the second picture
    data["latents"] = data["latents"].clone()
    data["latents"][1, 0, 0, 0] += 5
    found = mm(**data, **given)
    assert torch.equal(found.logits[0, :second], plain.logits[0, :second])
    assert not torch.equal(found.logits[0, second + 4], plain.logits[0, second + 4])
    assert torch.equal(found.noise_pred[0], plain.noise_pred[0])
    data["input_ids"] = data["input_ids"].clone()
    data["input_ids"][0, -1] = 33
    last = mm(**data, **given)
    assert torch.equal(last.logits[0, :-1], found.logits[0, :-1])
    assert torch.equal(last.noise_pred, found.noise_pred)
    first = mm.model(data["input_ids"][:, :2]).logits
    torch.testing.assert_close(plain.logits[:, :2, :64], first, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_changed_patch_reaches_all_of_its_picture(tower):
    from eff_adapters.llamafusion import Context

    mm = tower()
    context = Context(mm)
    context.read_text(torch.tensor([[1, 64]]))
    t, z = torch.tensor([300]), torch.randn(1, 2, 4, 4)
    plain = context.predict(z, t)
    z[:, :, 2:, 2:] += 1  # the last patch
    changed = (context.predict(z, t) - plain).abs().amax(1)[0]
    assert (changed > 0).all()
