import math

import pytest
import torch
from eff_vision.brain_encoder import (
    FrozenFeatureExtractor,
    LinearConvEncoder,
    RidgeEncoder,
    RoiMasks,
    RoiQueryConfig,
    RoiQueryEncoder,
    SpatialFeatureEncoder,
    attention_maps,
    encoding_accuracy,
    ensemble_predict,
    fit_encoder,
    layer_weights,
    make_synthetic_brain,
    pearson_columns,
    sine_position,
)

SMALL = {"feature_dim": 16, "d_model": 16, "num_heads": 4, "d_ff": 32, "dropout": 0.0}


def make(rois=None, **settings):
    torch.manual_seed(0)
    rois = rois or {"lh": RoiMasks.from_labels(torch.tensor([1, 1, 2, 2, 0]), ["a", "b"])}
    return RoiQueryEncoder(RoiQueryConfig(**{**SMALL, **settings}), rois).eval()


def test_the_readout_is_the_masked_sum_over_queries():
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    encoder = make({"lh": RoiMasks(masks, ("a", "b")), "rh": RoiMasks(masks[:, :3], ("c", "d"))})
    out = encoder(torch.randn(3, 6, 16), (2, 3))
    layer = encoder.readout["lh"]
    explicit = torch.einsum("rv,brv->bv", masks.float(), layer(out.tokens[:, :2]))
    torch.testing.assert_close(out.prediction["lh"], explicit, atol=1e-6, rtol=0)
    right = torch.einsum("rv,brv->bv", masks[:, :3].float(), encoder.readout["rh"](out.tokens[:, 2:]))
    torch.testing.assert_close(out.prediction["rh"], right, atol=1e-6, rtol=0)
    tokens = out.tokens.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(encoder._read(tokens)["lh"][:, 0].sum(), tokens)
    assert float(gradient[:, 1:].abs().max()) == 0  # vertex 0 is of region a alone
    assert float(gradient[:, 0].abs().min()) > 0


def test_weights_bring_their_regions():
    saved = make()
    other = make({"lh": RoiMasks.from_labels(torch.tensor([2, 1, 0, 1, 1]), ["a", "b"])})
    other.load_state_dict(saved.state_dict())
    x = torch.randn(3, 6, 16)
    assert torch.equal(other(x, (2, 3)).prediction["lh"], saved(x, (2, 3)).prediction["lh"])


def test_by_hand():
    encoder = make(
        {"x": RoiMasks(torch.ones(1, 3, dtype=torch.bool), ("all",))}, feature_dim=8, d_model=8, num_heads=1, d_ff=0
    )
    attention = encoder.attention
    with torch.no_grad():
        for layer in (attention.query, attention.key, attention.value, attention.out):
            layer.weight.copy_(torch.eye(8))
    x, e = torch.randn(2, 6, 8), sine_position(2, 3, 8)
    pooled = ((encoder.queries @ (x + e).mT) / math.sqrt(8)).softmax(-1) @ x
    out = encoder(x, (2, 3), return_attention=True)
    torch.testing.assert_close(out.tokens, encoder.norm(pooled), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder(x, (2, 3)).tokens, out.tokens, atol=1e-5, rtol=0)
    assert attention_maps(out, (2, 3), (20, 30)).shape == (2, 1, 20, 30)


def test_position_is_in_the_keys_alone():
    x = torch.randn(2, 6, 16)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    without, with_ = make(position=None), make()
    torch.testing.assert_close(without(x[:, order], (2, 3)).tokens, without(x, (2, 3)).tokens)
    assert float((with_(x[:, order], (2, 3)).tokens - with_(x, (2, 3)).tokens).detach().abs().max()) > 1e-3
    constant = torch.randn(1, 1, 16).expand(1, 6, 16)
    torch.testing.assert_close(with_(constant, (2, 3)).tokens, without(constant, (2, 3)).tokens, atol=1e-5, rtol=0)


def test_keys_of_position_alone_are_a_static_map():
    encoder = make(key_source="position")
    a = encoder(torch.randn(1, 6, 16), (2, 3), return_attention=True).attention
    b = encoder(torch.randn(1, 6, 16), (2, 3), return_attention=True).attention
    torch.testing.assert_close(a, b)


def test_padded_patches_get_no_attention():
    encoder, x = make(), torch.randn(2, 6, 16)
    mask = torch.tensor([[True] * 6, [True, True, False, True, True, False]])
    out = encoder(x, (2, 3), patch_mask=mask, return_attention=True)
    torch.testing.assert_close(out.attention.sum(-1), torch.ones(2, 4, 3))
    assert out.attention[1][..., ~mask[1]].abs().max().item() == 0
    changed = x.clone()
    changed[1, [2, 5]] += 10
    torch.testing.assert_close(encoder(changed, (2, 3), patch_mask=mask).tokens, out.tokens)


