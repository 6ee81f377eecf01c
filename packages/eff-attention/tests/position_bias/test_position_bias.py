import itertools
import math

import pytest
import torch
from eff_attention.position_bias import (
    Draw,
    MaskSpec,
    PositionBiasReport,
    PositionBiasTask,
    Rollout,
    attention_rollout,
    centre_nodes,
    collect_rollout,
    convergence_bound,
    decay_profile,
    peak_distance,
    position_bias_report,
    position_gap,
    position_profile,
    reach_depth,
    simulate_rollout,
    train_network,
)

transformers = pytest.importorskip("transformers")


def last(mask, depth, **more):
    return simulate_rollout(mask, 4, depth, **more)[-1][-1].tolist()


@pytest.mark.parametrize(
    ("depth", "row"),
    [
        (1, [0.25] * 4),
        (2, [0.5208, 0.2708, 0.1458, 0.0625]),
        (3, [0.7205, 0.1997, 0.0642, 0.0156]),
        (10, [0.9971, 0.0028, 0.0001, 0.0]),
    ],
)
def test_uniform_causal(depth, row):
    assert last(MaskSpec(), depth) == pytest.approx(row, abs=1e-4)


@pytest.mark.parametrize(
    ("depth", "row"),
    [
        (1, [0, 0, 0.5, 0.5]),
        (2, [0, 0.25, 0.5, 0.25]),
        (3, [0.125, 0.375, 0.375, 0.125]),
        (5, [0.5, 0.3125, 0.15625, 0.03125]),
    ],
)
def test_window(depth, row):
    assert last(MaskSpec("window", 2), depth) == pytest.approx(row, abs=1e-6)


def test_prefix_and_residual():
    assert last(MaskSpec("prefix", 2), 2) == pytest.approx([0.3958, 0.3958, 0.1458, 0.0625], abs=1e-4)
    assert last(MaskSpec("prefix", 2), 60) == pytest.approx([0.5, 0.5, 0, 0], abs=1e-6)
    assert last(MaskSpec(), 1, residual=0.5) == pytest.approx([0.125, 0.125, 0.125, 0.625])
    assert last(MaskSpec(), 2, residual=0.5) == pytest.approx([0.2552, 0.1927, 0.1615, 0.3906], abs=1e-4)
    assert last(MaskSpec(), 20, residual=0.5)[0] == pytest.approx(0.991, abs=1e-3)


def test_reach():
    for n, w in ((4, 2), (9, 3), (10, 4)):
        mask = MaskSpec("window", w).mask(n)
        needed = math.ceil((n - 1) / (w - 1))
        assert reach_depth(mask, 0, n - 1) == needed
        values = simulate_rollout(MaskSpec("window", w), n, needed)
        assert [float(v[-1, 0]) > 0 for v in values] == [False] * (needed - 1) + [True]
    assert reach_depth(MaskSpec().mask(4), 3, 0) is None


def test_centres():
    assert centre_nodes(MaskSpec().mask(6)) == [[0]]
    assert centre_nodes(MaskSpec("window", 3).mask(6)) == [[0]]
    assert centre_nodes(MaskSpec("prefix", 3).mask(6)) == [[0, 1, 2]]
    assert centre_nodes(MaskSpec("full").mask(4)) == [[0, 1, 2, 3]]
    packed = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(2, 2).tril()).bool()
    assert centre_nodes(packed) == [[0], [3]]


def test_decay():
    n, m = 60, 0.1
    place = torch.arange(n, dtype=torch.float64)
    layer = torch.exp(-m * (place[:, None] - place)).tril()
    for depth in (1, 2, 4, 8):
        want = torch.linalg.matrix_power(layer, depth)[-1].flip(0)
        torch.testing.assert_close(decay_profile(depth, m, n), want, rtol=1e-10, atol=0)
    assert [peak_distance(t, m) for t in (1, 2, 4, 8)] == [0, 9, 28, 66]
    assert int(decay_profile(4, m, 100).argmax()) == 28


def test_influence_drains_to_the_first_token():
    torch.manual_seed(0)
    content = torch.randn(12, 20, 20)
    values = simulate_rollout(MaskSpec(), 20, 12, content=content)
    layers = content.double().masked_fill(~MaskSpec().mask(20), -torch.inf).softmax(-1)
    least = float(layers[:, :, 0].min())
    outside = [float((1 - v[:, 0]).max()) for v in values]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(outside))
    assert all(o <= convergence_bound(least, t + 1) + 1e-12 for t, o in enumerate(outside))
    torch.testing.assert_close(values[-1], attention_rollout(layers))
    torch.testing.assert_close(values[-1].sum(1), torch.ones(20, dtype=torch.float64))


