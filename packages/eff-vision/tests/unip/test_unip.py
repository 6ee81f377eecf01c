import threading

import pytest
import torch
from eff_vision.unip import (
    AttentionTap,
    GreyTriplicate,
    HADConfig,
    HybridAttentionDistillation,
    InfraredMix,
    LastLayerFPN,
    LayerProfile,
    StudentConfig,
    StudentViT,
    attention_distance,
    attention_entropy,
    attention_nmi,
    profile_attention,
    rehead_last_block,
    select_distill_layer,
    to_eight_bit,
)
from eff_vision.unip.distillation import attention_divergence, feature_distance, layer_decay


def window(sigma, side=14):
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack((y, x), -1).flatten(0, 1).double()
    weights = torch.exp(-(torch.cdist(place, place) ** 2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


def test_information_at_its_ends():
    nmi = lambda a: float(attention_nmi(a[None], prefix=0))  # noqa: E731
    assert nmi(torch.eye(50)) > 0.9999
    assert nmi(torch.full((50, 50), 0.02)) == pytest.approx(0, abs=1e-9)
    row = torch.rand(50)
    assert nmi((row / row.sum()).expand(50, 50)) == pytest.approx(0, abs=1e-9)
    one = torch.zeros(50, 50)
    one[:, 3] = 1  # all look at one place: no entropy, and no NaN
    assert nmi(one) == pytest.approx(0, abs=1e-3)
    assert nmi(torch.tensor([[0.75, 0.25], [0.25, 0.75]])) == pytest.approx(0.188722, abs=1e-6)


@pytest.mark.parametrize(("sigma", "nmi"), [(0.5, 0.763), (1, 0.499), (2, 0.275), (3, 0.160), (5, 0.051), (8, 0.011)])
def test_information_falls_with_the_width_of_a_window(sigma, nmi):
    a = window(sigma)
    assert float(attention_nmi(a[None], prefix=0)) == pytest.approx(nmi, abs=1.5e-3)
    order = torch.randperm(196)
    assert float(attention_nmi(a[order][:, order][None], prefix=0)) == pytest.approx(nmi, abs=1.5e-3)


def test_distance_and_entropy():
    eye = torch.eye(9)[None]
    assert float(attention_distance(eye, (3, 3), prefix=0)) == pytest.approx(0, abs=1e-5)
    assert float(attention_entropy(torch.full((1, 9, 9), 1 / 9), prefix=0)) == pytest.approx(2.1972, abs=1e-4)
    assert float(attention_distance(torch.full((1, 2, 2), 0.5), (1, 2), prefix=0)) == pytest.approx(0.5)
    wide = torch.eye(10)[None]
    torch.testing.assert_close(attention_nmi(wide, prefix=1), attention_nmi(eye, prefix=0))


def profile(values):
    zeros = (0.0,) * len(values)
    return LayerProfile(nmi=tuple(values), entropy=zeros, distance=zeros, num_pictures=1)


def test_choice_of_the_layer(tmp_path):
    p = profile([0.6, 0.4, 0.2, 0.1, 0.05])
    assert select_distill_layer(p) == 3
    assert select_distill_layer(profile([0.125, 0.0625]), 0.09375) == 1  # of equals the deeper
    assert select_distill_layer(profile([0.094, 0.42, 0.15, 0.119, 0.16])) == 3  # not what comes before the local ones
    assert p.pattern == ("local", "local", "hybrid", "hybrid", "hybrid")
    p.save(tmp_path / "p.json")
    assert LayerProfile.load(tmp_path / "p.json") == p


def make(depth=3, last_heads=4, dim=32, seed=0):
    torch.manual_seed(seed)
    sizes = {"dim": dim, "depth": depth, "num_heads": 2, "last_heads": last_heads, "patch_size": 8, "drop_path": 0.0}
    return StudentViT(StudentConfig(**sizes))


def eager_maps(model, pictures):
    maps = []
    x = model.patch_embed(pictures)
    from eff_vision.positions import sine_position

    x = x.flatten(2).mT + sine_position(*x.shape[-2:], model.config.dim)
    x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), 1)
    for block in model.blocks:
        a = block.attn
        q, k, _ = a.qkv(block.norm1(x)).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
        maps.append(q @ k.mT * q.size(-1) ** -0.5)
        x = block(x)
    return maps


