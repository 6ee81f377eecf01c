"""Damaged heads in models of diffusers."""

import pytest
import torch
from eff_guidance.head_guidance import (
    Head,
    SoftPAGConfig,
    apply_head_perturbation,
    heads_of_layers,
    list_heads,
    list_layers,
    perturbed_heads,
)
from eff_kernels.edit.attention import observe_attention

KINDS = ["sd3", "sd3.5", "flux", "sd15", "sdxl"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@torch.no_grad()
def run(model, given):
    return model(**given, return_dict=False)[0]


def everything(model):
    return SoftPAGConfig(heads=list_heads(model, parts=("attn", "attn2")))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_do_is_bit_identical_and_removing_gives_all_back(tiny, kind):
    model = tiny.model(kind)
    given = tiny.inputs(model, count=2)
    before, processors = run(model, given), dict(model.attn_processors)
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    for config in (SoftPAGConfig(heads=[]), SoftPAGConfig(heads="all", strength=0)):
        with apply_head_perturbation(model, config):
            assert torch.equal(run(model, given), before)
    handle = apply_head_perturbation(model, everything(model))
    assert not torch.allclose(run(model, given), before)
    handle.disable()
    assert torch.equal(run(model, given), before)
    handle.enable()
    handle.set_strength(0.0)
    assert torch.equal(run(model, given), before)
    handle.remove()
    handle.remove()
    assert torch.equal(run(model, given), before)
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    for name, module in model.named_modules():
        assert vars(module).keys() == state[name].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_all_heads_at_full_strength_give_the_values(tiny, kind):
    """What diffusers' PAG does: attention returns its values, in image and text rows alike."""
    model = tiny.model(kind)
    seen = []

    def look(call, output):
        seen.append((call.name, torch.equal(output.out, call.v), call.streams))

    names = {at.name for at in list_layers(model)}
    with apply_head_perturbation(model, SoftPAGConfig(heads="all")), observe_attention(model, look):
        run(model, tiny.inputs(model))
    assert {name for name, same, _ in seen if same} == names
    if kind in ("sd3", "flux"):
        assert all(streams for _, _, streams in seen)


@pytest.mark.parametrize(
    ("kind", "target"), [("sd3", "image_identity"), ("flux", "image_identity"), ("flux", "query_mean_text")]
)
def test_targets_of_streams_know_where_the_text_is(tiny, kind, target):
    model = tiny.model(kind)
    seen = []

    def look(call, output):
        with torch.no_grad():
            plain = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v, scale=call.scale)
        seen.append({name: torch.equal(output.out[:, :, at], plain[:, :, at]) for name, at in call.streams.items()})

    with apply_head_perturbation(model, SoftPAGConfig(heads="all", target=target)), observe_attention(model, look):
        run(model, tiny.inputs(model, tokens=5))
    kept = "text" if target.startswith("image") else "image"
    assert seen
    assert all(rows[kept] and not all(rows.values()) for rows in seen)


@pytest.mark.parametrize("kind", ["sd3.5", "sd15"])
def test_targets_of_streams_need_two_streams(tiny, kind):
    model = tiny.model(kind)
    heads = [(0, 0, "attn2")] if kind == "sd3.5" else "all"
    with (
        apply_head_perturbation(model, SoftPAGConfig(heads=heads, target="image_renorm")),
        pytest.raises(ValueError, match="no text beside the image"),
    ):
        run(model, tiny.inputs(model))