def tiny(name="Llama", **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50, head_dim=8, num_key_value_heads=2, initializer_range=0.3, **sizes, **more
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2"])
def test_a_model_is_the_product_of_its_attention(name):
    model, ids = tiny(name), torch.randint(50, (2, 9))
    found = collect_rollout(model, ids)
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True).attentions
    product = torch.eye(9)
    for layer, value in zip(maps, found, strict=True):
        product = layer.mean(1) @ product
        torch.testing.assert_close(value, product.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, ids = tiny(), torch.randint(50, (1, 7))
    pad = torch.zeros(1, 3, dtype=torch.int64)
    order = (pad, ids) if side == "left" else (ids, pad)
    padded, mask = torch.cat(order, 1), torch.cat([torch.ones_like(x) if x is ids else pad for x in order], 1)
    where = slice(3, None) if side == "left" else slice(0, 7)
    for a, b in zip(
        collect_rollout(model, ids, residual=0.5), collect_rollout(model, padded, mask, residual=0.5), strict=True
    ):
        torch.testing.assert_close(b[:, where, where], a, atol=1e-5, rtol=0)
    assert model(ids).logits.shape == (1, 7, 50)


def test_profile_and_report(tmp_path):
    uniform = torch.full((20, 20), 1 / 20)
    p = position_profile(uniform)
    assert (p.first, p.recency, p.middle) == pytest.approx((0.05, 0.1, 0.5))
    assert p.u_shape == pytest.approx(0, abs=1e-9)
    model = tiny()
    report = position_bias_report(model, [torch.randint(50, (24,)) for _ in range(2)], name="tiny <1>")
    assert len(report.first) == 3
    assert sum(report.profile) == pytest.approx(1, abs=1e-4)
    assert report.first[-1] > report.first[0]  # attention alone drains to the first token
    report.save(tmp_path / "r.json")
    assert PositionBiasReport.load(tmp_path / "r.json") == report
    report.write_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "tiny &lt;1&gt;" in text
    assert text.count("<polyline") >= 9
    assert text.count("<figure>") == 4
    assert "reaches token 5 in 1 layer<" in text
    assert "3 layers of full attention" in text
    assert "http" not in text
    assert report.kinds == ("full_attention",) * 3
    assert all(bound <= first + 1e-6 for bound, first in zip(report.bound, report.first, strict=True))
    assert len(report.decay) == 24


def test_report_of_even_attention():
    """Queries of zero: each token attends evenly to all before it, and everything is known."""
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    n = 16
    report = position_bias_report(model, [torch.randint(50, (n,))])
    assert report.first == pytest.approx(report.uniform, abs=1e-6)
    rows = torch.arange(2, n + 1, dtype=torch.float64)
    assert report.sink == pytest.approx([float((1 / rows).mean())] * 3, abs=1e-6)
    assert report.bound == pytest.approx([1 - (1 - 1 / n) ** t for t in (1, 2, 3)], abs=1e-6)
    assert report.sink_heads == (0, 0, 0)
    wanted = [sum(1 / (i + 1) for i in range(d, n)) / (n - d) for d in range(n)]
    assert report.decay == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: MaskSpec("window"), "needs a size of 1 or more"),
        (lambda: MaskSpec("prefix", 5).mask(4), "longer than 4"),
        (lambda: Rollout(1.0), "residual must be"),
        (lambda: Rollout().value, "no layer"),
        (lambda: attention_rollout([torch.rand(3, 3)]), "add up to 1"),
        (lambda: simulate_rollout(torch.zeros(3, 3, dtype=torch.bool), 3, 1), "at least one True in each row"),
        (lambda: position_profile(torch.rand(3, 3)), "add up to 1"),
        (lambda: position_bias_report(tiny(), []), "texts of one length"),
        (lambda: position_bias_report(tiny(), [torch.arange(5)]), "8 tokens or more"),
        (lambda: collect_rollout(torch.nn.Linear(2, 2), torch.zeros(1, 2)), "has no decoder"),
        (lambda: peak_distance(2, 0.0), "positive slope"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_sequences_of_the_experiment():
    task = PositionBiasTask(size=16, classes=32, noise=0.0)
    draw = Draw(task, torch.Generator().manual_seed(0))
    inputs, labels = draw.training(50)
    assert inputs.shape == (50, 17, 16)
    items, given, query = inputs[:, 0:16:2], inputs[:, 1:16:2], inputs[:, 16]
    same = (items - query[:, None]).abs().amax(-1) < 1e-6
    assert (same.sum(1) == task.repeats).all()  # the query's class occurs as often as every other
    of = torch.cdist(given, draw.label_vectors).argmin(-1)
    assert (of[same].view(50, 4) == labels[:, None]).all()
    inputs, labels = draw.tie(50, 2, 7)
    items, given = inputs[:, 0:16:2], inputs[:, 1:16:2]
    assert torch.equal(items[:, 2], items[:, 7])
    of = torch.cdist(given, draw.label_vectors).argmin(-1)
    assert torch.equal(of[:, 2], labels)
    assert (of[:, 7] != labels).all()
    biased = Draw(PositionBiasTask(size=16, classes=32, noise=0.0, answers=(3,)), torch.Generator().manual_seed(0))
    inputs, _ = biased.training(20)
    assert torch.equal(inputs[:, 6], inputs[:, 16])


def test_a_trained_network_learns_the_task_and_a_seed_repeats_it():
    task = PositionBiasTask(size=16, classes=16, pairs=4, repeats=2, labels=4)
    network, draw = train_network(task, depth=1, steps=60, batch=32, lr=5e-3)
    again, other = train_network(task, depth=1, steps=60, batch=32, lr=5e-3)
    assert position_gap(network, draw, 0, 3, count=64) == position_gap(again, other, 0, 3, count=64)
    decayed, _ = train_network(task, depth=1, mask=MaskSpec("window", 3), decay=0.8, steps=1, batch=8)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 5] += 1.0  # the last token sees the last three alone, through one layer
    assert torch.equal(decayed(x), decayed(changed))
    with pytest.raises(ValueError, match="use a multiple"):
        PositionBiasTask(pairs=8, repeats=3)


