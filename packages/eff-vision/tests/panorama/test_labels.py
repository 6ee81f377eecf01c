import math

import pytest
import torch
from eff_vision.geometry import (
    erp_rays,
    intrinsics_from_fov,
    radial_to_z,
)
from eff_vision.panorama import (
    IGNORE,
    MultiTaskLoss,
    PanoLossConfig,
    PanoOutput,
    PatchConfig,
    PatchLabels,
    PseudoLabeler,
    aux_targets,
    cube_patches,
)
from torch import nn

H, W = 32, 64


def box_room(half=2.0, height=H):
    """Distance, normals and face of a cube seen from its middle."""
    rays = erp_rays(height, 2 * height, dtype=torch.float64)
    largest, face = rays.abs().max(-1)
    normals = -torch.nn.functional.one_hot(face, 3) * rays.sign()
    side = face * 2 + (rays.gather(-1, face[..., None])[..., 0] > 0)
    return (half / largest)[None], normals.movedim(-1, 0), side


def targets():
    distance, normals, side = box_room()
    image = torch.rand(1, 3, H, W)
    found = {"semseg": (side % 4)[None], "depth": distance[None].float(), "normals": normals[None].float()}
    return found | aux_targets(image, found["depth"])


def perfect(wanted):
    main = {
        "semseg": nn.functional.one_hot(wanted["semseg"], 4).movedim(-1, 1).float() * 60,
        "depth": wanted["depth"],
        "normals": wanted["normals"] * 3,
    }
    return PanoOutput(main, main | {k: wanted[k] for k in ("grad", "edge_distance", "point")})


class TestLoss:
    def test_perfect_predictions_cost_nothing(self):
        wanted = targets()
        total, parts = MultiTaskLoss()(perfect(wanted), wanted)
        assert total < 1e-4
        assert set(parts) == {*wanted, "semseg/intermediate", "depth/intermediate", "normals/intermediate"}

    def test_unlabelled_pixels_have_no_gradient(self):
        wanted = targets()
        known = torch.zeros(1, H, W, dtype=torch.bool)
        known[:, 4:12, 10:30] = True
        wanted = {
            "semseg": torch.where(known, wanted["semseg"], IGNORE), "depth": wanted["depth"] * known[:, None],
            "normals": wanted["normals"] * known[:, None],
        }  # fmt: skip
        torch.manual_seed(0)
        main = {
            "semseg": torch.randn(1, 4, H, W), "depth": torch.rand(1, 1, H, W), "normals": torch.randn(1, 3, H, W)
        }  # fmt: skip
        for x in main.values():
            x.requires_grad_()
        config = PanoLossConfig(area_weighting=True)
        total, _ = MultiTaskLoss(config)(PanoOutput(main, main), wanted)
        total.backward()
        for task, x in main.items():
            reached = x.grad.abs().sum(1) > 0
            assert not (reached & ~known).any(), task
            assert (reached & known).sum() > 0.9 * known.sum()

    def test_area_weights_make_poles_cheap(self):
        wanted = targets()
        out = perfect(wanted)
        top, middle = (dict(out.main), dict(out.main))
        top["depth"], middle["depth"] = out.main["depth"].clone(), out.main["depth"].clone()
        top["depth"][..., 0, :] += 1
        middle["depth"][..., H // 2, :] += 1
        config = PanoLossConfig(tasks={"depth": 1.0}, depth_edge=0, depth_frequency=0, auxiliary=0, intermediate=0)
        loss, even = (
            MultiTaskLoss(PanoLossConfig.from_dict({**config.to_dict(), "area_weighting": True})),
            MultiTaskLoss(config),
        )
        only = {"depth": wanted["depth"]}
        assert loss(out._replace(main=top), only)[0] < 0.1 * loss(out._replace(main=middle), only)[0]
        torch.testing.assert_close(even(out._replace(main=top), only)[0], even(out._replace(main=middle), only)[0])

    def test_limit_and_frequency(self):
        wanted = targets()
        out = perfect(wanted)
        far = out._replace(main={**out.main, "depth": out.main["depth"] + 100})
        assert MultiTaskLoss()(far, {"depth": wanted["depth"]})[1]["depth"] == 10
        free = PanoLossConfig(depth_limit=None, radius=8, phase="complex", auxiliary=0)
        assert MultiTaskLoss(free)(far, {"depth": wanted["depth"]})[1]["depth"] > 100

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda t: {"colour": t["depth"]}, "colour"),
            (lambda t: {"depth": t["depth"] * 0}, "no pixel"),
            (lambda t: {"depth": t["depth"] * math.nan}, "not finite"),
            (lambda t: {"semseg": t["semseg"] + 4}, "the model has 4"),
        ],
    )
    def test_refuses(self, change, text):
        wanted = targets()
        with pytest.raises(ValueError, match=text):
            MultiTaskLoss()(perfect(wanted), change(wanted))