@pytest.mark.parametrize("kind", ["sd3", "flux", "sd15"])
def test_a_head_changes_its_own_slice_and_deltas_add_up(tiny, kind):
    """At the input of the output projection of one layer."""
    model = tiny.model(kind)
    given, layer = tiny.inputs(model), 0
    at = list_layers(model)[layer]
    dim = model.get_submodule(at.name).inner_dim // at.num_heads

    def output_of(heads):
        found = []
        with (
            apply_head_perturbation(model, SoftPAGConfig(heads=[(layer, h) for h in heads], strength=0.7)),
            observe_attention(model, lambda call, output: found.append(output.out.clone()), where=at.name),
        ):
            run(model, given)
        return found[0].transpose(1, 2).flatten(2)  # [B, N, H * D], as the projection gets it

    plain = output_of([])
    deltas = []
    for head in range(at.num_heads):
        delta = output_of([head]) - plain
        own = slice(head * dim, (head + 1) * dim)
        assert delta[..., own].abs().max() > 0
        delta_elsewhere = delta.clone()
        delta_elsewhere[..., own] = 0
        assert torch.equal(delta_elsewhere, torch.zeros_like(delta))
        deltas.append(delta)
    torch.testing.assert_close(sum(deltas), output_of(range(at.num_heads)) - plain, rtol=0, atol=1e-6)


def test_text_rows_are_damaged_too(tiny):
    model = tiny.model("sd3")
    seen = []
    with (
        apply_head_perturbation(model, SoftPAGConfig(heads=[(1, 0)])),
        observe_attention(model, lambda call, out: seen.append((call, out.out)), where="*.1.attn"),
    ):
        run(model, tiny.inputs(model))
    call, out = seen[0]
    assert torch.equal(out[:, 0, call.streams["text"]], call.v[:, 0, call.streams["text"]])


def test_lists_of_heads(tiny):
    assert list_heads(tiny.model("sd3")) == [Head(layer, h) for layer in range(3) for h in range(2)]
    dual = list_heads(tiny.model("sd3.5"), parts=("attn", "attn2"))
    assert dual[:5] == [Head(0, 0), Head(0, 1), Head(0, 0, "attn2"), Head(0, 1, "attn2"), Head(1, 0)]
    assert [(at.layer, at.name) for at in list_layers(tiny.model("flux"))][1:3] == [
        (1, "transformer_blocks.1.attn"),
        (2, "single_transformer_blocks.0.attn"),
    ]
    names = [at.name.split(".")[0] for at in list_layers(tiny.model("sdxl"))]
    assert names == ["down_blocks"] * 2 + ["mid_block"] * 2 + ["up_blocks"] * 4
    assert heads_of_layers(tiny.model("sd3"), 2) == [Head(2, 0), Head(2, 1)]
    with pytest.raises(ValueError, match=r"layers \[3\] do not exist; the model has 0..2"):
        heads_of_layers(tiny.model("sd3"), [3])
    with pytest.raises(TypeError, match="not in Linear"):
        list_heads(torch.nn.Linear(1, 1))


def test_layers_run_in_the_order_of_their_numbers(tiny):
    for kind in ("sd3.5", "flux", "sdxl"):
        model = tiny.model(kind)
        seen = []
        wanted = [at.name for at in list_layers(model, parts=("attn", "attn2"))]
        with observe_attention(model, lambda call, out, seen=seen: seen.append(call.name), where=wanted):
            run(model, tiny.inputs(model))
        assert seen == wanted


@pytest.mark.parametrize(
    ("heads", "text"),
    [
        ([(3, 0)], r"layers with 'attn' are 0..2"),
        ([(-1, 0)], r"layers with 'attn' are 0..2"),
        ([(1, 2)], r"layer 1 \(transformer_blocks.1.attn\) has heads 0..1"),
        ([(1, 0), ("transformer_blocks.1.attn", 0)], "named twice, also as"),
        ([(0, 0, "attn2")], "has no 'attn2'"),
        ([("blocks.7", 0)], "'blocks.7' is no attention of this model; such is 'transformer_blocks.0.attn'"),
    ],
)
def test_heads_that_do_not_exist(tiny, heads, text):
    with pytest.raises(ValueError, match=text):
        apply_head_perturbation(tiny.model("sd3"), SoftPAGConfig(heads=heads))


