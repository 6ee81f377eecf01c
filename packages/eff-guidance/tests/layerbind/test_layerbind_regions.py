"""Which tokens boxes and masks hold."""

import pytest
import torch
from eff_guidance.layerbind import (
    Grid,
    Layer,
    Layout,
    boxes_to_token_indices,
    mask_to_token_indices,
    region_of,
    regions_of,
)
from eff_guidance.layerbind.regions import groups_by_neighbours, overlaps_earlier


@pytest.mark.parametrize(
    ("box", "wanted"),
    [
        ((16, 0, 32, 16), [1]),
        ((0, 0, 17, 16), [0, 1]),
        ((32, 16, 16, 0), [1]),  # corners swapped
        ((-50, -50, 16, 16), [0]),  # cut
        ((1000, 1000, 5000, 5000), [62 * 64 + 62, 62 * 64 + 63, 63 * 64 + 62, 63 * 64 + 63]),
        ((20, 20, 21, 21), [65]),  # one point
    ],
)
def test_boxes_are_rounded_outwards(box, wanted):
    assert boxes_to_token_indices([box], 1024, 1024, 16)[0].tolist() == wanted


@pytest.mark.parametrize("box", [(1024, 0, 1030, 16), (0, -20, 16, -4), (5, 5, 5, 9)])
def test_boxes_that_hold_nothing(box):
    with pytest.raises(ValueError, match="holds nothing"):
        boxes_to_token_indices([box], 1024, 1024, 16)


def test_sides_must_be_multiples():
    with pytest.raises(ValueError, match="not a multiple"):
        boxes_to_token_indices([(0, 0, 1, 1)], 100, 96, 16)


def test_units_of_boxes_do_not_matter():
    grid = Grid(8, 12)
    box = (0.25, 1 / 3, 0.5, 2 / 3)
    shares = region_of(Layer(prompt="a", box=box), (1.0, 1.0), grid)
    stretched = tuple(v * s for v, s in zip(box, (1536, 768, 1536, 768), strict=True))
    points = region_of(Layer(prompt="a", box=stretched), (1536.0, 768.0), grid)
    assert torch.equal(shares.idx, points.idx)
    assert len(shares.idx) == 3 * 4


def test_masks_take_tokens_that_they_half_cover():
    mask = torch.zeros(8, 8)
    mask[:4, :3] = 1  # the second column of tokens is half covered, the third not
    assert mask_to_token_indices(mask, Grid(4, 4)).tolist() == [0, 1, 4, 5]
    with pytest.raises(ValueError, match="covers no token of 4 x 4"):
        region_of(Layer(prompt="a", mask=torch.zeros(8, 8)), (1, 1), Grid(4, 4))


def test_region_and_map_are_inverse():
    mask = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    region = region_of(Layer(prompt="a", mask=mask), (1, 1), Grid(4, 4))
    assert region.idx.tolist() == [5, 6, 9]
    assert (region.top, region.left, region.high, region.wide) == (1, 1, 2, 2)
    values = torch.arange(6.0).view(2, 3)
    assert torch.equal(region.from_map(region.to_map(values)), values)
    assert sorted([*region.idx.tolist(), *region.outside.tolist()]) == list(range(16))


def test_regions_are_painted_from_the_furthest():
    layout = Layout(layers=(Layer(prompt="front", box=(0, 0, 0.5, 0.5)), Layer(prompt="back", box=(0, 0, 1, 1))))
    back, front = regions_of(layout, Grid(4, 4))
    assert (len(back.idx), len(front.idx)) == (16, 4)
    assert overlaps_earlier([back, front]) == [False, True]
    apart = Layout(layers=(Layer(prompt="a", box=(0, 0, 0.5, 1)), Layer(prompt="b", box=(0.5, 0, 1, 1))))
    assert overlaps_earlier(regions_of(apart, Grid(4, 4))) == [False, False]


def test_groups_tell_which_regions_do_not_hold_a_token():
    layout = Layout(layers=(Layer(prompt="a", box=(0, 0, 0.5, 1)), Layer(prompt="b", box=(0, 0, 1, 0.5))))
    regions = regions_of(layout, Grid(4, 4))
    seen = {}
    for tokens, near in groups_by_neighbours(regions, 16):
        seen.update(dict.fromkeys(tokens.tolist(), near))
    for token in range(16):
        assert seen[token] == tuple(i for i, r in enumerate(regions) if token not in r.idx.tolist())
