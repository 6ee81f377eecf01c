import pytest
import torch
from eff_train.recipes.eoras import Amodal, Config, track_of
from PIL import Image

TINY = Config(steps=6, batch_size=2, warmup=0, dim=16, crop=32, side=48, frames=3, clips=2, eval_every=0, save_every=3)


def test_tracks_hide_their_object():
    for seed in range(3):
        track = track_of(seed, 4, 64)
        share = track.visible.flatten(1).sum(1) / track.full.flatten(1).sum(1)
        assert share.min() <= 0.8 <= share.max()
        assert not (track.visible & ~track.full).any()
        x0, y0, x1, y1 = track.boxes[0].tolist()
        assert track.visible[0, y0:y1, x0:x1].sum() == track.visible[0].sum()


def test_the_whole_way(tmp_path, train_into):
    _, status = train_into(tmp_path / "run", TINY, Amodal)
    assert status == 0
    recipe = Amodal(TINY)
    model = recipe.build()
    found = recipe.evaluate(model)
    assert 0 <= found["miou_full"] <= 1
    recipe.samples(model, tmp_path)
    assert (tmp_path / "masks.png").is_file()
    single = Amodal(Config(**{**vars_of(TINY), "single": True}))
    assert single.batch(range(2))["crops"].shape == (6, 1, 3, 32, 32)
    assert torch.isfinite(single.loss(single.build(), single.batch(range(2)))[0])


def vars_of(config):
    import dataclasses

    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def test_prediction(tmp_path):
    recipe = Amodal(TINY)
    track = track_of(0, 3, 48)
    for i in range(3):
        Image.fromarray((track.frames[i].movedim(0, -1) * 255).byte().numpy()).save(tmp_path / f"{i:03}.png")
        Image.fromarray(track.visible[i].byte().mul(255).numpy()).save(tmp_path / f"{i:03}-mask.png")
    assert recipe.predict(recipe.build().eval(), tmp_path, tmp_path / "out") == "3 frames"
    assert len(list((tmp_path / "out").iterdir())) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold frames"):
        recipe.predict(recipe.build(), tmp_path / "empty", tmp_path / "out")
