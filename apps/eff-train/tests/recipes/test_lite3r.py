"""Lite3R on untrained and slightly trained small models: what must hold whatever was learnt."""

import copy
import dataclasses

import pytest
import torch
from eff_kernels.edit import Distiller, cosine
from eff_train.recipes.lite3r.predict import predict_folder
from eff_train.recipes.lite3r.scores import scores
from eff_train.recipes.lite3r.student import Config, Student, apply_lite3r, load_teacher, projections
from eff_train.recipes.lite3r.teacher import Config as TeacherConfig
from eff_train.recipes.lite3r.teacher import Teacher
from eff_train.recipes.lite3r.views import views_of
from eff_vision.geometry import unproject
from eff_vision.multiview import MultiViewConfig, MultiViewTransformer, attention_layers, projection_parameters
from PIL import Image

TINY = TeacherConfig(steps=8, batch_size=2, dim=32, depth=2, side=32, scenes=8, warmup=0, ema=0.0)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return MultiViewTransformer(MultiViewConfig(dim=64, depth=2, taps=(0, 1), camera_depth=1)).eval()


@pytest.fixture(scope="module")
def scenes():
    return views_of([1, 2], views=3, side=32, spread=50.0)


def test_scenes_are_exact_and_at_one_scale():
    batch = views_of(range(20), views=3, side=32, spread=50.0)
    assert torch.isfinite(batch.depth[batch.valid]).all()
    assert 0.05 < batch.depth[batch.valid].min() < batch.depth.max() < 10
    torch.testing.assert_close(batch.extrinsics[:, 0], torch.eye(3, 4).expand(20, 3, 4), rtol=0, atol=1e-6)
    # A point that two views see has one place: project view 1's points into view 0 and compare depths.
    points = unproject(batch.depth[:, 1], batch.intrinsics[:, 1], batch.extrinsics[:, 1])
    z = points[..., 2]
    pixels = points[..., :2] / z[..., None] * batch.intrinsics[:, 0, 0, 0][:, None, None, None] + 16
    column, row = (pixels[..., i].long() for i in (0, 1))
    inside = (z > 0) & (column >= 0) & (column < 32) & (row >= 0) & (row < 32)
    scene = torch.arange(20)[:, None, None].expand_as(column)
    there = batch.depth[scene[inside], 0, row[inside], column[inside]]
    agree = (there - z[inside]).abs() < 0.05 * z[inside]
    assert agree.float().mean() > 0.6  # others are hidden, or at edges


