"""``mil store import`` and ``mil store export`` as people type them, and training on what comes in."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import mil
from extract.errors import StoreError
from extract.store import open_store
from mil.cli.main import app
from tests.test_extract import peers
from tests.test_extract.peers import corners, matrix


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and output."""
    done = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "400"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_import_and_export_tell_what_they_did(tmp_path: Path):
    for at, name in enumerate(("a", "b")):
        peers.write_trident(tmp_path / "t" / f"{name}.h5", matrix(seed=at), corners())
    (tmp_path / "t" / "bad.h5").write_bytes(b"no")
    code, text = run("store", "import", tmp_path / "t", "--store", tmp_path / "s.zarr", "--as", "uni")
    assert code == 1
    assert "entry uni: 2 imported from trident (24 rows), 0 there before, 1 failed" in text
    assert "its bytes are not those of .h5" in text
    (tmp_path / "t" / "bad.h5").unlink()
    code, text = run("store", "import", tmp_path / "t", "--store", tmp_path / "s.zarr", "--as", "uni")
    assert code == 0
    assert "0 imported from trident (0 rows), 2 there before, 0 failed" in text
    code, text = run("store", "export", tmp_path / "s.zarr", "--format", "clam", "--out", tmp_path / "out")
    assert (code, "2 slides written, 0 failed" in text) == (0, True)
    code, _ = run("store", "import", tmp_path / "out", "--store", tmp_path / "again.h5s", "--format", "h5")
    assert code == 0
    assert open_store(tmp_path / "again.h5s").format == "h5"
    np.testing.assert_array_equal(open_store(tmp_path / "again.h5s")["b"].features("imported"), matrix(seed=1))


def test_a_question_is_answered_by_the_flag_it_names(tmp_path: Path):
    peers.write_stamp(tmp_path / "t" / "a.h5", matrix(), (corners() * 0.25).astype(np.float32))
    code, text = run("store", "import", tmp_path / "t", "--store", tmp_path / "s")
    assert code == 1
    assert "--mpp" in text
    (tmp_path / "mpps.csv").write_text("slide_id,mpp\na,0.25\n")
    code, _ = run("store", "import", tmp_path / "t", "--store", tmp_path / "s", "--mpps", tmp_path / "mpps.csv")
    assert code == 0
    np.testing.assert_array_equal(open_store(tmp_path / "s")["a"].coords(), corners())
    code, text = run("store", "import", tmp_path / "t", "--store", tmp_path / "x", "--no-coords")
    assert (code, "no heatmaps" in text) == (0, True)


@pytest.mark.parametrize("table", ["slide,mpp\na,1\n", "slide_id,mpp\na,x\n", "slide_id,mpp\na,-1\n"])
def test_a_table_of_mpps_that_is_wrong_is_refused(tmp_path: Path, table: str):
    (tmp_path / "mpps.csv").write_text(table)
    code, text = run("store", "import", tmp_path, "--store", tmp_path / "s", "--mpps", tmp_path / "mpps.csv")
    assert code == 2
    assert "--mpps" in text


def test_what_an_import_does_not_know_is_said_in_words(tmp_path: Path):
    np.savez(tmp_path / "t.npz", x=np.ones((6, 4), np.float32), bag=np.arange(6) // 2, y=np.array([0, 1, 0]))
    run("store", "import", tmp_path / "t.npz", "--store", tmp_path / "t.zarr")
    code, text = run("store", "ls", tmp_path / "t.zarr")
    assert code == 0
    assert "6 tiles of unknown size at an unknown scale" in text
    assert "imported (backbone unknown)" in text
    assert "unknown:" not in text
    assert "unknown size at an unknown scale" in repr(open_store(tmp_path / "t.zarr"))


def test_a_head_trains_on_bags_without_places(tmp_path: Path):
    rng = np.random.default_rng(0)
    y = np.arange(24) % 2
    bag = np.repeat(np.arange(24), 4)
    x = (rng.normal(size=(96, 6)) + 2 * y[bag][:, None]).astype(np.float32)
    np.savez(tmp_path / "t.npz", x=x, bag=bag, y=y)
    code, text = run("store", "import", tmp_path / "t.npz", "--store", tmp_path / "t.zarr")
    assert (code, "24 slides without coordinates" in text) == (0, True)
    options = ("--store", tmp_path / "t.zarr", "--labels", tmp_path / "t.labels.csv", "--target", "label")
    code, _ = run("train", *options, "--out", tmp_path / "run", "folds=2", "seeds=1", "epochs=5", "head=mean")
    assert code == 0
    code, _ = run("predict", "--run", tmp_path / "run", "--store", tmp_path / "t.zarr", "--out", tmp_path / "p.csv")
    assert code == 0
    store = open_store(tmp_path / "t.zarr")
    with pytest.raises(StoreError, match="no heatmap"):
        store["bag-000"].coords("imported")


def test_musk1_is_imported_and_trained_on(tmp_path: Path, data_folder: Path):
    path = data_folder / "mil_classic" / "musk1.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    code, text = run("store", "import", path, "--store", tmp_path / "musk1.zarr")
    assert (code, "92 imported from classic (476 rows)" in text) == (0, True)
    store = open_store(tmp_path / "musk1.zarr")
    with np.load(path) as data:
        for number in (0, 45, 91):
            np.testing.assert_array_equal(
                store[f"bag-{number:03d}"].features("imported"), data["x"][data["bag"] == number]
            )
    cohort = mil.read_cohort(tmp_path / "musk1.labels.csv", target="label")
    trained = mil.train(store, cohort, head="abmil", folds=2, seeds=1, epochs=3)
    assert trained.metrics["out_of_fold"]["auroc"]["value"] > 0.5
