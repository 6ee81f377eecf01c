"""The module by itself: what it computes, for which tokens, with which gradients, and what it reads."""

import copy

import pytest
import torch
from eff_quant import FP4Config, FP4Linear, FP8Config, FP8Linear, Int8Config, Int8Linear
from eff_quant.experts import QuantizedExperts
from eff_quant.experts.route import route
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORMATS = {
    "int8": (Int8Config(activation="none"), Int8Linear),
    "int8 dynamic": (Int8Config(), Int8Linear),
    "fp8": (FP8Config(), FP8Linear),
    "fp8 dynamic": (FP8Config(activations="dynamic"), FP8Linear),
    "mxfp4": (FP4Config(format="mxfp4"), FP4Linear),
    "nvfp4": (FP4Config(), FP4Linear),
    "nvfp4 dynamic": (FP4Config(activations="dynamic"), FP4Linear),
}
formats = pytest.mark.parametrize(("config", "layer"), FORMATS.values(), ids=FORMATS)
KINDS = {
    "plain": {},
    "transposed, biased": {"is_transposed": True, "has_bias": True},
    "no gate": {"has_gate": False},
    "biased, no gate": {"has_bias": True, "has_gate": False},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def tokens(t=7, k=2, experts=5, seed=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(t, 64, generator=g).to(dtype)
    ids = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(t)]) if t else torch.zeros(0, k).long()
    return x, ids, torch.rand(t, k, generator=g).to(dtype)


