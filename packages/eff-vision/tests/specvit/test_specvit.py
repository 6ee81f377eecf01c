import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eff_vision.specvit import (
    CyclicalLoraSchedule,
    HsiPatches,
    HsiScene,
    LolaSpecViT,
    LolaSpecViTConfig,
    LoraLinear,
    PCAReducer,
    hsi_split,
    load_hsi,
    oa_aa_kappa,
    predict_map,
    split_overlap,
)
from eff_vision.specvit.layers import BandDropout, SqueezeExcite, SwiGLU, WindowAttention, unwindow, windows

SMALL = {"stem": (2, 4, 8), "dims": (8, 16), "depths": (1, 1), "heads": (2, 4), "lora_rank": 2}


def config(**settings):
    return LolaSpecViTConfig(**{**SMALL, "num_classes": 5, "patch_size": 7, **settings})


@pytest.mark.parametrize(("patch", "bands"), [(7, 8), (9, 15), (11, 30), (15, 15)])
def test_shapes(patch, bands):
    model = LolaSpecViT(config(patch_size=patch, in_bands=bands))
    assert model(torch.randn(2, bands, patch, patch)).shape == (2, 5)


def test_the_published_network_has_the_published_number_of_weights():
    with torch.device("meta"):
        model = LolaSpecViT(LolaSpecViTConfig.published(9))
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert (sum(p.numel() for p in model.parameters()), adapters) == (254_639_541, 73_586_832)


def test_the_default_is_small():
    assert sum(p.numel() for p in LolaSpecViT(LolaSpecViTConfig(num_classes=16)).parameters()) < 2_500_000


@pytest.mark.parametrize("gate", [False, True])
def test_adapters_begin_as_the_identity_and_merge(gate):
    torch.manual_seed(0)
    with_, without = LolaSpecViT(config(lora_gate=gate)).eval(), LolaSpecViT(config(lora_rank=0)).eval()
    without.load_state_dict({k: v for k, v in with_.state_dict().items() if "lora_" not in k})
    x = torch.randn(3, 15, 7, 7)
    assert torch.equal(with_(x), without(x))
    for layer in with_.lora_layers():
        torch.nn.init.normal_(layer.lora_b, std=0.1)
        if gate:
            torch.nn.init.normal_(layer.lora_g)
    want = with_(x)
    assert not torch.allclose(want, without(x), atol=1e-3)
    assert with_.merge_adapters_() == len(with_.lora_layers())
    torch.testing.assert_close(with_(x), want, atol=1e-5, rtol=0)
    assert with_.merge_adapters_() == 0


