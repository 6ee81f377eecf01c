import copy
import dataclasses
import pickle

import pytest
import torch
from eff_vision.amodal import (
    AmodalLossConfig,
    AmodalMeter,
    AmodalOutput,
    BEVConfig,
    BEVLift,
    EoRaS,
    EoRaSConfig,
    FeaturePyramid,
    MaskDecoder,
    adapt_intrinsics_to_crop,
    amodal_loss,
    crop_frames,
    focal_loss,
    kubric_intrinsics,
    paste_masks,
    predict_track,
    tilt_towards_origin,
    visible_box_track,
)
from eff_vision.amodal.lift import sample_within
from eff_vision.geometry import intrinsics_from_fov, project
from torch import nn
from torch.nn import functional as F

BEV = BEVConfig(width=(-4.0, 4.0), height=(-1.5, 1.5), depth=(0.0, 8.0), cells=(8, 3, 8))
TINY = EoRaSConfig(d_model=16, heads=2, layers=1, feedforward=32, slots=3, features=16, crop=32, bev=BEV)
K = intrinsics_from_fov(1.2, 32, 32)


def make(config=TINY, seed=0):
    torch.manual_seed(seed)
    return EoRaS(config).eval()


def clip(batch=1, frames=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 3, 32, 32, generator=draw), K.expand(batch, frames, 3, 3)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_sizes_of_the_decoder(n):
    assert MaskDecoder(4, 4)(torch.randn(1, 4, n, n)).shape == (1, 1, 8 * (n - 1) + 1, 8 * (n - 1) + 1)
    assert EoRaSConfig().mask == 121


class TestLift:
    lift = BEVLift(2, BEV)

    def test_constant_features_fill_what_the_camera_sees(self):
        volume = self.lift.volume(torch.full((1, 2, 4, 4), 3.0), K[None], 32)
        points = self.lift.centres.flatten(0, 2)
        pixels, _ = project(points, K)
        seen = ((pixels >= 0) & (pixels <= 32)).all(-1)
        assert 0 < seen.sum() < len(seen)
        torch.testing.assert_close(volume[0, 0].flatten(), 3.0 * seen)

    def test_cells_on_the_axis_see_the_middle(self):
        config = BEVConfig(width=(-2.0, 2.0), height=(-0.5, 0.5), depth=(0.0, 8.0), cells=(4, 1, 4))
        lift = BEVLift(1, config)
        lift.centres[..., :2] = 0
        features = torch.randn(1, 1, 4, 4)
        middle = features[0, 0, 1:3, 1:3].mean()
        torch.testing.assert_close(lift.volume(features, K[None], 32)[0, 0], middle.expand(4, 1, 4))

    def test_what_exporters_see_gives_the_same_values(self, monkeypatch):
        g = torch.Generator().manual_seed(0)
        maps, places = torch.randn(2, 3, 4, 6, generator=g), 2.6 * torch.rand(2, 50, 2, generator=g) - 1.3
        plain = sample_within(maps, places)
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        torch.testing.assert_close(sample_within(maps, places), plain, rtol=1e-5, atol=1e-5)

    def test_cells_behind_the_camera_see_nothing(self):
        tilt = torch.tensor([torch.pi])  # upside down and backwards: every cell lies behind
        assert not self.lift.volume(torch.ones(1, 2, 4, 4), K[None], 32, tilt).any()

    def test_a_camera_that_looks_down_has_level_points_above_its_axis(self):
        tilt = tilt_towards_origin(torch.tensor([3.0, 4.0, 5.0]))
        assert tilt == pytest.approx(torch.pi / 4)
        volume = self.lift.volume(_rows(), K[None], 32, torch.tensor([0.2]))
        level = self.lift.volume(_rows(), K[None], 32)
        both = (volume != 0) & (level != 0)
        assert both.any()
        assert (volume[both] <= level[both] + 1e-6).all()
        assert (volume[both] < level[both]).any()

    def test_height_folds_into_channels_depth_into_rows(self):
        found = []
        self.lift.fold.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        features = torch.randn(1, 2, 4, 4)
        assert self.lift(features, K[None], 32).shape == (1, 2, 2, 2)
        volume = self.lift.volume(features, K[None], 32)
        torch.testing.assert_close(found[0][0, 1 * 3 + 2, 5, 6], volume[0, 1, 6, 2, 5])

    def test_intrinsics_must_be_in_pixels(self):
        with pytest.raises(ValueError, match="must be in pixels"):
            self.lift(torch.ones(1, 2, 4, 4), torch.tensor([[[1.1, 0, 0.5], [0, 1.1, 0.5], [0, 0, 1]]]), 32)


def _rows():
    """A map that says in which row one is, from 1 at the top."""
    return torch.arange(1.0, 5.0)[None, None, :, None].expand(1, 2, 4, 4)


