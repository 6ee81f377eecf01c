import copy
import dataclasses
import math
import pickle

import pytest
import torch
from eff_vision.geometry import decode_pose, encode_pose, intrinsics_from_fov, rotation_from_yaw_pitch
from eff_vision.multiview import (
    MultiViewBatch,
    MultiViewConfig,
    MultiViewLossConfig,
    MultiViewTransformer,
    attention_layers,
    camera_loss,
    depth_loss,
    head_dims,
    multiview_loss,
    normalize_scene,
    projection_parameters,
)
from eff_vision.multiview.blocks import Attention, apply_rope, rope_table
from torch import nn

TINY = MultiViewConfig(dim=32, heads=2, depth=2, taps=(0, 1), head_dim=8, camera_depth=1)
DPT = dataclasses.replace(
    TINY, head="dpt", encoder="vit", encoder_depth=1, encoder_registers=2, encoder_grid=4, depth=4, taps=(0, 1, 2, 3),
    points=True,
)  # fmt: skip


def make(config=TINY, seed=0):
    torch.manual_seed(seed)
    return MultiViewTransformer(config).eval()


def images(batch=1, views=3, side=32, seed=0):
    return torch.rand(batch, views, 3, side, side, generator=torch.Generator().manual_seed(seed))


def batch(views=3, side=32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    turn = rotation_from_yaw_pitch(torch.tensor([0.0, 0.2, -0.3][:views]), torch.tensor([0.0, 0.1, 0.05][:views]))
    shift = torch.rand(views, 3, 1, generator=draw)
    shift[0] = 0
    return MultiViewBatch(
        images(1, views, side, seed), torch.rand(1, views, side, side, generator=draw) + 0.5,
        torch.ones(1, views, side, side, dtype=torch.bool), torch.cat((turn, shift), -1)[None],
        intrinsics_from_fov(1.1, side, side).expand(1, views, 3, 3),
    )  # fmt: skip


class TestBlocks:
    def test_rotary_codes_depend_on_differences_alone(self):
        torch.manual_seed(0)
        q, k = torch.randn(2, 1, 1, 5, 16).double()
        places = torch.tensor([[1, 1], [1, 4], [3, 2], [6, 6], [0, 0]])
        scores = []
        for moved in (places, places + torch.tensor([3, 2])):
            cos, sin = rope_table(moved, 16, 100.0)
            table = (cos.double(), sin.double())
            scores.append(apply_rope(q, table) @ apply_rope(k, table).mT)
        torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
        assert torch.equal(apply_rope(q, rope_table(torch.zeros(5, 2), 16, 100.0)), q)
        # By hand: the first entry of the rows' half turns with its partner, a quarter of the width away, by one radian.
        one = torch.zeros(1, 1, 1, 16)
        one[..., 0] = 1
        turned = apply_rope(one, rope_table(torch.tensor([[1, 0]]), 16, 100.0))[0, 0, 0]
        assert turned[0] == pytest.approx(math.cos(1))
        assert turned[4] == pytest.approx(math.sin(1))

    def test_attention_against_the_open_form(self):
        torch.manual_seed(0)
        layer, x = Attention(16, 2, qk_norm=True).double(), torch.randn(2, 5, 16).double()
        cos, sin = rope_table(torch.randint(0, 4, (5, 2)), 8, 100.0)
        table = (cos.double(), sin.double())
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
        q, k = apply_rope(layer.q_norm(q), table), apply_rope(layer.k_norm(k), table)
        wanted = ((q @ k.mT / math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).flatten(-2)
        torch.testing.assert_close(layer(x, table), layer.proj(wanted))


class TestModel:
    @pytest.mark.parametrize("config", [TINY, DPT])
    def test_shapes(self, config):
        model = make(config)
        out = model(images(2, 3)[..., :24])
        assert out.depth.shape == (2, 3, 32, 24, 1)
        assert out.depth_conf.shape == (2, 3, 32, 24)
        assert out.pose_enc.shape == (2, 3, 9)
        assert len(out.pose_enc_list) == 4
        assert (out.depth > 0).all()
        assert (out.depth_conf >= 1).all()
        assert (out.world_points is not None) == config.points
        extrinsics, intrinsics = out.cameras()
        torch.testing.assert_close(extrinsics[..., :3] @ extrinsics[..., :3].mT, torch.eye(3).expand(2, 3, 3, 3))
        assert (intrinsics[..., 0, 0] > 0).all()
        torch.testing.assert_close(model(images(2, 3)[0, :, :, :, :24]).depth, out.depth[:1], rtol=1e-4, atol=1e-4)

    def test_other_views_may_come_in_any_order(self):
        model, x = make(), images(1, 4)
        order = torch.tensor([0, 3, 1, 2])
        a, b = model(x), model(x[:, order])
        torch.testing.assert_close(b.depth, a.depth[:, order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.pose_enc, a.pose_enc[:, order], rtol=1e-4, atol=1e-5)
        first = model(x[:, [1, 0, 2, 3]])
        assert not torch.allclose(first.depth, a.depth[:, [1, 0, 2, 3]], atol=1e-4)  # view 0 is the world

    def test_a_few_frames_at_a_time(self):
        model, x = make(DPT), images(1, 5)
        a, b = model(x), model(x, frames_at_a_time=2)
        torch.testing.assert_close(b.depth, a.depth)
        torch.testing.assert_close(b.world_points, a.world_points)

    def test_everything_learns(self):
        for config in (TINY, DPT):
            model, truth = make(config), batch()
            out = model(truth.images)
            loss = multiview_loss(out, truth)[0]
            if config.points:
                loss = loss + (out.world_points.square().mean() + out.world_points_conf.mean())
            loss.backward()
            silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
            assert silent == []

    def test_bfloat16_keeps_the_heads_in_float32(self):
        model, x = make(), images()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        assert out.depth.dtype == out.pose_enc.dtype == torch.float32
        torch.testing.assert_close(out.depth, model(x).depth, rtol=0.1, atol=0.05)

    def test_copies_and_saved_weights(self):
        model, x = make(), images()
        before = model(x).depth
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x).depth, before)
        again = make(MultiViewConfig.from_dict(TINY.to_dict()), seed=1)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x).depth, before)

    @pytest.mark.parametrize(
        ("x", "text"),
        [
            (torch.rand(1, 0, 3, 32, 32), "at least one view"), (torch.rand(1, 2, 3, 30, 32), "multiples of 8"),
            (torch.rand(2, 4, 32, 32), "must be"), (torch.rand(3, 32, 32), "must be"),
        ],
    )  # fmt: skip
    def test_refuses(self, x, text):
        with pytest.raises(ValueError, match=text):
            make()(x)

    @pytest.mark.parametrize(
        "bad",
        [
            {"heads": 5},
            {"taps": (0,)},
            {"taps": (0, 2)},
            {"patch_size": 6},
            {"encoder_depth": 2},
            {"encoder": "vit"},
            {"registers": -1},
        ],
    )
    def test_settings_are_checked(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad)).split("_")[0]):
            dataclasses.replace(TINY, **bad)


