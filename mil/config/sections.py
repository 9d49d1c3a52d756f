"""The parts of a training configuration: head, optimizer, scheduler, loss, augmentation."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from extract.store.core.remote_path import StorePath
from mil.config.checks import Checked, check_option, coerce, known_option, number_field, require_key
from mil.config.options import group_options, keyword_types

COX_BAGS = 16
"""Fewest bags of a pack for Cox's loss: with 5 folds about ten of them are in the training part."""


@dataclass(frozen=True)
class HeadConfig(Checked):
    """Which head, and its constructor keywords; those left out are filled in with the head's own defaults."""

    _where = "head."

    name: str = "abmil"
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("head", self.name, self.keywords)
        kinds = keyword_types(self.name)
        filled = {key: self.keywords.get(key, default) for key, default in group_options("head")[self.name].items()}
        object.__setattr__(
            self, "keywords", {key: coerce(f"head.{key}", value, kinds[key]) for key, value in filled.items()}
        )


class _Option(Checked):
    """One option of a group: keys that are not given are the option's own, and those of other options stay None."""

    _group = ""

    def __post_init__(self) -> None:
        own = group_options(self._group)[known_option(self._group, str(self.name))]  # type: ignore[attr-defined]
        for item in fields(self):  # type: ignore[arg-type]
            if item.name == "name":
                continue
            if getattr(self, item.name) is None:
                object.__setattr__(self, item.name, own.get(item.name))
            elif item.name not in own:
                require_key(self._group, str(self.name), item.name)  # type: ignore[attr-defined]
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
    lr: float = number_field(None, 0.0, above=True)
    weight_decay: float = number_field(None, 0.0)
    momentum: float | None = number_field(None, 0.0, 1.0, below=True)
    betas: tuple[float, float] | None = number_field(None, 0.0, 1.0, below=True)
    lookahead_steps: int | None = number_field(None, 1)
    lookahead_fraction: float | None = number_field(None, 0.0, 1.0, above=True)


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
    warmup_fraction: float = number_field(None, 0.0, 1.0, below=True)
    start_divisor: float | None = number_field(None, 1.0)
    end_divisor: float | None = number_field(None, 1.0)
    period_fraction: float | None = number_field(None, 0.0, 1.0, above=True)
    factor: float | None = number_field(None, 0.0, 1.0, above=True, below=True)
    patience: int | None = number_field(None, 0)
    threshold: float | None = number_field(None, 0.0, 1.0, below=True)


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
    label_smoothing: float | None = number_field(None, 0.0, 1.0, below=True)
    gamma: float | None = number_field(None, 0.0)
    delta: float | None = number_field(None, 0.0, above=True)
    intervals: int | None = number_field(None, 2)

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
    noise: float = number_field(None, 0.0)
    bag_mixup: float = number_field(None, 0.0)
    embedding_mixup: float = number_field(None, 0.0)
    pseudo_bags: int = number_field(None, 1)
    policy: Literal["all", "random"] = field(default=None)  # type: ignore[arg-type]
    schedule: Literal["constant", "linear", "cosine"] = field(default=None)  # type: ignore[arg-type]
    ramp: float = number_field(None, 0.0, 1.0, above=True)


def to_plain(value: Any) -> Any:
    """A setting as the config file holds it: sections as mappings, tuples as lists, paths as text."""
    if isinstance(value, _Option):
        return {"name": value.name} | {key: to_plain(inner) for key, inner in value.keywords().items()}  # type: ignore[attr-defined]
    if isinstance(value, Checked):
        return {item.name: getattr(value, item.name) for item in fields(value)}  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, StorePath) else value
