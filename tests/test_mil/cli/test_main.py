"""The commands as a person types them: what they write, what they print, how they fail."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from extract.store import open_store
from mil.cli import main as cli
from tests.conftest import REPOSITORY
from tests.test_extract.small import write_slide

# torch, since OpenVINO compiles for seconds; the demo and the fleet are tested with what is fastest
TILING = ("--mpp", "0.5", "--tile-px", "64", "--runtime", "torch")
FAST = ("head.embed_dim=8", "epochs=2", "folds=2", "seeds=1", "device=cpu")


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    def says(self, *words: str) -> bool:
        """Whether all words were printed, line breaks aside."""
        text = " ".join((self.out + " " + self.err).split())
        return all(word in text for word in words)


Mil = Callable[..., Result]


@pytest.fixture
def mil(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mil:
    """Runs ``mil ARGUMENTS``."""

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr("sys.argv", ["mil", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return Result(code, printed.out, printed.err)

    return run


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight slides of eight patients in two classes, and their label table."""
    folder = tmp_path_factory.mktemp("cohört 1")
    for i in range(8):
        write_slide(folder / "slides" / f"00{i}.tif", 260, 200, seed=i)
    write_labels(folder / "labels.csv", [(f"00{i}", f"p{i}", "ab"[i % 2]) for i in range(8)])
    return folder


@pytest.fixture(scope="module")
def store(cohort: Path) -> Path:
    """The cohort's store."""
    from extract.pipeline.extraction import run_extraction

    run_extraction(cohort / "slides", cohort / "c.zarr", mpp=0.5, tile_px=64, runtime="torch")
    return cohort / "c.zarr"


def write_labels(path: Path, rows: Sequence[Sequence[str]], header: str = "slide_id,patient_id,subtype") -> Path:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_help_lists_every_command_that_works(mil: Mil) -> None:
    result = mil("--help")
    assert result.code == 0
    assert result.says("doctor", "plan", "extract", "sheet", "models", "train", "predict", "report", "demo")


@pytest.mark.parametrize("command", ["doctor", "plan", "extract", "sheet", "train", "predict", "report", "demo"])
def test_every_command_has_an_example_in_its_help(mil: Mil, command: str) -> None:
    result = mil(command, "--help")
    assert result.code == 0
    assert result.says(f"Example: mil {command}")


def test_extract_reports_failures_and_resumes(mil: Mil, tmp_path: Path) -> None:
    write_slide(tmp_path / "slides" / "good.tif", 260, 200)
    write_slide(tmp_path / "slides" / "no scale.tif", 260, 200, mpp=None)
    (tmp_path / "slides" / "empty.svs").touch()
    (tmp_path / "slides" / "text.tif").write_text("not a slide")
    first = mil("extract", tmp_path / "slides", "--store", tmp_path / "s.zarr", *TILING)
    assert first.code == 1
    assert first.says(
        "4 slides: 1 embedded", "3 failed", "--default-mpp", "0 bytes", "no whole slide that OpenSlide reads"
    )
    second = mil("extract", tmp_path / "slides", "--store", tmp_path / "s.zarr", *TILING, "--default-mpp", "0.5")
    assert second.code == 1
    assert second.says("1 embedded, 1 complete before, 2 failed")
    assert open_store(tmp_path / "s.zarr").slide_ids() == ["good", "no scale"]


def test_extract_refuses_another_recipe_and_names_the_field(mil: Mil, cohort: Path, store: Path) -> None:
    result = mil("extract", cohort / "slides", "--store", store, *TILING, "--mpp", "1.0")
    assert result.code == 2
    assert result.says("error:", "mpp: 0.5 → 1.0", "choose another --store")


def test_extract_refuses_two_scales_and_no_slides(mil: Mil, tmp_path: Path) -> None:
    both = mil("extract", tmp_path, "--store", tmp_path / "s.zarr", "--mpp", "0.5", "--native")
    none = mil("extract", "--store", tmp_path / "s.zarr")
    assert both.code == none.code == 2
    assert both.says("more than one of --mpp, --magnification and --native")
    assert none.says("got no slides")
    assert not (tmp_path / "s.zarr").exists()


