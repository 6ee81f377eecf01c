"""Worked examples of the maths: shares of patches, sinks, heat maps, directions, points, measures."""

import json

import pytest
import torch
from eff_guidance.refam import (
    RefAMConfig,
    best_fit,
    box_of,
    find_global_sinks,
    grounding_heatmap,
    keep_tokens,
    mean_iou,
    overall_iou,
    overlay,
    peaks,
    point_accuracy,
    region_at,
    spatial_bias,
    text_share,
)  # fmt: skip


def test_magnet_worked_example():
    # "cat" and "the"; a background patch and one of the object
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    two = text_share(logits, torch.ones(2, dtype=torch.bool))[:, 0]
    torch.testing.assert_close(two, torch.tensor([0.2689, 0.7311], dtype=torch.float64), atol=5e-5, rtol=0)
    assert float(two[1] / two[0]) == pytest.approx(2.72, abs=5e-3)
    magnet = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    three = text_share(torch.cat([logits, magnet], 1), torch.ones(3, dtype=torch.bool))[:, 0]
    torch.testing.assert_close(three, torch.tensor([0.0900, 0.6652], dtype=torch.float64), atol=5e-5, rtol=0)
    assert float(three[1] / three[0]) == pytest.approx(7.39, abs=5e-3)


def test_magnets_at_the_limits():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(5, dtype=torch.bool)
    before = text_share(logits, valid[:4])
    nothing = torch.cat([logits, torch.full((5, 1), -torch.inf, dtype=torch.float64)], 1)
    assert torch.equal(text_share(nothing, valid)[:, :4], before)
    even = torch.cat([logits, logits.logsumexp(1, keepdim=True)], 1)
    torch.testing.assert_close(text_share(even, valid)[:, :4], before / 2, atol=1e-12, rtol=0)


def test_padding_gets_nothing():
    share = text_share(torch.randn(3, 4), torch.tensor([True, True, False, False]))
    assert (share[:, 2:] == 0).all()
    torch.testing.assert_close(share.sum(1), torch.ones(3))
    assert (text_share(torch.randn(3, 4), torch.zeros(4, dtype=torch.bool)) == 0).all()


def test_planted_sink():
    draw = torch.Generator().manual_seed(0)
    image, text = torch.randn(100, 12, generator=draw) * 0.3, torch.randn(12, 12, generator=draw) * 0.3
    image[:, 3] += 6  # a sink
    text[:, 3] += 6
    image[:10, 7] += 9  # an object
    valid = torch.ones(12, dtype=torch.bool)
    valid[-2:] = False
    found = find_global_sinks(text_share(text, valid), text_share(image, valid), valid)
    assert found.nonzero()[:, 0].tolist() == [3]
    # a token that the text looks at but that is high in one place only is none
    text[:, 7] += 9
    found = find_global_sinks(text_share(text, valid), text_share(image, valid), valid)
    assert not found[7]
    with pytest.raises(ValueError, match="12 tokens"):
        find_global_sinks(torch.ones(11, 11), torch.ones(100, 12), valid)


def test_heatmap_is_linear_and_knows_no_order():
    draw = torch.Generator().manual_seed(1)
    maps = torch.rand(3, 12, 6, generator=draw)
    one, two = (torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(at), True) for at in ([0], [2, 3]))
    both = grounding_heatmap(maps, one | two, (3, 4), (48, 64))
    apart = grounding_heatmap(maps, one, (3, 4), (48, 64)) + grounding_heatmap(maps, two, (3, 4), (48, 64))
    torch.testing.assert_close(both, apart)
    order = torch.tensor([3, 1, 0, 2, 5, 4])  # kept among themselves, magnets among themselves
    torch.testing.assert_close(grounding_heatmap(maps[..., order], (one | two)[order], (3, 4), (48, 64)), both)
    doubled = grounding_heatmap(2 * maps, one | two, (3, 4), (48, 64))
    torch.testing.assert_close(doubled, 2 * both)
    scaled = grounding_heatmap(maps * torch.tensor([9.0, 1, 1, 1, 1, 1]), one | two, (3, 4), (48, 64), rescale=True)
    torch.testing.assert_close(scaled, grounding_heatmap(maps, one | two, (3, 4), (48, 64), rescale=True))
    with pytest.raises(ValueError, match="grid"):
        grounding_heatmap(maps, one, (3, 5), (48, 64))
    with pytest.raises(ValueError, match="no token"):
        grounding_heatmap(maps, one & two, (3, 4), (48, 64))