class TestLayers:
    def test_layers_of_vggt(self):
        with torch.device("meta"):
            model = MultiViewTransformer(MultiViewConfig.vggt_1b())
        layers = attention_layers(model)
        assert len(layers) == 76
        assert projection_parameters(layers) == 360_448
        assert [len(attention_layers(model, g)) for g in ("encoder", "frame", "global", "camera")] == [24, 24, 24, 4]
        assert set(head_dims(attention_layers(model, "camera")).values()) == {128}
        shapes = {n: tuple(m.qkv.weight.shape) for n, m in layers.items()}
        assert shapes["aggregator.global_blocks.23.attn"] == (3072, 1024)
        # VGGT-1B without its head for tracks.
        assert 1.15e9 < sum(p.numel() for p in model.parameters()) < 1.26e9

    def test_layers_of_depth_anything_3(self):
        class MemEffAttention(Attention):
            pass

        class Row(nn.Module):
            def __init__(self, count):
                super().__init__()
                self.blocks = nn.ModuleList(nn.Module() for _ in range(count))
                for block in self.blocks:
                    block.attn = MemEffAttention(1024, 16, qk_norm=False)

        with torch.device("meta"):
            model = nn.Module()
            model.backbone, model.cam_enc = nn.Module(), nn.Module()
            model.backbone.pretrained, model.cam_enc.trunk = Row(24), Row(4)
        assert len(attention_layers(model)) == 28
        assert projection_parameters(attention_layers(model)) == 114_688
        assert len(attention_layers(model, "camera")) == 4

    def test_refuses(self):
        with pytest.raises(ValueError, match="no attention layers"):
            attention_layers(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="group='heads'"):
            attention_layers(make(), "heads")


