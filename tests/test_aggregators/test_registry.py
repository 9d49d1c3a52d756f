"""The registry: names, keywords as the schema, and errors that name the near matches."""

import inspect

import pytest

from aggregators import (
    DuplicateAggregatorError,
    HeadConfigError,
    MeanPool,
    UnknownAggregatorError,
    UnknownKeywordError,
    aggregator_record,
    create_aggregator,
    keyword_names,
    list_aggregators,
    register_aggregator,
)


def test_the_heads_are_listed_sorted():
    assert list_aggregators() == sorted(list_aggregators())
    assert {"abmil", "max", "mean", "transformer"} <= set(list_aggregators())


@pytest.mark.parametrize("name", list_aggregators())
def test_keyword_names_are_the_constructor_with_usable_defaults(name):
    keywords = keyword_names(name)
    assert not {"in_dim", "n_classes"} & keywords.keys()
    assert {"input_norm", "dropout"} <= keywords.keys()
    assert inspect.Parameter.empty not in keywords.values()
    head = create_aggregator(name, in_dim=8, n_classes=2, **keywords)
    assert (type(head), head.in_dim, head.n_classes) == (aggregator_record(name).builder, 8, 2)


@pytest.mark.parametrize("name", list_aggregators())
def test_every_head_cites_a_paper_and_documents_every_keyword(name):
    record = aggregator_record(name)
    assert any(char.isdigit() for char in record.paper)
    documentation = inspect.getdoc(record.builder)
    for section in ("Shapes:", "Args:", "References:", "Deviations", "Example:"):
        assert section in documentation
    for keyword in ("in_dim", "n_classes", *keyword_names(name)):
        assert f"\n    {keyword}: " in documentation, keyword


def test_an_unknown_name_is_answered_with_near_matches_and_all_names():
    with pytest.raises(UnknownAggregatorError, match=r"got head 'abmill' .*max, mean.* did you mean abmil") as caught:
        create_aggregator("abmill")
    assert isinstance(caught.value, LookupError)


def test_an_unknown_keyword_is_answered_with_near_matches_and_valid_keywords():
    message = r"got keyword 'gate' for head 'abmil' .*attention_dim=64.* did you mean gated\?"
    with pytest.raises(UnknownKeywordError, match=message) as caught:
        create_aggregator("abmil", gate=True)
    assert isinstance(caught.value, TypeError)


def test_nothing_alike_is_answered_without_a_guess():
    with pytest.raises(UnknownAggregatorError, match="pick one of these"):
        create_aggregator("zzz")


def test_a_second_head_of_one_name_is_refused():
    with pytest.raises(DuplicateAggregatorError, match="second head named 'mean'"):
        register_aggregator("mean", paper="Nobody, 2026")(type("Other", (MeanPool,), {}))
    assert aggregator_record("mean").builder is MeanPool


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("abmil", {"embed_dim": 10**11}, "at most 1000000"),
        ("abmil", {"embed_dim": 60_000, "attention_dim": 60_000}, "parameters"),
        ("mean", {"in_dim": 10**9, "n_classes": 2}, "at most 1000000"),
        ("transformer", {"depth": 10**6}, "at most 256 layers"),
    ],
)
def test_a_head_larger_than_any_memory_is_refused_before_it_is_built(
    name: str, keywords: dict[str, int], message: str
) -> None:
    with pytest.raises(HeadConfigError, match=message):
        create_aggregator(name, **keywords)


def test_a_wide_head_is_built() -> None:
    assert create_aggregator("abmil", in_dim=4096, n_classes=2, embed_dim=16).in_dim == 4096
