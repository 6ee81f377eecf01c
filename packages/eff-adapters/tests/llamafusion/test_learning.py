import pytest
import torch
from eff_adapters.llamafusion import add_modality_tower, pack


def _texts():
    return torch.stack([(torch.arange(12) * step) % 40 + 5 for step in (1, 3, 7, 9)])


def _taught(model):
    adam, texts = torch.optim.AdamW(model.parameters(), lr=3e-3), _texts()
    for _ in range(60):
        loss = model(texts, labels=texts).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
    return model


def _batch(config, generator):
    shades = torch.rand(16, generator=generator) * 2 - 1
    samples = []
    for i, shade in enumerate(shades.tolist()):
        picture = torch.full((2, 4, 4), shade)
        word = torch.tensor([1, 50 if shade > 0 else 51])
        samples.append([picture, word] if i % 5 == 0 else [word, picture])
    return pack(samples, config)


def _train(mm, steps=100):
    adam = torch.optim.AdamW(mm.param_groups(lr=3e-3), betas=(0.9, 0.95))
    g, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        out = mm(**_batch(mm.config, g), generator=g)
        losses.append(float(out.diffusion_loss.detach()))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(mm.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    return sum(losses[:3]) / 3, sum(losses[-10:]) / 10


@pytest.mark.slow
def test_pictures_are_learnt_and_texts_are_not_forgotten(tiny, config, copies):
    model, texts = _taught(tiny()), _texts()
    with torch.no_grad():
        before = model(texts, labels=texts).loss
    dense = copies(model)
    first, last = _train(add_modality_tower(model, config()))
    assert last < 0.6 * first
    with torch.no_grad():
        assert torch.equal(model(texts, labels=texts).loss, before)
    _train(add_modality_tower(dense, config(separation="none", text_lr_ratio=1.0)))
    with torch.no_grad():
        assert dense(texts, labels=texts).loss > 1.2 * before
