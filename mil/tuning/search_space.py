"""The search space of a sweep: one dimension per setting, a list of values or an interval, in Hydra's sweep syntax."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mil.config.options import GROUPS
from mil.config.overrides import parse_overrides
from mil.errors import ConfigError, listed

LOG_FROM_RATIO = 100
"""An interval above zero whose ends differ by this factor or more is searched on a logarithmic scale."""

NEAR_END = 0.02
"""Part of a scale within which a value counts as at its end."""

FIXED = (
    *("store", "labels", "target", "task", "backbone", "slide_column", "patient_column"),
    *("distinct_patients", "device", "memory", "track", "track_files"),
    *("split", "folds", "repeats", "sites", "split_column", "split_file", "seeds", "split_seed", "validation_fraction"),
)
"""What all settings of a sweep share: the data, the parts they are judged on, and where they run."""

_PLAIN_WORD = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
_WORDS_WITH_MEANING = {"null", "true", "false", "nan", "inf"}


@dataclass(frozen=True)
class Interval:
    """Numbers from ``low`` to ``high``, both included.

    Attributes:
        low: lower end.
        high: upper end.
        log: searched on a logarithmic scale.
        integer: whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def draw(self, rng: np.random.Generator) -> float | int:
        """One number, evenly on the interval's scale."""
        if self.integer and not self.log:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        drawn = rng.uniform(low, high)
        return self.near(math.exp(drawn) if self.log else drawn)

    def near(self, value: float) -> float | int:
        """The number as it is trained with: whole, or four significant digits, which can be read and typed again."""
        if self.integer:
            return int(min(max(round(value), self.low), self.high))
        return float(min(max(float(f"{value:.4g}"), self.low), self.high))

    def place(self, value: float) -> float:
        """Where a value lies on the interval's scale, 0 at the lower end and 1 at the upper."""
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return (at - low) / (high - low)

    def text(self) -> str:
        """As an override has it."""
        ends = f"{int(self.low)},{int(self.high)}" if self.integer else f"{self.low!r},{self.high!r}"
        plain = f"int(interval({ends}))" if self.integer else f"interval({ends})"
        return f"tag({'log' if self.log else 'linear'},{plain})"


@dataclass(frozen=True)
class Dimension:
    """One setting that a sweep varies.

    Attributes:
        key: dotted name, such as ``optimizer.lr``, or a group, such as ``head``.
        values: those to try, in order; empty for an interval.
        interval: where the values lie, or None.
    """

    key: str
    values: tuple[Any, ...] = ()
    interval: Interval | None = None

    @property
    def known(self) -> tuple[Any, ...]:
        """The values of a list, the ends of an interval."""
        if self.interval is None:
            return self.values
        return (self.interval.near(self.interval.low), self.interval.near(self.interval.high))

    def draw(self, rng: np.random.Generator) -> Any:
        """One value at random."""
        return self.values[int(rng.integers(len(self.values)))] if self.interval is None else self.interval.draw(rng)

    def end_of(self, value: Any) -> str:
        """``lowest`` or ``highest`` where a number is at an end of the interval, or of a list of three or more."""
        if self.interval is not None:
            place = self.interval.place(value)
        else:
            numbers = [each for each in self.values if isinstance(each, int | float) and not isinstance(each, bool)]
            if len(numbers) < 3 or len(numbers) < len(self.values):
                return ""
            place = (value - min(numbers)) / (max(numbers) - min(numbers))
        return "lowest" if place <= NEAR_END else "highest" if place >= 1 - NEAR_END else ""

    def plain(self) -> Any:
        """The dimension as a config file has it: a list, or the text of the interval."""
        return self.interval.text() if self.interval is not None else list(self.values)


def override_text(key: str, value: Any) -> str:
    """A value as an override.

    >>> override_text("optimizer.betas", [0.9, 0.99]), override_text("init", "a b.safetensors"), override_text("l1", 0)
    ('optimizer.betas=[0.9,0.99]', 'init="a b.safetensors"', 'l1=0')
    """
    return f"{key}={_value_text(value)}"