def test_sine_code_by_the_formula():
    code = sine_position(2, 3, 8)
    assert code.shape == (6, 8)
    for row in range(2):
        for column in range(3):
            for half, (place, count) in enumerate(((row, 2), (column, 3))):
                x = (place + 1) / (count + 1e-6) * 2 * math.pi
                want = [math.sin(x), math.cos(x), math.sin(x / 100), math.cos(x / 100)]
                assert code[3 * row + column, 4 * half : 4 * half + 4].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("position", "value"), [("learned", True), ("sine", False)])
def test_other_settings(position, value):
    encoder = make(position=position, value_projection=value, d_model=32)
    assert encoder(torch.randn(2, 6, 16), (2, 3)).prediction["lh"].shape == (2, 5)
    again = RoiQueryConfig.from_dict(encoder.config.to_dict())
    assert again == encoder.config


def test_parameters_at_the_papers_size():
    with torch.device("meta"):
        rois = {
            n: RoiMasks.from_labels(torch.arange(v, device="cpu") % 25) for n, v in (("lh", 19_004), ("rh", 20_544))
        }
        encoder = RoiQueryEncoder(RoiQueryConfig(), rois)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert encoder.queries.numel() == 38_400
    assert count(encoder.attention) == 2_362_368
    assert count(encoder.ff) == 1_574_656
    assert count(encoder.readout) == 30_412_412


def test_ridge_beside_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = torch.randn(60, 8), torch.randn(60, 3)
    for alpha in (0.5, 20.0):
        ours = RidgeEncoder([alpha]).fit(x, y).predict(x)
        theirs = linear.Ridge(alpha=alpha).fit(x.numpy().astype("f8"), y.numpy().astype("f8")).predict(x.numpy())
        torch.testing.assert_close(ours, torch.from_numpy(theirs).double(), atol=1e-6, rtol=0)


def test_ridge_takes_the_best_penalty_of_each_target():
    x = torch.randn(120, 20)
    y = torch.cat((x[:, :2], torch.randn(120, 2)), 1)  # two targets that are linear, two that are noise
    for validation in (None, (x[80:], y[80:])):
        fitted = RidgeEncoder([1e-3, 1e4]).fit(x[:80], y[:80], validation)
        assert fitted.alpha.tolist() == [1e-3, 1e-3, 1e4, 1e4]
    assert len(set(RidgeEncoder([1e-3, 1e4], per_target=False).fit(x, y).alpha.tolist())) == 1


def test_accuracy_values():
    base = torch.randn(4000, 1, dtype=torch.float64)
    other = torch.randn(4000, 1, dtype=torch.float64)
    base, other = ((v - v.mean()) / (v - v.mean()).norm() for v in (base, other))
    other = (other - (base * other).sum() * base) / (other - (base * other).sum() * base).norm()
    at = lambda r: r * base + math.sqrt(1 - r * r) * other  # noqa: E731
    assert float(pearson_columns(at(0.6), base)) == pytest.approx(0.6)
    assert float(encoding_accuracy(at(0.6), base, 0.5)) == pytest.approx(0.72)
    assert float(encoding_accuracy(at(0.9), base, 0.5)) == 1
    assert float(encoding_accuracy(at(-0.6), base)) == pytest.approx(-0.36)
    assert float(encoding_accuracy(at(-0.6), base, keep_sign=False)) == pytest.approx(0.36)
    assert bool(encoding_accuracy(at(0.6), base, 0.0).isnan())
    assert bool(pearson_columns(torch.zeros(5, 1), torch.randn(5, 1)).isnan())


def test_ensembles():
    weights = layer_weights(torch.tensor([[0.3, 0.2, float("nan")], [0.4, 0.2, float("nan")]]))
    assert weights[:, 0].tolist() == pytest.approx([0.0180, 0.9820], abs=1e-4)
    assert weights[:, 1:].flatten().tolist() == pytest.approx([0.5] * 4)
    a, b = torch.zeros(4, 2), torch.ones(4, 2)
    torch.testing.assert_close(ensemble_predict([a, b]), torch.full((4, 2), 0.5))
    assert float(ensemble_predict([a, b], torch.tensor([[0.3, 0.2], [0.4, 0.2]]))[0, 0]) == pytest.approx(
        0.982, abs=1e-4
    )


