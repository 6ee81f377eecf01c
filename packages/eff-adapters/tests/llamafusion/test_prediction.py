"""What a head predicts, tokens that are not drowned, partial towers, and losses against what was read once."""

import dataclasses

import pytest
import torch
from eff_adapters.llamafusion import Context, ModalityModule, add_modality_tower, generate_image, pack
from eff_adapters.llamafusion.schedule import add_noise, ddim_step, noise_of_velocity, velocity


def test_a_velocity_is_noise_and_picture_in_one():
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(4, 2, 3, 3, generator=g), torch.randn(4, 2, 3, 3, generator=g)
    t = torch.tensor([0, 250, 500, 980])
    z, v = add_noise(x, eps, t), velocity(x, eps, t)
    torch.testing.assert_close(noise_of_velocity(z, v, t), eps, rtol=1e-5, atol=1e-5)
    # From the right velocity one step gives the picture, even where next to nothing of it is left in z.
    clean = ddim_step(z, noise_of_velocity(z, v, t), t, torch.full_like(t, -1))
    torch.testing.assert_close(clean, x, rtol=1e-3, atol=1e-3)
    assert abs(float((v.square() + z.square()).mean() - (x.square() + eps.square()).mean())) < 1e-5


def test_the_loss_compares_velocities_and_the_noise_is_derived(tower, batch, fixed):
    mm, given, more = tower(prediction="velocity"), batch(), fixed()
    out = mm(**given, **more)
    noised = add_noise(given["latents"], more["noise"], more["timesteps"])
    wanted = velocity(given["latents"], more["noise"], more["timesteps"])
    share = add_noise(torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1), more["timesteps"])  # sqrt(1 - abar)
    written = (out.noise_pred - share * noised) / (1 - share**2).sqrt()
    torch.testing.assert_close((written - wanted).square().mean(), out.diffusion_loss, rtol=1e-4, atol=1e-4)
    assert torch.equal(out.loss, out.lm_loss + 5 * out.diffusion_loss)


def test_the_loss_compares_pictures_and_the_noise_is_derived(tower, batch, fixed):
    mm, given, more = tower(prediction="sample"), batch(), fixed()
    out = mm(**given, **more)
    t = more["timesteps"]
    noised = add_noise(given["latents"], more["noise"], t)
    written = ddim_step(noised, out.noise_pred, t, torch.full_like(t, -1))
    torch.testing.assert_close((written - given["latents"]).square().mean(), out.diffusion_loss, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"prediction": "velocity", "token_gain": 4.0}, {"patchify": "unet"}])
def test_losses_against_what_was_read_are_those_of_the_whole(tower, config, more):
    shape = {"unet_channels": (8, 8)} if "patchify" in more else {}
    mm = tower(**more, **shape)
    g = torch.Generator().manual_seed(3)
    texts, pictures = [torch.tensor([1, 5, 6, 7]), torch.tensor([1, 9])], torch.randn(2, 2, 4, 4, generator=g)
    given = pack(list(zip(texts, pictures, strict=True)), config(**more, **shape), padding_side="left")
    t, noise = torch.tensor([100, 900]), torch.randn(2, 2, 4, 4, generator=g)
    whole = mm(**given, timesteps=t, noise=noise)
    with torch.no_grad():
        context = Context(mm, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]))
        context.read_text(torch.tensor([[1, 5, 6, 7, 64], [0, 0, 1, 9, 64]]))
    found = context.denoising_loss(pictures, t, noise)
    torch.testing.assert_close(found, whole.image_losses, rtol=1e-4, atol=1e-4)
    turned = context.select(torch.tensor([1, 0, 1]))
    again = turned.denoising_loss(pictures[[1, 0, 1]], t[[1, 0, 1]], noise[[1, 0, 1]])
    torch.testing.assert_close(again, found[[1, 0, 1]], rtol=1e-4, atol=1e-4)
    assert context.length == turned.length == 5

    mm.zero_grad()
    whole.diffusion_loss.backward()
    wanted = {n: p.grad.clone() for n, p in mm.picture_parameters().items() if p.grad is not None}
    mm.zero_grad()
    found.mean().backward()
    for name, grad in wanted.items():
        if not name.startswith("marker_"):  # the opening marker was read without gradients
            torch.testing.assert_close(mm.picture_parameters()[name].grad, grad, rtol=1e-3, atol=1e-4)


