"""The search space: what Hydra's sweep syntax becomes, what is refused, what is drawn."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mil.config.overrides import take_overrides
from mil.errors import ConfigError
from mil.tuning.search_space import (
    Dimension,
    Interval,
    draw_settings,
    grid,
    override_text,
    parse_space,
    space_of,
    typed,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("head=abmil,clam_sb", Dimension("head", ("abmil", "clam_sb"))),
        ("optimizer.lr=choice(1e-4,0.001)", Dimension("optimizer.lr", (1e-4, 1e-3))),
        ("epochs=range(5,20,5)", Dimension("epochs", (5, 10, 15))),
        ("optimizer.betas=[0.9,0.99],[0.9,0.999]", Dimension("optimizer.betas", ([0.9, 0.99], [0.9, 0.999]))),
        ("instance_budget=null,64", Dimension("instance_budget", (None, 64))),
        ("init='a b,c',\"d\"", Dimension("init", ("a b,c", "d"))),
        ("optimizer.lr=interval(1e-5,1e-2)", Dimension("optimizer.lr", interval=Interval(1e-5, 1e-2, log=True))),
        ("l1=interval(0,1e-2)", Dimension("l1", interval=Interval(0.0, 1e-2))),
        ("l1=interval(0.1,0.2)", Dimension("l1", interval=Interval(0.1, 0.2))),
        ("l1=tag(log,interval(0.1,0.2))", Dimension("l1", interval=Interval(0.1, 0.2, log=True))),
        ("l1=tag(linear,interval(1e-5,1))", Dimension("l1", interval=Interval(1e-5, 1.0))),
        ("epochs=int(interval(5,20))", Dimension("epochs", interval=Interval(5, 20, integer=True))),
    ],
)
def test_hydras_syntax_is_read(text: str, expected: Dimension) -> None:
    (found,), others = parse_space([text, "folds=3"])
    assert found == expected
    assert others == ["folds=3"]


def test_a_space_of_plain_values_is_that_of_the_overrides() -> None:
    texts = ["head=abmil,mean", "optimizer.lr=interval(1e-5,1e-2)", "epochs=int(interval(2,9))", "l1=0,0.5"]
    space, _ = parse_space(texts)
    assert space_of({dimension.key: dimension.plain() for dimension in space}) == space
    assert space_of({"l1": np.array([0.0, 0.5]), "epochs": range(2, 4)})[0].values == (0.0, 0.5)


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        (["optimizer.lr=interval(1e-2,1e-4)"], r"interval\(1e-2,1e-4\) → expected a lower and a higher"),
        (["optimizer.lr=tag(log,interval(0,1))"], "a logarithmic scale has no 0"),
        (["optimizer.lr=tag(ln,interval(1,2))"], "the tags are log and linear, not 'ln'"),
        (["head=interval(1,2)"], "a group has names"),
        (["head=glob(*)"], r"expected values by name → write head=a,b"),
        (["l1=0,1,0"], r"got l1=0,1,0 with 0 more than once"),
        (["l1=0,1", "l1=0.5"], "got l1 more than once"),
        (["l1=0,1", "l1=2,3"], "got l1 more than once"),
        (["folds=3,5"], "all settings of a sweep share the slides, the folds and seeds"),
        (["seeds=1,2"], "give seeds one value"),
        (["task=regression,survival"], "give task one value"),
        (["head=a,{name: b}"], "as a value of head"),
        (["l1=(0,1"], r"got l1=\(0,1 → expected group=option"),
    ],
)
def test_wrong_spaces_are_told(texts: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_space(texts)


@pytest.mark.parametrize("value", [0.1, "mean", None, {"a": 1}])
def test_a_plain_value_is_no_dimension(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"to sweep → expected a list of values or the text of an interval"):
        space_of({"l1": value})


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.floats(-1e9, 1e9), st.text(st.characters(codec="utf-8"))
)


@settings(max_examples=60, deadline=None)
@example("A¹")
@given(st.one_of(SCALARS, st.lists(st.floats(-1e9, 1e9), max_size=3)))
def test_a_value_survives_being_written_as_an_override(value: Any) -> None:
    assert take_overrides([override_text("target", value)], ["target"])[0] == {"target": value}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.floats(1e-6, 1.0), st.floats(1.01, 1e5))
def test_draws_stay_within_and_can_be_typed_again(seed: int, log: bool, low: float, ratio: float) -> None:
    interval = Interval(low, low * ratio, log)
    value = interval.draw(np.random.default_rng(seed))
    assert low <= value <= low * ratio
    assert value in (low, low * ratio) or float(f"{value:.4g}") == value
    whole = Interval(3, 7, log, integer=True).draw(np.random.default_rng(seed))
    assert type(whole) is int
    assert 3 <= whole <= 7


def test_a_logarithmic_interval_is_drawn_evenly_by_decades() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([Interval(1e-5, 1e-1, log=True).draw(rng) for _ in range(2000)])
    share = np.histogram(np.log10(drawn), [-5, -4, -3, -2, -1])[0] / len(drawn)
    np.testing.assert_allclose(share, 0.25, atol=0.04)
    linear = np.array([Interval(1e-5, 1e-1).draw(rng) for _ in range(2000)])
    assert (linear > 1e-2).mean() > 0.85


def test_a_grid_has_every_combination_once() -> None:
    space, _ = parse_space(["head=mean,max", "l1=0,1,2"])
    assert [tuple(each.values()) for each in grid(space)] == [(h, l1) for h in ("mean", "max") for l1 in (0, 1, 2)]


@pytest.mark.parametrize("texts", [["head=mean,max", "l1=0,1,2"], ["epochs=int(interval(1,3))", "head=mean,max"]])
def test_random_settings_are_different_and_belong_to_the_seed(texts: list[str]) -> None:
    space, _ = parse_space(texts)
    drawn = [tuple(each.items()) for each in draw_settings(space, 4, seed=1)]
    assert len(set(drawn)) == 4
    assert drawn == [tuple(each.items()) for each in draw_settings(space, 4, seed=1)]
    assert drawn != [tuple(each.items()) for each in draw_settings(space, 4, seed=2)]
    # the space has six
    assert len(draw_settings(space, 50, seed=0)) == 6


def test_an_interval_takes_the_type_of_its_key() -> None:
    dimension = parse_space(["epochs=interval(5,20)"])[0][0]
    assert dimension.interval is not None
    assert not dimension.interval.integer
    whole = typed(dimension, 40)
    assert whole.interval == Interval(5, 20, integer=True)
    assert whole.known == (5, 20)
    assert typed(dimension, 0.5) == dimension
    with pytest.raises(ConfigError, match=r"expected whole numbers → write epochs=interval\(5,7\)"):
        typed(parse_space(["epochs=interval(4.5,7.5)"])[0][0], 40)


def test_ends_are_known() -> None:
    (lr,), _ = parse_space(["l1=interval(1e-5,1e-1)"])
    assert [lr.end_of(value) for value in (1e-5, 1.05e-5, 1e-3, 9.9e-2)] == ["lowest", "lowest", "", "highest"]
    (listed,), _ = parse_space(["l1=3,1,2"])
    assert [listed.end_of(value) for value in (3, 1, 2)] == ["highest", "lowest", ""]
    (two,), _ = parse_space(["l1=1,2"])
    (names,), _ = parse_space(["head=a,b,c"])
    assert two.end_of(1) == names.end_of("a") == ""
