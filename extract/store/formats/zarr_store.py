"""The Zarr v3 store: one raw chunk per matrix, so that the chunk file *is* the matrix and is memory-mapped.

Layout (any Zarr v3 reader opens it):

    cohort.zarr/zarr.json                               attributes.tessera: format, tile recipe, fingerprint
    cohort.zarr/tiles/<slide>/{coords,tissue_fraction,thumbnail,tissue_mask}
    cohort.zarr/features/<entry>/<slide>                one uncompressed chunk
    cohort.zarr/runs/<started>-<host>-<pid>.jsonl
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from extract.store.core.files import members, replace_json, write_json
from extract.store.core.remote_path import StorePath
from extract.store.core.store import Store
from extract.store.core.unit import PICTURES
from extract.store.formats.nodes import group_metadata, map_array, read_record, record_in, write_array, write_picture


class ZarrStore(Store):
    """A store in a folder of Zarr v3 arrays."""

    format = "zarr"
    root_name = entry_name = "zarr.json"
    record_suffix = "/zarr.json"

    @staticmethod
    def _wrap(record: Mapping[str, Any]) -> dict[str, Any]:
        return group_metadata(record)

    @staticmethod
    def _unwrap(document: Any) -> dict[str, Any]:
        return record_in(document)

    def _make_folders(self) -> None:
        super()._make_folders()
        for name in ("tiles", "features"):
            if not (self.path / name / "zarr.json").is_file():
                replace_json(self.path / name / "zarr.json", group_metadata({}))

    def _unit_names(self, folder: StorePath) -> list[str]:
        return members(folder)

    def _read_record(self, unit: StorePath) -> dict[str, Any]:
        return read_record(unit)

    def _read_array(self, unit: StorePath, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
        return map_array(unit if name == "features" else unit / name, rows)

    def _build_tiles(self, partial: Path, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        partial.mkdir()
        for name, array in arrays.items():
            if name in PICTURES:
                write_picture(partial / name, array)
            else:
                write_array(partial / name, array)
        write_json(partial / "zarr.json", group_metadata(record))

    def _build_features(self, partial: Path, record: Mapping[str, Any], matrix: np.ndarray) -> None:
        write_array(partial, matrix, record)
