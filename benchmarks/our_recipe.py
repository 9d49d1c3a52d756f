"""Our side of the comparison: `mil.training` itself, followed epoch by epoch.

A replica is trained by `train_replica`, as `mil train` does it. One validation slide per class stands in for its own
validation part, so that what it looks at after every epoch takes little; that little, the pass that finds mean and
deviation of each feature, and all bookkeeping count as training time. The AUROC is taken with the clock standing still.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from aggregators import create_aggregator
from benchmarks.quality_curve import Curve, CurveWriter, Task
from mil.bags import Bags
from mil.config import TrainConfig, compose_config
from mil.evaluation import bag_logits
from mil.training import PartArray, Replica, train_replica

# instances from which the principal axes are fitted
PCA_INSTANCES = 20_000


@dataclass(frozen=True)
class Recipe:
    """Settings of `mil train`, and what is done to the bags before.

    Attributes:
        name: names the rows of the results.
        options: as in `compose_config(values=...)`, without learning rate and epochs.
        reduce: ``pca`` projects instances on principal axes of training instances; ``mean-max`` makes each bag one
            instance, its mean beside its maximum.
        pca_dim: axes.
    """

    name: str
    options: Mapping[str, Any]
    reduce: Literal["none", "pca", "mean-max"] = "none"
    pca_dim: int = 64

    def config(self, lr: float, epochs: int) -> TrainConfig:
        """The configuration of one training, without early stopping."""
        optimizer = {"lr": lr, **self.options.get("optimizer", {})}
        values = {**self.options, "optimizer": optimizer, "epochs": epochs, "patience": epochs}
        return compose_config(values=values)


def train(recipe: Recipe, task: Task, lr: float, seed: int, epochs: int) -> Curve:
    """Train one replica and write its curve."""
    config = recipe.config(lr, epochs)
    bags = Bags(task.slide_ids, task.bags, memory="ram")
    writer = CurveWriter(task)
    if recipe.reduce != "none":
        bags = Bags(task.slide_ids, _reduced(recipe, task), memory="ram")
    follower = _Follower(writer, bags, task, config)
    train_replica(
        bags, task.labels, Replica(0, seed, config), _parts(task), task.n_classes, task.device, None, follower
    )
    return writer.curve()


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


def _parts(task: Task) -> PartArray:
    """The training part, one validation slide per class, and the rest, which the replica never sees, as test part."""
    parts = np.full(len(task.bags), "test", dtype="<U10")
    parts[task.training] = "train"
    labels = task.labels[task.validation]
    firsts = [np.flatnonzero(labels == label)[0] for label in np.unique(labels)]
    parts[task.validation[firsts]] = "validation"
    return parts


def _reduced(recipe: Recipe, task: Task) -> Sequence[npt.NDArray[Any]]:
    if recipe.reduce == "pca":
        return _on_principal_axes(task, recipe.pca_dim)
    if recipe.reduce == "mean-max":
        return [np.concatenate([bag.mean(0, dtype=np.float32), bag.max(0)])[None].astype("f4") for bag in task.bags]
    return task.bags


def _on_principal_axes(task: Task, dim: int) -> list[npt.NDArray[np.float32]]:
    """Bags on the first axes of a sample of training instances, the same number of each training slide."""
    share = -(-PCA_INSTANCES // len(task.training))
    sample = np.concatenate([task.bags[slide][:share] for slide in task.training.tolist()]).astype(np.float32)
    mean = sample.mean(axis=0)
    covariance = np.cov(sample - mean, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    axes = torch.from_numpy((vectors[:, -dim:] / np.sqrt(values[-dim:])).astype(np.float32))
    centre = torch.from_numpy(mean)
    return [((torch.from_numpy(bag).float() - centre) @ axes).numpy() for bag in task.bags]
