"""The training configuration: typed, checked, composed by Hydra, and saved so that it runs again.

Hydra is used for one thing: turning ``group=option`` and ``a.b=value`` into a tree. Nothing is instantiated from a
config, and a ``_target_`` in a file is refused, so a config file can never name code to run.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from extract.store.core.remote_path import store_path
from mil.config.head_keywords import head_keywords
from mil.config.options import AUGMENTATIONS, LOSSES, OPTIMIZERS, RECIPES, SCHEDULERS, TASK_LOSSES, keys_of
from mil.errors import ConfigError, did_you_mean, nearest

COX_BAGS = 16
"""Fewest bags of a pack for Cox's loss: with 5 folds about ten of them are in the training part."""
GROUPS = ("head", "optimizer", "scheduler", "loss", "augment")
_RECIPE = "recipe"
_PRIMARY = "train"


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
        check_option("head", self.name, self.keywords)
        kinds = _keyword_types(self.name)
        filled = {key: self.keywords.get(key, default) for key, default in group_options("head")[self.name].items()}
        object.__setattr__(
            self, "keywords", {key: _coerce(f"head.{key}", value, kinds[key]) for key, value in filled.items()}
        )


class _Option(_Checked):
    """One option of a group: keys that are not given are the option's own, and those of other options stay None."""

    _group = ""

    def __post_init__(self) -> None:
        own = group_options(self._group)[_option(self._group, str(self.name))]  # type: ignore[attr-defined]
        for item in fields(self):  # type: ignore[arg-type]
            if item.name == "name":
                continue
            if getattr(self, item.name) is None:
                object.__setattr__(self, item.name, own.get(item.name))
            elif item.name not in own:
                _require_key(self._group, str(self.name), item.name)  # type: ignore[attr-defined]
        super().__post_init__()

    def keywords(self, *without: str) -> dict[str, Any]:
        """The keys of this option and their values, ``name`` and those of ``without`` left out."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return {key: value for key, value in values.items() if value is not None and key not in ("name", *without)}


@dataclass(frozen=True)
class OptimizerConfig(_Option):
    """An optimizer of `OPTIMIZERS`; what is None is its own default. Norms and biases are never decayed.

    Attributes:
        name: which.
        lr: learning rate at its peak.
        weight_decay: decay of weight matrices.
        momentum: of SGD (Nesterov) and Muon.
        betas: decay of the averages of the gradient and its square (Lion: of its two averages of the gradient).
        lookahead_steps: steps of the fast weights before the slow ones move.
        lookahead_fraction: how far the slow weights move.
    """

    _where = "optimizer."
    _group = "optimizer"

    name: str = "adamw"
    lr: float = _number(None, 0.0, above=True)
    weight_decay: float = _number(None, 0.0)
    momentum: float | None = _number(None, 0.0, 1.0, below=True)
    betas: tuple[float, float] | None = _number(None, 0.0, 1.0, below=True)
    lookahead_steps: int | None = _number(None, 1)
    lookahead_fraction: float | None = _number(None, 0.0, 1.0, above=True)


@dataclass(frozen=True)
class SchedulerConfig(_Option):
    """Learning rate over the steps of all epochs, see `learning_rate`; what is None is the option's default.

    Attributes:
        name: an option of `mil.config.options.SCHEDULERS`.
        warmup_fraction: part of all steps that warm up.
        start_divisor: one-cycle starts at the peak divided by this.
        end_divisor: and ends at its start divided by this.
        period_fraction: part of all steps after which `step` drops.
        factor: what a drop of `step` or `plateau` multiplies the rate with.
        patience: epochs without a better validation loss that `plateau` bears.
        threshold: how much better a loss must be for `plateau`, as a part of the best.
    """

    _where = "scheduler."
    _group = "scheduler"

    name: str = "cosine"
    warmup_fraction: float = _number(None, 0.0, 1.0, below=True)
    start_divisor: float | None = _number(None, 1.0)
    end_divisor: float | None = _number(None, 1.0)
    period_fraction: float | None = _number(None, 0.0, 1.0, above=True)
    factor: float | None = _number(None, 0.0, 1.0, above=True, below=True)
    patience: int | None = _number(None, 0)
    threshold: float | None = _number(None, 0.0, 1.0, below=True)


@dataclass(frozen=True)
class LossConfig(_Option):
    """The loss that trains the head, one of `mil.config.options.LOSSES`; ``auto`` is the first that the task has.

    Epochs are compared by the first loss of the task whatever is trained with (survival by its own).

    Attributes:
        name: for classes ``cross_entropy``, ``focal``, or ``ordinal`` where the sorted names are in their order; for
            labels ``bce``; for numbers ``mse`` or ``huber``; for survival ``discrete_survival`` or ``cox``.
        label_smoothing: part of every target that is spread evenly over all classes.
        gamma: how much the focal loss looks away from bags that are predicted well.
        delta: difference from which on the Huber loss grows linearly, in deviations of the target.
        intervals: into how many intervals the time of discrete survival is cut.
    """

    _where = "loss."
    _group = "loss"

    name: str = "cross_entropy"
    label_smoothing: float | None = _number(None, 0.0, 1.0, below=True)
    gamma: float | None = _number(None, 0.0)
    delta: float | None = _number(None, 0.0, above=True)
    intervals: int | None = _number(None, 2)

    @property
    def is_cross_entropy(self) -> bool:
        """Whether it is the loss that epochs are compared by."""
        return self.name == "cross_entropy" and not self.label_smoothing


@dataclass(frozen=True)
class AugmentConfig(_Option):
    """What to do to training bags, one of `mil.config.options.AUGMENTATIONS`; every option takes the same keys.

    Attributes:
        name: ``none``, ``gentle`` or ``strong``.
        noise: standard deviation of Gaussian noise on every feature, in that feature's own deviations.
        bag_mixup: alpha of the Beta distribution from which the share of another bag's instances in a bag is drawn.
        embedding_mixup: alpha for mixing the instances of two bags one by one.
        pseudo_bags: into how many bags each is cut at full strength; each keeps the label.
        policy: ``all`` applies all that is switched on to every step, ``random`` one of them, drawn per step, at a
            random part of its strength.
        schedule: ``constant``, or how the strength grows with the epochs: ``linear`` or ``cosine``.
        ramp: share of the epochs after which full strength is reached.
    """

    _where = "augment."
    _group = "augment"

    name: str = "none"
    noise: float = _number(None, 0.0)
    bag_mixup: float = _number(None, 0.0)
    embedding_mixup: float = _number(None, 0.0)
    pseudo_bags: int = _number(None, 1)
    policy: Literal["all", "random"] = field(default=None)  # type: ignore[arg-type]
    schedule: Literal["constant", "linear", "cosine"] = field(default=None)  # type: ignore[arg-type]
    ramp: float = _number(None, 0.0, 1.0, above=True)


@dataclass(frozen=True)
class TrainConfig(_Checked):
    """Everything that decides the result of a training run.

    Early stopping watches the first loss of the task on the validation part (for classes the class-weighted
    cross-entropy; survival its own), and nothing else.

    Attributes:
        store: the embedding store; kept absolute, so that the saved config runs from anywhere.
        labels: the label table (None when the cohort came from Python).
        target: its column to predict; several, separated by commas, for labels (``er,pr,her2``), numbers, and survival
            (time and event: ``months,died``).
        task: what the target is: ``classification``, ``multilabel``, ``regression`` or ``survival``.
        backbone: the store's features entry; None if the store has one only.
        slide_column: column of the slide ids, when it is not called ``slide_id``.
        patient_column: column of the patient ids, when it is not called ``patient_id``.
        split: how slides are split, always by patient: ``kfold``, ``site_preserved`` (every site in one fold only),
            ``leave_one_site_out`` (a fold per site) or ``fixed`` (as `split_column` or `split_file` say).
        folds: number of folds, of ``kfold`` and ``site_preserved``.
        repeats: how often every slide is tested, with other folds each time; of the same two.
        sites: the label column that names each slide's site, or ``tcga`` for the code in TCGA's barcodes.
        split_column: the label column with the words train, val and test.
        split_file: a splits.csv, a run folder, or CLAM's splits_k.csv (one, or a folder of them).
        seeds: seeds to train each fold with; an integer n stands for 0 to n-1.
        split_seed: seed of the folds.
        validation_fraction: part of the non-test patients that early stopping may see.
        epochs: most epochs.
        min_epochs: epochs before which it does not stop.
        patience: epochs without a better validation loss before stopping.
        batch_bags: bags read per step. Packs are drawn over the whole cohort, the order belonging to the seed, and a
            replica learns from those of its own training part; so a step sees about 64 % of them with 5 folds.
        accumulate: packs whose gradients are added up to that of one pack before a step (not for ``loss=cox``).
        sampler: ``natural`` sees every training bag once an epoch; ``class_balanced`` and ``patient_balanced`` draw as
            many training bags with replacement, every class or patient equally likely.
        instance_budget: most instances drawn per bag and training step, afresh each epoch; None takes all.
        instance_dropout: probability with which an instance is left out, afresh each epoch; one always stays.
        views: ``sample`` trains on the entry's augmented views too (``mil extract --views``), one drawn for every bag
            and epoch; validation and test see the slides as they are.
        class_weights: ``balanced`` weighs a class by the inverse of its frequency in the training part. In training it
            does so only where the sampler has not balanced the classes already. Labels weigh their positive slides by
            the negative ones; numbers and survival are not weighed.
        standardize: ``train`` fits mean and standard deviation of the features on the training instances.
        grad_clip: largest gradient norm; None does not clip.
        grad_clip_value: largest gradient of a single weight, applied before the norm; None does not clip.
        l1: penalty on the absolute values of weight matrices.
        ema: decay of an exponential average of the weights, which then is what is validated and kept; None takes the
            weights themselves.
        init: a checkpoint (.safetensors) whose parameters are taken over where name and shape are the same. One that
            was trained on slides of this cohort has seen test slides of some fold.
        freeze_epochs: epochs at the start in which what came from ``init`` stays as it is.
        freeze_lr_factor: what the learning rate of those parameters is multiplied with afterwards.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``, which takes CUDA when there is one.
        memory: ``ram`` copies the bags into memory, ``mmap`` reads them from the store at each step, ``auto`` decides.
        head: the head.
        optimizer: the optimizer.
        scheduler: the learning rate schedule.
        loss: what is minimised.
        augment: what is done to training bags.
        track: tools that are told of the run, see `mil.experiments.tracking`: some of ``wandb``, ``mlflow``,
            ``tensorboard``.
    """

    store: Path | None = None
    labels: Path | None = None
    target: str | None = None
    task: Literal["classification", "multilabel", "regression", "survival"] = "classification"
    backbone: str | None = None
    slide_column: str | None = None
    patient_column: str | None = None
    split: Literal["kfold", "site_preserved", "leave_one_site_out", "fixed"] = "kfold"
    folds: int = _number(5, 2)
    repeats: int = _number(1, 1)
    sites: str | None = None
    split_column: str | None = None
    split_file: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    split_seed: int = _number(0, 0)
    validation_fraction: float = _number(0.2, 0.0, 1.0, above=True, below=True)
    epochs: int = _number(40, 1)
    min_epochs: int = _number(1, 1)
    patience: int = _number(10, 1)
    batch_bags: int = _number(8, 1)
    accumulate: int = _number(1, 1)
    sampler: Literal["natural", "class_balanced", "patient_balanced"] = "natural"
    instance_budget: int | None = _number(4096, 1)
    instance_dropout: float = _number(0.0, 0.0, 1.0, below=True)
    views: Literal["none", "sample"] = "none"
    class_weights: Literal["balanced", "none"] = "balanced"
    standardize: Literal["train", "none"] = "train"
    grad_clip: float | None = _number(1.0, 0.0, above=True)
    grad_clip_value: float | None = _number(None, 0.0, above=True)
    l1: float = _number(0.0, 0.0)
    ema: float | None = _number(None, 0.0, 1.0, above=True, below=True)
    init: Path | None = None
    freeze_epochs: int = _number(0, 0)
    freeze_lr_factor: float = _number(0.1, 0.0, 1.0, above=True)
    device: str = "auto"
    memory: Literal["auto", "mmap", "ram"] = "auto"
    head: HeadConfig = field(default_factory=HeadConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    loss: LossConfig = field(default_factory=lambda: LossConfig("auto"))
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    track: tuple[Literal["wandb", "mlflow", "tensorboard"], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"got device={self.device} → expected auto, cpu, cuda or cuda:N → use device=auto")
        object.__setattr__(self, "head", _with_input_norm(self.head, self.standardize))
        object.__setattr__(self, "loss", _loss_of_task(self.loss, self.task))
        _check_together(self)

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
    return _option(group, str(value))


def _recipe(source: dict[str, Any]) -> Mapping[str, Any]:
    """The values of the recipe that ``source`` names, which is taken out of it."""
    if _RECIPE not in source:
        return {}
    name = str(source.pop(_RECIPE))
    _require(name, list(RECIPES), f"{_RECIPE}=")
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


def _option(group: str, option: str) -> str:
    _require(option, list(option_keys(group)), f"{group}=")
    return option


# ---------------------------------------------------------------------------------------------------------- the tree

_RECORDS = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULERS, "loss": LOSSES, "augment": AUGMENTATIONS}


def group_options(group: str) -> dict[str, dict[str, object]]:
    """The options of a group with their keys and defaults, such as those of ``optimizer``."""
    if group in _RECORDS:
        return keys_of(_RECORDS[group])
    from aggregators import list_aggregators
    from aggregators.registry import keyword_names

    return {name: dict(keyword_names(name)) for name in list_aggregators()}


def option_keys(group: str) -> dict[str, tuple[str, ...]]:
    """The options of a group with their keys; it does not load torch, as the defaults of heads in `group_options`."""
    if group == "head":
        return head_keywords()
    return {name: tuple(keys) for name, keys in group_options(group).items()}


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
            _require_key(key, tree[key]["name"], inner)
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


# --------------------------------------------------------------------------------------------------------------- Hydra


def _compose(defaults: _Defaults, overrides: Sequence[str]) -> dict[str, Any]:
    """Let Hydra apply ``overrides``, of which `check_given` has refused what it would refuse with its own words."""
    import hydra.errors
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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
    parsed = parse_overrides(taken)
    for item in parsed:
        if item.is_sweep_override():
            text = str(item.input_line)
            name, _, listing = text.partition("=")
            raise ConfigError(f"got {text} → expected one value or a list in brackets → write {name}=[{listing}]")
    values = {item.key_or_group: _plain_value(item.value()) for item in parsed}
    return values, [text for text in overrides if text not in taken]


def _plain_value(value: Any) -> Any:
    """Hydra's own kinds of text as plain text, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): _plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain_value(inner) for inner in value]
    return value if isinstance(value, bool | int | float) or value is None else str(value)


