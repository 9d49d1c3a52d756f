"""Packed models: what is in them, that every byte is checked, and that they predict as they were packed."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from extract.store import fingerprint
from mil.config.train import TrainConfig
from mil.deployment.artefact import Artefact, read_artefact
from mil.deployment.inference import predict
from mil.deployment.model import load_model
from mil.deployment.packing import pack
from mil.errors import CheckpointError, MilError, RunError
from mil.evaluation.abstention_rule import abstention_of, choose_coverage
from mil.evaluation.temperature import apply_temperature, fit_temperature, scale_temperatures
from mil.experiments.crossval import train
from mil.files import write_csv
from mil.runs.folders import refuse_artefact
from mil.runs.lineage import TrainingCohort, overlap, read_lineage, read_training_cohort
from mil.runs.run import Run
from mil.runs.run_folder import read_predictions
from tests.test_mil.small import FEATURES, MemoryStore, make_cohort, make_store

COHORT = make_cohort(18)
HEAD = {"name": "abmil", "embed_dim": 8, "attention_dim": 4}


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return make_store(COHORT)


@pytest.fixture(scope="module")
def run(store: MemoryStore, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train(store, COHORT, head=HEAD, folds=3, seeds=2, epochs=2, device="cpu").save(folder)


@pytest.fixture(scope="module")
def artefact(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return pack(run.folder, tmp_path_factory.mktemp("models") / "model", coverage=0.75)


def test_a_saved_run_comes_back(run: Run) -> None:
    found = read_predictions(run.folder)
    assert found.cohort.slide_ids == COHORT.slide_ids
    assert found.cohort.patient_ids == COHORT.patient_ids
    assert [each.name for each in found.replicas] == [each.replica.name for each in run.trained]
    np.testing.assert_array_equal(found.parts, run.predictions.parts)
    np.testing.assert_allclose(found.probabilities, run.predictions.probabilities, rtol=1e-8)


def test_temperatures_are_those_of_each_replicas_own_validation_part(run: Run, artefact: Artefact) -> None:
    assert len(artefact.temperatures) == 6
    for each, parts in zip(run.trained, run.predictions.parts, strict=True):
        validates = parts == "validation"
        expected = fit_temperature(each.probabilities[validates], COHORT.labels[validates])
        assert artefact.temperatures[each.replica.name] == pytest.approx(expected, rel=1e-5)


def test_it_predicts_the_mean_of_its_scaled_replicas(run: Run, artefact: Artefact, store: MemoryStore) -> None:
    scaled = [apply_temperature(each.probabilities, artefact.temperatures[each.replica.name]) for each in run.trained]
    found = predict(artefact.folder, store, device="cpu")
    np.testing.assert_allclose(found.probabilities, np.mean(scaled, axis=0), rtol=1e-5)
    assert found.abstain_below == artefact.abstain_below
    np.testing.assert_array_equal(found.abstained, found.probabilities.max(axis=1) < artefact.abstain_below)


def test_without_calibration_it_predicts_as_the_run(run: Run, store: MemoryStore, tmp_path: Path) -> None:
    artefact = pack(run.folder, tmp_path / "model", calibrate=False)
    assert set(artefact.temperatures.values()) == {1.0}
    assert artefact.abstain_below is None
    found, expected = (predict(each, store, device="cpu") for each in (artefact.folder, run.folder))
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    assert not found.abstained.any()


def test_the_threshold_is_chosen_on_validation_slides_alone(run: Run, artefact: Artefact) -> None:
    scaled = scale_temperatures(run.predictions).predictions
    validates = scaled.parts == "validation"
    chosen = []
    for at in np.flatnonzero(validates.any(axis=0)):
        chosen.append(scaled.probabilities[validates[:, at], at].mean(axis=0).max())
    ranked = sorted(chosen, reverse=True)
    assert artefact.abstain_below == pytest.approx(ranked[int(np.ceil(0.75 * len(ranked))) - 1], rel=1e-5)
    assert artefact.record["abstention"]["validation"]["coverage"] >= 0.75
    assert artefact.record["abstention"]["out_of_fold"]["n_slides"] == len(COHORT)


def test_the_record_says_what_a_hospital_must_know(run: Run, artefact: Artefact) -> None:
    record = json.loads((artefact.folder / "model.json").read_text())
    assert record["class_names"] == list(COHORT.class_names)
    assert record["intended_scale"] == {"mpp": 0.5, "tile_px": 224}
    assert record["backbone"] == {"name": "tiny", "weights_sha256": FEATURES.weights_sha256}
    assert record["feature_fingerprint"] == fingerprint(FEATURES)
    assert record["data"]["classes"]["Luminal A"] == {"slides": 18, "patients": 9}
    assert record["out_of_fold"]["n_patients"] == 18
    assert record["out_of_fold_uncalibrated"]["macro_f1"] == run.metrics["out_of_fold"]["macro_f1"]
    files = {path.relative_to(artefact.folder).as_posix() for path in artefact.folder.rglob("*") if path.is_file()}
    assert set(record["files"]) == files - {"model.json"}


def write_fixed_split(folder: Path) -> Path:
    """CLAM's file of one fold: slides 00 to 05 are in no part, and one slide is in no cohort."""
    ids = [slide_id for at, slide_id in enumerate(COHORT.slide_ids) if at >= 6]
    columns = [ids[:18], ids[18:24], [*ids[24:], "stranger 1"]]
    rows = [",".join([str(at), *(each[at] if at < len(each) else "" for each in columns)]) for at in range(18)]
    folder.mkdir()
    (folder / "splits_0.csv").write_text("\n".join([",train,val,test", *rows]) + "\n")
    return folder