def by_layers(module, layer, config, x, ids, weights):
    """One expert after the other, each as two layers of the method on the tokens that it gets."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    out = torch.zeros(*ids.shape, x.shape[1])
    for e in range(module.num_experts):
        rows, places = (ids == e).nonzero(as_tuple=True)
        if not len(rows):
            continue
        h = x[rows]
        for name in (first, "down_proj"):
            w = getattr(module, name)[e]
            linear = nn.Linear(1, 1, bias=False)
            linear.weight = nn.Parameter((w.T if module.is_transposed else w).detach().contiguous())
            linear.bias = nn.Parameter(getattr(module, f"{name}_bias")[e]) if module.has_bias else None
            h = layer.from_linear(linear, config)(h)
            if name == "gate_up_proj":
                gate, up = h.chunk(2, -1)
                h = nn.functional.silu(gate) * up
            elif name == "up_proj":
                h = nn.functional.silu(h)
        out[rows, places] = h * weights[rows, places, None]
    return out.sum(1)


@kinds
@formats
@torch.no_grad()
def test_each_expert_is_two_layers_of_the_method_bit_for_bit(experts, config, layer, kind):
    module = experts(**kind)
    x, ids, weights = tokens()
    found = QuantizedExperts.from_experts(module, config)(x, ids, weights)
    assert torch.equal(found, by_layers(module, layer, config, x, ids, weights))


@kinds
@torch.no_grad()
def test_it_computes_what_transformers_computes(experts, kind):
    module = experts(**kind)
    quantized = QuantizedExperts.from_experts(module, FP8Config())
    plain = quantized.to_experts()
    assert type(plain) is type(module)
    assert list(plain.state_dict()) == list(module.state_dict())
    for t, k in ((9, 2), (1, 3), (4, 1)):
        x, ids, weights = tokens(t, k)
        assert (quantized(x, ids, weights) - plain(x, ids, weights)).norm() < 1e-5 * plain(x, ids, weights).norm()


class Reads(TorchDispatchMode):
    """Notes which experts' parts of some tensors any operation but a view was given."""

    def __init__(self, stacks):
        super().__init__()
        self.spans = {t.untyped_storage().data_ptr(): t for t in stacks}
        self.read = {id(t): set() for t in stacks}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        for leaf in tree_leaves((args, kwargs)) if not view else ():
            if (
                isinstance(leaf, torch.Tensor)
                and (whole := self.spans.get(leaf.untyped_storage().data_ptr())) is not None
            ):
                size = whole[0].numel() * whole.element_size()
                start = leaf.storage_offset() * leaf.element_size()
                end = start + leaf.numel() * leaf.element_size()
                self.read[id(whole)].update(range(start // size, -(-end // size)))
        return func(*args, **(kwargs or {}))


@formats
@torch.no_grad()
def test_only_the_experts_that_tokens_use_are_read(experts, config, layer):
    module = QuantizedExperts.from_experts(experts(), config)
    x, _, weights = tokens(3)
    for ids, used in (
        (torch.tensor([[0, 3], [3, 0], [0, 3]]), {0, 3}),
        (torch.tensor([[4, 4], [4, 4], [4, 4]]), {4}),
        (torch.tensor([[5, 5], [1, 5], [5, 5]]), {1}),  # 5 stands for no expert
    ):
        stacks = [t for name in module.forms for s, t in module.tensors(name).items() if s != "weight_format"]
        with Reads(stacks) as reads:
            module(x, ids, weights)
        assert [reads.read[id(t)] for t in stacks] == [used] * len(stacks)
    with Reads(stacks) as reads:  # and the check sees it where all are read
        module.to_experts()
    assert set(range(5)) in reads.read.values()


@torch.no_grad()
def test_other_experts_may_hold_anything(experts):
    module = QuantizedExperts.from_experts(experts(), FP8Config())
    x, _, weights = tokens(3)
    ids = torch.tensor([[0, 3], [3, 0], [0, 3]])
    wanted = module(x, ids, weights)
    for name in module.forms:
        module.tensors(name)["weight_scale"][[1, 2, 4]] = torch.nan
    assert torch.equal(module(x, ids, weights), wanted)


@formats
@torch.no_grad()
def test_no_tokens_and_no_experts(experts, config, layer):
    module = QuantizedExperts.from_experts(experts(has_bias=True), config)
    x, ids, weights = tokens(0)
    assert module(x, ids, weights).shape == (0, 64)
    x, ids, weights = tokens(3)
    nobody = module(x, torch.full_like(ids, 5), weights)
    assert torch.equal(nobody, torch.zeros(3, 64))
    some = ids.clone()
    some[1, 0], some[2] = 5, 5
    gated = weights * (some < 5)
    assert torch.equal(module(x, some, weights)[2], torch.zeros(64))
    kept = some.where(some < 5, ids)
    if "dynamic" not in str(config):
        assert torch.allclose(module(x, some, weights), module(x, kept, gated), atol=1e-6)


@torch.no_grad()
def test_a_token_gets_the_same_alone_and_among_others(experts):
    """Weights alone are rounded: rows do not see each other, and the sum runs over a token's own places."""
    module = QuantizedExperts.from_experts(experts(), FP8Config())
    x, ids, weights = tokens(9)
    together = module(x, ids, weights)
    for i in range(9):
        assert torch.equal(module(x[i : i + 1], ids[i : i + 1], weights[i : i + 1])[0], together[i])


@pytest.mark.parametrize("name", ["int8", "fp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("kind", [{}, {"is_transposed": True, "has_bias": True}], ids=["plain", "transposed, biased"])
def test_gradients_are_those_of_the_dequantised_experts(experts, name, kind):
    module = QuantizedExperts.from_experts(experts(**kind), FORMATS[name][0])
    plain = module.to_experts()
    x, ids, weights = tokens()
    seed = torch.randn(7, 64)
    grads = []
    for m in (module, plain):
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        biases = [p for n, p in m.named_parameters() if n.endswith("bias")]
        grads.append(torch.autograd.grad((m(inputs[0], ids, inputs[1]) * seed).sum(), inputs + biases))
    assert len(grads[0]) == (4 if kind else 2)
    for found, wanted in zip(*grads, strict=True):
        assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert not any(p.requires_grad for n, p in module.named_parameters() if not n.endswith("bias"))


@pytest.mark.parametrize("name", ["int8", "fp8", "mxfp4", "nvfp4"])
def test_gradcheck(experts, name):
    module = QuantizedExperts.from_experts(
        experts(dtype=torch.float64, is_transposed=True, has_bias=True), FORMATS[name][0]
    )
    x, ids, weights = tokens(2, dtype=torch.float64)
    x, weights = (0.1 * x).requires_grad_(), weights.requires_grad_()
    bias = module.down_proj_bias
    assert torch.autograd.gradcheck(lambda x, w, b: module(x, ids, w), (x, weights, bias), fast_mode=True)


@formats
@torch.no_grad()
def test_what_a_stack_means_to_others(experts, config, layer):
    source = experts(is_transposed=True, has_bias=True)
    module = QuantizedExperts.from_experts(source, config)
    assert module.gate_up_proj.shape == source.gate_up_proj.shape == (5, 64, 64)
    assert module.gate_up_proj.dtype == torch.float32
    assert module.gate_up_proj.device.type == "cpu"
    w = layer.from_linear(linear_of(source.gate_up_proj[3].T), config).dequantize()
    assert torch.equal(module.gate_up_proj[3].T, w)
    assert torch.equal(module.to_experts().gate_up_proj, module.gate_up_proj + 0)
    with pytest.raises(TypeError, match="cannot be changed in place"):
        module.gate_up_proj.add_(1)
    new = torch.randn(5, 32, 64)
    module.down_proj.data = new
    assert torch.equal(module.down_proj[2].T, layer.from_linear(linear_of(new[2].T), config).dequantize())
    with pytest.raises(ValueError, match=r"down_proj has shape \[5, 64, 32\], wanted \[5, 32, 64\]"):
        module.down_proj = new.transpose(1, 2)
    with pytest.raises(TypeError, match=r"down_proj cannot take torch\.int64"):
        module.down_proj = new.long()
    with pytest.raises(ValueError, match=r"down_proj, expert 4: weight row 1 holds inf or NaN"):
        module.down_proj = new.index_put((torch.tensor(4), torch.tensor(0), torch.tensor(1)), torch.tensor(torch.inf))
    with pytest.raises(AttributeError, match="has no attribute 'up_proj'"):
        _ = module.up_proj
    assert module.num_hidden_parameters == sum(p.numel() for n, p in source.named_parameters() if "bias" not in n)


def linear_of(weight):
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(weight.detach().contiguous())
    return linear


def test_hooks_and_modes_go_with_it(experts):
    source = experts().train()
    seen = []
    source.register_forward_hook(lambda *a: seen.append(1))
    module = QuantizedExperts.from_experts(source, Int8Config())
    assert module.training
    module(*tokens())
    copy.deepcopy(module).to_experts()(*tokens())
    assert seen == [1, 1]


def test_two_threads_at_once(experts):
    from concurrent.futures import ThreadPoolExecutor

    module = QuantizedExperts.from_experts(experts(), Int8Config())
    work = [tokens(5, seed=s) for s in range(8)]
    with torch.no_grad():
        wanted = [module(*w) for w in work]

    def run(w):
        with torch.no_grad():
            return module(*w)

    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(run, work), wanted, strict=True))


def test_routes_by_hand():
    ids = torch.tensor([[2, 0], [0, 4], [3, 0]])
    order, runs = route(ids, 4)
    assert order.tolist() == [1, 2, 5, 0, 4]
    assert runs == ((0, 3), (2, 1), (3, 1))
    assert route(torch.tensor([[4], [9]]), 4).runs == ()
