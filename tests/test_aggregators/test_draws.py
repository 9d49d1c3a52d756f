"""Random numbers of training: from a generator, or one stream for every bag."""

import numpy as np
import pytest
import torch

from aggregators import BagDraws, BagInputError, create_aggregator
from aggregators.base import Dropout
from aggregators.draws import along, bag_generator, generated_scale, keep_scale, one_each
from aggregators.segment import Segments

BAGS = Segments((3, 1, 4))


def _draws(*seeds: int) -> BagDraws:
    return BagDraws(seeds).along(Segments(BAGS.sizes[: len(seeds)]))


def test_a_bag_draws_from_its_seed_alone():
    values = torch.zeros(8, 50)
    first, second = (Segments.split(BAGS, keep_scale(values, 0.3, _draws(*seeds))) for seeds in ((1, 2, 3), (9, 2, 3)))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


def test_draws_follow_one_another():
    draws, values = _draws(1, 2, 3), torch.zeros(8, 50)
    first, second = keep_scale(values, 0.5, draws), keep_scale(values, 0.5, draws)
    assert not torch.equal(first, second)
    again = _draws(1, 2, 3)
    assert torch.equal(keep_scale(values, 0.5, again), first)
    # other rows of the same bags go on where the first left off
    per_bag = keep_scale(torch.zeros(3, 50), 0.5, one_each(again, 3))
    assert not torch.equal(per_bag[1], first[3])
    assert torch.equal(per_bag[1], second[3])


def test_first_masks_of_neighbouring_seeds_are_not_alike():
    width = 40_000
    masks = keep_scale(torch.zeros(20, width), 0.5, BagDraws(range(20))).numpy() > 0
    likeness = np.corrcoef(masks) - np.eye(20)
    assert np.abs(likeness).max() < 6 / np.sqrt(width)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("source", ["global", "generator", "bags"])
def test_as_much_is_dropped_as_asked_for(p, source):
    torch.manual_seed(0)
    values = torch.zeros(8, 50_000)
    given = {"global": None, "generator": torch.Generator().manual_seed(1), "bags": _draws(1, 2, 3)}[source]
    scale = keep_scale(values, p, given)
    assert (scale == 0).double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / values.numel()) ** 0.5)
    assert scale.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])


def test_a_gpu_draws_bag_by_bag_too_stacked_or_not():
    """Its way of drawing, on the CPU: each bag's mask is its seed's, and the replicas of a stack share it."""
    values, seeds, ends = torch.zeros(8, 5000), [4, 5, 6], [0, 3, 4, 8]
    scale = generated_scale(values, 0.25, seeds, ends)
    alone = generated_scale(values[3:4], 0.25, seeds[1:2], [0, 1])
    assert torch.equal(scale[3:4], alone)
    assert (scale == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert scale.unique().tolist() == pytest.approx([0.0, 4 / 3])

    def stacked(weight):
        return weight * generated_scale(values, 0.25, seeds, ends)

    both = torch.func.vmap(stacked, randomness="same")(torch.ones(2))
    assert torch.equal(both[0], scale)
    assert torch.equal(both[1], scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masks_have_the_type_of_the_values(dtype):
    dropped = Dropout(0.5)(torch.ones(8, 3, dtype=dtype), _draws(1, 2, 3))
    assert dropped.dtype == dtype
    assert set(dropped.unique().tolist()) <= {0.0, 2.0}


def test_odd_numbers_of_values_are_served():
    for width in (1, 2, 3, 5, 7):
        assert keep_scale(torch.zeros(1, width), 0.5, None).shape == (1, width)
    assert keep_scale(torch.zeros(8), 0.5, _draws(1, 2, 3)).shape == (8,)


def test_torchs_generator_decides_when_nothing_else_does():
    torch.manual_seed(4)
    first = keep_scale(torch.zeros(9, 9), 0.5, None)
    second = keep_scale(torch.zeros(9, 9), 0.5, None)
    torch.manual_seed(4)
    assert torch.equal(keep_scale(torch.zeros(9, 9), 0.5, None), first)
    assert not torch.equal(first, second)


def test_other_sources_pass_through():
    generator = torch.Generator()
    assert along(generator, BAGS) is generator
    assert bag_generator(generator, 2, torch.device("cpu")) is generator
    assert bag_generator(None, 0, torch.device("cpu")) is None


def test_a_bags_own_generator_is_its_seeds():
    cpu = torch.device("cpu")
    numbers = [torch.rand(4, generator=bag_generator(BagDraws([5, seed]), 0, cpu)) for seed in (1, 2)]
    assert torch.equal(*numbers)
    draws = BagDraws([5])
    assert not torch.equal(*(torch.rand(4, generator=bag_generator(draws, 0, cpu)) for _ in range(2)))


def test_seeds_that_do_not_fit_are_refused():
    head = create_aggregator("abmil", in_dim=4, n_classes=2)
    with pytest.raises(BagInputError, match="got 2 seeds for 3 bags → expected one per bag"):
        head(torch.zeros(8, 4), BAGS.offsets(), generator=BagDraws([1, 2]))
    with pytest.raises(BagInputError, match=r"got 7 rows → expected 8.*along"):
        keep_scale(torch.zeros(7, 2), 0.5, _draws(1, 2, 3))
    for seed in (-1, 2**63):
        with pytest.raises(BagInputError, match=rf"got seeds \[4, {seed}\] → expected each at least 0 and below 2⁶³"):
            BagDraws([4, seed])


def test_seeds_may_be_numpys():
    numbers, values = np.array([5, 2**62]), torch.zeros(2, 50)
    assert torch.equal(keep_scale(values, 0.5, BagDraws(numbers)), keep_scale(values, 0.5, BagDraws([5, 2**62])))


def test_a_compiled_head_draws_bag_by_bag_too():
    torch._dynamo.reset()
    head = create_aggregator("abmil", in_dim=4, n_classes=2, dropout=0.5)
    compiled, instances = torch.compile(head, backend="aot_eager"), torch.randn(7, 4)
    with torch.no_grad():
        both = compiled(instances, torch.tensor([0, 3, 7]), generator=BagDraws([5, 8])).logits
        alone = compiled(instances[3:], generator=BagDraws([8])).logits
        other = compiled(instances[3:], generator=BagDraws([9])).logits
    torch.testing.assert_close(both[1:], alone)
    assert not torch.equal(other, alone)