@pytest.mark.parametrize("mask", [MaskSpec(), MaskSpec("window", 3), MaskSpec("prefix", 2), MaskSpec("full")])
def test_rollouts_sum_to_one_and_go_where_the_graph_leads(mask):
    content = torch.randn(4, 9, 9, generator=torch.Generator().manual_seed(0))
    seen = mask.mask(9)
    for depth, value in enumerate(simulate_rollout(mask, 9, 4, content=content), 1):
        torch.testing.assert_close(value.sum(1), torch.ones(9, dtype=torch.float64))
        reached = torch.linalg.matrix_power(seen.double(), depth) > 0
        assert torch.equal(value > 0, reached)


def test_attention_of_all_to_all_without_a_bias_ends_even():
    """Rows and columns that add up to 1 (a mean of permutations): nobody is preferred in the limit."""
    n, mix = 7, torch.eye(7, dtype=torch.float64)
    even = sum(mix[(torch.arange(n) + shift) % n] * w for shift, w in ((0, 0.5), (1, 0.3), (3, 0.2)))
    torch.testing.assert_close(attention_rollout([even] * 80), torch.full((n, n), 1 / n, dtype=torch.float64))


def test_a_rollout_holds_two_matrices_however_many_layers(largest_tensors):
    n = 128

    def layers():
        for seed in range(12):
            logits = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
            yield logits.masked_fill(~MaskSpec().mask(n), -torch.inf).softmax(-1)

    kept = list(layers())
    wanted = torch.linalg.multi_dot([layer.double() for layer in reversed(kept)])
    rollout = Rollout()
    with largest_tensors(n * n) as seen:
        for layer in kept:
            rollout.add(layer)
        # The layers that the caller holds were made outside; the product, the layer's copy and what adds them up.
        assert seen.most <= 6 * n * n
        before = seen.alive
        for layer in kept:
            rollout.add(layer)
        assert seen.alive == before
    assert Rollout().depth == 0
    torch.testing.assert_close(attention_rollout(layers()), wanted)


def test_a_lower_base_of_rotary_encoding_brings_the_end_forward():
    """Section 4: scores fall with distance where queries and keys agree, and faster at a lower base.

    Of eight random models with one projection for both and tokens that have something in common. With projections of
    their own random scores do not fall with distance at any base, and the sign is a matter of chance.
    """

    def recency(base, seed):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": base},
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
        model.model.embed_tokens.weight.data += 0.3 * torch.randn(64)
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
        text = torch.randint(64, (64,), generator=torch.Generator().manual_seed(seed))
        return position_bias_report(model, [text]).recency

    change = torch.tensor([recency(100.0, s) for s in range(8)]) - torch.tensor([recency(1e4, s) for s in range(8)])
    assert (change.mean(0) > 0.02).all()


@pytest.mark.slow
def test_a_causal_network_prefers_the_first_and_decay_lowers_it():
    """Section 5: trained without a bias of the data, a causal mask alone prefers early answers."""
    gaps = {}
    for decay in (1.0, 0.8):
        network, draw = train_network(PositionBiasTask(), depth=2, decay=decay, steps=1200, lr=3e-3)
        gaps[decay] = position_gap(network, draw, 0, 7)
    assert gaps[1.0] > 0.05
    assert gaps[0.8] < gaps[1.0] - 0.05
