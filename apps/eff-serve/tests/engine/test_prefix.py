"""The index of shared blocks, by itself; see test_prefix_engine.py for what requests see of it."""

import pytest
import torch
from eff_serve.engine.prefix import Chain, PrefixCache, root_of
from eff_serve.engine.types import Sampling
from eff_serve.pictures.prompt import PromptPictures
from hypothesis import given, settings
from hypothesis import strategies as st

PAGE = 4


def chain_of(tokens, root=b"", pictures=None):
    return Chain(root, list(tokens), PAGE, pictures)


def keep(cache, chain):
    """Hold blocks for a whole chain, share them and let go of them."""
    blocks = cache.pool.take(-(-len(chain.tokens) // PAGE))
    cache.add(chain, blocks, 0, len(chain.tokens))
    cache.add_part(chain, blocks, len(chain.tokens))
    kept = list(blocks)
    cache.pool.give_back(blocks)
    return kept


def look(cache, chain, most=None):
    found = cache.find(chain, len(chain.tokens) if most is None else most)
    held = [*found.blocks, *([] if found.source is None else [found.source])]
    cache.pool.give_back(held)
    return found


def test_full_pages_are_shared_and_the_rest_is_copied():
    cache = PrefixCache(8, PAGE)
    blocks = keep(cache, chain_of(range(10)))  # two full blocks and two tokens
    found = look(cache, chain_of(range(12)))
    assert found.blocks == blocks[:2]
    assert (found.source, found.copied) == (blocks[2], 2)
    found = look(cache, chain_of(range(12)), most=8)
    assert (found.blocks, found.source) == (blocks[:2], None)
    found = look(cache, chain_of(range(8)), most=7)  # one token must be left to compute
    assert (found.blocks, found.source, found.copied) == (blocks[:1], blocks[1], 3)
    found = look(cache, chain_of([0, 1, 2, 3, 4, 9, 6, 7]))
    assert (found.blocks, found.source, found.copied) == (blocks[:1], blocks[1], 1)
    assert look(cache, chain_of([9, 1, 2, 3])).blocks == []


def test_the_same_tokens_elsewhere_are_other_keys():
    cache = PrefixCache(8, PAGE)
    keep(cache, chain_of([1, 1, 1, 1, 2, 2, 2, 2]))
    found = look(cache, chain_of([2, 2, 2, 2, 1, 1, 1, 1]))
    assert (found.blocks, found.source) == ([], None)


def test_the_longest_of_many_continuations_is_copied():
    cache = PrefixCache(16, PAGE)
    for end in ([5, 5, 5, 5], [6, 7, 0, 0], [6, 7, 8, 0]):
        keep(cache, chain_of([1, 1, 1, 1, *end]))
    assert look(cache, chain_of([1, 1, 1, 1, 6, 7, 8, 9])).copied == 3
    assert look(cache, chain_of([1, 1, 1, 1, 6, 7, 1, 9])).copied == 2


def test_what_acts_on_the_model_is_part_of_the_root_and_what_chooses_tokens_is_not():
    plain = Sampling(max_tokens=1)
    same = [
        Sampling(max_tokens=9, temperature=0.3, seed=4, top_p=0.5, grammar="{}", logprobs=1, logit_bias={1: 2.0}),
        Sampling(max_tokens=1, stop_token_ids=frozenset({4}), ignore_eos=True, min_tokens=1, presence_penalty=1.0),
    ]
    assert {root_of(s) for s in same} == {root_of(plain)}
    roots = [root_of(plain), root_of(plain, 0), root_of(Sampling(max_tokens=1, adapter="a"), 0)]
    roots += [root_of(Sampling(max_tokens=1, adapter="b"), 0), root_of(Sampling(max_tokens=1, adapter="b"), 1)]
    assert len(set(roots)) == len(roots)
    cache = PrefixCache(8, PAGE)
    keep(cache, chain_of(range(8), root_of(plain)))
    assert look(cache, chain_of(range(8), roots[1])).blocks == []
    assert len(look(cache, chain_of(range(8), root_of(same[0]))).blocks) == 2


def test_pictures_are_told_apart_by_what_they_show():
    def pictures(value, places=(5, 6)):
        return PromptPictures(torch.tensor(places), torch.full((len(places), 3), value))

    cache = PrefixCache(16, PAGE)
    tokens = [7] * 12
    blocks = keep(cache, chain_of(tokens, pictures=pictures(1.0)))
    assert look(cache, chain_of(tokens, pictures=pictures(1.0))).blocks == blocks
    other = look(cache, chain_of(tokens, pictures=pictures(2.0)))
    assert (other.blocks, other.source) == (blocks[:1], None)  # what comes before the picture is shared
    assert look(cache, chain_of(tokens, pictures=pictures(1.0, (5, 7)))).blocks == blocks[:1]
    plain = look(cache, chain_of(tokens))
    assert (plain.blocks, plain.source) == (blocks[:1], None)
    more = PromptPictures(torch.tensor([5, 6, 13]), torch.full((3, 3), 1.0))  # the next turn shows another one
    assert look(cache, chain_of(tokens + [7] * 4, pictures=more), most=15).blocks == blocks


def test_pages_are_forgotten_from_the_end_of_what_was_left_longest():
    cache = PrefixCache(6, PAGE)
    old, new = keep(cache, chain_of([1] * 12)), keep(cache, chain_of([2] * 12))
    assert (cache.pool.free, cache.pool.kept) == (6, 6)
    held = cache.pool.take(2)
    assert held == [old[2], old[1]]
    assert look(cache, chain_of([1] * 12)).blocks == old[:1]
    assert look(cache, chain_of([2] * 12)).blocks == new
    held += cache.pool.take(4)
    assert look(cache, chain_of([2] * 12)).blocks == []
    assert cache.pool.take(1) is None
    cache.pool.give_back(held)
    assert (cache.pool.free, cache.pool.kept) == (6, 0)


def test_a_page_that_is_being_read_is_not_handed_out():
    cache = PrefixCache(3, PAGE)
    blocks = keep(cache, chain_of([1] * 12))
    found = cache.find(chain_of([1] * 8), 8)
    assert found.blocks == blocks[:2]
    assert cache.pool.take(2) is None
    assert cache.pool.take(1) == [blocks[2]]


def test_a_page_that_says_the_same_as_another_stays_its_holders():
    cache = PrefixCache(4, PAGE)
    first, second = chain_of([1] * 4), chain_of([1] * 4)
    a, b = cache.pool.take(1), cache.pool.take(1)
    cache.add(first, a, 0, 4)
    cache.add(second, b, 0, 4)
    kept = a[0]
    cache.pool.give_back(a)
    cache.pool.give_back(b)
    assert cache.pool.kept == 1
    assert look(cache, chain_of([1] * 4)).blocks == [kept]


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=12),
    num_blocks=st.integers(4, 10),
)
def test_what_is_found_holds_the_tokens(texts, num_blocks):
    """Against a copy of what was written to each block."""
    cache, written = PrefixCache(num_blocks, PAGE), {}
    for text in texts:
        found = cache.find(chain_of(text), len(text))
        for number, block in enumerate(found.blocks):
            assert written[block] == (text[: number * PAGE], text[number * PAGE : (number + 1) * PAGE])
        start = len(found.blocks) * PAGE
        if found.source is not None:
            before, tokens = written[found.source]
            assert before == text[:start]
            assert tokens[: found.copied] == text[start : start + found.copied]
            assert 0 < found.copied <= PAGE
        held = [*found.blocks, *([] if found.source is None else [found.source])]
        cache.pool.give_back(held)
        blocks = cache.pool.take(-(-len(text) // PAGE))
        for number, block in enumerate(blocks):
            written[block] = (text[: number * PAGE], text[number * PAGE : (number + 1) * PAGE])
        chain = chain_of(text)
        cache.add(chain, blocks, 0, len(text))
        cache.add_part(chain, blocks, len(text))
        cache.pool.give_back(blocks)
        assert cache.pool.free == num_blocks


@pytest.mark.parametrize("misuse", ["hold", "keep", "give_back"])
def test_pages_that_nobody_holds_are_refused(misuse):
    pool = PrefixCache(2, PAGE).pool
    with pytest.raises(ValueError, match="block 1"):
        getattr(pool, misuse)([1] if misuse == "give_back" else 1)