def test_no_id_and_no_path_leaves_the_house(store: MemoryStore, tmp_path: Path) -> None:
    split = write_fixed_split(tmp_path / "secret splits")
    options = {"head": "mean", "seeds": 1, "epochs": 1, "device": "cpu", "split": "fixed", "split_file": str(split)}
    folder = train(store, COHORT, **options).save(tmp_path / "secret place").folder
    assert "'slide 00'" in (folder / "metrics.json").read_text()
    paths = [name for name, kind in get_type_hints(TrainConfig).items() if Path in (kind, *get_args(kind))]
    assert {"store", "labels", "init", "split_file"} <= set(paths)
    for file in (folder / "checkpoints").glob("*.json"):
        record = json.loads(file.read_text())
        record["config"] |= {name: str(tmp_path / "secret place" / name) for name in paths}
        file.write_text(json.dumps(record))
    artefact = pack(folder, tmp_path / "model", coverage=0.9)
    assert any("in no part of any fold" in text for text in artefact.record["warnings"])
    for path in artefact.folder.rglob("*"):
        content = b"" if path.is_dir() else path.read_bytes()
        for secret in (b"secret", b"cohort.zarr", b"slide 0", b"stranger", b'"p3"', str(tmp_path).encode()):
            assert secret not in content, (path, secret)


def test_counts_are_of_the_whole_cohort_and_of_each_part(store: MemoryStore, tmp_path: Path) -> None:
    options = {"head": "mean", "seeds": 1, "epochs": 1, "device": "cpu", "split": "fixed"}
    split = str(write_fixed_split(tmp_path / "splits"))
    folder = train(store, COHORT, split_file=split, **options).save(tmp_path / "run").folder
    artefact = pack(folder, tmp_path / "model")
    assert artefact.record["data"]["n_slides"] == 36
    assert artefact.record["data"]["parts"] == {"train": 18, "validation": 6, "test": 6}
    assert artefact.record["out_of_fold"]["n_slides"] == 6
    card = (artefact.folder / "README.md").read_text(encoding="utf-8")
    assert "18 slides trained some replica, 6 validated one, 6 tested one" in card
    lines = (folder / "oof.csv").read_text().splitlines(keepends=True)
    (folder / "oof.csv").write_text("".join(lines[:-2]))
    with pytest.raises(RunError, match="test different slides"):
        read_predictions(folder)


