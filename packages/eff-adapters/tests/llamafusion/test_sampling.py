import pytest
import torch
from eff_adapters.llamafusion import (
    Context,
    add_noise,
    alphas_cumprod,
    ddim_step,
    generate,
    generate_image,
    picture_blocks,
    sampling_times,
)
from eff_adapters.llamafusion.masks import host_mask


def test_schedule_of_the_paper():
    abar = alphas_cumprod()
    assert abar.shape == (1000,)
    for step, wanted in ((250, 0.847012), (500, 0.493844), (750, 0.144272)):
        assert abs(float(abar[step - 1]) - wanted) < 2e-6
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon").alphas_cumprod
    torch.testing.assert_close(abar, theirs, rtol=2e-4, atol=1e-6)  # theirs is a product in float32


def test_noised_latents_keep_their_variance():
    g = torch.Generator().manual_seed(0)
    z0, eps = (torch.randn(1, 400_000, generator=g) for _ in range(2))
    for t in (10, 400, 900):
        assert float(add_noise(z0, eps, torch.tensor([t])).var()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("t", [0, 300, 700])
def test_right_noise_leads_back_in_one_step(t):
    z0, eps = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    times = torch.tensor([t, t])
    z = add_noise(z0, eps, times)
    torch.testing.assert_close(ddim_step(z, eps, times, torch.full_like(times, -1)), z0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_are_those_of_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=True, clip_sample_range=1.0, set_alpha_to_one=True
    )
    theirs.set_timesteps(10)
    z, eps, noise = (torch.randn(1, 2, 4, 4) for _ in range(3))
    t = int(theirs.timesteps[4])
    wanted = theirs.step(eps, t, z, eta=eta, variance_noise=noise, use_clipped_model_output=True).prev_sample
    now, then = torch.tensor([t]), torch.tensor([t - 100])
    found = ddim_step(z, eps, now, then, eta=eta, noise=noise, clip=1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_times():
    assert sampling_times(4).tolist() == [999, 749, 499, 249]
    assert sampling_times(1000).tolist() == list(range(999, -1, -1))
    with pytest.raises(ValueError, match="use 1 to 1000"):
        sampling_times(0)
    with pytest.raises(ValueError, match="needs noise"):
        ddim_step(*torch.randn(2, 1, 1), torch.tensor([3]), torch.tensor([2]), eta=1.0)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral"])
@torch.no_grad()
def test_drawing_with_a_cache_equals_reading_all_anew(tower, kind):
    mm = tower(kind)
    prompt = torch.tensor([[1, 5, 6, 7, 64]])
    context = Context(mm)
    context.read_text(prompt)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in context.cache.layers]
    modality = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1]])
    places = torch.arange(9)[None]

    def anew(z, t):
        read = mm.head.read(z, t)
        embeds = torch.cat([mm.embed(prompt), read.tokens], 1)
        mask = host_mask(mm.decoder.config, embeds, None, None, places, picture_blocks(modality))
        hidden = mm.run(embeds, modality, mask, places, None).last_hidden_state
        return mm.head.write(hidden[:, 5:], read.skips, t)

    z = torch.randn(1, 2, 4, 4)
    times = sampling_times(6).tolist()
    for now, then in zip(times, [*times[1:], -1], strict=True):
        t = torch.tensor([now])
        eps = context.predict(z, t)
        torch.testing.assert_close(eps, anew(z, t), rtol=1e-5, atol=1e-5)
        assert context.length == 5
        z = ddim_step(z, eps, t, torch.tensor([then]))
    for layer, (keys, values) in zip(context.cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    context.write_picture(z)
    assert context.length == 9


def test_without_guidance_one_forward_a_step(tower):
    mm, calls = tower(), []
    mm.decoder.register_forward_hook(lambda *a: calls.append(1))
    seed = torch.Generator().manual_seed
    prompt = torch.tensor([[1, 5, 6]])
    alone = generate_image(mm, prompt, num_steps=5, guidance_scale=1.0, generator=seed(3))
    assert len(calls) == 2 + 5
    calls.clear()
    guided = generate_image(mm, prompt, num_steps=5, guidance_scale=1 + 1e-7, generator=seed(3))
    assert len(calls) == 3 + 10
    torch.testing.assert_close(guided, alone, rtol=1e-4, atol=1e-4)
    strong = generate_image(mm, prompt, num_steps=5, guidance_scale=3.0, generator=seed(3))
    assert not torch.allclose(strong, alone, atol=1e-3)
    own = torch.tensor([1, 5, 6])  # the same prompt on both sides: guidance changes nothing
    same = generate_image(mm, prompt, num_steps=5, guidance_scale=3.0, unconditional=own, generator=seed(3))
    torch.testing.assert_close(same, alone, rtol=1e-3, atol=1e-3)


def test_prompts_of_several_lengths(tower):
    mm = tower()
    ids = torch.tensor([[0, 0, 1, 5], [1, 7, 8, 9]])
    mask = (ids != 0).long()
    # Clipped: a step from t = 999 makes rounding of the predicted noise twenty thousand times larger.
    both = generate_image(
        mm, ids, attention_mask=mask, num_steps=3, clip=2.0, generator=torch.Generator().manual_seed(0)
    )
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    context = Context(mm)
    context.read_text(torch.tensor([[1, 5]]))
    with torch.no_grad():
        context.read_text(torch.tensor([[64]]))
        empty = Context(mm)
        empty.read_text(torch.tensor([[64]]))
        z = noise[:1]
        for now, then in ((999, 666), (666, 332), (332, -1)):
            t = torch.tensor([now])
            c, u = context.predict(z, t), empty.predict(z, t)
            z = ddim_step(z, u + 1.55 * (c - u), t, torch.tensor([then]), clip=2.0)
    torch.testing.assert_close(both[:1], z, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="padded on the right"):
        generate_image(mm, ids.flip(1), attention_mask=mask.flip(1), num_steps=2)


def test_text_and_pictures_in_turn(tower):
    mm = tower()
    with torch.no_grad():
        mm.marker_out.zero_()
    plain = generate(mm, torch.tensor([1, 5]), max_new_tokens=4, allow_images=False)
    assert len(plain) == 1
    assert len(plain[0]) == 4
    hidden = Context(mm)
    with torch.no_grad():
        hidden.read_text(torch.tensor([[1, 5]]))
        mm.marker_out[0] = 100 * hidden.hidden[0, -1]  # now the marker is what comes first
    parts = generate(mm, torch.tensor([1, 5]), max_new_tokens=3, num_steps=2)
    assert parts[0].shape == (2, 4, 4)
    assert all(p.dim() == 3 or (p < 64).all() for p in parts)
    again = generate(mm, [torch.tensor([1, 5]), parts[0], torch.tensor([7])], max_new_tokens=2, allow_images=False)
    assert len(again[0]) == 2
    drawn = generate(
        mm, torch.tensor([1, 5]), max_new_tokens=3, do_sample=True, generator=torch.Generator().manual_seed(0),
        allow_images=False,
    )  # fmt: skip
    assert len(drawn[0]) == 3
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(mm, [], max_new_tokens=1)
    with pytest.raises(ValueError, match="temperature=0"):
        generate(mm, torch.tensor([1]), max_new_tokens=1, do_sample=True, temperature=0.0)


def test_a_picture_before_the_prompt_changes_the_drawing(tower):
    mm = tower()
    seed = torch.Generator().manual_seed
    one, other = torch.randn(2, 2, 4, 4)
    found = [
        generate_image(mm, [picture, torch.tensor([5, 6])], num_steps=2, generator=seed(0)) for picture in (one, other)
    ]
    assert not torch.allclose(*found, atol=1e-4)
    ddpm = generate_image(mm, torch.tensor([[1, 5]]), num_steps=4, eta=1.0, clip=1.0, generator=seed(0))
    assert ddpm.isfinite().all()
