"""Segment reductions: literal cases crossed with dtypes, gradients, and offsets that must be refused."""

import pytest
import torch

from aggregators import BagInputError, OffsetsError
from aggregators.segment import (
    Segments,
    segment_max,
    segment_mean,
    segment_softmax,
    segment_sum,
    segment_weighted_sum,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# name, offsets, values, sums, means, maxima
CASES = [
    ("one bag", [0, 3], [1.0, 2.0, 6.0], [9.0], [3.0], [6.0]),
    ("ragged", [0, 1, 3, 6], [5.0, 1.0, 3.0, 2.0, 4.0, 9.0], [5.0, 4.0, 15.0], [5.0, 2.0, 5.0], [5.0, 3.0, 9.0]),
    ("bags of one", [0, 1, 2], [-1.0, 7.0], [-1.0, 7.0], [-1.0, 7.0], [-1.0, 7.0]),
    ("all negative", [0, 2, 3], [-4.0, -2.0, -8.0], [-6.0, -8.0], [-3.0, -8.0], [-2.0, -8.0]),
    ("ties", [0, 2, 4], [3.0, 3.0, 0.0, 0.0], [6.0, 0.0], [3.0, 0.0], [3.0, 0.0]),
    (
        "two columns",
        [0, 2, 3],
        [[1.0, 10.0], [3.0, -2.0], [5.0, 0.5]],
        [[4.0, 8.0], [5.0, 0.5]],
        [[2.0, 4.0], [5.0, 0.5]],
        [[3.0, 10.0], [5.0, 0.5]],
    ),
]
# name, offsets, scores, weights
SOFTMAX_CASES = [
    ("one bag", [0, 2], [0.0, 0.0], [0.5, 0.5]),
    ("ragged", [0, 1, 4], [9.0, 2.0, 2.0, -1e4], [1.0, 0.5, 0.5, 0.0]),
    ("large scores do not overflow", [0, 2, 3], [6e4, 6e4, -6e4], [0.5, 0.5, 1.0]),
]


def _ids(case):
    return case[0].replace(" ", "-") if isinstance(case, tuple) else str(case).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_sum_mean_max_match_literal_values(case, dtype):
    _, offsets, values, sums, means, maxima = case
    values = torch.tensor(values, dtype=dtype)
    segments = Segments.from_offsets(torch.tensor(offsets), len(values))
    for reduction, expected in ((segment_sum, sums), (segment_mean, means), (segment_max, maxima)):
        got = reduction(values, segments)
        assert got.dtype == dtype
        assert got.tolist() == expected, reduction.__name__


@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("case", SOFTMAX_CASES, ids=_ids)
def test_softmax_matches_literal_values(case, dtype):
    _, offsets, scores, weights = case
    scores = torch.tensor(scores, dtype=dtype)
    got = segment_softmax(scores, Segments.from_offsets(torch.tensor(offsets), len(scores)))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
def test_weighted_sum_is_the_sum_of_weighted_rows_for_every_branch(dtype):
    weights = torch.tensor([[0.5, 1.0], [0.5, 0.0], [1.0, 2.0]])
    values = torch.tensor([[2.0, 4.0, 6.0], [4.0, 8.0, 2.0], [1.0, 1.0, 1.0]], dtype=dtype)
    got = segment_weighted_sum(weights, values, Segments((2, 1)))
    assert got.dtype == dtype
    assert got.tolist() == [[[3.0, 6.0, 4.0], [2.0, 4.0, 6.0]], [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]]


def test_half_precision_sums_are_accumulated_in_float32():
    ones = torch.ones(40_000, dtype=torch.bfloat16)  # a bfloat16 running sum stops at 256
    assert segment_sum(ones, Segments((40_000,))).item() == pytest.approx(40_000, rel=4e-3)
    large = torch.full((4, 1), 60_000.0, dtype=torch.float16)  # the sum, 240,000, is not a float16
    assert segment_mean(large, Segments((4,))).item() == 60_000
    assert segment_softmax(ones[:, None], Segments((40_000,))).sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "reduction", [segment_sum, segment_mean, segment_max, segment_softmax], ids=lambda f: f.__name__
)
def test_gradients_of_reductions(reduction):
    values = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: reduction(v, Segments((1, 3, 2))), (values,))


def test_gradients_of_the_weighted_sum():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(6, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    values = torch.randn(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, v: segment_weighted_sum(w, v, Segments((1, 3, 2))), (weights, values))


def test_tied_maxima_share_the_gradient():
    values = torch.tensor([1.0, 3.0, 3.0, 2.0], requires_grad=True)
    segment_max(values, Segments((3, 1))).sum().backward()
    assert values.grad.tolist() == [0.0, 0.5, 0.5, 1.0]


def test_offsets_round_trip_through_lengths_and_bag_index():
    segments = Segments.from_offsets(torch.tensor([0, 2, 3, 7]), 7)
    assert segments.sizes == (2, 1, 4)
    assert (segments.bags, segments.total) == (3, 7)
    assert segments.lengths().tolist() == [2, 1, 4]
    assert segments.offsets().tolist() == [0, 2, 3, 7]
    assert segments.bag_index().tolist() == [0, 0, 1, 2, 2, 2, 2]
    assert Segments.from_offsets(None, 4).sizes == (4,)


@pytest.mark.parametrize(
    ("offsets", "total", "message"),
    [
        ([0, 2, 2, 5], 5, r"bag 1 of 3 with 0 instances"),
        ([0, 0, 5], 5, r"bag 0 of 2 with 0 instances"),
        ([0, 5, 5], 5, r"bag 1 of 2 with 0 instances"),
        ([0, 4, 2, 5], 5, r"bag 1 of 3 with -2 instances"),
        ([1, 5], 5, r"from 1 to 5 → expected 0 to 5"),
        ([0, 4], 5, r"from 0 to 4 → expected 0 to 5"),
        ([0, 6], 5, r"from 0 to 6 → expected 0 to 5"),
        ([0], 5, r"shape \(1,\)"),
        ([[0, 5]], 5, r"shape \(1, 2\)"),
        ([0.0, 5.0], 5, r"torch.float32 → expected int64"),
        (None, 0, r"bag 0 of 1 with 0 instances"),
    ],
)
def test_offsets_that_do_not_cut_the_rows_into_bags_are_refused(offsets, total, message):
    with pytest.raises(OffsetsError, match=message) as caught:
        Segments.from_offsets(None if offsets is None else torch.tensor(offsets), total)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "values", [torch.zeros(4, 2), torch.zeros(6, 2), torch.tensor(1.0)], ids=["few", "many", "0-d"]
)
def test_values_of_another_batch_are_refused(values):
    with pytest.raises(BagInputError, match="expected 5 rows"):
        segment_sum(values, Segments((2, 3)))
