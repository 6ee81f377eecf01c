"""The brush in transformers of FLUX's and SD3's class."""

import copy
import pickle
import threading

import pytest
import torch
from eff_guidance.context_brush import CanvasSpans, ContextBrushConfig, apply_incontext_brush
from eff_kernels.edit.attention import intercept_attention

SPANS = CanvasSpans(grid=(8, 8), subjects=((0, 0, 4, 8),), query=(4, 0, 8, 8))
SIDE_BY_SIDE = CanvasSpans(grid=(8, 8), subjects=((0, 0, 8, 4),), query=(0, 4, 8, 8))
OFF = ContextBrushConfig(shift_image=0, shift_text=0, head_gain=0)
NAMES = ("flux", "sd3", "sd3.5")

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def run(model, tiny, **more):
    return model(**tiny.inputs(model, count=2, **more)).sample


@pytest.mark.parametrize("name", NAMES)
def test_off_is_bit_identical(tiny, name):
    model = tiny.model(name)
    before = run(model, tiny)
    for config in (OFF, ContextBrushConfig(start=0.3, stop=0.3)):
        with apply_incontext_brush(model, SPANS, config):
            assert torch.equal(run(model, tiny), before)
    handle = apply_incontext_brush(model, SPANS)
    changed = run(model, tiny)
    assert not torch.equal(changed, before)
    handle.disable()
    assert torch.equal(run(model, tiny), before)
    handle.enable()
    assert torch.equal(run(model, tiny), changed)
    handle.remove()
    handle.remove()
    assert torch.equal(run(model, tiny), before)
    assert not any("forward" in vars(m) for m in model.modules())
    apply_incontext_brush(model, SPANS).remove()


def by_hand(call, config, spans):
    """The brush on one call, from whole weights in float64."""
    q, k, v = (t.double() for t in (call.q, call.k, call.v))
    mask = 0 if call.mask is None else call.additive_mask().double()
    weights = (q @ k.mT * call.scale + mask).softmax(-1)
    text = torch.arange(k.shape[2])[call.streams["text"]]
    image = torch.arange(k.shape[2])[call.streams["image"]]
    query, subject = image[spans.query_index()], image[spans.subject_index()]
    out = weights @ v
    double = call.module.added_kv_proj_dim is not None
    if ("double" if double else "single") in config.blocks:
        for keys, share in ((subject, config.shift_image), (text, config.shift_text)):
            out[:, :, query] += share * weights[:, :, query][..., keys] @ v[:, :, keys]
    if ("double" if double else "single") in config.reweight_blocks:
        s = weights[:, :, query][..., text].sum((-1, -2))
        low, high = s.amin(1, keepdim=True), s.amax(1, keepdim=True)
        gains = (1 + config.head_gain * (s - low) / (high - low))[..., None, None]
        if config.head_rows == "all":
            out = out * gains
        else:
            out[:, :, query] *= gains
    return out.to(call.q.dtype)


CONFIGS = [
    ContextBrushConfig(),
    ContextBrushConfig(head_rows="query", blocks=("double", "single"), shift_image=0.5),
    ContextBrushConfig(head_gain=0, shift_text=0, blocks=("single", "double")),
    ContextBrushConfig(reweight_blocks=("single",), shift_image=0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("spans", [SPANS, SIDE_BY_SIDE], ids=["above", "beside"])
@pytest.mark.parametrize("name", NAMES)
def test_in_the_model_as_from_whole_weights(tiny, name, spans, config):
    """20 tokens of text: nothing counts on 512."""
    model = tiny.model(name).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs(model, count=2, tokens=20).items()}
    with apply_incontext_brush(model, spans, config) as handle:
        got = model(**inputs).sample
        joint = [e.name for e in handle.report.changed]
    assert len(joint) == {"flux": 4, "sd3": 3, "sd3.5": 3}[name]
    assert len(handle.report.skipped) == (2 if name == "sd3.5" else 0)
    with intercept_attention(model, lambda call, attend: by_hand(call, config, spans), where=joint):
        want = model(**inputs).sample
    assert (got - want).abs().max() < 1e-10
    assert (got - model(**inputs).sample).abs().max() > 1e-7


def test_beside_is_above_with_tokens_moved(tiny):
    """The same tokens with the same places, in the other order of the canvas, give the same result."""
    model = tiny.model("flux").double()
    given = {k: v.double() for k, v in tiny.inputs(model, count=2).items()}
    order = torch.cat([SIDE_BY_SIDE.subject_index(), SIDE_BY_SIDE.query_index()])
    with apply_incontext_brush(model, SIDE_BY_SIDE):
        beside = model(**given).sample
    moved = {**given, "hidden_states": given["hidden_states"][:, order], "img_ids": given["img_ids"][order]}
    with apply_incontext_brush(model, SPANS):
        above = model(**moved).sample
    assert (above - beside[:, order]).abs().max() < 1e-12


def test_only_rows_of_the_target_are_shifted(tiny):
    model = tiny.model("flux", layers=1, single=0)
    seen = {}

    def keep(key):
        def hook(module, args, output):
            seen[key] = output

        return hook

    for key, config in (("plain", OFF), ("shifted", ContextBrushConfig(head_gain=0))):
        hook = model.transformer_blocks[0].attn.register_forward_hook(keep(key))
        with apply_incontext_brush(model, SPANS, config):
            run(model, tiny)
        hook.remove()
    (image, text), (image2, text2) = seen["plain"], seen["shifted"]
    assert torch.equal(text, text2)
    assert torch.equal(image[:, :32], image2[:, :32])
    assert (image[:, 32:] != image2[:, 32:]).any(-1).all()


def test_samples_do_not_meet(tiny):
    model = tiny.model("sd3").double()
    given = {k: v.double() for k, v in tiny.inputs(model, count=3).items()}
    with apply_incontext_brush(model, SPANS):
        whole = model(**given).sample
        one = model(**{k: v[1:2] for k, v in given.items()}).sample
    assert (whole[1:2] - one).abs().max() < 1e-12


def test_a_mask_of_the_host_counts(tiny):
    """FLUX takes masks; then the parts come from whole weights."""
    model = tiny.model("flux").double()
    given = {k: v.double() for k, v in tiny.inputs(model, tokens=6).items()}
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool)
    mask[..., 4:20] = False
    given["joint_attention_kwargs"] = {"attention_mask": mask}
    config = ContextBrushConfig()
    with apply_incontext_brush(model, SPANS, config) as handle:
        got = model(**given).sample
        names = [e.name for e in handle.report.changed]
    with intercept_attention(model, lambda call, attend: by_hand(call, config, SPANS), where=names):
        want = model(**given).sample
    assert (got - want).abs().max() < 1e-6  # whole weights are computed in float32 at least


