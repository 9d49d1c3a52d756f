"""The training configuration: typed, checked, composed by Hydra, and saved so that it runs again.

Hydra is used for one thing: turning ``group=option`` and ``a.b=value`` into a tree. Nothing is instantiated from a
config, and a ``_target_`` in a file is refused, so a config file can never name code to run.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from extract.store.remote_path import store_path
from mil.errors import ConfigError, did_you_mean

GROUPS = ("head", "optimizer", "scheduler")
_PRIMARY = "train"
_OPTIMIZERS: dict[str, dict[str, object]] = {
    "adamw": {"lr": 5e-4, "weight_decay": 1e-2},
    "sgd": {"lr": 1e-2, "weight_decay": 1e-4},
}
_SCHEDULERS: dict[str, dict[str, object]] = {
    "cosine": {"warmup_fraction": 0.1},
    "constant": {"warmup_fraction": 0.0},
}


def _number(default: Any, low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Any:
    """A dataclass field within [low, high]; ``above`` and ``below`` leave the ends out."""
    return field(default=default, metadata={"low": low, "high": high, "above": above, "below": below})


class _Checked:
    """Coerces and checks every field of a frozen dataclass on construction, however it is made."""

    _where = ""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            value = _coerce(f"{self._where}{item.name}", getattr(self, item.name), item.type)
            _check_range(f"{self._where}{item.name}", value, item)
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True)
class HeadConfig(_Checked):
    """Which head, and its constructor keywords; those left out are filled in with the head's own defaults."""

    _where = "head."

    name: str = "abmil"
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _option("head", self.name)
        for key in self.keywords:
            _require(key, list(_options("head")[self.name]), "head.", what="key")
        kinds = _keyword_types(self.name)
        filled = {key: self.keywords.get(key, default) for key, default in _options("head")[self.name].items()}
        object.__setattr__(
            self, "keywords", {key: _coerce(f"head.{key}", value, kinds[key]) for key, value in filled.items()}
        )


@dataclass(frozen=True)
class OptimizerConfig(_Checked):
    """AdamW, or SGD with Nesterov momentum 0.9. Norms and biases are never decayed."""

    _where = "optimizer."

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = _number(5e-4, 0.0, above=True)
    weight_decay: float = _number(1e-2, 0.0)


@dataclass(frozen=True)
class SchedulerConfig(_Checked):
    """Learning rate over the steps of all epochs: linear warm-up, then cosine to zero or constant."""

    _where = "scheduler."

    name: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = _number(0.1, 0.0, 1.0, below=True)