def test_intrinsics_of_kubric():
    theirs = torch.tensor([[1.1, 0.0, -0.5], [0.0, -1.4, -0.5], [0.0, 0.0, -1.0]])
    point = torch.tensor([0.3, -0.2, 2.0])
    there = theirs @ (point * torch.tensor([1.0, -1.0, -1.0]))  # their camera looks along -z, y upwards
    mine, _ = project(point[None], kubric_intrinsics(theirs, 48, 64))
    torch.testing.assert_close(mine[0], there[:2] / there[2] * torch.tensor([64.0, 48.0]))
    with pytest.raises(ValueError, match="end in"):
        kubric_intrinsics(torch.eye(3), 48, 64)


def test_intrinsics_of_a_crop():
    k = torch.tensor([[90.0, 0, 61], [0, 80.0, 47], [0, 0, 1]]).double()
    box = torch.tensor([10, 20, 50, 44])
    points = torch.randn(20, 3).double() * 0.3 + torch.tensor([0.0, 0, 3]).double()
    whole, _ = project(points, k)
    wanted = (whole - box[:2]) * torch.tensor([32 / 40, 32 / 24])
    torch.testing.assert_close(project(points, adapt_intrinsics_to_crop(k, box, 32))[0], wanted)
    with pytest.raises(ValueError, match="x0 < x1"):
        adapt_intrinsics_to_crop(k, torch.tensor([5, 5, 5, 9]), 32)


class TestLoss:
    def test_values(self):
        half = torch.zeros(3)
        assert focal_loss(half, torch.ones(3)) == pytest.approx(0.25 * 0.6931472)
        logits, target = torch.randn(50), (torch.rand(50) > 0.5).float()
        torch.testing.assert_close(
            focal_loss(logits, target, gamma=0.0), F.binary_cross_entropy_with_logits(logits, target)
        )
        p = torch.where(target > 0, logits.sigmoid(), 1 - logits.sigmoid())
        torch.testing.assert_close(focal_loss(logits, target), (-((1 - p) ** 2) * p.log()).mean(), rtol=1e-6, atol=1e-6)

    def test_far_logits_are_finite_with_their_gradients(self):
        logits = torch.tensor([50.0, -50.0, 50.0, -50.0], requires_grad=True)
        loss = focal_loss(logits, torch.tensor([1.0, 1.0, 0.0, 0.0]))
        loss.backward()
        assert loss.item() == pytest.approx(25.0)
        assert torch.isfinite(logits.grad).all()

    def test_parts(self):
        draw = torch.Generator().manual_seed(0)
        full, visible = (torch.randn(1, 2, 1, 5, 5, generator=draw) for _ in range(2))
        out = AmodalOutput(full, visible, torch.zeros(()))
        whole = torch.zeros(1, 2, 1, 5, 5)
        whole[..., 1:4, :] = 1
        seen = whole.clone()
        seen[..., 3:] = 0
        a, b = focal_loss(full, whole), focal_loss(visible, seen)
        torch.testing.assert_close(amodal_loss(out, whole, seen), a + b)
        hidden = (whole > seen).flatten()
        c = focal_loss(full.flatten()[hidden], whole.flatten()[hidden])
        config = AmodalLossConfig(visible=0.5, occluded=2.0)
        torch.testing.assert_close(amodal_loss(out, whole, seen, config=config), a + b / 2 + 2 * c)
        first = torch.tensor([[True, False]])
        torch.testing.assert_close(
            amodal_loss(out, whole, seen, labelled=first), focal_loss(full[:, :1], whole[:, :1]) + b
        )
        assert amodal_loss(out, whole, seen, ~first & first) == 0


