"""Replicas that are trained together: every pack is read once, their parameters lie stacked along a first axis.

The replicas of one seed share their packs, so that all folds and learning rates of a head cost one pass over the bags
rather than one each; which bags a replica learns from is a matter of weights, zero for the others. The results are
those of `mil.training.loop.train_replica` to float tolerance. What cannot be stacked exactly is trained one by one, see
`mil.training.stackable`: heads that share batch statistics or have a loss of their own, and recipes beyond AdamW with
weighted cross-entropy. What a head draws, such as dropout, belongs to (seed, step, bag), so the folds of a seed draw
alike.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from aggregators import Aggregator, BagDraws
from aggregators.base import Standardize
from mil.arrays import IntArray
from mil.bags.bags import Bags
from mil.bags.devices import PeakMemory
from mil.bags.forward import MAX_INSTANCES, bag_logits
from mil.bags.samplers import draw_seeds, natural_order
from mil.cohort.targets import CLASSIFICATION
from mil.config.train import TrainConfig
from mil.errors import TrainingDivergedError
from mil.statistics.metrics import balanced_accuracy, confusion
from mil.training.losses import log_loss, probabilities
from mil.training.replica import EpochRecord, PartArray, Replica, SavedEpoch, TrainedReplica
from mil.training.schedules import learning_rate
from mil.training.stackable import create_started_head
from mil.training.tasks import config_class_weights

Stacked = dict[str, Tensor]
"""Tensors by name, each [R, ...]: one slice per replica."""

StackedEpochDone = Callable[[int, EpochRecord], None]
"""Called with a replica's place in the stack."""

_EPS = 1e-8
# what of a stack changes from epoch to epoch
_ARRAYS = ("running", "best_loss", "best_epoch")
_TENSORS = ("parameters", "buffers", "moments", "steps", "best_weights")


def train_stacked(
    bags: Bags,
    labels: IntArray,
    replicas: Sequence[Replica],
    parts: Sequence[PartArray],
    n_classes: int,
    device: torch.device,
    epoch_done: StackedEpochDone | None = None,
    saved: SavedEpoch | None = None,
) -> list[TrainedReplica]:
    """Train replicas of one seed and one head together.

    Args:
        bags: n bags.
        labels: int64 [n].
        replicas: R of them, alike but for fold, learning rate and weight decay.
        parts: for each replica the part of every bag, [n].
        n_classes: C.
        device: where to train.
        epoch_done: called for each replica after each of its epochs.
        saved: where to keep the state between epochs; what it holds of the same stack is gone on from.

    Raises:
        TrainingDivergedError: the loss of a replica is not finite.
    """
    started, peak = time.perf_counter(), PeakMemory(device)
    stack = _Stack.of(bags, labels, replicas, np.stack(parts), n_classes, device)
    first = stack.load(saved.load()) if saved is not None else 1
    for epoch in range(first, stack.config.epochs + 1):
        if not stack.running.any():
            break
        begun = time.perf_counter()
        losses, rates = _train_epoch(stack, epoch)
        _validate(stack, epoch, losses, rates, begun, epoch_done)
        if saved is not None and saved.due():
            saved.save(stack.state(epoch))
    logits = torch.cat(
        [found for _, found in _predict(stack, stack.best_weights, np.arange(len(bags)))], dim=1
    )  # [R, n, C]
    seconds = time.perf_counter() - started
    # of one head alone, as for those that are trained alone
    predicting = time.perf_counter()
    bag_logits([stack.head_of(0).to(device)], bags, np.arange(len(bags)), device)
    inference = time.perf_counter() - predicting
    return [
        TrainedReplica(
            replica=replica,
            head=stack.head_of(at),
            values=probabilities(logits[at]).numpy(),
            history=tuple(stack.history[at]),
            best_epoch=int(stack.best_epoch[at]),
            # each took its share of what they took together
            seconds=seconds / len(replicas),
            inference_seconds=inference,
            peak_bytes=peak.read(),
            task={"task": CLASSIFICATION},
        )
        for at, replica in enumerate(replicas)
    ]