@pytest.mark.slow
def test_simulated_cortex():
    brain = make_synthetic_brain(2500)
    train, test = slice(0, 2000), slice(2000, 2500)
    content, place = slice(0, 60), slice(60, 80)

    def scores(prediction):
        r = pearson_columns(prediction, brain.responses[test])
        return r[content].mean().item(), r[place].mean().item()

    def fitted(**settings):
        # Wide enough that place and content lie apart: in 16 dimensions content drowns the code of the place.
        encoder = make({"all": brain.rois}, d_model=64, d_ff=64, **settings)
        data = (brain.features[train], {"all": brain.responses[train]})
        fit_encoder(
            encoder,
            data,
            (brain.features[test], {"all": brain.responses[test]}),
            brain.grid,
            lr=3e-3,
            epochs=12,
            batch=64,
            clip=1.0,
        )
        return scores(encoder(brain.features[test], brain.grid).prediction["all"])

    by_queries, by_content = fitted(), fitted(position=None)
    ridge = RidgeEncoder().fit(brain.features[train].flatten(1), brain.responses[train])
    by_ridge = scores(ridge.predict(brain.features[test].flatten(1)))
    ceiling = 1 / math.sqrt(1 + 0.5**2)
    assert by_queries[0] > 0.8 * ceiling
    assert by_queries[1] > 0.9 * ceiling
    assert by_content[1] < 0.3
    assert by_ridge[0] < 0.3
    assert by_ridge[1] > 0.9 * ceiling


def test_spatial_features_find_the_place():
    brain = make_synthetic_brain(600)
    groups = torch.arange(4).repeat_interleave(20)
    model = SpatialFeatureEncoder(36, 16, groups)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        loss = (model(brain.features) - brain.responses).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert int(model.place[3].argmax()) == 14
    assert float(pearson_columns(model(brain.features).detach(), brain.responses)[60:].mean()) > 0.8
    conv = LinearConvEncoder(16, (6, 6), 80, channels=8)
    assert conv(brain.features[:2]).shape == (2, 80)
    assert conv.penalty().item() > 0


def vit(kind):
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    if kind == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**common))
    if kind == "dinov2 with registers":
        return transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**common, num_register_tokens=3)
        )
    if kind == "clip":
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**common, intermediate_size=64))
    return transformers.ViTModel(transformers.ViTConfig(**common, intermediate_size=64))


@pytest.mark.parametrize("kind", ["dinov2", "dinov2 with registers", "clip", "vit"])
def test_backbones_stay_as_they_are(kind):
    torch.manual_seed(0)
    model = vit(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert model.training
    extractor = FrozenFeatureExtractor(model, layer=-2)
    assert not model.training
    assert not extractor.train().backbone.training
    pictures = torch.randn(2, 3, 28, 28)
    features, grid = extractor(pictures)
    assert grid == (4, 4)
    assert features.shape == (2, 16, 32)
    assert not features.requires_grad
    hidden = model(pixel_values=pictures, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(features, hidden[:, -16:])
    for part in ("query", "key", "value"):
        vectors = FrozenFeatureExtractor(model, kind=part)(pictures).features
        assert vectors.shape == (2, 16, 32)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_timm_backbone():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, num_heads=4, depth=2)
    extractor = FrozenFeatureExtractor(model, kind="query")
    pictures = torch.randn(1, 3, 32, 32)
    seen = []
    hook = model.blocks[-1].attn.qkv.register_forward_hook(lambda m, a, out: seen.append(out))
    features, grid = extractor(pictures)
    hook.remove()
    assert grid == (2, 2)
    torch.testing.assert_close(features, seen[0][:, 1:, :32])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make()(torch.zeros(1, 7, 16), (2, 3)), "class and register tokens"),
        (lambda: make()(torch.zeros(1, 6, 15), (2, 3)), r"\[B, S, 16\]"),
        (lambda: make()(torch.zeros(1, 6, 16), (2, 3), patch_mask=torch.zeros(1, 6, dtype=torch.bool)), "real patch"),
        (lambda: RoiMasks(torch.tensor([[True, False]]), ("a",)), "1 targets are in no region"),
        (lambda: RoiMasks(torch.tensor([[True]]), ("a", "b")), "one name each"),
        (lambda: RoiQueryConfig(num_heads=5), "num_heads=5 does not divide"),
        (lambda: RoiQueryConfig(position=None, key_source="position"), "needs a position code"),
        (lambda: RidgeEncoder([0.0]), "alphas must be positive"),
        (lambda: RidgeEncoder().fit(torch.zeros(3, 2), torch.zeros(4, 2)), "wanted"),
        (lambda: pearson_columns(torch.zeros(1, 2), torch.zeros(1, 2)), "N >= 2"),
        (lambda: RoiQueryEncoder(RoiQueryConfig(**SMALL), {}), "nothing to predict"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
