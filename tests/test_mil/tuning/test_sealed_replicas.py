"""Replicas of a sweep are kept without their test predictions, trained one by one or together."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mil.bags.bags import Bags
from mil.config.compose import compose_config
from mil.config.train import TrainConfig
from mil.splits.folds import make_splits
from mil.training import resume
from mil.training.replica import EpochRecord, Replica, TrainedReplica
from mil.training.replicas import Progress, train_replicas
from mil.training.stacked import train_stacked
from mil.tuning.sealed_replicas import SealedReplicas
from mil.tuning.sweep import sweep
from tests.test_mil.small import MemoryStore, make_cohort, make_features

COHORT = make_cohort(n_patients=15)
BAGS = Bags(COHORT.slide_ids, make_features(len(COHORT), COHORT.labels))
SPLITS = make_splits(COHORT, 3, 0, (0, 1), 0.25)
CPU = torch.device("cpu")
REPLICAS = [
    Replica(fold, 0, compose_config(["head=mean", "epochs=4", "device=cpu", f"optimizer.lr={rate}"]))
    for fold in range(2)
    for rate in (0.01, 0.03)
]
PARTS = [SPLITS.parts(replica.fold, replica.seed) for replica in REPLICAS]


def _key(config: TrainConfig) -> str:
    """Such as 0.01, filled up to the length of a key."""
    return str(config.optimizer.lr).ljust(16, "0")


@pytest.fixture
def keeper(tmp_path: Path) -> SealedReplicas:
    return SealedReplicas(tmp_path, _key, SPLITS)


def _train(keeper: SealedReplicas | None, stacked: bool, stop: bool = False) -> list[TrainedReplica]:
    def tell(progress: Progress) -> None:
        if stop and progress.trained is not None and progress.index == 1:
            raise KeyboardInterrupt

    return train_replicas(BAGS, COHORT.labels, REPLICAS, PARTS, 2, CPU, tell, keeper, stacked=stacked)


@pytest.mark.parametrize("stacked", [False, True])
def test_keeping_changes_no_result_and_seals_the_test_part(keeper: SealedReplicas, stacked: bool) -> None:
    expected, found = _train(None, stacked), _train(keeper, stacked)
    for one, other, part in zip(expected, found, PARTS, strict=True):
        np.testing.assert_array_equal(other.probabilities, one.probabilities)
        kept = keeper.load(one.replica, BAGS, 2)
        assert kept is not None
        assert np.isnan(kept.probabilities[part == "test"]).all()
        np.testing.assert_array_equal(kept.probabilities[part != "test"], one.probabilities[part != "test"])
        assert kept.history == other.history


def test_a_stack_that_was_stopped_goes_on(
    keeper: SealedReplicas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "SAVE_EVERY_S", 0.0)
    whole, epochs = _train(None, stacked=True), []

    def stop(place: int, record: EpochRecord) -> None:
        if record.epoch == 3:
            raise KeyboardInterrupt

    def tell(place: int, record: EpochRecord) -> None:
        epochs.append(record.epoch)

    with pytest.raises(KeyboardInterrupt):
        train_stacked(BAGS, COHORT.labels, REPLICAS, PARTS, 2, CPU, stop, keeper.stack(REPLICAS))
    saved = keeper.stack(REPLICAS)
    again = train_stacked(BAGS, COHORT.labels, REPLICAS, PARTS, 2, CPU, tell, saved)
    assert min(epochs) == 3
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(other.probabilities, one.probabilities)
    saved.discard()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_stacks_of_other_settings_keep_their_states_apart(keeper: SealedReplicas) -> None:
    """Their replicas have the same names: fold0-seed0, fold1-seed0."""
    slow, fast = ([each for each in REPLICAS if each.config.optimizer.lr == rate] for rate in (0.01, 0.03))
    keeper.stack(slow).save({"epoch": 1})
    assert keeper.stack(fast).load() is None
    assert keeper.stack(slow).load() == {"epoch": 1}


def test_a_setting_is_forgotten_in_one_fold_alone(keeper: SealedReplicas) -> None:
    _train(keeper, stacked=False)
    keeper.discard(_key(REPLICAS[0].config), 0)
    assert [keeper.load(replica, BAGS, 2) is None for replica in REPLICAS] == [True, False, False, False]


def test_what_was_finished_before_a_stop_is_not_trained_again(keeper: SealedReplicas) -> None:
    with pytest.raises(KeyboardInterrupt):
        _train(keeper, stacked=True, stop=True)
    assert [keeper.load(replica, BAGS, 2) is not None for replica in REPLICAS] == [True, True, False, False]
    for one, other, part in zip(_train(None, stacked=True), _train(keeper, stacked=True), PARTS, strict=True):
        inside = part != "test"
        np.testing.assert_allclose(other.probabilities[inside], one.probabilities[inside], atol=1e-5)


def test_a_sweep_whose_replicas_are_stacked_ends_as_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a GPU, where stacking is the default."""
    store = MemoryStore(dict(zip(COHORT.slide_ids, make_features(len(COHORT), COHORT.labels), strict=True)))
    run = partial(sweep, store, COHORT, {"optimizer.lr": [1e-3, 3e-2]}, folds=3, seeds=1, epochs=3, device="cpu")
    alone = run(tmp_path / "alone")
    monkeypatch.setattr("mil.tuning.trials.train_replicas", partial(train_replicas, stacked=True))
    together = run(tmp_path / "together")
    assert [each.setting.values for each in together.chosen] == [each.setting.values for each in alone.chosen]
    for one, other in zip(alone.trials, together.trials, strict=True):
        assert other.mean("log_loss") == pytest.approx(one.mean("log_loss"), abs=1e-4)
