import pytest
import torch
import torch.nn.functional as F
from eff_attention import na1d, na2d, na3d, neighborhood_attention
from eff_attention.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    na_flops,
    na_mask_mod,
)
from eff_kernels.ops.neighborhood_attention import neighborhood_mask
from hypothesis import given, settings
from hypothesis import strategies as st

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}


def natten_function(rank):
    natten = pytest.importorskip("natten")
    return getattr(natten, f"na{rank}d")


@st.composite
def calls(draw):
    rank, axes = draw(st.integers(1, 3)), []
    for _ in range(rank):
        window = draw(st.integers(2, (9, 4, 3)[rank - 1]))
        dilation = draw(st.integers(1, (4, 2, 2)[rank - 1]))
        length = window * dilation + draw(st.integers(0, (30, 4, 1)[rank - 1]))
        axes.append((length, window, draw(st.integers(1, window)), dilation, draw(st.booleans())))
    return (
        tuple(axes),
        draw(st.sampled_from([(1, 1), (2, 1), (2, 2)])),
        draw(st.integers(0, 3)),
        draw(st.integers(0, 99)),
    )


@pytest.mark.filterwarnings("ignore")  # natten's own, about the eager FlexAttention that it runs on the CPU
@settings(max_examples=40, deadline=None)
@given(calls())
def test_equals_natten(call):
    axes, (group, heads), extra, seed = call
    shape, *windows = zip(*axes, strict=True)
    rank, generator = len(shape), torch.Generator().manual_seed(seed)
    if windows[0] == shape and any(windows[3]):
        return  # natten hands full windows to plain attention, and has no causal one on the CPU
    q = torch.randn(1, *shape, group * heads, 16, generator=generator)
    k, v = (torch.randn(1, *shape, heads, 16, generator=generator) for _ in range(2))
    more = [torch.randn(1, extra, heads, 16, generator=generator) for _ in range(2)] if extra else [None, None]
    wanted = natten_function(rank)(q, k, v, *windows, None, *more, backend="flex-fna", return_lse=True)
    actual = FUNCTIONS[rank](q, k, v, *windows, None, *more, return_lse=True)
    torch.testing.assert_close(actual, tuple(wanted), rtol=1e-5, atol=1e-5)


def test_arguments_are_those_of_natten():
    import inspect

    theirs = list(inspect.signature(natten_function(2)).parameters)
    ours = list(inspect.signature(neighborhood_attention).parameters)
    assert ours[:10] == theirs[:10]
    assert set(ours) <= {*theirs, "dropout_p"}  # natten has no dropout


def test_lse_and_options():
    q, k, v = torch.randn(3, 1, 20, 2, 8)
    out, lse = na1d(q, k, v, 5, scale=0.0, return_lse=True)
    torch.testing.assert_close(lse, torch.full_like(lse, 5.0).log())  # a scale of 0 is a scale, not the default
    assert torch.equal(na1d(q, k, v, 5, scale=0.0, backend="cpu"), out)
    assert torch.equal(na1d(q, k, v, 5, is_causal=None), na1d(q, k, v, 5))


def test_dropout_keeps_the_mean_and_the_lse():
    torch.manual_seed(0)
    q, v = torch.randn(1, 6, 7, 4, 8), torch.ones(1, 6, 7, 2, 3)
    k, more = torch.randn(1, 6, 7, 2, 8), torch.randn(1, 2, 2, 8)
    settings = {"additional_keys": more, "additional_values": torch.ones(1, 2, 2, 3), "return_lse": True}
    plain, lse = na2d(q, k, v, 3, is_causal=(True, False), **settings)
    runs = [na2d(q, k, v, 3, is_causal=(True, False), dropout_p=0.25, **settings) for _ in range(200)]
    torch.testing.assert_close(runs[0][1], lse)
    outs = torch.stack([out for out, _ in runs])
    assert outs.std(0).min() > 0.05  # each weight is dropped at times
    assert (outs.mean(0) - plain).abs().max() < 0.15  # five standard errors of the least spread-out windows
    q.requires_grad_()
    na2d(q, k, v * torch.randn(3), 3, dropout_p=0.5).square().sum().backward()
    assert q.grad.isfinite().all()
    for bad in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"dropout_p={bad}"):
            na2d(q, k, v, 3, dropout_p=bad)
    with pytest.raises(ValueError, match="'cpu' has no dropout"):
        na2d(q, k, v, 3, dropout_p=0.5, backend="cpu")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_wrong_rank(rank):
    with pytest.raises(ValueError, match=rf"na{rank}d takes a query of {rank + 3} dimensions"):
        FUNCTIONS[rank](*[torch.zeros(1, *[4] * (rank % 3 + 1), 1, 8)] * 3, 2)


