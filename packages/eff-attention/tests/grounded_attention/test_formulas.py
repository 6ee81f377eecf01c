import math

import numpy as np
import pytest
import torch
from eff_attention.grounded_attention import (
    PAIConfig,
    PAINTConfig,
    boost_attention_logits,
    cls_patch_attention,
    local_tokens,
    received_attention,
    select_informed_tokens,
    spatial_tokens,
    summary_tokens,
)

LOCAL = torch.tensor([[False, True, False, False]])
SUMMARY = torch.tensor([[False, False, True, False]])


def maps(batch=2, heads=3, patches=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, patches + 1, patches + 1, generator=g).softmax(-1)


def test_boost_by_hand():
    logits = torch.tensor([1.0, 0.5, -1.0, 0.0]).view(1, 1, 1, 4)
    found = boost_attention_logits(logits, LOCAL, SUMMARY, 0.7, 0.4)
    assert found.flatten().tolist() == pytest.approx([1.0, 0.85, -0.6, 0.0])
    assert logits.softmax(-1).flatten().tolist() == pytest.approx([0.4740, 0.2875, 0.0641, 0.1744], abs=1e-4)
    assert found.softmax(-1).flatten().tolist() == pytest.approx([0.4114, 0.3541, 0.0831, 0.1514], abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_boost_is_upward_and_keeps_order(seed):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 4, 5, 12, generator=g, dtype=torch.float64)
    local = torch.rand(2, 12, generator=g) < 0.4
    summary = (torch.rand(2, 12, generator=g) < 0.3) & ~local
    found = boost_attention_logits(logits, local, summary, 0.7, 0.4)
    assert (found >= logits).all()
    rest = ~local & ~summary
    before, after = logits.softmax(-1), found.softmax(-1)
    for b in range(2):
        for group in (local[b], summary[b]):
            assert torch.equal(found[b][..., group].argsort(-1), logits[b][..., group].argsort(-1))
        assert (after[b][..., ~rest[b]].sum(-1) >= before[b][..., ~rest[b]].sum(-1) - 1e-12).all()
        ratio = after[b][..., rest[b]] / before[b][..., rest[b]]
        torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden", [-math.inf, None])
def test_hidden_keys_stay_hidden(dtype, hidden):
    logits = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[..., 2] = torch.finfo(dtype).min if hidden is None else hidden
    for alpha in (0.5, 1.5):
        found = boost_attention_logits(logits, LOCAL | SUMMARY, SUMMARY & False, alpha, alpha).softmax(-1)
        assert found.isfinite().all()
        assert (found[..., 2] == 0).all()