def parse_overrides(overrides: Sequence[str]) -> Any:
    """Overrides as Hydra reads them.

    Raises:
        ConfigError: they are not written as overrides.
    """
    import hydra.errors
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except hydra.errors.HydraException as error:
        raise ConfigError(
            f"got {' '.join(overrides)} → expected group=option or a.b=value → write it so, and quote "
            f"text with special characters: target='\"my column\"'"
        ) from error


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


_MOST_NAMES = 8
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
        chosen[group] = _option(group, str(values.pop(f"{group}.name", chosen[group])))
    _check_values(values, chosen)
    chosen |= {key: _option(key, str(value)) for key, value in parsed if key in GROUPS}
    _check_values({key: value for key, value in parsed if key not in GROUPS}, chosen)


def check_option(group: str, option: str, keys: Iterable[str] = ()) -> None:
    """Refuse an unknown option of a group, or keys that it does not take.

    Raises:
        ConfigError: near matches are named.
    """
    _option(group, option)
    for key in keys:
        _require_key(group, option, key)


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
    return str(item.key_or_group), _plain_value(item.value())


def _check_values(values: Mapping[str, Any], chosen: Mapping[str, str]) -> None:
    """Refuse unknown dotted keys, and values of a wrong type or out of range, given the options of the groups."""
    top = {item.name: item for item in fields(TrainConfig)}
    for key, value in values.items():
        group, _, name = key.partition(".")
        if name and group in GROUPS:
            _require_key(group, chosen[group], name)
        elif key not in top:
            nested = [f"{each}.{inner}" for each in GROUPS for inner in option_keys(each)[chosen[each]]]
            _require(key, [*top, _RECIPE, *nested], "", what="key")
        item = top.get(key) or _section_field(group, name)
        # a group's key that is null takes its default
        if item is not None and (value is not None or not name):
            _check_range(key, _coerce(key, value, item.type), item)


