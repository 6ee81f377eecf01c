import pytest
import torch
from eff_attention.layer_reuse import LayerReuseConfig, apply_layer_reuse
from eff_attention.layer_reuse.selectors import HashedKeys, KeyIndex, PooledKeys, _ones
from eff_kernels.edit.caches import cache_kwargs
from hypothesis import given, settings
from hypothesis import strategies as st

INDICES = [PooledKeys, HashedKeys]


def configs(**changes):
    return {n: LayerReuseConfig(**{"top_k": 64, "block_size": 16, "min_seq_len": 64, **changes, "selector": n})
            for n in ("exact", "pooled", "hash")}  # fmt: skip


@pytest.fixture(params=["pooled", "hash"])
def selector(request):
    return request.param


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pooled_mass_by_hand():
    q, k = draw(1, 4, 8), draw(1, 2, 21, 8, seed=1)
    found = PooledKeys(8, 3).mass(q, k, [0], [21], 0.5)
    for head in range(2):
        wanted = torch.zeros(3)
        for h in (2 * head, 2 * head + 1):
            weights = [
                n * torch.exp(0.5 * q[0, h] @ k[0, head, i : i + n].mean(0)) for i, n in ((0, 8), (8, 8), (16, 5))
            ]
            wanted += torch.stack(weights) / sum(weights)
        torch.testing.assert_close(found[0, head], wanted)


def test_pooled_mass_is_the_mass_where_the_keys_of_a_block_are_alike():
    q, k = draw(2, 2, 8), draw(2, 2, 5, 1, 8, seed=1).expand(-1, -1, -1, 4, -1).flatten(2, 3)
    found = PooledKeys(4, 3).mass(q, k, [0, 0], [20, 20], 0.3)
    wanted = (0.3 * q[:, :, None] @ k.mT).softmax(-1).unflatten(-1, (5, 4)).sum(-1)[:, :, 0]
    torch.testing.assert_close(found, wanted)


def test_hashed_mass_by_hand():
    q, k = draw(1, 4, 8), draw(1, 2, 21, 8, seed=1)
    index = HashedKeys(8, 3)
    found = index.mass(q, k, [0], [21], 0.5)
    signs_q = (q[0].unflatten(0, (2, 2)) @ index.projection) > 0
    signs_k = (k[0] @ index.projection) > 0
    for head in range(2):
        common = (signs_q[head][:, None] == signs_k[head]).sum(-1)
        wanted = torch.stack([common[:, i : i + 8].amax(1).sum() for i in (0, 8, 16)])
        assert found[0, head].tolist() == wanted.tolist()
    assert torch.equal(HashedKeys(8, 3).mass(q, k, [0], [21], 0.5), found)
    assert not torch.equal(HashedKeys(8, 4).mass(q, k, [0], [21], 0.5), found)


