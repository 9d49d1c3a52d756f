"""What is particular to DSMIL: its definition, the critical instances, and the loss of their scores."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from aggregators import BagInputError, HeadConfigError, create_aggregator

OFFSETS = torch.tensor([0, 4, 9])


def _head(**keywords):
    torch.manual_seed(0)
    keywords = {"attention_dim": 5, "embed_dim": None, **keywords}
    return create_aggregator("dsmil", in_dim=6, n_classes=3, **keywords).double().eval()


def _bags():
    return torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _weights(head):
    return {name: value.numpy() for name, value in head.state_dict().items()}


def _reference(bag, weights, temperature):
    """The equations for one bag of the nonlinear head with value projection: logits, attention, critical instances."""

    def linear(name, values):
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    critical = linear("instance_classifier", bag).argmax(0)
    query = np.tanh(linear("query.2", np.maximum(linear("query.0", bag), 0)))
    scores = query @ query[critical].T / (np.sqrt(5) * temperature)
    attention = np.exp(scores) / np.exp(scores).sum(0)
    embedding = attention.T @ np.maximum(linear("value.0", bag), 0)  # [classes, dim]
    return linear("classifier", embedding.reshape(1, -1)), attention, critical


def test_definition():
    head, bags = _head(value_projection=True, temperature=0.25), _bags()
    output = head(bags, OFFSETS)
    for bag, (start, end) in enumerate([(0, 4), (4, 9)]):
        logits, attention, critical = _reference(bags[start:end].numpy(), _weights(head), 0.25)
        np.testing.assert_allclose(output.logits[bag : bag + 1].detach(), logits, atol=1e-12)
        np.testing.assert_allclose(output.attention[start:end].detach(), attention, atol=1e-12)
        np.testing.assert_array_equal(output.extras["critical_index"][bag] - start, critical)


def test_max_logits_are_those_of_the_critical_instances():
    output = _head()(_bags(), OFFSETS)
    expected = torch.stack([bag.amax(0) for bag in output.instance_logits.split([4, 5])])
    assert torch.equal(output.extras["max_logits"], expected)


def test_average_is_the_mean_of_both_streams():
    bags = _bags()
    bag_stream, both = _head()(bags, OFFSETS), _head(average=True)(bags, OFFSETS)
    torch.testing.assert_close(both.logits, (bag_stream.logits + bag_stream.extras["max_logits"]) / 2)


def test_the_own_loss_of_each_kind_of_target():
    head, bags = _head(), _bags()
    output = head(bags, OFFSETS)
    max_logits = output.extras["max_logits"]
    by_class = head.auxiliary_loss(output, torch.tensor([2, 0]), OFFSETS)
    torch.testing.assert_close(by_class, functional.cross_entropy(max_logits, torch.tensor([2, 0])))
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
    expected = functional.binary_cross_entropy_with_logits(max_logits, labels.double())
    for targets in (labels, labels.bool(), labels.float()):
        torch.testing.assert_close(head.auxiliary_loss(output, targets, OFFSETS), expected)


@pytest.mark.parametrize("targets", [torch.tensor([0.3, 2.5]), torch.randn(2, 3), torch.tensor([[1, 0], [0, 1]])])
def test_targets_without_a_meaning_are_refused(targets):
    head = _head()
    with pytest.raises(BagInputError, match=r"expected class numbers, int64 \[bags\]"):
        head.auxiliary_loss(head(_bags(), OFFSETS), targets, OFFSETS)


@pytest.mark.parametrize("keywords", [{"attention_dim": 0}, {"temperature": 0.0}, {"dropout": 1.0}, {"embed_dim": 0}])
def test_values_out_of_range_are_refused(keywords):
    with pytest.raises(HeadConfigError, match=f"got {next(iter(keywords))}"):
        create_aggregator("dsmil", in_dim=6, n_classes=3, **keywords)


def test_the_projection_comes_before_both_streams():
    bags, projected = _bags(), _head(embed_dim=6)
    plain = _head()
    state = projected.state_dict()
    plain.load_state_dict({name: value for name, value in state.items() if not name.startswith("projection")})
    expected = plain(projected.projection(bags), OFFSETS)
    output = projected(bags, OFFSETS)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.instance_logits, expected.instance_logits)
