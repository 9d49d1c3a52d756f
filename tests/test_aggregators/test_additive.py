"""What is particular to additive MIL: contributions add up to the logits, as the paper's equation has it."""

import pytest
import torch

from aggregators import HeadConfigError, create_aggregator
from aggregators.segment import Segments, segment_sum

SEGMENTS = Segments((4, 1, 7))


def _head(**keywords):
    torch.manual_seed(0)
    return create_aggregator("additive", in_dim=6, n_classes=3, embed_dim=8, **keywords).eval()


def _instances():
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("hidden_dim", [5, None])
def test_contributions_add_up_to_the_logits(hidden_dim):
    output = _head(hidden_dim=hidden_dim)(_instances(), SEGMENTS.offsets())
    added = segment_sum(output.extras["contributions"], SEGMENTS)
    torch.testing.assert_close(added, output.logits, rtol=1e-5, atol=1e-6)


def test_every_contribution_is_the_network_of_the_weighted_instance():
    """ψ is applied after the weight, as the paper writes it: W_2 ReLU(W_1 (a h)), and b_2 is shared out."""
    head = _head(hidden_dim=5)
    output = head(_instances(), SEGMENTS.offsets())
    weighted = output.attention * head.projection(_instances())
    expected = torch.relu(weighted @ head.hidden.weight.T) @ head.classifier.weight.T
    expected = expected + output.attention * head.classifier.bias
    torch.testing.assert_close(output.extras["contributions"], expected, rtol=1e-5, atol=1e-6)


def test_without_a_hidden_layer_it_classifies_the_embedding():
    head = _head(hidden_dim=None)
    output = head(_instances(), SEGMENTS.offsets())
    torch.testing.assert_close(output.logits, head.classifier(output.embedding), rtol=1e-5, atol=1e-6)


def test_repeating_every_instance_changes_no_logit():
    head, instances = _head(), _instances()
    torch.testing.assert_close(head(instances.repeat(50, 1)).logits, head(instances).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keywords", [{"hidden_dim": 0}, {"temperature": 0.0}, {"attention_dim": 0}])
def test_values_out_of_range_are_refused(keywords):
    with pytest.raises(HeadConfigError, match=f"got {next(iter(keywords))} 0"):
        _head(**keywords)
