import copy
import math
import pickle

import pytest
import torch
from eff_adapters.lora_mixer import (
    RoutedLoraLinear,
    Router,
    router_logits,
    sparse_gates,
    straight_through_gates,
    top_routes,
)
from eff_adapters.lora_mixer.passes import RoutePass, opened
from torch import nn


def by_loop(layer, x, gates):
    out = layer.base_layer(x)
    for e in range(layer.num_experts):
        out = out + gates[..., e : e + 1] * layer.scaling[e].double() * (x @ layer.lora_A[e].t() @ layer.lora_B[e].t())
    return out


@pytest.fixture
def x():
    return torch.randn(3, 5, 12, dtype=torch.float64)


def test_worked_routes():
    p = torch.tensor([[0.7, 0.2, 0.1]])
    assert sparse_gates(p, 2).tolist() == [pytest.approx([0.77778, 0.22222, 0], abs=5e-6)]
    routes = top_routes(p.log(), 2)
    assert routes.ids.tolist() == [[0, 1]]
    assert routes.gates.tolist() == [pytest.approx([0.77778, 0.22222], abs=5e-6)]


def test_soft_is_the_loop_over_experts(draw_layer, x):
    layer = draw_layer(mode="soft")
    probs = router_logits(x, layer.router.weight).softmax(-1)
    torch.testing.assert_close(layer(x), by_loop(layer, x, probs), rtol=1e-10, atol=1e-10)


def test_sparse_is_the_loop_over_the_chosen(draw_layer, x):
    layer = draw_layer()
    gates = sparse_gates(router_logits(x, layer.router.weight).softmax(-1), 2)
    assert ((gates > 0).sum(-1) == 2).all()
    torch.testing.assert_close(layer(x), by_loop(layer, x, gates), rtol=1e-10, atol=1e-10)


def test_all_experts_are_soft(draw_layer, x):
    torch.testing.assert_close(draw_layer(top_k=5)(x), draw_layer(mode="soft")(x), rtol=1e-10, atol=1e-10)


def test_one_expert_is_that_of_the_largest_logit(draw_layer, x):
    layer = draw_layer(top_k=1)
    best = (x @ layer.router.weight.t()).argmax(-1)
    found = layer(x)
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(5)):
        i, j = place.tolist()
        e = best[i, j]
        one = layer.base_layer(x[i, j]) + layer.scaling[e].double() * layer.lora_B[e] @ (layer.lora_A[e] @ x[i, j])
        torch.testing.assert_close(found[i, j], one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["soft", "sparse"])
def test_the_order_of_experts_does_not_matter(draw_layer, x, mode):
    layer, order = draw_layer(mode=mode), [3, 0, 4, 1, 2]
    other = RoutedLoraLinear(
        layer.base_layer, layer.lora_A.data[order], layer.lora_B.data[order], layer.scaling[order].tolist(),
        Router(layer.router.weight.data[order]), top_k=2, mode=mode,
    )  # fmt: skip
    torch.testing.assert_close(other(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["soft", "sparse"])
def test_an_expert_that_is_not_there_changes_nothing(draw_layer, x, mode):
    layer = draw_layer(mode=mode)
    more = [
        torch.cat([t.data, torch.randn_like(t.data[:1])]) for t in (layer.lora_A, layer.lora_B, layer.router.weight)
    ]
    other = RoutedLoraLinear(
        layer.base_layer, more[0], more[1], [*layer.scaling.tolist(), 2.0], Router(more[2]),
        present=[True] * 5 + [False], top_k=2, mode=mode,
    )  # fmt: skip
    torch.testing.assert_close(other(x), layer(x), rtol=1e-12, atol=1e-12)


def test_top_k_above_the_experts_that_are_there(draw_layer, x):
    layer = draw_layer(top_k=4, present=[True, False, False, True, False])
    soft = draw_layer(mode="soft", present=[True, False, False, True, False])
    torch.testing.assert_close(layer(x), soft(x), rtol=1e-12, atol=1e-12)


def test_temperature(draw_layer, x):
    layer, other = draw_layer(mode="soft"), draw_layer(mode="soft", temperature=2.5)
    layer.router.weight.data /= 2.5
    torch.testing.assert_close(layer(x), other(x), rtol=1e-12, atol=1e-12)


def test_folding_of_the_scaling_changes_nothing(draw_layer, x):
    layer, other = draw_layer(), draw_layer()
    with torch.no_grad():
        other.lora_B *= layer.scaling.double()[:, None, None]
        other.scaling.fill_(1.0)
    torch.testing.assert_close(other(x), layer(x), rtol=1e-10, atol=1e-10)


def test_straight_through(draw_layer, x):
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(6, 4, dtype=torch.float64)
    found, soft = straight_through_gates(logits.softmax(-1), 2), logits.softmax(-1)
    torch.testing.assert_close(found, sparse_gates(soft, 2))
    torch.testing.assert_close(
        torch.autograd.grad((found * pull).sum(), logits), torch.autograd.grad((soft * pull).sum(), logits)
    )
    sparse, through, soft_layer = draw_layer(), draw_layer(straight_through=True), draw_layer(mode="soft")
    torch.testing.assert_close(through(x), sparse(x))
    grads = []
    for layer in (through, soft_layer):
        out = layer(x)
        (grad,) = torch.autograd.grad(out, layer.router.weight, torch.ones_like(out))
        grads.append(grad)
    torch.testing.assert_close(*grads)
    assert torch.equal(through.eval()(x), sparse.eval()(x))


def test_gradients_of_the_sparse_mixture(draw_layer, x):
    """The compiled op's gradients are those of the dense form with sparse gates."""
    layer = draw_layer()
    leaves = [layer.lora_A, layer.lora_B, layer.router.weight, x.requires_grad_()]
    probs = router_logits(x, layer.router.weight).softmax(-1)
    wanted = torch.autograd.grad(by_loop(layer, x, sparse_gates(probs, 2)).square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), leaves), wanted)


