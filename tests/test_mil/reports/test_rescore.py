"""`mil score`: figures are those of the functions it names, on saved predictions alone; mistakes are named."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mil.cli import main as cli
from mil.errors import EvaluationError, RunError
from mil.evaluation.operating_points import operate
from mil.evaluation.replica_predictions import ReplicaPredictions
from mil.evaluation.tables import out_of_fold_rows
from mil.experiments.crossval import train
from mil.files import write_csv
from mil.reports.rescore import OperatingTarget, score_runs
from mil.runs.ensemble import make_ensemble
from mil.runs.look_ledger import LEDGER
from mil.runs.run_folder import RunFolder, read_predictions
from mil.runs.saved_outcomes import read_outcomes
from mil.splits.folds import make_splits
from mil.statistics.abstention import evaluate_abstention
from mil.statistics.bootstrap import Resampling
from mil.statistics.calibration import evaluate_calibration
from mil.statistics.classification import evaluate
from mil.training.replica import Replica
from tests.test_mil.small import fast_config, make_cohort, make_store

FEW = Resampling(replicates=200)
THREE = ("Luminal A", "Luminal B", "triple-negative")


def write_run(folder: Path, **metrics: object) -> Path:
    """A run of three classes and 60 patients, as scoring reads it: three folds, two seeds, drawn probabilities."""
    cohort = replace(make_cohort(60), class_names=THREE, labels=(np.arange(120) // 2 % 3).astype(np.int64))
    config = fast_config("folds=3", "seeds=2")
    splits = make_splits(cohort, 3, 0, (0, 1), 0.3)
    replicas = tuple(Replica(fold, seed, config) for fold in range(3) for seed in (0, 1))
    parts = np.stack([splits.parts(each.fold, each.seed) for each in replicas])
    noise = np.random.default_rng(0).dirichlet(np.ones(3), (6, len(cohort)))
    said = ReplicaPredictions(cohort, replicas, parts, 0.75 * noise + 0.25 * np.eye(3)[cohort.labels])
    folder.mkdir(parents=True)
    write_csv(folder / "predictions.csv", said.rows())
    write_csv(folder / "oof.csv", out_of_fold_rows(cohort, said.out_of_fold()))
    (folder / "config.yaml").write_text(config.to_yaml())
    facts = {"target": "subtype", "class_names": list(THREE), "head": "abmil", "entry": "tiny", "looks": 3}
    marks = {"warnings": ["class 'x' was chosen by test slides"], "synthetic": False}
    (folder / "metrics.json").write_text(json.dumps(facts | marks | metrics))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_run`."""
    return write_run(tmp_path_factory.mktemp("läufe") / "drei")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that were really trained, and their ensemble."""
    home, cohort = tmp_path_factory.mktemp("trained"), make_cohort(18)
    options = {"folds": 3, "seeds": 2, "epochs": 2, "device": "cpu"}
    for head in ("mean", "max"):
        train(make_store(cohort), cohort, head=head, **options).save(home / head)
    make_ensemble([home / "mean", home / "max"]).save(home / "both")
    return [home / name for name in ("mean", "max", "both")]


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_usual_way_restates_the_metrics_of_the_training_and_counts_no_look(trained: list[Path]) -> None:
    ledger = trained[0].parent / LEDGER
    before = ledger.read_bytes()
    scores = score_runs(trained)
    assert [run.name for run in scores.runs] == ["mean", "max", "both"]
    for folder, found in zip(trained, scores.runs, strict=True):
        stored = json.loads((folder / "metrics.json").read_text())
        for name in ("macro_f1", "balanced_accuracy", "auroc", "accuracy"):
            assert found.metrics[name] == pytest.approx(stored["out_of_fold"][name], abs=1e-7)
        assert found.metrics["confusion"] == stored["out_of_fold"]["confusion"]
        assert found.facts["looks"] == stored["looks"]
    assert ledger.read_bytes() == before


@pytest.mark.parametrize(("interval", "stratified"), [("percentile", True), ("bca", False), ("bca", True)])
def test_every_part_is_resampled_as_asked(run: Path, interval: str, stratified: bool) -> None:
    how = {"replicates": 150, "seed": 3, "confidence": 0.8, "interval": interval, "stratified": stratified}
    (found,) = score_runs([run], Resampling(**how)).runs
    slides = read_outcomes(RunFolder.open(run))
    given = (slides.cohort.labels, slides.predicted, slides.patient_ids, slides.cohort.class_names)
    assert found.metrics == evaluate(*given, Resampling(**how))
    assert found.calibration == evaluate_calibration(*given, resampling=Resampling(**how))
    assert found.abstention == evaluate_abstention(*given, Resampling(**how))
    (usual,) = score_runs([run], Resampling(150, 3, 0.8)).runs
    for part, name in (("metrics", "macro_f1"), ("calibration", "brier"), ("abstention", "area")):
        one, other = getattr(found, part)[name], getattr(usual, part)[name]
        assert one["value"] == other["value"]
        assert (one["low"], one["high"]) != (other["low"], other["high"]), part


def test_operating_points_are_those_of_the_validation_parts(run: Path) -> None:
    (found,) = score_runs([run], FEW, OperatingTarget(sensitivity=0.9)).runs
    said = read_predictions(run)
    assert [point["class"] for point in found.operating] == list(THREE)
    for point in found.operating:
        expected = operate(said, point["class"], sensitivity=0.9, resampling=FEW)
        assert list(point["thresholds"]) == [replica.name for replica in said.replicas]
        assert tuple(point["thresholds"].values()) == expected.thresholds
        assert point["sensitivity"] == expected.sensitivity
        assert point["specificity"] == expected.specificity
        assert point["chosen_by"] == "sensitivity of at least 0.9 on validation parts"
    (one,) = score_runs([run], FEW, OperatingTarget(specificity=0.8, class_name="Luminal B")).runs
    assert [point["class"] for point in one.operating] == ["Luminal B"]
    assert score_runs([run], FEW).runs[0].operating == ()


def test_warnings_of_the_split_stay_and_those_of_the_intervals_are_made_anew(tmp_path: Path) -> None:
    stale = {"warnings": ["of the split", "of old intervals"], "out_of_fold": {"warnings": ["of old intervals"]}}
    (found,) = score_runs([write_run(tmp_path / "run", **stale)], FEW).runs
    assert "of the split" in found.warnings
    assert "of old intervals" not in found.warnings
    assert len(set(found.warnings)) == len(found.warnings)


def test_the_folder_holds_every_figure(run: Path, tmp_path: Path) -> None:
    scores = score_runs([run], FEW, OperatingTarget())
    folder = scores.save(tmp_path / "out")
    scores.draw(folder)
    plain = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert plain["resampling"]["replicates"] == 200
    assert plain["runs"][0]["metrics"] == scores.runs[0].metrics
    table = {(row["class"], row["metric"]): row for row in rows_of(folder / "scores.csv")}
    for name in ("macro_f1", "auroc"):
        expected = scores.runs[0].metrics[name]
        assert [float(table["", name][key]) for key in expected] == pytest.approx(list(expected.values()), rel=1e-5)
    assert float(table["Luminal B", "f1"]["low"]) == pytest.approx(
        scores.runs[0].metrics["classes"]["Luminal B"]["f1"]["low"], rel=1e-5
    )
    assert table["", "ece"]["low"] == ""
    assert float(table["", "accuracy_at_coverage_1"]["value"]) == pytest.approx(
        scores.runs[0].metrics["accuracy"]["value"], rel=1e-5
    )
    operating = rows_of(folder / "operating.csv")
    assert [row["class"] for row in operating] == list(THREE)
    assert all(float(row["threshold_lowest"]) <= float(row["threshold_highest"]) for row in operating)
    steps = rows_of(folder / "abstention.csv")
    assert float(steps[-1]["coverage"]) == 1
    assert {path.name for path in folder.iterdir()} == {
        "scores.json",
        "scores.csv",
        "operating.csv",
        "abstention.csv",
        "figures",
    }
    assert {path.name for path in (folder / "figures").iterdir()} == {"abstention.svg", "abstention.png"}
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(RunError, match="not empty"):
        scores.save(folder)
    again = score_runs([run], FEW, OperatingTarget()).save(tmp_path / "again")
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in ("scores.json", "scores.csv"))


def test_wrong_folders_are_refused_by_name(run: Path, trained: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"one or more, each once"):
        score_runs([])
    with pytest.raises(RunError, match=r"one or more, each once"):
        score_runs([run, run.parent / "." / run.name])
    with pytest.raises(RunError, match=r"nowhere as run folder .* finished mil train"):
        score_runs([run, tmp_path / "nowhere"])
    with pytest.raises(RunError, match=r"both, an ensemble, for operating points → .* → score its runs"):
        score_runs(trained[2:], FEW, OperatingTarget())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    with pytest.raises(RunError, match=r"model, a model that mil pack wrote, .* give the run that it was packed from"):
        score_runs([tmp_path / "model"])
    sweep = write_run(tmp_path / "sweep", sweep={})
    assert score_runs([sweep], FEW).runs[0].name == "sweep"
    with pytest.raises(RunError, match=r"sweep, a sweep, for operating points"):
        score_runs([sweep], FEW, OperatingTarget())
    with pytest.raises(RunError, match=r"survival as run folder .* cannot be read \(CohortError got target 'subtype'"):
        score_runs([write_run(tmp_path / "survival", task="survival")])
    for name in ("metrics.json", "oof.csv", "predictions.csv"):
        torn = shutil.copytree(run, tmp_path / f"without {name}")
        (torn / name).unlink()
        with pytest.raises(RunError, match=rf"without {name} as run folder → .*{name}.*cannot be read"):
            score_runs([torn], FEW, OperatingTarget())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"sensitivity": 1.5}, r"got sensitivity=1\.5"),
        ({"sensitivity": 0.0}, r"above 0 and at most 1"),
        ({"sensitivity": 0.9, "specificity": 0.9}, "expected one of them"),
    ],
)
def test_impossible_targets_are_refused_before_anything_is_read(targets: dict[str, float], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        OperatingTarget(**targets)


def test_an_unknown_class_is_named(run: Path) -> None:
    with pytest.raises(EvaluationError, match="did you mean 'Luminal B' or 'Luminal A'"):
        score_runs([run], FEW, OperatingTarget(class_name="luminal"))


Mil = Callable[..., tuple[int, str]]


@pytest.fixture
def mil(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mil:
    """Runs ``mil score ARGUMENTS``; exit code and all that was printed."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["mil", "score", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def test_the_command_prints_and_writes(mil: Mil, run: Path, tmp_path: Path) -> None:
    options = ("--replicates", 100, "--interval", "bca", "--strata", "--confidence", 0.9, "--sensitivity", 0.9)
    code, printed = mil(run, *options, "--out", tmp_path / "out")
    assert code == 0, printed
    (found,) = score_runs([run], Resampling(100, 0, 0.9, "bca", True)).runs
    f1 = found.metrics["macro_f1"]
    assert f"{f1['value']:.3f}" in printed
    assert f"[{f1['low']:.3f}, {f1['high']:.3f}]" in printed
    assert "90 % BCa intervals, 100 resamples of the patients within their classes" in printed
    assert "drei: thresholds of sensitivity of at least 0.9 on validation parts, judged on test folds" in printed
    assert "no look is counted" in printed
    assert "looked at 3 times" in printed
    assert "warning: class 'x' was chosen by test slides" in printed
    assert "SYNTHETIC" not in printed
    assert (tmp_path / "out" / "figures" / "abstention.png").is_file()


