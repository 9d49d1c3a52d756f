"""Files, recipes, overrides and values become one checked configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

from mil.config.checks import check_range, coerce, known_option, require_key, require_known
from mil.config.options import GROUPS, RECIPES, group_options, option_keys
from mil.config.overrides import parse_overrides, plain_value, take_overrides
from mil.config.sections import AugmentConfig, HeadConfig, LossConfig, OptimizerConfig, SchedulerConfig
from mil.config.train import TrainConfig
from mil.errors import ConfigError

_RECIPE = "recipe"
_PRIMARY = "train"
_MAX_BYTES = 1 << 20
_MAX_NODES = 20_000


def compose_config(
    overrides: Sequence[str] = (),
    file: str | Path | Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Compose a configuration; later sources win: defaults, ``file``, ``overrides``, ``values``.

    Any of them may name a ``recipe``, a set of values of `RECIPES` that stands beneath the source's own. A
    configuration does not keep its name, only the values.

    Args:
        overrides: Hydra overrides, ``group=option`` or ``a.b=value``.
        file: a ``config.yaml`` of an earlier run, or any part of one; or what stands in it.
        values: plain values by name, for flags and Python keywords: ``{"head": "mean"}`` chooses an option,
            ``{"optimizer": {"lr": 1e-3}}`` sets one. Strings are taken as they are, without Hydra's quoting.

    Raises:
        ConfigError: an unknown key or option (near matches are named), a wrong type or a value out of range.

    Example:
        >>> compose_config(["head=mean", "optimizer.lr=0.001"]).head.name
        'mean'
    """
    values = dict(values or {})
    chosen = [f"{group}={_pop_option(values, group)}" for group in GROUPS if _names_option(values, group)]
    given = dict(file if isinstance(file, Mapping) else read_config_file(Path(file)) if file is not None else {})
    named, others = take_overrides(overrides, [_RECIPE])
    given = _over(_recipe(given), given)
    for source in (named, values):
        given = _over(given, _recipe(source))
    check_given(given, [*others, *chosen])
    defaults = _defaults(given)
    tree = _compose(defaults, [*others, *chosen])
    return _from_tree(_merge(tree, values))


def _names_option(values: Mapping[str, Any], group: str) -> bool:
    value = values.get(group)
    return isinstance(value, str) or (isinstance(value, Mapping) and "name" in value)


def _pop_option(values: dict[str, Any], group: str) -> str:
    """The option that ``values`` names for a group; what else it says of the group stays."""
    value = values.pop(group)
    if isinstance(value, Mapping):
        values[group] = {key: inner for key, inner in value.items() if key != "name"}
        value = value["name"]
    return known_option(group, str(value))


def _recipe(source: dict[str, Any]) -> Mapping[str, Any]:
    """The values of the recipe that ``source`` names, which is taken out of it."""
    if _RECIPE not in source:
        return {}
    name = str(source.pop(_RECIPE))
    require_known(name, list(RECIPES), f"{_RECIPE}=")
    return RECIPES[name].values


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``upper`` over ``lower``; a group of the same option is merged key by key, one of another replaces it."""
    tree = {**lower, **upper}
    for group in set(GROUPS) & set(lower) & set(upper):
        below, above = _section(lower[group]), _section(upper[group])
        same = above.get("name", below.get("name")) == below.get("name")
        tree[group] = {**below, **above} if same else above
    return tree


def _section(value: object) -> dict[str, Any]:
    """What a file says of a group, as a mapping."""
    return {str(key): inner for key, inner in value.items()} if isinstance(value, Mapping) else {"name": value}


@dataclass(frozen=True)
class _Defaults:
    """What overrides act on: the top-level values, each group's options, and the option chosen without an override."""

    top: dict[str, Any]
    options: dict[str, dict[str, dict[str, Any]]]
    chosen: dict[str, str]


def _defaults(given: Mapping[str, Any]) -> _Defaults:
    """The defaults with the values of a config file over them; the file's groups replace the option they name."""
    top = {key: value for key, value in TrainConfig().to_dict().items() if key not in GROUPS}
    top.update({key: value for key, value in given.items() if key not in GROUPS})
    options, chosen = {}, _default_options()
    for group in GROUPS:
        options[group] = {name: dict(keywords) for name, keywords in group_options(group).items()}
        section = _section(given.get(group, {}))
        chosen[group] = str(section.pop("name", chosen[group]))
        options[group][chosen[group]].update(section)
    return _Defaults(top, options, chosen)


def read_config_file(path: Path) -> dict[str, Any]:
    """The tree that a config file holds.

    Raises:
        ConfigError: it cannot be read, is no mapping, or names code.
    """
    import yaml  # type: ignore[import-untyped]
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"got {path} as config → it is larger than {_MAX_BYTES} bytes → give a config.yaml")
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_size(root, path)
        is_mapping = isinstance(root, yaml.MappingNode)
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if is_mapping else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        what = "brackets within brackets without end" if isinstance(error, RecursionError) else error
        raise ConfigError(
            f"got {path} as config → it cannot be read ({what}) → give the config.yaml of a run, or one like it"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"got {path} as config → expected key: value lines → give the config.yaml of a run")
    _refuse_target(tree, path)
    return {str(key): value for key, value in tree.items()}


def _check_size(root: Any, path: Path) -> None:
    """Refuse a YAML document that grows without measure when its aliases are followed.

    Args:
        root: node of the document as it was parsed, aliases being shared nodes; None of an empty one.
        path: for the message.

    Raises:
        ConfigError: it does, or an alias lies within what it stands for.
    """
    sizes: dict[int, int | None] = {}

    def size(node: Any) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise ConfigError(f"got {path} as config → an alias in it contains itself → write its values out")
            return known
        sizes[id(node)] = None
        pairs = node.value if isinstance(node.value, list) else []
        children = [child for pair in pairs for child in (pair if isinstance(pair, tuple) else (pair,))]
        sizes[id(node)] = total = 1 + sum(size(child) for child in children)
        if total > _MAX_NODES:
            raise ConfigError(
                f"got {path} as config → its aliases stand for more than {_MAX_NODES} values → write its values out"
            )
        return total

    if root is not None:
        size(root)