def test_magnification_is_sugar_for_mpp(mil: Mil, tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tif", 260, 200)
    assert (
        mil(
            "extract", tmp_path / "a.tif", "--store", tmp_path / "s.zarr", "--magnification", "20", "--tile-px", "64"
        ).code
        == 0
    )
    assert open_store(tmp_path / "s.zarr").tile_recipe.mpp == 0.5


def test_train_then_predict_then_report(mil: Mil, cohort: Path, store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("--store", store, "--labels", cohort / "labels.csv", "--target", "subtype", "--out", run)
    trained = mil("train", *settings, "head=abmil", *FAST)
    assert trained.code == 0, trained.err
    assert trained.says("macro-F1", "looked at 1 time", str(run / "report.html"))
    assert {row["slide_id"] for row in rows_of(run / "oof.csv")} == {f"00{i}" for i in range(8)}
    assert json.loads((run / "metrics.json").read_text())["n_replicas"] == 2
    assert (run / "report.html").stat().st_size > 10_000

    predicted = mil("predict", "--run", run, "--store", store, "--out", tmp_path / "p.csv")
    assert predicted.code == 0
    assert predicted.says("8 slides by the mean of 2 replicas")
    rows = rows_of(tmp_path / "p.csv")
    assert [row["slide_id"] for row in rows] == [f"00{i}" for i in range(8)]
    assert all(abs(float(row["p_a"]) + float(row["p_b"]) - 1) < 1e-6 for row in rows)

    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert mil("report", run, "--store", store).code == 0
    assert len((run / "report.html").read_bytes()) == len(page)


def test_train_again_from_its_config_gives_the_same_predictions(
    mil: Mil, cohort: Path, store: Path, tmp_path: Path
) -> None:
    settings = ("--store", store, "--labels", cohort / "labels.csv", "--target", "subtype")
    assert mil("train", *settings, "--out", tmp_path / "a", "head=mean", *FAST[1:]).code == 0
    assert mil("train", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b").code == 0
    assert (tmp_path / "a" / "oof.csv").read_bytes() == (tmp_path / "b" / "oof.csv").read_bytes()


def test_what_a_sweep_chose_is_not_judged_on_its_own_cohort_unwarned(
    mil: Mil, cohort: Path, store: Path, tmp_path: Path
) -> None:
    from mil.config.compose import compose_config
    from mil.tuning.sweep_config import CHOSEN

    values = {"store": str(store), "labels": str(cohort / "labels.csv"), "target": "subtype"}
    text = compose_config(["head=mean", *FAST[1:]], values=values).to_yaml()
    (tmp_path / "best.yaml").write_text(f"# The best.\n# {CHOSEN}\n{text}", encoding="utf-8")
    chosen = mil("train", "--config", tmp_path / "best.yaml", "--out", tmp_path / "a")
    assert chosen.code == 0, chosen.err
    assert chosen.says("warning: a sweep chose these settings")
    new = ("--labels", cohort / "labels.csv")
    assert not mil("train", "--config", tmp_path / "best.yaml", *new, "--out", tmp_path / "b").says("a sweep chose")


def test_trackers_say_where_they_wrote(mil: Mil, cohort: Path, store: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = ("--store", store, "--labels", cohort / "labels.csv", "--target", "subtype", "--out", tmp_path / "run")
    result = mil("train", *settings, "head=mean", "track=[tensorboard]", *FAST[1:])
    assert result.code == 0, result.err
    assert result.says(f"tensorboard: event files in {tmp_path / 'run.tensorboard'}")


def test_the_help_of_train_says_that_it_goes_on(mil: Mil) -> None:
    assert mil("train", "--help").says("A training that was stopped goes on")


def test_train_does_not_overwrite_a_run_unless_told(mil: Mil, cohort: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    settings = ("--store", store, "--labels", cohort / "labels.csv", "--target", "subtype", "--out", tmp_path / "run")
    result = mil("train", *settings, "head=mean", *FAST[1:])
    assert result.code == 2
    assert result.says("not empty", "--overwrite")
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("haed=abmil", ("haed", "head")),
        ("head=abmill", ("abmill", "abmil")),
        ("optimizer.lr=fast", ("optimizer.lr", "fast")),
        ("folds=1", ("folds", "1")),
        ("epochs", ("epochs",)),
    ],
)
def test_train_names_what_is_mistyped(
    mil: Mil, store: Path, cohort: Path, tmp_path: Path, setting: str, words: tuple[str, ...]
) -> None:
    settings = ("--store", store, "--labels", cohort / "labels.csv", "--target", "subtype", "--out", tmp_path / "run")
    result = mil("train", *settings, setting)
    assert result.code == 2
    assert result.says("error:", "→", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("001", "p1", "a"), ("001", "p1", "a")], ("001", "more than once")),
        ([("001", "p1", "a"), ("001", "p1", "b")], ("001",)),
        ([("001", "p1", "a"), ("002", "p2", "a")], ("class",)),
        ([("001", "p1", "a"), ("002", "p2", "a"), ("003", "p3", "b")], ("b", "patient")),
    ],
)
def test_train_refuses_unusable_labels(
    mil: Mil, store: Path, tmp_path: Path, rows: list[tuple[str, ...]], words: tuple[str, ...]
) -> None:
    labels = write_labels(tmp_path / "labels.csv", rows)
    result = mil("train", "--store", store, "--labels", labels, "--target", "subtype", "--out", tmp_path / "run")
    assert result.code == 2
    assert result.says("error:", "→", *words)


