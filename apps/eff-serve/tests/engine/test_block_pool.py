import pytest
from eff_serve.engine.block_pool import BlockPool
from hypothesis import given
from hypothesis import strategies as st


@given(num_blocks=st.integers(1, 20), moves=st.lists(st.integers(-5, 8), max_size=60))
def test_no_block_is_lost_or_held_twice(num_blocks, moves):
    pool, held = BlockPool(num_blocks), []
    for move in moves:
        if move < 0 and held:
            blocks = held.pop(-move % len(held))
            pool.give_back(blocks)
            assert blocks == []
        elif move >= 0:
            free = pool.free
            blocks = pool.take(move)
            assert (blocks is None) == (move > free)
            if blocks is None:
                assert pool.free == free
            else:
                assert len(blocks) == move
                held.append(blocks)
        out = [p for blocks in held for p in blocks]
        assert len(set(out)) == len(out)
        assert set(out) <= set(range(num_blocks))
        assert pool.free + len(out) == num_blocks


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        BlockPool(0)