class TestTime:
    def test_order_of_slots_does_not_matter(self):
        model, (crops, k) = make(), clip()
        before = model(crops, k)
        order = torch.tensor([2, 0, 1])
        model.fusion.embedding.data = model.fusion.embedding.data[order]
        model.fusion.slot_code = model.fusion.slot_code[order]
        after = model(crops, k)
        torch.testing.assert_close(after.full, before.full, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after.slots, before.slots[:, :, order], rtol=1e-4, atol=1e-5)

    def test_a_reversed_clip_swaps_the_halves(self):
        model, (crops, k) = make(), clip()
        valid = torch.ones(1, 4, dtype=torch.bool)
        with torch.no_grad():
            there, _ = model.fuse(crops, k, valid, None, None)
            back, _ = model.fuse(crops.flip(1), k.flip(1), valid, None, None)
        first, second = there.chunk(2, 2)
        third, fourth = back.flip(1).chunk(2, 2)
        torch.testing.assert_close(first, fourth, rtol=0, atol=1e-6)
        torch.testing.assert_close(second, third, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("both", [True, False])
    def test_the_future(self, both):
        model, (crops, k) = make(dataclasses.replace(TINY, bidirectional=both)), clip()
        before = model(crops, k).full[:, 0]
        crops[:, -1] = 0.5
        assert torch.equal(model(crops, k).full[:, 0], before) != both

    def test_padding_changes_nothing(self):
        model, (crops, k) = make(), clip(2)
        valid = torch.tensor([[True, True, False, True], [True, True, True, True]])
        plain = model(crops[:1, [0, 1, 3]], k[:1, [0, 1, 3]])
        crops[0, 2] = torch.nan
        out = model(crops, k, valid)
        torch.testing.assert_close(out.full[:1, [0, 1, 3]], plain.full, rtol=1e-5, atol=1e-6)
        target = torch.ones_like(out.full)
        kept = torch.where(valid[:, :, None, None, None], target, torch.nan)
        loss = amodal_loss(out, kept.nan_to_num(0.3), kept.nan_to_num(0.3), valid)
        torch.testing.assert_close(loss, amodal_loss(out, target, target, valid))
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    def test_slots_go_on(self):
        model, (crops, k) = make(dataclasses.replace(TINY, bidirectional=False)), clip()
        whole = model(crops, k)
        first = model(crops[:, :2], k[:, :2])
        rest = model(crops[:, 2:], k[:, 2:], slots=first.slots[:, -1])
        torch.testing.assert_close(torch.cat((first.full, rest.full), 1), whole.full, rtol=1e-5, atol=1e-6)

    def test_tilt_matters(self):
        model, (crops, k) = make(), clip()
        assert not torch.allclose(model(crops, k, tilt=torch.tensor(0.5)).full, model(crops, k).full)


class TestMeter:
    visible = torch.zeros(1, 4, 6, dtype=torch.bool)
    visible[0, 1:3, 1:3] = True
    full = torch.zeros_like(visible)
    full[0, 1:3, 1:5] = True
    guess = torch.zeros_like(visible)
    guess[0, 1:3, 1:4] = True

    def test_by_hand(self):
        meter = AmodalMeter()
        meter.update(self.guess, self.full, self.visible)
        assert meter.compute() == (0.75, 0.5)
        meter.update(self.visible, self.visible, self.visible)  # nothing hidden
        assert meter.compute() == (0.875, 0.5)
        meter.update(self.visible, self.full, self.visible)  # the visible mask as the answer
        assert meter.compute().miou_occ == 0.25

    def test_official_rule(self):
        meter = AmodalMeter(legacy=True)
        meter.update(self.guess, self.full, self.visible)
        meter.update(self.full, self.full, self.visible)  # exactly right: left out
        assert meter.compute().miou_occ == 0.5
        meter.update(self.visible, self.visible, self.visible)  # nothing hidden: counts as 0
        assert meter.compute().miou_occ == 0.25

    def test_refuses(self):
        with pytest.raises(ValueError, match="one shape"):
            AmodalMeter().update(self.guess[0], self.full, self.visible)
        with pytest.raises(ValueError, match="bool"):
            AmodalMeter().update(self.guess.float(), self.full.float(), self.visible.float())


class TestCrops:
    def test_boxes(self):
        masks = torch.zeros(5, 20, 30, dtype=torch.bool)
        masks[0, 4:8, 10:14] = True
        masks[2, 4:8, 14:18] = True
        boxes, visible = visible_box_track(masks, enlarge=1.0)
        assert visible.tolist() == [True, False, True, False, False]
        assert boxes.tolist() == [[10, 4, 14, 8], [12, 4, 16, 8], [14, 4, 18, 8], [14, 4, 18, 8], [14, 4, 18, 8]]
        assert visible_box_track(masks)[0][0].tolist() == [8, 2, 16, 10]
        assert visible_box_track(masks, enlarge=9.0)[0][0].tolist() == [0, 0, 30, 20]
        with pytest.raises(ValueError, match="not visible"):
            visible_box_track(masks[3:])

    def test_pasting_undoes_cropping(self):
        frames = torch.rand(2, 1, 20, 30)
        boxes = torch.tensor([[3, 2, 11, 10], [20, 12, 28, 20]])
        pasted = paste_masks(crop_frames(frames, boxes, 8), boxes, (20, 30))
        inside = torch.zeros(2, 20, 30, dtype=torch.bool)
        for frame, (x0, y0, x1, y1) in zip(inside, boxes.tolist(), strict=True):
            frame[y0:y1, x0:x1] = True
        assert torch.equal(pasted, frames[:, 0] * inside)
        for bad in ([[3, 2, 11, 21]] * 2, [[-1, 2, 11, 10]] * 2):
            with pytest.raises(ValueError, match="lie in the frame"):
                crop_frames(frames, torch.tensor(bad), 8)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
    def test_masks_that_are_no_floats_come_out_soft(self, dtype):
        mask = torch.zeros(1, 1, 20, 30)
        mask[..., 4:9, 5:12] = 1
        box = torch.tensor([[3, 2, 15, 14]])
        soft = crop_frames(mask.to(dtype), box, 8)
        torch.testing.assert_close(soft, crop_frames(mask, box, 8))
        assert ((soft > 0) & (soft < 1)).any()

    def test_masks_of_a_whole_clip(self):
        model = make()
        frames, visible = torch.rand(7, 3, 40, 48), torch.zeros(7, 40, 48, dtype=torch.bool)
        visible[:, 10:20, 12:20] = True
        k = intrinsics_from_fov(1.2, 40, 48)
        whole = predict_track(model, frames, visible, k)
        assert whole.full.shape == whole.visible.shape == (7, 40, 48)
        x0, y0, x1, y1 = whole.boxes[0].tolist()
        assert whole.full[0].count_nonzero() == (x1 - x0) * (y1 - y0)
        parts = predict_track(model, frames, visible, k, chunk=3, lookahead=7)
        torch.testing.assert_close(parts.full, whole.full, rtol=1e-5, atol=1e-6)  # all frames behind are looked at
        with pytest.raises(ValueError, match="chunk"):
            predict_track(model, frames, visible, k, chunk=0)


class TestModel:
    def test_copies_and_saved_weights(self, tmp_path):
        model, (crops, k) = make(), clip()
        before = model(crops, k).full
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(crops, k).full, before)
        torch.save(model.state_dict(), tmp_path / "m.pt")
        again = EoRaS(EoRaSConfig.from_dict(TINY.to_dict())).eval()
        again.load_state_dict(torch.load(tmp_path / "m.pt"))
        assert torch.equal(again(crops, k).full, before)

    def test_learned_positions_and_no_view_from_above(self):
        config = dataclasses.replace(TINY, learned_positions=True, bev=None)
        model, (crops, k) = make(config), clip()
        model(crops).full.sum().backward()
        assert model.fusion.slot_code.grad.any()
        with pytest.raises(ValueError, match="only used with a bird's-eye view"):
            model(crops, k)

    def test_any_network_is_an_encoder(self):
        timm = pytest.importorskip("timm")
        backbone = timm.create_model("resnet18", features_only=True, out_indices=(2, 3, 4))
        encoder = FeaturePyramid(backbone, backbone.feature_info.channels(), TINY.features)
        model, (crops, k) = EoRaS(TINY, encoder).eval(), clip()
        assert model(crops, k).full.shape == (1, 4, 1, 25, 25)
        with pytest.raises(ValueError, match="three maps"):
            FeaturePyramid(backbone, [1, 2], 4)
        wrong = FeaturePyramid(nn.Identity(), [1, 2, 3], 4)
        with pytest.raises(ValueError, match="2 maps"):
            wrong(torch.ones(2, 3, 32, 32))

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda c, k: (c[:, :0], k[:, :0]), "at least one frame"),
            (lambda c, k: (c[..., :16], k), "crops must be"),
            (lambda c, k: (c, None), "needs intrinsics"),
            (lambda c, k: (c, k[..., :2]), "intrinsics must be"),
            (lambda c, k: (c, k, torch.ones(1, 4)), "valid must be bool"),
            (lambda c, k: (c, k, torch.zeros(1, 4, dtype=torch.bool)), "no valid frame"),
            (lambda c, k: (c, k / 32), "in pixels"),
        ],
    )
    def test_refuses(self, change, text):
        with pytest.raises(ValueError, match=text):
            make()(*change(*clip()))

    @pytest.mark.parametrize(
        "values", [{"slots": 0}, {"crop": 20}, {"heads": 3}, {"dropout": 1.0}, {"d_model": 6, "heads": 1}]
    )
    def test_settings_are_checked(self, values):
        with pytest.raises(ValueError, match=next(iter(values))):
            dataclasses.replace(TINY, **values)

    def test_learns_a_clip(self):
        torch.manual_seed(0)
        model = EoRaS(dataclasses.replace(TINY, dropout=0.0))
        crops, k = clip(1, 3)
        full = torch.zeros(1, 3, 1, 25, 25)
        full[..., 5:20, 5:20] = 1
        visible = full.clone()
        visible[..., 12:] = 0
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        for _ in range(40):
            loss = amodal_loss(model(crops, k), full, visible)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        out = model(crops, k)
        assert (((out.full > 0) == (full > 0.5)).float().mean() > 0.97) & (
            ((out.visible > 0) == (visible > 0.5)).float().mean() > 0.97
        )