def test_the_base_stays_frozen():
    model = LolaSpecViT(config()).train()
    model.freeze_base()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(5):
        loss = F.cross_entropy(model(torch.randn(4, 15, 7, 7)), torch.randint(5, (4,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        if name not in trained and "num_batches" not in name:
            assert torch.equal(value, before[name]), name
    assert any(not torch.equal(model.state_dict()[n], before[n]) for n in trained)
    kept = model.adapter_state_dict()
    assert trained <= set(kept)
    other = LolaSpecViT(config())
    other.load_state_dict({**before, **kept})
    model.eval()
    x = torch.randn(2, 15, 7, 7)
    assert torch.equal(other.eval()(x), model(x))
    with pytest.raises(ValueError, match="no adapters"):
        LolaSpecViT(config(lora_rank=0)).freeze_base()


@pytest.mark.parametrize(("height", "width"), [(7, 7), (4, 4), (5, 9), (10, 3)])
def test_windows_and_back(height, width):
    x = torch.randn(2, height, width, 3)
    cut, real, shape = windows(x, 4)
    assert torch.equal(unwindow(cut, 4, shape), x)
    assert int(real.sum()) == height * width


def brute(attention, x, size):
    out = torch.zeros_like(x)
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.heads, -1)).unbind(-3)
    span = 2 * attention.size - 1
    for b in range(len(x)):
        for i in range(x.size(1)):
            for j in range(x.size(2)):
                top, left = i // size * size, j // size * size
                near = [
                    (r, c)
                    for r in range(top, min(top + size, x.size(1)))
                    for c in range(left, min(left + size, x.size(2)))
                ]
                for h in range(attention.heads):
                    scores = torch.stack([
                        q[b, i, j, h] @ k[b, r, c, h] / q.size(-1) ** 0.5
                        + attention.bias[(i - r + attention.size - 1) * span + j - c + attention.size - 1, h]
                        for r, c in near
                    ])  # fmt: skip
                    mixed = (scores.softmax(0)[:, None] * torch.stack([v[b, r, c, h] for r, c in near])).sum(0)
                    d = mixed.numel()
                    out[b, i, j, h * d : (h + 1) * d] = mixed
    return attention.proj(out)


@pytest.mark.parametrize(("height", "width", "window"), [(6, 6, 3), (5, 4, 3), (2, 3, 7)])
def test_window_attention_by_loops(height, width, window):
    attention = WindowAttention(config(window_size=window), 8, 2)
    x = torch.randn(1, height, width, 8)
    with torch.no_grad():
        want = brute(attention, x, min(window, max(height, width)))
        torch.testing.assert_close(attention(x), want, atol=1e-5, rtol=0)


def test_parts():
    c = config()
    glu, x = SwiGLU(c, 8), torch.randn(3, 8)
    torch.testing.assert_close(glu(x), glu.w3(F.silu(glu.w1(x)) * glu.w2(x)))
    excite, maps = SqueezeExcite(8), torch.randn(2, 8, 3, 4, 4)
    factor = (excite(maps) / maps)[:, :, 0, 0, 0].detach()
    assert 0 < float(factor.min()) <= float(factor.max()) < 1
    torch.testing.assert_close(excite(maps), maps * factor[..., None, None, None])
    drop = BandDropout(0.3)
    ones = torch.ones(4000, 1, 1, 2, 2)
    assert float(drop.train()(ones).mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(ones), ones)


def test_schedule():
    model = LolaSpecViT(config())
    lora = [p for n, p in model.named_parameters() if "lora_" in n]
    rest = [p for n, p in model.named_parameters() if "lora_" not in n]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": lora, "lora": True}], lr=1e-3)
    schedule = CyclicalLoraSchedule(optimizer, model)
    rates = lambda: [g["lr"] for g in optimizer.param_groups]  # noqa: E731
    assert rates() == pytest.approx([1e-3, 1e-6 + (1e-3 - 1e-6) * 2])
    assert schedule.strength == 1.0
    schedule.step(5)
    assert rates()[1] == pytest.approx(1e-6 + (1e-3 - 1e-6))
    assert schedule.strength == pytest.approx(0.75)
    assert model.lora_layers()[0].strength == schedule.strength
    schedule.step(9.9999)
    assert schedule.strength == pytest.approx(0.5, abs=1e-4)
    assert [schedule.cycle(e)[1] for e in (0, 9.5, 10, 29, 30, 69, 70)] == [10, 10, 20, 20, 40, 40, 80]
    schedule.step(12)
    again = CyclicalLoraSchedule(torch.optim.AdamW([{"params": rest}, {"params": lora, "lora": True}], lr=1.0), model)
    again.load_state_dict(schedule.state_dict())
    assert [g["lr"] for g in again.optimizer.param_groups] == pytest.approx(rates())
    layer = LoraLinear(3, 3, rank=1, alpha=1.0)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 3)
    full = layer.eval()(x)
    layer.strength = 0.5
    assert torch.equal(layer(x), full)
    assert not torch.allclose(layer.train()(x), full)


def test_metrics_by_hand():
    target = torch.tensor([0] * 60 + [1] * 40)
    prediction = torch.tensor([0] * 50 + [1] * 10 + [0] * 5 + [1] * 35)
    scores = oa_aa_kappa(target, prediction, 3)
    assert (scores.oa, scores.aa, scores.kappa) == pytest.approx((0.85, 0.854167, 0.693878), abs=1e-6)
    assert bool(scores.per_class[2].isnan())


