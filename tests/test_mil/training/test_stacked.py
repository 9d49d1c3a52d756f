"""Stacked training gives what training one by one gives."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from aggregators import create_aggregator, list_aggregators
from aggregators.base import Dropout
from mil.bags.bags import Bags
from mil.config.compose import compose_config
from mil.config.train import TrainConfig
from mil.errors import TrainingDivergedError
from mil.splits.folds import make_splits
from mil.training import resume as unfinished_module
from mil.training.loop import train_replica
from mil.training.replica import EpochRecord, Replica, TrainedReplica
from mil.training.replicas import Progress, train_replicas
from mil.training.resume import UnfinishedTraining, kept_replicas
from mil.training.stackable import is_stackable, stacks
from mil.training.stacked import train_stacked
from tests.test_mil.small import DIM, fast_config, make_cohort, make_features

COHORT = make_cohort(n_patients=15)
BAGS = Bags(COHORT.slide_ids, make_features(len(COHORT), COHORT.labels))
SPLITS = make_splits(COHORT, 3, 0, (0, 1), 0.25)
CPU = torch.device("cpu")
HEADS = {
    "mean": ["head=mean"],
    "max": ["head=max"],
    "abmil": ["head=abmil", "head.embed_dim=8", "head.attention_dim=4"],
    "abmil without dropout": ["head=abmil", "head.embed_dim=8", "head.attention_dim=4", "head.dropout=0"],
    "additive": ["head=additive", "head.embed_dim=8", "head.attention_dim=4"],
    "chowder": ["head=chowder", "head.hidden_dims=[4]", "head.dropout=0.3"],
    "ilra": ["head=ilra", "head.embed_dim=8", "head.heads=2", "head.rank=3", "head.dropout=0.2"],
    "instance_max": ["head=instance_max", "head.dropout=0.2"],
    "lse": ["head=lse", "head.dropout=0.5"],
    "noisy_or": ["head=noisy_or", "head.dropout=0.2"],
    "topk": ["head=topk", "head.dropout=0"],
    "transformer": ["head=transformer", "head.embed_dim=8", "head.heads=2"],
    "transmil": ["head=transmil", "head.embed_dim=8", "head.heads=2", "head.landmarks=2"],
}


@cache
def _config(head: str, *more: str) -> TrainConfig:
    return compose_config([*HEADS[head], "epochs=6", "optimizer.lr=0.02", "device=cpu", "batch_bags=5", *more])


def _both(
    head: str, *more: str, rates: tuple[float, ...] = (0.02,)
) -> tuple[list[TrainedReplica], list[TrainedReplica]]:
    """Three folds, each with several learning rates: one by one, and stacked."""
    replicas = [Replica(fold, 1, _config(head, *more, f"optimizer.lr={rate}")) for fold in range(3) for rate in rates]
    parts = [SPLITS.parts(replica.fold, 1) for replica in replicas]
    alone = [
        train_replica(BAGS, COHORT.labels, replica, part, 2, CPU) for replica, part in zip(replicas, parts, strict=True)
    ]
    return alone, train_stacked(BAGS, COHORT.labels, replicas, parts, 2, CPU)


def _compare(alone: list[TrainedReplica], together: list[TrainedReplica], atol: float = 2e-4) -> None:
    for one, other in zip(alone, together, strict=True):
        assert one.replica == other.replica
        assert one.best_epoch == other.best_epoch
        assert len(one.history) == len(other.history)
        for record, expected in zip(other.history, one.history, strict=True):
            assert record.epoch == expected.epoch
            assert record.lr == pytest.approx(expected.lr)
            assert record.train_loss == pytest.approx(expected.train_loss, abs=atol)
            assert record.validation_loss == pytest.approx(expected.validation_loss, abs=atol)
        np.testing.assert_allclose(other.probabilities, one.probabilities, atol=atol)
        for name, value in one.head.state_dict().items():
            torch.testing.assert_close(other.head.state_dict()[name], value, atol=5 * atol, rtol=5 * atol)


@pytest.fixture
def double() -> Iterator[None]:
    """Heads of float64, in which rounding hides nothing."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("head", HEADS)
