import copy
import math
import pickle
import threading

import pytest
import torch
from eff_vision.geometry import (
    erp_area_weights,
    erp_rays,
    erp_to_perspective,
    intrinsics_from_fov,
    perspective_to_erp,
    radial_to_z,
    rotation_from_yaw_pitch,
)
from eff_vision.panorama import (
    BackboneTaps,
    ERPTokenMixer,
    GradientTruncatedBridge,
    PanoConv2d,
    PanoLossConfig,
    PatchConfig,
    PDBridgeConfig,
    PDBridgeNet,
    StreamSplit,
    aux_targets,
    blend_seam,
    cube_patches,
    edge_distance,
    point_map,
    resize_panorama,
    sample_patches,
    stream_of,
    turn,
)
from torch import nn

CONFIG = PDBridgeConfig(classes=4, channels=8, dim=8, heads=2, blocks=1)
H, W = 32, 64


class Backbone(nn.Module):
    """Four maps at an eighth of the size that go around."""

    def __init__(self, channels=8):
        super().__init__()
        self.patch = nn.Conv2d(3, channels, 8, 8)
        self.layers = nn.ModuleList(PanoConv2d(channels, channels, 3) for _ in range(4))

    def forward(self, pictures):
        x, found = self.patch(pictures), []
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
            found.append(x)
        return found


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return PDBridgeNet(Backbone(), PDBridgeConfig.from_dict({**CONFIG.to_dict(), **changes})).eval()


def stirred(**changes):
    model = make(**changes)
    for p in model.parameters():
        if not p.detach().any():
            nn.init.normal_(p, std=0.1)
    return model


def box_room(half=2.0, height=H):
    """Distance, normals and face of a cube seen from its middle."""
    rays = erp_rays(height, 2 * height, dtype=torch.float64)
    largest, face = rays.abs().max(-1)
    normals = -torch.nn.functional.one_hot(face, 3) * rays.sign()
    side = face * 2 + (rays.gather(-1, face[..., None])[..., 0] > 0)
    return (half / largest)[None], normals.movedim(-1, 0), side


def smooth(height):
    x, y, z = erp_rays(height, 2 * height).unbind(-1)
    return torch.stack((x + 0.5 * y * z, z * z - y, x * y + 0.3 * z))[None]


class TestProjection:
    def test_there_and_back(self):
        panorama, rotation = smooth(128), rotation_from_yaw_pitch(2.9, 0.7)
        patch = erp_to_perspective(panorama, rotation, 1.6, 200, 260)
        back, mask = perspective_to_erp(patch, rotation, 1.6, 128)
        assert (back - panorama).abs().amax(1)[mask].max() < 0.02
        labels = box_room(height=128)[2][None, None]
        patch = erp_to_perspective(labels, rotation, 1.6, 300, 390, mode="nearest")
        back, mask = perspective_to_erp(patch, rotation, 1.6, 128, mode="nearest")
        assert (back == labels)[:, 0][mask].float().mean() >= 0.97

    def test_a_room_of_walls(self):
        distance, normals, _ = box_room()
        big, _, _ = box_room(height=512)
        assert big.min() == pytest.approx(2.0, abs=1e-4)
        assert big.max() == pytest.approx(2 * math.sqrt(3), abs=0.02)
        assert ((normals.abs() == 1).sum(0) == 1).all()
        rays = erp_rays(H, W, dtype=torch.float64).movedim(-1, 0)
        assert ((normals * rays).sum(0) < 0).all()
        seen = erp_to_perspective(big[None].float(), torch.eye(3), math.pi / 2, 64, 64)
        z = radial_to_z(seen[:, 0], intrinsics_from_fov(math.pi / 2, 64, 64)[None])
        assert (z[0, 4:-4, 4:-4] - 2).abs().max() < 2e-3
        torch.testing.assert_close(point_map(distance[None]).norm(dim=1), distance)

    def test_six_patches_cover_the_sphere_once(self):
        area = erp_area_weights(256, 512, dtype=torch.float64)
        total = torch.zeros(256, 512)
        for rotation, fov in cube_patches():
            _, mask = perspective_to_erp(torch.ones(1, 1, 64, 64), rotation, fov, 256)
            assert (mask[0] * area).sum() == pytest.approx(1 / 6, abs=1e-3)
            total += mask[0]
        assert total.min() >= 1
        assert ((total > 1) * area).sum() < 1e-3

    def test_coverage_of_random_patches(self):
        draw = torch.Generator().manual_seed(0)
        area, shares = erp_area_weights(H, W, dtype=torch.float64), []
        for count, wanted in ((32, 0.995), (8, 0.76)):
            found = []
            for _ in range(12):
                seen = torch.zeros(H, W, dtype=torch.bool)
                for rotation, fov in sample_patches(PatchConfig(count=count), generator=draw):
                    seen |= perspective_to_erp(torch.ones(1, 1, 48, 64), rotation, fov, H)[1][0]
                found.append(float((seen * area).sum()))
            shares.append(sum(found) / len(found))
            assert shares[-1] == pytest.approx(wanted, abs=0.07)
        assert shares[0] > 0.97