@dataclass(frozen=True)
class TrainConfig(_Checked):
    """Everything that decides the result of a training run.

    Early stopping watches the class-weighted cross-entropy of the validation part, and nothing else.

    Attributes:
        store: the embedding store; kept absolute, so that the saved config runs from anywhere.
        labels: the label table (None when the cohort came from Python).
        target: its column to predict.
        backbone: the store's features entry; None if the store has one only.
        slide_column: column of the slide ids, when it is not called ``slide_id``.
        patient_column: column of the patient ids, when it is not called ``patient_id``.
        folds: number of patient-grouped folds.
        seeds: seeds to train each fold with; an integer n stands for 0 to n-1.
        split_seed: seed of the folds.
        validation_fraction: part of the non-test patients that early stopping may see.
        epochs: most epochs.
        patience: epochs without a better validation loss before stopping.
        batch_bags: bags read per step. Packs are drawn over the whole cohort, the order belonging to the seed, and a
            replica learns from those of its own training part; so a step sees about 64 % of them with 5 folds.
        instance_budget: most instances drawn per bag and training step, afresh each epoch; None takes all.
        class_weights: ``balanced`` weighs a class by the inverse of its frequency in the training part.
        standardize: ``train`` fits mean and standard deviation of the features on the training instances.
        grad_clip: largest gradient norm; None does not clip.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``, which takes CUDA when there is one.
        memory: ``ram`` copies the bags into memory, ``mmap`` reads them from the store at each step, ``auto`` decides.
        head: the head.
        optimizer: the optimizer.
        scheduler: the learning rate schedule.
    """

    store: Path | None = None
    labels: Path | None = None
    target: str | None = None
    backbone: str | None = None
    slide_column: str | None = None
    patient_column: str | None = None
    folds: int = _number(5, 2)
    seeds: tuple[int, ...] = (0, 1, 2)
    split_seed: int = _number(0, 0)
    validation_fraction: float = _number(0.2, 0.0, 1.0, above=True, below=True)
    epochs: int = _number(40, 1)
    patience: int = _number(10, 1)
    batch_bags: int = _number(8, 1)
    instance_budget: int | None = _number(4096, 1)
    class_weights: Literal["balanced", "none"] = "balanced"
    standardize: Literal["train", "none"] = "train"
    grad_clip: float | None = _number(1.0, 0.0, above=True)
    device: str = "auto"
    memory: Literal["auto", "mmap", "ram"] = "auto"
    head: HeadConfig = field(default_factory=HeadConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"got device={self.device} → expected auto, cpu, cuda or cuda:N → use device=auto")
        object.__setattr__(self, "head", _with_input_norm(self.head, self.standardize))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, in the shape that the config file has."""
        plain = {item.name: _plain(getattr(self, item.name)) for item in fields(self)}
        keywords = dict(self.head.keywords)
        if self.standardize == "train":
            # implied; written out, it would contradict a later standardize=none
            keywords.pop("input_norm")
        plain["head"] = {"name": self.head.name, **keywords}
        return plain

    def to_yaml(self) -> str:
        """The text of ``config.yaml``; ``compose_config([], file)`` gives an equal configuration."""
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))


def compose_config(
    overrides: Sequence[str] = (),
    file: str | Path | Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Compose a configuration; later sources win: defaults, ``file``, ``overrides``, ``values``.

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
    given = file if isinstance(file, Mapping) else read_config_file(Path(file)) if file is not None else {}
    defaults = _defaults(given)
    tree = _compose(defaults, [*overrides, *chosen])
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
    return _option(group, str(value))


def _option(group: str, option: str) -> str:
    _require(option, list(_options(group)), f"{group}=")
    return option


# ---------------------------------------------------------------------------------------------------------- the tree


def _options(group: str) -> dict[str, dict[str, object]]:
    """The options of a group with their default values."""
    if group == "optimizer":
        return _OPTIMIZERS
    if group == "scheduler":
        return _SCHEDULERS
    from aggregators import list_aggregators
    from aggregators.registry import keyword_names

    return {name: dict(keyword_names(name)) for name in list_aggregators()}


def _keyword_types(head: str) -> dict[str, Any]:
    """The annotated types of a head's keywords."""
    from aggregators.registry import aggregator_record

    return get_type_hints(aggregator_record(head).builder.__init__)


@dataclass(frozen=True)
class _Defaults:
    """What overrides act on: the top-level values, each group's options, and the option chosen without an override."""

    top: dict[str, Any]
    options: dict[str, dict[str, dict[str, Any]]]
    chosen: dict[str, str]

    def keys(self, chosen: Mapping[str, str]) -> list[str]:
        """Every key that may be set, dotted, given the chosen options."""
        groups = [f"{group}.{key}" for group in GROUPS for key in self.options[group][chosen[group]]]
        return [*self.top, *GROUPS, *groups]