def test_tapping_reads_the_logits_and_changes_nothing():
    model, pictures = make(), torch.rand(2, 3, 32, 24)
    plain = model(pictures)
    with AttentionTap(model, kind="logits") as tap:
        assert torch.equal(model(pictures), plain)
    for i, want in enumerate(eager_maps(model, pictures)):
        torch.testing.assert_close(tap[i], want, atol=1e-5, rtol=0)
    assert torch.equal(model(pictures), plain)


def test_a_tap_keeps_the_passes_of_its_own_thread_alone():
    model, pictures = make(), torch.rand(2, 1, 3, 32, 32)
    with torch.no_grad(), AttentionTap(model) as tap:
        model(pictures[0])
        kept = [tap[i].clone() for i in range(tap.num_layers)]
        other = threading.Thread(target=model, args=(pictures[1],))
        other.start()
        other.join()
        for i, mine in enumerate(kept):
            assert torch.equal(tap[i], mine)
        model(pictures[1])
        assert not torch.equal(tap[0], kept[0])  # and the next pass of its own takes their place


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "DINOv3ViT", "ViTMAE"])
def test_tapping_transformers_models(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{name}Config")(**sizes, intermediate_size=64)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()
    pictures = torch.rand(1, 3, 32, 32)
    with torch.no_grad(), AttentionTap(model, [0, -1]) as tap:
        torch.manual_seed(1)
        model(pixel_values=pictures)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        torch.manual_seed(1)  # the masked autoencoder shuffles
        want = model(pixel_values=pictures, output_attentions=True).attentions
    for layer in (0, 1):
        torch.testing.assert_close(tap[layer], want[layer], atol=1e-5, rtol=0)


def test_profile_of_a_model():
    model = make().train()
    batches = [torch.rand(2, 3, 32, 32), torch.rand(1, 3, 32, 32)]
    p = profile_attention(model, batches, grid=(4, 4))
    assert p.num_pictures == 3
    assert len(p.nmi) == 3
    assert model.training
    again = profile_attention(model, [torch.cat(batches)], grid=(4, 4))
    assert p.nmi == pytest.approx(again.nmi, abs=1e-6)
    with pytest.raises(ValueError, match="no pictures"):
        profile_attention(model, [], grid=(4, 4))


def test_divergence_by_loops():
    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for temperature in (1.0, 2.5):
        rows = []
        for b in range(2):
            for h in range(3):
                for i in range(4):
                    p, q = ((x[b, h, i] / temperature).softmax(0) for x in (t, s))
                    rows.append(sum(float(a * (a / c).log()) for a, c in zip(p, q, strict=True)))
        assert float(attention_divergence(s, t, temperature)) == pytest.approx(sum(rows) / len(rows), abs=1e-5)
    shifted = (t + torch.randn(2, 3, 4, 1)).requires_grad_()
    loss = attention_divergence(shifted, t)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert shifted.grad.abs().max().item() < 1e-7


def test_gradients_reach_queries_and_keys_and_all_before_them():
    teacher, student = make(depth=4, dim=32), make(depth=2, last_heads=4, dim=16, seed=1)
    had = HybridAttentionDistillation(teacher, student, HADConfig(layer=3)).train()
    assert not teacher.training
    had.loss(torch.rand(2, 3, 32, 32)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    last = student.blocks[-1]
    for module in (last.attn.proj, *last.mlp, last.norm2):
        for p in module.parameters():
            assert p.grad is None or float(p.grad.abs().max()) == 0
    value = last.attn.qkv.weight.grad[32:]
    assert float(value.abs().max()) == 0
    assert float(last.attn.qkv.weight.grad[:32].abs().max()) > 0
    assert all(float(p.grad.abs().max()) > 0 for p in student.blocks[0].parameters() if p.ndim > 1)
    assert float(student.patch_embed.weight.grad.abs().max()) > 0


def test_distillation_brings_attention_nearer():
    teacher, student = make(depth=3, dim=32), make(depth=2, last_heads=4, dim=16, seed=1)
    had = HybridAttentionDistillation(teacher, student, HADConfig(layer=2, include_cls=False))
    pictures = torch.rand(4, 3, 32, 32)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = had.loss(pictures)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_reheading_changes_the_split_alone():
    model = make(last_heads=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert rehead_last_block(model, 8) == 4
    assert model.blocks[-1].attn.num_heads == 8
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert StudentConfig().dim // StudentConfig().last_heads == 24
    with pytest.raises(ValueError, match="does not divide the width 32"):
        rehead_last_block(model, 5)


def test_pyramid():
    for grid in ((4, 4), (3, 5)):
        x = torch.randn(2, 8, *grid)
        fpn = LastLayerFPN(8).eval()
        levels = fpn(x)
        assert [tuple(v.shape[-2:]) for v in levels[:3]] == [
            (4 * grid[0], 4 * grid[1]),
            (2 * grid[0], 2 * grid[1]),
            grid,
        ]
        assert tuple(levels[3].shape[-2:]) == (-(-grid[0] // 2), -(-grid[1] // 2))
        assert all(torch.equal(a, b) for a, b in zip(levels, fpn([x] * 4), strict=True))


def test_pictures():
    picture = torch.rand(3, 5, 6)
    grey = GreyTriplicate()(picture)
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(GreyTriplicate()(grey), grey)
    assert torch.equal(GreyTriplicate()(grey[:1]), grey)
    assert GreyTriplicate(normalize=True)(torch.full((1, 2, 2), 0.3801)).abs().max() < 1e-6
    raw = torch.arange(0, 20000, 2).view(100, 100).short()
    eight = to_eight_bit(raw)
    assert (float(eight.min()), float(eight.max())) == (0, 1)
    mix = InfraredMix({"a": [torch.zeros(1, 2, 2)], "b": [torch.ones(3, 2, 2)]}, {"a": 0.25, "b": 0.75})
    g = torch.Generator().manual_seed(0)
    drawn = sum(float(mix.draw(g)[0, 0, 0]) for _ in range(400)) / 400
    assert drawn == pytest.approx(0.75, abs=0.08)


def test_small_pieces():
    assert layer_decay(4, 0.5) == [0.0625, 0.125, 0.25, 1.0]
    x = torch.randn(2, 5, 8)
    assert float(feature_distance(x, 3 * x + 1)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: make()(torch.zeros(1, 3, 30, 32)), ValueError, "not a multiple of the patch size"),
        (lambda: StudentConfig(dim=30, num_heads=4), ValueError, "num_heads=4 does not divide dim=30"),
        (lambda: AttentionTap(make(), [7]), IndexError, "range"),
        (lambda: AttentionTap(torch.nn.Linear(2, 2)), ValueError, "no attention"),
        (lambda: attention_nmi(torch.zeros(2, 3, 4)), ValueError, r"\[\.\.\., N, N\]"),
        (lambda: attention_distance(torch.eye(5)[None], (2, 2), prefix=0), ValueError, "does not hold 5 patches"),
        (lambda: attention_divergence(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3)), ValueError, "number of heads"),
        (lambda: GreyTriplicate()(torch.zeros(2, 4, 4)), ValueError, "1 or 3"),
        (lambda: to_eight_bit(torch.full((2, 2), float("nan"))), ValueError, "finite"),
        (lambda: InfraredMix({"a": []}), ValueError, "at least one picture"),
        (lambda: LastLayerFPN(4)([torch.zeros(1, 4, 2, 2)] * 3), ValueError, "one map or four"),
        (lambda: rehead_last_block(torch.nn.Linear(2, 2), 2), TypeError, "has no blocks"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()
