"""The moving average of weights."""

import pytest
import torch

from aggregators import create_aggregator
from aggregators.base import Aggregator
from mil.training.weight_average import WeightAverage


def _head(seed: int = 0) -> Aggregator:
    torch.manual_seed(seed)
    return create_aggregator("abmil", in_dim=6, n_classes=2, embed_dim=4, attention_dim=3, input_norm="standardize")


def _jump(head: Aggregator, to: float) -> None:
    with torch.no_grad():
        for weight in head.parameters():
            weight.fill_(to)


def test_it_is_the_recursion_with_its_warm_up() -> None:
    head = _head()
    average = WeightAverage(head, decay=0.3)
    expected = [weight.detach().clone() for weight in head.parameters()]
    for step in range(1, 8):
        _jump(head, float(step**2))
        average.update(head)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = [decay * value + (1 - decay) * step**2 for value in expected]
    torch.testing.assert_close(list(average.head.parameters()), expected)


def test_a_short_training_forgets_its_start() -> None:
    head = _head()
    _jump(head, 1000.0)
    average = WeightAverage(head, decay=0.9999)
    _jump(head, 1.0)
    for _ in range(20):
        average.update(head)
    # without the warm-up 998 of it would be left
    assert all(weight.max() < 1.1 for weight in average.head.parameters())


def test_it_follows_buffers_and_never_the_other_way() -> None:
    head = _head()
    average = WeightAverage(head, decay=0.5)
    head.input_norm.fit(torch.full((6,), 3.0), torch.full((6,), 2.0))
    before = [weight.detach().clone() for weight in head.parameters()]
    average.update(head)
    assert average.head.input_norm.mean.tolist() == [3.0] * 6
    assert all(map(torch.equal, before, head.parameters()))
    assert not any(weight.requires_grad for weight in average.head.parameters())
    assert all(weight.requires_grad for weight in head.parameters())


def test_it_goes_on_from_its_state() -> None:
    head, averages = _head(), []
    for stop in (None, 3):
        average = WeightAverage(_head(), decay=0.8)
        for step in range(6):
            if step == stop:
                saved, average = average.state_dict(), WeightAverage(_head(1), decay=0.8)
                average.load_state_dict(saved)
            _jump(head, float(step))
            average.update(head)
        averages.append(average)
    assert averages[1].steps == 6
    assert all(map(torch.equal, averages[0].head.parameters(), averages[1].head.parameters()))


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_average_of_a_constant_is_it(decay: float) -> None:
    head = _head()
    average = WeightAverage(head, decay)
    for _ in range(5):
        average.update(head)
    torch.testing.assert_close(list(average.head.parameters()), list(head.parameters()))
