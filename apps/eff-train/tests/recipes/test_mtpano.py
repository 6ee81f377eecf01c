import dataclasses

import pytest
import torch
from eff_train.recipes.mtpano import Config, Panorama
from eff_vision.panorama import IGNORE
from PIL import Image

TINY = Config(
    steps=4, batch_size=2, warmup=0, height=32, dim=32, bridge=16, patches=4, rooms=2, eval_every=0, save_every=2
)


def test_labels_are_exact_but_for_their_noise():
    recipe = Panorama(dataclasses.replace(TINY, scale_noise=0.0, label_noise=0.0, depth_labels="merged", patches=12))
    picture, labels = recipe.labelled(3)
    assert picture.shape == (3, 32, 64)
    known = labels["semseg"] != IGNORE
    assert known.float().mean() > 0.6
    assert ((labels["depth"][0] > 0) == known).all()
    rays = torch.nn.functional.normalize(labels["normals"], dim=0)
    torch.testing.assert_close(labels["normals"][:, known], rays[:, known], rtol=1e-3, atol=1e-3)
    noisy = Panorama(dataclasses.replace(TINY, depth_labels="patch")).labelled(3)[1]["depth"]
    assert 0 < (noisy > 0).float().mean() < 0.5  # one patch


@pytest.mark.parametrize("streams", [1, 2])
def test_the_whole_way(tmp_path, train_into, streams):
    config = dataclasses.replace(TINY, streams=streams)
    _, status = train_into(tmp_path / "run", config, Panorama)
    assert status == 0
    recipe = Panorama(config)
    model = recipe.build().eval()
    found = recipe.evaluate(model)
    assert set(found) == {"miou", "abs_rel", "normals"}
    recipe.samples(model, tmp_path)
    with Image.open(tmp_path / "rooms.png") as shown:
        assert shown.size == (4 * 64, config.rooms * 32)


def test_prediction(tmp_path):
    recipe = Panorama(TINY)
    Image.effect_noise((128, 64), 60).convert("RGB").save(tmp_path / "p.png")
    said = recipe.predict(recipe.build().eval(), tmp_path / "p.png", tmp_path / "out")
    assert said == "p-tasks.png, p.html and p.ply"
    page = (tmp_path / "out" / "p.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "{{" not in page
    assert "http" not in page  # it works without a network
    Image.new("RGB", (60, 60)).save(tmp_path / "q.png")
    with pytest.raises(ValueError, match="twice as wide"):
        recipe.predict(recipe.build(), tmp_path / "q.png", tmp_path / "out")
    (tmp_path / "q.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        recipe.predict(recipe.build(), tmp_path / "q.png", tmp_path / "out")


def test_a_page_with_hostile_names(tmp_path):
    from eff_train.panorama_page import write_panorama_page

    write_panorama_page(tmp_path / "p.html", "</title><b>{{maps}}", {"</script>": Image.new("RGB", (8, 4))})
    page = (tmp_path / "p.html").read_text()
    assert page.count("</title>") == page.count("</script>") == 1
    assert page.count("data:image") == 1
    for maps in ({}, {"picture": Image.new("RGB", (8, 5))}):
        with pytest.raises(ValueError, match=r"empty|twice as wide"):
            write_panorama_page(tmp_path / "q.html", "q", maps)


@pytest.mark.slow
def test_onnx_is_what_the_model_is(tmp_path):
    pytest.importorskip("onnxscript")
    recipe = Panorama(dataclasses.replace(TINY, rooms=1))
    torch.manual_seed(0)
    model = recipe.build()
    for p in model.parameters():  # all that comes between begins at zero, and would hide what is written wrongly
        p.data += 0.02 * torch.randn_like(p)
    recipe.export(model.eval(), tmp_path)  # compares with PyTorch itself
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "mtpano.onnx"}