def test_beside_another_rule(tiny):
    """A rule outside that changes weights changes the parts, too."""
    model = tiny.model("flux").double()
    given = {k: v.double() for k, v in tiny.inputs(model).items()}

    def sharper(block, part):
        return 2 * block

    def outer(call, attend):
        return attend.with_logits(call, sharper)

    with apply_incontext_brush(model, SPANS, order=1) as handle:
        names = [e.name for e in handle.report.changed]
        with intercept_attention(model, outer, where=names, order=0):
            got = model(**given).sample
    with intercept_attention(
        model,
        lambda call, attend: by_hand(call.replace(scale=2 * call.scale), ContextBrushConfig(), SPANS),
        where=names,
    ):
        want = model(**given).sample
    assert (got - want).abs().max() < 1e-6


def test_a_window_of_steps(tiny):
    pipe = tiny.pipeline("sd3")
    calls = []

    def make(config):
        with apply_incontext_brush(pipe, SPANS, config) as handle:
            seen = []
            inner = handle.rule._now
            handle.rule._now = lambda: seen.append(inner()) or seen[-1]
            out = pipe(
                **tiny.prompts(pipe), height=64, width=64, num_inference_steps=4, output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip
            calls.append(seen)
            return out

    whole, half, none = (make(ContextBrushConfig(stop=s)) for s in (1.0, 0.5, 0.0))
    assert calls[1] == [True] * 6 + [False] * 6  # three blocks a step
    assert not torch.equal(whole, half)
    assert not torch.equal(half, none)


def test_refusals(tiny):
    model = tiny.model("flux")
    handle = apply_incontext_brush(model, SPANS)
    with pytest.raises(ValueError, match="has a brush already"):
        apply_incontext_brush(model, SPANS)
    with pytest.raises(ValueError, match=r"reads 16 picture tokens, the canvas has 8 x 8 = 64"):
        run(model, tiny, side=4)
    handle.remove()
    with pytest.raises(ValueError, match="need the pipeline"):
        apply_incontext_brush(model, SPANS, ContextBrushConfig(stop=0.5))
    with pytest.raises(ValueError, match="no joint attention"):
        apply_incontext_brush(tiny.model("sd15"), SPANS)
    with pytest.raises(TypeError, match="wanted a transformer"):
        apply_incontext_brush(object(), SPANS)


def test_unknown_order_of_tokens(tiny):
    model = tiny.model("flux")

    class Own(type(model.transformer_blocks[0].attn.processor)):
        """A processor of which nobody knows where its text is."""

    Own.__name__ = "OwnProcessor"
    model.transformer_blocks[0].attn.set_processor(Own())
    with apply_incontext_brush(model, SPANS), pytest.raises(ValueError, match="order of its text and picture tokens"):
        run(model, tiny)


def test_copies_and_pickles(tiny):
    model = tiny.model("flux")
    handle = apply_incontext_brush(model, SPANS)
    wanted = run(model, tiny)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    handle.remove()
    for twin in twins:
        assert torch.equal(run(twin, tiny), wanted)


def test_threads(tiny):
    model = tiny.model("flux")
    with apply_incontext_brush(model, SPANS):
        wanted = [run(model, tiny, seed=s) for s in range(4)]
        found = [None] * 4

        def work(i):
            with torch.no_grad():
                found[i] = run(model, tiny, seed=i)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_autocast(tiny):
    model = tiny.model("sd3")
    with apply_incontext_brush(model, SPANS):
        wanted = run(model, tiny)
        with torch.autocast("cpu", torch.bfloat16):
            got = run(model, tiny)
    assert ((got - wanted).norm() / wanted.norm()) < 0.05


def test_compiles_in_one_graph(tiny):
    model = tiny.model("flux", layers=1, single=1)
    with apply_incontext_brush(model, SPANS):
        wanted = run(model, tiny)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        got = compiled(**tiny.inputs(model, count=2)).sample
    assert torch.allclose(got, wanted, atol=1e-6)


def test_gradients_reach_the_prompt(tiny):
    model = tiny.model("flux")
    given = tiny.inputs(model)
    given["encoder_hidden_states"].requires_grad_()
    with torch.enable_grad(), apply_incontext_brush(model, SPANS):
        model(**given).sample.square().sum().backward()
    assert given["encoder_hidden_states"].grad.abs().sum() > 0
