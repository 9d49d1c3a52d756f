"""Packed ensembles: what members say together, that nothing is judged where it was chosen, what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from extract.store import TileRecipe
from mil.deployment.artefact import Artefact, read_artefact
from mil.deployment.external import evaluate_external
from mil.deployment.inference import predict
from mil.deployment.model import load_model, model_folders
from mil.deployment.model_card import write_card
from mil.deployment.packing import pack
from mil.errors import CheckpointError, RunError
from mil.evaluation.abstention_rule import choose_coverage
from mil.evaluation.averaging import combine
from mil.evaluation.temperature import scale_temperatures
from mil.experiments.crossval import train
from mil.files import write_csv
from mil.runs.ensemble import make_ensemble
from mil.runs.run_folder import read_predictions
from mil.statistics import classification as statistics
from tests.test_mil.small import FEATURES, MemoryStore, make_cohort, make_store

COHORT = make_cohort(18)
RECIPES = {"tiny": FEATURES, "wide": replace(FEATURES, weights_sha256="1" * 64)}
OPTIONS = {"epochs": 2, "device": "cpu"}
ABMIL = {"name": "abmil", "embed_dim": 8, "attention_dim": 4}


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    """The same features under two recipes."""
    return make_store(COHORT, recipes=RECIPES)


@pytest.fixture(scope="module")
def runs(store: MemoryStore, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same folds, by other heads and backbones."""
    folder = tmp_path_factory.mktemp("secret place")
    train(store, COHORT, head=ABMIL, folds=3, seeds=2, backbone="tiny", **OPTIONS).save(folder / "abmil")
    train(store, COHORT, head="mean", folds=3, seeds=1, backbone="wide", **OPTIONS).save(folder / "mean")
    return [folder / "abmil", folder / "mean"]


@pytest.fixture(scope="module")
def ensemble(runs: list[Path]) -> Path:
    return make_ensemble(runs).save(runs[0].parent / "both")


@pytest.fixture(scope="module")
def artefact(ensemble: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return pack(ensemble, tmp_path_factory.mktemp("models") / "model", coverage=0.75)


def out_of_fold(run: Path) -> np.ndarray:
    """Of one run, calibrated."""
    return scale_temperatures(read_predictions(run)).out_of_fold()


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_it_predicts_what_its_packed_members_say_on_average(
    runs: list[Path], store: MemoryStore, tmp_path: Path, average: str
) -> None:
    model = pack(make_ensemble(runs, average).save(tmp_path / "both"), tmp_path / "model").folder
    alone = [predict(pack(run, tmp_path / run.name).folder, store, device="cpu") for run in runs]
    found = predict(model, store, device="cpu")
    expected = combine([each.probabilities for each in alone], average)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-12)
    assert found.entry == "tiny, wide"
    assert len(found.replicas) == 9
    assert "2-mean/fold1-seed0" in found.replicas


def test_it_needs_its_own_folder_alone(runs: list[Path], store: MemoryStore, tmp_path: Path) -> None:
    copies = [shutil.copytree(run, tmp_path / run.name) for run in runs]
    folder = make_ensemble(copies).save(tmp_path / "both")
    model = pack(folder, tmp_path / "model").folder
    expected = predict(model, store, device="cpu").probabilities
    for each in (*copies, folder):
        shutil.rmtree(each)
    moved = shutil.move(model, tmp_path / "elsewhere")
    np.testing.assert_array_equal(predict(moved, store, device="cpu").probabilities, expected)
    member = predict(tmp_path / "elsewhere" / "members" / "1-abmil", store, device="cpu")
    assert len(member.replicas) == 6


