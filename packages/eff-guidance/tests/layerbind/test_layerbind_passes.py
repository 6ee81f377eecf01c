"""What each stream sees: one evaluation of the transformer beside layers, against masked attention written out."""

import pytest
import torch
from eff_guidance.layerbind import Grid, Layer, LayerBindConfig, Layout, apply_layerbind, regions_of
from eff_guidance.layerbind.hosts import Host
from eff_guidance.layerbind.passes import BranchPass, NursingPass, Stream
from eff_kernels.edit.attention import observe_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

KINDS = ["sd3", "sd3.5", "flux"]
LAYOUT = Layout(
    layers=(Layer(prompt="front", box=(0.25, 0.25, 0.75, 0.75)), Layer(prompt="back", box=(0.5, 0.5, 1, 1)))
)


class Case:
    """A tiny model in which layers can take part, and arguments of one call (8 x 8 picture tokens, 2 pictures)."""

    def __init__(self, tiny, kind, scene, layout=LAYOUT):
        self.pipe = tiny.pipeline(kind)
        self.model = self.pipe.transformer
        self.host = Host.of(self.model)
        self.args = {**tiny.inputs(self.model, count=2), "return_dict": False}
        self.regions = regions_of(layout, Grid(8, 8))
        self.handle = apply_layerbind(self.pipe, layout, prompts=scene.prompts(self.pipe, len(layout.layers)))
        self.prompts = tiny.prompts(self.pipe, count=2, seed=9)

    def streams(self, *, texts=(7, 7), seed=5):
        draw = torch.Generator().manual_seed(seed)
        pooled = self.args["pooled_projections"].shape[-1]
        tokens = self.host.to_tokens(self.model, self.args["hidden_states"])
        return [
            Stream(
                r,
                tokens[:, r.idx].clone(),
                torch.randn(2, n, 32, generator=draw),
                torch.randn(2, pooled, generator=draw),
            )
            for r, n in zip(self.regions, texts, strict=False)
        ]

    def run(self, streams, *, hard=(), reverse=False):
        step = BranchPass(self.host, self.model, self.args, streams, hard=frozenset(hard), reverse=reverse)
        with step.active():
            out = self.model(**self.args)[0]
        return out, [s.velocity for s in streams]


@pytest.fixture
def case(tiny, scene):
    return lambda kind, layout=LAYOUT: Case(tiny, kind, scene, layout)


