"""Overrides as they are typed: ``group=option``, ``a.b=value``."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mil.errors import ConfigError


def take_overrides(overrides: Sequence[str], names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the overrides of some plain names out of a list: their values, and the others.

    Example:
        >>> take_overrides(["heads=[mean,{name: abmil, gated: true}]", "folds=3"], ["heads"])
        ({'heads': ['mean', {'name': 'abmil', 'gated': True}]}, ['folds=3'])
    """
    taken = [text for text in overrides if text.partition("=")[0].strip() in names]
    parsed = parse_overrides(taken)
    for item in parsed:
        if item.is_sweep_override():
            text = str(item.input_line)
            name, _, listing = text.partition("=")
            raise ConfigError(f"got {text} → expected one value or a list in brackets → write {name}=[{listing}]")
    values = {item.key_or_group: plain_value(item.value()) for item in parsed}
    return values, [text for text in overrides if text not in taken]


def plain_value(value: Any) -> Any:
    """Hydra's own kinds of text as plain text, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain_value(inner) for inner in value]
    return value if isinstance(value, bool | int | float) or value is None else str(value)


def parse_overrides(overrides: Sequence[str]) -> Any:
    """Overrides as Hydra reads them.

    Raises:
        ConfigError: they are not written as overrides.
    """
    import hydra.errors
    from hydra.core.override_parser.overrides_parser import OverridesParser

    # how a part of `track` would be named; it is no group
    written = [re.sub(r"^track\.files\b", "track_files", text) for text in overrides]
    try:
        return OverridesParser.create().parse_overrides(written)
    except hydra.errors.HydraException as error:
        raise ConfigError(
            f"got {' '.join(overrides)} → expected group=option or a.b=value → write it so, and quote "
            f"text with special characters: target='\"my column\"'"
        ) from error