def _defaults(given: Mapping[str, Any]) -> _Defaults:
    """The defaults with the values of a config file over them; the file's groups replace the option they name."""
    plain = TrainConfig().to_dict()
    top = {key: value for key, value in plain.items() if key not in GROUPS}
    for key in given:
        _require(key, [*top, *GROUPS], "", what="key")
    top.update({key: value for key, value in given.items() if key not in GROUPS})
    options, chosen = {}, {}
    for group in GROUPS:
        options[group] = {name: dict(keywords) for name, keywords in _options(group).items()}
        section = given.get(group, plain[group]["name"])
        section = dict(section) if isinstance(section, Mapping) else {"name": section}
        chosen[group] = _option(group, str(section.pop("name", plain[group]["name"])))
        for key, value in section.items():
            _require(key, list(options[group][chosen[group]]), f"{group}.", what="key")
            options[group][chosen[group]][key] = value
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
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"got {path} as config → it cannot be read ({error}) → give the config.yaml of a run, or one like it"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"got {path} as config → expected key: value lines → give the config.yaml of a run")
    _refuse_target(tree, path)
    return {str(key): value for key, value in tree.items()}


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
        _require(key, list(tree), "", what="key")
        if key not in GROUPS:
            tree[key] = value
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"got {key}={value!r} → expected a name or a mapping → {key}={tree[key]['name']!r}")
        for inner, inner_value in value.items():
            _require(inner, [name for name in tree[key] if name != "name"], f"{key}.", what="key")
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
    )


# --------------------------------------------------------------------------------------------------------------- Hydra


def _compose(defaults: _Defaults, overrides: Sequence[str]) -> dict[str, Any]:
    """Let Hydra apply ``overrides``; what it would refuse with its own words is refused in ours before."""
    import hydra.errors
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_overrides(defaults, overrides)
    try:
        with _hydra_app(defaults):
            composed = hydra.compose(_PRIMARY, overrides=list(overrides))
        tree = OmegaConf.to_container(composed, resolve=False)
    except (hydra.errors.HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            f"got {' '.join(overrides)} → Hydra says: {error} → write group=option or a.b=value, and quote text with "
            f"special characters: target='\"my column\"'"
        ) from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def take_overrides(overrides: Sequence[str], names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the overrides of some plain names out of a list: their values, and the others.

    Example:
        >>> take_overrides(["heads=[mean,{name: abmil, gated: true}]", "folds=3"], ["heads"])
        ({'heads': ['mean', {'name': 'abmil', 'gated': True}]}, ['folds=3'])
    """
    taken = [text for text in overrides if text.partition("=")[0].strip() in names]
    values = {item.key_or_group: _plain_value(item.value()) for item in _parse(taken)}
    return values, [text for text in overrides if text not in taken]


def _plain_value(value: Any) -> Any:
    """Hydra's own kinds of text as plain text, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): _plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain_value(inner) for inner in value]
    return value if isinstance(value, bool | int | float) or value is None else str(value)


def _parse(overrides: Sequence[str]) -> Any:
    """Overrides as Hydra reads them."""
    import hydra.errors
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except hydra.errors.HydraException as error:
        raise ConfigError(
            f"got {' '.join(overrides)} → expected group=option or a.b=value → write it so, and quote "
            f"text with special characters: target='\"my column\"'"
        ) from error


def _check_overrides(defaults: _Defaults, overrides: Sequence[str]) -> None:
    """Refuse unknown keys and options, sweeps, and Hydra's adding and deleting of keys."""
    parsed = _parse(overrides)
    chosen = dict(defaults.chosen)
    for item in parsed:
        if item.is_sweep_override() or item.is_add() or item.is_delete() or item.package is not None:
            raise ConfigError(
                f"got {item.input_line} → expected one value for one key that exists → write key=value, without "
                f"+, ++, ~, @ or several values"
            )
        if item.key_or_group in GROUPS:
            chosen[item.key_or_group] = _option(item.key_or_group, str(item.value()))
    keys = defaults.keys(chosen)
    for item in parsed:
        _require(item.key_or_group, keys, "", what="key")


@contextmanager
def _hydra_app(defaults: _Defaults) -> Iterator[None]:
    """Register our tree with Hydra for one composition, and leave Hydra's process-wide state as it was."""
    from hydra import initialize, version
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    active, base, store = GlobalHydra.instance().hydra, version.getbase(), ConfigStore.instance()
    ours = (*GROUPS, f"{_PRIMARY}.yaml")
    kept = {name: store.repo.pop(name) for name in ours if name in store.repo}
    GlobalHydra.instance().clear()
    try:
        for group in GROUPS:
            for name, keywords in defaults.options[group].items():
                store.store(group=group, name=name, node={"name": name, **keywords})
        choice = [{group: defaults.chosen[group]} for group in GROUPS]
        store.store(name=_PRIMARY, node={"defaults": ["_self_", *choice], **defaults.top})
        with initialize(config_path=None, version_base="1.3"):
            yield
    finally:
        for name in ours:
            store.repo.pop(name, None)
        store.repo.update(kept)
        GlobalHydra.instance().hydra = active
        if active is not None:
            version.VersionBase.instance().setbase(base)


# -------------------------------------------------------------------------------------------------------------- checks


def _require(name: str, valid: Sequence[str], prefix: str, what: str = "option") -> None:
    """Raise, naming near matches, unless ``name`` is one of ``valid``."""
    if name in valid:
        return
    nested = [key for key in valid if key.rpartition(".")[2] == name]
    hint = f"did you mean {' or '.join(nested)}?" if nested else did_you_mean(name, valid) or "choose one of these"
    raise ConfigError(
        f"got the unknown {what} {prefix}{name} → expected one of {', '.join(prefix + item for item in valid)} → "
        f"{hint.rstrip()}"
    )


def _coerce(where: str, value: Any, kind: Any) -> Any:
    """``value`` as the annotated type ``kind``, where that loses nothing."""
    if get_origin(kind) in (Union, UnionType):
        return _coerce_union(where, value, get_args(kind))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            _require(str(value), get_args(kind), f"{where}=")
        return value
    if get_origin(kind) is tuple:
        return _coerce_seeds(where, value) if where == "seeds" else _coerce_tuple(where, value, get_args(kind)[0])
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str | Path):
        return store_path(value).expanduser().absolute()
    wanted = Mapping if get_origin(kind) is Mapping else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false"}
        expected = names.get(kind, getattr(kind, "__name__", str(kind)))
        quote = kind is str and value is not None
        fix = f"quote it: {where}='\"{value}\"'" if quote else f"write {where}=<{expected}>"
        raise ConfigError(f"got {where}={value!r} → expected {expected} → {fix}")
    return value


