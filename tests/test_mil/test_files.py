"""Plain files, whole or not at all."""

import csv
from pathlib import Path

import pytest

from mil.files import probability_text, write_atomically, write_csv


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
