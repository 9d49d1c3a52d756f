"""Values of settings: coerced to their types, held to their ranges."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from extract.store.core.remote_path import RemotePath, store_path
from mil.config.options import option_keys
from mil.errors import ConfigError, did_you_mean, nearest


def number_field(default: Any, low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Any:
    """A dataclass field within [low, high]; ``above`` and ``below`` leave the ends out."""
    return field(default=default, metadata={"low": low, "high": high, "above": above, "below": below})


class Checked:
    """Coerces and checks every field of a frozen dataclass on construction, however it is made."""

    _where = ""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            value = coerce(f"{self._where}{item.name}", getattr(self, item.name), item.type)
            check_range(f"{self._where}{item.name}", value, item)
            object.__setattr__(self, item.name, value)


def known_option(group: str, option: str) -> str:
    """``option``, if the group has it.

    Raises:
        ConfigError: near matches are named.
    """
    require_known(option, list(option_keys(group)), f"{group}=")
    return option


_MOST_NAMES = 8


def check_option(group: str, option: str, keys: Iterable[str] = ()) -> None:
    """Refuse an unknown option of a group, or keys that it does not take.

    Raises:
        ConfigError: near matches are named.
    """
    known_option(group, option)
    for key in keys:
        require_key(group, option, key)


def require_key(group: str, option: str, key: str) -> None:
    """Raise unless ``key`` is one of the option's; where it is another option's, say whose."""
    keys = option_keys(group)
    if key in keys[option]:
        return
    others = [name for name in nearest(option, list(keys)) if key in keys[name]]
    if not others:
        require_known(key, keys[option], f"{group}.", what="key")
        return
    own = ", ".join(f"{group}.{name}" for name in keys[option])
    more = f" and {len(others) - _MOST_NAMES} more" if len(others) > _MOST_NAMES else ""
    raise ConfigError(
        f"got the unknown key {group}.{key} for {group}={option} → a key of {', '.join(others[:_MOST_NAMES])}{more} → "
        f"take {group}={others[0]}, or a key of {option}: {own}"
    )


def require_known(name: str, valid: Sequence[str], prefix: str, what: str = "option") -> None:
    """Raise, naming near matches, unless ``name`` is one of ``valid``."""
    if name in valid:
        return
    nested = [key for key in valid if key.rpartition(".")[2] == name]
    near = did_you_mean(name, valid, prefix if what == "key" else "") or "choose one of these"
    hint = f"did you mean {' or '.join(nested)}?" if nested else near
    first = list(dict.fromkeys([*nested, *nearest(name, valid)]))[:_MOST_NAMES]
    shown = ", ".join(f"{prefix}{item}" for item in first)
    if len(valid) > _MOST_NAMES:
        shown += f", … (mil config show{'' if what == 'key' else ' --options'} lists all)"
    raise ConfigError(f"got the unknown {what} {prefix}{name} → expected one of {shown} → {hint.rstrip()}")


def coerce(where: str, value: Any, kind: Any) -> Any:
    """``value`` as the annotated type ``kind``, where that loses nothing."""
    if get_origin(kind) in (Union, UnionType):
        return _coerce_union(where, value, get_args(kind))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            require_known(str(value), get_args(kind), f"{where}=")
        return value
    if get_origin(kind) is tuple:
        return _coerce_seeds(where, value) if where == "seeds" else _coerce_tuple(where, value, get_args(kind))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(where, value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"got {where}={value} → expected a finite number → write {where}=<a number>")
    if kind is Path and isinstance(value, str | Path):
        return _local_file(where, value)
    wanted = Mapping if get_origin(kind) is Mapping else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false"}
        expected = names.get(kind, getattr(kind, "__name__", str(kind)))
        quote = kind is str and value is not None
        fix = f"quote it: {where}='\"{value}\"'" if quote else f"write {where}=<{expected}>"
        raise ConfigError(f"got {where}={value!r} → expected {expected} → {fix}")
    return value


def _as_float(where: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"got {where}={value} → expected a number of at most 1e308 → choose a smaller one") from None


def _local_file(where: str, value: str | Path) -> Path:
    path = store_path(value).expanduser().absolute()
    if isinstance(path, RemotePath):
        raise ConfigError(
            f"got {where}={path} → expected a file of this machine → download it, and name the copy: {where}=<path>"
        )
    return path


def _coerce_union(where: str, value: Any, kinds: Sequence[Any]) -> Any:
    if value is None and type(None) in kinds:
        return None
    if where == "target" and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if RemotePath in kinds and isinstance(value, str | Path | RemotePath):
        return store_path(value).expanduser().absolute()
    *others, last = [kind for kind in kinds if kind not in (type(None), RemotePath)]
    for kind in others:
        try:
            return coerce(where, value, kind)
        except ConfigError:
            continue
    return coerce(where, value, last)


def _coerce_tuple(where: str, value: Any, kinds: Sequence[Any]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"got {where}={value!r} → expected a list → write {where}=[{value}]")
    if Ellipsis not in kinds and len(value) != len(kinds):
        example = ",".join(["0.9"] * len(kinds))
        raise ConfigError(f"got {where}={list(value)} → expected {len(kinds)} values → write {where}=[{example}]")
    return tuple(coerce(where, item, kinds[0]) for item in value)


def _coerce_seeds(where: str, value: Any) -> tuple[int, ...]:
    if type(value) is int and value >= 1:
        return tuple(range(value))
    listed_seeds = list(value) if isinstance(value, list | tuple) else []
    valid = all(type(seed) is int and seed >= 0 for seed in listed_seeds)
    if listed_seeds and valid and len(set(listed_seeds)) == len(listed_seeds):
        return tuple(listed_seeds)
    raise ConfigError(
        f"got {where}={value!r} → expected how many seeds, or a list of different seeds from 0 up → {where}=3 or "
        f"{where}=[0,1,2]"
    )


def check_range(where: str, value: Any, item: Field[Any]) -> None:
    """Refuse a number, or one of several, outside the range of its field.

    Raises:
        ConfigError: the range is named.
    """
    if value is None or "low" not in item.metadata:
        return
    if isinstance(value, tuple):
        for each in value:
            check_range(where, each, item)
        return
    low, high = item.metadata["low"], item.metadata["high"]
    too_low = not value >= low or (item.metadata["above"] and value == low)
    too_high = not value <= high or value == math.inf or (item.metadata["below"] and value == high)
    if too_low or too_high:
        lower = f"above {low:g}" if item.metadata["above"] else f"at least {low:g}"
        upper = f" and {'below' if item.metadata['below'] else 'at most'} {high:g}" if high < math.inf else ""
        default = "" if item.default in (MISSING, None) else f", such as {where}={item.default}"
        raise ConfigError(f"got {where}={value} → expected {lower}{upper} → set it within that range{default}")