def test_where_a_fold_can_choose_no_threshold_there_is_no_figure(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run")
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    header = rows[0]
    fold, part, target = (header.index(name) for name in ("fold", "split", "target"))
    for row in rows[1:]:
        right = header[target + 1 :].index(f"p_{row[target]}")
        # fold 1 is always wrong where it validates, the others never
        wrong = row[fold] == "1" and row[part] == "validation"
        row[target + 1 :] = ["0.9", "0.1"] if right == int(wrong) else ["0.1", "0.9"]
    write_csv(folder / "predictions.csv", [tuple(row) for row in rows])
    artefact = pack(folder, tmp_path / "model", accuracy=0.3, calibrate=False)
    assert artefact.record["abstention"]["out_of_fold"] is None
    assert "validation slides of fold 1" in artefact.record["abstention"]["out_of_fold_missing"]
    card = (artefact.folder / "README.md").read_text(encoding="utf-8")
    assert "There are no figures out of fold: no confidence reaches accuracy 0.3" in card


def test_slides_may_have_thresholds_of_their_own() -> None:
    labels, values = np.array([0, 0, 1]), np.array([[0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
    found = abstention_of(labels, values, np.array([0.7, 0.7, 0.7]))
    assert found == abstention_of(labels, values, 0.7) | {"below": None}
    assert abstention_of(labels, values, np.array([0.9, 0.5, 0.9]))["n_answered"] == 1


def files_of(folder: Path) -> list[str]:
    return ["model.json", *json.loads((folder / "model.json").read_text())["files"]]


def test_every_byte_of_every_file_is_checked(run: Run, store: MemoryStore, tmp_path: Path) -> None:
    folder = pack(run.folder, tmp_path / "model").folder
    for name in files_of(folder):
        path = folder / name
        content = path.read_bytes()
        at = content.index(b'"target"') + 12 if name == "model.json" else len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointError):
            read_artefact(folder)
        path.unlink()
        with pytest.raises(MilError):
            predict(folder, store, device="cpu")
        path.write_bytes(content)
    assert read_artefact(folder).replicas == load_model(folder).names


@pytest.mark.parametrize("field", ["temperature", "below", "mpp"])
def test_an_edited_number_is_noticed(run: Run, tmp_path: Path, field: str) -> None:
    folder = pack(run.folder, tmp_path / "model", abstain_below=0.6).folder
    record = json.loads((folder / "model.json").read_text())
    place = {"temperature": record["replicas"][0], "below": record["abstention"], "mpp": record["tile_recipe"]}[field]
    place[field] = 0.75
    (folder / "model.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="not as it was packed"):
        read_artefact(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"abstain_below": 1.5}, "above 0 and at most 1"),
        ({"coverage": 0.0}, "above 0 and at most 1"),
        ({"coverage": 0.9, "abstain_below": 0.5}, "give one"),
    ],
)
def test_an_impossible_threshold_is_refused(run: Run, tmp_path: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(RunError, match=message):
        pack(run.folder, tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def lose_a_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "fold0-seed0.safetensors").unlink()


def cut_the_predictions(folder: Path) -> None:
    path = folder / "predictions.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))


def lose_the_splits(folder: Path) -> None:
    (folder / "splits.csv").unlink()


@pytest.mark.parametrize("harm", [lose_a_checkpoint, cut_the_predictions, lose_the_splits])
def test_a_damaged_run_is_not_packed(store: MemoryStore, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    run = train(store, COHORT, head="mean", folds=2, seeds=1, epochs=1, device="cpu").save(tmp_path / "run")
    harm(run.folder)
    with pytest.raises(RunError):
        pack(run.folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_is_in_the_way_or_absent_is_named(run: Run, artefact: Artefact, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not empty"):
        pack(run.folder, artefact.folder)
    with pytest.raises(RunError, match=r"no metrics\.json"):
        pack(tmp_path / "nowhere", tmp_path / "model")
    with pytest.raises(RunError, match="mil pack wrote"):
        read_artefact(tmp_path)
    with pytest.raises(RunError, match=r"a model that mil pack wrote.*expected the --out folder"):
        pack(artefact.folder, tmp_path / "model")
    with pytest.raises(RunError, match="expected what I need"):
        refuse_artefact(artefact.folder, "what I need")
    refuse_artefact(run.folder)
    (tmp_path / "model.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99"):
        read_artefact(tmp_path)


def test_coverage_is_at_least_what_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    top = rng.uniform(0.5, 1, 40).round(1)
    values = np.stack([top, 1 - top], axis=1)
    labels = rng.integers(0, 2, 40)
    for coverage in (0.1, 0.3, 0.5, 0.9, 1.0):
        below = choose_coverage(values, coverage)
        assert abstention_of(labels, values, below)["coverage"] >= coverage
        higher = values.max(axis=1)[values.max(axis=1) > below]
        assert len(higher) / 40 < coverage


def test_nothing_answered_has_no_accuracy() -> None:
    found = abstention_of(np.array([0]), np.array([[0.6, 0.4]]), 0.9)
    assert found["coverage"] == 0
    assert found["accuracy"] is None


def test_the_training_cohort_knows_its_own_and_no_others(run: Run, artefact: Artefact) -> None:
    for known in (read_training_cohort(run.folder), *read_lineage(artefact.folder).cohorts):
        slides, patients = overlap([known], ["x/SLIDE 03.svs", "slide 99"], ["p3", "p99"])
        assert slides.tolist() == patients.tolist() == [True, False]
    salted = [TrainingCohort.of(["a"], ["p"], salt) for salt in ("1", "2")]
    assert salted[0].slides.isdisjoint(salted[1].slides)


def test_heads_come_back_exactly(run: Run, artefact: Artefact) -> None:
    instances = torch.randn(5, 6)
    for each, head in zip(run.trained, load_model(artefact.folder).heads, strict=True):
        assert torch.equal(each.head(instances).logits, head(instances).logits)


def test_a_fixed_split_packs_with_its_untested_slides(store: MemoryStore, tmp_path: Path) -> None:
    words = ("train", "train", "train", "val", "val", "test")
    part = {patient: words[at // 2 % 6] for at, patient in enumerate(dict.fromkeys(COHORT.patient_ids))}
    lines = [
        f"{slide},{patient},{COHORT.class_names[label]},{part[patient]}"
        for slide, patient, label in zip(COHORT.slide_ids, COHORT.patient_ids, COHORT.labels, strict=True)
    ]
    table = tmp_path / "labels.csv"
    table.write_text("slide_id,patient_id,subtype,part\n" + "\n".join(lines) + "\n")
    options = {"split": "fixed", "split_column": "part", "labels": str(table), "seeds": 2, "epochs": 2, "device": "cpu"}
    saved = train(store, COHORT, head=HEAD, **options).save(tmp_path / "run")
    found = read_predictions(saved.folder)
    assert found.cohort.slide_ids == COHORT.slide_ids
    assert set(found.parts.ravel()) == {"train", "validation", "test"}
    packed = pack(saved.folder, tmp_path / "model", coverage=0.8)
    record = json.loads((packed.folder / "model.json").read_text())
    assert record["data"]["n_slides"] == len(COHORT)
    tested = sum(part[patient] == "test" for patient in COHORT.patient_ids)
    assert record["out_of_fold"]["n_slides"] == record["abstention"]["out_of_fold"]["n_slides"] == tested


def test_the_abstention_figure_owes_nothing_to_the_slides_it_is_scored_on(run: Run, tmp_path: Path) -> None:
    said = read_predictions(run.folder)
    record = json.loads(
        (pack(run.folder, tmp_path / "m", coverage=0.6, calibrate=False).folder / "model.json").read_text()
    )
    answered = 0
    for fold in range(3):
        mine = np.array([replica.fold == fold for replica in said.replicas])
        held = {part: (said.parts[mine] == part).astype(float) for part in ("validation", "test")}
        means = {
            part: (w[:, :, None] * said.probabilities[mine]).sum(0)[w.any(0)] / w.sum(0)[w.any(0), None]
            for part, w in held.items()
        }
        answered += int((means["test"].max(1) >= choose_coverage(means["validation"], 0.6)).sum())
    assert record["abstention"]["out_of_fold"]["n_answered"] == answered
