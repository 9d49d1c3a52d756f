"""Plain files, whole or not at all."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mil import files
from mil.errors import RunError
from mil.files import (
    guarded,
    new_folder,
    probability_text,
    read_csv_dicts,
    read_csv_rows,
    require_writable,
    unguarded,
    write_atomically,
    write_csv,
    write_json,
)


def test_what_a_killed_process_left_is_removed_by_the_next_and_a_live_ones_is_not(tmp_path: Path):
    folder = tmp_path / "run[1]"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, alive, elsewhere, old = (
        tmp_path / f".run[1].{host}-{pid}-{'0' * 8}.partial"
        for host, pid in (
            (files._host(), ended.pid),
            (files._host(), os.getpid()),
            ("0" * 8, ended.pid),
            ("1" * 8, ended.pid),
        )
    )
    others = tmp_path / ".run.partial"
    for each in (left, alive, elsewhere, old, others):
        each.mkdir()
        (each / "x").write_text("x")
    os.utime(old, (0, 0))
    with new_folder(folder) as partial:
        assert partial.parent == tmp_path
    assert folder.is_dir()
    assert [each.exists() for each in (left, alive, elsewhere, old, others)] == [False, True, True, False, True]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_any_text_survives_csv(tmp_path: Path) -> None:
    rows = [["slide_id", "p_HER2(+)"], ['a, "b"\nü', "001"]]
    write_csv(tmp_path / "t.csv", rows)
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == rows


def test_probabilities_are_written_with_nine_digits() -> None:
    assert [probability_text(value) for value in (0.0, 1.0, 2 / 3, 1e-12)] == ["0", "1", "0.666666667", "1e-12"]


def test_a_name_that_is_not_utf8_is_written_all_the_same(tmp_path: Path) -> None:
    name = b"slide \xff".decode("utf-8", "surrogateescape")
    write_csv(tmp_path / "a.csv", [("slide_id",), (name,)])
    assert (tmp_path / "a.csv").read_bytes() == b"slide_id\nslide \xff\n"
    write_json(tmp_path / "a.json", {"slide": name})
    assert json.loads((tmp_path / "a.json").read_text())["slide"] == name


def fill(folder: Path, content: str, overwrite: bool = False, error: BaseException | None = None) -> None:
    with new_folder(folder, overwrite) as partial:
        (partial / "a").write_text(content)
        if error is not None:
            raise error


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    fill(tmp_path / "new" / "one", "1")
    assert (tmp_path / "new" / "one" / "a").read_text() == "1"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            fill(tmp_path / "two", "2", error=error())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_is_replaced_only_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    fill(tmp_path / "one", "1")
    with pytest.raises(RunError, match="not empty"):
        fill(tmp_path / "one", "2")
    assert (tmp_path / "one" / "a").read_text() == "1"
    fill(tmp_path / "one", "2", overwrite=True)
    assert (tmp_path / "one" / "a").read_text() == "2"
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="it is a file"):
        fill(tmp_path / "file", "3")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "file"}


def test_a_folder_that_cannot_be_put_in_place_leaves_the_older_one(tmp_path: Path) -> None:
    fill(tmp_path / "old", "1")
    with pytest.raises(RunError, match="No such file"), new_folder(tmp_path / "old", overwrite=True) as partial:
        partial.rmdir()
    assert (tmp_path / "old" / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_place_that_takes_no_files_is_told_and_one_that_does_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_writable(tmp_path / "a" / "b", "run folder b")
    assert list(tmp_path.iterdir()) == []

    def denied(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(RunError) as caught:
        require_writable(tmp_path / "a" / "b", "store c.zarr", "--store")
    assert str(caught.value) == (
        f"got store c.zarr → {tmp_path} cannot be written (Permission denied) → make it writable, or give another "
        f"folder with --store"
    )


@given(st.text(max_size=12))
def test_text_that_is_guarded_comes_back(text: str) -> None:
    assert unguarded(str(guarded(text))) == text


@pytest.mark.parametrize("text", ["=cmd|'/c calc'!A1", "+1+1", "@SUM(A1)", "-2+3", "\t=1", "\r=1"])
def test_what_a_spreadsheet_would_run_is_text(text: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [("slide_id", text), (text, -0.5)])
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not any(cell[0] in "=+@\t\r" or cell == "-2+3" for cell in cells)
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        assert list(read_csv_rows(file)) == [["slide_id", text], [text, "-0.5"]]
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        assert read_csv_dicts(file) == [{"slide_id": text, text: "-0.5"}]


@pytest.mark.parametrize("number", ["-0.5", "+1", "-1e-05", "-inf", "1.5", "-nan"])
def test_numbers_stay_numbers(number: str) -> None:
    assert guarded(number) == number
