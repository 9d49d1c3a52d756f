"""What a benchmark is asked: heads, stores, and the settings that all share."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from aggregators import list_aggregators
from extract.store.core.remote_path import StorePath, store_path
from mil.config.compose import compose_config, read_config_file
from mil.config.overrides import take_overrides
from mil.config.sections import HeadConfig
from mil.config.train import TrainConfig
from mil.errors import ConfigError
from mil.experiments.leaderboard import REFERENCE

DEFAULT_HEADS = ("mean", "max", "abmil", "transformer")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to benchmark.

    Attributes:
        stores: embedding stores with the cohort's slides.
        heads: names, or mappings of ``name`` and keywords. The head ``mean`` is always among them.
        backbones: features entries to read; None takes all that the stores hold.
        train: how every head is trained; its own head, store and backbone are not read.
    """

    stores: tuple[StorePath, ...]
    heads: tuple[HeadConfig, ...]
    backbones: tuple[str, ...] | None
    train: TrainConfig

    def to_yaml(self) -> str:
        """The text of the board's ``config.yaml``."""
        plain = self.train.to_dict()
        for name in ("head", "store", "backbone"):
            plain.pop(name)
        heads = [{"name": head.name} | given_keywords(head) for head in self.heads]
        chosen = {"stores": [str(path) for path in self.stores], "heads": heads}
        chosen["backbones"] = None if self.backbones is None else list(self.backbones)
        text: str = yaml.safe_dump(chosen | plain, sort_keys=False, allow_unicode=True)
        return text


def compose_benchmark(
    overrides: Sequence[str] = (), file: str | Path | None = None, values: Mapping[str, Any] | None = None
) -> BenchmarkConfig:
    """Compose a benchmark's settings: those of `compose_config`, and ``heads``, ``backbones`` and ``stores``.

    Raises:
        ConfigError: an unknown key, head, keyword or value.
    """
    given = read_config_file(Path(file)) if file is not None else {}
    own, others = take_overrides(overrides, ("heads", "backbones", "stores"))
    values = dict(values or {})
    chosen: dict[str, Any] = {}
    for name in ("heads", "backbones", "stores"):
        chosen[name] = given.pop(name, None)
        chosen[name] = own.get(name, chosen[name])
        chosen[name] = values.pop(name, chosen[name]) or chosen[name]
    misplaced = [text for text in others if re.match(r"(head|store|backbone)\b", text)]
    if misplaced:
        raise ConfigError(
            f"got {misplaced[0]} → a benchmark takes heads=[...], backbones=[...] and --store → give a head's keywords "
            f"as heads=[mean,'{{name: abmil, dropout: 0.5}}']"
        )
    train = compose_config(others, given, values)
    if train.track:
        raise ConfigError(
            f"got track={list(train.track)} → a benchmark tells no trackers → leave it out; mil train has it"
        )
    return BenchmarkConfig(
        stores=tuple(store_path(path).expanduser().absolute() for path in chosen["stores"] or ()),
        heads=_heads(chosen["heads"]),
        backbones=tuple(_list("backbones", chosen["backbones"])) if chosen["backbones"] is not None else None,
        train=train,
    )


def given_keywords(head: HeadConfig) -> dict[str, Any]:
    """The keywords of a head that are not its defaults."""
    defaults = HeadConfig(head.name).keywords
    return {key: value for key, value in head.keywords.items() if value != defaults[key]}


def head_title(head: HeadConfig) -> str:
    """Such as ``abmil gated=False``."""
    return " ".join([head.name, *(f"{key}={value}" for key, value in given_keywords(head).items())])


def _list(name: str, value: Any) -> list[Any]:
    if isinstance(value, str | Mapping):
        return [value]
    if not isinstance(value, Sequence) or not value:
        raise ConfigError(f"got {name}={value!r} → expected a list → write {name}=[...]")
    return list(value)


def _heads(given: Any) -> tuple[HeadConfig, ...]:
    """The heads asked for; mean pooling first, since all are compared with it."""
    wanted = list_aggregators() if given == "all" else _list("heads", given) if given is not None else DEFAULT_HEADS
    heads = [HeadConfig(REFERENCE)]
    for each in wanted:
        if isinstance(each, Mapping) and "name" not in each:
            raise ConfigError(
                f"got the head {dict(each)} → expected a name among its keys → write '{{name: abmil, ...}}'"
            )
        keywords = dict(each) if isinstance(each, Mapping) else {"name": str(each)}
        head = HeadConfig(str(keywords.pop("name")), keywords)
        if head not in heads:
            heads.append(head)
        elif head != heads[0]:
            raise ConfigError(f"got the head {head_title(head)} twice in heads → expected each once → take one out")
    return tuple(heads)
