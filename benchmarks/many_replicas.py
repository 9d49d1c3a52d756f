"""Many replicas of one head on resident bags, against lean training one slide at a time.

Ours is `train_replicas`. The rival trains the same head on the same parts with one whole bag per step; its
bags lie on the device and nothing is read back between steps. It is timed on some replicas and epochs, after one epoch
that warms up, and scaled to all of them; then it goes on to the last epoch, for its quality.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from aggregators import Aggregator, create_aggregator
from aggregators.base import Standardize
from benchmarks.ceiling_cohort import N_CLASSES, CeilingCohort, CohortSize, Difficulty, draw_cohort
from benchmarks.machine import Result
from mil.bags.bags import Bags
from mil.bags.devices import PeakMemory
from mil.config.compose import compose_config
from mil.config.train import TrainConfig
from mil.statistics.metrics import auroc
from mil.training.losses import probabilities
from mil.training.replica import PartArray, Replica, TrainedReplica
from mil.training.replicas import train_replicas

LEAN_LR = 2e-4
_DIFFICULTY = Difficulty("resident", share=0.01, distance=12.0)


@dataclass(frozen=True)
class Plan:
    """What is trained, and how much of it the rival is timed on."""

    size: CohortSize
    folds: int
    seeds: int
    epochs: int
    timed_replicas: int
    timed_epochs: int


FULL = Plan(CohortSize(1000, 5000, 5000, 1024), folds=5, seeds=5, epochs=30, timed_replicas=2, timed_epochs=5)


def compare(plan: Plan, device: torch.device) -> list[Result]:
    """Seconds, arithmetic, memory and quality of both."""
    cohort = draw_cohort(plan.size, _DIFFICULTY, 0, str(device))
    bags = Bags(cohort.slide_ids, cohort.bags, memory="ram")
    config = compose_config(values={"head": "abmil", "epochs": plan.epochs, "patience": plan.epochs})
    replicas = [Replica(fold, seed, config) for fold in range(plan.folds) for seed in range(plan.seeds)]
    parts = [_parts(len(bags), plan.folds, replica.fold) for replica in replicas]
    size = plan.size
    subject = f"{len(replicas)} x ABMIL x {plan.epochs} epochs, {size.slides} x {size.most} x {size.dim}"
    warm_up(bags, cohort, replicas[0], parts[0], device)
    peak, started = PeakMemory(device), time.perf_counter()
    trained = train_replicas(bags, cohort.labels, replicas, parts, N_CLASSES, device)
    seconds, memory = time.perf_counter() - started, peak.read()
    lean = LeanTraining(bags, cohort, device)
    timed = range(min(plan.timed_replicas, len(replicas)))
    runs = [lean.train(config, parts[index], replicas[index].seed, plan) for index in timed]
    scaled = statistics.median(second for run in runs for second in run.seconds) * len(replicas) * plan.epochs
    flops = _training_flops(bags, config, parts, device)
    quality = [
        _test_auroc(cohort, torch.from_numpy(run.probabilities), p) for run, p in zip(trained, parts, strict=True)
    ]
    rows = [
        Result.of(subject, "tessera", "s", [seconds]),
        Result.of(subject, "tessera, seconds per replica", "s", [run.seconds for run in trained]),
        Result.of(subject, "tessera, arithmetic of training", "TFLOP/s", [flops / seconds / 1e12]),
        Result.of(subject, _scaled_label(plan), "s", [scaled]),
        Result.of(subject, "lean batch 1 / tessera", "x", [scaled / seconds]),
        Result.of(subject, "tessera, test AUROC", "", quality),
        Result.of(subject, "lean batch 1, test AUROC", "", [run.auroc for run in runs]),
        Result.of(subject, "tessera, test AUROC of these replicas", "", [quality[index] for index in timed]),
    ]
    return rows + _memory_rows(subject, memory, trained)


def warm_up(bags: Bags, cohort: CeilingCohort, replica: Replica, parts: PartArray, device: torch.device) -> None:
    """One epoch of one replica: kernels are loaded, and the moments of the bags are found, as they are for both."""
    short = compose_config(values={"head": "abmil", "epochs": 1})
    train_replicas(bags, cohort.labels, [Replica(replica.fold, 0, short)], [parts], N_CLASSES, device)


@dataclass(frozen=True)
class LeanRun:
    """Seconds of every timed epoch, and the AUROC on the test part after the last epoch."""

    seconds: list[float]
    auroc: float


class LeanTraining:
    """One whole bag per step, from bags that lie on the device."""

    def __init__(self, bags: Bags, cohort: CeilingCohort, device: torch.device) -> None:
        self.cohort, self.moments, self.device = cohort, bags.moments, device
        self.bags = [torch.from_numpy(bag).to(device) for bag in cohort.bags]
        self.labels = torch.from_numpy(cohort.labels).to(device)

    def train(self, config: TrainConfig, parts: PartArray, seed: int, plan: Plan) -> LeanRun:
        """Train the head of ``config`` with Adam and a constant learning rate of 2e-4."""
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        training = np.flatnonzero(parts == "train")
        head = self._head(config, training)
        optimizer = torch.optim.Adam(head.parameters(), lr=LEAN_LR, fused=True)
        seconds = []
        for _ in range(plan.epochs):
            started = time.perf_counter()
            self._epoch(head, optimizer, rng.permutation(training).tolist())
            seconds.append(time.perf_counter() - started)
        timed = seconds[1 : plan.timed_epochs + 1] or seconds
        return LeanRun(timed, _test_auroc(self.cohort, probabilities(self._logits(head)), parts))

    def _head(self, config: TrainConfig, training: np.ndarray) -> Aggregator:
        dim = self.bags[0].shape[1]
        head = create_aggregator(config.head.name, in_dim=dim, n_classes=N_CLASSES, **config.head.keywords)
        if isinstance(head.input_norm, Standardize):
            head.input_norm.fit(*self.moments.mean_std(training))
        return head.to(self.device)

    def _epoch(self, head: Aggregator, optimizer: torch.optim.Optimizer, order: Sequence[int]) -> None:
        head.train()
        for slide in order:
            loss = functional.cross_entropy(head(self.bags[slide]).logits, self.labels[slide : slide + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def _logits(self, head: Aggregator) -> Tensor:
        head.eval()
        return torch.cat([head(bag).logits for bag in self.bags]).float().cpu()


def _parts(slides: int, folds: int, fold: int) -> PartArray:
    """Every ``folds``-th slide tests, the slides after these validate, the rest train."""
    turn = (np.arange(slides) // N_CLASSES) % max(folds, 3)
    parts = np.full(slides, "train", dtype="<U10")
    parts[turn == fold] = "test"
    parts[turn == (fold + 1) % max(folds, 3)] = "validation"
    return parts


def _test_auroc(cohort: CeilingCohort, scores: Tensor, parts: PartArray) -> float:
    test = np.flatnonzero(parts == "test")
    values = scores.double().numpy()[test]
    return float(auroc(cohort.labels[test], values)[0]) if np.isfinite(values).all() else math.nan


def _training_flops(bags: Bags, config: TrainConfig, parts: Sequence[PartArray], device: torch.device) -> float:
    """Multiplications and additions of all matrix products of the training steps, counted on one small bag."""
    rows = 64
    head = create_aggregator(config.head.name, in_dim=bags.dim, n_classes=N_CLASSES, **config.head.keywords).to(device)
    with FlopCounterMode(display=False) as counter:
        head(torch.zeros(rows, bags.dim, device=device)).logits.sum().backward()
    taken = np.minimum(bags.n_instances, config.instance_budget or bags.n_instances)
    instances = sum(int(taken[part == "train"].sum()) for part in parts) * config.epochs
    return counter.get_total_flops() / rows * instances


def _memory_rows(subject: str, memory: int | None, trained: Sequence[TrainedReplica]) -> list[Result]:
    """Peak of the whole run, and of the first and the last replica, which are alike when memory is flat."""
    peaks = {"all": memory, "first replica": trained[0].peak_bytes, "last replica": trained[-1].peak_bytes}
    return [
        Result.of(subject, f"tessera, peak memory, {name}", "GB", [value / 1e9])
        for name, value in peaks.items()
        if value is not None
    ]


def _scaled_label(plan: Plan) -> str:
    return f"lean batch 1, scaled from {plan.timed_replicas} replicas x {plan.timed_epochs} epochs"
