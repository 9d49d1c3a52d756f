"""Verification: a healthy store gives no finding, and no damage goes unseen."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

import extract.store.upkeep.verify as verify_module
from extract.errors import EntryNotFoundError, StoreError
from extract.store import SlideFingerprint, Store, create_store
from extract.store.upkeep.checks import commit_problems, fit_problems, matrix_problems, record_problems
from extract.store.upkeep.verify import open_or_find, verify_store
from tests.test_extract.healthy import FORMATS, RECIPE, change_bytes, healthy_store, unit_files, whole_unit
from tests.test_extract.small import EXECUTION, feature_recipe


@pytest.fixture(params=FORMATS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A healthy store of three slides and two entries."""
    return healthy_store(tmp_path / "store", request.param)


def wrong(store: Store, **options: Any) -> set[tuple[str | None, str | None]]:
    """Which slides and entries have findings."""
    return {(finding.slide_id, finding.entry) for finding in verify_store(store, **options)}


def spoil(unit: Path) -> None:
    """Overwrite the last bytes of a features unit's first file."""
    change_bytes(unit_files(unit)[0], lambda content: content.__setitem__(slice(-9, None), b"?" * 9))


def everything(unit: Path) -> dict[str, Any]:
    """All that any reader reads of a unit: its values, and the attributes and layout that surround them."""
    if unit.is_dir():
        nodes = {path: json.loads(path.read_bytes()) for path in sorted(unit.rglob("zarr.json"))}
        arrays = {
            path: np.asarray(zarr.open_array(path.parent, mode="r")[...]) for path in nodes if "shape" in nodes[path]
        }
        return {"nodes": nodes, "arrays": {path: array.tobytes() for path, array in arrays.items()}}
    found: dict[str, Any] = {}
    with h5py.File(unit, "r", locking=False) as file:
        found["/"] = {key: str(value) for key, value in file.attrs.items()}
        for name, data in file.items():
            attributes = {key: str(value) for key, value in data.attrs.items()}
            found[name] = (data.shape, data.dtype, data.chunks, attributes, data[...].tobytes())
    return found


# ---------------------------------------------------------------- healthy


def test_a_healthy_store_gives_no_finding(store: Store):
    seen: list[tuple[int, int, int]] = []
    assert verify_store(store, on_progress=lambda *step: seen.append(step)) == []
    assert [step[:2] for step in seen] == [(i, 9) for i in range(1, 10)]
    units = [unit for entry in (None, "tiny", "wide") for unit in store.unit_paths(entry).values()]
    assert sum(step[2] for step in seen) == sum(path.stat().st_size for unit in units for path in unit_files(unit))


def test_slides_without_features_and_an_empty_store_are_healthy(tmp_path: Path):
    store = create_store(tmp_path / "store", RECIPE)
    assert verify_store(store) == []
    store.write_tiles(whole_unit("a"))
    assert verify_store(store) == []


def test_features_that_zarr_python_chunked_anew_are_healthy(tmp_path: Path):
    store = healthy_store(tmp_path / "store", "zarr")
    unit = store.feature_path("a", "tiny")
    values, attributes = zarr.open_array(unit, mode="r")[:], zarr.open_array(unit, mode="r").attrs.asdict()
    shutil.rmtree(unit)
    zarr.create_array(unit, data=values, chunks=(4, 6), attributes=attributes)
    assert verify_store(store) == []


def test_only_the_entries_that_were_named_are_looked_at(store: Store):
    change_bytes(
        unit_files(store.feature_path("a", "wide"))[0], lambda content: content.__setitem__(slice(-9, None), b"?" * 9)
    )
    assert wrong(store) == {("a", "wide")}
    assert wrong(store, entries=["tiny"]) == set()
    with pytest.raises(EntryNotFoundError, match="wide"):
        verify_store(store, entries=["wdie"])


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("entry", [None, "tiny"])
def test_every_flipped_byte_is_found_or_read_by_nobody(
    tmp_path: Path, format: str, entry: str | None, rng: np.random.Generator
):
    """What HDF5 leaves unused, and bits that a decompressor ignores, can say nothing wrong: no reader reads them."""
    store = healthy_store(tmp_path / "store", format, ("a",))
    unit = store.unit_paths(entry)["a"]
    before, files, unseen = everything(unit), unit_files(unit), []
    for _ in range(80):
        path = files[rng.integers(len(files))]
        content = path.read_bytes()
        place, flip = int(rng.integers(len(content))), int(rng.integers(1, 256))
        change_bytes(path, lambda raw, place=place, flip=flip: raw.__setitem__(place, raw[place] ^ flip))
        if not wrong(store, workers=1):
            assert everything(unit) == before, (path, place, flip)
            unseen.append(content[place])
        path.write_bytes(content)
    assert wrong(store) == set()
    assert not any(unseen) if format == "h5" else len(unseen) <= 3


