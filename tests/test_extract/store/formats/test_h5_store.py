"""The HDF5 store: what every backend does, and what h5py, h5ls and the scripts of other tools read of it."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from extract.errors import UnitCorruptError
from extract.store import Store, TileRecipe, open_store
from extract.store.formats.h5_file import write_h5
from extract.store.formats.tool_attributes import coords_attributes
from tests.test_extract.small import EXECUTION, feature_recipe, matrix, tiles_unit
from tests.test_extract.store_conformance import StoreConformance, add

CUT = {
    "mpp": {"native": 0.25, "requested": 0.5, "achieved": 0.5, "source": "openslide.mpp"},
    "size_l0": [90000, 40000],
    "level": 1,
    "downsample": 2.0,
    "tile_px": 224,
    "tile_level": 224.0,
    "tile_l0": 448.0,
}


class TestH5Store(StoreConformance):
    """A folder of HDF5 files."""

    format = "h5"
    placing = "extract.store.core.files.os.link"
    steps = ("formats.h5_store.write_h5", "core.files.sync", "core.files.os.link")

    def array_file(self, unit: Path, name: str) -> Path:
        """The unit is one file."""
        return unit

    def record_file(self, unit: Path) -> Path:
        """The unit is one file."""
        return unit

    def test_h5py_reads_the_same_bytes(self, store: Store):
        features, unit = add(store, "a/b c", 11), tiles_unit("a/b c", 11)
        with h5py.File(store.path / "features/tiny/a%2Fb%20c.h5", "r") as file:
            assert set(file) == {"features", "coords"}
            assert file["features"][:].tobytes() == features.tobytes()
            assert file["features"].chunks is file["features"].compression is None
            assert file["coords"][:].tobytes() == unit.coords.tobytes()
            assert json.loads(file.attrs["tessera"]) == store["a/b c"].feature_record("tiny")
        with h5py.File(store.path / "tiles/a%2Fb%20c.h5", "r") as file:
            assert set(file) == {"coords", "tissue_fraction", "thumbnail"}
            assert file["tissue_fraction"][:].tobytes() == unit.tissue_fraction.tobytes()
            assert file["thumbnail"][:].tobytes() == unit.thumbnail.tobytes()
            assert json.loads(file.attrs["tessera"]) == store["a/b c"].record

    def test_h5ls_reads_it(self, store: Store):
        if shutil.which("h5ls") is None:
            pytest.skip("h5ls is not installed")
        add(store, "s", 11)
        shown = subprocess.run(
            ["h5ls", "-v", str(store.feature_path("s", "tiny"))], capture_output=True, text=True, check=True
        ).stdout
        assert "features                 Dataset {11/11, 6/6}" in shown
        assert "132 logical bytes, 132 allocated bytes" in shown
        assert "16-bit little-endian floating-point" in shown
        assert "Attribute: patch_size" in shown
        # a time would make equal units differ
        assert "Modified" not in shown

    def test_a_folder_of_features_is_read_as_those_of_other_tools(self, store: Store):
        for slide_id in ("a", "b"):
            store.write_tiles(replace(tiles_unit(slide_id, 7), record=CUT))
            store.write_features("tiny", slide_id, matrix(7), [], EXECUTION)
        store.draft("tiny", "a", EXECUTION)
        found = {}
        for path in sorted((store.path / "features" / "tiny").glob("*.h5")):
            with h5py.File(path, "r") as file:
                found[path.stem] = (file["features"][:], file["coords"][:], dict(file["coords"].attrs))
        assert list(found) == ["a", "b"]
        features, coords, attributes = found["b"]
        assert features.shape == (7, 6)
        assert coords.shape == (7, 2)
        assert attributes == {
            "patch_size": 224,
            "patch_size_level0": 448,
            "level0_magnification": 40,
            "target_magnification": 20,
            "level0_width": 90000,
            "level0_height": 40000,
            "overlap": 0,
            "patch_level": 1,
            "downsample": 2.0,
            "name": b"b",
            "savetodir": b"features/tiny",
        }
        assert attributes["patch_size_level0"] * 20 == attributes["patch_size"] * 40

    def test_what_is_not_known_is_left_out(self):
        bare = coords_attributes({"mpp": 0.5}, TileRecipe(tile_px=256, overlap_px=16), "s", "features/e")
        assert bare == {"patch_size": 256, "overlap": 16, "name": "s", "savetodir": "features/e"}
        odd = coords_attributes(
            CUT | {"mpp": {"native": 0.2425, "achieved": 0.5}, "tile_level": 461.9, "tile_l0": 461.86},
            TileRecipe(),
            "s",
            "",
        )
        assert "patch_level" not in odd
        assert "downsample" not in odd
        assert odd["level0_magnification"] == 10 / 0.2425
        assert odd["patch_size_level0"] == 462

    def test_a_file_that_another_process_has_locked_is_read(self, store: Store):
        features = add(store, "s")
        with open(store.feature_path("s", "tiny"), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert np.array_equal(open_store(store.path)["s"].features("tiny"), features)

    @pytest.mark.parametrize("storage", [{"chunks": (4, 6)}, {"chunks": (3, 2), "compression": "gzip"}, {}], ids=str)
    def test_an_array_that_was_stored_anew_is_still_read(self, store: Store, storage: dict):
        features = add(store, "s", 9)
        with h5py.File(store.feature_path("s", "tiny"), "r+") as file:
            del file["features"]
            # big-endian bytes are no view of ours either
            data = features if storage else features.astype(">f2")
            file.create_dataset("features", data=data, **storage)
        slide = store["s"]
        assert np.array_equal(slide.features("tiny"), features)
        for rows in (slice(2, 8, 3), slice(None, None, -2), [8, 0, 8], []):
            index = rows if isinstance(rows, slice) else np.array(rows, dtype=int)
            assert np.array_equal(slide.features("tiny", rows=rows), features[index])

    @pytest.mark.parametrize("harm", ["coords", "attribute", "record"])
    def test_what_lies_beside_the_features_is_verified_too(self, store: Store, harm: str):
        add(store, "s")
        with h5py.File(store.feature_path("s", "tiny"), "r+") as file:
            if harm == "coords":
                file["coords"][2, 1] += 1
            elif harm == "attribute":
                file["coords"].attrs["patch_size"] = 225
            else:
                file.attrs["tessera"] = np.bytes_(
                    file.attrs["tessera"].replace(b'"invalid_rows": []', b'"invalid_rows": [1]')
                )
        with pytest.raises(UnitCorruptError, match="record" if harm == "record" else r"coords .* slide 's'"):
            store["s"].verify_features("tiny")

    def test_a_record_of_any_length_fits(self, store: Store):
        store.write_tiles(tiles_unit("s", 50_000))
        flags = {"blurred": list(range(50_000))}
        store.write_features("tiny", "s", matrix(50_000), [], EXECUTION, flags)
        assert store["s"].feature_record("tiny")["flagged_rows"] == flags

    def test_a_file_system_without_hard_links_will_do(self, store: Store, monkeypatch: pytest.MonkeyPatch):
        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr("extract.store.core.files.os.link", refuse)
        features = add(store, "s")
        assert np.array_equal(store["s"].features("tiny"), features)
        assert store.leftovers() == []

    def test_arrays_begin_where_they_can_be_mapped(self, tmp_path: Path):
        arrays = {"a": np.arange(3, dtype=np.uint8), "b": np.arange(5.0), "c": np.ones((2, 3), np.float16)}
        write_h5(tmp_path / "x.h5", {}, arrays, {"a": {"k": "v"}})
        with h5py.File(tmp_path / "x.h5") as file:
            for name, array in arrays.items():
                assert file[name].id.get_offset() % 64 == 0
                assert np.array_equal(file[name][:], array)
            assert file["a"].attrs["k"] == b"v"

    def test_an_entry_and_its_recipe_are_plain_json(self, store: Store):
        document = json.loads((store.path / "features/tiny/entry.json").read_text())
        assert document["tessera"]["feature_recipe"]["dim"] == feature_recipe().dim
        document = json.loads((store.path / "tessera.json").read_text())
        assert (document["tessera"]["backend"], document["tessera"]["format"]) == ("h5", 1)
