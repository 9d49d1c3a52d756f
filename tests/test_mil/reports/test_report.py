"""The report: everything of a run is on the page, nothing of a run is markup, nothing is asked of the network."""

import base64
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mil.errors import MissingExtraError, RunError
from mil.evaluation.operating_points import operate_one_vs_rest
from mil.experiments.crossval import train
from mil.reports.report import write_report
from mil.statistics.bootstrap import Resampling
from mil.statistics.calibration import evaluate_calibration
from mil.statistics.classification import evaluate
from tests.test_mil.small import make_cohort, make_store

SUBTYPES = ("HER2(+)", "Luminal A", "Luminal B", "Triple negative")
HOSTILE_IDS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "../../etc/passwd",
    "Schnitt Größe/плитка/切片 7",
    "\u202egnp.exe",
    "{{ 7 * 7 }}",
    "&lt;b&gt;",
)


def make_run(
    folder: Path,
    n_slides: int = 24,
    class_names: tuple[str, ...] = SUBTYPES,
    folds: int = 3,
    seeds: int = 2,
    epochs: int = 6,
    slide_ids: tuple[str, ...] = (),
    replicates: int = 50,
    **metrics: object,
) -> Path:
    """Write a run folder as `mil train` leaves it, with drawn numbers; `slide_ids` replace the first drawn ids."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    n_classes = len(class_names)
    ids = [*slide_ids, *(f"site/slide_{k:03d}" for k in range(n_slides))][:n_slides]
    patients = [f"P{k // 2:03d}" for k in range(n_slides)]
    labels = np.array([k // 2 % n_classes for k in range(n_slides)])
    logits = rng.normal(size=(n_slides, n_classes)) + 1.6 * np.eye(n_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    fold_of = np.array([k // 2 % folds for k in range(n_slides)])
    replicas = [(fold, seed) for fold in range(folds) for seed in range(seeds)]

    with (folder / "oof.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "patient_id", "target", "predicted", *(f"p_{name}" for name in class_names)])
        for k in range(n_slides):
            row = [ids[k], patients[k], class_names[labels[k]], class_names[predicted[k]]]
            writer.writerow([*row, *probabilities[k]])
    with (folder / "splits.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["fold", "seed", "slide_id", "patient_id", "split"])
        for fold, seed in replicas:
            for k in range(n_slides):
                split = "test" if fold_of[k] == fold else "validation" if k % 5 == 0 else "train"
                writer.writerow([fold, seed, ids[k], patients[k], split])
    with (folder / "history.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = "replica fold seed epoch lr train_loss validation_loss validation_score seconds"
        writer.writerow(names.split())
        for fold, seed in replicas:
            falling = 1.4 * np.exp(-np.arange(epochs) / 12) + 0.05 * rng.random(epochs)
            rising = falling + 0.012 * np.arange(epochs) + 0.15 * rng.random(epochs)
            for epoch in range(epochs):
                row = [f"fold{fold}-seed{seed}", fold, seed, epoch + 1, 1e-4, falling[epoch], rising[epoch]]
                writer.writerow([*row, 0.5, 0.8])
    document = {
        "target": "subtype",
        "class_names": list(class_names),
        "head": "abmil",
        "entry": "efficientnet_lite0",
        "n_replicas": len(replicas),
        "created": "2026-03-01T12:00:00+00:00",
        "versions": {"tessera-mil": "0.1.0", "torch": "2.15.0", "python": "3.11.9"},
        "cohort": {
            "attrition": [
                ["rows in the table", n_slides + 3, []],
                ["without a label", 1, ["site/unlabelled"]],
                ["without a slide in the store", 2, ["site/lost_1", "site/lost_2"]],
                ["kept", n_slides, []],
            ]
        },
        "warnings": ["class 'HER2(+)' is absent from the test part of fold 1"],
        "looks": 1,
        "synthetic": False,
        "out_of_fold": evaluate(labels, probabilities, patients, class_names, resampling=Resampling(replicates)),
        "per_replica": [
            {
                "replica": f"fold{fold}-seed{seed}",
                "fold": fold,
                "seed": seed,
                "best_epoch": int(rng.integers(epochs)) + 1,
                "epochs": epochs,
                "macro_f1": float(rng.uniform(0.5, 0.8)),
                "balanced_accuracy": float(rng.uniform(0.5, 0.8)),
                "auroc": None if fold == 1 else float(rng.uniform(0.7, 0.95)),
                "seconds": 42.0,
            }
            for fold, seed in replicas
        ],
    }
    (folder / "metrics.json").write_text(json.dumps(document | metrics), encoding="utf-8")
    config = "head:\n  name: abmil\n  hidden_dim: 128\noptimizer:\n  name: adamw\n  learning_rate: 0.0001\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


@pytest.fixture
def pictures() -> None:
    """For tests that look at PNG files."""


@pytest.fixture(autouse=True)
def _fewer_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PNG files take half of a report's time, and most tests look at none."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("mil.visualization.plotting.to_png", lambda *_: b"")


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text outside style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def attributes(self, name: str) -> list[str]:
        """Every value of an attribute, in order."""
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the usual run, pictures included; not to be written again."""
    return write_report(make_run(tmp_path_factory.mktemp("reported") / "run"))


