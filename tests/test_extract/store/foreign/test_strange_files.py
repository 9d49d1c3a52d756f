"""One damaged or unforeseen file never costs those of the others; what hangs or crashes a library is ended."""

import os
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from extract.errors import StoreError, StoreFullError
from extract.store import create_store, open_store
from extract.store.core import files
from extract.store.foreign import ForeignReader, ImportReport, export_store, import_bags, reading
from extract.store.foreign.layouts.matrices import is_tensor_file
from extract.store.upkeep.verify import verify_store
from tests.test_extract import peers
from tests.test_extract.small import EXECUTION, TILES, feature_recipe, tiles_unit, tree


def matrix(seed: int = 0, n: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float32)


def corners(n: int = 12) -> np.ndarray:
    return np.stack([np.arange(n) * 256, np.zeros(n)], axis=1).astype(np.int32)


def write_clam(path: Path, features: np.ndarray, coords: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = features, coords


def failed(report: ImportReport) -> dict[str, str]:
    return {each.slide_id: each.reason for each in report.of("failed")}


@pytest.mark.parametrize("name", ["hang", "segv", "odd", "hang-later", "greedy"])
def test_a_file_that_hangs_crashes_or_surprises_its_reader_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(ForeignReader, "module", "tests.test_extract.hanging_worker")
    monkeypatch.setattr(reading, "PATIENCE_S", 4.0)
    monkeypatch.setattr(reading, "MEMORY_BYTES", 2 << 30)
    for stem in ("a", name, "z"):
        write_clam(tmp_path / "f" / f"{stem}.h5", matrix(), corners())
    report = import_bags(tmp_path / "f", tmp_path / "store")
    assert sorted(each.slide_id for each in report.of("imported")) == ["a", "z"]
    words = {"hang": "busy for more than 4 s", "segv": "ends its reader", "odd": "a surprise", "greedy": "MemoryError"}
    assert words[name.partition("-")[0]] in failed(report)[name]
    assert failed(report)[name].count("→") == 2


def test_a_zip_with_a_damaged_directory_is_listed_and_the_others_are_taken(tmp_path: Path):
    folder = tmp_path / "pt"
    folder.mkdir()
    for stem in ("a", "b", "c"):
        torch.save(torch.from_numpy(matrix()), folder / f"{stem}.pt")
    data = bytearray((folder / "b.pt").read_bytes())
    at = data.rindex(b"b/data.pkl")
    # a name that is no text in the encoding that its flags state
    data[at : at + 2] = b"\xff\xfe"
    flags = data.rindex(b"PK\x01\x02", 0, at) + 8
    data[flags : flags + 2] = (0x800).to_bytes(2, "little")
    (folder / "b.pt").write_bytes(data)
    with pytest.raises((UnicodeDecodeError, zipfile.BadZipFile)):
        zipfile.ZipFile(folder / "b.pt")
    report = import_bags(folder, tmp_path / "store", entry="t")
    assert [each.slide_id for each in report.of("imported")] == ["a", "c"]
    assert list(failed(report)) == ["b"]


def test_no_flipped_byte_ends_an_import(tmp_path: Path, rng: np.random.Generator):
    write_clam(tmp_path / "whole.h5", matrix(), corners())
    torch.save(torch.from_numpy(matrix()), tmp_path / "whole.pt")
    for kind in ("h5", "pt"):
        whole, folder = (tmp_path / f"whole.{kind}").read_bytes(), tmp_path / kind
        folder.mkdir()
        for number in range(30):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(whole), 3):
                damaged[place] = int(rng.integers(256))
            (folder / f"{number:02d}.{kind}").write_bytes(damaged)
        (folder / f"zz.{kind}").write_bytes(whole)
        report = import_bags(folder, tmp_path / f"store-{kind}", entry="t")
        assert len(report.outcomes) + len(report.skipped) + len(report.not_taken) >= 31
        assert "zz" in open_store(tmp_path / f"store-{kind}").slide_ids("t")


# ---------------------------------------------------------------- layouts that were refused


@pytest.mark.parametrize("layout", ["clam", "trident", "stamp", "atlaspatch"])
def test_a_leading_axis_of_coordinates_is_dropped_as_that_of_features(tmp_path: Path, layout: str):
    path = tmp_path / "f" / "S1.h5"
    write = {
        "clam": lambda: write_clam(path, matrix(), corners()),
        "trident": lambda: peers.write_trident(path, matrix(), corners()),
        "stamp": lambda: peers.write_stamp(path, matrix(), corners().astype("f4")),
        "atlaspatch": lambda: peers.write_atlaspatch(path, {"uni": matrix()}, corners()),
    }[layout]
    write()
    answers = reading.Answers(mpp=0.5)
    import_bags(path, tmp_path / "plain", entry="t", answers=answers)
    with h5py.File(path, "r+") as file:
        for name in ("coords", "features", "feats"):
            if isinstance(file.get(name), h5py.Dataset):
                attributes, values = dict(file[name].attrs), file[name][()]
                del file[name]
                file[name] = values[None]
                file[name].attrs.update(attributes)
    report = import_bags(path, tmp_path / "batched", entry="t", answers=answers)
    assert failed(report) == {}
    assert report.layouts == (layout,)
    one, other = open_store(tmp_path / "plain")["S1"], open_store(tmp_path / "batched")["S1"]
    np.testing.assert_array_equal(one.coords(), other.coords())
    np.testing.assert_array_equal(one.features("t"), other.features("t"))