@pytest.mark.parametrize(("grid", "at"), [((4, 6), (1, 4)), ((6, 4), (5, 0)), ((3, 3), (2, 1))])
def test_impulse_comes_back_where_it_was(grid, at):
    maps = torch.zeros(grid[0] * grid[1], 1)
    maps[at[0] * grid[1] + at[1]] = 1
    heat = grounding_heatmap(maps, torch.ones(1, dtype=torch.bool), grid, (16 * grid[0], 16 * grid[1]))
    x, y = peaks(heat)[0]
    assert abs(x - (at[1] + 0.5) * 16) <= 8
    assert abs(y - (at[0] + 0.5) * 16) <= 8


def test_directions_move_the_point():
    two = torch.zeros(32, 32)
    two[14:18, 4:8] = two[14:18, 24:28] = 1
    assert peaks(two * spatial_bias("the dog on the left", (32, 32)))[0][0] < 8
    assert peaks(two * spatial_bias("rightmost dog", (32, 32)))[0][0] > 23
    assert peaks(two.mT * spatial_bias("the bottom dog", (32, 32)))[0][1] > 23
    assert torch.equal(spatial_bias("the red dog", (5, 7)), torch.ones(5, 7))
    ramp = spatial_bias("left", (2, 100))
    assert float(ramp[0, 0]) == pytest.approx(0.9975)
    assert float(ramp[0, -1]) == pytest.approx(0.5025)
    assert divmod(int(spatial_bias("the middle one", (9, 9)).argmax()), 9) == (4, 4)


def test_points_regions_and_boxes():
    heat = torch.zeros(40, 40)
    heat[4:9, 4:9], heat[30:33, 20:30] = 2.0, 1.0
    assert peaks(heat, 2, apart=8) == [(5, 5), (21, 31)]
    assert len(peaks(torch.zeros(4, 4), 9, apart=8)) == 1
    region = region_at(heat, (5, 5))
    assert box_of(region) == (4, 4, 9, 9)
    assert int(region.sum()) == 25
    assert box_of(region_at(heat, (0, 39))) == (0, 39, 1, 40)
    assert box_of(torch.zeros(3, 3, dtype=torch.bool)) is None
    masks = torch.stack([heat == 2, heat > 0, heat >= 0])
    assert int(best_fit(masks, heat).argmax()) == 0
    assert overlay(torch.rand(3, 40, 40), heat).shape == (40, 40, 3)


def test_measures():
    def mask(*spans):
        line = torch.zeros(1, 200, dtype=torch.bool)
        for start, end in spans:
            line[0, start:end] = True
        return line

    found, truth = [mask((0, 15)), mask((0, 50))], [mask((5, 20)), mask((49, 100))]  # 10 of 20, 1 of 100
    assert overall_iou(found, truth) == pytest.approx(11 / 120)
    assert mean_iou(found, truth) == pytest.approx(0.255)
    assert point_accuracy([(5, 0), (4.9, 0)], [truth[0]] * 2) == 0.5
    for wrong in ([], [(5, 0)], [(200, 0), (0, 0)]):
        with pytest.raises(ValueError, match="point"):
            point_accuracy(wrong, truth)
    with pytest.raises(ValueError, match="cannot be compared"):
        mean_iou([mask()], [torch.zeros(2, 2)])


def test_tokens_that_are_kept():
    roles, tokens = ("stop", "content", "content", "magnet", "special"), ("the", "dog", "s", "pink", "</s>")
    none = torch.zeros(5, dtype=torch.bool)
    assert keep_tokens(roles, tokens, none).tolist() == [False, True, True, False, False]
    sink = torch.tensor([False, False, True, True, True])
    assert keep_tokens(roles, tokens, sink).tolist() == [False, True, False, False, False]
    sink[1] = True  # nothing is left: all words
    assert keep_tokens(roles, tokens, sink).tolist() == [True, True, True, False, False]
    with pytest.raises(ValueError, match="no token"):
        keep_tokens(roles[3:], tokens[3:], none[3:])


def test_settings():
    config = RefAMConfig(magnets=["with"], blocks=("a",), noise=0.5)
    assert RefAMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for wrong in ({"noise": 1.0}, {"draws": 0}, {"size": 0}, {"sink_mass": 0}, {"magnets": (" ",)}, {"normalize": "x"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RefAMConfig(**wrong)