def test_page_shows_all_of_the_run(report: Path) -> None:
    folder = report.parent
    assert report == folder / "report.html"
    text = Page(report).text
    document = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for key in ("macro_f1", "balanced_accuracy", "auroc", "accuracy"):
        value, low, high = document["out_of_fold"][key].values()
        assert f"{value:.3f} [{low:.3f}, {high:.3f}]" in text, key
    for entry in document["out_of_fold"]["classes"].values():
        for key in ("tp", "fp", "fn", "tn"):
            assert f"{entry[key]['value']} [{entry[key]['low']:.0f}, {entry[key]['high']:.0f}]" in text
        for key in ("recall", "precision", "f1", "auroc"):
            assert f"{entry[key]['value']:.2f} [{entry[key]['low']:.2f}, {entry[key]['high']:.2f}]" in text
    for expected in ("abmil", "efficientnet_lite0", "torch 2.15.0", "looked at once", *SUBTYPES, "fold2-seed1"):
        assert expected in text
    assert document["warnings"][0] in text
    assert "without a slide in the store 2 site/lost_1, site/lost_2" in text
    assert (folder / "config.yaml").read_text(encoding="utf-8") in Page(report).words
    with (folder / "oof.csv").open(encoding="utf-8", newline="") as file:
        assert all(row["slide_id"] in text for row in csv.DictReader(file))


