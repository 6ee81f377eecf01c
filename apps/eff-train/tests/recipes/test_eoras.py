import dataclasses

import pytest
import torch
from eff_train.recipes.eoras import Amodal, Config, Masks
from eff_train.recipes.eoras.clips import collage_track, mirrored, room_track
from PIL import Image

TINY = Config(
    steps=6, batch_size=2, warmup=0, dim=16, crop=32, side=48, frames=3, clips=2, pool=4, eval_every=0, save_every=3
)


@pytest.mark.parametrize("world", ["rooms", "collages"])
def test_tracks_hide_their_object(world):
    recipe = Amodal(dataclasses.replace(TINY, world=world, frames=4, side=64))
    for seed in range(3):
        track = recipe.track(seed, held_out=False)
        share = track.visible.flatten(1).sum(1) / track.full.flatten(1).sum(1)
        assert share.min() <= 0.8 <= share.max()
        assert not (track.visible & ~track.full).any()
        x0, y0, x1, y1 = track.boxes[0].tolist()
        assert track.visible[0, y0:y1, x0:x1].sum() == track.visible[0].sum()


def test_drawings_of_the_evaluation_are_other_ones():
    clips = [collage_track(5, 4, 48, held_out=held_out) for held_out in (False, True)]
    assert not torch.equal(clips[0].frames, clips[1].frames)
    assert torch.equal(clips[0].frames, collage_track(5, 4, 48, held_out=False).frames)


def test_a_mirrored_clip_is_the_clip_of_a_mirrored_world():
    from eff_vision.amodal import adapt_intrinsics_to_crop, crop_frames

    track = room_track(1, 3, 48)
    seen = mirrored(track)
    assert torch.equal(seen.frames, track.frames.flip(-1))
    crops, flipped = (crop_frames(t.frames, t.boxes, 16) for t in (track, seen))
    torch.testing.assert_close(flipped, crops.flip(-1))
    point = torch.tensor([0.3, -0.2, 4.0])
    here, there = (adapt_intrinsics_to_crop(t.intrinsics, t.boxes, 16) for t in (track, seen))
    at, mirrored_at = here @ point, there @ (point * torch.tensor([-1.0, 1, 1]))
    torch.testing.assert_close(16 - mirrored_at[:, 0] / 4, at[:, 0] / 4)
    torch.testing.assert_close(mirrored_at[:, 1], at[:, 1])


@pytest.mark.parametrize("world", ["rooms", "collages"])
def test_the_whole_way(tmp_path, train_into, world):
    config = dataclasses.replace(TINY, world=world)
    _, status = train_into(tmp_path / "run", config, Amodal)
    assert status == 0
    recipe = Amodal(config)
    model = recipe.build()
    found = recipe.evaluate(model)
    assert 0 <= found["miou_full"] <= 1
    recipe.samples(model, tmp_path)
    assert (tmp_path / "masks.png").is_file()
    single = Amodal(dataclasses.replace(config, single=True))
    assert single.batch(range(2))["crops"].shape == (6, 1, 3, 32, 32)
    assert torch.isfinite(single.loss(single.build(), single.batch(range(2)))[0])


def test_prediction(tmp_path):
    recipe = Amodal(TINY)
    track = room_track(0, 3, 48)
    for i in range(3):
        Image.fromarray((track.frames[i].movedim(0, -1) * 255).byte().numpy()).save(tmp_path / f"{i:03}.png")
        Image.fromarray(track.visible[i].byte().mul(255).numpy()).save(tmp_path / f"{i:03}-mask.png")
    assert recipe.predict(recipe.build().eval(), tmp_path, tmp_path / "out") == "3 frames"
    assert len(list((tmp_path / "out").iterdir())) == 3
    Image.new("L", (48, 48)).save(tmp_path / "000-mask.png")  # hidden in this frame
    assert recipe.predict(recipe.build().eval(), tmp_path, tmp_path / "out") == "3 frames"
    for i in range(3):
        Image.new("L", (48, 48)).save(tmp_path / f"{i:03}-mask.png")
    with pytest.raises(ValueError, match="not visible in any frame"):
        recipe.predict(recipe.build(), tmp_path, tmp_path / "out")
    Image.new("L", (48, 40), 255).save(tmp_path / "001-mask.png")
    with pytest.raises(ValueError, match="must have one size"):
        recipe.predict(recipe.build(), tmp_path, tmp_path / "out")
    (tmp_path / "002.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"002\.png cannot be read as a picture"):
        recipe.predict(recipe.build(), tmp_path, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold frames"):
        recipe.predict(recipe.build(), tmp_path / "empty", tmp_path / "out")


@pytest.mark.slow
def test_onnx_is_what_the_model_is(tmp_path):
    pytest.importorskip("onnxscript")
    recipe = Amodal(dataclasses.replace(TINY, frames=2))
    torch.manual_seed(0)
    model = recipe.build().eval()
    recipe.export(model, tmp_path)  # compares with PyTorch itself
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "eoras.onnx"}
    clip = recipe.prepared([recipe.track(3, held_out=True)])
    with torch.no_grad():
        whole, parts = model(clip["crops"], clip["intrinsics"]), Masks(model)(clip["crops"], clip["intrinsics"])
    assert torch.equal(parts[0], whole.full)
    assert torch.equal(parts[1], whole.visible)
