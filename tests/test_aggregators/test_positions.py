"""Positions: a tile's code depends on its place in the bag's grid and on nothing else."""

import numpy as np
import pytest
import torch

from aggregators import BagInputError, HeadConfigError, create_aggregator
from aggregators.positions import grid_cells, sincos_code
from aggregators.segment import Segments

SIZES = (7, 1, 12)


def _cells(sizes=SIZES):
    """Distinct cells of a grid per bag, touching its first column and row, with neighbours."""
    rng = np.random.default_rng(0)
    bags = []
    for size in sizes:
        places = np.concatenate([[0, 1], 2 + rng.permutation(98)])[:size]
        bags.append(torch.from_numpy(np.stack([places % 10, places // 10], axis=1)))
    return torch.cat(bags)


def _head(**keywords):
    torch.manual_seed(0)
    settings = {"in_dim": 5, "n_classes": 3, "embed_dim": 8, "heads": 2, "positions": "sincos", **keywords}
    return create_aggregator("transformer", **settings).eval()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("origin", "step"), [((0, 0), 1), ((91_003, 120_557), 512), ((5, 70), 448)])
def test_cells_are_the_same_at_any_origin_and_tile_step(origin, step, dtype):
    cells = _cells()
    coords = (cells * step + torch.tensor(origin)).to(dtype)
    torch.testing.assert_close(grid_cells(coords, Segments(SIZES)), cells.double(), rtol=0, atol=1e-9)


def test_a_bag_has_its_own_origin_and_step():
    coords = torch.tensor([[100, 0], [200, 0], [7, 7], [7, 57]])
    assert grid_cells(coords, Segments((2, 2))).tolist() == [[0, 0], [1, 0], [0, 0], [0, 1]]


def test_one_tile_and_tiles_in_one_place_have_cell_zero():
    assert grid_cells(torch.tensor([[9, 9], [3, 4], [3, 4]]), Segments((1, 2))).tolist() == [[0, 0]] * 3


def test_code_follows_its_formula():
    code = sincos_code(torch.tensor([[3.0, 5.0]]), 8)[0]
    expected = [f(place * w) for place in (3.0, 5.0) for f in (np.sin, np.cos) for w in (1.0, 10_000**-0.5)]
    torch.testing.assert_close(code, torch.tensor(expected, dtype=torch.float64))


def test_codes_of_distinct_cells_differ():
    places = torch.cartesian_prod(torch.arange(300.0), torch.arange(0.0, 300, 7))
    code = sincos_code(places, 32)
    assert code.round(decimals=6).unique(dim=0).shape[0] == len(places)
    torch.testing.assert_close(code.square().sum(1), torch.full((len(places),), 16.0, dtype=torch.float64))


def test_logits_depend_on_the_layout_and_not_on_the_bounds():
    head, bags, offsets = _head(), torch.randn(sum(SIZES), 5), Segments(SIZES).offsets()
    cells = _cells()
    expected = head(bags, offsets, cells * 512).logits
    assert torch.equal(head(bags, offsets, cells * 448 + 31_777).logits, expected)
    mirrored = head(bags, offsets, cells.flip(1)).logits
    assert (mirrored - expected)[[0, 2]].abs().max() > 1e-4
    torch.testing.assert_close(mirrored[1], expected[1])  # a single tile has no layout


def test_packed_bags_equal_single_bags_in_any_order_of_instances():
    head, bags, cells = _head(), torch.randn(sum(SIZES), 5), _cells() * 256 + 77
    packed = head(bags, Segments(SIZES).offsets(), cells)
    parts = zip(bags.split(SIZES), cells.split(SIZES), packed.attention.split(SIZES), packed.logits, strict=True)
    for bag, coords, attention, logits in parts:
        order = torch.randperm(len(bag), generator=torch.Generator().manual_seed(1))
        single = head(bag[order], coords=coords[order])
        torch.testing.assert_close(single.logits[0], logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(single.attention, attention[order], rtol=1e-5, atol=1e-5)


def test_without_positions_coords_change_nothing():
    head, bag = _head(positions="none"), torch.randn(7, 5)
    assert torch.equal(head(bag).logits, head(bag, coords=_cells((7,))).logits)


def test_coords_are_asked_for():
    with pytest.raises(BagInputError, match=r"got no coords → expected \[total, 2\] in level-0 px, as transformer"):
        _head()(torch.randn(3, 5))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"positions": "learned"}, "got positions 'learned'"),
        ({"embed_dim": 6}, "got embed_dim 6 with positions 'sincos' → expected a multiple of 4"),
    ],
)
def test_values_out_of_range_are_refused(keywords, message):
    with pytest.raises(HeadConfigError, match=message):
        _head(**keywords)


def test_a_width_that_is_no_multiple_of_four_has_no_code():
    with pytest.raises(HeadConfigError, match="got width 6"):
        sincos_code(torch.zeros(1, 2), 6)