def test_its_figures_are_those_of_its_own_calibrated_average(
    runs: list[Path], ensemble: Path, artefact: Artefact
) -> None:
    values = combine([out_of_fold(run) for run in runs])
    expected = statistics.evaluate(COHORT.labels, values, COHORT.patient_ids, COHORT.class_names)
    record = json.loads((artefact.folder / "model.json").read_text())
    assert record["out_of_fold"] == expected
    made = json.loads((ensemble / "metrics.json").read_text())
    assert record["out_of_fold_uncalibrated"] == made["out_of_fold"]
    for run, member in zip(runs, record["members"], strict=True):
        alone = statistics.evaluate(COHORT.labels, out_of_fold(run), COHORT.patient_ids, COHORT.class_names)
        assert member["macro_f1"] == alone["macro_f1"]
        gain = expected["macro_f1"]["value"] - alone["macro_f1"]["value"]
        assert member["gain_macro_f1"]["difference"] == pytest.approx(gain)
        assert member["weight"] == 0.5
    assert [member["backbone"]["weights_sha256"] for member in record["members"]] == ["0" * 64, "1" * 64]


def test_every_fold_is_judged_by_a_threshold_of_its_own_validation_slides(runs: list[Path], artefact: Artefact) -> None:
    scaled = [scale_temperatures(read_predictions(run)).predictions for run in runs]
    found = artefact.record["abstention"]["out_of_fold"]
    answered, tested = 0, combine([out_of_fold(run) for run in runs])
    for fold, below in enumerate(found["below_by_fold"]):
        means, shared = [], np.ones(len(COHORT), dtype=bool)
        for said in scaled:
            mine = np.array([replica.fold == fold for replica in said.replicas])
            held = (said.parts[mine] == "validation").astype(float)
            shared &= held.any(axis=0)
            with np.errstate(invalid="ignore"):
                means.append(np.einsum("rn,rnc->nc", held, said.probabilities[mine]) / held.sum(axis=0)[:, None])
        expected = choose_coverage(combine([mean[shared] for mean in means]), 0.75)
        assert below == pytest.approx(expected, rel=1e-12)
        tests = (said.parts[mine] == "test").any(axis=0)
        answered += int((tested[tests].max(axis=1) >= below).sum())
        # nobody who chose it is judged by it
        patients = np.array(COHORT.patient_ids)
        assert not set(patients[tests]) & set(patients[shared])
    assert found["n_answered"] == answered
    assert found["n_slides"] == len(COHORT)


def test_members_of_other_folds_can_be_given_a_threshold_but_choose_none(
    runs: list[Path], store: MemoryStore, tmp_path: Path
) -> None:
    train(store, COHORT, head="max", folds=2, seeds=1, **OPTIONS, backbone="tiny").save(tmp_path / "max")
    folder = make_ensemble([runs[1], tmp_path / "max"]).save(tmp_path / "both")
    for wish in ({"coverage": 0.8}, {"accuracy": 0.5}):
        with pytest.raises(RunError, match=r"tested in different folds.*abstain-below"):
            pack(folder, tmp_path / "model", **wish)
        assert not (tmp_path / "model").exists()
    model = pack(folder, tmp_path / "model", abstain_below=0.6)
    found = predict(model.folder, store, device="cpu")
    np.testing.assert_array_equal(found.abstained, found.probabilities.max(axis=1) < 0.6)
    assert model.record["abstention"]["out_of_fold"]["n_slides"] == len(COHORT)


def test_no_id_and_no_path_leaves_the_house(artefact: Artefact, runs: list[Path]) -> None:
    for path in artefact.folder.rglob("*"):
        content = b"" if path.is_dir() else path.read_bytes()
        for secret in (b"secret", b"cohort.zarr", b"slide 0", b'"p3"', str(runs[0].parent).encode()):
            assert secret not in content, (path, secret)


def test_every_byte_of_every_member_is_checked(artefact: Artefact, store: MemoryStore, tmp_path: Path) -> None:
    folder = shutil.copytree(artefact.folder, tmp_path / "model")
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(names) == 2 + 2 * 3 + 2 * 9
    for name in names:
        content = (folder / name).read_bytes()
        at = content.index(b'"target"') + 12 if name.name == "model.json" else len(content) // 2
        (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointError):
            read_artefact(folder)
        with pytest.raises(CheckpointError):
            predict(folder, store, device="cpu")
        (folder / name).write_bytes(content)
    assert len(read_artefact(folder).replicas) == 9