def value_name(value: Any) -> str:
    """A value as tables and figures show it.

    >>> value_name(0.0001), value_name(None), value_name([1, 2])
    ('0.0001', 'null', '[1,2]')
    """
    return f"{value:.6g}" if type(value) is float else value if isinstance(value, str) else _value_text(value)


def _value_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value_text, value)) + "]"
    text = str(value)
    if _PLAIN_WORD.fullmatch(text) and text.lower() not in _WORDS_WITH_MEANING:
        return text
    # within quotes, Hydra takes a backslash for an escape only before a quote
    escaped = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), text)
    return f'"{escaped}"'


# ------------------------------------------------------------------------------------------------------------- reading


def parse_space(overrides: Sequence[str]) -> tuple[tuple[Dimension, ...], list[str]]:
    """Take the sweeps out of a list of overrides: the dimensions, and the ordinary overrides that are left.

    ``a=1,2,3``, ``a=choice(1,2,3)`` and ``a=range(1,4)`` are lists; ``a=interval(1e-5,1e-2)`` is an interval,
    ``a=tag(log,interval(...))`` and ``a=tag(linear,interval(...))`` choose its scale, ``a=int(interval(1,8))`` keeps to
    whole numbers.

    Raises:
        ConfigError: text that Hydra cannot read, a key given twice, a key that settings cannot differ in, an empty
            interval, a value given twice.

    Example:
        >>> space, others = parse_space(["head=abmil,mean", "optimizer.lr=interval(1e-5,1e-2)", "folds=3"])
        >>> space[1].interval, others
        (Interval(low=1e-05, high=0.01, log=True, integer=False), ['folds=3'])
    """
    found: list[Dimension] = []
    others: list[str] = []
    keys: list[str] = []
    for text, item in zip(overrides, parse_overrides(overrides), strict=True):
        if item.is_sweep_override():
            found.append(_dimension(str(item.key_or_group), item.value(), text))
        else:
            others.append(text)
        keys.append(str(item.key_or_group))
    _refuse_repeated([dimension.key for dimension in found], keys)
    return tuple(found), others


def space_of(given: Mapping[str, Any]) -> tuple[Dimension, ...]:
    """Dimensions from plain values: a list for each key, or the text of an interval.

    Raises:
        ConfigError: as `parse_space`.

    Example:
        >>> [each.key for each in space_of({"head": ["abmil", "mean"], "l1": "interval(0, 1e-3)"})]
        ['head', 'l1']
    """
    found = []
    for key, value in given.items():
        if isinstance(value, str):
            (item,) = parse_overrides([f"{key}={value}"])
            if not item.is_sweep_override():
                raise _no_list(key, value)
            found.append(_dimension(key, item.value(), f"{key}={value}"))
        elif isinstance(value, Sequence | np.ndarray):
            found.append(_listed_dimension(key, [_python(each) for each in value], f"{key}={list(value)}"))
        else:
            raise _no_list(key, value)
    return tuple(found)


def _python(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def _no_list(key: str, value: Any) -> ConfigError:
    return ConfigError(
        f"got {key}={value!r} to sweep → expected a list of values or the text of an interval → write "
        f"{key!r}: [{value!r}, ...], or {key!r}: 'interval(1e-5, 1e-2)'"
    )


def _refuse_repeated(swept: Sequence[str], keys: Sequence[str]) -> None:
    for key in swept:
        if keys.count(key) > 1:
            raise ConfigError(f"got {key} more than once → expected each key once → put all its values into one list")


def _dimension(key: str, sweep: Any, text: str) -> Dimension:
    """What Hydra has read as a sweep."""
    kind = type(sweep).__name__
    if kind == "IntervalSweep":
        return _interval_dimension(key, sweep, text)
    if kind == "ChoiceSweep":
        return _listed_dimension(key, [_plain(value) for value in sweep.list], text)
    if kind == "RangeSweep":
        return _listed_dimension(key, list(sweep.range()), text)
    raise ConfigError(f"got {text} → expected values by name → write {key}=a,b or {key}=choice(a,b)")


def _plain(value: Any) -> Any:
    """A parsed element without Hydra's own kind of quoted text, at any depth."""
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str) or value is None else value.text