@pytest.mark.parametrize("kind", KINDS)
def test_the_background_is_as_without_layers_unless_it_looks_at_them(case, kind):
    made = case(kind)
    plain = made.model(**made.args)[0]
    assert torch.equal(made.run(made.streams())[0], plain)
    assert torch.equal(made.run(made.streams(), hard=(0, 1, 2))[0], plain)
    assert not torch.equal(made.run(made.streams(), hard=(0,), reverse=True)[0], plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_covers_all_is_an_ordinary_picture(case, kind):
    made = case(kind, Layout(layers=(Layer(prompt="a", box=(0, 0, 1, 1)),)))
    (stream,) = made.streams()
    args = made.host.with_text(made.args, stream.text, stream.pooled)
    wanted = made.model(**args)[0]
    _, (velocity,) = made.run([stream])
    found = made.host.from_tokens(made.model, velocity, Grid(8, 8))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hard", [(), (0, 1)])
def test_branches_do_not_see_each_other(case, kind, hard):
    made = case(kind)
    both = made.streams()
    _, (_, second) = made.run(both, hard=hard)
    other = made.streams()
    other[0].text = other[0].text + 1
    other[0].tokens = other[0].tokens.requires_grad_()
    with torch.enable_grad():
        _, (first, found) = made.run(other, hard=hard)
        assert torch.equal(found, second)
        by = other[0].tokens
        assert torch.autograd.grad(first.square().sum(), by, retain_graph=True)[0].any()
        if found.requires_grad:  # one batch with the first
            (none,) = torch.autograd.grad(found.square().sum(), by)
            assert not none.any()
    alone = made.streams()[1:]
    assert (made.run(alone, hard=hard)[1][0] - second).norm() <= 1e-5 * second.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_storage_order_does_not_matter(case, kind):
    made = case(kind)
    out, (first, second) = made.run(made.streams(), hard=(1,), reverse=True)
    turned = made.streams()[::-1]
    again, (b, a) = made.run(turned, hard=(1,), reverse=True)
    for found, wanted in ((again, out), (a, first), (b, second)):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_branches_have_the_positions_of_their_tokens(case):
    made = case("flux")
    region = made.regions[0]
    ids = torch.cat([torch.zeros(4, 3), made.args["img_ids"]])
    cos, sin = made.model.pos_embed(ids)
    own = made.host.block_arguments(made.model, made.args, 4, region.idx)["image_rotary_emb"]
    at = torch.cat([torch.arange(4), region.idx + 4])
    assert torch.equal(own[0], cos[at])
    assert torch.equal(own[1], sin[at])
    made = case("sd3")
    tokens = made.host.to_tokens(made.model, made.args["hidden_states"])
    whole = made.model.pos_embed(made.args["hidden_states"])
    idx = made.regions[0].idx
    found = made.host.embed(made.model, made.args["hidden_states"] * 0, tokens[:, idx], idx, Grid(8, 8))
    assert torch.allclose(found, whole[:, idx], atol=1e-6)


def masked_rows(q, k, v, keep):
    logits = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    return logits.masked_fill(~keep, -torch.inf).softmax(-1) @ v.double()


class Watch:
    """Attention calls as they come (before the pass looks at them) and their results."""

    def __init__(self, made):
        self.calls = []
        self.handle = observe_attention(made.model, lambda call, output: self.calls.append((call, output.out)))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("texts", [(4, 7), (7, 7)])
def test_phase_one_is_masked_attention(case, kind, hard, texts):
    """All streams joined in one sequence under one mask give the same, in the first block."""
    made = case(kind)
    watch, streams = Watch(made), made.streams(texts=texts)
    made.run(streams, hard=(0,) if hard else (), reverse=True)
    together = kind == "sd3" and texts == (7, 7)  # branches of one size are one batch
    calls = watch.calls[: 2 if together else 3]
    glob, out = calls.pop(-1 if hard else 0)
    branches = [
        (call, *parts)
        for call, found in calls
        for parts in zip(*(x.split(2) for x in (call.q, call.k, call.v, found)), strict=False)
    ]
    if not hard:  # what a branch sees of the background stands behind its own keys
        branches = [(c, q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]], o) for c, q, k, v, o in branches]
    picture = glob.streams["image"]
    # sequence: the background's own, then each branch's
    q, k, v = (
        torch.cat([own, *(b[i] for b in branches)], 2) for i, own in enumerate((glob.q, glob.k, glob.v), start=1)
    )
    keep = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
    size, at = glob.num_queries, glob.num_queries
    keep[:size, :size] = True
    for (call, *_), region in zip(branches, made.regions, strict=True):
        own = slice(at, at + call.num_queries)
        keep[own, own] = True
        outside = region.outside + picture.start
        if hard:
            inner = torch.arange(own.start, own.stop)[call.streams["image"]]
            keep[outside[:, None], inner] = True
        else:
            keep[own.start : own.stop, outside] = True
        at += call.num_queries
    wanted = masked_rows(q, k, v, keep)
    found = torch.cat([out, *(b[4] for b in branches)], 2)
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def nursing(made, *, opacity=0.7, masks=None, texts=(4, 7)):
    """A call of the transformer in phase 2, and the attention calls that it makes."""
    masks = masks or [torch.ones(2, len(r.idx), dtype=torch.bool) for r in made.regions]
    draw = torch.Generator().manual_seed(1)
    words = [torch.randn(2, n, 32, generator=draw) for n in texts[: len(made.regions)]]
    scene = made.args["encoder_hidden_states"]
    text = torch.cat([*words, scene] if made.host.flux else [scene, *words], 1)
    step = NursingPass(made.host, [w.shape[1] for w in words], made.regions, masks, opacity)
    watch = Watch(made)
    with step.active():
        out = made.model(**made.host.with_text(made.args, text, made.args["pooled_projections"]))[0]
    watch.handle.remove()
    return out, watch.calls


