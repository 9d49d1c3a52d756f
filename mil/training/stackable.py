"""Which replicas can be trained together with the results of one by one, see `mil.training.stacked`."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import nn

from aggregators import Aggregator, create_aggregator
from aggregators.base import Dropout
from aggregators.norm import BatchNorm
from mil.bags.bags import Bags
from mil.cohort.targets import CLASSIFICATION
from mil.config.train import TrainConfig
from mil.training.replica import Replica

# settings that may have any value; all others have to be those of a plain recipe
# fmt: off
_ANY_VALUE = frozenset((
    "store", "labels", "target", "backbone", "slide_column", "patient_column", "split", "folds", "repeats", "sites",
    "split_column", "split_file", "seeds", "split_seed", "validation_fraction", "epochs", "patience", "min_epochs",
    "batch_bags", "instance_budget", "class_weights", "standardize", "grad_clip", "device", "memory", "head",
    "optimizer", "scheduler", "track", "track_files", "distinct_patients",
))
# fmt: on
_SCHEDULERS = ("cosine", "constant", "onecycle", "step")


def is_stackable(config: TrainConfig, head: Aggregator) -> bool:
    """Whether replicas of this recipe and head can be trained stacked, with the results of one by one."""
    plain = TrainConfig(head=config.head, standardize=config.standardize)
    recipe = all(
        getattr(config, item.name) == getattr(plain, item.name)
        for item in fields(config)
        if item.name not in _ANY_VALUE
    )
    own_loss = type(head).auxiliary_loss is not Aggregator.auxiliary_loss
    return (
        recipe
        and config.task == CLASSIFICATION
        and config.optimizer.name == "adamw"
        and config.scheduler.name in _SCHEDULERS
        and not own_loss
        and not any(map(_depends_on_its_company, head.modules()))
    )


def _depends_on_its_company(module: nn.Module) -> bool:
    """Whether a layer shares statistics between bags or, as torch's and timm's dropout, draws for all in one stream."""
    chances = (getattr(module, name, None) for name in ("p", "dropout", "drop_prob"))
    draws = any(isinstance(p, int | float) and p > 0 for p in chances)
    return isinstance(module, BatchNorm | nn.BatchNorm1d) or (draws and not isinstance(module, Dropout))


def stacks(replicas: Sequence[Replica], bags: Bags, n_classes: int, at_once: int) -> tuple[list[list[int]], list[int]]:
    """Which replicas to train together, by their position, and which one by one.

    Args:
        replicas: all of them.
        bags: theirs.
        n_classes: C.
        at_once: most replicas in one stack, which bounds the memory.
    """
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    alone: list[int] = []
    for at, replica in enumerate(replicas):
        if is_stackable(replica.config, create_started_head(replica, bags, n_classes)):
            plain = replace(replica.config.optimizer, lr=1.0, weight_decay=0.0)
            groups[replica.seed, repr(replace(replica.config, optimizer=plain))].append(at)
        else:
            alone.append(at)
    pieces = [group[start : start + at_once] for group in groups.values() for start in range(0, len(group), at_once)]
    alone += [piece[0] for piece in pieces if len(piece) == 1]
    return [piece for piece in pieces if len(piece) > 1], sorted(alone)


def create_started_head(replica: Replica, bags: Bags, n_classes: int) -> Aggregator:
    """A head as the replica's seed starts it; torch's own generator stays as it was."""
    head = replica.config.head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(replica.seed)
        return create_aggregator(head.name, in_dim=bags.dim, n_classes=n_classes, **head.keywords)
