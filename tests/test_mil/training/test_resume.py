"""A training that was stopped goes on and ends with the numbers of one that was not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mil.bags.bags import Bags
from mil.experiments.crossval import cross_validate
from mil.runs.run import Run
from mil.splits.folds import make_splits
from mil.training import loop as training
from mil.training import resume as unfinished
from mil.training.replicas import Progress
from mil.training.resume import kept_replicas, training_key
from tests.test_mil.small import MemoryStore, fast_config, make_cohort, make_store

COHORT = make_cohort()
CONFIG = fast_config("folds=2", "seeds=2", "head.dropout=0.3")


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return make_store(COHORT)


@pytest.fixture(scope="module")
def whole(store: MemoryStore) -> Run:
    return cross_validate(store, COHORT, CONFIG)


class Stop(Exception):
    """Ends a training from within."""


def _same(a: Run, b: Run) -> None:
    np.testing.assert_array_equal(a.predictions.probabilities, b.predictions.probabilities)
    for one, other in zip(a.trained, b.trained, strict=True):
        assert one.best_epoch == other.best_epoch
        records = [[(r.epoch, r.lr, r.train_loss, r.validation_loss) for r in each.history] for each in (one, other)]
        assert records[0] == records[1]
        for name, value in one.head.state_dict().items():
            assert torch.equal(value, other.head.state_dict()[name]), name


def test_finished_replicas_are_not_trained_again(store: MemoryStore, whole: Run, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.trained is not None and progress.index == 1:
            raise Stop

    with pytest.raises(Stop):
        cross_validate(store, COHORT, CONFIG, stop, tmp_path)
    assert kept_replicas(tmp_path) == 2
    trained = []
    again = cross_validate(store, COHORT, CONFIG, lambda p: trained.append(p.index) if p.record else None, tmp_path)
    assert set(trained) == {2, 3}
    _same(again, whole)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_replica_goes_on_from_its_last_epoch(
    store: MemoryStore, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 0.0)

    def stop(progress: Progress) -> None:
        if progress.record is not None and progress.record.epoch == at + 1:
            raise Stop

    with pytest.raises(Stop):
        cross_validate(store, COHORT, CONFIG, stop, tmp_path)
    assert kept_replicas(tmp_path) == 0
    epochs = []
    again = cross_validate(store, COHORT, CONFIG, lambda p: epochs.append(p.record and p.record.epoch), tmp_path)
    assert epochs[0] == at + 1
    _same(again, whole)
    assert not list(tmp_path.glob("*/*.epoch"))


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    "recipe",
    [
        ["recipe=strong", "batch_bags=4", "accumulate=2"],
        ["optimizer=ranger", "scheduler=plateau", "scheduler.patience=0", "sampler=class_balanced"],
        ["optimizer=muon", "scheduler=onecycle", "loss=focal", "ema=0.9"],
    ],
)
def test_every_state_of_a_recipe_is_gone_on_from(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: list[str], at: int
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 0.0)
    config = fast_config(*recipe, "folds=2", "seeds=1", "epochs=5", "head.dropout=0.3")

    def stop(progress: Progress) -> None:
        if progress.record is not None and progress.record.epoch == at + 1:
            raise Stop

    with pytest.raises(Stop):
        cross_validate(store, COHORT, config, stop, tmp_path)
    epochs = []
    again = cross_validate(store, COHORT, config, lambda p: epochs.append(p.record and p.record.epoch), tmp_path)
    assert epochs[0] == at + 1
    _same(again, cross_validate(store, COHORT, config))


@pytest.mark.parametrize("kind", ["replica", "epoch"])
def test_damaged_files_count_as_absent(
    store: MemoryStore, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 0.0)
    last = 1 if kind == "replica" else 0

    def stop(progress: Progress) -> None:
        if progress.index == last and progress.record is not None and progress.record.epoch == 3:
            raise Stop

    with pytest.raises(Stop):
        cross_validate(store, COHORT, CONFIG, stop, tmp_path)
    (file,) = tmp_path.glob(f"*/fold0-seed0.{kind}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    _same(cross_validate(store, COHORT, CONFIG, None, tmp_path), whole)


@pytest.mark.parametrize("change", ["optimizer.lr=0.02", "head.embed_dim=6", "split_seed=3", "epochs=3"])
def test_other_settings_find_nothing(store: MemoryStore, whole: Run, tmp_path: Path, change: str) -> None:
    cross_validate(store, COHORT, CONFIG, None, tmp_path)
    other = fast_config("folds=2", "seeds=2", "head.dropout=0.3", change)
    trained = []
    cross_validate(store, COHORT, other, lambda p: trained.append(p.index) if p.record else None, tmp_path)
    assert set(trained) == {0, 1, 2, 3}


def test_other_features_find_nothing(store: MemoryStore, tmp_path: Path) -> None:
    cross_validate(store, COHORT, CONFIG, None, tmp_path)
    slides = dict(store.slides)
    name = next(iter(slides))
    slides[name] = slides[name].copy()
    slides[name][0, 0] += 1
    trained = []
    cross_validate(
        MemoryStore(slides), COHORT, CONFIG, lambda p: trained.append(p.index) if p.record else None, tmp_path
    )
    assert set(trained) == {0, 1, 2, 3}


def test_saving_waits(tmp_path: Path) -> None:
    saved = unfinished.SavedEpochFile(tmp_path / "a" / "b.epoch")
    assert saved.load() is None
    assert not saved.due()
    saved.save({"x": torch.arange(3)})
    state = saved.load()
    assert state is not None
    assert state["x"].tolist() == [0, 1, 2]
    assert training.SavedEpoch  # what replicas ask of it


def test_other_views_or_coords_are_another_training() -> None:
    matrices = list(make_store(COHORT).slides.values())
    plain = Bags(COHORT.slide_ids, matrices)
    views = [Bags(COHORT.slide_ids, matrices, views=[[matrix + add for matrix in matrices]]) for add in (1, 2)]
    coords = [Bags(COHORT.slide_ids, matrices, coords=[np.full((len(m), 2), at) for m in matrices]) for at in (0, 1)]
    splits = make_splits(COHORT, 2, 0, (0, 1), 0.2)
    keys = {training_key(CONFIG, COHORT, splits, bags, torch.device("cpu")) for bags in (plain, *views, *coords)}
    assert len(keys) == 5
