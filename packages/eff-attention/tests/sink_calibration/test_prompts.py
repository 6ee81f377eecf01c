"""Calibration of prompts: against the formulas on whole maps, in batches, in other dtypes, and what stays as it was."""

import copy
import io
import pickle
import threading

import pytest
import torch
from eff_attention.sink_calibration import ACTConfig, apply_act, model_hash, sink_report

HEADS = {0: (0, 3), 1: (1, 2), 2: (0, 1, 2, 3)}
CONFIG = ACTConfig(heads=HEADS)


def logits(model, ids, mask=None):
    more = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return model(input_ids=ids, use_cache=False, **more).logits


@torch.no_grad()
@pytest.mark.parametrize("path", ["explicit", "fast", "auto"])
def test_equals_whole_maps(any_model, ids, reference, path):
    plain = logits(any_model, ids[:1])
    wanted, _ = reference(any_model, ids[:1], HEADS)
    with apply_act(any_model, ACTConfig(heads=HEADS, path=path)):
        found = logits(any_model, ids[:1])
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert (plain - wanted).norm() > 1e-2 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": ("relative", 3.0)}, {"beta": 0.0}, {"spare": "first_sink"}, {"min_rows": 3},
        {"threshold": ("absolute", 0.2), "beta": 0.7},
    ],
)  # fmt: skip
def test_options_equal_whole_maps(model, ids, reference, options):
    wanted, _ = reference(model, ids[:1], HEADS, **options)
    with apply_act(model, ACTConfig(heads=HEADS, **options)):
        found = logits(model, ids[:1])
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("host", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{"beta": 1.0}, {"heads": {}}, {"threshold": ("absolute", 1.1)}])
def test_nothing_to_change_is_bit_identical(any_model, ids, host, options):
    any_model.set_attn_implementation(host)
    before = logits(any_model, ids)
    with apply_act(any_model, ACTConfig(**{"heads": HEADS, **options})):
        assert torch.equal(logits(any_model, ids), before)
    assert torch.equal(logits(any_model, ids), before)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("threshold", [("absolute", 0.1), ("relative", 3.0)])
def test_padding(any_model, ids, side, threshold):
    mask = torch.ones_like(ids)
    real = slice(6, None) if side == "left" else slice(0, -6)
    mask[1] = 0
    mask[1, real] = 1
    with apply_act(any_model, ACTConfig(heads=HEADS, threshold=threshold)):
        found = logits(any_model, ids, mask)
        alone = logits(any_model, ids[1:, real])
        full = logits(any_model, ids[:1])
    assert (found[1:, real] - alone).norm() < 1e-5 * alone.norm()
    assert (found[:1] - full).norm() < 1e-5 * full.norm()


@torch.no_grad()
def test_long_prompt_takes_the_fast_path_and_equals_the_explicit_one(model, ids, monkeypatch):
    from eff_attention.sink_calibration import fast

    long = torch.cat([ids] * 5, 1)
    used, plain = [], fast.calibrated

    def watched(*args):
        used.append(plain(*args) is not None)
        return plain(*args)

    monkeypatch.setattr(fast, "calibrated", watched)
    mask = torch.ones_like(long)
    mask[1, :9] = 0
    threshold = ("absolute", 0.08)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model.to(dtype)
        found = {}
        for path in ("explicit", "auto"):
            config = ACTConfig(heads={2: (0, 1, 3)}, path=path, threshold=threshold, min_rows=8)
            with apply_act(model, config) as handle:
                found[path] = logits(model, long, mask)
            assert sum(s.sinks for s in handle.stats()) > 0
        assert used == [True]
        used.clear()
        assert (found["auto"] - found["explicit"]).float().norm() < bound * found["explicit"].float().norm()


def test_fast_path_says_what_it_does_not_know(model, ids):
    with (
        apply_act(model, ACTConfig(heads=HEADS, path="fast")),
        pytest.raises(NotImplementedError, match="gradients"),
    ):
        logits(model, ids)


@torch.no_grad()
def test_only_listed_heads_change(model, ids):
    taken = []
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: taken.append(a[0]))
    for path in ("explicit", "fast"):
        logits(model, ids)
        with apply_act(model, ACTConfig(heads={1: (2,)}, path=path)):
            logits(model, ids)
        before, after = (t.unflatten(-1, (4, 8)) for t in taken[-2:])
        assert torch.equal(after[:, :, [0, 1, 3]], before[:, :, [0, 1, 3]])
        assert not torch.equal(after[:, :, 2], before[:, :, 2])
    hook.remove()