def test_a_changed_blank_in_the_metadata_is_found(tmp_path: Path):
    store = healthy_store(tmp_path / "store", "zarr", ("a",))
    for entry in (None, "tiny"):
        for path in store.unit_paths(entry)["a"].rglob("zarr.json"):
            content = path.read_bytes()
            path.write_bytes(content.replace(b": ", b":\t", 1))
            assert {slide_id for slide_id, _ in wrong(store)} == {"a"}, path
            path.write_bytes(content)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_every_truncated_file_is_found(store: Store, keep: float):
    for entry in (None, "tiny"):
        for path in unit_files(store.unit_paths(entry)["a"]):
            content = path.read_bytes()
            path.write_bytes(content[: int(len(content) * keep)])
            assert {slide_id for slide_id, _ in wrong(store)} == {"a"}, path
            path.write_bytes(content)


def test_every_file_that_is_removed_or_no_such_file_is_found(store: Store):
    for entry in (None, "wide"):
        for path in unit_files(store.unit_paths(entry)["a"]):
            content = path.read_bytes()
            for replacement in (b"", b"[]", b"{}", b"\x89HDF nonsense", os.urandom(300)):
                path.write_bytes(replacement)
                assert {slide_id for slide_id, _ in wrong(store)} == {"a"}, (path, replacement)
            if store.format == "zarr":
                path.unlink()
                assert {slide_id for slide_id, _ in wrong(store)} == {"a"}, path
            path.write_bytes(content)
    assert wrong(store) == set()


@pytest.mark.parametrize("entry", [None, "tiny"])
def test_a_unit_renamed_or_copied_by_hand_is_found(store: Store, entry: str | None):
    units = store.unit_paths(entry)
    copy = shutil.copytree if units["a"].is_dir() else shutil.copy
    copy(units["a"], units["a"].with_name(f"copy of it{store.suffix}"))
    copy(units["a"], units["a"].with_name(f"z{store.suffix}"))
    assert wrong(store) == {("copy of it", entry), ("z", entry)}


def test_a_unit_of_another_slide_in_its_place_is_found(store: Store):
    units = store.unit_paths("tiny")
    os.rename(units["b"], store.path / "b")
    (shutil.copytree if units["a"].is_dir() else shutil.copy)(units["a"], units["b"])
    assert wrong(store) == {("b", "tiny")}


def test_one_unit_that_raises_anything_hides_no_other(store: Store, monkeypatch: pytest.MonkeyPatch):
    change_bytes(
        unit_files(store.feature_path("b", "wide"))[0], lambda content: content.__setitem__(slice(-9, None), b"?" * 9)
    )
    read = type(store)._read_array

    def explode(self: Store, unit: Path, name: str, rows: Any = None) -> np.ndarray:
        if unit == store.tiles_path("a"):
            raise ZeroDivisionError("surprise")
        return read(self, unit, name, rows)

    monkeypatch.setattr(type(store), "_read_array", explode)
    findings = verify_store(store)
    assert {(f.slide_id, f.entry) for f in findings} == {("a", None), ("b", "wide")}
    assert "surprise" in findings[0].what


def test_a_file_that_may_not_be_read_is_not_taken_for_damage(store: Store, monkeypatch: pytest.MonkeyPatch):
    unit = store.feature_path("a", "tiny")

    def deny(path: Path) -> int:
        if path == unit:
            raise PermissionError(13, "Permission denied", str(path))
        return 0

    monkeypatch.setattr(verify_module, "_read_through", deny)
    (finding,) = verify_store(store)
    assert (finding.slide_id, finding.entry, finding.movable) == ("a", "tiny", False)
    assert "Permission denied" in finding.what
    assert "chmod" in finding.fix