def _listed_dimension(key: str, values: list[Any], text: str) -> Dimension:
    _refuse_fixed(key, text)
    if not values:
        raise ConfigError(f"got {text} without any value → expected one or more → write {key}=a,b")
    repeated = [value for at, value in enumerate(values) if value in values[:at]]
    if repeated:
        raise ConfigError(
            f"got {text} with {listed(repeated)} more than once → expected each value once → take one out"
        )
    mapping = next((value for value in values if isinstance(value, Mapping)), None)
    if mapping is not None:
        raise ConfigError(
            f"got {dict(mapping)} as a value of {key} → expected a name, a number or a list → sweep its keys one by "
            f"one, such as head=abmil,clam_sb head.dropout=0,0.25"
        )
    return Dimension(key, tuple(values))


def _interval_dimension(key: str, sweep: Any, text: str) -> Dimension:
    _refuse_fixed(key, text)
    low, high, tags = float(sweep.start), float(sweep.end), set(sweep.tags)
    if key in GROUPS or tags - {"log", "linear"}:
        what = "a group has names, no numbers" if key in GROUPS else f"the tags are log and linear, not {listed(tags)}"
        raise ConfigError(f"got {text} → {what} → write {key}=a,b, or tag(log,interval(1e-5,1e-2))")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"got {text} → expected a lower and a higher number → write {key}=interval(1e-5,1e-2)")
    if "log" in tags and low <= 0:
        raise ConfigError(
            f"got {text} → a logarithmic scale has no {low:g} → begin above zero, or write tag(linear,...)"
        )
    log = "log" in tags or ("linear" not in tags and low > 0 and high / low >= LOG_FROM_RATIO)
    integer = isinstance(sweep.start, int) and isinstance(sweep.end, int)
    return Dimension(key, interval=Interval(low, high, log, integer))


def _refuse_fixed(key: str, text: str) -> None:
    if key in FIXED:
        raise ConfigError(
            f"got {text} → all settings of a sweep share the slides, the folds and seeds, and the device → give {key} "
            f"one value, and compare others by sweeps of their own"
        )


def typed(dimension: Dimension, current: Any) -> Dimension:
    """The dimension in the type of the value that the key has now: an interval of whole numbers for an integer.

    Raises:
        ConfigError: an interval with fractional ends for an integer.
    """
    interval = dimension.interval
    if interval is None or type(current) is not int:
        return dimension
    if interval.low % 1 or interval.high % 1:
        raise ConfigError(
            f"got {dimension.key}={interval.text()} → expected whole numbers → write "
            f"{dimension.key}=interval({math.ceil(interval.low)},{math.floor(interval.high)})"
        )
    return replace(dimension, interval=replace(interval, integer=True))


# ------------------------------------------------------------------------------------------------------------ settings


def grid(space: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """Every combination of the values; the last dimension changes fastest."""
    keys = [dimension.key for dimension in space]
    for values in itertools.product(*(dimension.values for dimension in space)):
        yield dict(zip(keys, values, strict=True))


def draw_settings(space: Sequence[Dimension], n: int, seed: int) -> list[dict[str, Any]]:
    """Different settings at random, at most ``n``: fewer where the space has no more."""
    rng = np.random.default_rng(seed)
    if all(dimension.interval is None for dimension in space):
        settings = list(grid(space))
        return [settings[int(at)] for at in rng.permutation(len(settings))[:n]]
    found: list[dict[str, Any]] = []
    # an interval of few whole numbers may run out
    for _ in range(100 * n):
        setting = {dimension.key: dimension.draw(rng) for dimension in space}
        if setting not in found:
            found.append(setting)
        if len(found) == n:
            break
    return found
