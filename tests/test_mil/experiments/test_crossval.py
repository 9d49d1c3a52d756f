"""From store and cohort to a run folder."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mil.cohort.cohort import Cohort
from mil.config.compose import compose_config
from mil.errors import BagError, ConfigError, RunError
from mil.experiments.crossval import run_training, train
from mil.reports.report import write_report
from mil.runs.look_ledger import LEDGER
from mil.runs.run import Run, check_folder
from mil.splits.tables import read_splits
from mil.statistics.classification import evaluate
from tests.test_mil.small import FAST, FEATURES, MemoryStore, make_cohort, make_store

COHORT = make_cohort()


def _overrides(**options: object) -> dict[str, object]:
    head = {"name": "abmil", "embed_dim": 8, "attention_dim": 4}
    return {"head": head, "folds": 3, "seeds": 2, "epochs": 3, "device": "cpu", "optimizer": {"lr": 0.02}} | options


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return make_store(COHORT)


@pytest.fixture(scope="module")
def run(store: MemoryStore) -> Run:
    return train(store, COHORT, **_overrides())


def _table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_slide_is_tested_once_per_seed(run: Run) -> None:
    tested = run.predictions.parts == "test"
    seeds = np.array([replica.seed for replica in run.predictions.replicas])
    for seed in (0, 1):
        assert (tested[seeds == seed].sum(axis=0) == 1).all()
    assert [replica.name for replica in run.predictions.replicas] == [
        f"fold{f}-seed{s}" for f in range(3) for s in (0, 1)
    ]


def test_out_of_fold_is_the_mean_over_seeds_of_the_test_part(run: Run) -> None:
    out_of_fold = run.predictions.out_of_fold()
    for slide, fold in enumerate(run.splits.test_fold):
        rows = [each.probabilities[slide] for each in run.trained if each.replica.fold == fold]
        assert len(rows) == 2
        np.testing.assert_allclose(out_of_fold[slide], np.mean(rows, axis=0))


def test_metrics_are_those_of_the_out_of_fold_predictions(run: Run) -> None:
    expected = evaluate(COHORT.labels, run.predictions.out_of_fold(), COHORT.patient_ids, COHORT.class_names)
    assert run.metrics["out_of_fold"] == expected
    assert run.metrics["n_replicas"] == len(run.metrics["per_replica"]) == 6
    assert run.metrics["class_names"] == ["Luminal A", "triple-negative"]
    assert (run.metrics["entry"], run.metrics["head"], run.metrics["looks"]) == ("tiny", "abmil", 1)


def test_the_run_folder_holds_what_it_promises(run: Run, tmp_path: Path) -> None:
    saved = run.save(tmp_path / "a run ü")
    folder = saved.folder
    assert folder == tmp_path / "a run ü"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    checkpoints = {
        f"checkpoints/fold{f}-seed{s}.{x}" for f in range(3) for s in (0, 1) for x in ("json", "safetensors")
    }
    tables = {"config.yaml", "splits.csv", "predictions.csv", "history.csv", "oof.csv", "metrics.json"}
    assert names == tables | checkpoints
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(saved.metrics))
    assert compose_config([], folder / "config.yaml") == run.config


def test_tables_hold_every_slide_with_its_parts_and_probabilities(run: Run, tmp_path: Path) -> None:
    folder = run.save(tmp_path / "run").folder
    predictions = _table(folder / "predictions.csv")
    assert len(predictions) == 6 * len(COHORT)
    assert set(predictions[0]) == {
        *("slide_id", "patient_id", "replica", "fold", "seed", "split", "target"),
        *("p_Luminal A", "p_triple-negative"),
    }
    parts = read_splits(folder / "splits.csv", COHORT)
    for row in predictions:
        at = COHORT.slide_ids.index(row["slide_id"])
        assert row["split"] == parts.parts(int(row["fold"]), int(row["seed"]))[at]
        assert row["target"] == COHORT.class_names[COHORT.labels[at]]
    out_of_fold = _table(folder / "oof.csv")
    assert [row["slide_id"] for row in out_of_fold] == list(COHORT.slide_ids)
    values = np.array([[float(row[f"p_{name}"]) for name in COHORT.class_names] for row in out_of_fold])
    np.testing.assert_allclose(values, run.predictions.out_of_fold(), rtol=1e-8)
    assert [row["predicted"] for row in out_of_fold] == [COHORT.class_names[i] for i in values.argmax(axis=1)]
    history = _table(folder / "history.csv")
    assert len(history) == sum(len(each.history) for each in run.trained)


def test_the_same_config_gives_the_same_bytes(run: Run, store: MemoryStore, tmp_path: Path) -> None:
    first = run.save(tmp_path / "one").folder
    second = train(store, COHORT, **_overrides()).save(tmp_path / "two").folder
    for name in ("predictions.csv", "oof.csv", "splits.csv", "config.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    for name in ("fold0-seed0", "fold2-seed1"):
        file = Path("checkpoints") / f"{name}.safetensors"
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_looks_are_counted_per_cohort_beside_the_runs(run: Run, tmp_path: Path) -> None:
    assert [run.save(tmp_path / name).metrics["looks"] for name in "abc"] == [1, 2, 3]
    assert run.save(tmp_path / "a", overwrite=True).metrics["looks"] == 4
    other = make_cohort()
    relabelled = Cohort(
        other.slide_ids, other.patient_ids, 1 - other.labels, other.class_names, other.target, other.attrition
    )
    second = train(make_store(other), relabelled, **_overrides(seeds=1, epochs=1))
    assert second.save(tmp_path / "other").metrics["looks"] == 1
    assert run.save(tmp_path / "elsewhere" / "a").metrics["looks"] == 1
    lines = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert [Path(line["run"]).name for line in lines] == ["a", "b", "c", "a", "other"]


def test_a_folder_that_is_taken_is_refused_and_kept(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run.save(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="overwrite"):
        run.save(tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    with pytest.raises(RunError, match=r"notes\.txt"):
        run.save(tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    (tmp_path / "run" / "notes.txt").unlink()
    (tmp_path / "run" / "report.html").write_text("old")
    run.save(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "report.html").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        run.save(tmp_path / "file", overwrite=True)
    with pytest.raises(RunError, match="another folder"):
        run.save(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "at", ["runs.run.write_csv", "runs.run.save_checkpoint", "runs.run.write_json", "files._put_in_place"]
)
@pytest.mark.parametrize("older", [False, True])
def test_a_killed_save_leaves_no_run_that_looks_whole(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, older: bool
) -> None:
    folder = tmp_path / "run"
    if older:
        run.save(folder)
        (folder / "report.html").write_text("old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"mil.{at}", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save(folder, overwrite=True)
    assert (folder / "report.html").exists() == older == folder.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"run", LEDGER}


def test_a_full_disk_is_said_so(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mil.runs.run.save_checkpoint", full)
    with pytest.raises(RunError, match="No space left"):
        run.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_run_training_goes_from_files_to_a_folder(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mil.experiments.crossval.open_store", lambda path: store)
    rows = [
        f"{s},{p},{COHORT.class_names[y]}"
        for s, p, y in zip(COHORT.slide_ids, COHORT.patient_ids, COHORT.labels, strict=True)
    ]
    labels = tmp_path / "labels ü.csv"
    labels.write_text("\n".join(["slide_id,patient_id,subtype", *rows, "absent,p99,triple-negative"]), encoding="utf-8")
    values = {"store": "x.zarr", "labels": labels, "target": "subtype", "folds": 3, "seeds": 1}
    config = compose_config(FAST, values=values)
    run = run_training(config, tmp_path / "run")
    again = run_training(compose_config([], tmp_path / "run" / "config.yaml"), tmp_path / "again")
    assert (run.folder / "predictions.csv").read_bytes() == (again.folder / "predictions.csv").read_bytes()
    attrition = {reason: ids for reason, _, ids in run.metrics["cohort"]["attrition"]}
    assert ["absent"] in attrition.values()
    with pytest.raises(RunError, match="not empty"):
        run_training(config, tmp_path / "run")


def test_run_training_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--labels --target"):
        run_training(compose_config(values={"store": "x.zarr"}), tmp_path / "run")


def test_an_unknown_option_and_a_store_of_several_entries_are_errors(store: MemoryStore) -> None:
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        train(store, COHORT, epoch=3)
    several = make_store(COHORT, recipes={"tiny": FEATURES, "uni2": FEATURES})
    with pytest.raises(BagError, match="backbone="):
        train(several, COHORT)
    assert train(several, COHORT, **_overrides(backbone="uni2", folds=2, seeds=1, epochs=1)).entry == "uni2"


@pytest.mark.parametrize("foreign", ["thesis.txt", "cohort.zarr"])
def test_overwriting_replaces_a_run_and_nothing_else(tmp_path, foreign):
    run = tmp_path / "run"
    run.mkdir()
    (run / foreign).write_text("mine")
    with pytest.raises(RunError, match=foreign):
        check_folder(run, overwrite=True)
    (run / "metrics.json").write_text("{}")
    with pytest.raises(RunError, match=foreign):
        check_folder(run, overwrite=True)
    (run / foreign).unlink()
    check_folder(run, overwrite=True)
    assert (run / "metrics.json").is_file()


def test_repeats_test_every_slide_more_than_once(store: MemoryStore, tmp_path: Path) -> None:
    run = train(store, COHORT, **_overrides(repeats=2, seeds=1))
    assert len(run.trained) == 6
    assert ((run.predictions.parts == "test").sum(axis=0) == 2).all()
    assert run.metrics["split"]["method"] == "kfold"
    saved = run.save(tmp_path / "run")
    assert [row["slide_id"] for row in _table(saved.folder / "oof.csv")] == list(COHORT.slide_ids)
    assert write_report(saved.folder).is_file()


def test_slides_that_a_fixed_split_leaves_untested_are_not_scored(store: MemoryStore, tmp_path: Path) -> None:
    words = ["train", "train", "val", "test"] * 6
    patients = list(dict.fromkeys(COHORT.patient_ids))
    part = {patient: words[at // 2] for at, patient in enumerate(patients)}
    lines = [
        f"{slide},{patient},{COHORT.class_names[label]},{part[patient]}"
        for slide, patient, label in zip(COHORT.slide_ids, COHORT.patient_ids, COHORT.labels, strict=True)
    ]
    table = tmp_path / "labels.csv"
    table.write_text("slide_id,patient_id,subtype,part\n" + "\n".join(lines) + "\n")
    run = train(store, COHORT, **_overrides(split="fixed", split_column="part", labels=table, seeds=1))
    tested = [slide for slide, who in zip(COHORT.slide_ids, COHORT.patient_ids, strict=True) if part[who] == "test"]
    assert run.metrics["out_of_fold"]["n_slides"] == len(tested)
    saved = run.save(tmp_path / "run")
    assert [row["slide_id"] for row in _table(saved.folder / "oof.csv")] == tested
    assert np.isnan(run.predictions.out_of_fold()).any(axis=1).sum() == len(COHORT) - len(tested)
    assert write_report(saved.folder).is_file()


def test_trackers_hear_of_epochs_and_metrics(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Listener:
        def __init__(self, *_: object) -> None:
            told.append("start")

        def __getattr__(self, name: str) -> object:
            return lambda *given: told.append(f"{name} failed" if given == (True,) else name)

    monkeypatch.setattr("mil.experiments.tracking._KINDS", {"wandb": Listener})
    run = train(store, COHORT, **_overrides(track=["wandb"], seeds=1))
    epochs = sum(len(each.history) for each in run.trained)
    assert told == ["start", *["log_epoch"] * epochs, "log_metrics", "close"]
    told.clear()

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(store, COHORT, progress=stop, **_overrides(track=["wandb"], seeds=1))
    assert told == ["start", "log_epoch", "close failed"]