def scene(height=60, width=50, bands=12, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes + 1, (height // 5, width // 5)).repeat(5, 0).repeat(5, 1)
    spectra = rng.normal(size=(classes + 1, bands))
    cube = spectra[labels] + 0.3 * rng.normal(size=(height, width, bands))
    return HsiScene(cube.astype(np.float32), labels.astype(np.int64))


def test_patches():
    s = scene()
    mask = s.labels > 0
    patches = HsiPatches(s, mask, patch=5)
    padded = np.pad(s.cube, ((2, 2), (2, 2), (0, 0)))
    for index in (0, 7, len(patches) - 1):
        row, column = patches.places[index]
        patch, label = patches[index]
        assert label == s.labels[row, column] - 1
        assert torch.equal(patch[:, 2, 2], torch.from_numpy(s.cube[row, column]))
        assert torch.equal(patch, torch.from_numpy(padded[row : row + 5, column : column + 5]).movedim(-1, 0))
    corner = patches.cut(np.array([[0, 0]]))[0]
    assert float(corner[:, :2].abs().max()) == 0
    level = HsiPatches(s, mask, patch=5, standardize="patch").batch(torch.arange(4))
    assert float(level.flatten(2).mean(-1).abs().max()) < 1e-5


@pytest.mark.parametrize("seed", [0, 1])
def test_splits(seed):
    labels = scene(200, 200).labels
    for mode in ("random", "per_class", "block"):
        split = hsi_split(labels, mode=mode, train=0.3, val=0.1, block=29, guard=3, seed=seed)
        assert not (split.train & split.test).any()
        assert (split.train | split.val | split.test)[labels == 0].sum() == 0
        if mode == "block":
            assert split_overlap(split, 7) == 0
            assert 0.1 < split.train.sum() / (labels > 0).sum() < 0.5
        else:
            assert (split.train | split.val | split.test).sum() == (labels > 0).sum()
            assert (split_overlap(split, 7) > 0.9) == (mode == "random")
    few = hsi_split(labels, mode="per_class", per_class=9, seed=seed)
    assert np.unique(labels[few.train], return_counts=True)[1].tolist() == [9] * 4


def test_components():
    s = scene()
    mask = np.random.default_rng(0).random(s.labels.shape) < 0.4
    reducer = PCAReducer(5).fit(s.cube, mask)
    values = reducer.transform(s.cube)[mask]
    np.testing.assert_allclose(np.cov(values, rowvar=False), np.eye(5), atol=1e-4)
    assert 0.5 < reducer.explained < 1
    again = PCAReducer(5).fit(s.cube[:, ::-1].copy(), mask[:, ::-1])
    np.testing.assert_allclose(again.components, reducer.components, atol=1e-8)


def test_a_map_is_the_prediction_of_each_patch():
    s = scene(20, 15, bands=15)
    model = LolaSpecViT(config()).train()
    patches = HsiPatches(s, s.labels > 0, patch=7)
    found = predict_map(model, patches, batch_size=64)
    assert model.training
    model.eval()
    for row, column in np.random.default_rng(0).integers(0, (20, 15), (20, 2)):
        alone = model(patches.cut(np.array([[row, column]]))).argmax() + 1
        assert found[row, column] == alone


@pytest.mark.slow
def test_learning_a_scene_whose_parts_do_not_touch():
    torch.manual_seed(0)
    s = scene(90, 90, bands=15)
    split = hsi_split(s.labels, mode="block", train=0.4, block=15, guard=3, seed=1)
    reducer = PCAReducer(15).fit(s.cube, split.train)
    train, test = (HsiPatches(s, m, patch=7, reducer=reducer) for m in (split.train, split.test))
    model = LolaSpecViT(config(num_classes=4, drop_path=0.0, dropout=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(110):
        rows = torch.randint(len(train), (32,))
        loss = F.cross_entropy(model(train.batch(rows)), train.classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    some = torch.randperm(len(test))[:300]
    with torch.no_grad():
        scores = oa_aa_kappa(test.classes[some], model.eval()(test.batch(some)).argmax(1), 4)
    assert scores.oa > 0.6  # a quarter is chance


def test_files(tmp_path):
    s = scene(10, 10)
    np.savez(tmp_path / "a.npz", cube=s.cube, gt=s.labels)
    again = load_hsi(tmp_path / "a.npz")
    assert np.array_equal(again.cube, s.cube)
    assert np.array_equal(again.labels, s.labels)
    savemat = pytest.importorskip("scipy.io").savemat
    savemat(tmp_path / "b.mat", {"data": s.cube, "truth": s.labels})
    assert np.array_equal(load_hsi(tmp_path / "b.mat", label_key="truth").labels, s.labels)
    with pytest.raises(ValueError, match="called 'x'"):
        load_hsi(tmp_path / "a.npz", data_key="x")
    with pytest.raises(ValueError, match=r"neither \.npz nor \.mat"):
        load_hsi(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: config(patch_size=8), "patch_size must be odd"),
        (lambda: config(heads=(3, 4)), "3 heads do not divide a width of 8"),
        (lambda: config(lora_targets=("q",)), "are not among"),
        (lambda: LolaSpecViT(config())(torch.zeros(1, 14, 7, 7)), r"\[B, 15, 7, 7\]"),
        (lambda: PCAReducer(20).fit(scene().cube), "too few for 20 components"),
        (lambda: PCAReducer(2).fit(scene().cube).transform(np.zeros((1, 5), "f4")), "wanted 12 bands, got 5"),
        (lambda: hsi_split(scene().labels, train=1.0), "leave something to test"),
        (lambda: hsi_split(np.array([[1, 2], [0, 0]]), train=0.5, block=1), "have no training pixel"),
        (lambda: HsiPatches(scene(), np.ones((60, 50), bool)), "labelled pixels only"),
        (lambda: HsiPatches(scene(), scene().labels > 0, patch=4), "patch must be odd"),
        (lambda: HsiScene(np.full((2, 2, 3), np.nan, "f4"), np.zeros((2, 2), int)), "not finite"),
        (lambda: HsiScene(np.zeros((2, 2, 3), "f4"), np.zeros((2, 3), int)), "wanted a cube"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