def test_cross_attention_of_a_unet_cannot_be_named(tiny):
    with pytest.raises(ValueError, match="never cross-attention"):
        apply_head_perturbation(tiny.model("sd15"), SoftPAGConfig(heads=[("attn2", 0, 0)]))


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"heads": [(0,)]}, ValueError, "is not a head"),
        ({"heads": [(0, 1, "attn3")]}, ValueError, "is not a head"),
        ({"heads": "some"}, ValueError, "all"),
        ({"heads": "all", "strength": -0.1}, ValueError, "strength=-0.1; use 0 to 1"),
        ({"heads": [(0, 1)], "strength": (1.0, 0.5)}, ValueError, "2 strengths for 1 heads"),
        ({"heads": "all", "start": 0.6, "stop": 0.5}, ValueError, "start=0.6, stop=0.5"),
        ({"heads": "all", "target": "max", "path": "slerp"}, ValueError, "path='slerp' is for target 'identity'"),
        ({"heads": "all", "target": "blur"}, ValueError, "target='blur'"),
        ({"heads": "all", "scale": float("inf")}, ValueError, "scale=inf"),
        ({"heads": "all", "scale": "3"}, TypeError, "scale='3'"),
    ],
)
def test_bad_settings(values, error, text):
    with pytest.raises(error, match=text):
        SoftPAGConfig(**values)


def test_settings_travel_as_json():
    config = SoftPAGConfig(heads=[("attn2", 1, 0), (2, 3)], strength=(0.5, 1.0), target="uniform", scale=2.0, stop=0.5)
    assert config.named == (Head(1, 0, "attn2"), Head(2, 3))
    assert SoftPAGConfig.from_dict(config.to_dict()) == config


def test_strengths_go_to_their_heads_in_any_order(tiny):
    model = tiny.model("sd3")
    given = tiny.inputs(model)
    with apply_head_perturbation(model, SoftPAGConfig(heads=[(1, 1), (1, 0)], strength=(1.0, 0.0))):
        one = run(model, given)
    with apply_head_perturbation(model, SoftPAGConfig(heads=[(1, 1)])) as handle:
        torch.testing.assert_close(run(model, given), one)
        with pytest.raises(ValueError, match="2 strengths for 1 heads"):
            handle.set_strength((0.5, 0.5))


def test_nested_damage_needs_an_order_and_an_error_leaves_nothing(tiny):
    model = tiny.model("sd3")
    given = tiny.inputs(model)
    before = run(model, given)
    with pytest.raises(RuntimeError, match="inside"), perturbed_heads(model, SoftPAGConfig(heads="all")):
        raise RuntimeError("inside")
    assert torch.equal(run(model, given), before)
    with perturbed_heads(model, SoftPAGConfig(heads=[(0, 0)])):
        one = run(model, given)
        with pytest.raises(ValueError, match="give each its own order"):
            apply_head_perturbation(model, SoftPAGConfig(heads=[(0, 1)]))
        assert torch.equal(run(model, given), one)
    with (
        perturbed_heads(model, SoftPAGConfig(heads=[(0, 0)]), order=0),
        perturbed_heads(model, SoftPAGConfig(heads=[(0, 1)]), order=1),
    ):
        two = run(model, given)
    with perturbed_heads(model, SoftPAGConfig(heads=[(0, 0), (0, 1)])):
        torch.testing.assert_close(run(model, given), two)


def test_a_forward_that_raises_leaves_the_damage_as_it_was(tiny):
    model = tiny.model("flux")
    given = tiny.inputs(model)
    with apply_head_perturbation(model, SoftPAGConfig(heads="all")):
        damaged = run(model, given)
        with pytest.raises(RuntimeError):
            run(model, {**given, "hidden_states": given["hidden_states"][..., :3]})
        assert torch.equal(run(model, given), damaged)


@pytest.mark.parametrize("path", ["slerp", "log_linear"])
def test_other_paths_run_in_models(tiny, path):
    model = tiny.model("flux")
    given = tiny.inputs(model)
    plain = run(model, given)
    ends = {}
    for way in ("linear", path):
        with apply_head_perturbation(model, SoftPAGConfig(heads="all", path=way)) as handle:
            ends[way] = run(model, given)
            handle.set_strength(0.5)
            ends[way, 0.5] = run(model, given)
    torch.testing.assert_close(ends[path], ends["linear"], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(ends[path, 0.5], ends["linear", 0.5])
    assert not torch.allclose(ends[path, 0.5], plain)