def test_train_names_a_missing_column_store_and_table(mil: Mil, store: Path, cohort: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    column = mil("train", "--store", store, "--labels", cohort / "labels.csv", "--target", "subtyp", *out)
    table = mil("train", "--store", store, "--labels", tmp_path / "none.csv", "--target", "subtype", *out)
    nothing = mil(
        "train", "--store", tmp_path / "none.zarr", "--labels", cohort / "labels.csv", "--target", "subtype", *out
    )
    assert column.code == table.code == nothing.code == 2
    assert column.says("subtyp", "did you mean", "subtype")
    assert table.says("none.csv")
    assert nothing.says("none.zarr", "mil extract")


def test_predict_refuses_a_run_that_lost_a_checkpoint_and_a_missing_folder(
    mil: Mil, cohort: Path, store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = ("--store", store, "--labels", cohort / "labels.csv", "--target", "subtype", "--out", run)
    assert mil("train", *settings, "head=mean", *FAST[1:]).code == 0
    predict = ("predict", "--run", run, "--store", store)
    assert mil(*predict, "--out", tmp_path / "none" / "p.csv").says("a folder that exists")
    for file in (run / "checkpoints").glob("fold0*"):
        file.unlink()
    result = mil(*predict, "--out", tmp_path / "p.csv")
    assert result.code == 2
    assert result.says("fold0-seed0", "trained 2")


def test_an_impossible_magnification_or_store_is_an_error(mil: Mil, cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    zero = mil("extract", cohort / "slides", "--store", tmp_path / "s.zarr", "--magnification", "0")
    inside = mil("extract", cohort / "slides", "--store", tmp_path / "file" / "s.zarr")
    assert zero.code == inside.code == 2
    assert zero.says("magnification 0", "→")
    assert inside.says("error:", "cannot be written", "--store")


def test_predict_refuses_features_of_another_recipe(mil: Mil, cohort: Path, store: Path, tmp_path: Path) -> None:
    settings = ("--store", store, "--labels", cohort / "labels.csv", "--target", "subtype", "--out", tmp_path / "run")
    assert mil("train", *settings, "head=mean", *FAST[1:]).code == 0
    other = ("--store", tmp_path / "o.zarr", *TILING, "--dtype", "float32")
    assert mil("extract", cohort / "slides" / "000.tif", *other).code == 0
    result = mil("predict", "--run", tmp_path / "run", "--store", tmp_path / "o.zarr", "--out", tmp_path / "p.csv")
    assert result.code == 2
    assert result.says("dtype", "float16", "float32")
    assert not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize("module", ["extract.pipeline.extraction", "torch", "torchvision"])
def test_interrupting_while_it_starts_prints_one_line(tmp_path: Path, module: str) -> None:
    write_slide(tmp_path / "a.tif", 260, 200)
    code = (
        "import os, signal, sys\n"
        # whoever started the tests may have set it to be ignored, which is inherited
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "from mil.cli.main import main\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "main()\n"
    )
    command = [sys.executable, "-P", "-c", code, "extract", "a.tif", "--store", "s.zarr"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert done.returncode == 130
    *doing, last = (done.stderr + done.stdout).splitlines()
    assert last == "stopped. What was finished is kept. To go on: mil extract a.tif --store s.zarr"
    assert all(line.endswith(" ...") for line in doing)


def test_interrupting_a_command_that_has_nothing_to_say_is_not_silent(
    mil: Mil, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mil.cli.heads.train._report", interrupted)
    result = mil("report", tmp_path)
    assert (result.code, result.out + result.err) == (130, "stopped.\n")


def test_help_and_usage_errors_load_no_torch(tmp_path: Path) -> None:
    catch = "try: main()\nexcept SystemExit: pass"
    code = f"import sys\nfrom mil.cli.main import main\n{catch}\nsys.exit('torch' in sys.modules)"
    command = [sys.executable, "-P", "-c", code, "extract", "--help"]
    assert (
        subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True).returncode == 0
    )


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize(
    "command", ["extract", "plan", "doctor", "sheet", "models list", "models pull", "models verify"]
)
def test_help_fits_a_terminal(
    command: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mil", *command.split(), "--help"])
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    # a type that is broken over lines has one bracket only
    assert [line for line in lines if "…" in line or re.search("<(?!=)[^>]*$", line)] == []


def test_slides_left_to_others_are_said_and_have_an_exit_code(mil: Mil, cohort: Path, tmp_path: Path) -> None:
    from extract.backbones.backbone import load_backbone
    from extract.store import TileRecipe, create_store

    store = create_store(tmp_path / "s.zarr", TileRecipe(mpp=0.5, tile_px=64))
    arguments = ("extract", cohort / "slides" / "000.tif", "--store", tmp_path / "s.zarr", *TILING)
    assert mil(*arguments).code == 0
    shutil.rmtree(store.feature_path("000", "efficientnet_lite0"))
    claim = store.draft("efficientnet_lite0", "000", load_backbone().execution(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("extract.pipeline.run.LEASE_S", 0.5)
        result = mil(*arguments)
    claim.release()
    assert result.code == 3
    assert result.says("1 slide is being extracted by another process")


def test_interrupting_prints_how_to_go_on(mil: Mil, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("extract.pipeline.extraction.extract_slides", interrupted)
    result = mil("extract", tmp_path, "--store", tmp_path / "my store.zarr")
    assert result.code == 130
    assert result.says("To go on: mil extract", "'" + str(tmp_path / "my store.zarr") + "'")