def _refuse_target(tree: object, path: Path) -> None:
    children = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    if isinstance(tree, Mapping) and "_target_" in tree:
        raise ConfigError(
            f"got _target_: {tree['_target_']} in {path} → a config holds values, never code → remove that line"
        )
    for child in children:
        _refuse_target(child, path)


def _merge(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with plain ``values`` set in it; the keys must exist."""
    for key, value in values.items():
        require_known(key, list(tree), "", what="key")
        if key not in GROUPS:
            tree[key] = value
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"got {key}={value!r} → expected a name or a mapping → {key}={tree[key]['name']!r}")
        for inner, inner_value in value.items():
            require_key(key, tree[key]["name"], inner)
            tree[key][inner] = inner_value
    return tree


def _from_tree(tree: Mapping[str, Any]) -> TrainConfig:
    groups = {group: dict(tree[group]) for group in GROUPS}
    head = HeadConfig(groups["head"].pop("name"), groups["head"])
    top = {key: value for key, value in tree.items() if key not in GROUPS}
    return TrainConfig(
        **top,
        head=head,
        optimizer=OptimizerConfig(**groups["optimizer"]),
        scheduler=SchedulerConfig(**groups["scheduler"]),
        loss=LossConfig(**groups["loss"]),
        augment=AugmentConfig(**groups["augment"]),
    )


def _compose(defaults: _Defaults, overrides: Sequence[str]) -> dict[str, Any]:
    """Apply ``overrides``, of which `check_given` has refused what is wrong by itself.

    Hydra reads them; it composes nothing, since it does so through the state of the whole process, which a user's own
    application and other threads share.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parsed = parse_overrides(overrides)
    chosen = defaults.chosen | {item.key_or_group: str(item.value()) for item in parsed if item.key_or_group in GROUPS}
    groups = {group: {"name": chosen[group], **defaults.options[group][chosen[group]]} for group in GROUPS}
    merging = ""
    try:
        tree = OmegaConf.create({**defaults.top, **groups})
        OmegaConf.set_struct(tree, True)
        for item in parsed:
            merging = f"Error merging override {item.input_line}"
            if item.key_or_group not in GROUPS:
                OmegaConf.update(tree, item.key_or_group, item.value(), merge=True)
        plain = OmegaConf.to_container(tree, resolve=False)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"got {' '.join(overrides)} → Hydra says: {merging or error} → write group=option or a.b=value, and quote "
            f"text with special characters: target='\"my column\"'"
        ) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


_SECTIONS: dict[str, Any] = {
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "loss": LossConfig,
    "augment": AugmentConfig,
}


def check_given(given: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse, before torch is loaded, unknown keys and options, and values that are wrong each for itself.

    The values of heads are left to their own types, which torch's classes have.

    Args:
        given: what a config file says.
        overrides: Hydra overrides.

    Raises:
        ConfigError: near matches are named.
    """
    parsed = [_plain_override(item) for item in parse_overrides(overrides)]
    chosen = _default_options()
    values: dict[str, Any] = {}
    for key, value in given.items():
        inside = _section(value) if key in GROUPS else {}
        values |= {f"{key}.{name}": each for name, each in inside.items()} if key in GROUPS else {key: value}
    for group in GROUPS:
        chosen[group] = known_option(group, str(values.pop(f"{group}.name", chosen[group])))
    _check_values(values, chosen)
    chosen |= {key: known_option(key, str(value)) for key, value in parsed if key in GROUPS}
    _check_values({key: value for key, value in parsed if key not in GROUPS}, chosen)


def _default_options() -> dict[str, str]:
    """The option of every group that is taken where none is named."""
    return {"head": HeadConfig.name, **{group: section.name for group, section in _SECTIONS.items()}, "loss": "auto"}


def _plain_override(item: Any) -> tuple[str, Any]:
    """Key and value of an override as Hydra has parsed it.

    Raises:
        ConfigError: it has several values, or adds or deletes a key.
    """
    if item.is_sweep_override() or item.is_add() or item.is_delete() or item.package is not None:
        raise ConfigError(
            f"got {item.input_line} → expected one value for one key that exists → write key=value, without +, ++, ~, "
            f"@ or several values, and quote text with commas: target='\"a,b\"'; mil sweep tries several values, mil "
            f"benchmark compares heads=[...]"
        )
    return str(item.key_or_group), plain_value(item.value())


def _check_values(values: Mapping[str, Any], chosen: Mapping[str, str]) -> None:
    """Refuse unknown dotted keys, and values of a wrong type or out of range, given the options of the groups."""
    top = {item.name: item for item in fields(TrainConfig)}
    for key, value in values.items():
        group, _, name = key.partition(".")
        if name and group in GROUPS:
            require_key(group, chosen[group], name)
        elif key not in top:
            nested = [f"{each}.{inner}" for each in GROUPS for inner in option_keys(each)[chosen[each]]]
            require_known(key, [*top, _RECIPE, *nested], "", what="key")
        item = top.get(key) or _section_field(group, name)
        # a group's key that is null takes its default
        if item is not None and (value is not None or not name):
            check_range(key, coerce(key, value, item.type), item)


def _section_field(group: str, name: str) -> Field[Any] | None:
    """The field of a key of a group; None for those of heads."""
    return next((item for item in fields(_SECTIONS[group]) if item.name == name), None) if group in _SECTIONS else None
