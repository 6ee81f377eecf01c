import math

import pytest
import torch
from eff_attention.variants import AttentionVariantConfig, attention_indicators, standard_layers


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ("uniform", []),
        ("even", list(range(2, 25, 2))),
        ("odd", list(range(1, 24, 2))),
        ("top", list(range(1, 13))),
        ("middle", [*range(1, 7), *range(19, 25)]),
        ("bottom", list(range(13, 25))),
        ("quarter", [4, 8, 12, 16, 20, 24]),
        ("first", [1]),
        ("last", [24]),
        ("bilateral", [1, 24]),
        ([3, 1, 3], [1, 3]),
    ],
)
def test_layouts_of_24_layers(layout, wanted):
    assert standard_layers(24, layout) == wanted


@pytest.mark.parametrize(
    ("depth", "layout", "message"),
    [
        (5, "even", "multiple of 2, got 5"),
        (6, "middle", "multiple of 4, got 6"),
        (6, "quarter", "multiple of 4, got 6"),
        (1, "bilateral", "multiple of 2, got 1"),
        (4, [0, 1], "outside of 1 to 4"),
        (4, [5], "outside of 1 to 4"),
        (4, "none", "use one of"),
    ],
)
def test_impossible_layouts(depth, layout, message):
    with pytest.raises(ValueError, match=message):
        standard_layers(depth, layout)


def test_indicators_of_the_uniform_causal_map():
    a = torch.ones(4, 4).tril()
    a = (a / a.sum(-1, keepdim=True)).expand(2, 3, 4, 4)
    found = attention_indicators([a])[1]
    assert found.entropy == pytest.approx(math.log(24), rel=1e-6)  # 3.178
    assert found.concentration == pytest.approx(1.443, abs=5e-4)
    assert found.sink == pytest.approx(0.5208, abs=5e-5)
    assert found.local_focus == pytest.approx((0.5208, 0.3611, 0.2917, 0.25), abs=5e-5)
    assert found.diversity == pytest.approx(0, abs=1e-8)


def test_diversity_of_two_heads():
    first, second = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[1.0, 0], [0, 1]])
    found = attention_indicators({7: torch.stack([first, second]).unsqueeze(0)})[7]
    assert found.diversity == pytest.approx((0 + 0.5 + 0.5) / 3)
    with pytest.raises(ValueError, match=r"got \[1, 2, 2, 3\]"):
        attention_indicators([torch.zeros(1, 2, 2, 3)])


def test_settings_survive_json():
    settings = AttentionVariantConfig(kind="fixed_seq_qk", fixed_ids=(1, 2, 3), max_len=2)
    assert AttentionVariantConfig.from_dict(settings.to_dict()) == settings
    listed = AttentionVariantConfig(kind="fixed_seq_qk", fixed_ids=[1, 2, 3], max_len=2)
    assert (listed, hash(listed.stream)) == (settings, hash(settings.stream))
    with pytest.raises(ValueError, match="of version 9"):
        AttentionVariantConfig.from_dict({**settings.to_dict(), "version": 9})
    with pytest.raises(ValueError, match=r"has no \['colour'\]"):
        AttentionVariantConfig.from_dict({**settings.to_dict(), "colour": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "none"}, "use one of"),
        ({"kind": "mlp", "max_len": 0}, "at least 1"),
        ({"kind": "rnd_emb_qk", "random_std": 0.0}, "positive"),
        ({"kind": "approximate", "chunk_size": 0}, "at least 1, or None"),
        ({"kind": "fixed_seq_qk"}, "fixed_ids belong to"),
        ({"kind": "mlp", "fixed_ids": (1,)}, "fixed_ids belong to"),
        ({"kind": "fixed_seq_qk", "fixed_ids": (1,), "max_len": 2}, "has 1 ids"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionVariantConfig(**options)