def test_figures_are_embedded_and_saved(report: Path) -> None:
    prefix = "data:image/svg+xml;base64,"
    embedded = {base64.b64decode(source.removeprefix(prefix)) for source in Page(report).attributes("src")}
    saved = {file.name: file.read_bytes() for file in (report.parent / "figures").iterdir()}
    assert embedded == {content for name, content in saved.items() if name.endswith(".svg")}
    curves = {f"learning-fold{fold}-seed{seed}" for fold in range(3) for seed in range(2)}
    spread = {f"spread-{metric}" for metric in ("macro_f1", "balanced_accuracy", "auroc")}
    found = {f"{kind}-{at}" for kind in ("roc", "precision-recall") for at in range(4)} | {"reliability", "abstention"}
    names = {"metrics", "classes", "confusion"} | curves | spread | found
    assert set(saved) == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    for name in names:
        picture = Image.open(io.BytesIO(saved[f"{name}.png"]))
        drawn = ElementTree.fromstring(saved[f"{name}.svg"])
        size_pt = [float(drawn.get(side).removesuffix("pt")) for side in ("width", "height")]
        assert picture.size == pytest.approx([200 / 72 * side for side in size_pt], abs=1)
        assert picture.info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_page_asks_the_network_for_nothing(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run"), thumbnails=lambda _: np.zeros((8, 8, 3), np.uint8))
    page, source = Page(path), path.read_text(encoding="utf-8")
    assert not {"link", "iframe", "object", "embed", "base", "form", "video", "audio"} & {tag for tag, _ in page.tags}
    assert all(value.startswith("data:image/") for value in page.attributes("src"))
    assert all(value.startswith("#") for value in page.attributes("href"))
    assert "url(" not in source
    assert "@import" not in source
    for figure in (path.parent / "figures").glob("*.svg"):
        svg = figure.read_text(encoding="utf-8")
        assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', svg))
        assert "@import" not in svg
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy is not None
    assert "default-src 'none'" in policy
    (script,) = re.findall(r"<script>(.*?)</script>", source, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy, "the policy admits this script and no other"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "</pre></td><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"
    tame, hostile = (
        make_run(
            tmp_path / folder,
            slide_ids=ids,
            class_names=classes,
            **dict.fromkeys(("target", "head", "entry"), word),
            warnings=[word],
            versions={word: word[:9]},
            cohort={"attrition": [[word, 1, [word]]]},
        )
        for folder, ids, classes, word in (
            ("tame", (), SUBTYPES, "x" * len(evil)),
            ("hostile", HOSTILE_IDS, ("</title><b>", "$a$", "'\"&", "Größe"), evil),
        )
    )
    (hostile / "config.yaml").write_text(f"note: {evil}\n", encoding="utf-8")
    pages = [Page(write_report(run, title=title)) for run, title in ((tame, "title"), (hostile, evil))]
    shapes = [[(tag, list(attributes)) for tag, attributes in page.tags] for page in pages]
    assert shapes[0] == shapes[1], "not a tag, not an attribute more than with harmless names"
    ids = [a["data-sort"] for tag, a in pages[1].tags if tag == "th" and "data-sort" in a]
    assert tuple(ids[: len(HOSTILE_IDS)]) == HOSTILE_IDS
    assert pages[1].text.count(evil) >= 7
    assert "<script>alert(1)</script>" in pages[1].text
    assert "\ufffdgnp.exe" in pages[1].text, "a direction override is made visible"


def test_nothing_undefined_is_shown_as_nan(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", n_slides=7, seeds=1)
    document = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    document["out_of_fold"]["auroc"] = {"value": float("nan"), "low": None, "high": None}
    document["per_replica"][0]["seconds"] = float("nan")
    (folder / "metrics.json").write_text(json.dumps(document), encoding="utf-8")
    history = (folder / "history.csv").read_text(encoding="utf-8").splitlines()
    history[1] = "fold0-seed0,0,0,1,0.1,nan,,nan,1"
    (folder / "history.csv").write_text("\n".join(history), encoding="utf-8")
    page = Page(write_report(folder))
    assert not re.search(r"\b(nan|none|null|undefined|inf)\b", page.text.split("Settings The")[0], re.IGNORECASE)
    assert "AUROC – –" in page.text
    for figure in (folder / "figures").glob("*.svg"):
        assert "nan" not in figure.read_text(encoding="utf-8")


def test_errors_are_marked_one_by_one(report: Path) -> None:
    page = Page(report)
    with (report.parent / "oof.csv").open(encoding="utf-8", newline="") as file:
        wrong = [row["predicted"] != row["target"] for row in csv.DictReader(file)]
    rows = [
        attributes.get("class") == "error"
        for (tag, attributes), (_, first) in zip(page.tags, page.tags[1:], strict=False)
        if tag == "tr" and "data-sort" in first
    ]
    assert any(wrong)
    assert rows == wrong
    assert page.text.count("✗") == sum(wrong)
    assert f"{sum(wrong)} of {len(wrong)} slides are predicted wrong" in page.text


def test_synthetic_is_said_on_the_page_and_in_every_figure(pictures: None, tmp_path: Path) -> None:
    assert "synthetic" not in Page(write_report(make_run(tmp_path / "real"))).text.lower()
    folder = make_run(tmp_path / "run", synthetic=True)
    page = Page(write_report(folder))
    assert "SYNTHETIC DATA" in page.text
    assert "Synthetic data: subtype by abmil" in page.text
    figures = folder / "figures"
    assert all("synthetic data" in file.read_text(encoding="utf-8") for file in figures.glob("*.svg"))
    for file in figures.glob("*.png"):
        # a strip of 16 CSS pixels below
        plain = Image.open(tmp_path / "real" / "figures" / file.name)
        assert Image.open(file).height - plain.height == pytest.approx(16 / 96 * 200, abs=1)


def test_classes_absent_from_a_fold_and_repeated_looks_are_pointed_out(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", n_slides=8, folds=4, looks=3)))
    cells = [attributes for tag, attributes in page.tags if tag == "td" and attributes.get("class") == "none"]
    assert len(cells) == 4 * 3, "each of four folds tests one of four classes"
    assert page.text.count("3 times") == 3


def test_thumbnails_are_small_and_may_be_missing(tmp_path: Path) -> None:
    asked = []

    def thumbnail(slide_id: str) -> np.ndarray | None:
        asked.append(slide_id)
        return np.full((900, 300, 3), 200, np.uint8) if len(asked) % 2 else None

    page = Page(write_report(make_run(tmp_path / "run"), thumbnail))
    pictures = [source for source in page.attributes("src") if source.startswith("data:image/jpeg;base64,")]
    assert len(asked) == 24
    assert len(pictures) == 12
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
    assert picture.size == (37, 112)


def test_same_run_same_bytes(pictures: None, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    pages = [write_report(folder).read_bytes()]
    before = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    pages.append(write_report(folder).read_bytes())
    assert pages[0] == pages[1]
    assert {path.name: path.read_bytes() for path in (folder / "figures").iterdir()} == before
    assert not list(folder.rglob("*.partial"))


def test_calibration_comes_from_the_metrics_or_is_made_for_older_runs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with (folder / "oof.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = [SUBTYPES.index(row["target"]) for row in rows]
    probabilities = np.array([[float(row[f"p_{name}"]) for name in SUBTYPES] for row in rows])
    found = evaluate_calibration(labels, probabilities, [row["patient_id"] for row in rows], SUBTYPES)
    expected = f"Expected calibration error {found['ece']:.3f}"
    assert expected in Page(write_report(folder)).text
    document = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    document["calibration"] = found | {"ece": 0.777}
    (folder / "metrics.json").write_text(json.dumps(document), encoding="utf-8")
    assert "Expected calibration error 0.777" in Page(write_report(folder)).text


def test_operating_points_are_those_of_the_validation_parts(tmp_path: Path) -> None:
    cohort = make_cohort(18)
    options = {"epochs": 2, "device": "cpu"}
    run = train(make_store(cohort), cohort, head="mean", folds=3, seeds=2, **options).save(tmp_path / "run")
    text = Page(write_report(run.folder)).text
    for point in operate_one_vs_rest(run.predictions):
        found, held = point.sensitivity, point.thresholds
        expected = f"{point.class_name} {min(held):.3f} to {max(held):.3f} {found['value']:.3f}"
        assert f"{expected} [{found['low']:.3f}, {found['high']:.3f}]" in text
    settings = (run.folder / "config.yaml").read_text(encoding="utf-8")
    (run.folder / "config.yaml").write_text(f"{settings}\nof_another_version: 1\n", encoding="utf-8")
    assert "Operating points" in Page(write_report(run.folder)).text


def test_abstention_is_shown_at_every_coverage(report: Path) -> None:
    text = Page(report).text
    (rows,) = re.findall(r"Confidence from Accuracy (100 % .*?) Learning curves", text)
    found = re.findall(r"(\d+) % (\d+) 0\.\d{3} 0\.\d{3} \[", rows)
    assert [int(share) for share, _ in found] == [100, 90, 80, 70, 60, 50]
    # 24 slides, all of different confidence
    assert [int(slides) for _, slides in found] == [24, 22, 20, 17, 15, 12]


def test_reads_what_training_writes(tmp_path: Path) -> None:
    cohort = make_cohort()
    options = {"epochs": 2, "device": "cpu", "head": {"name": "abmil", "embed_dim": 8, "attention_dim": 4}}
    run = train(make_store(cohort), cohort, folds=3, seeds=1, **options).save(tmp_path / "run")
    text = Page(write_report(run.folder)).text
    assert f"{run.metrics['out_of_fold']['macro_f1']['value']:.3f}" in text
    assert all(slide_id in text for slide_id in cohort.slide_ids)


def test_a_slide_id_that_is_not_utf_8_costs_no_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", slide_ids=("Gr__ner",))
    for name in ("oof.csv", "splits.csv"):
        content = (folder / name).read_bytes().replace(b"Gr__ner", b"Gr\xf6\xdfner")
        (folder / name).write_bytes(content)
    asked: list[str] = []
    page = Page(write_report(folder, asked.append))
    assert asked[0].encode("utf-8", "surrogateescape") == b"Gr\xf6\xdfner", "the store knows it by its bytes"
    assert "Gr\ufffd\ufffdner" in page.text


@pytest.mark.parametrize("name", ["metrics.json", "oof.csv", "history.csv", "splits.csv", "config.yaml"])
def test_unfinished_run_is_refused(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).unlink()
    with pytest.raises(RunError, match=rf"^got .*{name} .*→ "):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("metrics.json", "{", "[[", "metrics.json cannot be read (JSONDecodeError"),
        ("metrics.json", '"looks"', '"glances"', "without looks"),
        ("oof.csv", "predicted", "guess", "predicted"),
        ("oof.csv", "p_Luminal A", "p_Luminal", "without p_Luminal A"),
        ("oof.csv", ",Luminal B,", ",Luminal C,", "'Luminal C'"),
        ("history.csv", "train_loss", "loss", "train_loss"),
    ],
)
def test_strange_files_are_named(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    folder = make_run(tmp_path / "run")
    content = (folder / name).read_text(encoding="utf-8").replace(old, new, 1)
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"^got .* → .* → ") as caught:
        write_report(folder)
    assert message in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra_the_install_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    folder = make_run(tmp_path / "run")
    before = sorted(folder.rglob("*"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'{package} → .* → .*pip install "tessera-mil\[report\]"'):
        write_report(folder)
    assert sorted(folder.rglob("*")) == before


def test_import_is_light() -> None:
    code = "import sys, mil.reports.report; assert not {'matplotlib', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