@dataclass(eq=False)
class _Stack:
    """R replicas in training.

    Attributes:
        parameters: what is learned, by name, [R, ...].
        buffers: what is not, by name, [R, ...].
        moments: AdamW's two running means, by name, [2, R, ...].
        steps: int64 [R], optimizer steps that each replica has taken.
        training: bool [R, n].
        validating: bool [R, n].
        class_weights: float32 [R, C].
        running: bool [R]; a replica that was stopped takes no more steps.
        best_loss: float64 [R].
        best_epoch: int64 [R].
        best_weights: parameters and buffers of the best epoch, by name, [R, ...].
    """

    bags: Bags
    labels: IntArray
    replicas: Sequence[Replica]
    head: Aggregator
    device: torch.device
    parameters: Stacked
    buffers: Stacked
    moments: Stacked
    steps: Tensor
    training: np.ndarray
    validating: np.ndarray
    class_weights: Tensor
    running: np.ndarray
    best_loss: np.ndarray
    best_epoch: np.ndarray
    best_weights: Stacked
    history: list[list[EpochRecord]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        bags: Bags,
        labels: IntArray,
        replicas: Sequence[Replica],
        parts: np.ndarray,
        n_classes: int,
        device: torch.device,
    ) -> "_Stack":
        """The replicas as they start: each as `train_replica` would start it."""
        heads = []
        for replica, part in zip(replicas, parts, strict=True):
            head = create_started_head(replica, bags, n_classes)
            if isinstance(head.input_norm, Standardize):
                head.input_norm.fit(*bags.moments.mean_std(np.flatnonzero(part == "train")))
            heads.append(head.to(device))
        parameters, buffers = stack_module_state(heads)
        parameters = {name: value.detach() for name, value in parameters.items()}
        count, training = len(replicas), parts == "train"
        weights = [
            config_class_weights(replica.config, labels[own], n_classes)
            for replica, own in zip(replicas, training, strict=True)
        ]
        return cls(
            bags=bags,
            labels=labels,
            replicas=replicas,
            head=heads[0].train(),
            device=device,
            parameters=parameters,
            buffers=buffers,
            moments={name: torch.zeros((2, *value.shape), device=device) for name, value in parameters.items()},
            steps=torch.zeros(count, dtype=torch.int64, device=device),
            training=training,
            validating=parts == "validation",
            class_weights=torch.stack(weights).to(device),
            running=np.ones(count, dtype=bool),
            best_loss=np.full(count, math.inf),
            best_epoch=np.zeros(count, dtype=np.int64),
            best_weights={name: value.clone() for name, value in (parameters | buffers).items()},
            history=[[] for _ in replicas],
        )

    def state(self, epoch: int) -> dict[str, Any]:
        """What the epochs after ``epoch`` depend on."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in _ARRAYS}
        history = [[asdict(record) for record in records] for records in self.history]
        names = [replica.name for replica in self.replicas]
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return {"epoch": epoch, "names": names, "history": history, "arrays": arrays, "tensors": tensors}

    def load(self, state: dict[str, Any] | None) -> int:
        """Go on from the state of the same replicas; returns the next epoch, 1 where there is none."""
        if state is None or state["names"] != [replica.name for replica in self.replicas]:
            return 1
        for name in _ARRAYS:
            setattr(self, name, state["arrays"][name].numpy())
        for name in _TENSORS:
            value = state["tensors"][name]
            placed = {key: each.to(self.device) for key, each in value.items()} if isinstance(value, dict) else value
            setattr(self, name, placed if isinstance(placed, dict) else placed.to(self.device))
        self.history = [[EpochRecord(**record) for record in records] for records in state["history"]]
        return int(state["epoch"]) + 1

    @property
    def config(self) -> TrainConfig:
        """Of the first; the others differ in their optimizer's numbers alone."""
        return self.replicas[0].config

    def logits(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        pack: Any,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits [R, bags, C] of a pack, which all replicas read; what they draw for a bag is the same for all."""
        instances = pack.instances.to(self.device)
        coords = None if pack.coords is None else pack.coords.to(self.device)

        def one(own: Stacked, fixed: Stacked) -> Tensor:
            draws = None if seeds is None else BagDraws(seeds)
            output = functional_call(self.head, (own, fixed), (instances, pack.offsets, coords, draws))
            result: Tensor = output.logits
            return result

        return vmap(one, randomness="same")(dict(parameters), dict(buffers))

    def head_of(self, at: int) -> Aggregator:
        """A replica as a head of its own, at its best epoch, on the CPU."""
        replica = self.replicas[at]
        head = create_started_head(replica, self.bags, self.class_weights.shape[1])
        head.load_state_dict({name: value[at].cpu() for name, value in self.best_weights.items()})
        return head.eval()


def _train_epoch(stack: _Stack, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """One pass over the packs; mean training loss [R] and last learning rate [R]."""
    config, n = stack.config, len(stack.bags)
    order = natural_order(n, stack.replicas[0].seed, epoch)
    packs = [order[start : start + config.batch_bags] for start in range(0, n, config.batch_bags)]
    losses: list[Tensor] = []
    counts: list[np.ndarray] = []
    rates = np.zeros(len(stack.replicas))
    for at, members in enumerate(packs):
        own = stack.training[:, members] & stack.running[:, None]  # [R, bags]
        used = own.any(axis=0)
        step, n_steps = (epoch - 1) * len(packs) + at, config.epochs * len(packs)
        rates = np.array(
            [learning_rate(each.config.optimizer.lr, config.scheduler, step, n_steps) for each in stack.replicas]
        )
        if used.any():
            losses.append(_step(stack, members[used], own[:, used], rates, epoch, step + 1))
            counts.append(own.sum(axis=1))
    found = torch.stack(losses).cpu().double().numpy()  # [steps, R]
    _check_finite(stack, found, epoch)
    times = np.stack(counts).astype(np.float64)
    return (found * times).sum(axis=0) / np.maximum(times.sum(axis=0), 1), rates


def _step(stack: _Stack, members: IntArray, own: np.ndarray, rates: np.ndarray, epoch: int, number: int) -> Tensor:
    """One optimizer step, counted from 1, of every replica that has a bag in the pack; their losses [R]."""
    rows = stack.bags.draw(members, stack.config.instance_budget, stack.replicas[0].seed, epoch)
    pack = stack.bags.pack(members, rows)
    targets = torch.from_numpy(stack.labels[members]).to(stack.device)
    share = torch.from_numpy(own / np.maximum(own.sum(axis=1, keepdims=True), 1)).float().to(stack.device)
    share = share * stack.class_weights[:, targets]  # [R, bags]
    parameters = {name: value.requires_grad_() for name, value in stack.parameters.items()}
    seeds = draw_seeds(members, len(stack.bags), stack.replicas[0].seed, number)
    logits = stack.logits(parameters, stack.buffers, pack, seeds)
    entropy = functional.cross_entropy(
        logits.flatten(0, 1), targets.repeat(len(stack.replicas)), reduction="none"
    ).view_as(share)
    losses = (share * entropy).sum(dim=1)
    gradients = dict(zip(parameters, torch.autograd.grad(losses.sum(), list(parameters.values())), strict=True))
    stack.parameters = {name: value.detach() for name, value in parameters.items()}
    active = torch.from_numpy(own.any(axis=1)).to(stack.device)
    if stack.config.grad_clip is not None:
        gradients = _clipped(gradients, stack.config.grad_clip)
    _adamw(stack, gradients, torch.from_numpy(rates).to(stack.device), active)
    return losses.detach()


def _clipped(gradients: Stacked, most: float) -> Stacked:
    """Every replica's gradients, scaled so that their common norm is at most ``most``, as torch does for one model.

    Not in place: parameters that are only read as a sum share one gradient.
    """
    norms = torch.stack([value.flatten(1).norm(dim=1) for value in gradients.values()]).norm(dim=0)  # [R]
    scale = (most / (norms + 1e-6)).clamp(max=1.0)
    return {name: value * _spread(scale, value) for name, value in gradients.items()}


def _adamw(stack: _Stack, gradients: Stacked, rates: Tensor, active: Tensor) -> None:
    """AdamW on the slices of the replicas that take a step; the others stay as they are, their moments too.

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019.
    """
    stack.steps += active
    first, second = stack.config.optimizer.betas or (0.9, 0.999)
    taken = stack.steps.clamp(min=1).double()
    scale_1, scale_2 = 1 - first**taken, 1 - second**taken  # [R]
    decay = torch.tensor([each.config.optimizer.weight_decay for each in stack.replicas], device=stack.device)
    for name, gradient in gradients.items():
        value, (mean, square) = stack.parameters[name], stack.moments[name]
        moves = _spread(active, value)
        mean.copy_(torch.where(moves, torch.lerp(mean, gradient, 1 - first), mean))
        square.copy_(torch.where(moves, second * square + (1 - second) * gradient.square(), square))
        rate = _spread(rates.to(value.dtype), value)
        # vectors are biases and norms, which do not decay; the first axis is the stack's
        shrunk = value * (1 - rate * _spread(decay.to(value.dtype), value)) if value.ndim > 2 else value
        root = (square / _spread(scale_2.to(value.dtype), value)).sqrt() + _EPS
        stack.parameters[name] = torch.where(
            moves, shrunk - rate * mean / _spread(scale_1.to(value.dtype), value) / root, value
        )


def _spread(per_replica: Tensor, value: Tensor) -> Tensor:
    """[R] as [R, 1, ...], to meet [R, ...]."""
    return per_replica.view(-1, *[1] * (value.ndim - 1))


def _validate(
    stack: _Stack,
    epoch: int,
    losses: np.ndarray,
    rates: np.ndarray,
    begun: float,
    epoch_done: StackedEpochDone | None,
) -> None:
    """Score every running replica on its validation part, keep the best, and stop those that no longer improve."""
    used = np.flatnonzero((stack.validating & stack.running[:, None]).any(axis=0))
    pieces = list(_predict(stack, stack.parameters | stack.buffers, used))
    logits = torch.cat([found for _, found in pieces], dim=1)  # [R, used, C]
    for at, replica in enumerate(stack.replicas):
        if not stack.running[at]:
            continue
        mine = stack.validating[at][used]
        labels, scores = stack.labels[used[mine]], logits[at][torch.from_numpy(mine)]
        loss = log_loss(scores, torch.from_numpy(labels), stack.class_weights[at].cpu())
        if not math.isfinite(loss):
            raise _diverged(replica, epoch, f"validation loss {loss}")
        matrix = confusion(labels, scores.argmax(dim=-1).numpy(), scores.shape[1])
        score = float(balanced_accuracy(matrix)[0])
        seconds = (time.perf_counter() - begun) / int(stack.running.sum())
        record = EpochRecord(epoch, float(rates[at]), float(losses[at]), loss, score, seconds)
        stack.history[at].append(record)
        if loss < stack.best_loss[at]:
            stack.best_loss[at], stack.best_epoch[at] = loss, epoch
            for name, value in (stack.parameters | stack.buffers).items():
                stack.best_weights[name][at] = value[at]
        if epoch_done is not None:
            epoch_done(at, record)
    patience = stack.config.patience
    late = epoch >= stack.config.min_epochs
    stack.running &= ~(late & (epoch - stack.best_epoch >= patience))


@torch.no_grad()
def _predict(stack: _Stack, weights: Stacked, indices: IntArray) -> Iterator[tuple[IntArray, Tensor]]:
    """Logits [R, bags, C] of whole bags, pack by pack, on the CPU."""
    stack.head.eval()
    own = {name: weights[name] for name in stack.parameters}
    fixed = {name: weights[name] for name in stack.buffers}
    for pack in stack.bags.packs(indices, MAX_INSTANCES):
        yield pack.bags, stack.logits(own, fixed, pack).float().cpu()
    stack.head.train()


def _check_finite(stack: _Stack, losses: np.ndarray, epoch: int) -> None:
    bad = ~np.isfinite(losses)
    if bad.any():
        step, at = np.argwhere(bad)[0]
        raise _diverged(stack.replicas[at], epoch, f"loss {losses[step, at]}")


def _diverged(replica: Replica, epoch: int, what: str) -> TrainingDivergedError:
    return TrainingDivergedError(
        f"got {what} in replica {replica.name}, epoch {epoch} → expected finite numbers → lower optimizer.lr, or set "
        f"grad_clip=1"
    )