class TestLayers:
    def test_convolution_and_resizing_go_around(self):
        torch.manual_seed(0)
        x, layer = torch.randn(1, 4, 8, 16), PanoConv2d(4, 4, (3, 9))
        torch.testing.assert_close(layer(x.roll(5, -1)), layer(x).roll(5, -1))
        for rows, columns in ((32, 64), (12, 24), (4, 8)):
            step = 16 * (columns // math.gcd(16, columns)) // columns
            moved = resize_panorama(x.roll(step, -1), rows, columns)
            torch.testing.assert_close(moved, resize_panorama(x, rows, columns).roll(step * columns // 16, -1))
        inside = nn.functional.interpolate(x, size=(32, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(resize_panorama(x, 32, 64)[..., 4:-4], inside[..., 4:-4])

    def test_mixer_at_the_equator_and_at_the_poles(self):
        torch.manual_seed(0)
        mixer, x = ERPTokenMixer(4), torch.randn(1, 4, 201, 402)
        with torch.no_grad():
            out, square, wide = mixer(x), mixer.square(x), mixer.wide(x)
        torch.testing.assert_close(out[..., 100, :], square[..., 100, :])
        torch.testing.assert_close(out[..., 0, :], wide[..., 0, :], rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            mixer.wide.weight.zero_()
            mixer.wide.bias.zero_()
            assert mixer(x)[..., 0, :].abs().max() < 1e-3

    def test_seam(self):
        maps = torch.linspace(0, 1, 32).expand(1, 1, 4, 32).clone()
        jump = (blend_seam(maps) - blend_seam(maps).roll(1, -1)).abs().max()
        assert jump < 0.35
        torch.testing.assert_close(blend_seam(maps)[..., 2:-2], maps[..., 2:-2])
        vectors = nn.functional.normalize(torch.randn(1, 3, 4, 32), dim=1)
        torch.testing.assert_close(blend_seam(vectors, normals=True).norm(dim=1), torch.ones(1, 4, 32))
        with pytest.raises(ValueError, match="quarter"):
            blend_seam(maps, 9)

    def test_predictions_meet_at_the_seam(self):
        model, picture = stirred(streams=1), smooth(H)
        with torch.no_grad():
            out = model(picture).main["semseg"]
        steps = (out - out.roll(1, -1)).abs().amax(1)
        assert steps[..., 0].mean() <= steps[..., 1:].quantile(0.99)


class TestModel:
    def test_the_start_is_plain_dpt(self):
        model, picture = make(), torch.randn(2, 3, H, W)
        taps = model.backbone(picture)
        out = model(picture)
        for task, decoder in model.decoders.items():
            assert torch.equal(out.main[task], decoder(taps, H, W))
        assert {k: tuple(v.shape) for k, v in out.main.items()} == {
            "semseg": (2, 4, H, W), "depth": (2, 1, H, W), "normals": (2, 3, H, W)
        }  # fmt: skip
        assert out.intermediate["grad"].shape == (2, 2, H, W)
        assert not torch.equal(stirred()(picture).main["normals"], out.main["normals"])

    def test_turning_rolls_what_does_not_turn(self):
        torch.manual_seed(0)
        split, taps = StreamSplit(8, 4, 2, 2), [torch.randn(1, 8, 8, 16) for _ in range(4)]
        for p in split.parameters():
            nn.init.normal_(p, std=0.2)
        plain, rolled = split(taps), split([t.roll(3, -1) for t in taps])
        for a, b in zip(plain["invariant"], rolled["invariant"], strict=True):
            torch.testing.assert_close(b, a.roll(3, -1), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(rolled["variant"][0], plain["variant"][0].roll(3, -1), atol=1e-3)
        model, picture = stirred(), smooth(H)
        with torch.no_grad():
            a, b = model(picture).intermediate, model(picture.roll(16, -1)).intermediate
        torch.testing.assert_close(b["depth"], a["depth"].roll(16, -1), rtol=1e-4, atol=1e-5)

    def test_labels_turn(self):
        distance, normals, side = box_room()
        maps = {"depth": distance, "normals": normals, "semseg": side}
        quarter = turn(maps, W // 4)
        torch.testing.assert_close(quarter["depth"], distance)  # a cube looks the same after a quarter turn
        torch.testing.assert_close(quarter["normals"], normals, atol=1e-6, rtol=0)
        assert not torch.equal(quarter["semseg"], side)
        points = point_map(distance[None])[0]
        moved = turn({"point": points, "depth": distance}, 5)
        torch.testing.assert_close(moved["point"], point_map(moved["depth"][None])[0], atol=1e-6, rtol=0)

    @pytest.mark.parametrize("truncate", [True, False])
    def test_gradients_stay_in_their_stream(self, truncate):
        model, picture = stirred(truncate=truncate), torch.randn(1, 3, H, W)
        for lost, own, other in (("normals", "variant", "invariant"), ("depth", "invariant", "variant")):
            model.zero_grad()
            model(picture).main[lost].square().mean().backward()
            foreign = list(getattr(model.split, other).parameters()) + list(model.aggregate[other].parameters())
            foreign += [p for task, m in model.features.items() if stream_of(task) == other for p in m.parameters()]
            reached = [p for p in foreign if p.grad is not None and p.grad.any()]
            assert (not reached) == truncate
            assert all(p.grad is not None and p.grad.any() for p in getattr(model.split, own)[0].parameters())
            shrink = model.bridges[own].shrink
            assert all(m.weight.grad.any() for m in shrink.values())  # how to read foreign tasks is learnt
            assert model.backbone.patch.weight.grad.any()

    def test_bridge_refuses_tasks_that_it_does_not_read(self):
        with pytest.raises(ValueError, match="not among"):
            GradientTruncatedBridge(("depth",), ("normals",), 8)
        with pytest.raises(ValueError, match="unknown task"):
            stream_of("colour")

    def test_copies_threads_and_saved_weights(self):
        model, picture = stirred(), torch.randn(1, 3, H, W)
        with torch.no_grad():
            before = model(picture).main["normals"]
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(other(picture).main["normals"], before)
        again = make(seed=1)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(picture).main["normals"], before)

    def test_any_vision_transformer_is_a_backbone(self):
        timm = pytest.importorskip("timm")
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        vit = timm.create_model("vit_tiny_patch16_224", embed_dim=8, num_heads=2, depth=4, dynamic_img_size=True)
        dino = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, patch_size=16)
        )
        for model in (vit, dino):
            taps = BackboneTaps(model.eval(), range(4))
            pictures = torch.randn(2, 3, H, W)
            alone = [[m.clone() for m in taps(p[None])] for p in pictures]
            assert alone[0][0].shape == (1, 8, 2, 4)
            net = PDBridgeNet(taps, CONFIG)
            net(pictures).main["normals"].square().sum().backward()
            assert next(p for p in taps.backbone.parameters() if p.dim() == 4).grad.any()
            found = {}

            def work(i, taps=taps, found=found, pictures=pictures):
                for _ in range(5):
                    found[i] = taps(pictures[i : i + 1])

            threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            for i in range(2):
                for a, b in zip(found[i], alone[i], strict=True):
                    torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match="indices of 4 blocks"):
            BackboneTaps(vit, [4])

    @pytest.mark.parametrize(
        ("picture", "text"),
        [
            (torch.zeros(1, 3, 32, 32), "twice as wide"),
            (torch.zeros(3, 32, 64), "must be"),
            (torch.zeros(1, 4, 32, 64), "must be"),
        ],
    )
    def test_refuses(self, picture, text):
        with pytest.raises(ValueError, match=text):
            make()(picture)
        with pytest.raises(ValueError, match="backbone gave"):
            PDBridgeNet(Backbone(12), CONFIG)(torch.zeros(1, 3, H, W))

    def test_settings_are_checked(self):
        for bad in ({"classes": 0}, {"heads": 3}, {"channels": 6}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                make(**bad)
        with pytest.raises(ValueError, match="180"):
            PatchConfig(fov=(80.0, 180.0))
        with pytest.raises(ValueError, match="not among"):
            PanoLossConfig(tasks={"colour": 1.0})


class TestTargets:
    def test_distance_to_one_edge(self):
        gradient = torch.zeros(1, 2, 32, 64)
        gradient[0, 0, :, 10] = 1
        found = edge_distance(gradient)[0, 0, 16]
        column = torch.arange(64)
        apart = torch.minimum((column - 10).abs(), 64 - (column - 10).abs())
        torch.testing.assert_close(found, apart.float().log1p())
        assert edge_distance(gradient)[0, 0, 0, 10] == pytest.approx(math.log1p(8))  # polar rows have no edges
        assert (edge_distance(torch.zeros(1, 2, 32, 64)) == math.log1p(64)).all()

    def test_against_brute_force(self):
        torch.manual_seed(0)
        gradient = torch.rand(2, 2, 20, 40) * 0.4
        edges = (gradient.norm(dim=1) > 0.5) & ((torch.arange(20) >= 2) & (torch.arange(20) < 18))[:, None]
        wanted = torch.empty(2, 20, 40)
        for b in range(2):
            y, x = edges[b].nonzero().unbind(1)
            for i in range(20):
                for j in range(40):
                    dx = (x - j).abs()
                    wanted[b, i, j] = ((y - i) ** 2 + torch.minimum(dx, 40 - dx) ** 2).min().sqrt().log1p()
        torch.testing.assert_close(edge_distance(gradient, polar_rows=2)[:, 0], wanted)

    def test_gradient_and_point(self):
        image = torch.linspace(0, 1, W).expand(1, 3, H, W)
        found = aux_targets(image, torch.full((1, 1, H, W), 2.0))
        assert found["grad"][0, 0, 5, 9] == pytest.approx(8 / (W - 1), abs=1e-4)
        assert not found["grad"][..., 0, :].any()
        assert found["grad"][0, 1].abs().max() < 1e-5
        torch.testing.assert_close(found["point"][0].movedim(0, -1) / 2, erp_rays(H, W))