def _coerce_union(where: str, value: Any, kinds: Sequence[Any]) -> Any:
    if value is None and type(None) in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not type(None)]
    for kind in others:
        try:
            return _coerce(where, value, kind)
        except ConfigError:
            continue
    return _coerce(where, value, last)


def _coerce_tuple(where: str, value: Any, kind: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"got {where}={value!r} → expected a list → write {where}=[{value}]")
    return tuple(_coerce(where, item, kind) for item in value)


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


def _check_range(where: str, value: Any, item: Field[Any]) -> None:
    if value is None or "low" not in item.metadata:
        return
    low, high = item.metadata["low"], item.metadata["high"]
    too_low = not value >= low or (item.metadata["above"] and value == low)
    too_high = not value <= high or value == math.inf or (item.metadata["below"] and value == high)
    if too_low or too_high:
        lower = f"above {low:g}" if item.metadata["above"] else f"at least {low:g}"
        upper = f" and {'below' if item.metadata['below'] else 'at most'} {high:g}" if high < math.inf else ""
        default = "" if item.default is MISSING else f", such as {where}={item.default}"
        raise ConfigError(f"got {where}={value} → expected {lower}{upper} → set it within that range{default}")


def _with_input_norm(head: HeadConfig, standardize: str) -> HeadConfig:
    """Make ``standardize`` and the head's keyword ``input_norm`` say the same; they may not disagree."""
    given = head.keywords["input_norm"]
    if standardize == "train" and given in ("none", "standardize"):
        return HeadConfig(head.name, {**head.keywords, "input_norm": "standardize"})
    if standardize == "train":
        raise ConfigError(
            f"got head.input_norm={given} with standardize=train → expected one input normalisation → "
            f"add standardize=none"
        )
    if given == "standardize":
        raise ConfigError(
            "got head.input_norm=standardize with standardize=none → nothing would fit its mean and deviation → "
            "set standardize=train, or head.input_norm=none"
        )
    return head


def _plain(value: Any) -> Any:
    if isinstance(value, _Checked):
        return {item.name: getattr(value, item.name) for item in fields(value)}  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