def _section_field(group: str, name: str) -> Field[Any] | None:
    """The field of a key of a group; None for those of heads."""
    return next((item for item in fields(_SECTIONS[group]) if item.name == name), None) if group in _SECTIONS else None


def _require_key(group: str, option: str, key: str) -> None:
    """Raise unless ``key`` is one of the option's; where it is another option's, say whose."""
    keys = option_keys(group)
    others = [name for name in nearest(option, list(keys)) if key in keys[name]]
    if key in keys[option] or not others:
        _require(key, keys[option], f"{group}.", what="key")
        return
    own = ", ".join(f"{group}.{name}" for name in keys[option])
    more = f" and {len(others) - _MOST_NAMES} more" if len(others) > _MOST_NAMES else ""
    raise ConfigError(
        f"got the unknown key {group}.{key} for {group}={option} → a key of {', '.join(others[:_MOST_NAMES])}{more} → "
        f"take {group}={others[0]}, or a key of {option}: {own}"
    )


def _require(name: str, valid: Sequence[str], prefix: str, what: str = "option") -> None:
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


def _coerce(where: str, value: Any, kind: Any) -> Any:
    """``value`` as the annotated type ``kind``, where that loses nothing."""
    if get_origin(kind) in (Union, UnionType):
        return _coerce_union(where, value, get_args(kind))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            _require(str(value), get_args(kind), f"{where}=")
        return value
    if get_origin(kind) is tuple:
        return _coerce_seeds(where, value) if where == "seeds" else _coerce_tuple(where, value, get_args(kind))
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
    if where == "target" and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    *others, last = [kind for kind in kinds if kind is not type(None)]
    for kind in others:
        try:
            return _coerce(where, value, kind)
        except ConfigError:
            continue
    return _coerce(where, value, last)


