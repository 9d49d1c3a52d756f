"""What a sweep is asked for: a search space over a training configuration, composed, checked and saved to run again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from extract.store.core.remote_path import StorePath
from mil.cohort.targets import REGRESSION, target_columns
from mil.config.compose import compose_config, read_config_file
from mil.config.options import GROUPS
from mil.config.sections import HeadConfig
from mil.config.train import TrainConfig
from mil.errors import ConfigError, did_you_mean
from mil.evaluation.headlines import selection_metrics
from mil.tuning.search_space import (
    Dimension,
    draw_settings,
    grid,
    override_text,
    parse_space,
    space_of,
    typed,
    value_name,
)

METHODS = ("grid", "random", "tpe")
DEFAULT_TRIALS = 20
_SECTION = ("space", "method", "trials", "select", "seed", "overrides", "values")

CHOSEN = "Its choice has seen every slide of the cohort, in one fold or another: train it for new slides."
"""Stands as a comment on top of a configuration that a sweep chose."""


@dataclass(frozen=True, eq=False)
class Setting:
    """One point of the search space.

    Attributes:
        values: by key of its dimensions.
        config: all of it.
    """

    values: Mapping[str, Any]
    config: TrainConfig

    @property
    def title(self) -> str:
        """Such as ``head=abmil optimizer.lr=0.001``."""
        return " ".join(f"{key}={value_name(value)}" for key, value in self.values.items())


@dataclass(frozen=True)
class Sources:
    """Where the values that are not swept come from; see `mil.config.compose.compose_config`."""

    file: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    _composed: dict[str, TrainConfig] = field(default_factory=dict, init=False, repr=False, compare=False)

    def compose(self, swept: Mapping[str, Any]) -> TrainConfig:
        """The configuration with these values of the dimensions; Hydra takes a tenth of a second for each once.

        Raises:
            ConfigError: an unknown key or value, or values that do not go together.
        """
        texts = [override_text(key, value) for key, value in swept.items()]
        name = " ".join(texts)
        if name not in self._composed:
            self._composed[name] = compose_config([*self.overrides, *texts], self.file, self.values)
        return self._composed[name]


@dataclass(frozen=True)
class SweepConfig:
    """What to sweep.

    Attributes:
        space: the dimensions.
        method: ``grid`` trains every combination, ``random`` some drawn ones, ``tpe`` searches by what it has seen.
        trials: settings per fold; None for a grid.
        select: what settings are chosen by, on validation parts; see `mil.evaluation.headlines.selection_metrics`.
        seed: of random draws and of the search.
        sources: the values that all settings share.
        checked: the first setting of all, and every other value once beside the first of the others.
    """

    space: tuple[Dimension, ...]
    method: str
    trials: int | None
    select: str
    seed: int
    sources: Sources
    checked: tuple[TrainConfig, ...]

    @property
    def train(self) -> TrainConfig:
        """The first setting, for what all share: store, labels, folds, seeds, ..."""
        return self.checked[0]

    @property
    def shares_loss(self) -> bool:
        """Whether losses of different settings can be compared; numbers always have the squared error."""
        return self.train.task == REGRESSION or len({(each.loss, each.class_weights) for each in self.checked}) == 1

    def setting(self, values: Mapping[str, Any]) -> Setting:
        """The setting at a point of the space.

        Raises:
            ConfigError: values that do not go together.
        """
        drawn = {each.key: values[each.key] for each in self.space if each.interval is not None}
        # numbers of an interval differ in every setting: they are put into what is composed once
        base = self.sources.compose({**values, **{each.key: each.known[0] for each in self.space if each.key in drawn}})
        return Setting(dict(values), _with_numbers(base, drawn))

    def settings(self) -> list[Setting]:
        """All settings of a grid or of random draws, each checked.

        Raises:
            ConfigError: values that do not go together.
        """
        drawn = draw_settings(self.space, self.trials, self.seed) if self.trials is not None else grid(self.space)
        return [self.setting(values) for values in drawn]

    def to_yaml(self) -> str:
        """The text of the sweep's ``config.yaml``: what was given, so that it composes to the same settings."""
        values = self.sources.values
        plain = {key: value for key, value in values.items() if key not in GROUPS}
        # absolute, so that the saved config runs from anywhere
        paths = {name: getattr(self.train, name) for name in ("store", "labels")}
        plain |= {name: path for name, path in paths.items() if path is not None}
        section = {
            "space": {dimension.key: dimension.plain() for dimension in self.space},
            "method": self.method,
            "trials": self.trials,
            "select": self.select,
            "seed": self.seed,
            "overrides": [text for text in self.sources.overrides if text.partition("=")[0].strip() not in plain],
            "values": {key: value for key, value in values.items() if key in GROUPS},
        }
        tree = _yaml_values({**self.sources.file, **plain, "sweep": section})
        text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        return text