def test_each_member_refuses_features_that_are_not_its_own(artefact: Artefact) -> None:
    with pytest.raises(CheckpointError, match=r"2-mean/fold0-seed0.*weights_sha256"):
        predict(artefact.folder, make_store(COHORT), device="cpu")
    with pytest.raises(CheckpointError, match=r"1-abmil/fold0-seed0.*weights_sha256"):
        predict(artefact.folder, make_store(COHORT, recipes={"wide": RECIPES["wide"]}), device="cpu")
    with pytest.raises(CheckpointError, match=r"mpp: 0\.5 → 0\.25"):
        predict(artefact.folder, make_store(COHORT, recipes=RECIPES, tile_recipe=TileRecipe(mpp=0.25)), device="cpu")


def test_members_that_no_store_serves_together_are_not_packed(runs: list[Path], tmp_path: Path) -> None:
    finer = make_store(COHORT, tile_recipe=TileRecipe(mpp=0.25))
    train(finer, COHORT, head="mean", folds=3, seeds=1, **OPTIONS).save(tmp_path / "fine")
    folder = make_ensemble([runs[0], tmp_path / "fine"]).save(tmp_path / "both")
    with pytest.raises(RunError, match=r"mpp: 0\.5 → 0\.25.*one store"):
        pack(folder, tmp_path / "model")


def test_members_that_were_trained_again_are_not_packed(runs: list[Path], tmp_path: Path) -> None:
    copies = [shutil.copytree(run, tmp_path / run.name) for run in runs]
    folder = make_ensemble(copies).save(tmp_path / "both")
    lines = [line.split(",") for line in (copies[1] / "predictions.csv").read_text().splitlines()]
    for cells in lines[1:]:
        cells[-2:] = cells[:-3:-1]
    write_csv(copies[1] / "predictions.csv", lines)
    with pytest.raises(RunError, match="predict otherwise than when it was made"):
        pack(folder, tmp_path / "model")


def test_the_card_names_members_weights_and_what_they_are_worth_together(artefact: Artefact) -> None:
    text = (artefact.folder / "README.md").read_text(encoding="utf-8")
    assert text == write_card(artefact.record)
    found = artefact.record["out_of_fold"]["macro_f1"]
    for part in (
        "subtype by an ensemble of abmil, mean",
        "mean probability of 2 members",
        "| 1-abmil | 0.500 | 6 | abmil",
        "| 2-mean | 0.500 | 3 | mean",
        "tiny 111111111111",
        "224 px at 0.5 µm per pixel",
        f"| macro-F1 | {found['value']:.3f} | {found['low']:.3f} to {found['high']:.3f} |",
        "the figures of the ensemble are too good",
    ):
        assert part in text, part
    assert "None" not in text
    assert (artefact.folder / "members" / "1-abmil" / "README.md").is_file()


def test_an_evaluation_notices_slides_of_any_member(artefact: Artefact, store: MemoryStore, tmp_path: Path) -> None:
    rows = [("slide_id", "patient_id", "truth"), ("slide 03", "q1", "Luminal A"), ("slide 05", "p2", "triple-negative")]
    write_csv(tmp_path / "labels.csv", rows)
    with pytest.raises(RunError, match="got 2 of 2 slides that the model was trained on"):
        evaluate_external(artefact.folder, store, tmp_path / "labels.csv", "truth", device="cpu")
    found = evaluate_external(
        artefact.folder, store, tmp_path / "labels.csv", "truth", device="cpu", overlap="mark"
    ).metrics
    assert found["head"] == "abmil, mean"
    assert found["abstention"]["below"] == artefact.abstain_below


def test_what_an_ensemble_cannot_do_names_its_members(artefact: Artefact, ensemble: Path, tmp_path: Path) -> None:
    assert [path.name for path in model_folders(artefact.folder)] == ["1-abmil", "2-mean"]
    with pytest.raises(RunError, match="members/1-abmil"):
        load_model(artefact.folder)
    with pytest.raises(RunError, match=r"one of its members: .*secret place"):
        load_model(ensemble)
    with pytest.raises(RunError, match="a model that mil pack wrote"):
        pack(artefact.folder, tmp_path / "again")
