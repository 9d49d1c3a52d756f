"""The report of labels, numbers and survival: all that a run measured is on the page, and nothing else is."""

import base64
import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mil import MilError
from mil.errors import RunError
from mil.evaluation.headlines import HEADLINES
from mil.experiments.crossval import train
from mil.reports.page import score, significant
from mil.reports.report import write_report
from mil.statistics.curves import roc_curve
from mil.statistics.survival import by_patient, high_risk
from mil.visualization.curve_figures import roc_plot
from mil.visualization.plotting import MISSING, to_svg
from mil.visualization.target_figures import free_spread_plot, scatter_plot, survival_plot
from tests.test_mil.reports.test_report import Page
from tests.test_mil.training.test_tasks import SETTINGS, TARGETS, make_task_cohort

HOSTILE = {
    "multilabel": f"<script>alert(1)</script>,{'l' * 60}",
    "regression": "'><img src=x onerror=alert(2)>",
    "survival": f"<script>alert(1)</script>,{'e' * 60}",
}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """PNG files take half of a report's time."""
    monkeypatch.setattr("mil.visualization.plotting.to_png", lambda *_: b"")


def train_run(folder: Path, task: str, target: str = "", values: Any = None, **settings: Any) -> Path:
    """A small run of two folds and one seed; ``target`` renames its columns, ``values`` replaces what is true."""
    store, cohort = make_task_cohort(task)
    cohort = replace(cohort, target=target or cohort.target, values=cohort.values if values is None else values)
    saved = train(store, cohort, **SETTINGS | {"epochs": 2} | settings).save(folder)
    assert saved.folder is not None
    return saved.folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each task, not to be changed."""
    return {task: train_run(tmp_path_factory.mktemp(task) / "run", task) for task in TARGETS}


@pytest.fixture
def run_of(runs: dict[str, Path], tmp_path: Path) -> Any:
    """A copy of the run of a task."""
    return lambda task: Path(shutil.copytree(runs[task], tmp_path / task))


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Of oof.csv."""
    with (folder / "oof.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def slide_ids(page: Page) -> list[str]:
    """In the order of the table of slides."""
    return [a["data-sort"] or "" for tag, a in page.tags if tag == "th" and "data-sort" in a]


def shown(interval: dict[str, Any], metric: str) -> str:
    """A metric and its interval, as tables show them."""
    value, low, high = (score(interval[key], metric) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


@pytest.mark.parametrize("task", TARGETS)
def test_the_page_shows_all_of_the_run(run_of: Any, task: str) -> None:
    folder = run_of(task)
    page = Page(write_report(folder))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for key in HEADLINES[task]:
        assert shown(metrics["out_of_fold"][key], key) in page.text, key
    for replica in metrics["per_replica"]:
        for key in set(replica) & set(HEADLINES[task]):
            assert score(replica[key], key) in page.text
    assert sorted(slide_ids(page)) == sorted(row["slide_id"] for row in read_rows(folder))
    assert (folder / "config.yaml").read_text(encoding="utf-8") in page.words
    for expected in ("abmil", "fold1-seed0", "rows in the table 40", "research software"):
        assert expected in page.text


def test_every_label_has_its_counts_metrics_and_curves(run_of: Any) -> None:
    folder = run_of("multilabel")
    page = Page(write_report(folder))
    for name, entry in json.loads((folder / "metrics.json").read_text())["out_of_fold"]["targets"].items():
        cells = [f"{name} {entry['known']} {entry['positive']}"]
        for key in ("auroc", "f1", "sensitivity", "specificity"):
            cells.append("{value:.2f} [{low:.2f}, {high:.2f}]".format(**entry[key]))
        assert " ".join(cells) in page.text
    assert sum("ROC curve of" in text for text in page.attributes("alt")) == 2
    known = [row for row in read_rows(folder) if row["target_her2"]]
    positive = np.array([row["target_her2"] == "1" for row in known])
    curve = roc_curve(positive, [float(row["p_her2"]) for row in known], [row["patient_id"] for row in known])
    assert (folder / "figures" / "roc-1.svg").read_text(encoding="utf-8") == to_svg(roc_plot(curve))
    wrong = {
        row["slide_id"]
        for row in read_rows(folder)
        for name in ("er", "her2")
        if row[f"target_{name}"] and (float(row[f"p_{name}"]) >= 0.5) != (row[f"target_{name}"] == "1")
    }
    assert page.text.count("✗") >= len(wrong) > 0
    assert f"{len(wrong)} of 40 slides have a label predicted wrong" in page.text
    assert sum(a.get("class") == "error" for tag, a in page.tags if tag == "tr") == len(wrong)


def test_the_largest_error_comes_first_and_columns_sort_by_value(run_of: Any) -> None:
    folder = run_of("regression")
    page = Page(write_report(folder))
    rows = read_rows(folder)
    error = {row["slide_id"]: float(row["predicted_ki67"]) - float(row["target_ki67"]) for row in rows}
    assert slide_ids(page) == sorted(error, key=lambda slide: -abs(error[slide]))
    worst = slide_ids(page)[0]
    assert f"{'+' if error[worst] > 0 else ''}{significant(error[worst])}" in page.text
    keys = [a["data-sort"] for tag, a in page.tags if tag == "td" and "data-sort" in a]
    # five cells a slide: patient, fold, true, predicted, error
    true_keys = dict(zip(slide_ids(page), map(int, keys[2::5]), strict=True))
    by_value = sorted(rows, key=lambda row: float(row["target_ki67"]))
    assert [row["slide_id"] for row in by_value] == sorted(true_keys, key=lambda slide: true_keys[slide])


def test_survival_shows_groups_above_and_below_the_median_of_their_fold(run_of: Any) -> None:
    folder = run_of("survival")
    page = Page(write_report(folder))
    rows = read_rows(folder)
    with (folder / "splits.csv").open(encoding="utf-8", newline="") as file:
        fold_of = {row["slide_id"]: row["fold"] for row in csv.DictReader(file) if row["split"] == "test"}
    values = np.array([[float(row["target_months"]), float(row["target_died"])] for row in rows])
    risks = np.array([float(row["risk"]) for row in rows])
    folds = [fold_of[row["slide_id"]] for row in rows]
    patients = by_patient(values, risks, [row["patient_id"] for row in rows], folds)
    high = high_risk(patients)
    assert f"above the median risk {high.sum()} {(patients.events & high).sum()}" in page.text
    assert f"at or below it {(~high).sum()} {(patients.events & ~high).sum()}" in page.text
    cells = [a["data-sort"] for tag, a in page.tags if tag == "td" and a.get("class") == "text group"]
    group_of = dict(zip(patients.ids, high.tolist(), strict=True))
    assert cells == [f"{group_of[row['patient_id']]:d}" for row in rows]
    overall = high_risk(by_patient(values, risks, [row["patient_id"] for row in rows]))
    assert cells != [f"{each:d}" for each in overall], "otherwise this run shows nothing of folds"
    events = json.loads((folder / "metrics.json").read_text())["out_of_fold"]["n_events"]
    assert f"{events} of whom have the event" in page.text


@pytest.mark.parametrize("task", TARGETS)
def test_figures_are_embedded_and_saved(run_of: Any, task: str) -> None:
    folder = run_of(task)
    page = Page(write_report(folder))
    sources = {base64.b64decode(source.partition(",")[2]) for source in page.attributes("src")}
    names = {
        "multilabel": {"metrics", "labels", "roc-0", "roc-1", "precision-recall-0", "precision-recall-1"}
        | {"spread-macro_auroc", "spread-macro_f1"},
        "regression": {"scatter-0", "spread-r2", "spread-pearson", "spread-mae"},
        "survival": {"metrics", "survival", "spread-concordance"},
    }[task] | {"learning-fold0-seed0", "learning-fold1-seed0"}
    assert {path.name for path in (folder / "figures").iterdir()} == {f"{n}.{e}" for n in names for e in ("svg", "png")}
    assert sources == {(folder / "figures" / f"{name}.svg").read_bytes() for name in names}


@pytest.mark.parametrize("task", TARGETS)
def test_hostile_columns_stay_text(tmp_path: Path, run_of: Any, task: str) -> None:
    names = HOSTILE[task]
    pages = [Page(write_report(run)) for run in (run_of(task), train_run(tmp_path / "evil", task, names))]
    shapes = [[(tag, list(attributes)) for tag, attributes in page.tags] for page in pages]
    # a long target takes a line of its own among the facts
    tame, evil = ([tag for tag in shape if tag[0] != "div"] for shape in shapes)
    assert tame == evil, "not a tag, not an attribute more than with harmless names"
    assert all(name in pages[1].text for name in names.split(","))


@pytest.mark.parametrize("task", TARGETS)
def test_what_is_undefined_is_a_dash(run_of: Any, task: str) -> None:
    folder = run_of(task)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    nothing = {"value": None, "low": None, "high": None}
    scores = metrics["out_of_fold"]
    scores |= dict.fromkeys(HEADLINES[task], nothing)
    for entry in scores.get("targets", {}).values():
        entry |= {key: nothing for key, value in entry.items() if isinstance(value, dict)}
    for replica in metrics["per_replica"]:
        replica |= dict.fromkeys(set(replica) & set(HEADLINES[task]))
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    page = Page(write_report(folder))
    text = page.text.replace("(NA, nan, null)", "")
    assert not re.search(r"\b(nan|none|null|undefined|inf)\b", text.split("Slides ")[1], re.IGNORECASE)
    assert f"{next(iter(HEADLINES[task].values()))} {MISSING} {MISSING}" in text
    for figure in (folder / "figures").glob("*.svg"):
        assert "nan" not in figure.read_text(encoding="utf-8")


def test_several_numbers_have_no_common_error(tmp_path: Path) -> None:
    _, cohort = make_task_cohort("regression")
    both = np.concatenate([cohort.values, -1e-4 * cohort.values], axis=1)
    folder = train_run(tmp_path / "run", "regression", "ki67,density", both)
    text = Page(write_report(folder)).text
    assert f"Mean absolute error {MISSING} {MISSING}" in text
    for name, entry in json.loads((folder / "metrics.json").read_text())["out_of_fold"]["targets"].items():
        assert name in text
        assert shown(entry["mae"], "mae") in text
    assert not (folder / "figures" / "spread-mae.svg").exists()


def test_a_fold_without_events_and_one_label_are_reported(tmp_path: Path) -> None:
    _, cohort = make_task_cohort("multilabel")
    one = train_run(tmp_path / "one", "multilabel", "er", cohort.values[:, :1])
    assert "over 1 label on 40 slides" in Page(write_report(one)).text
    folder = train_run(tmp_path / "run", "survival")
    rows = read_rows(folder)
    with (folder / "splits.csv").open(encoding="utf-8", newline="") as file:
        censored = {row["slide_id"] for row in csv.DictReader(file) if (row["fold"], row["split"]) == ("0", "test")}
    with (folder / "oof.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | ({"target_died": "0"} if row["slide_id"] in censored else {}) for row in rows)
    page = Page(write_report(folder))
    assert sum(a.get("class") == "none" for _, a in page.tags) == 1


def test_repeated_folds_have_one_median_for_all(tmp_path: Path) -> None:
    text = Page(write_report(train_run(tmp_path / "run", "survival", repeats=2))).text
    assert "compared with the median of all patients" in text


def test_synthetic_thumbnails_and_title(run_of: Any) -> None:
    folder = run_of("regression")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    (folder / "metrics.json").write_text(json.dumps(metrics | {"synthetic": True}), encoding="utf-8")
    page = Page(write_report(folder, lambda _: np.zeros((8, 8, 3), np.uint8), "Ki-67"))
    assert "SYNTHETIC DATA" in page.text
    assert "Synthetic data: Ki-67" in page.text
    assert sum(source.startswith("data:image/jpeg") for source in page.attributes("src")) == 40


@pytest.mark.parametrize(
    ("task", "name", "old", "new", "message"),
    [
        ("regression", "metrics.json", '"regression"', '"ordinal"', "a run of task 'ordinal'"),
        ("regression", "oof.csv", "predicted_ki67", "guess", "predicted_ki67"),
        ("survival", "oof.csv", "risk", "chance", "risk"),
        ("multilabel", "oof.csv", "s00,s00,1", "s00,s00,x", "'x' in column 'target_er'"),
        ("survival", "metrics.json", "months,died", "months", "expected two columns"),
    ],
)
def test_strange_runs_are_refused(run_of: Any, task: str, name: str, old: str, new: str, message: str) -> None:
    folder = run_of(task)
    content = (folder / name).read_text(encoding="utf-8")
    assert old in content
    (folder / name).write_text(content.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(MilError, match=r"^got .* → .* → ") as caught:
        write_report(folder)
    assert message in str(caught.value)
    assert not (folder / "report.html").exists()


def test_a_packed_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunError, match="a model that mil pack wrote"):
        write_report(tmp_path)


def test_figures_can_be_drawn_of_little() -> None:
    survival_plot({"none": (np.zeros(0), np.zeros(0, bool)), "one": (np.array([0.0]), np.array([False]))}, "months")
    scatter_plot(np.array([3.0]), np.array([3.0]))
    assert free_spread_plot([[None]], [0]).axes[0].get_ylim()[0] < 0
    low, high = free_spread_plot([[-30.0, None], [0.5, 0.4]], [0, 1]).axes[0].get_ylim()
    assert low < -30 < 0.5 < high


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, MISSING),
        (0.0, "0.000"),
        (1234.56, "1235"),
        (-0.00123456, "-0.001235"),
        (1.5e-9, "1.5e-09"),
        (12, "12.00"),
    ],
)
def test_numbers_of_any_unit_keep_four_digits(value: float | None, text: str) -> None:
    assert significant(value) == text
