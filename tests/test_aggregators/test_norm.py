"""Each normalisation computes what NumPy computes, over its own set of values."""

import numpy as np
import pytest
import torch

from aggregators import HeadConfigError, create_aggregator
from aggregators.norm import create_bag_norm, create_norm
from aggregators.segment import Segments

SEGMENTS = Segments((4, 1, 7))
NAMES = ["layer", "instance", "batch", "none"]


def _values(seed=0):
    return 3 * torch.randn(12, 5, generator=torch.Generator().manual_seed(seed)) + 2


def _affine(norm):
    """Sets scale and shift to something that shows."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(5, generator=torch.Generator().manual_seed(1)))
    return norm


def _standardised(values, axis):
    return (values - values.mean(axis, keepdims=True)) / np.sqrt(values.var(axis, keepdims=True) + 1e-5)


def _expected(name, values):
    if name == "layer":
        return _standardised(values, 1)
    if name == "batch":
        return _standardised(values, 0)
    return np.concatenate([_standardised(bag, 0) for bag in np.split(values, [4, 5])])


@pytest.mark.parametrize("name", ["layer", "instance", "batch"])
def test_training_output_against_numpy(name):
    norm, values = _affine(create_norm(name, 5)), _values()
    expected = torch.from_numpy(_expected(name, values.double().numpy())).float() * norm.weight + norm.bias
    torch.testing.assert_close(norm(values, SEGMENTS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["layer", "instance", "none"])
def test_eval_computes_what_training_does(name):
    norm = _affine(create_norm(name, 5))
    assert torch.equal(norm.eval()(_values(), SEGMENTS), norm.train()(_values(), SEGMENTS))


def test_batch_statistics_are_learned_in_training_and_used_in_eval():
    norm = create_norm("batch", 5)
    for step in range(200):
        norm(_values(step), SEGMENTS)
    expected = (_values(999) - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    torch.testing.assert_close(norm.eval()(_values(999), SEGMENTS), expected)
    torch.testing.assert_close(norm.running_mean, torch.full((5,), 2.0), rtol=0, atol=0.8)
    torch.testing.assert_close(norm.running_var, torch.full((5,), 9.0), rtol=0, atol=4)
    before = norm.running_mean.clone()
    norm(_values(), SEGMENTS)
    assert torch.equal(norm.running_mean, before)


def test_a_pack_of_one_instance_is_normed_by_the_running_averages():
    norm, one = create_norm("batch", 5), _values()[:1]
    torch.testing.assert_close(norm(one, Segments((1,))), one, rtol=1e-4, atol=1e-4)
    assert not norm.running_mean.any()


def test_a_bag_of_one_instance_gives_the_shift():
    norm = _affine(create_norm("instance", 5))
    torch.testing.assert_close(norm(_values(), SEGMENTS)[4], norm.bias)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_near_and_keeps_its_dtype(name):
    norm, values = create_norm(name, 5), _values()
    expected = norm(values, SEGMENTS)
    rough = create_norm(name, 5).bfloat16()(values.bfloat16(), SEGMENTS)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), expected, rtol=0.02, atol=0.05)


def test_what_has_one_row_per_bag_gets_a_layer_norm_or_none():
    rows, each = torch.randn(3, 5), Segments((1, 1, 1))
    expected = torch.nn.functional.layer_norm(rows, (5,))
    for name in NAMES:
        torch.testing.assert_close(create_bag_norm(name, 5)(rows, each), rows if name == "none" else expected)


def test_layer_norm_has_the_parameters_of_torchs():
    assert create_norm("layer", 5).state_dict().keys() == torch.nn.LayerNorm(5).state_dict().keys()


@pytest.mark.parametrize("create", [create_norm, create_bag_norm])
def test_another_name_is_refused(create):
    with pytest.raises(HeadConfigError, match="got norm 'group' → expected one of layer, instance, batch, none"):
        create("group", 5)


def test_the_transformers_instance_norm_removes_what_all_tokens_share():
    """With one block, keys and values come from normed tokens: a shift of all of them changes nothing in these."""
    torch.manual_seed(0)
    block = create_aggregator("transformer", in_dim=6, embed_dim=8, heads=2, depth=1, norm="instance").last_block
    tokens, segments = torch.randn(9, 8), Segments((4, 5))
    _, expected = block.class_tokens(tokens, segments, None)
    _, got = block.class_tokens(tokens + 7, segments, None)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