def compose_sweep(
    overrides: Sequence[str] = (),
    file: str | Path | None = None,
    values: Mapping[str, Any] | None = None,
    space: Mapping[str, Any] | None = None,
    **chosen: Any,
) -> SweepConfig:
    """Compose and check a sweep, before anything is trained.

    Args:
        overrides: Hydra overrides; those with several values are the search space, see `parse_space`.
        file: ``config.yaml`` of an earlier sweep or run; what is given here goes before what it says.
        values: plain values by name, as in `mil.config.compose.compose_config`.
        space: lists of values, or texts of intervals, by key.
        **chosen: ``method``, ``trials``, ``select`` and ``seed`` of `SweepConfig`; what is None is left to the file.

    Raises:
        ConfigError: an unknown key, option or value (near matches are named), values that do not go together, or no
            search space.

    Example:
        >>> compose_sweep(["optimizer.lr=1e-4,1e-3", "head=mean,abmil"]).method
        'grid'
    """
    given = read_config_file(Path(file)) if file is not None else {}
    section = _section(given.pop("sweep", {}))
    dimensions, others = parse_space(overrides)
    dimensions = (*dimensions, *space_of(space or {}))
    taken = {text.partition("=")[0].strip() for text in others} | {each.key for each in dimensions}
    earlier = [each for each in space_of(section["space"]) if each.key not in taken]
    kept = [text for text in section["overrides"] if text.partition("=")[0].strip() not in taken]
    _refuse_both_ways([*earlier, *dimensions], values or {})
    sources = Sources(given, (*kept, *others), {**section["values"], **(values or {})})
    complete = _typed((*earlier, *dimensions), sources)
    checked = _check_values(complete, sources)
    if checked[0].track:
        raise ConfigError(
            f"got track={list(checked[0].track)} → a sweep tells no tracker of its trials → leave it out, and track "
            f"the training of best.yaml"
        )
    picked = {name: section[name] if chosen.get(name) is None else chosen[name] for name in _SECTION[1:5]}
    method, trials = _method(picked["method"], picked["trials"], complete)
    metrics = _selection_metrics(checked[0])
    select = _one_of("select", picked["select"] or metrics[0], metrics)
    seed = _whole("seed", picked["seed"] or 0, 0)
    return SweepConfig(complete, method, trials, select, seed, sources, checked)


def cautions_of(file: Path) -> list[str]:
    """What to say of figures that the configuration in a file gives: something, where a sweep has chosen it."""
    comments = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    if CHOSEN not in (line.lstrip("# ") for line in comments):
        return []
    return [
        "a sweep chose these settings with the slides of its cohort: on the same cohort they score too well here, and "
        "the honest figure is the sweep's own"
    ]


