import math

import pytest
import torch
from eff_adapters.llamafusion import ModalityModule, ModalityTowerConfig, Routing, add_modality_tower
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral"])
@torch.no_grad()
def test_picture_weights_start_as_those_of_text(tiny, tower, kind):
    mm = tower(kind, stir=False)
    ids = torch.randint(1, 64, (2, 8))
    wanted = mm.decoder(ids).last_hidden_state
    places = torch.arange(8).expand(2, -1)
    found = mm.run(mm.embed(ids), torch.ones_like(ids), None, places, None).last_hidden_state
    assert torch.equal(found, wanted)


def test_llama_3_8b_has_as_many_picture_weights():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8,
            )
        )  # fmt: skip
    mm = add_modality_tower(model, ModalityTowerConfig(boi_token_id=128_254, eoi_token_id=128_255))
    layers = {n: p for n, p in mm.picture_parameters().items() if n.startswith("tower.layers.")}
    assert sum(p.numel() for p in layers.values()) == 6_979_584_000
    assert len(layers) == 32 * 9


@pytest.mark.parametrize(("separation", "modules"), [("deep", 15), ("shallow", 7), ("none", 0)])
def test_separation(tower, separation, modules):
    mm = tower(separation=separation, stir=False)
    assert len(mm.report.changed) == modules


def _gathered_or_both(monkeypatch, mm, data, given):
    out = mm(**data, **given)

    def both(self, x):
        from eff_adapters.llamafusion.routing import current

        routing = current.get()
        if routing is None:
            return self.text(x)
        chosen = torch.zeros(x.shape[0] * x.shape[1], dtype=torch.bool)
        chosen[routing.pictures] = True
        chosen = chosen.view(*x.shape[:2], *[1] * (x.dim() - 2))
        return torch.where(chosen, self.picture(x), self.text(x))

    monkeypatch.setattr(ModalityModule, "forward", both)
    return out, mm(**data, **given)


