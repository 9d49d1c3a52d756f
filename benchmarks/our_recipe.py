"""Our side of the comparison: `mil.training.loop` itself, followed epoch by epoch.

A replica is trained by `train_replica`, as `mil train` does it. One training slide per class stands in for its own
validation part, so that what it looks at after every epoch takes little and tells it nothing; that little, the pass
that finds mean and deviation of each feature, and all bookkeeping count as training time. The AUROC is taken with the
clock standing still.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aggregators import create_aggregator
from benchmarks.quality_curve import Curve, CurveWriter, IntArray, Task
from mil.bags.bags import Bags
from mil.bags.forward import bag_logits
from mil.config.compose import compose_config
from mil.config.train import TrainConfig
from mil.training.loop import train_replica
from mil.training.replica import PartArray, Replica


@dataclass(frozen=True)
class Recipe:
    """Settings of `mil train`.

    Attributes:
        name: names the rows of the results.
        options: as in `compose_config(values=...)`, without learning rate and epochs.
    """

    name: str
    options: Mapping[str, Any]

    def config(self, lr: float, epochs: int) -> TrainConfig:
        """The configuration of one training, without early stopping."""
        optimizer = {"lr": lr, **self.options.get("optimizer", {})}
        values = {**self.options, "optimizer": optimizer, "epochs": epochs, "patience": epochs}
        return compose_config(values=values)


def train(recipe: Recipe, task: Task, lr: float, seed: int, epochs: int) -> Curve:
    """Train one replica and write its curve; the replica has no other slides than it learns from and looks at."""
    config = recipe.config(lr, epochs)
    slides, parts = learned_slides(task)
    bags, learned = _bags(task, np.arange(len(task.bags))), _bags(task, slides)
    writer = CurveWriter(task)
    follower = _Follower(writer, bags, task, config)
    replica = Replica(0, seed, config)
    train_replica(learned, task.labels[slides], replica, parts, task.n_classes, task.device, None, follower)
    return writer.curve()


def _bags(task: Task, slides: IntArray) -> Bags:
    """Some slides in RAM."""
    chosen = slides.tolist()
    return Bags([task.slide_ids[slide] for slide in chosen], [task.bags[slide] for slide in chosen], memory="ram")


class _Follower:
    """Stands where a replica keeps its state between epochs, and takes the AUROC of the head that it is handed."""

    def __init__(self, writer: CurveWriter, bags: Bags, task: Task, config: TrainConfig) -> None:
        self.writer, self.bags, self.task = writer, bags, task
        self.head = create_aggregator(config.head.name, bags.dim, task.n_classes, **config.head.keywords)

    def load(self) -> None:
        """Nothing was kept."""

    def due(self) -> bool:
        """After every epoch."""
        return True

    def save(self, state: dict[str, Any]) -> None:
        """Called at the end of every epoch."""
        self.writer.epoch_done(lambda: self._logits(state["loop"]["head"]))

    def _logits(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.head.load_state_dict(weights)
        head = self.head.to(self.task.device)
        return bag_logits([head], self.bags, self.task.validation, self.task.device)[0]


def learned_slides(task: Task) -> tuple[IntArray, PartArray]:
    """The slides that a replica has, and the part of each: the training part, whose first slide of every class stands
    in for a validation part too, so that no other label is handed over."""
    labels = task.labels[task.training]
    firsts = [np.flatnonzero(labels == label)[0] for label in np.unique(labels)]
    slides = np.concatenate([task.training, task.training[firsts]])
    return slides, np.repeat(["train", "validation"], [len(task.training), len(firsts)])
