"""What is particular to the heads that pool instance logits: limits, stability, starting points, gradients."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from aggregators import HeadConfigError, create_aggregator

OFFSETS = torch.tensor([0, 4, 5, 12])


def _head(name, **keywords):
    torch.manual_seed(0)
    return create_aggregator(name, in_dim=6, n_classes=3, **keywords).eval()


def _instances(scale=1.0):
    return scale * torch.randn(12, 6, generator=torch.Generator().manual_seed(2))


def _by_bag(output):
    return np.split(output.instance_logits.detach().double().numpy(), [4, 5])


def _against(output, pool, tolerance=1e-5):
    expected = torch.from_numpy(np.stack([pool(bag) for bag in _by_bag(output)]))
    torch.testing.assert_close(output.logits.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_lse_is_its_formula(temperature):
    output = _head("lse", temperature=temperature)(_instances(3), OFFSETS)
    _against(output, lambda bag: temperature * np.log(np.exp(bag / temperature).mean(0)))


def test_lse_lies_between_the_mean_and_the_maximum_and_reaches_both():
    instances = _instances(3)
    mean, maximum = _head("lse", temperature=1e4), _head("lse", temperature=1e-4)
    _against(mean(instances, OFFSETS), lambda bag: bag.mean(0), 1e-2)
    _against(maximum(instances, OFFSETS), lambda bag: bag.max(0), 1e-2)


def test_lse_takes_logits_whose_exponentials_overflow():
    output = _head("lse")(_instances(1e4), OFFSETS)
    assert output.logits.isfinite().all()
    assert output.logits.abs().max() > 1e3


def test_topk_averages_the_largest_and_leaves_the_rest_without_gradient():
    head, instances = _head("topk", k=3), _instances().requires_grad_()
    output = head(instances, OFFSETS)
    _against(output, lambda bag: np.sort(bag, axis=0)[-3:].mean(0))
    output.logits[2, 0].backward()
    chosen = output.instance_logits[5:, 0].topk(3).indices + 5
    assert set(instances.grad.any(1).nonzero().flatten().tolist()) == set(chosen.tolist())


def test_topk_of_one_is_the_maximum_and_of_all_the_mean():
    instances = _instances()
    _against(_head("topk", k=1)(instances, OFFSETS), lambda bag: bag.max(0))
    _against(_head("topk", k=99)(instances, OFFSETS), lambda bag: bag.mean(0))


@pytest.mark.parametrize("prior", [0.3, 0.001])
def test_noisy_or_is_its_formula(prior):
    output = _head("noisy_or", prior=prior)(_instances(2), OFFSETS)
    positive = 1 - np.stack([np.prod(1 / (1 + np.exp(bag)), axis=0) for bag in _by_bag(output)])
    torch.testing.assert_close(output.logits.sigmoid().double(), torch.from_numpy(positive), rtol=1e-5, atol=1e-6)


def test_noisy_or_of_one_instance_is_that_instance():
    output = _head("noisy_or")(_instances(5), OFFSETS)
    torch.testing.assert_close(output.logits[1], output.instance_logits[4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [-200.0, -30.0, 0.0, 30.0, 200.0])
def test_noisy_or_is_finite_at_any_logit(level):
    head = _head("noisy_or")
    with torch.no_grad():
        head.classifier.bias.fill_(level)
    output = head(_instances(), OFFSETS)
    functional.cross_entropy(output.logits, torch.tensor([0, 1, 2])).backward()
    assert output.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_noisy_or_starts_undecided_on_bags_of_one_over_prior_instances():
    head = create_aggregator("noisy_or", in_dim=64, n_classes=2, prior=1e-4)
    with torch.no_grad():
        probability = head(torch.randn(10_000, 64)).logits.sigmoid()
    assert ((probability > 0.5) & (probability < 0.9)).all()


def test_instance_max_shares_the_gradient_between_ties():
    head, instances = _head("instance_max"), torch.ones(4, 6, requires_grad=True)
    head(instances).logits.sum().backward()
    assert torch.equal(instances.grad[0], instances.grad[3])
    assert instances.grad.any()


def test_the_official_maximum_ranks_two_classes_by_the_second():
    head = create_aggregator("instance_max", in_dim=2, n_classes=2, official=True)
    with torch.no_grad():
        head.classifier.weight.copy_(torch.eye(2))
        head.classifier.bias.zero_()
    instances = torch.tensor([[9.0, 0.0], [1.0, 3.0], [0.0, 1.0]])
    assert head(instances).logits.tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("lse", {"temperature": 0}, "got temperature 0 → expected above 0"),
        ("topk", {"k": 0}, "got k 0 → expected at least 1"),
        ("topk", {"weighting": "median"}, "got weighting 'median' → expected mean or softmax"),
        ("noisy_or", {"prior": 1.0}, "got prior 1.0 → expected a probability"),
        ("instance_max", {"n_classes": 1, "official": True}, "got n_classes 1 with official=True"),
    ],
)
def test_values_out_of_range_are_refused(name, keywords, message):
    with pytest.raises(HeadConfigError, match=message):
        create_aggregator(name, **keywords)
