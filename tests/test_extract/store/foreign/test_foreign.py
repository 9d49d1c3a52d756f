"""Importing and exporting: what comes in is what was there, places are exact, and what is unclear is asked."""

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.errors import (
    AmbiguousError,
    EntryNotFoundError,
    FeatureRangeError,
    ForeignFileError,
    RecipeMismatchError,
    StoreError,
)
from extract.store import TileRecipe, create_store, difference, open_store
from extract.store.core.recipes import is_unknown
from extract.store.foreign import (
    Answers,
    ForeignReader,
    ImportReport,
    export_store,
    import_bags,
    reading,
    survey,
    worker,
    write_labels,
)
from extract.store.foreign.layouts.frames import Frame, corners_l0
from extract.store.foreign.layouts.matrices import clean_features
from tests.test_extract import peers
from tests.test_extract.peers import GRID_L0, corners, matrix
from tests.test_extract.small import feature_recipe


def taken(report: ImportReport) -> ImportReport:
    """The report, which must list no failure."""
    assert [(each.slide_id, each.reason) for each in report.of("failed")] == []
    return report


def reason(report: ImportReport, slide_id: str) -> str:
    found = {each.slide_id: each.reason for each in report.of("failed")}
    assert slide_id in found, found
    return found[slide_id]


def assert_same(store: Path, slide_id: str, features: np.ndarray, coords: np.ndarray | None, entry: str) -> None:
    """The store holds these bytes, row for row."""
    slide = open_store(store)[slide_id]
    got = slide.features(entry)
    assert got.dtype == features.dtype
    assert got.tobytes() == features.tobytes()
    slide.verify_features(entry)
    slide.verify_tiles()
    if coords is None:
        with pytest.raises(StoreError, match=r"no coords.*no heatmap"):
            slide.coords(entry)
        return
    assert slide.coords(entry).dtype == np.int32
    np.testing.assert_array_equal(slide.coords(entry), coords)


# ------------------------------------------------------------------------------------------------ one layout at a time