def test_a_bad_sector_is_a_finding(store: Store, monkeypatch: pytest.MonkeyPatch):
    unit = store.tiles_path("a")

    def fail(path: Path) -> int:
        if path == unit:
            raise OSError(5, "Input/output error", str(path))
        return 0

    monkeypatch.setattr(verify_module, "_read_through", fail)
    (finding,) = verify_store(store)
    assert (finding.slide_id, finding.movable) == ("a", True)
    assert "Input/output error" in finding.what


def test_a_unit_removed_meanwhile_is_no_damage(store: Store, monkeypatch: pytest.MonkeyPatch):
    read, unit = verify_module._read_through, store.feature_path("a", "tiny")

    def remove(path: Path) -> int:
        if path == unit:
            shutil.rmtree(unit) if unit.is_dir() else unit.unlink()
        return read(path)

    monkeypatch.setattr(verify_module, "_read_through", remove)
    assert verify_store(store) == []


# ---------------------------------------------------------------- what belongs together


def test_features_of_other_tiles_blame_the_tiles_which_are_cheap(store: Store):
    unit = store.tiles_path("a")
    shutil.rmtree(unit) if unit.is_dir() else unit.unlink()
    store.write_tiles(whole_unit("a", seed=9))
    findings = verify_store(store)
    assert {(f.slide_id, f.entry) for f in findings} == {("a", "tiny"), ("a", "wide")}
    assert {f.path for f in findings} == {unit}


def test_features_of_damaged_tiles_are_not_blamed(store: Store):
    for path in unit_files(store.tiles_path("a")):
        path.write_bytes(b"?")
    assert wrong(store) == {("a", None)}


def test_features_whose_tiles_are_missing_are_checked_and_no_damage(store: Store):
    unit = store.tiles_path("a")
    shutil.rmtree(unit) if unit.is_dir() else unit.unlink()
    assert wrong(store) == set()
    change_bytes(
        unit_files(store.feature_path("a", "wide"))[0], lambda content: content.__setitem__(slice(-9, None), b"?" * 9)
    )
    assert wrong(store) == {("a", "wide")}


def test_a_changed_recipe_of_an_entry_is_found(store: Store):
    file = store.path / "features" / "tiny" / store.entry_name
    text = file.read_text()
    for content in (text.replace('"revision": "1"', '"revision": "2"'), text[:-40], "[]", text.replace("dim", "dum")):
        assert content != text
        file.write_text(content)
        assert wrong(store) == {(None, "tiny")}
    file.unlink()
    assert wrong(store) == {(None, "tiny")}


def test_a_store_whose_own_record_is_damaged_is_told_apart_from_none(store: Store, tmp_path: Path):
    file = store.path / store.root_name
    text = file.read_text()
    for content in (
        text.replace('"tile_px": 64', '"tile_px": 65'),
        text[:-40],
        "[]",
        text.replace("tile_recipe", "tele"),
    ):
        assert content != text
        file.write_text(content)
        finding = open_or_find(store.path)
        assert not isinstance(finding, Store)
        assert (finding.path, finding.movable) == (file, False)
    with pytest.raises(StoreError, match="no "):
        open_or_find(tmp_path)


def test_slide_files_are_compared_with_what_was_cut(tmp_path: Path):
    store, files = create_store(tmp_path / "store", RECIPE), {}
    for name in ("a", "b", "c"):
        files[name] = tmp_path / f"{name}.tif"
        files[name].write_bytes(name.encode() * 5000)
        unit = whole_unit(name)
        store.write_tiles(replace(unit, record={**unit.record, "slide": asdict(SlideFingerprint.of(files[name]))}))
    assert verify_store(store, slide_files=files) == []
    change_bytes(files["b"], lambda content: content.__setitem__(2500, 0))
    files["c"].unlink()
    findings = verify_store(store, slide_files=files)
    assert [(f.slide_id, f.path, f.movable) for f in findings] == [("b", files["b"], False), ("c", files["c"], False)]


