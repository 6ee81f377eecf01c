import pytest
import torch
from eff_vision.metrics import sequence_score
from eff_vision.scanpath import (
    DistancePositionEncoding2D,
    OatConfig,
    ObjectScanpathTransformer,
    gaussian_position_table,
    make_shelves,
    simulate_searcher,
)
from eff_vision.scanpath.model import PAD, GridMaxPool

SMALL = {
    "d_model": 48,
    "max_grid": 10,
    "num_heads": 2,
    "enc_layers": 1,
    "dec_layers": 1,
    "d_ff": 32,
    "dropout": 0.0,
    "feature_dim": 6,
}


def make(**settings):
    torch.manual_seed(0)
    return ObjectScanpathTransformer(OatConfig(**{**SMALL, **settings})).eval()


def scene(n=5, batch=2, steps=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "positions": torch.stack((torch.arange(n) // 3, torch.arange(n) % 3), -1).expand(batch, -1, -1),
        "features": torch.randn(batch, n, 6, generator=g),
        "target": torch.randint(n, (batch,), generator=g),
        "fixations": torch.randint(n, (batch, steps), generator=g),
    }


def test_position_table_is_exact():
    table = gaussian_position_table(14, 86)
    place = torch.arange(14, dtype=torch.float64)
    want = torch.exp(-((place[:, None] - place) ** 2) / 8)
    torch.testing.assert_close(table @ table.T, want, atol=1e-6, rtol=0)
    code = DistancePositionEncoding2D(172)
    at = lambda r, c: code(torch.tensor([r, c]))  # noqa: E731
    cosine = lambda a, b: float(torch.nn.functional.cosine_similarity(a, b, dim=0))  # noqa: E731
    assert cosine(at(0, 0), at(1, 0)) == pytest.approx(0.9412, abs=1e-4)
    assert cosine(at(0, 0), at(0, 5)) == pytest.approx(0.5220, abs=1e-4)
    assert cosine(at(0, 0), at(1, 5)) == pytest.approx(0.4632, abs=1e-4)
    free = DistancePositionEncoding2D(8192, mode="continuous")
    assert cosine(free(torch.tensor([0.3, 1.0])), free(torch.tensor([1.3, 1.0]))) == pytest.approx(0.9412, abs=0.02)


def test_order_of_objects_does_not_matter():
    model, s = make(), scene()
    order = torch.tensor([3, 0, 4, 1, 2])
    inverse = order.argsort()
    moved = {
        "positions": s["positions"][:, order],
        "features": s["features"][:, order],
        "target": inverse[s["target"]],
        "fixations": inverse[s["fixations"]],
    }
    a, b = model(**s), model(**moved)
    torch.testing.assert_close(b.logits, a.logits[..., [*order.tolist(), 5]], atol=1e-5, rtol=0)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=0)


def test_masked_objects_change_nothing():
    model, s = make(), scene()
    mask = torch.tensor([[True] * 5 + [False] * 2] * 2)
    wide = {
        **s,
        "features": torch.cat((s["features"], torch.randn(2, 2, 6)), 1),
        "positions": torch.cat((s["positions"], torch.ones(2, 2, 2, dtype=torch.int64)), 1),
        "object_mask": mask,
    }
    a, b = model(**s).logits, model(**wide).logits
    torch.testing.assert_close(b[..., [0, 1, 2, 3, 4, 7]], a, atol=1e-5, rtol=0)
    assert bool((b[..., 5:7] == -torch.inf).all())


@pytest.mark.parametrize("inhibition", [False, True])
def test_the_future_is_not_seen(inhibition):
    model, s = make(inhibition=inhibition), scene()
    if inhibition:
        model.inhibition.data.fill_(1.5)
    changed = s["fixations"].clone()
    changed[:, 2] = (changed[:, 2] + 1) % 5
    a, b = model(**s).logits, model(**{**s, "fixations": changed}).logits
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert float((a[:, 3:] - b[:, 3:]).abs().max().detach()) > 1e-4


def test_any_number_of_objects():
    assert make()(**scene(n=12)).logits.shape == (2, 5, 13)
    assert make()(**scene(n=30)).logits.shape == (2, 5, 31)


def test_the_loss_of_a_batch_is_the_mean_over_steps():
    model, s = make(), scene()
    s["fixations"][1, 2:] = PAD
    whole = model(**s).loss.item()
    singles = [
        model(**{k: v[i : i + 1, : (2 if i else 4)] if k == "fixations" else v[i : i + 1] for k, v in s.items()})
        for i in (0, 1)
    ]
    assert whole == pytest.approx((5 * singles[0].loss.item() + 3 * singles[1].loss.item()) / 8, abs=1e-5)
    by_hand = singles[1].logits[0].log_softmax(-1)
    path = [*s["fixations"][1, :2].tolist(), 5]
    assert singles[1].loss.item() == pytest.approx(-sum(by_hand[i, x].item() for i, x in enumerate(path)) / 3, abs=1e-5)


def test_greedy_paths_are_those_of_repeated_forwards():
    model, s = make(), scene()
    fixations = s.pop("fixations")
    paths, lengths = model.generate(**s, max_len=6)
    for row in range(2):
        path = []
        while len(path) < 6:
            one = {k: v[row : row + 1] for k, v in s.items()}
            logits = model(**one, fixations=torch.tensor([path], dtype=torch.int64).view(1, -1)).logits[0, -1]
            if not path:
                logits[-1] = -torch.inf
            best = int(logits.argmax())
            if best == 5:
                break
            path.append(best)
        assert paths[row, 0, : lengths[row, 0]].tolist() == path
    assert fixations.shape == (2, 4)


def test_sampled_first_steps_follow_the_softmax():
    model, s = make(), scene(batch=1)
    s.pop("fixations")
    paths, _ = model.generate(**s, max_len=1, num_samples=5000, generator=torch.Generator().manual_seed(0))
    logits = model(**s, fixations=torch.zeros(1, 0, dtype=torch.int64)).logits[0, 0, :5]
    want = 5000 * logits.softmax(0)
    counts = torch.bincount(paths.flatten(), minlength=5)
    assert ((counts - want) ** 2 / want).sum().item() < 18.5  # chi-square, four degrees of freedom, p = 0.001


def test_crops_are_read_too():
    model = make(feature_dim=None)
    s = scene()
    s["images"] = torch.rand(2, 5, 3, 30, 20)
    del s["features"]
    out = model(**s)
    out.loss.backward()
    assert float(model.appearance[0].weight.grad.abs().max()) > 0


def test_pictures_that_come_again_are_read_once():
    model, s = make(feature_dim=None).eval(), scene()
    del s["features"]
    stock, looks = torch.rand(3, 3, 24, 24), torch.tensor([[0, 1, 2, 1, 0], [2, 2, 0, 1, 1]])
    with torch.no_grad():
        torch.testing.assert_close(
            model(**s, images=stock, looks=looks).logits, model(**s, images=stock[looks]).logits, rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match="looks are indices"):
        model(**s, images=stock[looks], looks=looks)


def test_what_all_objects_share_does_not_matter():
    s = scene()
    shifted = {**s, "features": s["features"] + 7 * torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(3))}
    for centred in (True, False):
        model = make(centre_appearance=centred)
        with torch.no_grad():
            apart = (model(**s).logits - model(**shifted).logits).abs().max()
        assert (float(apart) < 1e-4) == centred