@pytest.fixture(params=["zarr", "h5"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("axis", [False, True])
def test_trident_comes_and_goes_bit_by_bit(tmp_path: Path, backend: str, dtype: str, axis: bool):
    source = tmp_path / "features_uni_v1"
    for at, name in enumerate(("a", "site/b")):
        features = matrix(seed=at, dtype=dtype)
        peers.write_trident(source / f"{name}.h5", features[None] if axis else features, corners(seed=at))
    store = tmp_path / "store"
    report = taken(import_bags(source, store, entry="uni", format=backend))
    assert report.layouts == ("trident",)
    assert [each.slide_id for each in report.of("imported")] == ["a", "site/b"]
    for at, name in enumerate(("a", "site/b")):
        assert_same(store, name, matrix(seed=at, dtype=dtype), corners(seed=at), "uni")
    assert open_store(store)["a"].record["tile_l0"] == GRID_L0
    assert open_store(store).tile_recipe.tile_px == 256
    assert all(each.outcome == "imported" for each in export_store(open_store(store), tmp_path / "out", "trident"))
    with h5py.File(tmp_path / "out" / "site" / "b.h5") as file, h5py.File(source / "site" / "b.h5") as before:
        assert file["features"][:].tobytes() == before["features"][:].tobytes()
        np.testing.assert_array_equal(file["coords"][:], before["coords"][:])
        assert {key: before["coords"].attrs[key] for key in before["coords"].attrs}.items() <= dict(
            file["coords"].attrs
        ).items()


def test_clam_comes_and_goes_bit_by_bit(tmp_path: Path, backend: str):
    features, places = matrix(), corners()
    peers.write_clam(tmp_path / "clam", "a", features, places)
    report = taken(import_bags(tmp_path / "clam", tmp_path / "store", format=backend))
    assert report.layouts == ("clam",)
    assert list(report.skipped.values()) == ["an .h5 of the same name is there, and was taken"]
    assert_same(tmp_path / "store", "a", features, places, "imported")
    export_store(open_store(tmp_path / "store"), tmp_path / "out", "clam")
    with h5py.File(tmp_path / "out" / "h5_files" / "a.h5") as file:
        assert file["features"][:].tobytes() == features.tobytes()
        np.testing.assert_array_equal(file["coords"][:], places)
        assert file["coords"].dtype == np.int32
    tensor = torch.load(tmp_path / "out" / "pt_files" / "a.pt", weights_only=True)
    assert tensor.numpy().tobytes() == features.tobytes()
    taken(import_bags(tmp_path / "out", tmp_path / "again"))
    assert_same(tmp_path / "again", "a", features, places, "imported")


def test_a_folder_of_tensors_has_no_places_and_goes_out_as_clam(tmp_path: Path, backend: str):
    peers.write_clam(tmp_path / "clam", "a", matrix(), corners())
    report = taken(import_bags(tmp_path / "clam" / "pt_files", tmp_path / "store", format=backend))
    assert [each.has_coords for each in report.outcomes] == [False]
    assert_same(tmp_path / "store", "a", matrix(), None, "imported")
    store = open_store(tmp_path / "store")
    for name in ("tissue_fraction", "thumbnail", "tissue_mask"):
        with pytest.raises(StoreError, match="import"):
            getattr(store["a"], name)
    assert store["a"].valid("imported").all()
    [outcome] = export_store(store, tmp_path / "trident", "trident")
    assert "without coordinates" in outcome.reason
    [outcome] = export_store(store, tmp_path / "clam2", "clam")
    assert outcome.outcome == "imported"


@pytest.mark.parametrize("mpp", [0.2425, 0.5, 0.62005])
@pytest.mark.parametrize("version", ["2.1", "2.0"])
def test_stamp_micrometres_become_the_pixels_they_were(tmp_path: Path, mpp: float, version: str):
    places = corners(step_l0=1055)
    features = matrix(dtype="float16")
    peers.write_stamp(tmp_path / "s" / "a.h5", features, (places * mpp).astype(np.float32), version)
    assert "--mpp" in reason(import_bags(tmp_path / "s", tmp_path / "x"), "a")
    taken(import_bags(tmp_path / "s", tmp_path / "store", answers=Answers(mpp=mpp)))
    assert_same(tmp_path / "store", "a", features, places, "ctranspath")
    record = open_store(tmp_path / "store")["a"].record
    assert record["mpp"]["native"] == mpp
    assert record["tile_l0"] == pytest.approx(256 / mpp)
    if version == "2.1":
        assert open_store(tmp_path / "store").tile_recipe.mpp == pytest.approx(256 / 224)


def test_stamp_1_is_taken_only_when_it_is_named_and_has_its_stride(tmp_path: Path):
    raw = corners(step_l0=224).astype(np.float32)
    peers.write_stamp(tmp_path / "s" / "a.h5", matrix(), raw, "1")
    why = reason(import_bags(tmp_path / "s", tmp_path / "x"), "a")
    assert "--coords px" in why
    assert "--origin" in why
    taken(import_bags(tmp_path / "s", tmp_path / "store", answers=Answers(layout="stamp", mpp=0.5)))
    assert_same(tmp_path / "store", "a", matrix(), np.rint(raw / 224 * 256 / 0.5), "imported")
    peers.write_stamp(tmp_path / "t" / "a.h5", matrix(), corners(step_l0=512), "1")
    failed = import_bags(tmp_path / "t", tmp_path / "y", answers=Answers(layout="stamp", mpp=0.5))
    assert "512 apart" in reason(failed, "a")


def test_mpps_may_differ_between_slides(tmp_path: Path):
    mpps = {"a": 0.25, "b": 0.5}
    for name, mpp in mpps.items():
        peers.write_stamp(tmp_path / "s" / f"{name}.h5", matrix(), (corners() * mpp).astype(np.float32))
    taken(import_bags(tmp_path / "s", tmp_path / "store", answers=Answers(mpps=mpps)))
    for name in mpps:
        assert_same(tmp_path / "store", name, matrix(), corners(), "ctranspath")


@pytest.mark.parametrize("side", [604, 605])
def test_slideflow_centres_become_corners(tmp_path: Path, side: int):
    places, features = corners(step_l0=side), matrix()
    peers.write_slideflow(tmp_path / "bags", "a", features, places + side // 2)
    assert "--tile-px" in reason(import_bags(tmp_path / "bags", tmp_path / "x"), "a")
    taken(import_bags(tmp_path / "bags", tmp_path / "store", answers=Answers(tile_l0=side)))
    assert_same(tmp_path / "store", "a", features, places, "ctranspathfeatures")
    # tile_um / mpp = 604.0 and 605.2
    mpp = 0.5 if side == 604 else 0.499
    taken(import_bags(tmp_path / "bags", tmp_path / "by-mpp", answers=Answers(mpp=mpp)))
    assert_same(tmp_path / "by-mpp", "a", features, places, "ctranspathfeatures")


def test_atlaspatch_holds_several_matrices_on_the_same_tiles(tmp_path: Path):
    path = tmp_path / "patches" / "a.h5"
    peers.write_atlaspatch(path, {"resnet50": matrix(), "uni_v2": matrix(dim=7)}, corners())
    assert "--dataset" in reason(import_bags(path.parent, tmp_path / "store"), "a")
    for name, dim in (("resnet50", 5), ("uni_v2", 7)):
        taken(import_bags(path.parent, tmp_path / "store", answers=Answers(dataset=name)))
        assert_same(tmp_path / "store", "a", matrix(dim=dim), corners(), name)
    assert open_store(tmp_path / "store").entries() == ["resnet50", "uni_v2"]
    absent = import_bags(path.parent, tmp_path / "store", answers=Answers(dataset="vit"))
    assert "resnet50" in reason(absent, "a")


def read_here(self: ForeignReader, path: Path, request: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What the reading process would answer, in this one."""
    answer, arrays = worker.answer(json.loads(json.dumps(request)))
    if "error" in answer:
        raise reading._rebuilt(path, answer["error"])
    return json.loads(json.dumps(answer)), arrays


@pytest.fixture
def parquet(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Reads and writes tables of columns: pyarrow's where it is installed, else a stand-in for its ``read_table``."""
    try:
        arrow, real = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        return SimpleNamespace(write=lambda path, columns: real.write_table(arrow.table(columns), path))
    except ImportError:
        pass
    held: dict[str, Mapping[str, Any]] = {}
    # another process would not know the stand-in
    monkeypatch.setattr(ForeignReader, "_ask", read_here)

    class Column(list[Any]):
        def to_pylist(self) -> list[Any]:
            return list(self)

    class Table:
        def __init__(self, columns: Mapping[str, Any]) -> None:
            self._columns, self.column_names = columns, list(columns)

        def __getitem__(self, name: str) -> Column:
            return Column(self._columns[name])

    def write(path: Path, columns: Mapping[str, Any]) -> None:
        path.write_bytes(b"PAR1")
        held[str(path)] = columns

    module = ModuleType("pyarrow.parquet")
    module.read_table = lambda path: Table(held[str(path)])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    return SimpleNamespace(write=write)


def test_wsidata_tiles_are_joined_by_their_id_not_their_order(tmp_path: Path, parquet: SimpleNamespace):
    peers.write_wsidata(tmp_path / "w" / "a.zarr", matrix(), corners(), parquet)
    taken(import_bags(tmp_path / "w", tmp_path / "store"))
    assert_same(tmp_path / "store", "a", matrix(), corners(), "uni_tiles")
    store = open_store(tmp_path / "store")
    assert (store.tile_recipe.mpp, store.tile_recipe.tile_px) == (0.5, 256)
    assert store["a"].record["tile_l0"] == GRID_L0


def test_wsidata_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = SimpleNamespace(write=lambda path, columns: path.write_bytes(b"PAR1"))
    peers.write_wsidata(tmp_path / "w" / "a.zarr", matrix(), corners(), writer)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in reason(import_bags(tmp_path / "w", tmp_path / "store"), "a")
    taken(import_bags(tmp_path / "w", tmp_path / "store", answers=Answers(without_coords=True)))
    assert_same(tmp_path / "store", "a", matrix(), None, "uni_tiles")


def test_spatialdata_goes_out_and_comes_back(tmp_path: Path, backend: str):
    peers.write_trident(tmp_path / "t" / "s" / "a.h5", matrix(dtype="float16"), corners())
    taken(import_bags(tmp_path / "t", tmp_path / "store", entry="uni", format=backend))
    export_store(open_store(tmp_path / "store"), tmp_path / "out", "spatialdata")
    table = zarr.open_group(tmp_path / "out" / "s" / "a.zarr", mode="r")["tables"]["uni"]
    np.testing.assert_array_equal(table["obsm"]["spatial"][:], corners() + GRID_L0 / 2)
    taken(import_bags(tmp_path / "out", tmp_path / "again"))
    assert_same(tmp_path / "again", "s/a", matrix(dtype="float16"), corners(), "uni")
    assert open_store(tmp_path / "again")["s/a"].record["tile_l0"] == GRID_L0


def test_a_zarr_group_that_was_copied_in_part_is_refused(tmp_path: Path, parquet: SimpleNamespace):
    for name in ("a", "b"):
        peers.write_wsidata(tmp_path / "w" / f"{name}.zarr", matrix(), corners(), parquet)
    chunk = tmp_path / "w" / "a.zarr" / "tables" / "uni_tiles" / "X" / "c" / "0" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in reason(import_bags(tmp_path / "w", tmp_path / "store"), "a")
    chunk.unlink()
    report = import_bags(tmp_path / "w", tmp_path / "store")
    assert "0 of 1 chunks" in reason(report, "a")
    assert [each.slide_id for each in report.of("complete")] == ["b"]


def test_anndata_reads_what_is_exported(tmp_path: Path):
    anndata = pytest.importorskip("anndata")
    peers.write_trident(tmp_path / "t" / "a.h5", matrix(), corners())
    import_bags(tmp_path / "t", tmp_path / "store", entry="uni")
    export_store(open_store(tmp_path / "store"), tmp_path / "out", "spatialdata")
    table = anndata.read_zarr(tmp_path / "out" / "a.zarr" / "tables" / "uni")
    np.testing.assert_array_equal(np.asarray(table.X), matrix())
    np.testing.assert_array_equal(table.obs[["x_l0", "y_l0"]].to_numpy(), corners())


def test_classic_tables_of_both_kinds_are_the_same_bags(tmp_path: Path):
    x, bag = matrix(7, 3).astype(np.float64), np.array([2, 0, 2, 1, 0, 2, 1])
    np.savez(tmp_path / "t.npz", x=x, bag=bag, y=np.array([0, 1, 1]))
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["bag", "f0", "f1", "f2", "label"])
        for row, number in zip(x.tolist(), bag.tolist(), strict=True):
            writer.writerow([f"bag-{number:03d}", *map(repr, row), [0, 1, 1][number]])
    for kind in ("npz", "csv"):
        report = taken(import_bags(tmp_path / f"t.{kind}", tmp_path / kind))
        assert report.labels == {"bag-000": "0", "bag-001": "1", "bag-002": "1"}
        for number in range(3):
            assert_same(tmp_path / kind, f"bag-{number:03d}", x[bag == number].astype(np.float32), None, "imported")
    with pytest.raises(AmbiguousError, match="which one"):
        survey(tmp_path, Answers(layout="classic"), ForeignReader())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("bag,f\na,1\na,x\n", "row 3, column 'f'"),
        ("bag,f\na,1,2\n", "row 2"),
        ("bag,f,label\na,1,0\na,2,1\n", "within bag 'a'"),
        ("bag,f\n,1\n", "names no bag"),
        ("bag,f\n", "no rows"),
        ("bag,f\na,nan\n", "nan in row 0"),
    ],
)
def test_a_table_that_is_wrong_is_refused_by_row(tmp_path: Path, text: str, match: str):
    (tmp_path / "t.csv").write_text(text)
    report = import_bags(tmp_path / "t.csv", tmp_path / "store")
    assert match in report.of("failed")[0].reason
    assert report.of("imported") == []


# ------------------------------------------------------------------------------------------------- places and numbers


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**23 - 1), st.integers(0, 2**23 - 1)), min_size=1, max_size=20),
    st.floats(0.1, 2.0),
    st.sampled_from(["float32", "float64"]),
)
def test_whole_pixels_survive_micrometres(pairs: list[tuple[int, int]], mpp: float, dtype: str):
    pixels = np.array(pairs)
    got = corners_l0((pixels * mpp).astype(dtype), Frame("um", "corner", mpp), "s")
    np.testing.assert_array_equal(got, pixels)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**20)), min_size=1, max_size=20),
    st.integers(1, 4096),
    st.booleans(),
)
def test_corners_survive_centres(pairs: list[tuple[int, int]], side: int, halves: bool):
    pixels = np.array(pairs)
    centres = pixels + (side / 2 if halves else side // 2)
    np.testing.assert_array_equal(corners_l0(centres, Frame("px", "centre", None, side), "s"), pixels)


@pytest.mark.parametrize(
    ("raw", "frame", "match"),
    [
        ([[0.0, 0.4]], Frame("px", "corner"), "0.400 px from a whole"),
        ([[-1, 0]], Frame("px", "corner"), "from 0 on"),
        ([[100, 100]], Frame("px", "centre", None, 512), "from 0 on"),
        ([[float("nan"), 0]], Frame("px", "corner"), "not finite"),
        ([[2**31, 0]], Frame("px", "corner"), "up to"),
        ([1, 2, 3], Frame("px", "corner"), "shape"),
        (np.array([[40_000_000.0, 0]], np.float32), Frame("um", "corner", 0.25), "in steps of"),
        (np.array([["a", "b"]]), Frame("px", "corner"), "dtype"),
    ],
)
def test_places_that_are_no_pixels_are_refused(raw: Any, frame: Frame, match: str):
    with pytest.raises(ForeignFileError, match=match):
        corners_l0(raw, frame, "s")


def test_an_answer_that_contradicts_the_file_is_refused(tmp_path: Path):
    peers.write_trident(tmp_path / "t" / "a.h5", matrix(), corners())
    for answers, match in (
        (Answers(unit="um", mpp=0.5), "--coords"),
        (Answers(origin="centre", tile_l0=GRID_L0), "--origin"),
        (Answers(tile_l0=100), "--tile-px"),
    ):
        assert match in reason(import_bags(tmp_path / "t", tmp_path / "x", answers=answers), "a")


def test_features_keep_their_bits_or_follow_the_rule():
    for dtype in ("float16", "float32", ">f4", ">f2"):
        values = matrix().astype(dtype)
        np.testing.assert_array_equal(clean_features(values, "s"), values)
        assert clean_features(values, "s").dtype.isnative
    exact = np.array([[1 / 3, 1e-300]])
    np.testing.assert_array_equal(clean_features(exact, "s"), exact.astype(np.float32))
    with pytest.raises(FeatureRangeError, match="inf in row 0, column 1"):
        clean_features(np.array([[0.0, 1e300]]), "s")
    for wrong in (np.zeros((2, 3), np.int64), np.zeros((0, 3)), np.zeros(4), np.zeros((2, 3, 4)), np.array([["a"]])):
        with pytest.raises(ForeignFileError, match="expected"):
            clean_features(wrong, "s")


def test_bfloat16_becomes_float32_exactly(tmp_path: Path):
    tensor = torch.from_numpy(matrix()).bfloat16()
    torch.save(tensor, tmp_path / "a.pt")
    taken(import_bags(tmp_path / "a.pt", tmp_path / "store"))
    np.testing.assert_array_equal(open_store(tmp_path / "store")["a"].features("imported"), tensor.float().numpy())


# -------------------------------------------------------------------------------------------------------- wrong inputs


def test_one_bad_file_stops_no_other_and_says_why(tmp_path: Path):
    source = tmp_path / "t"
    good = [f"good{at}" for at in range(2)]
    for at, name in enumerate(good):
        peers.write_trident(source / f"{name}.h5", matrix(seed=at), corners(seed=at))
    (source / "0none.h5").write_bytes(b"not HDF5 at all")
    whole = peers.write_trident(source / "cut.h5", matrix(400, 50), corners(400)).read_bytes()
    (source / "cut.h5").write_bytes(whole[: len(whole) // 2])
    peers.write_trident(source / "rows.h5", matrix(11), corners(12))
    nan = matrix()
    nan[3, 2] = np.nan
    peers.write_trident(source / "nan.h5", nan, corners())
    peers.write_trident(source / "negative.h5", matrix(), corners() - 1)
    peers.write_trident(source / "wide.h5", matrix(dim=6), corners())
    peers.write_trident(source / "size.h5", matrix(), corners(), patch_size=512)
    peers.write_trident(source / "slide.h5", matrix()[0], corners())
    with h5py.File(source / "only_coords.h5", "w") as file:
        file["coords"] = corners()
    (source / "notes.txt").write_text("hello")
    report = import_bags(source, tmp_path / "store", entry="uni", answers=Answers(layout="trident"))
    assert [each.slide_id for each in report.of("imported")] == good
    expected = {
        "0none": "its bytes are not those of .h5",
        "cut": "HDF5",
        "rows": "11 rows of features and 12 of coordinates",
        "nan": "nan in row 3, column 2",
        "negative": "from 0 on",
        "wide": "dim: 5 → 6",
        "size": "tile_px: 256 → 512",
    }
    assert sorted(each.slide_id for each in report.of("failed")) == sorted(expected)
    for name, match in expected.items():
        assert match in reason(report, name)
    assert {Path(path).stem for path in report.skipped} == {"only_coords", "slide"}
    # repaired files are taken by the same command, and the others are not read again
    for name in ("0none", "nan"):
        peers.write_trident(source / f"{name}.h5", matrix(seed=9), corners(seed=9))
    again = import_bags(source, tmp_path / "store", entry="uni", answers=Answers(layout="trident"))
    assert [each.slide_id for each in again.of("imported")] == ["0none", "nan"]
    assert [each.slide_id for each in again.of("complete")] == good


def test_a_folder_without_features_is_refused(tmp_path: Path):
    with pytest.raises(ForeignFileError, match="no features in it"):
        import_bags(tmp_path, tmp_path / "store")
    with pytest.raises(ForeignFileError, match="no such file"):
        import_bags(tmp_path / "absent", tmp_path / "store")
    with pytest.raises(ForeignFileError, match="expected one of trident"):
        import_bags(tmp_path, tmp_path / "store", answers=Answers(layout="tridnet"))
    create_store(tmp_path / "ours", TileRecipe())
    with pytest.raises(ForeignFileError, match="a store of ours"):
        import_bags(tmp_path / "ours", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_two_layouts_are_refused_with_a_question(tmp_path: Path):
    peers.write_trident(tmp_path / "s" / "a.h5", matrix(), corners())
    peers.write_stamp(tmp_path / "s" / "b.h5", matrix(), corners().astype(np.float32))
    with pytest.raises(AmbiguousError, match=r"2 layouts.*--layout with one of \['stamp', 'trident'\]"):
        import_bags(tmp_path / "s", tmp_path / "store")
    report = taken(import_bags(tmp_path / "s", tmp_path / "store", answers=Answers(layout="trident")))
    assert [each.slide_id for each in report.of("imported")] == ["a"]
    assert len(report.skipped) == 1


def test_two_files_of_one_slide_are_both_refused(tmp_path: Path):
    for name in ("a.h5", "A.hdf5", "b.h5"):
        peers.write_trident(tmp_path / "s" / name, matrix(), corners())
    report = import_bags(tmp_path / "s", tmp_path / "store")
    assert [each.slide_id for each in report.of("imported")] == ["b"]
    assert sorted(each.slide_id for each in report.of("failed")) == ["A", "a"]
    assert "from 2 files" in reason(report, "a")


def test_the_name_of_a_file_does_not_decide(tmp_path: Path):
    peers.write_trident(tmp_path / "s" / "stamp.pt.bin", matrix(), corners())
    assert taken(import_bags(tmp_path / "s", tmp_path / "store")).layouts == ("trident",)


class Evil:
    """Would write a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_tensor_file_never_runs_code(tmp_path: Path):
    (tmp_path / "s").mkdir()
    torch.save(Evil(str(tmp_path / "ran")), tmp_path / "s" / "a.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "s" / "b.pt")
    report = import_bags(tmp_path / "s", tmp_path / "store")
    assert "may run code" in reason(report, "a")
    assert "one tensor" in reason(report, "b")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------- recipes and resumption


def test_what_is_unknown_equals_nothing_known_and_no_other_source(tmp_path: Path):
    for at, name in enumerate(("one", "two")):
        peers.write_trident(tmp_path / name / f"{name}.h5", matrix(seed=at), corners())
        taken(import_bags(tmp_path / name, tmp_path / f"{name}.zarr"))
    one, two = open_store(tmp_path / "one.zarr"), open_store(tmp_path / "two.zarr")
    assert is_unknown(one.feature_recipe("imported").weights_sha256)
    assert is_unknown(one.tile_recipe.edge)
    assert difference(one.feature_recipe("imported"), two.feature_recipe("imported"))
    assert difference(one.tile_recipe, TileRecipe())
    assert difference(one.feature_recipe("imported"), feature_recipe(5, "float32"))
    with pytest.raises(RecipeMismatchError, match="--recipe NAME"):
        import_bags(tmp_path / "two", tmp_path / "one.zarr", entry="imported")
    for name in ("one", "two"):
        taken(import_bags(tmp_path / name, tmp_path / f"{name}-named.zarr", recipe_name="uni at 20x"))
    named = [open_store(tmp_path / f"{name}-named.zarr") for name in ("one", "two")]
    assert difference(*(store.feature_recipe("imported") for store in named)) == []
    assert difference(*(store.tile_recipe for store in named)) == []


def test_a_store_of_our_own_takes_no_import(tmp_path: Path):
    create_store(tmp_path / "ours", TileRecipe()).write_tiles(
        importlib.import_module("extract.store").TilesUnit("x", np.zeros((1, 2)), None, None, {})
    )
    peers.write_trident(tmp_path / "t" / "a.h5", matrix(), corners())
    with pytest.raises(RecipeMismatchError, match="edge"):
        import_bags(tmp_path / "t", tmp_path / "ours")


def test_a_second_backbone_joins_the_same_tiles_and_no_others(tmp_path: Path):
    for name, dim in (("uni", 5), ("conch", 9)):
        peers.write_trident(tmp_path / name / "a.h5", matrix(dim=dim), corners())
        taken(import_bags(tmp_path / name, tmp_path / "store", entry=name))
    assert open_store(tmp_path / "store")["a"].entries() == ["conch", "uni"]
    peers.write_trident(tmp_path / "more" / "b.h5", matrix(), corners())
    peers.write_trident(tmp_path / "more" / "a.h5", matrix(), corners())
    taken(import_bags(tmp_path / "more", tmp_path / "store", entry="uni"))
    for name, places in (("a", corners()), ("b", corners()[::-1])):
        peers.write_trident(tmp_path / "turned" / f"{name}.h5", matrix(dim=3), places)
    report = import_bags(tmp_path / "turned", tmp_path / "store", entry="turned")
    assert [each.slide_id for each in report.of("imported")] == ["a"]
    assert "with other tiles" in reason(report, "b")


def test_an_import_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for at in range(5):
        peers.write_trident(tmp_path / "t" / f"{at}.h5", matrix(seed=at), corners(seed=at))

    class Stopped(Exception):
        pass

    def stop(total: int, outcome: Any) -> None:
        assert total == 5
        if outcome.slide_id == "2":
            raise Stopped

    with pytest.raises(Stopped):
        import_bags(tmp_path / "t", tmp_path / "store", progress=stop)
    done = open_store(tmp_path / "store").slide_ids("imported")
    assert {"0", "1", "2"} <= set(done)
    read: list[str] = []
    ask = ForeignReader.read

    def counted(self: ForeignReader, file: Any, layout: Any, slide_id: str, answers: Answers) -> Any:
        read.append(slide_id)
        return ask(self, file, layout, slide_id, answers)

    monkeypatch.setattr(ForeignReader, "read", counted)
    report = taken(import_bags(tmp_path / "t", tmp_path / "store"))
    left = sorted(set("01234") - set(done))
    assert [each.slide_id for each in report.of("imported")] == left
    # one complete slide is read again, to see that source and store are of one recipe
    assert read == ["0", *left]
    once = tmp_path / "once"
    import_bags(tmp_path / "t", once)
    for at in range(5):
        assert_same(tmp_path / "store", str(at), matrix(seed=at), corners(seed=at), "imported")
    assert open_store(once).tile_recipe == open_store(tmp_path / "store").tile_recipe


def test_a_changed_file_or_answer_is_not_taken_for_the_same(tmp_path: Path):
    path = peers.write_stamp(tmp_path / "t" / "a.h5", matrix(), corners().astype(np.float32))
    peers.write_stamp(tmp_path / "t" / "b.h5", matrix(seed=1), corners().astype(np.float32))
    taken(import_bags(tmp_path / "t", tmp_path / "store", answers=Answers(mpp=0.5)))
    path.write_bytes(peers.write_stamp(tmp_path / "new.h5", matrix(seed=5), corners().astype(np.float32)).read_bytes())
    assert "other features" in reason(import_bags(tmp_path / "t", tmp_path / "store", answers=Answers(mpp=0.5)), "a")
    other = import_bags(tmp_path / "t", tmp_path / "store", answers=Answers(mpp=0.25))
    assert "other tiles" in reason(other, "b")


def test_exports_are_refused_where_they_would_overwrite_or_guess(tmp_path: Path):
    peers.write_trident(tmp_path / "t" / "a.h5", matrix(), corners())
    taken(import_bags(tmp_path / "t", tmp_path / "store", entry="one"))
    taken(import_bags(tmp_path / "t", tmp_path / "store", entry="two"))
    store = open_store(tmp_path / "store")
    with pytest.raises(EntryNotFoundError, match="--as"):
        export_store(store, tmp_path / "out", "trident")
    with pytest.raises(StoreError, match="trident, clam, spatialdata"):
        export_store(store, tmp_path / "out", "stamp", "one")
    for _ in range(2):
        export_store(store, tmp_path / "out", "spatialdata", "one", overwrite=True)
    with pytest.raises(StoreError, match="not an empty folder"):
        export_store(store, tmp_path / "out", "trident", "one")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith("~")]


@pytest.mark.parametrize("slide_id", ["../up", "../../up", "/root", "a//b", ".hidden", "x\\y"])
def test_no_id_leaves_the_folder_of_an_export(tmp_path: Path, slide_id: str):
    np.savez(tmp_path / "t.npz", x=matrix(2), bag=np.array([slide_id, slide_id]))
    taken(import_bags(tmp_path / "t.npz", tmp_path / "store"))
    before = set(tmp_path.rglob("*"))
    export_store(open_store(tmp_path / "store"), tmp_path / "out", "clam")
    assert all((tmp_path / "out") in (path, *path.parents) for path in set(tmp_path.rglob("*")) - before)
    assert len(list((tmp_path / "out").rglob("*.pt"))) == 1


def test_a_label_table_is_written_once(tmp_path: Path):
    write_labels(tmp_path / "l.csv", {"b": "1", "a": "0"})
    assert (tmp_path / "l.csv").read_text() == "slide_id,patient_id,label\na,a,0\nb,b,1\n"
    write_labels(tmp_path / "l.csv", {"a": "0", "b": "1"})
    with pytest.raises(StoreError, match="another table"):
        write_labels(tmp_path / "l.csv", {"a": "1"})


def test_importing_loads_no_torch():
    code = "import sys, extract.store.foreign; print('torch' in sys.modules, 'h5py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"


# ------------------------------------------------------------------------------------------------------- the real files


def test_the_two_real_files_are_imported(tmp_path: Path, data_folder: Path):
    folder = data_folder / "foreign_features"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    placed, bare = "TCGA-AD-6964-01Z-00-DX1.features", "TCGA-3X-AAVA-01Z-00-DX1.features"
    asked = import_bags(folder, tmp_path / "store")
    assert "--coords px or --coords um" in reason(asked, placed)
    taken(import_bags(folder, tmp_path / "store", answers=Answers(unit="px", origin="corner")))
    for slide_id, name in ((placed, "feats"), (bare, "features")):
        with h5py.File(folder / f"{slide_id}.h5") as file:
            coords = file["coords"][:] if "coords" in file else None
            assert_same(tmp_path / "store", slide_id, file[name][:], coords, "imported")


@pytest.mark.parametrize("name", ["musk1", "musk2", "elephant", "fox", "birds_brown_creeper", "corel_dogs", "protein"])
def test_classic_sets_are_surveyed_whole(data_folder: Path, name: str):
    path = data_folder / "mil_classic" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    seen = survey(path, Answers(), ForeignReader())
    with np.load(path) as data:
        assert len(seen.bags) == len(data["y"]) == len(seen.labels)
        bags = [found.layout.read(found.file, found.slide_id, Answers()).features for found in seen.bags]
        order = np.argsort(data["bag"], kind="stable")
        np.testing.assert_array_equal(np.concatenate(bags), data["x"][order])
        assert [int(seen.labels[found.slide_id]) for found in seen.bags] == data["y"].tolist()