def _coerce_tuple(where: str, value: Any, kinds: Sequence[Any]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"got {where}={value!r} → expected a list → write {where}=[{value}]")
    if Ellipsis not in kinds and len(value) != len(kinds):
        example = ",".join(["0.9"] * len(kinds))
        raise ConfigError(f"got {where}={list(value)} → expected {len(kinds)} values → write {where}=[{example}]")
    return tuple(_coerce(where, item, kinds[0]) for item in value)


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
    if isinstance(value, tuple):
        for each in value:
            _check_range(where, each, item)
        return
    low, high = item.metadata["low"], item.metadata["high"]
    too_low = not value >= low or (item.metadata["above"] and value == low)
    too_high = not value <= high or value == math.inf or (item.metadata["below"] and value == high)
    if too_low or too_high:
        lower = f"above {low:g}" if item.metadata["above"] else f"at least {low:g}"
        upper = f" and {'below' if item.metadata['below'] else 'at most'} {high:g}" if high < math.inf else ""
        default = "" if item.default in (MISSING, None) else f", such as {where}={item.default}"
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


def _loss_of_task(loss: LossConfig, task: str) -> LossConfig:
    """``auto`` as the task's first loss; another must be one of the task's."""
    own = TASK_LOSSES[task]
    if loss.name == "auto" and (own[0] == "cross_entropy" or not loss.label_smoothing):
        return LossConfig(own[0], label_smoothing=loss.label_smoothing if own[0] == "cross_entropy" else None)
    if loss.name == "auto":
        raise ConfigError(
            f"got loss.label_smoothing={loss.label_smoothing} with task={task} → smoothing is for classes → remove it"
        )
    if loss.name not in own:
        others = [name for name, losses in TASK_LOSSES.items() if loss.name in losses]
        raise ConfigError(
            f"got loss={loss.name} with task={task} → expected one of {', '.join(own)} → set loss=auto, or "
            f"task={others[0]}"
        )
    return loss