def test_quick_verification_reads_no_embeddings_but_sees_what_is_cheap(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("extract.store.upkeep.checks._read_matrix", lambda _: pytest.fail("embeddings were read"))
    assert wrong(store, quick=True) == set()
    path = unit_files(store.feature_path("a", "tiny"))[0]
    path.write_bytes(path.read_bytes()[:-20])
    assert wrong(store, quick=True) == {("a", "tiny")}


# ---------------------------------------------------------------- the checks themselves


def tiles_record(**changes: Any) -> dict[str, Any]:
    return {**whole_unit("a").record, "slide_id": "a", "n_tiles": 6, "sha256": {"coords": ""}, **changes}


def test_records_that_do_not_fit_the_recipe_are_problems():
    assert record_problems(tiles_record(), RECIPE) == []
    assert len(record_problems(tiles_record(tile_px=65), RECIPE)) == 1
    assert len(record_problems(tiles_record(mpp={"requested": 0.25}), RECIPE)) == 1
    assert len(record_problems(tiles_record(n_tiles=17), RECIPE)) == 1
    assert len(record_problems(tiles_record(sha256={"cords": ""}), RECIPE)) == 1


def test_places_outside_the_slide_or_out_of_order_are_problems():
    coords = whole_unit("a").coords
    for bad, word in (
        (coords + np.int32(200), "outside"),
        (coords - np.int32(70), "outside"),
        (coords[::-1], "order"),
        (np.repeat(coords[:3], 2, axis=0), "order"),
    ):
        (problem,) = fit_problems({"coords": bad}, tiles_record(), RECIPE)
        assert word in problem
    assert fit_problems({"coords": coords}, tiles_record(), RECIPE) == []
    # an import says neither how large the slide was nor that the tiles are of a grid
    assert fit_problems({"coords": coords[::-1] + 900}, {"n_tiles": 6}, RECIPE) == []


def test_fractions_and_masks_that_make_no_sense_are_problems():
    unit = whole_unit("a")
    for value in (-0.1, 1.1, np.nan):
        fraction = unit.tissue_fraction.copy()
        fraction[1] = value
        assert len(fit_problems({"tissue_fraction": fraction}, tiles_record(), RECIPE)) == 1
    mask = np.asarray(unit.tissue_mask)
    assert fit_problems({"tissue_mask": mask.astype(np.uint8)}, tiles_record(), RECIPE) == []
    assert len(fit_problems({"tissue_mask": ~mask}, tiles_record(), RECIPE)) == 1
    assert len(fit_problems({"tissue_mask": mask, "thumbnail": unit.thumbnail[1:]}, tiles_record(), RECIPE)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"n_tiles": 7},
        {"invalid_rows": [6]},
        {"invalid_rows": [-1]},
        {"invalid_rows": [3, 3]},
        {"invalid_rows": [4, 2]},
        {"invalid_rows": [True]},
        {"flagged_rows": {"pen": [1.5]}},
        {"flagged_rows": {"pin": [1]}},
        {"execution": {**asdict(EXECUTION), "batch_size": 5}},
    ],
)
def test_commit_records_that_contradict_themselves_are_problems(tmp_path: Path, change: dict[str, Any]):
    store = healthy_store(tmp_path / "store", "zarr", ("a",))
    record = store["a"].feature_record("tiny")
    assert commit_problems(record, store["a"].record) == []
    assert len(commit_problems({**record, **change}, store["a"].record)) == 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_that_are_not_those_of_the_record_are_problems(tmp_path: Path, dtype: str):
    store = healthy_store(tmp_path / "store", "zarr", ("a",))
    entry = {"float16": "tiny", "float32": "wide"}[dtype]
    record, recipe = store["a"].feature_record(entry), feature_recipe(dtype=dtype)
    features = np.array(store["a"].matrix(entry))
    assert matrix_problems(features, record, recipe) == []
    assert matrix_problems(features, record, None) == []
    assert "expected" in matrix_problems(features[:, :5], record, recipe)[0]
    assert "expected" in matrix_problems(features[:5], record, recipe)[0]
    assert "expected" in matrix_problems(features.astype("float64"), record, recipe)[0]
    for value in (np.inf, -np.inf, np.nan):
        bad = features.copy()
        bad[3, 1] = value
        problems = matrix_problems(bad, record, recipe)
        assert [("checksum" in p, "finite" in p) for p in problems] == [(True, False), (False, True)]
    bad = features.copy()
    bad[2, 0] = 1
    assert any("not zero" in problem for problem in matrix_problems(bad, record, recipe))


def test_finite_is_told_from_infinite_at_the_edge():
    for dtype in ("float16", "float32"):
        edge = np.array([[np.finfo(dtype).max, np.finfo(dtype).min, -0.0, np.finfo(dtype).smallest_subnormal]], dtype)
        record = {"n_tiles": 1, "invalid_rows": [], "sha256": ""}
        assert [p for p in matrix_problems(edge, record, feature_recipe(4, dtype)) if "finite" in p] == []
