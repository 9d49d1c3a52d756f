"""What is particular to Chowder: which scores are kept, small bags, and that the middle of a bag is not read."""

import numpy as np
import pytest
import torch

from aggregators import HeadConfigError, create_aggregator

OFFSETS = torch.tensor([0, 9, 10, 13])


def _head(**keywords):
    torch.manual_seed(0)
    return create_aggregator("chowder", in_dim=6, n_classes=3, **keywords).eval()


def _instances():
    return torch.randn(13, 6, generator=torch.Generator().manual_seed(2))


def _extremes(scores, top, bottom):
    """Highest descending and lowest ascending, the last of each repeated in small bags."""
    ascending = np.sort(scores, axis=0)
    highest = [ascending[max(len(scores) - 1 - rank, 0)] for rank in range(top)]
    lowest = [ascending[min(rank, len(scores) - 1)] for rank in range(bottom)]
    return np.concatenate(highest + lowest)


@pytest.mark.parametrize(("top", "bottom", "branches"), [(5, 5, 1), (2, 3, 2), (4, 0, 1), (0, 1, 3)])
def test_the_embedding_holds_the_extreme_scores(top, bottom, branches):
    output = _head(top=top, bottom=bottom, branches=branches)(_instances(), OFFSETS)
    scores = np.split(output.extras["instance_scores"].detach().numpy(), [9, 10])
    expected = np.stack([_extremes(bag, top, bottom) for bag in scores])
    assert output.embedding.shape == (3, branches * (top + bottom))
    np.testing.assert_array_equal(output.embedding.detach().numpy(), expected)


def test_logits_are_the_papers_network_of_the_extremes():
    head = _head(hidden_dims=(7, 4))
    output = head(_instances(), OFFSETS)
    values = output.embedding.detach().numpy()
    for layer in head.hidden:
        values = 1 / (1 + np.exp(-(values @ layer.weight.detach().numpy().T + layer.bias.detach().numpy())))
    expected = values @ head.classifier.weight.detach().numpy().T + head.classifier.bias.detach().numpy()
    np.testing.assert_allclose(output.logits.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_middle_of_a_bag_is_not_read():
    head, instances = _head(top=2, bottom=2), _instances()[:9].requires_grad_()
    output = head(instances)
    output.logits.sum().backward()
    order = output.extras["instance_scores"][:, 0].argsort()
    assert not instances.grad[order[2:-2]].any()
    assert instances.grad[order[[0, 1, -2, -1]]].any(1).all()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"top": 0, "bottom": 0}, "got top 0 and bottom 0 → expected 0 or more, not both 0"),
        ({"branches": 0}, "got branches 0"),
        ({"hidden_dims": (4, 0)}, r"got hidden_dims \(4, 0\)"),
    ],
)
def test_values_out_of_range_are_refused(keywords, message):
    with pytest.raises(HeadConfigError, match=message):
        _head(**keywords)
