"""The training loop of one replica."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aggregators import Aggregator, BagDraws, create_aggregator
from aggregators.base import Standardize
from mil.arrays import IntArray
from mil.bags.augment import Batch, augment, enabled, strength
from mil.bags.bags import Bags
from mil.bags.devices import PeakMemory, cpu_threads
from mil.bags.forward import bag_logits
from mil.bags.samplers import draw_instances, draw_seeds, draw_views, sampled_order, seeds_of_pieces, step_packs
from mil.cohort.targets import KINDS
from mil.config.train import TrainConfig
from mil.errors import BagError, ConfigError, TrainingDivergedError, listed
from mil.training.checkpoint import inherit_weights
from mil.training.losses import class_numbers
from mil.training.optimizers import add_l1_gradient, create_optimizer, set_learning_rate
from mil.training.replica import EpochDone, EpochRecord, PartArray, Replica, SavedEpoch, TrainedReplica
from mil.training.schedules import learning_rate
from mil.training.tasks import TargetArray, create_task, decode
from mil.training.weight_average import WeightAverage


def train_replica(
    bags: Bags,
    targets: TargetArray,
    replica: Replica,
    parts: PartArray,
    n_outputs: int,
    device: torch.device,
    epoch_done: EpochDone | None = None,
    saved: SavedEpoch | None = None,
    patients: Sequence[str] | None = None,
) -> TrainedReplica:
    """Train one head with early stopping on the validation part, and predict every bag with its best weights.

    Everything random comes from the replica's seed: the result depends neither on torch's global generators (which are
    left as they were) nor on what else is trained.

    Args:
        bags: n bags.
        targets: classes, int64 [n], 0 to C - 1; of other tasks float64 [n, columns], see `targets`.
        replica: fold, seed and hyper-parameters.
        parts: [n], "train", "validation" or "test".
        n_outputs: logits per bag, C for classes, see `mil.training.tasks.count_outputs`.
        device: where to train.
        epoch_done: called after each epoch.
        saved: where to keep the state between epochs; what it holds of an earlier training is gone on from.
        patients: [n], whose slide each bag is; needed by ``sampler=patient_balanced`` alone.

    Raises:
        BagError: features that are not finite.
        CheckpointError: ``init`` cannot be read or does not fit.
        ConfigError: one bag alone takes more memory than there is, or patients are missing.
        TrainingDivergedError: a loss that is not finite.
    """
    started, peak = time.perf_counter(), PeakMemory(device)
    with _own_randomness(replica.seed, device), cpu_threads(_step_elements(bags, replica.config)):
        loop = _Loop(bags, targets, replica, parts, n_outputs, device, patients)
        history, best = _fit(loop, replica.config, epoch_done, saved)
        loop.head.load_state_dict(best.weights)
        predicting = time.perf_counter()
        logits = bag_logits([loop.head], bags, np.arange(len(bags)), device)[0]
    return TrainedReplica(
        replica=replica,
        head=loop.head.cpu().eval(),
        values=decode(loop.task.record, logits).numpy(),
        history=tuple(history),
        best_epoch=best.epoch,
        seconds=time.perf_counter() - started,
        inference_seconds=time.perf_counter() - predicting,
        peak_bytes=peak.read(),
        task=loop.task.record,
    )


@dataclass(frozen=True, eq=False)
class _Best:
    """The best epoch so far; epoch 0 is none."""

    epoch: int
    loss: float
    weights: dict[str, Tensor]


def _fit(
    loop: "_Loop", config: TrainConfig, epoch_done: EpochDone | None, saved: SavedEpoch | None
) -> tuple[list[EpochRecord], _Best]:
    """Train until the validation loss has not improved for ``patience`` epochs, but at least ``min_epochs``."""
    history: list[EpochRecord] = []
    best = _Best(0, float("inf"), {})
    state = saved.load() if saved is not None else None
    if state is not None:
        loop.load_state_dict(state["loop"])
        history = [EpochRecord(**record) for record in state["history"]]
        best = _Best(**state["best"])
    for epoch in range(len(history) + 1, config.epochs + 1):
        started = time.perf_counter()
        train_loss = loop.train_epoch(epoch, [record.validation_loss for record in history])
        validation_loss, validation_score = loop.validate()
        seconds = time.perf_counter() - started
        history.append(EpochRecord(epoch, loop.rate, train_loss, validation_loss, validation_score, seconds))
        if validation_loss < best.loss:
            weights = {name: value.detach().clone() for name, value in loop.kept_head.state_dict().items()}
            best = _Best(epoch, validation_loss, weights)
        if epoch_done is not None:
            epoch_done(history[-1])
        if epoch >= config.min_epochs and epoch - best.epoch >= config.patience:
            break
        if saved is not None and saved.due():
            records = [asdict(record) for record in history]
            saved.save({"loop": loop.state_dict(), "history": records, "best": vars(best)})
    return history, best


@dataclass(frozen=True, eq=False)
class _Step:
    """One optimizer step: its number from 1, learning rate, and the bags it learned from."""

    number: int
    rate: float
    members: IntArray


class _Loop:
    """Head, optimizer and the replica's view of the bags; one call per epoch."""

    def __init__(
        self,
        bags: Bags,
        targets: TargetArray,
        replica: Replica,
        parts: PartArray,
        n_outputs: int,
        device: torch.device,
        patients: Sequence[str] | None,
    ) -> None:
        self.bags, self.replica, self.config, self.device = bags, replica, replica.config, device
        self.targets, self.n_outputs, self.patients = targets, n_outputs, patients
        self.training = parts == "train"
        self.validation = np.flatnonzero(parts == "validation")
        self.inherited: frozenset[str] = frozenset()
        self.head = self._create_head()
        self.optimizer = create_optimizer(
            self.head, self.config.optimizer, self.inherited, self.config.freeze_lr_factor
        )
        self.average = WeightAverage(self.head, self.config.ema) if self.config.ema is not None else None
        # of the CPU whatever the device, so that what is drawn does not depend on it
        self.draws = torch.Generator().manual_seed(replica.seed)
        self.augmented = bool(enabled(self.config.augment))
        self.feature_scale = bags.moments.mean_std(np.flatnonzero(self.training))[1].to(device)
        self.task = create_task(self.config, targets, parts, n_outputs, device, patients)
        # halved when a pack does not fit into memory
        self.bags_at_once = self.config.batch_bags
        self.epoch, self.rate = 0, 0.0
        self.steps: list[_Step] = []

    @property
    def kept_head(self) -> Aggregator:
        """The head that is validated and kept."""
        return self.head if self.average is None else self.average.head

    def _create_head(self) -> Aggregator:
        head = create_aggregator(
            self.config.head.name, in_dim=self.bags.dim, n_classes=self.n_outputs, **self.config.head.keywords
        )
        # read even when not needed: it is where features that are not finite are found
        moments = self.bags.moments
        if isinstance(head.input_norm, Standardize):
            head.input_norm.fit(*moments.mean_std(np.flatnonzero(self.training)))
        if self.config.init is not None:
            self.inherited = inherit_weights(head, self.config)
        return head.to(self.device)

    def train_epoch(self, epoch: int, validation_losses: Sequence[float]) -> float:
        """One pass over the training bags; returns their mean loss.

        Args:
            epoch: counts from 1.
            validation_losses: of the epochs before.
        """
        self.head.train()
        self.epoch, self.steps = epoch, []
        config, seed = self.config, self.replica.seed
        order = sampled_order(config.sampler, self.training, self.targets, self.patients, seed, epoch)
        steps = step_packs(order, self.training, config.batch_bags, config.accumulate)
        losses: list[Tensor] = []
        with self._first_phase(epoch):
            for at, packs in enumerate(steps):
                step, n_steps = (epoch - 1) * len(steps) + at, config.epochs * len(steps)
                self.rate = learning_rate(config.optimizer.lr, config.scheduler, step, n_steps, validation_losses)
                if packs:
                    set_learning_rate(self.optimizer, self.rate)
                    self.steps.append(_Step(step + 1, self.rate, np.concatenate(packs)))
                    losses.append(self._step(packs))
        return self._mean_loss(losses)

    @contextmanager
    def _first_phase(self, epoch: int) -> Iterator[None]:
        """Hold still what was inherited, in the first ``freeze_epochs``."""
        frozen = [weight for name, weight in self.head.named_parameters() if name in self.inherited]
        for weight in frozen:
            weight.requires_grad_(epoch > self.config.freeze_epochs)
        try:
            yield
        finally:
            for weight in frozen:
                weight.requires_grad_(True)

    def _step(self, packs: Sequence[IntArray]) -> Tensor:
        """One optimizer step on some packs of training bags, as if they were one.

        Returns [2], means over bags: the loss that epochs are compared by, and the sum that is minimised.
        """
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            pieces = [piece for pack in packs for piece in _pieces(pack, self.bags_at_once)]
            try:
                losses = self._add_gradients(pieces)
                break
            except torch.OutOfMemoryError as error:
                # all of the step is done again: some gradients may have been added, others not
                self._halve(pieces, error)
        if self.config.l1:
            add_l1_gradient(self.optimizer, self.config.l1)
        if self.config.grad_clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.head.parameters(), self.config.grad_clip_value)
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.grad_clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.head)
        return losses

    def _add_gradients(self, pieces: Sequence[IntArray]) -> Tensor:
        """The gradient of the mean loss over the bags of all pieces, piece by piece; returns [2] as `_step`."""
        step = self.steps[-1]
        # for the step at once, whose bags the pieces are in order: halving changes no draw
        seeds = iter(draw_seeds(step.members, len(self.bags), self.replica.seed, step.number))
        losses = [
            self._add_gradient(members, len(members) / len(step.members), list(islice(seeds, len(members))))
            for members in pieces
        ]
        return sum(losses[1:], losses[0])

    def _add_gradient(self, members: IntArray, share: float, seeds: list[int]) -> Tensor:
        """Add ``share`` times the gradient of some bags' mean loss; returns ``share`` times the losses, [2]."""
        budget, dropout = self.config.instance_budget, self.config.instance_dropout
        rows = draw_instances(self.bags, members, budget, dropout, self.replica.seed, self.epoch)
        if self.config.views == "sample":
            pack = self.bags.pack(members, rows, draw_views(self.bags, members, self.replica.seed, self.epoch))
        else:
            pack = self.bags.pack(members, rows)
        instances, offsets = pack.instances.to(self.device), pack.offsets.to(self.device)
        targets = self.task.targets(members).to(self.device)
        coords = None if pack.coords is None else pack.coords.to(self.device)
        if self.augmented:
            instances, offsets, targets = self._augment(instances, offsets, targets)
            seeds = seeds_of_pieces(seeds, len(offsets) - 1)
        output = self.head(instances, offsets, coords, BagDraws(seeds))
        losses = self.task.losses(output.logits, targets)
        total = losses.minimised
        kind = KINDS[self.config.task]
        if kind.has_probabilities:
            own_targets = class_numbers(targets) if kind.has_classes else targets
            total = total + self.head.auxiliary_loss(output, own_targets, offsets)
        total.backward(torch.full_like(total, share))  # type: ignore[no-untyped-call]
        return torch.stack([losses.compared, total]).detach() * share

    def _augment(self, instances: Tensor, offsets: Tensor, targets: Tensor) -> Batch:
        """The batch as it is trained on, its targets as numbers [bags, columns] (of classes soft labels)."""
        soft = self.task.soft(targets)
        level = strength(self.config.augment, self.epoch, self.config.epochs)
        batch = Batch(instances.float(), offsets.cpu(), soft)
        return augment(batch, self.config.augment, level, self.feature_scale, self.draws)

    def _halve(self, pieces: Sequence[IntArray], error: torch.OutOfMemoryError) -> None:
        """Take half as many bags at once from here on; says so the first time."""
        largest = max(len(members) for members in pieces)
        if largest == 1:
            slides = listed({self.bags.slide_ids[bag] for members in pieces for bag in members})
            budget = self.config.instance_budget or int(self.bags.n_instances.max())
            raise ConfigError(
                f"got too little memory for a single bag, one of {slides} → expected room for its instances → set "
                f"instance_budget below {budget}, or device=cpu"
            ) from error
        cox = self.config.loss.name == "cox"
        effect = "by which fewer bags are compared with each other" if cox else "which gives the same gradients"
        if self.bags_at_once == self.config.batch_bags:
            warnings.warn(
                f"got too little memory for {largest} bags at once in replica {self.replica.name} → packs are halved, "
                f"{effect} → set batch_bags={largest // 2} and accumulate="
                f"{2 * self.config.accumulate}, or lower instance_budget, to begin so",
                stacklevel=2,
            )
        self.bags_at_once = largest // 2

    def _mean_loss(self, losses: list[Tensor]) -> float:
        """Looked at once an epoch, because looking at a loss makes a GPU wait; the first bad step is the one named."""
        task, total = torch.stack(losses).cpu().double().numpy().T
        bad = np.flatnonzero(~np.isfinite(total))
        if bad.size:
            raise self._diverged(self.steps[bad[0]], f"loss {total[bad[0]]}")
        return float(np.average(task, weights=[len(step.members) for step in self.steps]))

    def _diverged(self, step: "_Step", what: str) -> TrainingDivergedError:
        slides = listed([self.bags.slide_ids[bag] for bag in step.members])
        return TrainingDivergedError(
            f"got {what} in replica {self.replica.name}, epoch {self.epoch}, step {step.number}, learning rate "
            f"{step.rate:.3g}, slides {slides} → expected finite numbers → lower optimizer.lr, or set grad_clip=1"
        )

    def state_dict(self) -> dict[str, Any]:
        """What the next epoch depends on."""
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "draws": self.draws.get_state(),
            "torch": _global_states(self.device),
            "average": self.average.state_dict() if self.average is not None else None,
            "bags_at_once": self.bags_at_once,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another loop's state."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draws.set_state(state["draws"])
        self.bags_at_once = state["bags_at_once"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["torch"][0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["torch"][1], self.device)

    def validate(self) -> tuple[float, float]:
        """The task's loss and score of the validation part, from all instances."""
        try:
            logits = bag_logits([self.kept_head], self.bags, self.validation, self.device)[0]
        except BagError as error:
            # the features are finite, so it is the weights that are not
            raise self._diverged(self.steps[-1], "validation logits that are not finite") from error
        return self.task.validate(logits, self.validation)


def _pieces(members: IntArray, size: int) -> list[IntArray]:
    """Some bags in pieces of at most ``size``."""
    return [members[start : start + size] for start in range(0, len(members), size)]


def _step_elements(bags: Bags, config: TrainConfig) -> float:
    """Numbers in the instances of a mean training step."""
    taken = np.minimum(bags.n_instances, config.instance_budget or bags.n_instances)
    return float(taken.mean()) * min(config.batch_bags, len(bags)) * bags.dim


def _global_states(device: torch.device) -> list[Tensor]:
    """Of torch's own generators: the CPU's, and that of a GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for what draws from them, and give them back as they were."""
    devices: list[torch.device | Literal[0]] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