def _section(given: Any) -> dict[str, Any]:
    """What a config file says of the sweep."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"got sweep: {given!r} in the config file → expected keys below it → {', '.join(_SECTION)}")
    for key in given:
        _one_of("sweep.", str(key), list(_SECTION))
    found = dict.fromkeys(_SECTION) | dict(given)
    return found | {
        "space": found["space"] or {},
        "overrides": found["overrides"] or [],
        "values": found["values"] or {},
    }


def _one_of(name: str, value: Any, valid: Sequence[str]) -> str:
    if value not in valid:
        hint = did_you_mean(str(value), valid) or "choose one of these"
        raise ConfigError(f"got {name} {value} → expected one of {', '.join(valid)} → {hint.rstrip()}")
    return str(value)


def _whole(name: str, value: Any, low: int) -> int:
    if type(value) is not int or value < low:
        raise ConfigError(
            f"got {name} {value} → expected a whole number of {low} or more → give --{name} {max(low, 20)}"
        )
    return value


def _method(method: Any, trials: Any, space: Sequence[Dimension]) -> tuple[str, int | None]:
    """The method and its number of trials, None for a grid."""
    intervals = [dimension.key for dimension in space if dimension.interval is not None]
    method = _one_of("method", method or ("tpe" if intervals else "grid"), METHODS)
    if method != "grid":
        return method, _whole("trials", DEFAULT_TRIALS if trials is None else trials, 1)
    if intervals:
        raise ConfigError(
            f"got method grid with an interval of {intervals[0]} → a grid needs values → list them, such as "
            f"{intervals[0]}=1e-4,1e-3, or give --method random or tpe"
        )
    if trials is not None:
        n = math.prod(len(dimension.values) for dimension in space)
        raise ConfigError(
            f"got trials {trials} for a grid → a grid trains all of its {n} settings → leave out --trials, or give "
            f"--method random or tpe"
        )
    return method, None


def _selection_metrics(train: TrainConfig) -> tuple[str, ...]:
    """What settings can be chosen by; a target that is not named yet is one column."""
    n_columns = len(target_columns(train.task, train.target)) if train.target else 1
    return selection_metrics(train.task, n_columns)


def _refuse_both_ways(space: Sequence[Dimension], values: Mapping[str, Any]) -> None:
    """Refuse keys that are swept and given one value as well, which would silently win."""
    flat = set(values)
    for group, value in values.items():
        flat |= {f"{group}.{key}" for key in value} if isinstance(value, Mapping) else set()
        if isinstance(value, Mapping) and "name" not in value:
            flat.discard(group)
    both = [dimension.key for dimension in space if dimension.key in flat]
    if both:
        raise ConfigError(f"got {both[0]} both to sweep and with one value → expected one of them → take the other out")


def _with_numbers(config: TrainConfig, numbers: Mapping[str, Any]) -> TrainConfig:
    """The configuration with some numbers replaced, checked as if it had been composed with them."""
    changed: dict[str, Any] = {}
    for key, value in numbers.items():
        group, _, name = key.rpartition(".")
        if not group:
            changed[key] = value
            continue
        section = changed.get(group, getattr(config, group))
        if isinstance(section, HeadConfig):
            changed[group] = HeadConfig(section.name, {**section.keywords, name: value})
        else:
            changed[group] = replace(section, **{name: value})
    return replace(config, **changed) if changed else config


def _typed(space: Sequence[Dimension], sources: Sources) -> tuple[Dimension, ...]:
    """The dimensions, intervals in the type of their key."""
    if not space:
        raise ConfigError(
            "got nothing to sweep → expected a key with several values → write optimizer.lr=1e-4,1e-3 or "
            "optimizer.lr=interval(1e-5,1e-2), or use mil train"
        )
    lists = {dimension.key: dimension.values[0] for dimension in space if dimension.interval is None}
    plain = sources.compose(lists).to_dict()
    found = []
    for dimension in space:
        current = _look_up(plain, dimension.key)
        if current is None and dimension.interval is not None and _takes_whole_numbers(dimension, sources, lists):
            current = 0
        found.append(typed(dimension, current))
    return tuple(found)


def _takes_whole_numbers(dimension: Dimension, sources: Sources, lists: Mapping[str, Any]) -> bool:
    """Whether a key without a value, which has no type to go by, refuses fractions between two whole ends."""
    interval = dimension.interval
    if interval is None or interval.low % 1 or interval.high % 1:
        return False
    try:
        sources.compose({**lists, dimension.key: interval.low + 0.4 * (interval.high - interval.low) + 0.05})
    except ConfigError:
        return True
    return False


def _look_up(plain: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none, which composing will tell."""
    found: Any = plain
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _check_values(space: Sequence[Dimension], sources: Sources) -> tuple[TrainConfig, ...]:
    """Compose the first values, then every other value once beside the first of the others."""
    first = {dimension.key: dimension.known[0] for dimension in space}
    points = [first | {dimension.key: value} for dimension in space for value in dimension.known[1:]]
    return tuple(sources.compose(point) for point in [first, *points])


def _yaml_values(value: Any) -> Any:
    """Plain values that YAML can hold."""
    if isinstance(value, Mapping):
        return {str(key): _yaml_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_yaml_values(inner) for inner in value]
    return str(value) if isinstance(value, StorePath) else value
