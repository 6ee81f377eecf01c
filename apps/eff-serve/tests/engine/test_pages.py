import pytest
from eff_serve.engine.pages import PagePool
from hypothesis import given
from hypothesis import strategies as st


@given(num_pages=st.integers(1, 20), moves=st.lists(st.integers(-5, 8), max_size=60))
def test_no_page_is_lost_or_held_twice(num_pages, moves):
    pool, held = PagePool(num_pages), []
    for move in moves:
        if move < 0 and held:
            pages = held.pop(-move % len(held))
            pool.give_back(pages)
            assert pages == []
        elif move >= 0:
            free = pool.free
            pages = pool.take(move)
            assert (pages is None) == (move > free)
            if pages is None:
                assert pool.free == free
            else:
                assert len(pages) == move
                held.append(pages)
        out = [p for pages in held for p in pages]
        assert len(set(out)) == len(out)
        assert set(out) <= set(range(num_pages))
        assert pool.free + len(out) == num_pages


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PagePool(0)