class TestLabels:
    config = PatchConfig(count=6, height=48, width=48)

    @staticmethod
    def teachers(noise=None):
        """Exact ones of the cube of 2 m, whose panorama's colours say which wall is where."""
        k = intrinsics_from_fov(math.pi / 2, 48, 48)[None]

        def depth(picture, fov):
            z = radial_to_z(picture[:, 0] * 4, k)[:, None]
            return z if noise is None else z * noise.pop()

        def normals(picture, fov):
            return (picture - 0.5) * 2

        return {"depth": depth, "normals": normals, "semseg": lambda picture, fov: (picture[:, 0] > 0.6).long()}

    def picture(self):
        distance, _, _ = box_room(height=64)
        return (distance / 4).float().expand(3, 64, 128)

    def test_exact_teachers_give_exact_labels(self, tmp_path):
        labels = PseudoLabeler({"depth": self.teachers()["depth"]}, self.config).run(self.picture(), cube_patches())
        distance, _, _ = box_room(height=64)
        merged = labels.merged()["depth"]
        assert merged.shape == (1, 64, 128)
        assert ((merged - distance).abs() / distance).max() < 0.02
        labels.save(str(tmp_path / "l.safetensors"))
        again = PatchLabels.load(str(tmp_path / "l.safetensors"))
        torch.testing.assert_close(again.merged()["depth"], merged, atol=2e-3, rtol=0)
        assert torch.equal(again.coverage, labels.coverage)

    def test_normals_come_back_to_the_frame_of_the_panorama(self, tmp_path):
        _, normals, _ = box_room(height=64)
        patches = cube_patches()
        turned = iter(patches)

        def teacher(picture, fov):
            rotation = next(turned).rotation
            return torch.einsum("ji,bjhw->bihw", rotation, (picture - 0.5) * 2)

        labels = PseudoLabeler({"normals": teacher}, self.config).run((normals / 2 + 0.5).float(), patches)
        agree = (labels.merged()["normals"] * normals).sum(0)
        assert (agree > 0.99).float().mean() > 0.9
        labels.save(str(tmp_path / "l.safetensors"))
        again = PatchLabels.load(str(tmp_path / "l.safetensors"))
        assert ((again.merged()["normals"] * labels.merged()["normals"]).sum(0) > 0.999).float().mean() > 0.99

    def test_classes_and_what_no_patch_covers(self):
        labels = PseudoLabeler({"semseg": self.teachers()["semseg"]}, self.config).run(
            self.picture(), cube_patches()[:1]
        )
        merged = labels.merged()["semseg"]
        assert (merged[labels.coverage[0]] < 2).all()
        assert (merged[~labels.coverage[0]] == IGNORE).all()
        assert torch.equal(labels.patch(0)["semseg"], merged)

    def test_each_patch_keeps_its_own_scale(self):
        noise = [0.9, 1.1] * 3
        labels = PseudoLabeler({"depth": self.teachers(noise)["depth"]}, self.config).run(
            self.picture(), cube_patches()
        )
        distance, _, _ = box_room(height=64)
        for i in range(6):
            ratio = (labels.patch(i)["depth"] / distance)[:, labels.coverage[i]]
            assert ratio.std() < 0.01
            assert abs(ratio.mean() - 1) == pytest.approx(0.1, abs=0.01)

    def test_drawing_is_repeatable(self):
        draws = [
            PseudoLabeler(self.teachers(), PatchConfig(count=2, fov=(90.0, 90.0), height=48, width=48)).run(
                self.picture(), generator=torch.Generator().manual_seed(3)
            ).coverage
            for _ in range(2)
        ]  # fmt: skip
        assert torch.equal(*draws)

    def test_refuses(self):
        with pytest.raises(ValueError, match="colour"):
            PseudoLabeler({"colour": self.teachers()["depth"]})
        wrong = PseudoLabeler({"depth": lambda p, f: p}, self.config)
        with pytest.raises(ValueError, match="teacher of depth gave"):
            wrong.run(self.picture(), cube_patches())
        with pytest.raises(ValueError, match="must be"):
            wrong.run(self.picture()[None])
