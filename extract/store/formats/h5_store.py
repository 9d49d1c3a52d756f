"""The HDF5 store: one file per slide, which scripts for TRIDENT's and CLAM's features read as it is.

Layout:

    cohort.h5store/tessera.json                   tessera: format, backend, tile recipe, fingerprint
    cohort.h5store/tiles/<slide>.h5               coords, tissue_fraction, thumbnail, tissue_mask
    cohort.h5store/features/<entry>/entry.json    tessera: feature recipe, fingerprint
    cohort.h5store/features/<entry>/<slide>.h5    features [n, dim] and coords [n, 2], contiguous
    cohort.h5store/runs/<started>-<host>-<pid>.jsonl

The record of a unit is the attribute ``tessera`` of its file's root, as JSON. ``coords`` in a file of features repeats
those of the tiles, where they are known, with the attributes that other tools look for.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from extract.errors import UnitCorruptError
from extract.store.core.recipes import TileRecipe
from extract.store.core.remote_path import StorePath, local_path
from extract.store.core.slide_reader import SlideReader
from extract.store.core.store import Store
from extract.store.core.unit import PICTURES, encode_id
from extract.store.formats.h5_file import read_array, read_attributes, read_record, write_h5
from extract.store.formats.tool_attributes import coords_attributes


class H5Store(Store):
    """A store in a folder of HDF5 files."""

    format = "h5"
    suffix = ".h5"
    root_name = "tessera.json"
    entry_name = "entry.json"

    @staticmethod
    def _wrap(record: Mapping[str, Any]) -> dict[str, Any]:
        return {"tessera": dict(record)}

    @staticmethod
    def _unwrap(document: Any) -> dict[str, Any]:
        record: dict[str, Any] = document["tessera"]
        return record

    @classmethod
    def _root_record(cls, recipe: TileRecipe) -> dict[str, Any]:
        return {"backend": "h5", **super()._root_record(recipe)}

    def _unit_names(self, folder: StorePath) -> list[str]:
        try:
            names = os.listdir(local_path(folder))
        except FileNotFoundError:
            return []
        return sorted(name.removesuffix(".h5") for name in names if name.endswith(".h5") and not name.startswith("~"))

    def _read_record(self, unit: StorePath) -> dict[str, Any]:
        return read_record(local_path(unit))

    def _read_array(self, unit: StorePath, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
        return read_array(local_path(unit), name, rows)

    def _build_tiles(self, partial: Path, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        write_h5(partial, record, arrays, {}, compressed=PICTURES)

    def _build_features(self, partial: Path, record: Mapping[str, Any], matrix: np.ndarray) -> None:
        slide = self[record["slide_id"]]
        if "coords" not in slide.record["sha256"]:
            write_h5(partial, record, {"features": matrix}, {})
            return
        attributes = self._attributes(slide, partial.parent.name)
        write_h5(partial, record, {"coords": slide.coords(), "features": matrix}, {"coords": attributes})

    def _attributes(self, slide: SlideReader, entry: str) -> dict[str, Any]:
        return coords_attributes(slide.record, self.tile_recipe, encode_id(slide.slide_id), f"features/{entry}")

    def _verify_extras(self, slide: SlideReader, entry: str) -> None:
        if "coords" not in slide.record["sha256"]:
            return
        unit = local_path(slide.feature_path(entry))
        same = np.array_equal(read_array(unit, "coords"), slide.coords())
        if not same or read_attributes(unit, "coords") != self._attributes(slide, entry):
            raise UnitCorruptError(
                f"got coords beside features {entry!r} of slide {slide.slide_id!r} that are not those of its tiles → "
                f"the file was damaged or changed after it was written → delete {unit} and run mil extract again"
            )