@pytest.mark.parametrize("rows", [(0, 1), (0,), (1,)], ids=["scattered", "one run", "a run at the start"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@torch.no_grad()
def test_gathered_execution_equals_running_both(monkeypatch, tower, batch, fixed, kind, rows):
    assert (Routing.of(batch(rows=rows)["modality_ids"]).run is None) == (len(rows) > 1)
    found, wanted = _gathered_or_both(monkeypatch, tower(kind), batch(rows=rows), fixed(len(rows)))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.noise_pred, wanted.noise_pred, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_gathered_execution_costs_one_tower(monkeypatch, tower, batch, fixed):
    mm, data = tower(), batch()

    def flops(call):
        with FlopCounterMode(display=False) as count:
            call()
        return sum(n for op, n in count.get_flop_counts()["Global"].items() if "mm" in str(op))

    def decoder_alone():
        blank = torch.randn(*data["input_ids"].shape, 32)
        mm.run(blank, data["modality_ids"], None, torch.arange(blank.shape[1])[None], None)

    routed = flops(decoder_alone)
    assert routed == flops(lambda: mm.decoder(data["input_ids"].clamp(max=63)))
    monkeypatch.setattr(ModalityModule, "forward", lambda self, x: self.text(x) + self.picture(x))
    assert flops(decoder_alone) == 2 * routed


def test_only_picture_weights_get_gradients(tower, batch):
    mm = tower()
    out = mm(**batch())
    out.loss.backward()
    assert all(p.grad is None for p in mm.text_parameters().values())
    assert {n for n, p in mm.picture_parameters().items() if p.grad is None} == set()
    assert [g["name"] for g in mm.param_groups()] == ["picture", "picture"]


@pytest.mark.parametrize(("row", "reaches"), [(0, False), (1, True)])
def test_language_trains_pictures_where_text_comes_later(tower, batch, fixed, row, reaches):
    mm, data = tower(), batch(rows=(row,))
    if row == 0:  # the token behind the picture is a target too; without it no text sees the picture
        data["labels"][:, 5:] = -100
    out = mm(**data, **fixed(1))
    out.lm_loss.backward()
    for name in ("k_proj", "v_proj"):
        grad = mm.decoder.layers[0].self_attn.get_submodule(name).picture.weight.grad
        assert (grad is not None and grad.abs().max() > 0) == reaches


def test_groups_with_trained_text(tower):
    mm = tower(text_lr_ratio=0.1, stir=False)
    groups = mm.param_groups(lr=1e-3, weight_decay=0.0)
    assert [g["name"] for g in groups] == ["picture", "picture", "text", "text"]
    assert groups[2]["lr"] == pytest.approx(1e-4)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in mm.parameters()}
    decays = {g["weight_decay"] for g in mm.param_groups() for p in g["params"] if p.dim() == 1}
    assert decays == {0.0}


def test_loss_is_language_plus_five_times_diffusion(tower, batch, fixed):
    out = tower()(**batch(), **fixed())
    assert torch.equal(out.loss, out.lm_loss + 5 * out.diffusion_loss)
    assert torch.equal(out.diffusion_loss, out.image_losses.mean())


@torch.no_grad()
def test_losses_by_hand(tower, batch, fixed):
    mm, data, given = tower(), batch(rows=(1,)), fixed(1)
    out = mm(**data, **given)
    ids, chances = data["input_ids"][0], out.logits[0].log_softmax(-1)
    first = 5  # of the text behind marker, picture, marker
    told = [-chances[i, ids[i + 1]] for i in range(first, len(ids) - 1)]
    assert data["modality_ids"][0].tolist() == [0, 1, 1, 1, 1, 0, *[0] * 6]
    torch.testing.assert_close(out.lm_loss, torch.stack(told).mean())
    error = (out.noise_pred - given["noise"]).square().mean()
    torch.testing.assert_close(out.diffusion_loss, error)


@torch.no_grad()
def test_padding_does_not_matter(tower, batch, fixed):
    mm, given = tower(), fixed()
    right, left = mm(**batch("right"), **given), mm(**batch("left"), **given)
    alone = [
        mm(**batch(rows=(i,)), timesteps=given["timesteps"][i : i + 1], noise=given["noise"][i : i + 1]) for i in (0, 1)
    ]
    for found in (right, left):
        torch.testing.assert_close(found.lm_losses, torch.stack([a.lm_losses[0] for a in alone]))
        torch.testing.assert_close(found.image_losses, torch.stack([a.image_losses[0] for a in alone]))


def test_drawn_times(tower, batch):
    mm, seen = tower(), []
    data = batch()
    data["image_first"] = None  # worked out from the rows
    mm.head.register_forward_hook(lambda *a: None)
    plain = mm.head.read
    mm.head.read = lambda z, t: (seen.append(t.clone()), plain(z, t))[1]
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(60):
            mm(**data, generator=g)
    times = torch.stack(seen)
    assert times[:, 0].max() > 900
    assert 450 < times[:, 1].max() <= 500
    assert times.min() >= 0
    clean = torch.tensor([True, False])
    with torch.no_grad():
        out = mm(**data, clean=clean, generator=g)
    assert seen[-1][0] == 0
    assert out.image_losses.shape == (1,)


@pytest.mark.parametrize("changes", [{"image_rank": 2}, {"separation": "shallow"}, {"text_lr_ratio": 0.1}])
def test_variants_learn(tower, batch, fixed, changes):
    mm = tower(stir=False, **changes)
    adam = torch.optim.AdamW(mm.param_groups(lr=1e-2))
    losses = []
    for _ in range(8):
        out = mm(**batch(), **fixed())
        losses.append(float(out.loss.detach()))
        out.loss.backward()
        adam.step()
        adam.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert math.isfinite(losses[-1])


def test_low_rank_stores_less(tower):
    full, low = tower(stir=False), tower(stir=False, image_rank=2)
    count = [sum(p.numel() for n, p in m.picture_parameters().items() if "_proj" in n) for m in (full, low)]
    per_layer = 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert count[1] == 2 * per_layer
    assert count[0] > 5 * count[1]


@torch.no_grad()
def test_unet_head(tower, batch, fixed):
    mm = tower(patchify="unet", unet_channels=(8, 16), stir=False)
    data, given = batch(), fixed()
    out = mm(**data, **given)
    assert out.noise_pred.shape == (2, 2, 4, 4)
    read = mm.head.read(data["latents"], given["timesteps"])
    assert read.tokens.shape == (2, 4, 32)
    assert not torch.equal(mm.head.read(data["latents"], given["timesteps"] + 1).tokens, read.tokens)
    assert not torch.equal(
        mm.head.write(read.tokens, read.skips, given["timesteps"]),
        mm.head.write(read.tokens, read.skips, given["timesteps"] + 1),
    )


def test_patches_and_back():
    from eff_adapters.llamafusion.heads import LinearHead

    config = ModalityTowerConfig(
        boi_token_id=1, eoi_token_id=2, patchify="linear", latent_channels=2, latent_size=6, tokens_per_image=9
    )
    head = LinearHead(config, 8)
    with torch.no_grad():
        for layer in (head.inward, head.outward, head.time.second):
            layer.bias.zero_()
        head.time.second.weight.zero_()
        head.place.zero_()
        head.inward.weight.copy_(torch.eye(8))
        head.outward.weight.copy_(torch.eye(8))
    z, t = torch.randn(3, 2, 6, 6), torch.tensor([0, 5, 9])
    tokens = head.read(z, t).tokens
    assert torch.equal(tokens[1, 4], z[1, :, 2:4, 2:4].flatten())  # the middle patch is the fifth
    assert torch.equal(head.write(tokens, (), t), z)