def test_a_tower_that_begins_higher_up(tiny, config, tmp_path, copies):
    from eff_adapters.llamafusion import load_modality_tower, save_pretrained

    model = tiny()
    plain, ids = copies(model), torch.tensor([[1, 5, 6, 7]])
    mm = add_modality_tower(model, config(first_layer=1)).eval()
    routed = [n for n, m in mm.decoder.named_modules() if isinstance(m, ModalityModule)]
    assert routed
    assert all(n == "norm" or n.startswith("layers.1.") for n in routed)
    with torch.no_grad():
        for p in mm.picture_parameters().values():
            p.add_(0.1 * torch.randn_like(p))
    assert torch.equal(model(ids).logits, plain(ids).logits)
    save_pretrained(mm, tmp_path)
    again = load_modality_tower(copies(plain), tmp_path).eval()
    made = [generate_image(m, ids, num_steps=2, generator=torch.Generator().manual_seed(0)) for m in (mm, again)]
    assert torch.equal(*made)
    mm.remove()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    with pytest.raises(ValueError, match="first_layer=2; the model has 2 layers"):
        add_modality_tower(tiny(), config(first_layer=2))


@pytest.mark.parametrize("wrong", [{"first_layer": -1}, {"token_gain": 0.0}, {"token_gain": float("nan")}])
def test_wrong_numbers(config, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config(**wrong)


def test_gain_reaches_the_tokens(tower):
    mm = tower()
    z, t = torch.randn(1, 2, 4, 4), torch.tensor([5])
    head = type(mm.head)(dataclasses.replace(mm.config, token_gain=8.0), 32)
    head.load_state_dict(mm.head.state_dict())
    torch.testing.assert_close(head.read(z, t).tokens, 8 * mm.head.read(z, t).tokens)


def _learnt(mm, config, steps, lr):
    picture = torch.tensor([[1.0, -1, 1, -1], [-1, 1, -1, 1], [0.5, 0.5, -0.5, -0.5], [1, 1, 1, 1]]).expand(2, 4, 4)
    given = pack([[torch.tensor([1, 9]), picture]] * 16, config)
    adam, g, losses = torch.optim.Adam(mm.picture_parameters().values(), lr=lr), torch.Generator().manual_seed(0), []
    for _ in range(steps):
        t = ((torch.arange(16) + torch.rand(16, generator=g)) / 16 * 1000).long()
        loss = mm(**given, timesteps=t, generator=g).diffusion_loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    drawn = generate_image(mm.eval(), torch.tensor([[1, 9]]), num_steps=10, guidance_scale=1.0, clip=1.0, generator=g)
    return sum(losses[-10:]) / 10, float((drawn[0] - picture).abs().mean())


@pytest.mark.parametrize("head", [{}, {"patchify": "unet", "unet_channels": (8, 16)}], ids=["linear", "unet"])
def test_one_picture_is_learnt_by_heart(tiny, config, head):
    settings = config(prediction="velocity", **head)
    loss, error = _learnt(add_modality_tower(tiny(), settings), settings, 100, 5e-3)
    assert loss < 0.25  # of about 1
    assert error < 0.25  # of 1


@torch.no_grad()
def test_a_gain_keeps_tokens_from_being_drowned(tiny, config, fixed):
    """Layers that add the same large vector to each token, as trained ones do: how far two noises stay apart."""
    apart = {}
    for gain in (1.0, 30.0):
        model = tiny(mlp_bias=True)
        for layer in model.model.layers:
            layer.mlp.down_proj.bias.fill_(20.0)
        settings = config(token_gain=gain)
        mm, more = add_modality_tower(model, settings), fixed(1)
        given = pack([[torch.tensor([1, 9]), torch.zeros(2, 4, 4)]], settings)
        seen = []
        mm.head.write = lambda hidden, skips, t, seen=seen: seen.append(hidden) or torch.zeros(1, 2, 4, 4)
        for noise in (more["noise"], -more["noise"]):
            mm(**given, timesteps=torch.tensor([900]), noise=noise)
        apart[gain] = float((seen[0] - seen[1]).norm() / seen[0].norm())
    assert apart[30.0] > 3 * apart[1.0]