def test_gradients():
    logits = torch.randn(1, 2, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[..., 1] = -math.inf
    logits.requires_grad_()
    (slope,) = torch.autograd.grad(
        boost_attention_logits(logits, LOCAL, SUMMARY, 0.7, 0.4).softmax(-1)[..., 0].sum(), logits
    )
    assert slope.isfinite().all()


def test_gain_of_heads():
    logits = torch.randn(2, 3, 1, 4, generator=torch.Generator().manual_seed(0))
    local, summary = LOCAL.expand(2, -1), SUMMARY.expand(2, -1)
    plain = boost_attention_logits(logits, local, summary, 0.7, 0.4)
    assert torch.equal(boost_attention_logits(logits, local, summary, 0.7, 0.4, torch.ones(3)), plain)
    one = boost_attention_logits(logits, local, summary, 0.7, 0.4, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(one[:, 1], plain[:, 1])
    assert torch.equal(one[:, [0, 2]], logits[:, [0, 2]])
    each = boost_attention_logits(logits, local, summary, 0.7, 0.4, torch.tensor([[0.0, 1, 0], [1, 0, 1]]))
    assert torch.equal(each[0], one[0])
    assert torch.equal(each[1, 0], plain[1, 0])


def test_scores():
    attn = maps()
    want = torch.stack([sum(attn[b, h, 0, 1:] for h in range(3)) for b in range(2)])
    torch.testing.assert_close(cls_patch_attention(attn), want)
    seen = received_attention(attn)
    for b in range(2):
        for j in range(16):
            mean = sum(attn[b, h, i, j + 1] for h in range(3) for i in range(1, 17)) / 3
            assert float(seen[b, j]) == pytest.approx(float(mean), abs=1e-5)
    torch.testing.assert_close(attn.mean(1).sum(-1), torch.ones(2, 17))  # what the published code ranks


def test_local_and_summary():
    score = torch.rand(3, 19, generator=torch.Generator().manual_seed(0))
    for ratio in (0.1, 0.25, 0.29, 1.0):
        found = local_tokens(score, ratio)
        assert (found.sum(-1) == int(ratio * 19)).all()
        if ratio < 1:
            assert (torch.where(found, score, 9.0).amin(-1) >= torch.where(found, -1.0, score).amax(-1)).all()
    assert local_tokens(torch.ones(1, 100), 0.29).sum() == 29  # 0.29 * 100 is a little less in binary
    assert not summary_tokens(torch.full((1, 16), 0.1)).any()
    ten = torch.full((1, 16), 0.1)
    ten[0, 5] = 1.0
    assert summary_tokens(ten).nonzero().tolist() == [[0, 5]]
    wide = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).square().square()
    low, high = np.percentile(wide.numpy(), [25, 75], axis=-1)
    assert torch.equal(summary_tokens(wide), wide > torch.from_numpy(high + 1.5 * (high - low))[:, None].float())


def test_selection():
    first, late = maps(seed=1), maps(seed=2)
    late[:, :, 0] = 0.1
    late[:, :, 0, 4] += 3.0  # an outlier that is local as well in the first row
    first[0, :, 0, 4] += 3.0
    local, summary = select_informed_tokens((first, late, first))
    assert summary.nonzero().tolist() == [[0, 3], [1, 3]]
    assert not (local & summary).any()
    assert (local | (local_tokens(cls_patch_attention(first)) & summary)).sum(-1).tolist() == [4, 4]
    planted = maps(seed=3)
    planted[:, :, :, 8] += 2.0
    assert spatial_tokens(planted, 1 / 16).nonzero().tolist() == [[0, 7], [1, 7]]
    more, _ = select_informed_tokens((planted, late, planted), PAINTConfig(spatial_ratio=1 / 16, summary_iqr=None))
    assert more[:, 7].all()
    every, none = select_informed_tokens((first, late, first), PAINTConfig(local_ratio=1.0, summary_iqr=None))
    assert every.all()
    assert not none.any()
    other, _ = select_informed_tokens((planted, late, planted), PAINTConfig(saliency="received", local_ratio=1 / 16))
    assert other.nonzero().tolist() == [[0, 7], [1, 7]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: PAINTConfig(alpha=-0.1), "alpha=-0.1"),
        (lambda: PAINTConfig(beta=math.nan), "beta=nan"),
        (lambda: PAINTConfig(local_ratio=0.0), "local_ratio=0.0"),
        (lambda: PAINTConfig(local_ratio=1.5), "local_ratio=1.5"),
        (lambda: PAINTConfig(spatial_ratio=-0.1), "spatial_ratio"),
        (lambda: PAINTConfig(summary_iqr=-1.0), "summary_iqr"),
        (lambda: PAINTConfig(first_layer=3, last_layer=2), "use 0 <= first_layer <= last_layer"),
        (lambda: PAIConfig(last_layer=9).layers(4), r"layers 0\.\.3"),
        (lambda: PAIConfig(head_gain=((-1.0,),)), "head_gain=-1.0"),
        (lambda: PAIConfig(head_gain=((1.0,),)).gains(2, 4), "2 layers and 4 heads"),
        (lambda: local_tokens(torch.ones(4), 0.0), "ratio=0.0"),
        (lambda: spatial_tokens(maps(), 2.0), "ratio=2.0"),
        (lambda: summary_tokens(torch.ones(4), -1.0), "iqr=-1.0"),
        (lambda: boost_attention_logits(torch.ones(1, 1, 1, 3), LOCAL, SUMMARY, 0.1, 0.1), r"local must be \[1, 3\]"),
        (
            lambda: boost_attention_logits(torch.ones(1, 1, 1, 4), LOCAL, SUMMARY, 0.1, 0.1, torch.ones(2)),
            "head_gain must be",
        ),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_settings_travel():
    for config in (PAINTConfig(head_gain=((1.0, 0.5),), rows="all_text"), PAIConfig(alpha=0.5)):
        assert type(config).from_dict(config.to_dict()) == config