def test_all_keys_without_the_new_branch_is_the_teacher(teacher, scenes):
    model = copy.deepcopy(teacher)
    handle = apply_lite3r(model, Config(keep_ratio=1.0, init_std=0.0, fp8=False, min_tokens=0))
    a, b = model(scenes.images), teacher(scenes.images)
    torch.testing.assert_close(a.depth, b.depth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.pose_enc, b.pose_enc, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert torch.equal(model(scenes.images).depth, b.depth)
    assert list(model.state_dict()) == list(teacher.state_dict())


@pytest.mark.parametrize("selection", ["token", "block"])
def test_only_projections_learn_and_all_of_it_can_be_undone(teacher, scenes, selection):
    model = copy.deepcopy(teacher)
    handle = apply_lite3r(model, Config(keep_ratio=0.3, selection=selection, min_tokens=0))
    count = sum(p.numel() for p in projections(model))
    assert count == projection_parameters(attention_layers(teacher))
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(projections(model), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        out = model(scenes.images)
        (out.depth.mean() + out.pose_enc.square().mean()).backward()
        assert all((p.grad is not None) == p.requires_grad for n, p in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".sla." in n for n in changed)
    handle.remove()
    assert torch.equal(model(scenes.images).depth, teacher(scenes.images).depth)


def test_fewer_keys_are_farther_away(teacher, scenes):
    apart = []
    for keep in (0.5, 0.3, 0.1):
        model = copy.deepcopy(teacher)
        apply_lite3r(model, Config(keep_ratio=keep, init_std=0.0, fp8=False))
        with torch.no_grad():
            apart.append(float((model(scenes.images).depth - teacher(scenes.images).depth).abs().mean()))
    assert apart[0] < apart[1] < apart[2]


def test_distance_of_attention(teacher, scenes):
    weight = cosine(0.1, 0.01)
    assert [weight(t) for t in (0, 0.5, 1)] == pytest.approx([0.1, 0.055, 0.01])
    name, layer = next(iter(attention_layers(model := copy.deepcopy(teacher)).items()))
    for shift in (0.0, 0.2):
        hook = layer.register_forward_hook(lambda module, args, out, shift=shift: out + shift)
        with torch.no_grad(), Distiller(model, teacher, [name]) as distiller:
            teacher(scenes.images)
            model(scenes.images)
            assert distiller.loss() == pytest.approx(shift**2, abs=1e-6)
        hook.remove()


@pytest.fixture
def without_onnx(monkeypatch):
    """Exports of weights alone: a test of its own writes and runs ONNX."""
    monkeypatch.setattr("eff_train.frame.onnx.write_onnx", lambda *_: 0.0)


@pytest.mark.usefixtures("without_onnx")
def test_the_whole_way(tmp_path, train_into):
    _, status = train_into(tmp_path / "teacher", TINY, Teacher)
    assert status == 0
    folder = tmp_path / "exported"
    folder.mkdir()
    recipe = Teacher(TINY)
    model = recipe.build()
    recipe.export(model, folder)
    loaded = load_teacher(folder)
    x = torch.rand(1, 2, 3, 32, 32)
    torch.testing.assert_close(loaded(x).depth, model.half().float()(x).depth)
    config = Config(steps=4, batch_size=2, warmup=0, teacher=folder, side=32, scenes=8, keep_ratio=0.2)
    _, status = train_into(tmp_path / "student", config, Student)
    assert status == 0
    found = Student(config).evaluate(Student(config).build())
    assert {"abs_rel", "teacher_abs_rel", "abs_rel_over_teacher"} <= set(found)
    with pytest.raises(FileNotFoundError, match="export it"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="group"):
        apply_lite3r(model, dataclasses.replace(config, layers="encoder"))


@pytest.mark.slow
def test_onnx_is_what_the_teacher_is(tmp_path):
    pytest.importorskip("onnxscript")
    recipe = Teacher(TINY)
    recipe.export(recipe.build().eval(), tmp_path)  # compares with PyTorch itself
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "views.onnx"}


def test_a_folder_of_pictures(tmp_path, teacher):
    for i in range(2):
        Image.effect_noise((50, 40), 60).convert("RGB").save(tmp_path / f"{i}.png")
    said = predict_folder(teacher, tmp_path, tmp_path / "out", 32)
    assert said.startswith("2 views")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "0-depth.png",
        "1-depth.png",
        "cameras.json",
        "points.glb",
        "points.ply",
    }
    assert (tmp_path / "out" / "points.glb").read_bytes()[:4] == b"glTF"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no"):
        predict_folder(teacher, tmp_path / "empty", tmp_path / "out", 32)


def test_scores_do_not_see_the_scale(teacher, scenes):
    class Scaled(torch.nn.Module):
        def forward(self, images):
            out = teacher(images)
            return out._replace(depth=out.depth * 7)

    assert scores(Scaled(), [scenes])["abs_rel"] == pytest.approx(scores(teacher, [scenes])["abs_rel"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_do_what_one_does_in_two_parts(tmp_path, python):
    """DDP and FSDP2 with a frozen teacher, swapped attention and FP8: losses are those of a batch in two parts."""
    from eff_train.cli import main
    from eff_train.frame.metrics import read_metrics

    def words(**options):
        return [w for name, value in options.items() for w in (f"--{name.replace('_', '-')}", str(value))]

    common = {
        "steps": 3,
        "batch_size": 2,
        "side": 32,
        "eval_every": 3,
        "save_every": 3,
        "log_every": 1,
        "device": "cpu",
    }
    small = words(dim=32, depth=2, scenes=8, warmup=0)
    assert main(["run", "lite3r/teacher", "--folder", str(tmp_path / "t"), *words(**common), *small]) == 0
    assert main(["export", str(tmp_path / "t"), str(tmp_path / "teacher")]) == 0
    student = ["lite3r/student", *words(**common, teacher=tmp_path / "teacher", warmup=1)]
    assert main(["run", *student, "--folder", str(tmp_path / "one"), "--accumulate", "2"]) == 0
    wanted = read_metrics(tmp_path / "one" / "metrics.jsonl")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "eff_train", "run"]
    for kind in ("ddp", "fsdp"):
        done = python(*torchrun, *student, "--folder", kind, "--parallel", kind, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        found = read_metrics(tmp_path / kind / "metrics.jsonl")
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            for name in set(b) - {"samples_per_second", "seconds"}:
                same = pytest.approx(b[name], rel=1e-3, abs=1e-5) if isinstance(b[name], float) else b[name]
                assert a[name] == same, (kind, name)
