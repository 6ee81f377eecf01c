import math

import pytest
import torch
from eff_vision.projection_head import (
    HeadedEncoder,
    IdentityInitHead,
    MLPHead,
    ReweightingHead,
    SymmetricReLU,
    barlow_twins,
    choose_kappa,
    compare_pre_post,
    evenness,
    feature_weights,
    nt_xent,
    optimal_linear_weights,
    population_loss,
    population_minimum,
    probe,
    spectral_contrastive_loss,
    supcon,
)
from torch import nn

PHI = torch.tensor([1, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
SIGMA = torch.full_like(PHI, 0.6)
AFTER = [0.7353, 0.8, 0.8333, 0.7692, 0.5]
BEFORE = [0.8575, 0.8944, 0.9129, 0.8771, 0.7071]


def test_closed_form():
    assert optimal_linear_weights(PHI, 0.6, layer=2, depth=2).tolist() == pytest.approx(AFTER, abs=5e-5)
    assert optimal_linear_weights(PHI.tolist(), SIGMA, layer=1, depth=2).tolist() == pytest.approx(BEFORE, abs=5e-5)
    assert population_minimum(PHI, SIGMA) == pytest.approx(-1.3049, abs=5e-5)


def descend(lr, steps):
    """Gradient descent on the population loss of two layers of width 20, by its gradient in closed form."""
    torch.manual_seed(0)
    first = 0.02 * torch.randn(20, 5, dtype=torch.float64)
    second = 0.02 * torch.randn(20, 20, dtype=torch.float64)
    balance = second.T @ second - first @ first.T
    between, within = PHI.square(), PHI.square() + SIGMA.square()
    for _ in range(steps):
        product = second @ first
        gradient = -4 * product * between + 4 * ((product * within) @ product.T) @ (product * within)
        first, second = first - lr * second.T @ gradient, second - lr * gradient @ first.T
    return first, second, (second.T @ second - first @ first.T - balance).abs().max()


def test_the_gradient_of_the_descent_is_that_of_the_loss():
    first, second = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (6, 6)))
    population_loss([first, second], PHI, SIGMA).backward()
    product = second @ first
    within = PHI.square() + SIGMA.square()
    by_hand = -4 * product * PHI.square() + 4 * ((product * within) @ product.T) @ (product * within)
    torch.testing.assert_close(first.grad, second.T @ by_hand)
    assert float(population_loss([torch.zeros(3, 5, dtype=torch.float64)], PHI, SIGMA)) == 0


def test_gradient_descent_reaches_the_closed_form_and_the_square_root_law():
    first, second, _ = descend(0.05, 20_000)
    before, after = feature_weights([first, second])
    assert after.tolist() == pytest.approx(AFTER, abs=1e-3)
    assert before.tolist() == pytest.approx(BEFORE, rel=0.01)
    assert float(population_loss([first, second], PHI, SIGMA)) == pytest.approx(
        population_minimum(PHI, SIGMA), abs=1e-4
    )


def test_weak_features_lag_more_after_the_head():
    first, second, drift = descend(0.02, 4000)
    before, after = feature_weights([first, second])
    assert float(after[-1] / before[-1]) < 0.25
    assert float(drift) < 1e-3
    assert float(population_loss([first, second], PHI, SIGMA)) > population_minimum(PHI, SIGMA) + 0.05
    # more even before the head than after it
    data = torch.randn(4000, 5, dtype=torch.float64)
    assert evenness(data @ first.T).participation_ratio > evenness(data @ (second @ first).T).participation_ratio


def test_reweighting_head():
    head = ReweightingHead(6, kappa=1.5)
    assert float(head.weights[0]) == 1
    assert (head.weights[1:] / head.weights[:-1]).tolist() == pytest.approx([1 / 1.5] * 5)
    assert list(head.parameters()) == []
    assert list(head.state_dict()) == ["weights"]
    with pytest.warns(UserWarning, match="does nothing"):
        same = ReweightingHead(6, kappa=1.0)
    x = torch.randn(3, 6)
    assert torch.equal(same(x), x)
    assert float(ReweightingHead(600, 1.5, floor=1e-3).weights.min()) == pytest.approx(1e-3)
    half = torch.ones(1, 400, dtype=torch.float16)
    assert ReweightingHead(400, 1.05)(half).dtype == torch.float16


def test_kappa_and_the_effective_dimension():
    assert choose_kappa(10.756) == pytest.approx(1.05, abs=1e-3)
    kappa = 1.05
    weights = ReweightingHead(512, kappa).weights.double()
    assert float(weights.square().sum()) == pytest.approx(1 / (1 - kappa**-2), rel=1e-6)
    white = torch.randn(10_000, 512)
    ratio = evenness(ReweightingHead(512, kappa)(white)).participation_ratio
    assert ratio == pytest.approx((1 + kappa**-2) / (1 - kappa**-2), rel=0.05)


def test_evenness_at_its_ends():
    assert evenness(torch.randn(20_000, 8)).participation_ratio == pytest.approx(8, rel=0.02)
    line = torch.randn(50, 1) * torch.randn(1, 8)
    assert evenness(line).participation_ratio == pytest.approx(1)
    assert evenness(line).entropy == pytest.approx(1, abs=1e-6)