def test_gradients_are_those_of_whole_maps(model, ids, reference):
    def gradients(out):
        return torch.autograd.grad(out.square().mean(), list(model.parameters()))

    with apply_act(model, CONFIG):
        found = gradients(logits(model, ids[:1]))
    twin = copy.deepcopy(model)
    twin_copy = copy.deepcopy
    try:
        copy.deepcopy = lambda m: m  # the reference then differentiates the twin itself
        out, _ = reference(twin, ids[:1], HEADS)
    finally:
        copy.deepcopy = twin_copy
    wanted = torch.autograd.grad(out.square().mean(), list(twin.parameters()))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


@torch.no_grad()
def test_autocast_and_bfloat16(model, ids):
    with apply_act(model, CONFIG):
        wanted = logits(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = logits(model, ids)
        assert torch.equal(logits(model, ids), wanted)
        half = logits(model.bfloat16(), ids)
    assert (mixed.float() - wanted).norm() < 0.1 * wanted.norm()
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).norm() < 0.1 * wanted.norm()


@torch.no_grad()
def test_copies_pickles_and_threads(model, ids):
    handle = apply_act(model, CONFIG)
    wanted = logits(model, ids)
    notes = handle.stats()
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, again, torch.load(file, weights_only=False)):
        assert torch.equal(logits(other, ids), wanted)
    assert handle.stats() == notes

    results = {}

    @torch.no_grad()
    def work(i):
        part = ids[:, : 20 - 5 * i]
        results[i] = [logits(model, part) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in (0, 1):
        alone = logits(model, ids[:, : 20 - 5 * i])
        assert all(torch.equal(r, alone) for r in results[i])
    assert handle.stats()[0].passes == 2 * (1 + 8 + 2)
    handle.remove()
    assert torch.equal(logits(twin, ids), wanted)


@torch.no_grad()
def test_remove_and_two_at_once(model, ids):
    before = logits(model, ids)
    first = apply_act(model, CONFIG)
    with pytest.raises(ValueError, match="order"):
        apply_act(model, CONFIG)
    alone = logits(model, ids)
    first.remove()
    assert torch.equal(logits(model, ids), before)
    found = []
    for _ in range(2):
        with apply_act(model, CONFIG, order=1), apply_act(model, ACTConfig(heads=HEADS, beta=0.8), order=2):
            found.append(logits(model, ids))
    assert torch.equal(*found)
    assert not torch.equal(found[0], alone)
    assert torch.equal(logits(model, ids), before)
    assert not model.base_model._forward_pre_hooks
    assert not model.base_model._forward_hooks


@torch.no_grad()
def test_statistics_and_report(model, ids, reference):
    from eff_attention.sink_calibration import find_attention_sinks

    _, maps = reference(model, ids[:1], {})
    config = ACTConfig(layers=(0, 1, 2), beta=0.4)
    report = sink_report(model, ids[:1], config=config, decode=lambda t: f"<{t[0]}>", top=3)
    count = torch.zeros(20, dtype=torch.int64)
    for layer, attn in enumerate(maps):
        sinks = find_attention_sinks(attn)
        assert report.sinks[layer].tolist() == sinks[0].sum(-1).tolist()
        mass = torch.where(sinks[:, :, None], attn, 0.0).sum(-1).mean(-1)[0]
        assert torch.allclose(torch.from_numpy(report.mass[layer]), mass, atol=1e-5)
        count += sinks[0].sum(0)
    assert len(report.tokens) == 3
    top = report.tokens[0]
    assert top.heads == int(count.max()) == int(count[top.place])
    assert top.text == f"<{int(ids[0, top.place])}>"
    assert top.text in report.summary()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = sink_report(model, ids, attention_mask=mask, config=config)
    assert all(t.place > 5 for t in padded.tokens if t.row == 0)


def test_report_is_kept(model, ids, tmp_path):
    from eff_attention.sink_calibration import SinkReport

    report = sink_report(model, ids, config=ACTConfig(layers=(1,)))
    report.save(tmp_path / "report")
    again = SinkReport.load(tmp_path / "report")
    assert again.tokens == report.tokens
    assert again.summary() == report.summary()


def test_models_and_heads_that_cannot_be(model, ids):
    with pytest.raises(ValueError, match=r"0\.\.3"):
        apply_act(model, ACTConfig(heads={1: (4,)}))
    with pytest.raises(ValueError, match="leaves none"):
        apply_act(model)
    with pytest.raises(NotImplementedError, match="Linear"):
        apply_act(torch.nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="do not transfer"):
        apply_act(model, ACTConfig(heads=HEADS, model_hash="0")).remove()
    apply_act(model, ACTConfig(heads=HEADS, model_hash=model_hash(model))).remove()
    name = model_hash(model)
    assert model_hash(copy.deepcopy(model).bfloat16()) == name
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert model_hash(model) != name