def test_routers_compute_in_float32(draw_layer):
    layer = draw_layer(dtype=torch.float32).bfloat16()
    x = torch.randn(4, 12).bfloat16()
    logits = router_logits(x, layer.router.weight)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, x.float() @ layer.router.weight.float().t())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router_logits(x, layer.router.weight), logits)


def test_the_scaling_stays_exact_when_the_layer_is_cast(draw_layer):
    layer = draw_layer(dtype=torch.float32)
    layer.scaling.fill_(1 / 3)
    layer.bfloat16().float()
    assert torch.equal(layer.scaling, torch.full((5,), 1 / 3))
    assert layer.to("meta").scaling.is_meta


@pytest.mark.parametrize("mode", ["soft", "sparse"])
def test_compiles_to_one_graph(draw_layer, mode):
    layer, x = draw_layer(dtype=torch.float32, mode=mode).eval(), torch.randn(2, 3, 12)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    loss = compiled(x).sum()
    assert torch.autograd.grad(loss, layer.router.weight)[0].any()


def test_hard_needs_a_domain(draw_layer, x):
    layer = draw_layer(mode="hard")
    with pytest.raises(ValueError, match="needs the domain of each sample"):
        layer(x)
    with (
        opened(RoutePass({nn.Linear(1, 1): "other"}, torch.zeros(3, dtype=torch.long))),
        pytest.raises(ValueError, match="domain"),
    ):
        layer(x)


def test_hard_compiles_with_breaks(draw_layer):
    layer, x = draw_layer(dtype=torch.float32, mode="hard").eval(), torch.randn(2, 3, 12)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    for domains in ([1, 4], [2, 0]):
        with opened(RoutePass({layer: "it"}, torch.tensor(domains))), torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))


def test_no_expert_in_hard_mode_keeps_the_base(draw_layer, x):
    layer = draw_layer(mode="hard")
    with opened(RoutePass({layer: "it"}, torch.tensor([-1, 2, -1]))):
        found = layer(x)
    base = layer.base_layer(x)
    assert torch.equal(found[[0, 2]], base[[0, 2]])
    assert not torch.allclose(found[1], base[1])


def test_domains_must_fit_the_tokens(draw_layer, x):
    layer = draw_layer(mode="hard")
    with (
        opened(RoutePass({layer: "it"}, torch.tensor([0, 1]))),
        pytest.raises(ValueError, match=r"domain_ids of shape \[2\] does not fit tokens of shape \[3, 5\]"),
    ):
        layer(x)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(draw_layer, x, copier):
    layer = draw_layer()
    assert torch.equal(copier(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("more", "text"),
    [({"top_k": 6}, "top_k=6.*5 experts"), ({"top_k": 0}, "top_k=0"), ({"mode": "dense"}, "mode='dense'")],
)
def test_wrong_settings(draw_layer, more, text):
    with pytest.raises(ValueError, match=text):
        draw_layer(**more)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"b": torch.zeros(2, 4, 3)}, r"\[2, 5, 3\] and \[2, 4, 3\]|do not fit"),
        ({"router": Router(torch.zeros(3, 6))}, r"router of that shape"),
        ({"scaling": [1.0]}, "one scaling each"),
    ],
)
def test_wrong_shapes(change, text):
    given = {
        "a": torch.zeros(2, 5, 6), "b": torch.zeros(2, 4, 5), "scaling": [1.0, 1.0],
        "router": Router(torch.zeros(2, 6)), "top_k": 1, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=text):
        RoutedLoraLinear(nn.Linear(6, 4), **given)


def test_logits_of_absent_experts_are_minus_infinity():
    logits = router_logits(torch.randn(3, 4), torch.randn(2, 4), torch.tensor([True, False]))
    assert (logits[:, 1] == -math.inf).all()
    assert logits[:, 0].isfinite().all()
