import pytest
import torch
from eff_attention.layer_reuse import LayerReuseConfig, select_blocks
from hypothesis import given, settings
from hypothesis import strategies as st


def config(top_k=8, block_size=2, min_seq_len=8, must_select=(0, -2, -1)):
    return LayerReuseConfig(top_k=top_k, block_size=block_size, min_seq_len=min_seq_len, must_select=must_select)


def test_worked_example():
    """Eleven keys in blocks of two: six blocks, four are taken, of which 0, 4 and 5 always."""
    mass = torch.tensor([[[0.0, 0.1, 0.4, 0.3, 0.0, 0.1], [0.0, 0.5, 0.1, 0.2, 0.1, 0.1]]])
    index, lengths = select_blocks(mass, [11], config())
    assert index.tolist() == [[[0, 2, 4, 5], [0, 1, 4, 5]]]
    assert lengths.tolist() == [7]  # three whole blocks, and the one key of the last


def test_heads_may_share_their_choice():
    """Together block 1 weighs 0.6, block 2 0.5 and block 3 0.5."""
    mass = torch.tensor([[[0.0, 0.1, 0.4, 0.3, 0.0, 0.1], [0.0, 0.5, 0.1, 0.2, 0.1, 0.1]]])
    settings = LayerReuseConfig(top_k=8, block_size=2, min_seq_len=8, shared_heads=True)
    assert select_blocks(mass, [11], settings).blocks.tolist() == [[[0, 1, 4, 5], [0, 1, 4, 5]]]


def test_rows_of_a_batch_are_alone():
    mass = torch.rand(3, 2, 20)
    lengths = [40, 8, 19]
    index, kept = select_blocks(mass, lengths, config())
    for row, length in enumerate(lengths):
        alone, kept_alone = select_blocks(mass[row : row + 1], [length], config())
        assert torch.equal(index[row, :, : alone.size(2)], alone[0])
        assert kept[row] == kept_alone[0]
    assert kept[1] == 8  # not above min_seq_len: all of it


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 5),
    blocks=st.integers(3, 6),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_heaviest_blocks_and_the_forced_ones(size, blocks, lengths, seed):
    settings = config(size * blocks, size, size * blocks)
    mass = torch.rand(len(lengths), 2, -(-max(lengths) // size) + 2, generator=torch.Generator().manual_seed(seed))
    index, kept = select_blocks(mass, lengths, settings)
    for row, length in enumerate(lengths):
        number = -(-length // size)
        count = min(number, blocks) if length > size * blocks else number
        for head in range(2):
            chosen = index[row, head, :count].tolist()
            assert chosen == sorted(set(chosen))
            assert {0, max(number - 2, 0), number - 1} <= set(chosen) <= set(range(number))
            left = set(range(number)) - set(chosen)
            free = set(chosen) - {0, number - 2, number - 1}
            if left and free:
                assert mass[row, head, sorted(left)].max() <= mass[row, head, sorted(free)].min()
            assert kept[row] == sum(min(size, length - size * b) for b in chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"top_k": 9}, "top_k=9 is not a multiple of block_size=2"),
        ({"top_k": 4}, "no room for the 3 blocks"),
        ({"min_seq_len": 7}, "min_seq_len=7 is less than top_k=8"),
        ({"must_select": (0, -2)}, "lacks -1"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_config_comes_back_from_json():
    assert LayerReuseConfig.from_dict(config().to_dict()) == config()
    with pytest.raises(ValueError, match="no \\['k'\\]"):
        LayerReuseConfig.from_dict({"k": 1})
    with pytest.raises(ValueError, match="LayerReuseConfig of version 2"):
        LayerReuseConfig.from_dict({**config().to_dict(), "version": 2})


@pytest.mark.parametrize("kind", [{"top_k": 16.0}, {"block_size": "8"}, {"must_select": -1}])
def test_values_of_another_kind_are_refused_at_once(kind):
    with pytest.raises(TypeError, match=next(iter(kind))):
        config(**kind)


def test_of_equal_blocks_the_earlier_is_taken_whatever_else_is_in_the_batch():
    """The weights of the hash selector are small whole numbers, so that equal ones are the rule."""
    settings = LayerReuseConfig(top_k=20, block_size=5, min_seq_len=20, selector="hash")
    alone = torch.tensor([[[101.0, 101, 101, 101, 100, 101, 100]]])
    batch = torch.zeros(2, 1, 18)
    batch[0, :, :7] = alone[0]
    assert select_blocks(alone, [34], settings).blocks[0, 0].tolist() == [0, 1, 5, 6]
    assert select_blocks(batch, [34, 90], settings).blocks[0, 0].tolist() == [0, 1, 5, 6]
