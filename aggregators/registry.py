"""Names the heads: registering a class is what makes it creatable, configurable and tested."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import torch

from aggregators.base import Aggregator
from aggregators.errors import DuplicateAggregatorError, UnknownAggregatorError, UnknownKeywordError, require

_LARGEST_NUMBER, _LARGEST_DEPTH = 1_000_000, 256
_SURELY_SMALL = 2048
"""A head whose numbers are all at most this large is built at once; of others the parameters are counted before."""
_MOST_PARAMETERS = 1_000_000_000

_Head = TypeVar("_Head", bound=type[Aggregator])


@dataclass(frozen=True)
class AggregatorRecord:
    """The facts about one head.

    Attributes:
        name: what users type.
        builder: the class; its constructor keywords are the schema.
        paper: authors, title, venue and year.
        cost: memory and time in the instances of a bag ("quadratic": time only, memory stays linear).
        permutation_invariant: the order of a bag's instances does not matter by the head's definition.
    """

    name: str
    builder: type[Aggregator]
    paper: str
    cost: Literal["linear", "quadratic"]
    permutation_invariant: bool

    @cached_property
    def keywords(self) -> dict[str, object]:
        """The constructor's keywords with their defaults, without in_dim and n_classes."""
        parameters = inspect.signature(self.builder).parameters
        return {key: value.default for key, value in parameters.items() if key not in ("in_dim", "n_classes")}


_RECORDS: dict[str, AggregatorRecord] = {}


def register_aggregator(
    name: str,
    *,
    paper: str,
    cost: Literal["linear", "quadratic"] = "linear",
    permutation_invariant: bool = True,
) -> Callable[[_Head], _Head]:
    """Decorates a head class so that create_aggregator knows it; the arguments are AggregatorRecord's.

    Raises:
        DuplicateAggregatorError: the name is taken.
    """

    def register(builder: _Head) -> _Head:
        if name in _RECORDS:
            raise DuplicateAggregatorError(
                f"got a second head named {name!r} ({builder.__name__}) → expected one, taken by "
                f"{_RECORDS[name].builder.__name__} → choose another name"
            )
        _RECORDS[name] = AggregatorRecord(name, builder, paper, cost, permutation_invariant)
        return builder

    return register


def list_aggregators() -> list[str]:
    """Returns the names of all heads, sorted.

    Example:
        >>> "abmil" in list_aggregators()
        True
    """
    return sorted(_RECORDS)


def aggregator_record(name: str) -> AggregatorRecord:
    """Returns the facts about a head.

    Raises:
        UnknownAggregatorError: no head has this name; the message lists near matches and all names.

    Example:
        >>> aggregator_record("abmil").cost
        'linear'
    """
    if name not in _RECORDS:
        raise UnknownAggregatorError(
            f"got head {name!r} → expected one of {', '.join(list_aggregators())} → {_suggestion(name, _RECORDS)}"
        )
    return _RECORDS[name]


def keyword_names(name: str) -> dict[str, object]:
    """Returns a head's constructor keywords with their defaults, without in_dim and n_classes.

    Raises:
        UnknownAggregatorError: no head has this name.

    Example:
        >>> keyword_names("mean")
        {'embed_dim': None, 'dropout': 0.0, 'input_norm': 'none'}
    """
    return dict(aggregator_record(name).keywords)


def create_aggregator(name: str, in_dim: int = 1024, n_classes: int = 4, **keywords: object) -> Aggregator:
    """Builds a head by name.

    Args:
        name: one of list_aggregators().
        in_dim: features per instance.
        n_classes: logits per bag.
        **keywords: the head's own, see keyword_names(name) and its docstring.

    Raises:
        UnknownAggregatorError: no head has this name.
        UnknownKeywordError: the head has no such keyword; the message lists near matches and the valid ones.
        HeadConfigError: a value is out of range.

    Example:
        >>> import torch
        >>> head = create_aggregator("abmil", in_dim=16, n_classes=2, gated=False).eval()
        >>> output = head(torch.randn(7, 16), torch.tensor([0, 3, 7]))
        >>> output.logits.shape, output.attention.shape
        (torch.Size([2, 2]), torch.Size([7, 1]))
    """
    valid = keyword_names(name)
    for keyword in keywords:
        if keyword not in valid:
            listing = ", ".join(f"{key}={default!r}" for key, default in valid.items())
            raise UnknownKeywordError(
                f"got keyword {keyword!r} for head {name!r} → expected {listing} → {_suggestion(keyword, valid)}"
            )
    builder: Callable[..., Aggregator] = aggregator_record(name).builder
    keywords = {"in_dim": in_dim, "n_classes": n_classes, **keywords}
    _check_parameters(name, builder, keywords)
    return builder(**keywords)


def _check_parameters(name: str, builder: Callable[..., Aggregator], keywords: Mapping[str, object]) -> None:
    """Refuse a head too large for any memory before a byte of it is asked for."""
    largest = max((abs(value) for value in keywords.values() if isinstance(value, int)), default=0)
    require(
        largest <= _LARGEST_NUMBER,
        f"got a width or number of {largest} for head {name!r} → expected at most {_LARGEST_NUMBER} → choose a smaller "
        f"one",
    )
    depth = keywords.get("depth", 1)
    require(
        not isinstance(depth, int) or depth <= _LARGEST_DEPTH,
        f"got depth={depth} for head {name!r} → expected at most {_LARGEST_DEPTH} layers → choose fewer",
    )
    if largest > _SURELY_SMALL:
        # on a device without memory only shapes are made
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in builder(**keywords).parameters())
        require(
            count <= _MOST_PARAMETERS,
            f"got head {name!r} with {count} parameters by {dict(keywords)} → expected at most {_MOST_PARAMETERS} → "
            f"choose smaller widths",
        )


def _suggestion(got: str, valid: Iterable[str]) -> str:
    matches = difflib.get_close_matches(got, list(valid), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(matches)}?" if matches else "pick one of these"