def test_stacked_is_one_by_one(head: str, double: None) -> None:
    # class weights are float32
    _compare(*_both(head, "grad_clip=0.5"), atol=1e-6)


def test_every_head_without_a_loss_of_its_own_is_stacked_by_default() -> None:
    alone = {"acmil", "clam_mb", "clam_sb", "dsmil", "dtfd"}
    for name in list_aggregators():
        assert is_stackable(compose_config([f"head={name}"]), create_aggregator(name, in_dim=DIM, n_classes=2)) == (
            name not in alone
        )


def test_learning_rates_and_decays_are_each_replicas_own() -> None:
    alone, together = _both("abmil", "optimizer.weight_decay=0.3", rates=(0.001, 0.05))
    _compare(alone, together)
    assert not np.allclose(together[0].probabilities, together[1].probabilities, atol=1e-3)


@pytest.mark.parametrize("more", [["grad_clip=0.05"], ["grad_clip=null"], ["class_weights=none"], ["standardize=none"]])
def test_clipping_and_weighting_are_each_replicas_own(more: list[str]) -> None:
    _compare(*_both("abmil", *more))


def test_replicas_stop_on_their_own() -> None:
    alone, together = _both("abmil", "patience=1", "epochs=20", rates=(0.001, 0.3))
    assert len({len(each.history) for each in alone}) > 1
    _compare(alone, together, atol=1e-3)


def test_budgets_and_schedules_are_shared() -> None:
    _compare(*_both("mean", "instance_budget=4", "scheduler=constant"))
    _compare(*_both("mean", "scheduler=onecycle"))


def test_train_replicas_stacks_what_it_can_and_keeps_the_order() -> None:
    configs = [_config("mean"), _config("mean", "ema=0.5")]
    replicas = [Replica(fold, seed, config) for config in configs for fold in range(2) for seed in (0, 1)]
    parts = [SPLITS.parts(replica.fold, replica.seed) for replica in replicas]
    seen: list[Progress] = []
    alone = train_replicas(BAGS, COHORT.labels, replicas, parts, 2, CPU, stacked=False)
    together = train_replicas(BAGS, COHORT.labels, replicas, parts, 2, CPU, seen.append, stacked=True)
    assert [each.replica for each in together] == replicas
    _compare(alone, together)
    done = [progress.index for progress in seen if progress.trained is not None]
    assert sorted(done) == list(range(8))
    assert {progress.index for progress in seen if progress.record is not None} == set(range(8))


def test_stacked_replicas_are_kept_when_a_training_is_stopped(tmp_path: Path) -> None:
    replicas = [Replica(fold, seed, _config("mean")) for seed in (0, 1) for fold in range(2)]
    parts = [SPLITS.parts(replica.fold, replica.seed) for replica in replicas]
    unfinished = UnfinishedTraining(tmp_path, "key")
    whole = train_replicas(BAGS, COHORT.labels, replicas, parts, 2, CPU, stacked=True)

    def stop(progress: Progress) -> None:
        if progress.trained is not None and progress.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_replicas(BAGS, COHORT.labels, replicas, parts, 2, CPU, stop, unfinished, stacked=True)
    assert kept_replicas(tmp_path) == 2
    again = train_replicas(BAGS, COHORT.labels, replicas, parts, 2, CPU, None, unfinished, stacked=True)
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)


def test_torchs_own_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _both("mean")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "overrides",
    [
        ["head=clam_sb"],  # a loss of its own
        ["head=transformer", "head.norm=batch"],  # statistics of the whole pack
        ["head=mean", "optimizer=sgd"],
        ["head=mean", "ema=0.9"],
        ["head=mean", "loss=focal"],
        ["head=mean", "sampler=class_balanced"],
        ["head=mean", "accumulate=2"],
        ["head=mean", "scheduler=plateau"],
        ["head=mean", "instance_dropout=0.2"],
    ],
)
def test_what_cannot_be_stacked_exactly_is_not(overrides: list[str]) -> None:
    config = compose_config(overrides)
    head = create_aggregator(config.head.name, in_dim=DIM, n_classes=2, **config.head.keywords)
    assert not is_stackable(config, head)