def _check_task(config: TrainConfig) -> None:
    """Refuse what only classes can be trained with."""
    from aggregators import Aggregator
    from aggregators.registry import aggregator_record

    if config.task == "classification":
        return
    if config.sampler == "class_balanced":
        raise ConfigError(
            f"got sampler=class_balanced with task={config.task} → there are no classes to balance → set "
            f"sampler=natural or sampler=patient_balanced"
        )
    own_loss = aggregator_record(config.head.name).builder.auxiliary_loss is not Aggregator.auxiliary_loss
    # CLAM's own loss is for classes alone and can be switched off; those of other heads take several labels too
    of_classes = config.head.keywords["bag_weight"] < 1 if "bag_weight" in config.head.keywords else own_loss
    if of_classes and (config.task != "multilabel" or "bag_weight" in config.head.keywords):
        raise ConfigError(
            f"got head={config.head.name} with task={config.task} → this head learns from classes by a loss of its "
            f"own → choose another, such as head=abmil"
            f"{', or set head.bag_weight=1' if 'bag_weight' in config.head.keywords else ''}"
        )
    mixed = [name for name in ("bag_mixup", "embedding_mixup") if getattr(config.augment, name)]
    if config.task == "survival" and mixed:
        raise ConfigError(
            f"got augment.{mixed[0]} with task=survival → two patients' times cannot be mixed → set "
            f"augment.{mixed[0]}=0"
        )
    if config.loss.name == "cox" and (config.batch_bags < COX_BAGS or config.accumulate > 1):
        raise ConfigError(
            f"got loss=cox with batch_bags={config.batch_bags}, accumulate={config.accumulate} → it compares the bags "
            f"of a pack with each other, of which those in the training part are left → set batch_bags={COX_BAGS} or "
            f"more and accumulate=1"
        )


