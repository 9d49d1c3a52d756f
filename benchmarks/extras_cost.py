"""What the extras of training cost: together when all are off, and each when it is on.

Off: an epoch of `mil.training.loop` beside the same epoch written out bare: the same head, draws and packs, weighted
cross-entropy, AdamW along a cosine, clipping by norm, validation on all instances. On: an epoch with one extra beside
the epoch without. All take turns in every repeat; an epoch's seconds are the median over the epochs after the first.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from aggregators import Aggregator, create_aggregator
from aggregators.base import Standardize
from benchmarks.ceiling_cohort import EASY, N_CLASSES, CohortSize, draw_cohort
from benchmarks.machine import Result
from mil.arrays import IntArray
from mil.bags.bags import Bags
from mil.bags.devices import cpu_threads
from mil.bags.forward import bag_logits
from mil.bags.samplers import natural_order
from mil.config.compose import compose_config
from mil.config.train import TrainConfig
from mil.training.loop import train_replica
from mil.training.losses import balanced_class_weights, weighted_cross_entropy
from mil.training.replica import PartArray, Replica
from mil.training.schedules import learning_rate

CPU = torch.device("cpu")
SUBJECT = "extras"
BARE, PLAIN = "bare loop", "tessera, all extras off"
EXTRAS: Mapping[str, Mapping[str, Any]] = {
    "instance dropout": {"instance_dropout": 0.2},
    "noise": {"augment": {"name": "none", "noise": 0.1}},
    "mixup of bags": {"augment": {"name": "none", "bag_mixup": 0.5}},
    "mixup of embeddings": {"augment": {"name": "none", "embedding_mixup": 0.5}},
    "pseudo-bags": {"augment": {"name": "none", "pseudo_bags": 3}},
    "one augmentation at random": {"augment": "strong"},
    "label smoothing": {"loss": {"name": "cross_entropy", "label_smoothing": 0.1}},
    "focal loss": {"loss": "focal"},
    "class-balanced sampler": {"sampler": "class_balanced"},
    "patient-balanced sampler": {"sampler": "patient_balanced"},
    "two packs a step": {"accumulate": 2},
    "clipping by value": {"grad_clip_value": 1.0},
    "L1": {"l1": 1e-5},
    "average of weights": {"ema": 0.99},
    "lookahead": {"optimizer": "lookahead_adamw"},
    "ranger": {"optimizer": "ranger"},
    "lion": {"optimizer": "lion"},
    "muon": {"optimizer": "muon"},
    "one-cycle": {"scheduler": "onecycle"},
}


@dataclass(frozen=True, eq=False)
class _Trial:
    """What every contestant trains on."""

    bags: Bags
    labels: IntArray
    parts: PartArray
    epochs: int


def compare(size: CohortSize, epochs: int, repeats: int) -> list[Result]:
    """Seconds per epoch, and their ratios within each repeat."""
    cohort = draw_cohort(size, EASY, 0)
    parts = np.where(np.arange(size.slides) % 5 == 0, "validation", "train").astype("<U10")
    trial = _Trial(Bags(cohort.slide_ids, cohort.bags, memory="ram"), cohort.labels, parts, epochs)
    plain = _config(epochs, {})
    contestants: dict[str, Callable[[], float]] = {
        BARE: lambda: _bare(trial, plain),
        PLAIN: lambda: _ours(trial, plain),
    }
    for name, options in EXTRAS.items():
        config = _config(epochs, options)
        contestants[name] = lambda config=config: _ours(trial, config)  # type: ignore[misc]
    contestants[PLAIN]()  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            seconds[name].append(contestant())
    rows = [Result.of(SUBJECT, f"{name}: seconds per epoch", "s", values) for name, values in seconds.items()]
    rows.append(_ratio("all off", seconds[PLAIN], seconds[BARE], "of the bare loop"))
    return rows + [_ratio(name, seconds[name], seconds[PLAIN], "of all off") for name in EXTRAS]


def _ratio(name: str, values: list[float], base: list[float], of: str) -> Result:
    return Result.of(SUBJECT, f"{name}: time {of}", "x", [a / b for a, b in zip(values, base, strict=True)])


def _config(epochs: int, options: Mapping[str, Any]) -> TrainConfig:
    return compose_config(values={"epochs": epochs, "patience": epochs, "instance_budget": 512, **options})


def _ours(trial: _Trial, config: TrainConfig) -> float:
    patients = [str(at) for at in range(len(trial.bags))]
    trained = train_replica(
        trial.bags, trial.labels, Replica(0, 0, config), trial.parts, N_CLASSES, CPU, patients=patients
    )
    return statistics.median(record.seconds for record in trained.history[1:])


def _bare(trial: _Trial, config: TrainConfig) -> float:
    torch.manual_seed(0)
    training, validation = (np.flatnonzero(trial.parts == part) for part in ("train", "validation"))
    head = _head(trial, config, training)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)
    weights = balanced_class_weights(trial.labels[training], N_CLASSES)
    seconds = []
    elements = 512 * config.batch_bags * trial.bags.dim
    with cpu_threads(elements):
        for epoch in range(1, config.epochs + 1):
            started = time.perf_counter()
            _bare_epoch(trial, config, head, optimizer, weights, epoch)
            logits = bag_logits([head], trial.bags, validation, CPU)[0]
            functional.cross_entropy(logits, torch.from_numpy(trial.labels[validation]))
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _bare_epoch(
    trial: _Trial,
    config: TrainConfig,
    head: Aggregator,
    optimizer: torch.optim.Optimizer,
    weights: torch.Tensor,
    epoch: int,
) -> None:
    head.train()
    order, size = natural_order(len(trial.bags), 0, epoch), config.batch_bags
    steps = [order[start : start + size] for start in range(0, len(order), size)]
    for at, step in enumerate(steps):
        members = step[trial.parts[step] == "train"]
        rate = learning_rate(
            config.optimizer.lr, config.scheduler, (epoch - 1) * len(steps) + at, config.epochs * len(steps)
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        pack = trial.bags.pack(members, trial.bags.draw(members, config.instance_budget, 0, epoch))
        logits = head(pack.instances, pack.offsets).logits
        loss = weighted_cross_entropy(logits, torch.from_numpy(trial.labels[members]), weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(head.parameters(), config.grad_clip or 1.0)
        optimizer.step()


def _head(trial: _Trial, config: TrainConfig, training: IntArray) -> Aggregator:
    head = create_aggregator(config.head.name, trial.bags.dim, N_CLASSES, **config.head.keywords)
    if isinstance(head.input_norm, Standardize):
        head.input_norm.fit(*trial.bags.moments.mean_std(training))
    return head
