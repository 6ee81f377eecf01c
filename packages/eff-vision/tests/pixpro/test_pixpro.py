import copy
import math

import pytest
import torch
from eff_vision.pixpro import (
    LARS,
    ByolAugment,
    CnnCells,
    FeaturePyramid,
    MomentumCopy,
    PixelPropagation,
    PixPro,
    PixProConfig,
    PyramidCells,
    VitCells,
    cell_centres,
    export_backbone,
    momentum_at,
    pixcontrast_loss,
    pixpro_loss,
    positive_mask,
    random_flip,
    random_resized_crop,
)
from torch import nn

WHOLE = torch.tensor([[0.0, 0, 1, 1]])


def crops(*edges):
    return torch.tensor([edges], dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "b", "threshold", "pairs"),
    [
        (WHOLE, WHOLE, 0.7, 49),
        (WHOLE, WHOLE, 0.75, 217),
        (WHOLE, crops(1, 0, 0, 1), 0.7, 49),
        (crops(0, 0, 0.4, 0.4), crops(0.6, 0.6, 1, 1), 0.7, 0),
        (WHOLE, crops(0, 0, 0.5, 0.5), 0.7, 133),
        (crops(0, 0, 0.5, 0.5), crops(0.25, 0.25, 0.75, 0.75), 0.7, 49),
    ],
)
def test_positive_pairs(a, b, threshold, pairs):
    mask = positive_mask(a, b, (7, 7), threshold=threshold)
    assert int(mask.sum()) == pairs
    assert torch.equal(mask, positive_mask(b, a, (7, 7), threshold=threshold).mT)


def test_which_cells_are_positives():
    assert torch.equal(positive_mask(WHOLE, WHOLE, (7, 7))[0], torch.eye(49, dtype=torch.bool))
    flipped = positive_mask(WHOLE, crops(1, 0, 0, 1), (7, 7))[0]
    mirror = torch.arange(49).view(7, 7).flip(1).flatten()
    assert torch.equal(flipped, torch.eye(49, dtype=torch.bool)[mirror])
    quarter = positive_mask(WHOLE, crops(0, 0, 0.5, 0.5), (7, 7))[0]
    assert int(quarter.any(1).sum()) == 16
    shifted = positive_mask(crops(0, 0, 0.5, 0.5), crops(0.25, 0.25, 0.75, 0.75), (7, 7))[0]
    assert int(shifted.any(1).sum()) == 16


def test_a_cell_shows_the_same_place_in_both_crops():
    y, x = torch.meshgrid(torch.arange(90.0) + 0.5, torch.arange(120.0) + 0.5, indexing="ij")
    picture = torch.stack((x / 120, y / 90))  # a colour that says where it is
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        view, crop = random_resized_crop(picture, 32, g)
        view, crop = random_flip(view, crop, g)
        centres, _ = cell_centres(crop[None], (32, 32))
        assert float((view.flatten(1).T - centres[0]).abs().mean()) < 1e-2


def test_agreement_is_minus_four_and_scale_does_not_matter():
    x = torch.randn(2, 49, 8)
    mask = positive_mask(WHOLE, WHOLE, (7, 7)).expand(2, -1, -1)
    assert float(2 * pixpro_loss(3 * x, 0.2 * x, mask)) == pytest.approx(-4, abs=1e-4)
    none = torch.zeros(2, 49, 49, dtype=torch.bool)
    assert float(pixpro_loss(x, x, none)) == 0
    assert float(pixcontrast_loss(x, x, none)) == 0


def test_pixcontrast_by_loops():
    a, b = torch.randn(1, 5, 4), torch.randn(1, 6, 4)
    mask = torch.rand(1, 5, 6) < 0.3
    mask[0, 2] = False
    ua, ub = (torch.nn.functional.normalize(x[0], dim=1) for x in (a, b))
    rows = []
    for i in range(5):
        e = [math.exp(float(ua[i] @ ub[j]) / 0.3) for j in range(6)]
        if bool(mask[0, i].any()):
            rows.append(-math.log(sum(x for x, m in zip(e, mask[0, i].tolist(), strict=True) if m) / sum(e)))
    assert float(pixcontrast_loss(a, b, mask)) == pytest.approx(sum(rows) / len(rows), abs=1e-5)
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    assert float(pixcontrast_loss(a[:, :1], b[:, :1], one)) == pytest.approx(0, abs=1e-6)