def test_mask_mod_is_the_mask():
    settings = ((6, 9), (3, 4), (2, 1), (1, 2), (True, False))
    i = torch.arange(54)
    zero = torch.tensor(0)
    assert torch.equal(na_mask_mod(*settings)(zero, zero, i[:, None], i), neighborhood_mask(*settings))


def test_flops():
    assert na_flops((64, 64), (7, 7), heads=8, head_dim=32) == 4 * 4096 * 49 * 256


LAYERS = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_over_everything_is_plain_attention(layer):
    x = torch.randn(2, *[3] * layer.rank, 16, requires_grad=True)
    module = layer(16, 2, 3)
    q, k, v = module.qkv(x).flatten(1, -2).view(2, 3**layer.rank, 3, 2, 8).permute(2, 0, 3, 1, 4)
    wanted = module.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).view(x.shape)
    out = module(x)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_takes_the_weights_of_natten(layer):
    natten = pytest.importorskip("natten")
    theirs = getattr(natten, layer.__name__)(16, 2, kernel_size=3, dilation=2)
    ours = layer(16, 2, kernel_size=3, dilation=2)
    ours.load_state_dict(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_video_does_not_see_the_future():
    layer = NeighborhoodAttention3D(16, 2, kernel_size=(3, 3, 3), is_causal=(True, False, False))
    x = torch.randn(1, 8, 6, 6, 16)
    changed = x.clone()
    changed[:, 5:] += 1
    assert torch.equal(layer(changed)[:, :5], layer(x)[:, :5])
    assert not torch.equal(layer(changed)[:, 5:], layer(x)[:, 5:])


def test_layer_errors():
    with pytest.raises(ValueError, match=r"embed_dim = 10 .* num_heads = 4"):
        NeighborhoodAttention1D(10, 4, 3)
    with pytest.raises(ValueError, match=r"takes 4 dimensions .* \[1, 4, 16\]"):
        NeighborhoodAttention2D(16, 2, 3)(torch.zeros(1, 4, 16))


def test_layer_compiles_to_one_graph():
    layer, x = NeighborhoodAttention2D(16, 2, 3), torch.randn(1, 6, 6, 16)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_layers_say_at_once_what_cannot_be():
    from eff_attention.neighborhood import NeighborhoodAttention2D

    with pytest.raises(ValueError, match="num_heads = 0, both at least 1"):
        NeighborhoodAttention2D(8, 0, 3)
    with pytest.raises(ValueError, match="kernel_size must be at least 2, got 1 on axis 0"):
        NeighborhoodAttention2D(8, 2, 1)
    with pytest.raises(ValueError, match="dilation must be one int, or one for each of the 2 axes"):
        NeighborhoodAttention2D(8, 2, 3, dilation=(1, 2, 3))
    with pytest.raises(ValueError, match=r"with the C = 8 channels last, got \[1, 8, 16, 16\]"):
        NeighborhoodAttention2D(8, 2, 3)(torch.zeros(1, 8, 16, 16))
    with pytest.raises(ValueError, match=r"head_dim of at least 1, got \[1, 6, 2, 0\]"):
        na1d(*[torch.zeros(1, 6, 2, 0)] * 3, 3)