@pytest.mark.parametrize("make", INDICES)
def test_the_nearest_block_wins(make):
    k = draw(1, 2, 256, 32)
    q = torch.stack([k[0, 0, 100], k[0, 1, 200]])[None]
    k[:, :, 96:112] += k[:, :1, 100:101]  # neighbours that resemble it, as a mean needs
    k[:, :, 192:208] += k[:, 1:, 200:201]
    found = make(16, 1).mass(q, k, [0], [256], 1.0)
    assert found.argmax(-1).tolist() == [[100 // 16, 200 // 16]]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(INDICES),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(0, 999),
)
def test_an_index_that_grows_equals_one_made_anew(make, sequences, steps, size, seed):
    firsts, lengths = (list(x) for x in zip(*sequences, strict=True))
    room = max(f + n for f, n in sequences) + steps
    k, index, built = draw(len(firsts), 2, room, 4, seed=seed), make(size, 2), []
    usual = index._build
    index._build = lambda keys: (built.append(1), usual(keys))
    for step in range(steps):
        now = [n + step for n in lengths]
        q, cache = draw(len(firsts), 4, 4, seed=step), k[:, :, : room - steps + step + 1]
        found = index.mass(q, cache, firsts, now, 0.5)
        fresh = make(size, 2).mass(q, cache, firsts, now, 0.5)
        for row, n in enumerate(now):
            blocks = -(-n // size)
            torch.testing.assert_close(found[row, :, :blocks], fresh[row, :, :blocks], rtol=1e-4, atol=1e-5)
    assert len(built) == 1


@pytest.mark.parametrize("make", INDICES)
def test_an_index_of_other_keys_is_made_anew(make, prompt):
    k, index = draw(2, 2, 30, 4), make(4, 2)
    q = draw(2, 4, 4)
    index.mass(q, k, [0, 0], [20, 20], 0.5)
    for keys, firsts, lengths in (
        (k.flip(0), [0, 0], [21, 21]),  # beams changed places
        (draw(2, 2, 30, 4, seed=5), [0, 0], [22, 22]),  # another prompt, one token longer
        (k, [1, 0], [23, 23]),
        (k, [1, 0], [25, 25]),  # a longer step
        (k, [1, 0], [12, 12]),  # cropped
        (k[:1], [1], [13]),
        (k[:1].bfloat16(), [1], [14]),
    ):
        one = q[: len(keys)]
        found = index.mass(one, keys, firsts, lengths, 0.5)
        torch.testing.assert_close(found, make(4, 2).mass(one, keys, firsts, lengths, 0.5))


@pytest.mark.parametrize("make", INDICES)
def test_layer_zero_keeps_nothing(make):
    """Its keys tell of their own token alone: two histories may end alike."""
    k, index, q = draw(1, 2, 30, 4), make(4, 0), draw(1, 4, 4)
    index.mass(q, k, [0], [20], 0.5)
    k[:, :, :19] = draw(1, 2, 19, 4, seed=7)
    torch.testing.assert_close(index.mass(q, k, [0], [21], 0.5), make(4, 0).mass(q, k, [0], [21], 0.5))


def test_as_many_keys_as_there_are_is_dense(selector, model, monkeypatch, mixed, decode, prompt):
    tokens = prompt(2)
    wanted = decode(model, tokens)
    monkeypatch.setattr(LayerReuseConfig, "num_blocks", 1000)
    with apply_layer_reuse(model, mixed, configs()[selector]):
        actual = decode(model, tokens)
    assert (actual - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert not torch.equal(actual, wanted)


def test_anchors_read_what_they_chose(selector, model, monkeypatch, policy, decode, prompt):
    """NaN in all other values, at every step: only full layers see it, of which this plan has none."""
    import eff_attention.layer_reuse.rule as module

    real, calls = module.decode_attention, []

    def poisoned(q, k, v, lengths, *, block_table, run, scale):
        kept = torch.zeros(k.shape[:3], dtype=torch.bool)
        for i in range(int(lengths)):
            for head in range(k.size(1)):
                kept[0, head, block_table[0, head, i // run] + i % run] = True
        calls.append(int(lengths))
        k, v = (t.masked_fill(~kept[..., None], torch.nan) for t in (k, v))
        return real(q, k, v, lengths, block_table=block_table, run=run, scale=scale)

    monkeypatch.setattr(module, "decode_attention", poisoned)
    monkeypatch.setattr(module, "scored_decode_attention", None)
    with apply_layer_reuse(model, policy("A0A2A4"), configs()[selector]):
        assert decode(model, prompt()).isfinite().all()
    assert len(calls) == 4 * 6
    assert all(48 < n <= 64 for n in calls)


def test_full_layers_that_serve_are_exact(selector, model, policy, decode, prompt):
    tokens = prompt()
    results = []
    for name in ("exact", selector):
        with apply_layer_reuse(model, policy("FF1F33"), configs()[name]):
            results.append(decode(model, tokens))
    assert torch.equal(*results)


def test_padded_rows_equal_single_rows(selector, model, mixed, decode, prompt):
    tokens, mask = prompt(3), torch.ones(3, 200, dtype=torch.long)
    pads = [0, 37, 150]
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    with apply_layer_reuse(model, mixed, configs()[selector]):
        together = decode(model, tokens, mask=mask)
        alone = [decode(model, tokens[row : row + 1, pad:]) for row, pad in enumerate(pads)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_caches_beams_and_calls_after_another(selector, model, mixed, prompt, monkeypatch):
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = prompt(2, 100)
    with apply_layer_reuse(model, mixed, configs()[selector]):
        first = model.generate(tokens, **options)
        static = model.generate(tokens, cache_implementation="static", disable_compile=True, **options)
        beams = model.generate(tokens, num_beams=3, **options)
        again = model.generate(tokens, **options)
    assert torch.equal(first, static)
    assert torch.equal(first, again)
    monkeypatch.setattr(KeyIndex, "_continues", lambda *args: False)  # no memory from step to step
    with apply_layer_reuse(model, mixed, configs()[selector]):
        assert torch.equal(model.generate(tokens, num_beams=3, **options), beams)


@pytest.fixture
def forgetful(model):
    """A model whose keys of layer 1 tell of their own token alone: two histories may end alike."""
    import copy

    made = copy.deepcopy(model)
    made.model.layers[0].self_attn.o_proj.weight.data.zero_()
    return made


@pytest.fixture
def histories(forgetful, prompt):
    """Two texts that differ from token 1 to 170, and a function that reads a part of one with a cache."""
    one, two = prompt(2, 230)[:, :202].split(1)
    two = torch.cat((one[:, :1], two[:, 1:170], one[:, 170:]), 1)

    @torch.no_grad()
    def read(tokens, first, last, cache, mask=None):
        return forgetful(tokens[:, first:last], attention_mask=mask, **cache_kwargs(forgetful, cache)).logits

    return one, two, read


def test_a_cache_that_is_filled_anew_is_noticed(selector, forgetful, policy, histories):
    """The last keys are those that the index saw, and the length is one more: only the passes between tell."""
    from transformers import DynamicCache

    one, two, read = histories
    results, whole = [], torch.ones(1, 1, 1, 201, dtype=torch.bool)
    for used in (False, True):
        cache = DynamicCache(config=forgetful.config)
        with apply_layer_reuse(forgetful, policy("FAA1A2"), configs()[selector]):
            read(one, 0, 1, cache)
            if used:
                read(one, 1, 200, cache)
                read(one, 200, 201, cache)
                cache.crop(-200)
            read(two, 1, 200, cache)
            read(two, 200, 201, cache, whole)  # a mask of the caller runs dense, and no anchor ranks
            results.append(read(two, 201, 202, cache))
    assert torch.equal(*results)


def test_two_caches_in_turn_do_not_mix(selector, forgetful, policy, histories):
    """Both prompts are read first, so that no prompt comes between the steps."""
    from transformers import DynamicCache

    one, two, read = histories
    results = []
    for mixed in (False, True):
        first, second = (DynamicCache(config=forgetful.config) for _ in range(2))
        with apply_layer_reuse(forgetful, policy("FAA1A2"), configs()[selector]):
            read(one, 0, 200, first)
            read(two, 0, 200, second)
            read(two, 200, 201, second)
            if mixed:
                read(one, 200, 201, first)
            results.append(read(two, 201, 202, second))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", INDICES)
def test_beams_that_differ_a_few_keys_back_are_noticed(make):
    k, index, q = draw(1, 2, 30, 4), make(16, 1), draw(1, 4, 4)
    index.mass(q, k, [0], [20], 0.5)
    k[:, :, 8] = 9 * draw(2, 4, seed=5)
    torch.testing.assert_close(index.mass(q, k, [0], [21], 0.5), make(16, 1).mass(q, k, [0], [21], 0.5))


@pytest.mark.parametrize("make", INDICES)
def test_an_index_reads_no_old_keys(make):
    """NaN before the last 16 keys, once the index is made: those are all that later steps look at."""
    k, index = draw(2, 2, 230, 8), make(16, 1)
    index.mass(draw(2, 4, 8), k, [0, 0], [200, 200], 0.5)
    gone = k.clone()
    gone[:, :, :184] = torch.nan
    for n in range(201, 230):
        q = draw(2, 4, 8, seed=n)
        found = index.mass(q, gone, [0, 0], [n, n], 0.5)
        blocks = -(-n // 16)
        wanted = make(16, 1).mass(q, k, [0, 0], [n, n], 0.5)
        torch.testing.assert_close(found[..., :blocks], wanted[..., :blocks], rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_bits_are_counted_as_python_does(words):
    assert _ones(torch.tensor(words)).tolist() == [(w & (2**64 - 1)).bit_count() for w in words]


def test_an_index_is_small():
    """A mean of a block in float32, and sixteen bytes a key, of each key-value head."""
    k, q = draw(1, 2, 256, 8), draw(1, 4, 8)
    pooled, hashed = PooledKeys(16, 1), HashedKeys(16, 1)
    for index in (pooled, hashed):
        index.mass(q, k, [0], [256], 1.0)
    assert pooled.sums.nbytes == 2 * 16 * 8 * 4
    assert hashed.codes.nbytes == 2 * 256 * 16


def test_names_are_checked(prompt):
    with pytest.raises(ValueError, match="selector='best'; use one of"):
        LayerReuseConfig(selector="best")
    with pytest.raises(ValueError, match="phase='prompt'; use one of"):
        LayerReuseConfig(phase="prompt")
    config = configs(phase="both")["hash"]
    assert LayerReuseConfig.from_dict(config.to_dict()) == config
