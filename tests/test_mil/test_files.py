"""Plain files, whole or not at all."""

import csv
import json
from pathlib import Path

import pytest

from mil.errors import RunError
from mil.files import probability_text, put_in_place, require_writable, write_atomically, write_csv, write_json


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


def test_a_folder_that_cannot_be_put_in_place_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("1")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "absent", tmp_path / "old")
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
