"""The entrance that all heads share: input checks, standardisation, dropout, projection."""

import pytest
import torch

from aggregators import Aggregator, BagInputError, HeadConfigError, create_aggregator, list_aggregators
from aggregators.base import Dropout, Projection, Standardize, create_input_norm


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        (torch.zeros(5, 3), r"shape \(5, 3\).*\[total, 4\]"),
        (torch.zeros(4), r"shape \(4,\)"),
        (torch.zeros(1, 5, 4), r"shape \(1, 5, 4\)"),
        (torch.zeros(5, 4, dtype=torch.int64), "int64 → expected floating"),
    ],
)
@pytest.mark.parametrize("name", list_aggregators())
def test_instances_of_a_wrong_shape_or_type_are_refused(name, instances, message):
    with pytest.raises(BagInputError, match=message):
        create_aggregator(name, in_dim=4)(instances)


def test_coordinates_must_match_the_instances():
    with pytest.raises(BagInputError, match=r"coords of shape \(4, 2\) → expected \(5, 2\)"):
        create_aggregator("mean", in_dim=3)(torch.zeros(5, 3), coords=torch.zeros(4, 2))


def test_standardize_gives_zero_mean_and_unit_deviation():
    instances = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * 3 + 7
    norm = Standardize(6)
    assert torch.equal(norm(instances), instances)
    norm.fit(instances.mean(0), instances.std(0, correction=0))
    scaled = norm(instances)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(6))


def test_standardize_survives_constant_features():
    norm = Standardize(2)
    norm.fit(torch.tensor([4.0, 1.0]), torch.tensor([0.0, 2.0]))
    assert norm(torch.tensor([[4.0, 3.0]])).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (torch.zeros(3), torch.ones(2)),
        (torch.zeros(2), torch.ones(1)),
        (torch.tensor([0.0, float("nan")]), torch.ones(2)),
        (torch.zeros(2), torch.tensor([1.0, float("inf")])),
        (torch.zeros(2), torch.tensor([1.0, -1.0])),
    ],
)
def test_standardize_refuses_unusable_statistics(mean, std):
    with pytest.raises(BagInputError, match="expected finite values of shape"):
        Standardize(2).fit(mean, std)


@pytest.mark.parametrize("name", list_aggregators())
def test_fitted_standardisation_equals_standardised_input(name):
    torch.manual_seed(0)
    instances = torch.randn(9, 4) * 5 + 2
    mean, std = instances.mean(0), instances.std(0)
    head = create_aggregator(name, in_dim=4, n_classes=3, input_norm="standardize").eval()
    expected = head((instances - mean) / std).logits
    head.input_norm.fit(mean, std)
    torch.testing.assert_close(head(instances).logits, expected)
    assert "input_norm.mean" in head.state_dict()


def test_unknown_input_norm_is_refused():
    with pytest.raises(HeadConfigError, match="got input_norm 'batch' → expected one of none, layer, standardize"):
        create_input_norm("batch", 4)


def test_dropout_keeps_the_mean_and_draws_from_the_given_generator():
    drop, ones = Dropout(0.25), torch.ones(200, 200)
    first = drop(ones, torch.Generator().manual_seed(1))
    assert torch.equal(first, drop(ones, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, drop(ones, torch.Generator().manual_seed(2)))
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert first.max().item() == pytest.approx(4 / 3)


def test_dropout_is_the_identity_in_eval_and_at_zero():
    values = torch.randn(4, 3)
    assert Dropout(0.5).eval()(values) is values
    assert Dropout(0.0).train()(values) is values


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_dropout_outside_its_range_is_refused(p):
    with pytest.raises(HeadConfigError, match="expected a probability"):
        Dropout(p)


def test_projection_without_width_passes_instances_on():
    values = torch.randn(4, 3)
    projection = Projection(3, None, 0.0)
    assert projection(values) is values
    assert not list(projection.parameters())


def test_a_head_without_aggregate_says_so():
    with pytest.raises(NotImplementedError, match="Aggregator must define aggregate"):
        Aggregator(3, 2)(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("abmil", {"temperature": 0}, "temperature 0"),
        ("abmil", {"branches": 0}, "branches 0"),
        ("abmil", {"attention_dim": 0}, "attention_dim 0"),
        ("abmil", {"embed_dim": 0}, "embed_dim 0"),
        ("mean", {"dropout": 1.0}, "dropout 1.0"),
        ("max", {"in_dim": 0}, "in_dim 0"),
        ("max", {"n_classes": 0}, "n_classes 0"),
        ("transformer", {"depth": 0}, "depth 0"),
        ("transformer", {"embed_dim": 10, "heads": 4}, "embed_dim 10 and heads 4"),
        ("transformer", {"mlp_ratio": -1}, "mlp_ratio -1"),
    ],
)
def test_values_out_of_range_are_refused_with_the_value(name, keywords, message):
    with pytest.raises(HeadConfigError, match=f"got {message}.* → expected .* → ") as caught:
        create_aggregator(name, **keywords)
    assert isinstance(caught.value, ValueError)
