"""What a head learns and says, by the kind of target: its logits, the loss, the score of a validation part.

A task knows the targets of all bags; the training loop asks it for those of a step. What predictions need later (means,
names, edges of intervals) is in its `record`, plain values that a checkpoint keeps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from mil.arrays import IntArray
from mil.cohort.cohort import Cohort
from mil.cohort.targets import CLASSIFICATION, MULTI_LABEL, REGRESSION, SURVIVAL, target_columns
from mil.config.sections import LossConfig
from mil.config.train import TrainConfig
from mil.errors import ConfigError
from mil.statistics.metrics import balanced_accuracy, confusion
from mil.statistics.multi_label import label_aurocs
from mil.statistics.regression import determination
from mil.statistics.survival import by_patient, concordance
from mil.training.losses import (
    bag_loss,
    balanced_class_weights,
    cox_loss,
    discrete_survival_loss,
    huber_loss,
    log_loss,
    multi_label_loss,
    probabilities,
    squared_error,
    weighted_cross_entropy,
)

TargetArray = npt.NDArray[Any]
Record = Mapping[str, Any]


class Losses(NamedTuple):
    """What is minimised, and what epochs are compared by; scalars, means over bags."""

    minimised: Tensor
    compared: Tensor


class Task(Protocol):
    """What the training loop asks of a task."""

    @property
    def record(self) -> dict[str, Any]:
        """What predictions need, as plain values; its ``task`` names the kind."""
        ...

    def targets(self, members: IntArray) -> Tensor:
        """Those of some bags, on the CPU: int64 [bags] of classes, else float32 [bags, columns]."""
        ...

    def soft(self, targets: Tensor) -> Tensor:
        """Targets as float32 [bags, columns], of which mixtures can be made."""
        ...

    def losses(self, logits: Tensor, targets: Tensor) -> Losses:
        """Of a step, from logits [bags, outputs]."""
        ...

    def validate(self, logits: Tensor, members: IntArray) -> tuple[float, float]:
        """The loss that epochs are compared by, and the score, of logits on the CPU."""
        ...


class Taught(NamedTuple):
    """What a task is made of.

    Attributes:
        config: the replica's settings.
        targets: of all n bags, see `mil.cohort.cohort.Cohort.targets`.
        parts: [n]; what is fitted to targets is fitted to the training part (intervals of time: to all but the test
            part, so that they are the same for every seed).
        n_outputs: logits per bag.
        device: where steps are done.
        patients: [n]; survival is scored by patient where they are given, and by bag where not.
    """

    config: TrainConfig
    targets: TargetArray
    parts: npt.NDArray[np.str_]
    n_outputs: int
    device: torch.device
    patients: Sequence[str] | None

    @property
    def training(self) -> npt.NDArray[np.bool_]:
        """Which bags are trained on, [n]."""
        return np.equal(self.parts, "train")


def count_outputs(config: TrainConfig, cohort: Cohort) -> int:
    """Logits per bag: classes, labels, numbers, or intervals of time (Cox: one)."""
    return _TASKS[cohort.task].count_outputs(config, cohort)


def create_task(
    config: TrainConfig,
    targets: TargetArray,
    parts: npt.NDArray[np.str_],
    n_outputs: int,
    device: torch.device,
    patients: Sequence[str] | None = None,
) -> Task:
    """The task of a replica; arguments as in `Taught`.

    Raises:
        ConfigError: Cox's loss for a validation part without an event, of which it says nothing.
    """
    return _TASKS[config.task].of(Taught(config, targets, parts, n_outputs, device, patients))


def decode(record: Record, logits: Tensor) -> Tensor:
    """What a task says of bags, float64 [bags, values], from logits [bags, outputs].

    Probabilities of classes or labels, numbers in the unit of the table, or one risk, which is higher for those who
    are expected to die sooner: the log hazard of Cox, else minus the expected number of intervals survived.
    """
    return _TASKS[record["task"]].decode(record, logits.double())


@dataclass(frozen=True, eq=False)
class _Classes:
    config: LossConfig
    labels: IntArray
    n_outputs: int
    weights: Tensor
    step_weights: Tensor

    @classmethod
    def of(cls, taught: Taught) -> "_Classes":
        config, labels, n_outputs = taught.config, taught.targets, taught.n_outputs
        weights = config_class_weights(config, labels[taught.training], n_outputs)
        # a sampler that balances the classes leaves nothing to be weighed
        step_weights = torch.ones(n_outputs) if config.sampler == "class_balanced" else weights
        return cls(config.loss, labels, n_outputs, weights, step_weights.to(taught.device))

    @staticmethod
    def count_outputs(config: TrainConfig, cohort: Cohort) -> int:
        return len(cohort.class_names)

    @staticmethod
    def decode(record: Record, logits: Tensor) -> Tensor:
        return probabilities(logits)

    @property
    def record(self) -> dict[str, Any]:
        return {"task": CLASSIFICATION}

    def targets(self, members: IntArray) -> Tensor:
        return torch.from_numpy(self.labels[members])

    def soft(self, targets: Tensor) -> Tensor:
        return one_hot(targets, self.n_outputs).float()

    def losses(self, logits: Tensor, targets: Tensor) -> Losses:
        loss = bag_loss(self.config, logits, targets, self.step_weights)
        if self.config.is_cross_entropy:
            return Losses(loss, loss)
        return Losses(loss, weighted_cross_entropy(logits.detach(), targets, self.step_weights))

    def validate(self, logits: Tensor, members: IntArray) -> tuple[float, float]:
        labels = self.labels[members]
        matrix = confusion(labels, logits.argmax(dim=-1).numpy(), self.n_outputs)
        return log_loss(logits, torch.from_numpy(labels), self.weights), float(balanced_accuracy(matrix)[0])


def config_class_weights(config: TrainConfig, labels: IntArray, n_classes: int) -> Tensor:
    """Weight of every class [C], from the labels of the training part."""
    return balanced_class_weights(labels, n_classes) if config.class_weights == "balanced" else torch.ones(n_classes)


@dataclass(frozen=True, eq=False)
class _Labels:
    columns: tuple[str, ...]
    values: Tensor
    weights: Tensor
    step_weights: Tensor

    @classmethod
    def of(cls, taught: Taught) -> "_Labels":
        config, values = taught.config, taught.targets
        known = values[taught.training]
        weights = np.ones(values.shape[1])
        if config.class_weights == "balanced":
            positive, negative = (known == 1).sum(axis=0), (known == 0).sum(axis=0)
            np.divide(negative, positive, out=weights, where=positive > 0)
        weight = torch.from_numpy(weights).float()
        return cls(_columns(config), torch.from_numpy(values).float(), weight, weight.to(taught.device))

    @staticmethod
    def count_outputs(config: TrainConfig, cohort: Cohort) -> int:
        return len(cohort.columns)

    @staticmethod
    def decode(record: Record, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    @property
    def record(self) -> dict[str, Any]:
        return {"task": MULTI_LABEL, "columns": list(self.columns)}

    def targets(self, members: IntArray) -> Tensor:
        return self.values[members]

    def soft(self, targets: Tensor) -> Tensor:
        return targets

    def losses(self, logits: Tensor, targets: Tensor) -> Losses:
        loss = multi_label_loss(logits, targets, self.step_weights)
        return Losses(loss, loss)

    def validate(self, logits: Tensor, members: IntArray) -> tuple[float, float]:
        targets = self.values[members].double()
        loss = float(multi_label_loss(logits.double(), targets, self.weights.double()))
        areas = label_aurocs(targets.numpy(), logits.double().numpy())[0]
        return loss, float(np.nanmean(areas)) if np.isfinite(areas).any() else float("nan")


@dataclass(frozen=True, eq=False)
class _Numbers:
    columns: tuple[str, ...]
    config: LossConfig
    values: Tensor
    mean: npt.NDArray[np.float64]
    deviation: npt.NDArray[np.float64]

    @classmethod
    def of(cls, taught: Taught) -> "_Numbers":
        config, values, training = taught.config, taught.targets, taught.training
        mean, deviation = values[training].mean(axis=0), values[training].std(axis=0)
        deviation = np.where(deviation > 0, deviation, 1.0)
        standardised = torch.from_numpy((values - mean) / deviation).float()
        return cls(_columns(config), config.loss, standardised, mean, deviation)

    @staticmethod
    def count_outputs(config: TrainConfig, cohort: Cohort) -> int:
        return len(cohort.columns)

    @staticmethod
    def decode(record: Record, logits: Tensor) -> Tensor:
        return logits * logits.new_tensor(record["deviation"]) + logits.new_tensor(record["mean"])

    @property
    def record(self) -> dict[str, Any]:
        moments = {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}
        return {"task": REGRESSION, "columns": list(self.columns), **moments}

    def targets(self, members: IntArray) -> Tensor:
        return self.values[members]

    def soft(self, targets: Tensor) -> Tensor:
        return targets

    def losses(self, logits: Tensor, targets: Tensor) -> Losses:
        compared = squared_error(logits, targets)
        if self.config.name == "mse":
            return Losses(compared, compared)
        return Losses(huber_loss(logits, targets, self.config.delta or 1.0), compared.detach())

    def validate(self, logits: Tensor, members: IntArray) -> tuple[float, float]:
        targets = self.values[members].double()
        loss = float(squared_error(logits.double(), targets))
        return loss, float(np.mean(determination(targets.numpy(), logits.double().numpy())[0]))


@dataclass(frozen=True, eq=False)
class _Survival:
    """`rows` [n, 2] are what steps see: the interval that a time lies in (Cox: its rank), and the event."""

    columns: tuple[str, ...]
    config: LossConfig
    values: TargetArray
    rows: Tensor
    edges: npt.NDArray[np.float64]
    patients: Sequence[str]

    @classmethod
    def of(cls, taught: Taught) -> "_Survival":
        config, values, parts, n_outputs = taught.config, taught.targets, taught.parts, taught.n_outputs
        cox = config.loss.name == "cox"
        if cox and not (values[parts == "validation", 1] == 1).any():
            raise ConfigError(
                f"got loss=cox and a validation part of {int((parts == 'validation').sum())} slides without an event → "
                f"expected one, or nothing tells when to stop → set loss=discrete_survival, fewer folds, or a larger "
                f"validation_fraction"
            )
        times = values[(parts != "test") & (values[:, 1] == 1), 0]
        edges = np.quantile(times, np.linspace(0, 1, n_outputs + 1)[1:-1]) if len(times) else np.empty(0)
        ranks = np.unique(values[:, 0], return_inverse=True)[1]
        first = ranks if cox else np.searchsorted(edges, values[:, 0], side="right")
        rows = torch.from_numpy(np.stack([first, values[:, 1]], axis=1))
        who = [str(at) for at in range(len(values))] if taught.patients is None else taught.patients
        return cls(_columns(config), config.loss, values, rows, edges, who)

    @staticmethod
    def count_outputs(config: TrainConfig, cohort: Cohort) -> int:
        return config.loss.intervals or 1

    @staticmethod
    def decode(record: Record, logits: Tensor) -> Tensor:
        if record["loss"] == "cox":
            return logits[:, :1]
        survived = logsigmoid(-logits).cumsum(dim=-1).exp()
        return -survived.sum(dim=-1, keepdim=True)

    @property
    def record(self) -> dict[str, Any]:
        facts = {"loss": self.config.name, "edges": self.edges.tolist()}
        return {"task": SURVIVAL, "columns": list(self.columns), **facts}

    def targets(self, members: IntArray) -> Tensor:
        return self.rows[members].float()

    def soft(self, targets: Tensor) -> Tensor:
        return targets

    def losses(self, logits: Tensor, targets: Tensor) -> Losses:
        loss = self._loss(logits, targets)
        return Losses(loss, loss)

    def validate(self, logits: Tensor, members: IntArray) -> tuple[float, float]:
        loss = float(self._loss(logits.double(), self.rows[members]))
        risk = decode(self.record, logits)[:, 0].numpy()
        who = by_patient(self.values[members], risk, [self.patients[at] for at in members.tolist()])
        return loss, float(concordance(who.times, who.events, who.risks)[0])

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        times, events = targets[:, 0], targets[:, 1] == 1
        if self.config.name == "cox":
            return cox_loss(logits[:, 0], times, events)
        return discrete_survival_loss(logits, times.long(), events)


def _columns(config: TrainConfig) -> tuple[str, ...]:
    return target_columns(config.task, config.target or "")


_TASKS: dict[str, type[_Classes] | type[_Labels] | type[_Numbers] | type[_Survival]] = {
    CLASSIFICATION: _Classes,
    MULTI_LABEL: _Labels,
    REGRESSION: _Numbers,
    SURVIVAL: _Survival,
}