def test_propagation():
    cells = torch.eye(4).view(1, 4, 2, 2)
    torch.testing.assert_close(PixelPropagation(4, layers=0)(cells), cells)
    pair = torch.tensor([[1.0, 0.5], [0.0, math.sqrt(3) / 2]]).view(1, 2, 1, 2)
    y = PixelPropagation(2, layers=0)(pair)[0, :, 0, 0]
    assert y.tolist() == pytest.approx([1.125, 0.2165], abs=1e-4)
    assert float(torch.nn.functional.cosine_similarity(y, torch.tensor([1.0, 0]), dim=0)) == pytest.approx(
        0.98198, abs=1e-5
    )
    x = torch.randn(2, 6, 3, 3)
    order = torch.randperm(9)
    opposite = torch.tensor([[[[1.0, -1.0]], [[0.0, 0.0]]]])  # such cells say nothing to each other
    torch.testing.assert_close(PixelPropagation(2, layers=0)(opposite), opposite)
    module = PixelPropagation(6, layers=2).eval()
    shuffled = module(x.flatten(2)[..., order].view_as(x)).flatten(2)
    torch.testing.assert_close(shuffled, module(x).flatten(2)[..., order], atol=1e-5, rtol=0)
    sharp = PixelPropagation(6, gamma=200.0, layers=0)(x)
    torch.testing.assert_close(sharp, torch.nn.functional.normalize(x, dim=1), atol=1e-4, rtol=0)
    same = torch.randn(1, 6, 1, 1).expand(1, 6, 3, 3)
    assert float(torch.nn.functional.cosine_similarity(PixelPropagation(6, layers=0)(same), same).min()) > 0.9999


def test_momentum():
    assert [momentum_at(k, 10) for k in (0, 5, 10, 11)] == pytest.approx([0.99, 0.995, 1.0, 1.0])
    source = nn.Linear(2, 2)
    follower = MomentumCopy(source, total_steps=4, momentum=0.9)
    before = follower.copy.weight.clone()
    with torch.no_grad():
        source.weight.add_(1.0)
    assert follower.step(source) == pytest.approx(0.9)
    torch.testing.assert_close(follower.copy.weight, 0.9 * before + 0.1 * source.weight.detach())
    restored = MomentumCopy(nn.Linear(2, 2), total_steps=4, momentum=0.9)
    restored.load_state_dict(follower.state_dict())
    assert int(restored.steps) == 1


def tiny_cnn():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1))
    return CnnCells(nn.Sequential(*layers), 12)


@pytest.mark.parametrize("loss", ["pixpro", "pixcontrast"])
def test_a_training_step(loss):
    config = PixProConfig(loss=loss, dim=8, hidden=16, instance_weight=0.5)
    model = PixPro(tiny_cnn(), config, total_steps=10)
    views = torch.rand(2, 4, 3, 16, 16)
    edges = (
        torch.tensor([[0.0, 0, 0.6, 0.6]] * 3 + [[0, 0, 0.1, 0.1]]),
        torch.tensor([[0.8, 0.1, 0.2, 0.7]] * 3 + [[0.5, 0.5, 1, 1]]),
    )
    optimizer = LARS(model.parameters(), lr=0.1)
    model.update_momentum()
    before = copy.deepcopy(model.target.state_dict())
    out = model(*views, *edges)
    out.loss.backward()
    assert not list(model.target.parameters())
    assert float(model.encoder.backbone[0].weight.grad.abs().sum()) > 0
    assert float(out.empty_pairs) == 0.25
    assert 0 < float(out.spread) < 1
    torch.testing.assert_close(out.loss, out.pixel + 0.5 * out.instance)
    optimizer.step()
    moved = {name: model.target.copy.get_buffer(name) for name, _ in model.online.named_parameters()}
    assert all(torch.equal(before[f"copy.{k}"], v) for k, v in moved.items())  # it moves in update_momentum alone
    model.update_momentum()
    assert any(not torch.equal(before[f"copy.{k}"], v) for k, v in moved.items())


@pytest.mark.parametrize("loss", ["pixpro", "pixcontrast"])
def test_a_pyramid_has_the_mean_of_its_levels(loss):
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)

        def forward(self, x):
            fine = self.first(x)
            return [fine, self.second(fine)]

    torch.manual_seed(0)
    config = PixProConfig(loss=loss, dim=8, hidden=16, instance_weight=0.5)
    encoder = PyramidCells(Maps(), FeaturePyramid((6, 8), 5, tower=1))
    model = PixPro(encoder, config, total_steps=10).eval()
    views = torch.rand(2, 4, 3, 16, 16)
    edges = torch.tensor([[0.0, 0, 0.6, 0.6]] * 4), torch.tensor([[0.8, 0.1, 0.2, 0.7]] * 4)
    out = model(*views, *edges)
    out.loss.backward()
    each = []
    for level in (0, 1):
        one = PixPro(encoder, config, total_steps=10).eval()
        one.load_state_dict(model.state_dict())
        hooks = [
            side.register_forward_hook(lambda module, args, maps, level=level: [maps[level]])
            for side in (one.online[0], one.target.copy[0])
        ]
        each.append(float(one(*views, *edges).pixel.detach()))
        for hook in hooks:
            hook.remove()
    assert float(out.pixel.detach()) == pytest.approx(sum(each) / 2, abs=1e-5)
    assert abs(each[0] - each[1]) > 1e-4
    assert all(p.grad is not None for p in encoder.pyramid.parameters())