def _check_together(config: TrainConfig) -> None:
    """Refuse values that are right each for itself and not together."""
    _check_task(config)
    if config.freeze_epochs and config.init is None:
        raise ConfigError(
            f"got freeze_epochs={config.freeze_epochs} without init → nothing would be held still → add "
            f"init=RUN/checkpoints/fold0-seed0.safetensors, or set freeze_epochs=0"
        )
    if config.freeze_epochs >= config.epochs:
        raise ConfigError(
            f"got freeze_epochs={config.freeze_epochs} of epochs={config.epochs} → expected some epochs in which all "
            f"is trained → lower freeze_epochs, or raise epochs"
        )
    still = AugmentConfig("none").keywords()
    moved = [name for name in ("bag_mixup", "pseudo_bags") if getattr(config.augment, name) != still[name]]
    if config.head.keywords.get("positions", "none") != "none" and moved:
        raise ConfigError(
            f"got augment.{moved[0]} with head.positions={config.head.keywords['positions']} → instances would move "
            f"between bags without their positions → set augment.{moved[0]}={still[moved[0]]}, or "
            f"head.positions=none"
        )
    if config.scheduler.patience is not None and config.scheduler.patience >= config.patience:
        raise ConfigError(
            f"got scheduler.patience={config.scheduler.patience} with patience={config.patience} → the training would "
            f"stop before the learning rate ever falls → lower scheduler.patience, or raise patience"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, _Option):
        return {"name": value.name} | {key: _plain(inner) for key, inner in value.keywords().items()}  # type: ignore[attr-defined]
    if isinstance(value, _Checked):
        return {item.name: getattr(value, item.name) for item in fields(value)}  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