class TestLoss:
    def exact(self, truth):
        code = encode_pose(truth.extrinsics, truth.intrinsics, 32, 32)
        return make()(truth.images)._replace(
            pose_enc=code,
            pose_enc_list=[code] * 4,
            depth=truth.depth[..., None],
            depth_conf=torch.ones_like(truth.depth),
        )

    def test_the_truth_costs_nothing_at_any_scale(self):
        truth = batch()
        out = self.exact(truth)
        assert multiview_loss(out, truth)[0] == pytest.approx(0, abs=1e-6)
        double = out.pose_enc.clone()
        double[..., :3] *= 2
        out = out._replace(depth=out.depth * 3, pose_enc=double, pose_enc_list=[double] * 4)
        assert multiview_loss(out, truth)[0] == pytest.approx(0, abs=1e-5)

    def test_later_refinements_count_more(self):
        truth = batch()
        out = self.exact(truth)
        wrong = out.pose_enc.clone()
        wrong[..., 3:7] += 1
        config = MultiViewLossConfig()
        for s in range(4):
            stages = [wrong if i == s else out.pose_enc for i in range(4)]
            loss = camera_loss(out._replace(pose_enc_list=stages), truth, config)
            assert loss == pytest.approx(0.6 ** (3 - s) / 4, rel=1e-4)

    def test_depth_by_hand(self):
        truth = batch()
        out = self.exact(truth)
        off = truth.depth.clone()
        off[..., :16, :] *= 1.2
        off[..., 16:, :] *= 0.9
        found = out._replace(depth=off[..., None], depth_conf=torch.full_like(truth.depth, 2.0))
        scale = (off * truth.depth).sum() / off.square().sum()
        error = (scale * off - truth.depth).abs().flatten()
        weighted = 2 * error - 0.2 * math.log(2)
        wanted = sum(v.sort().values[: int(0.95 * len(v))].mean() for v in (error, weighted))
        torch.testing.assert_close(depth_loss(found, truth, MultiViewLossConfig()), wanted, rtol=1e-4, atol=1e-5)

    def test_too_few_pixels(self):
        truth = batch()
        few = truth._replace(valid=torch.zeros_like(truth.valid))
        few.valid[:, :, :5, :5] = True
        model = make()
        loss, parts = multiview_loss(model(truth.images), few)
        assert parts["camera"] == 0
        assert torch.isfinite(loss)
        none = truth._replace(valid=torch.zeros_like(truth.valid), depth=truth.depth * math.nan)
        loss, _ = multiview_loss(model(truth.images), none)
        loss.backward()
        assert loss == 0
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    def test_scenes_come_to_one_scale(self):
        truth = batch()
        big = truth._replace(depth=truth.depth * 7, extrinsics=truth.extrinsics.clone())
        big.extrinsics[..., 3] *= 7
        a, b = normalize_scene(truth), normalize_scene(big)
        torch.testing.assert_close(a.depth, b.depth)
        torch.testing.assert_close(a.extrinsics, b.extrinsics)
        longest = a.extrinsics[..., 3].norm(dim=-1).max()
        assert max(a.depth.median(), longest) == pytest.approx(1, abs=1e-5)
        with pytest.raises(ValueError, match="not finite"):
            normalize_scene(truth._replace(depth=truth.depth * math.nan))
        with pytest.raises(ValueError, match="no valid pixel"):
            normalize_scene(truth._replace(valid=truth.valid & False))


def test_poses_as_numbers_and_back():
    draw = torch.Generator().manual_seed(0)
    turn = rotation_from_yaw_pitch(torch.rand(2, 50, generator=draw) * 7, torch.rand(2, 50, generator=draw) * 3 - 1.5)
    extrinsics = torch.cat((turn, torch.randn(2, 50, 3, 1, generator=draw)), -1)
    k = intrinsics_from_fov(torch.rand(2, 50, generator=draw) * 2.2 + 0.3, 48, 64)
    code = encode_pose(extrinsics, k, 48, 64)
    other = code.clone()
    other[..., 3:7] *= -1
    for c in (code, other):
        back, intrinsics = decode_pose(c, 48, 64)
        torch.testing.assert_close(back, extrinsics, rtol=0, atol=1e-5)
        torch.testing.assert_close(intrinsics, k, rtol=1e-4, atol=1e-4)