def test_nt_xent_values():
    b, tau = 4, 0.5
    z = torch.eye(b)
    assert float(nt_xent(z, z, temperature=tau)) == pytest.approx(
        math.log(1 + (2 * b - 2) * math.exp(-1 / tau)), abs=1e-6
    )
    z1, z2 = torch.randn(5, 7), torch.randn(5, 7)
    assert float(nt_xent(3 * z1, 0.1 * z2)) == pytest.approx(float(nt_xent(z1, z2)), abs=1e-5)
    head = ReweightingHead(7, 1.5)
    assert abs(float(nt_xent(head(z1), head(z2)) - nt_xent(z1, z2))) > 1e-2
    assert float(supcon(z1, z2, torch.arange(5))) == pytest.approx(float(nt_xent(z1, z2)), abs=1e-6)


def test_supcon_by_loops():
    z1, z2, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 0, 0])
    z = torch.nn.functional.normalize(torch.cat((z1, z2)), dim=1)
    both = torch.cat((labels, labels)).tolist()
    rows = []
    for i in range(8):
        scale = sum(math.exp(float(z[i] @ z[k]) / 0.5) for k in range(8) if k != i)
        found = [
            math.log(math.exp(float(z[i] @ z[k]) / 0.5) / scale) for k in range(8) if k != i and both[k] == both[i]
        ]
        rows.append(-sum(found) / len(found))
    assert float(supcon(z1, z2, labels)) == pytest.approx(sum(rows) / 8, abs=1e-5)


def test_spectral_and_barlow():
    assert float(spectral_contrastive_loss(torch.zeros(3, 2), torch.zeros(3, 2))) == 0
    z1, z2 = torch.randn(4, 3), torch.randn(4, 3)
    apart = [float(z1[i] @ z2[j]) ** 2 for i in range(4) for j in range(4) if i != j]
    want = -2 * sum(float(z1[i] @ z2[i]) for i in range(4)) / 4 + sum(apart) / 12
    assert float(spectral_contrastive_loss(z1, z2)) == pytest.approx(want, abs=1e-5)
    square = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert float(barlow_twins(square, square)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("loss", [spectral_contrastive_loss, nt_xent, barlow_twins])
def test_gradients(loss):
    z1, z2 = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss(z1, z2).backward()
    assert bool(z1.grad.isfinite().all())
    assert float(z1.grad.abs().sum()) > 0


def test_heads():
    x = torch.randn(4, 6)
    assert torch.equal(IdentityInitHead(6)(x), x)
    assert MLPHead(6, 8, 3, layers=3, norm="bn")(x).shape == (4, 3)
    y = SymmetricReLU(0.5)(torch.tensor([-2.0, -0.4, 0.4, 2.0]))
    assert y.tolist() == [-1.5, 0, 0, 1.5]
    out = HeadedEncoder(nn.Linear(6, 5), MLPHead(5, 4, 3))(x)
    assert (out.features.shape, out.projection.shape) == ((4, 5), (4, 3))
    with pytest.raises(ValueError, match="pool its map"):
        HeadedEncoder(nn.Identity(), nn.Identity())(torch.zeros(2, 3, 4, 4))


def test_probes_say_which_side_to_keep():
    labels = torch.arange(400) % 4
    features = torch.randn(400, 6) + 4 * torch.nn.functional.one_hot(labels, 6)
    projection = features[:, 2:5]  # has lost two classes
    parts = (features[:300], projection[:300]), (features[300:], projection[300:])
    found = compare_pre_post(*parts, labels[:300], labels[300:])
    assert found.keep == "pre"
    assert found.pre_accuracy > 0.9 > found.post_accuracy
    few = probe(features[:300], labels[:300], features[300:], labels[300:], kind="ridge", shots=5)
    assert 0.5 < few <= 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ReweightingHead(4, 0.0), "kappa must be positive, got 0.0"),
        (lambda: ReweightingHead(4, float("nan")), "kappa must be positive"),
        (lambda: ReweightingHead(4)(torch.zeros(2, 5)), "wanted 4 features, got 5"),
        (lambda: choose_kappa(1.0), "above 1"),
        (lambda: nt_xent(torch.zeros(1, 2), torch.zeros(1, 2)), "two items or more"),
        (lambda: nt_xent(torch.zeros(2, 2), torch.zeros(2, 3)), "of one shape"),
        (lambda: nt_xent(torch.zeros(2, 2), torch.zeros(2, 2), temperature=0), "temperature"),
        (lambda: supcon(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(3)), "labels must be"),
        (lambda: optimal_linear_weights([1.0], 0.1, layer=3, depth=2), "layer must be"),
        (lambda: optimal_linear_weights([-1.0], 0.1, layer=1, depth=2), "negative"),
        (lambda: evenness(torch.ones(5, 2)), "constant"),
        (lambda: evenness(torch.full((5, 2), float("nan"))), "not finite"),
        (lambda: MLPHead(2, 2, 2, layers=0), "layers must be"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