@pytest.mark.parametrize("kind", KINDS)
def test_without_opacity_nothing_changes(case, kind):
    made = case(kind)
    plain = made.model(**made.args)[0]
    none = [torch.zeros(2, len(r.idx), dtype=torch.bool) for r in made.regions]
    for out in (nursing(made, opacity=0.0)[0], nursing(made, masks=none)[0]):
        assert (out - plain).norm() <= 1e-6 * plain.norm()
    assert (nursing(made)[0] - plain).norm() > 1e-4 * plain.norm()


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_phase_two_is_masked_attention_composited(case, kind):
    made = case(kind)
    call, out = nursing(made)[1][0]
    n, total = 64, call.num_queries
    order = [("scene", 6), ("back", 4), ("front", 7)]
    if kind == "flux":
        places = {"back": range(4), "front": range(4, 11), "scene": range(11, 17), "image": range(17, 17 + n)}
    else:
        places = {
            "image": range(n),
            "scene": range(n, n + 6),
            "back": range(n + 6, n + 10),
            "front": range(n + 10, n + 17),
        }
    assert total == n + sum(c for _, c in order)
    at = {k: torch.tensor(list(v)) for k, v in places.items()}

    def rows(ask, see):
        keep = torch.zeros(total, total, dtype=torch.bool)
        keep[:, see] = True
        return masked_rows(call.q, call.k, call.v, keep)[:, :, ask]

    both = torch.cat([at["scene"], at["image"]])
    wanted = torch.empty_like(out, dtype=torch.float64)
    wanted[:, :, at["scene"]] = rows(at["scene"], both)
    shown = rows(at["image"], both)
    for name, region in zip(("back", "front"), made.regions, strict=True):
        idx = at["image"][region.idx]
        local = rows(idx, torch.cat([at[name], at["image"]]))
        shown[:, :, region.idx] = 0.3 * shown[:, :, region.idx] + 0.7 * local
        wanted[:, :, at[name]] = rows(at[name], torch.cat([at[name], idx, at["scene"]]))
    wanted[:, :, at["image"]] = shown
    assert (out - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_phase_two_costs_what_its_parts_cost(case, kind):
    """Scores computed in a block: S^2 + sum n_i (T_i + N), and the small text terms."""
    made, seen = case(kind), []

    class Count(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is scaled_dot_product_attention:
                seen.append(args[0].shape[2] * args[1].shape[2])
            return func(*args, **(kwargs or {}))

    with Count():
        nursing(made)
    n, scene, texts = 64, 6, (4, 7)
    sizes = [len(r.idx) for r in made.regions]
    wanted = (n + scene) ** 2
    wanted += sum(m * (t + n) for m, t in zip(sizes, texts, strict=True))
    wanted += sum(t * (t + m + scene) for m, t in zip(sizes, texts, strict=True))
    joint = {"sd3": 3, "sd3.5": 3, "flux": 4}[kind]
    second = {"sd3.5": 2}.get(kind, 0)  # attention of picture tokens alone
    assert sum(seen) == joint * wanted + second * n * n


def test_own_masks_are_refused(case):
    made = case("flux")
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool)
    step = BranchPass(made.host, made.model, made.args, made.streams(), hard=frozenset(), reverse=False)
    with step.active(), pytest.raises(ValueError, match="got an attention mask"):
        made.model(**made.args, joint_attention_kwargs={"attention_mask": mask})


def test_settings_of_own_depth_are_checked(tiny, scene):
    pipe = tiny.pipeline("sd3")
    with pytest.raises(ValueError, match="no block"):
        apply_layerbind(pipe, scene.layout, LayerBindConfig(hard_blocks=(5,)), prompts=scene.prompts(pipe))
