import pytest
import torch
from eff_attention.head_reinforcement import (
    VHRConfig,
    reject_negative_heads,
    select_heads,
    token_vhd,
    vision_aware_divergence,
)

HERE = torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
BARE = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 2.0], [6.0, 0.0]])


def test_divergence_by_hand():
    vhd = vision_aware_divergence(HERE, BARE)
    assert vhd.tolist() == [5, 0, 1, 4]
    activation = BARE.square().sum(-1)
    assert activation.tolist() == [0, 1, 5, 36]
    assert float(vhd.mean() + vhd.std()) == pytest.approx(4.88, abs=0.005)
    assert float(activation.mean() + activation.std()) == pytest.approx(27.64, abs=0.005)
    assert torch.equal(
        reject_negative_heads(vhd, activation), vhd
    )  # head 0 moves most, head 3 surges: no one does both
    assert select_heads(vhd).tolist() == [True, False, False, True]
    relative = vision_aware_divergence(HERE[1:], BARE[1:], relative=True)
    assert relative.tolist() == pytest.approx([0, 1 / 5**0.5, 4 / 6])


def test_outlier_by_hand():
    vhd = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 40])
    activation = torch.tensor([1.0] * 7 + [50])
    assert float(vhd.mean() + vhd.std()) == pytest.approx(21.38, abs=0.005)
    assert float(activation.mean() + activation.std()) == pytest.approx(24.45, abs=0.005)
    kept = reject_negative_heads(vhd, activation)
    assert kept.tolist() == [1, 2, 3, 4, 5, 6, 7, 0]
    assert select_heads(kept).nonzero()[:, 0].tolist() == [3, 4, 5, 6]
    assert select_heads(vhd).nonzero()[:, 0].tolist() == [4, 5, 6, 7]
    assert torch.equal(reject_negative_heads(vhd, activation.flip(0)), vhd)  # another head surges
    one = torch.tensor([3.0])
    assert torch.equal(reject_negative_heads(one, one), one)


def test_half_of_the_heads():
    vhd = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
    assert (select_heads(vhd).sum(-1) == 6).all()
    assert (select_heads(vhd[:, :7]).sum(-1) == 3).all()
    assert not select_heads(torch.zeros(3, 8)).any()


def test_symmetries():
    g = torch.Generator().manual_seed(0)
    here, bare = (torch.randn(2, 8, 5, generator=g, dtype=torch.float64) for _ in range(2))
    vhd = vision_aware_divergence(here, bare)
    order = torch.randperm(8, generator=g)
    torch.testing.assert_close(vision_aware_divergence(here[:, order], bare[:, order]), vhd[:, order])
    turn = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64)).Q
    torch.testing.assert_close(vision_aware_divergence(here @ turn, bare @ turn), vhd)
    torch.testing.assert_close(vision_aware_divergence(3 * here, 3 * bare), 3 * vhd)


def test_sum_over_layers():
    vhd = torch.tensor([[1.0, 5, 2, 3], [4, 0, 0, 1]])[:, None]
    assert token_vhd(vhd, 1).tolist() == [9]
    assert token_vhd(vhd).tolist() == [9]
    assert token_vhd({3: vhd[0], 7: vhd[1]}, 2).tolist() == [13]
    assert token_vhd(vhd, 4).tolist() == [16]


def test_proposition():
    """Strengthening a head turns the sum of residual and head outputs towards that head (proposition 1)."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2000, 16, generator=g, dtype=torch.float64) for _ in range(2))
    alpha = 4 - 3 * torch.rand(2000, 1, generator=g, dtype=torch.float64)

    def cosine(a, b):
        return torch.nn.functional.cosine_similarity(a, b)

    assert (cosine(x + (alpha - 1) * y, y) > cosine(x, y)).all()
    unit = torch.eye(2, dtype=torch.float64)
    turned = [cosine(unit[:1] + (a - 1) * unit[1:], unit[1:]).item() for a in (1, 2, 3)]
    assert turned == pytest.approx([0, 0.7071, 0.8944], abs=1e-4)


@pytest.mark.parametrize(
    ("count", "second", "layers"),
    [(32, True, (1, *range(18, 32))), (32, False, tuple(range(18, 32))), (4, True, (1, 2, 3)), (1, True, (0,))],
)
def test_layers(count, second, layers):
    assert VHRConfig(include_second_layer=second).chosen(count) == layers


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: VHRConfig(alpha=-1.0), "alpha=-1.0"),
        (lambda: VHRConfig(alpha=float("inf")), "alpha=inf"),
        (lambda: VHRConfig(layers=()), "layers is empty"),
        (lambda: VHRConfig(layers=(4,)).chosen(4), r"0\.\.3"),
        (lambda: token_vhd(torch.ones(2, 4), 5), "k=5; use 1 to 4"),
        (lambda: vision_aware_divergence(HERE, BARE[:2]), "outputs must both be"),
        (lambda: reject_negative_heads(HERE, BARE[:2]), "one shape"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_settings_travel():
    config = VHRConfig(alpha=1.5, layers=(2, 3), reference="lockstep", metric="relative")
    assert VHRConfig.from_dict(config.to_dict()) == config