def test_what_is_exported_gives_the_same_numbers(monkeypatch):
    model, s = make().eval(), scene()
    with torch.no_grad():
        assert torch.equal(model.scores(**s), model(**s).logits)
    pool = GridMaxPool(9, 5)
    for size in ((10, 10), (27, 11), (9, 5), (4, 3)):
        maps = torch.randn(2, 3, *size)
        plain = pool(maps)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_exporting", lambda: True)
            assert torch.equal(pool(maps), plain)


def test_hidden_targets_have_no_place():
    s = scene()
    moved = {**s, "positions": s["positions"].flip(1)}
    for reveal in (False, True):
        model = make(reveal_target_position=reveal, position="gaussian")
        seen = []
        hook = model.encoder.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0][:, -1]))
        model(**s), model(**moved)
        hook.remove()
        assert torch.equal(seen[0], seen[1]) != reveal


@pytest.mark.slow
def test_a_simulated_searcher_is_learnt():
    torch.manual_seed(0)
    shelves = make_shelves(100, seed=0)
    g = torch.Generator().manual_seed(0)
    train = [(s, simulate_searcher(s, g)) for s in shelves[:80] for _ in range(5)]
    test = [(s, [simulate_searcher(s, g) for _ in range(4)]) for s in shelves[80:]]
    model = make(feature_dim=16, d_model=64, d_ff=64, enc_layers=2, dec_layers=2, pre_norm=True).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def batch(items):
        longest = max(len(p) for _, p in items)
        paths = torch.full((len(items), longest), PAD)
        for i, (_, p) in enumerate(items):
            paths[i, : len(p)] = torch.tensor(p)
        fixed = {
            "positions": torch.stack([s.positions for s, _ in items]),
            "features": torch.stack([s.features for s, _ in items]),
        }
        return {**fixed, "target": torch.tensor([s.target for s, _ in items]), "fixations": paths}

    for _ in range(6):
        for rows in torch.randperm(len(train)).split(50):
            loss = model(**batch([train[i] for i in rows])).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.eval()
    inputs = batch([(s, p[0]) for s, p in test])
    del inputs["fixations"]
    paths, lengths = model.generate(**inputs, num_samples=4, generator=torch.Generator().manual_seed(1))
    drawn = [
        [p[:n].tolist() for p, n in zip(ps, ns, strict=True)] for ps, ns in zip(paths, lengths.tolist(), strict=True)
    ]
    walk = [[torch.randint(24, (len(p),), generator=g).tolist() for p in ps] for _, ps in test]

    def score(paths_of_each):
        pairs = [(a, b) for (_, true), ps in zip(test, paths_of_each, strict=True) for a in ps for b in true]
        return sum(sequence_score(a, b) for a, b in pairs) / len(pairs)

    assert score(drawn) > 1.5 * score(walk)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gaussian_position_table(14, 10), "needs dim >= 14"),
        (lambda: gaussian_position_table(4, 10, 0.0), "sigma must be positive"),
        (lambda: DistancePositionEncoding2D(64)(torch.tensor([14, 0])), "from 0 to 13"),
        (lambda: make()(**{**scene(), "fixations": torch.tensor([[5], [0]])}), "from 0 to 4"),
        (lambda: make()(**{**scene(), "fixations": torch.tensor([[PAD, 0], [0, 1]])}), "fill the end"),
        (lambda: make()(**scene(), images=torch.zeros(2, 5, 3, 9, 9)), "exactly one"),
        (lambda: make(feature_dim=None)(**scene()), "feature_dim is set"),
        (lambda: make()(**scene(), object_mask=torch.zeros(2, 5, dtype=torch.bool)), "object_mask leaves out"),
        (lambda: OatConfig(d_model=30, num_heads=4), "multiple of twice"),
        (lambda: make_shelves(1, kinds=2, colours=2), "too few"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