def test_the_command_marks_synthetic_data_and_compares_several(mil: Mil, run: Path, tmp_path: Path) -> None:
    drawn = write_run(tmp_path / "_gezeichnet", synthetic=True)
    code, printed = mil(run, drawn, "--replicates", 20, "--out", tmp_path / "out")
    assert code == 0, printed
    assert "SYNTHETIC DATA" in printed
    svg = (tmp_path / "out" / "figures" / "abstention.svg").read_text(encoding="utf-8")
    assert all(text in svg for text in ("drei", "_gezeichnet", "synthetic data"))
    assert {row["run"] for row in rows_of(tmp_path / "out" / "scores.csv")} == {"drei", "_gezeichnet"}


def test_the_command_names_mistakes(mil: Mil, run: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--sensitivity", 1.5), "got sensitivity=1.5"),
        (("--interval", "bcs"), "did you mean 'bca'"),
        (("--confidence", 95), "got confidence=95"),
        (("--replicates", 0), "got replicates=0"),
        (("--class", "Luminal A"), "add --sensitivity 0.95"),
        (("--youden", "--specificity", 0.9), "one way to choose thresholds"),
        (("--youden", "--class", "x"), "got the positive class 'x'"),
        (("--out", run), "not empty"),
    ):
        code, printed = mil(run, *arguments)
        assert code == 2, arguments
        assert message in " ".join(printed.replace("│", " ").split()), printed
    assert not list(tmp_path.iterdir())


def test_numbers_are_written_without_matplotlib(
    mil: Mil, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, printed = mil(run, "--replicates", 20, "--out", tmp_path / "out")
    assert code == 0
    assert "no figure: got no matplotlib" in printed
    assert (tmp_path / "out" / "scores.csv").is_file()
