"""MUSK1, MUSK2, Fox and Elephant: heads scored honestly, and as the papers scored them.

    python -m benchmarks.classic_mil --data DATA_FOLDER/mil_classic

Five repeats of ten folds. Honest: of the nine folds that are not tested a fifth of the bags validates; it decides when
to stop, which of four settings (two learning rates x two weight decays) to keep, and where to cut. As published: see
`benchmarks.published_protocol`. Every figure is the accuracy over all bags, each tested once per repeat.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.machine import Result, print_results, write_results
from benchmarks.published_protocol import (
    CPU,
    DSMIL,
    MI_NET,
    FloatArray,
    IntArray,
    Recipe,
    best_cut,
    best_test_epoch,
    train_as_published,
)
from mil.bags.bags import Bags
from mil.cohort.cohort import Attrition, Cohort
from mil.config.sections import HeadConfig, OptimizerConfig
from mil.config.train import TrainConfig
from mil.splits.folds import make_splits
from mil.splits.splits import Splits
from mil.statistics.metrics import auroc
from mil.training.loop import train_replica
from mil.training.replica import Replica, TrainedReplica

SETS = ("musk1", "musk2", "fox", "elephant")
LEARNING_RATES = (5e-4, 2e-3)
WEIGHT_DECAYS = (0.01, 10.0)
HONEST = "accuracy, honest"
HONEST_HALF = "accuracy, honest, cut at one half"
HONEST_AUROC = "AUROC within a fold, honest"
LAST_EPOCH = "accuracy, as published, last epoch"
BEST_EPOCH = "accuracy, as published, best test epoch and cut"
BOOTSTRAPS = 10_000

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Contender:
    """A head of the table.

    Attributes:
        head: its registered name.
        keywords: of its constructor, near the sizes of its paper.
        recipe: how published code trains it.
    """

    head: str
    keywords: Mapping[str, Any]
    recipe: Recipe


CONTENDERS = {
    "abmil": Contender("abmil", {"gated": False, "embed_dim": 64, "attention_dim": 64, "dropout": 0.5}, MI_NET),
    "gated abmil": Contender("abmil", {"gated": True, "embed_dim": 64, "attention_dim": 64, "dropout": 0.5}, MI_NET),
    "dsmil": Contender("dsmil", {"embed_dim": None, "attention_dim": 128, "nonlinear": False, "dropout": 0.0}, DSMIL),
    "mean": Contender("mean", {"embed_dim": 64, "dropout": 0.5}, MI_NET),
}


@dataclass(frozen=True, eq=False)
class MilSet:
    """A set of labelled bags; the cohort calls each bag a slide of a patient of its own."""

    bags: Bags
    cohort: Cohort


@dataclass(frozen=True, eq=False)
class Repeat:
    """What one pass over all folds found.

    Attributes:
        right: per protocol, whether each bag was called right, [n].
        fold_auroc: honest, per fold.
        fold_of: [n], the fold that tests each bag.
    """

    right: dict[str, BoolArray]
    fold_auroc: list[float] = field(default_factory=list)
    fold_of: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def read_set(path: Path) -> MilSet:
    """A set from its ``.npz``: ``x`` [instances, dim], ``bag`` [instances], ``y`` [bags]."""
    with np.load(path) as file:
        instances, bag_of, labels = file["x"], file["bag"], file["y"]
    names = tuple(f"{path.stem}-{index:04}" for index in range(len(labels)))
    bags = Bags(names, [instances[bag_of == index] for index in range(len(labels))], "ram")
    attrition = Attrition(len(labels), len(labels))
    cohort = Cohort(names, names, (labels > 0).astype(np.int64), ("negative", "positive"), "label", attrition)
    return MilSet(bags, cohort)


def settings(contender: Contender, epochs: int) -> list[TrainConfig]:
    """The four settings among which a validation part may choose."""
    base = TrainConfig(
        epochs=epochs,
        patience=10,
        batch_bags=16,
        instance_budget=64,
        device="cpu",
        head=HeadConfig(contender.head, contender.keywords),
    )
    grid = product(LEARNING_RATES, WEIGHT_DECAYS)
    return [replace(base, optimizer=OptimizerConfig("adamw", lr, decay)) for lr, decay in grid]


def best_validated(mil_set: MilSet, configs: Sequence[TrainConfig], splits: Splits, fold: int) -> TrainedReplica:
    """Train all settings on the training part of a fold, keep that with the lowest validation loss."""
    seed = splits.seeds[0]
    parts, labels = splits.parts(fold, seed), mil_set.cohort.labels
    trained = [train_replica(mil_set.bags, labels, Replica(fold, seed, each), parts, 2, CPU) for each in configs]
    return min(trained, key=lambda replica: replica.history[replica.best_epoch - 1].validation_loss)


def run_repeat(
    mil_set: MilSet, contender: Contender, repeat: int, folds: int, epochs: int | None, bags_per_step: int
) -> Repeat:
    """Test every bag once, under all protocols."""
    labels, n = mil_set.cohort.labels, len(mil_set.cohort)
    splits = make_splits(mil_set.cohort, folds, split_seed=repeat, seeds=(repeat,), validation_fraction=0.2)
    configs = settings(contender, epochs or 40)
    recipe = replace(contender.recipe, epochs=epochs or contender.recipe.epochs)
    right = {name: np.zeros(n, dtype=bool) for name in (HONEST, HONEST_HALF, LAST_EPOCH, BEST_EPOCH)}
    found = Repeat(right, fold_of=splits.test_fold)
    for fold in range(folds):
        parts = splits.parts(fold, repeat)
        test, validation = parts == "test", parts == "validation"
        probabilities = best_validated(mil_set, configs, splits, fold).probabilities
        cut = best_cut(labels[validation], probabilities[validation, 1])
        right[HONEST][test] = (probabilities[test, 1] >= cut) == labels[test]
        right[HONEST_HALF][test] = (probabilities[test, 1] >= 0.5) == labels[test]
        found.fold_auroc.append(float(auroc(labels[test], probabilities[test])[0]))
        head = (contender.head, contender.keywords)
        seed = 1000 * repeat + fold
        epochs_seen = train_as_published(mil_set.bags, labels, test, head, recipe, seed, bags_per_step)
        right[LAST_EPOCH][test] = (epochs_seen[-1] >= 0.5) == labels[test]
        right[BEST_EPOCH][test] = best_test_epoch(labels[test], epochs_seen)
    return found


def summarise(subject: str, repeats: Sequence[Repeat]) -> list[Result]:
    """Per protocol: mean accuracy with the worst and best repeat, and with a 95 % bootstrap interval over bags."""
    rows = []
    for protocol in repeats[0].right:
        right = np.stack([repeat.right[protocol] for repeat in repeats])  # [repeats, n]
        scores, mean = right.mean(axis=1), float(right.mean())
        rows.append(Result(subject, protocol, "mean", mean, float(scores.min()), float(scores.max()), len(repeats)))
        low, high = bootstrap_interval(right.mean(axis=0))
        rows.append(Result(subject, f"{protocol}; interval over bags", "mean", mean, low, high, right.shape[1]))
    areas = [float(np.mean(repeat.fold_auroc)) for repeat in repeats]
    rows.append(Result(subject, HONEST_AUROC, "mean", float(np.mean(areas)), *_ends(areas)))
    folds = [
        float(repeat.right[HONEST][repeat.fold_of == fold].mean()) for repeat in repeats for fold in _folds(repeat)
    ]
    spread = float(np.std(folds))
    rows.append(Result(subject, "deviation of fold accuracies, honest", "", spread, spread, spread, len(folds)))
    return rows


def bootstrap_interval(values: FloatArray) -> tuple[float, float]:
    """95 % percentile interval of the mean of independent values."""
    draws = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _ends(values: Sequence[float]) -> tuple[float, float, int]:
    return min(values), max(values), len(values)


def _folds(repeat: Repeat) -> Sequence[int]:
    return [int(fold) for fold in np.unique(repeat.fold_of)]


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run every head on every set; the CSV is rewritten after each, so that a stopped run keeps what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("TESSERA_DATA", "../shared/data")) / "mil_classic"
    parser.add_argument("--data", type=Path, default=data, help="folder of the .npz files")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--heads", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="of every training, in place of its own number")
    parser.add_argument("--bags-per-step", type=int, default=8, help="of trainings as published; their code takes 1")
    parser.add_argument("--quick", action="store_true", help="one repeat of three epochs: does it run?")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/classic_mil.csv"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats, options.epochs = 1, 3
    torch.set_num_threads(1)
    rows: list[Result] = []
    for name, title in product(options.sets, options.heads):
        started, mil_set = time.monotonic(), read_set(options.data / f"{name}.npz")
        sizes = (options.folds, options.epochs, options.bags_per_step)
        repeats = [run_repeat(mil_set, CONTENDERS[title], repeat, *sizes) for repeat in range(options.repeats)]
        found = summarise(f"{name}, {title}", repeats)
        print_results(found)
        print(f"{name}, {title}: {time.monotonic() - started:.0f} s", flush=True)
        rows += found
        write_results(options.out, rows)
    return rows


if __name__ == "__main__":
    main()