@pytest.mark.parametrize(
    ("layer", "stackable"),
    [
        (nn.Dropout(0.1), False),
        (nn.MultiheadAttention(4, 2, dropout=0.1), False),
        (nn.BatchNorm1d(4), False),
        (nn.Dropout(0.0), True),
        (nn.MultiheadAttention(4, 2), True),
        (Dropout(0.1), True),
    ],
)
def test_a_head_with_a_layer_of_torchs_that_draws_is_not_stacked(layer: nn.Module, stackable: bool) -> None:
    """What such a layer draws for a bag depends on the others in its pack."""
    head = create_aggregator("mean", in_dim=DIM, n_classes=2)
    head.theirs = layer
    assert is_stackable(compose_config(["head=mean"]), head) == stackable


def test_stacks_are_of_one_seed_and_one_recipe() -> None:
    plain, other = _config("mean"), _config("mean", "batch_bags=4")
    replicas = [Replica(fold, seed, plain) for fold in range(3) for seed in (0, 1)]
    replicas += [Replica(0, 0, other), Replica(0, 0, fast_config()), Replica(1, 0, _config("mean", "optimizer.lr=0.1"))]
    together, alone = stacks(replicas, BAGS, 2, at_once=10)
    assert together == [[0, 2, 4, 8], [1, 3, 5]]
    assert alone == [6, 7]
    smaller, rest = stacks(replicas, BAGS, 2, at_once=3)
    assert smaller == [[0, 2, 4], [1, 3, 5]]
    assert rest == [6, 7, 8]


def test_a_loss_that_is_not_finite_names_the_replica() -> None:
    replicas = [Replica(fold, 0, _config("mean", "optimizer.lr=1e30", "grad_clip=null")) for fold in range(2)]
    parts = [SPLITS.parts(replica.fold, 0) for replica in replicas]
    with pytest.raises(TrainingDivergedError, match=r"replica fold\d-seed0, epoch \d"):
        train_stacked(BAGS, COHORT.labels, replicas, parts, 2, CPU)


@pytest.mark.parametrize("at", [1, 3])
def test_a_stack_goes_on_from_its_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(unfinished_module, "SAVE_EVERY_S", 0.0)
    replicas = [
        Replica(fold, 0, _config("abmil", f"optimizer.lr={rate}")) for fold in range(2) for rate in (0.01, 0.03)
    ]
    parts = [SPLITS.parts(replica.fold, replica.seed) for replica in replicas]
    whole = train_stacked(BAGS, COHORT.labels, replicas, parts, 2, CPU)
    saved = UnfinishedTraining(tmp_path, "key").stack(replicas)

    def stop(place: int, record: EpochRecord) -> None:
        if record.epoch == at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stacked(BAGS, COHORT.labels, replicas, parts, 2, CPU, stop, saved)
    epochs: list[int] = []
    again = train_stacked(
        BAGS, COHORT.labels, replicas, parts, 2, CPU, lambda place, record: epochs.append(record.epoch), saved
    )
    assert epochs[0] == at + 1
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
        assert one.best_epoch == other.best_epoch


def test_a_stack_that_does_not_fit_is_trained_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    replicas = [Replica(fold, 0, _config("mean")) for fold in range(2)]
    parts = [SPLITS.parts(replica.fold, replica.seed) for replica in replicas]
    alone = train_replicas(BAGS, COHORT.labels, replicas, parts, 2, CPU, stacked=False)
    monkeypatch.setattr("mil.training.replicas.train_stacked", full)
    with pytest.warns(UserWarning, match="one by one"):
        together = train_replicas(BAGS, COHORT.labels, replicas, parts, 2, CPU, stacked=True)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)