@pytest.mark.parametrize("ending", ["pt", "pth", "bin"])
def test_tensors_saved_before_torch_1_6_are_taken(tmp_path: Path, ending: str):
    path = tmp_path / f"S1.{ending}"
    torch.save(torch.from_numpy(matrix()), path, _use_new_zipfile_serialization=False)
    assert is_tensor_file(path)
    report = import_bags(path, tmp_path / "store", entry="t")
    assert failed(report) == {}
    np.testing.assert_array_equal(open_store(tmp_path / "store")["S1"].features("t"), matrix())


def test_linked_folders_are_searched_and_other_files_are_counted(tmp_path: Path):
    write_clam(tmp_path / "nas" / "b.h5", matrix(1), corners())
    write_clam(tmp_path / "f" / "a.h5", matrix(), corners())
    (tmp_path / "f" / "more").symlink_to("../nas")
    (tmp_path / "f" / "notes.txt").write_text("x")
    (tmp_path / "f" / "thumb.png").write_text("x")
    report = import_bags(tmp_path / "f", tmp_path / "store", entry="t")
    assert [each.slide_id for each in report.of("imported")] == ["a", "more/b"]
    assert report.not_taken.lines() == ["2 files not taken: 1 .txt, 1 .png (no features)"]


# ---------------------------------------------------------------- written several at a time


def test_slides_are_made_safe_several_at_a_time_and_as_safe_as_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for number in range(12):
        write_clam(tmp_path / "f" / f"{number:02d}.h5", matrix(number), corners())
    import_bags(tmp_path / "f", tmp_path / "plain", entry="t")
    synced, at_once, most = Counter[str](), 0, 0
    fsync = os.fsync

    def slowly(descriptor: int) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        synced[os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))] += 1
        time.sleep(0.005)
        fsync(descriptor)
        at_once -= 1

    monkeypatch.setattr(files.os, "fsync", slowly)
    import_bags(tmp_path / "f", tmp_path / "slow", entry="t")
    assert most >= 4
    # every array and every record of every slide
    assert synced["zarr.json"] >= 12 * 2
    monkeypatch.undo()
    assert tree(tmp_path / "plain") == tree(tmp_path / "slow")
    assert verify_store(open_store(tmp_path / "slow")) == []


# ---------------------------------------------------------------- exports


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of four slides."""
    made = create_store(tmp_path / "s.zarr", TILES)
    made.create_entry("tiny", feature_recipe())
    for slide_id in "abcd":
        made.write_tiles(tiles_unit(slide_id))
        n = len(made[slide_id].coords())
        made.write_features("tiny", slide_id, np.ones((n, 6), np.float16), [], EXECUTION)
    return tmp_path / "s.zarr"


@contextmanager
def full_after(n_bytes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that takes so much of an export, and no more."""
    from extract.store.foreign import exporting

    left, write = n_bytes, exporting._write_bytes

    def limited(path: Path, content: Any) -> None:
        nonlocal left
        left -= len(content.getvalue())
        if left < 0:
            path.write_bytes(content.getvalue()[:10])
            raise OSError(28, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_write_bytes", limited)
        yield


@pytest.mark.parametrize("format", ["clam", "trident"])
def test_an_export_that_ran_out_of_room_goes_on_when_there_is_some(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
):
    out = tmp_path / "out"
    with full_after(9000, monkeypatch), pytest.raises(StoreFullError):
        export_store(open_store(store), out, format)
    whole = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.suffix in (".h5", ".pt")}
    assert 0 < len(whole) < 8
    assert not list(out.rglob("~*"))
    # another export is not what was begun
    with pytest.raises(StoreError, match="not an empty folder"):
        export_store(open_store(store), out, "spatialdata")
    outcomes = export_store(open_store(store), out, format)
    assert [each.outcome for each in outcomes] == ["imported"] * 4
    assert all(path.stat().st_mtime_ns == when for path, when in whole.items())
    export_store(open_store(store), tmp_path / "once", format)
    assert {path.relative_to(out) for path in out.rglob("*")} == {
        path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*")
    }
    with pytest.raises(StoreError, match="not an empty folder"):
        export_store(open_store(store), out, format)


def test_what_has_no_room_at_all_is_refused_before_anything_is_written(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from extract.store.foreign import exporting

    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 20})())
    with pytest.raises(StoreFullError, match="nothing was written"):
        export_store(open_store(store), tmp_path / "out", "clam")
    assert not (tmp_path / "out").exists()