def test_the_backbone_travels(tmp_path):
    from safetensors.torch import load_file

    encoder = tiny_cnn()
    export_backbone(encoder, tmp_path / "b.safetensors")
    other = tiny_cnn().backbone
    other[0].weight.data.zero_()
    other.load_state_dict(load_file(tmp_path / "b.safetensors"))
    assert torch.equal(other[0].weight, encoder.backbone[0].weight)


def test_vision_transformers_have_cells():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    vit = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    pictures = torch.rand(2, 3, 32, 24)
    cells = VitCells(vit, 16, 8)(pictures)
    assert cells.shape == (2, 16, 4, 3)
    tokens = vit(pixel_values=pictures).last_hidden_state
    torch.testing.assert_close(cells[:, :, 1, 2], tokens[:, 1 + 3 + 2])


def test_pyramid():
    maps = [torch.randn(1, c, s, s) for c, s in ((4, 9), (8, 5), (16, 3))]
    pyramid = FeaturePyramid([4, 8, 16], dim=6, tower=2)
    assert [tuple(p.shape) for p in pyramid(maps)] == [(1, 6, 9, 9), (1, 6, 5, 5), (1, 6, 3, 3)]
    with pytest.raises(ValueError, match="3 maps"):
        pyramid(maps[:2])


def test_lars():
    p, b = nn.Parameter(torch.full((2, 2), 2.0)), nn.Parameter(torch.ones(3))
    p.grad, b.grad = torch.full((2, 2), 0.5), torch.full((3,), 0.25)
    LARS([p, b], lr=0.1, weight_decay=0.1, trust=0.01).step()
    gradient = 0.5 + 0.1 * 2
    step = 0.1 * gradient * (0.01 * 4 / (2 * gradient + 1e-8))
    torch.testing.assert_close(p.data, torch.full((2, 2), 2 - step))
    torch.testing.assert_close(b.data, torch.full((3,), 1 - 0.1 * 0.25))  # neither scaled nor decayed
    p.grad = torch.zeros(2, 2)
    before = p.data.clone()
    LARS([p], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(p.data, before)


def test_augmentations_stay_in_range_and_repeat():
    picture = torch.rand(3, 24, 24)
    augment = ByolAugment(blur=0.5, solarize=0.5)
    for seed in range(10):
        a, b = (augment(picture, torch.Generator().manual_seed(seed)) for _ in range(2))
        assert torch.equal(a, b)
        assert 0 <= float(a.min()) <= float(a.max()) <= 1 + 1e-6
    crop = torch.tensor([0.1, 0.2, 0.5, 0.6])
    flipped, edges = random_flip(picture, crop, torch.Generator(), p=1.0)
    assert torch.equal(flipped, picture.flip(-1))
    assert torch.equal(edges, torch.tensor([0.5, 0.2, 0.1, 0.6]))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: positive_mask(torch.zeros(4), WHOLE, (7, 7)), r"crops must be \[B, 4\]"),
        (lambda: positive_mask(torch.zeros(1, 4), WHOLE, (7, 7)), "empty"),
        (lambda: PixelPropagation(4, gamma=0.0), "gamma must be positive"),
        (lambda: PixProConfig(momentum=1.5), "momentum must be from 0 to 1, got 1.5"),
        (lambda: MomentumCopy(nn.Identity(), 0), "total_steps"),
        (lambda: pixpro_loss(torch.zeros(1, 4, 2), torch.zeros(1, 5, 2), torch.zeros(1, 4, 4)), "mask"),
        (lambda: tiny_cnn().__class__(nn.Identity(), 5)(torch.zeros(1, 3, 4, 4)), r"\[B, 5, H, W\]"),
        (lambda: random_resized_crop(torch.zeros(8, 8), 4, torch.Generator()), r"\[C, H, W\]"),
        (lambda: ByolAugment(blur=2.0), "probability"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
