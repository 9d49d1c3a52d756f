"""A SpatialData group of one table, written as its published format says (container 0.2, AnnData 0.1 in Zarr v3).

    tables/<entry>/X                 [n, dim], the features
    tables/<entry>/obs               tile_id, and x_l0, y_l0: exact top-left corners in level-0 px
    tables/<entry>/obsm/spatial      [n, 2], centres of the tiles in level-0 px, for tools that draw points; corners
                                     where the tile's side is unknown
    attributes of the group          spatialdata_attrs, and tessera_export: the frame of the corners

The table annotates no region: polygons would need Parquet.
References: Marconato et al., 2025, Nature Methods 22:58; AnnData's on-disk specification.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from extract.store.foreign.layouts.wsidata import EXPORT

_ARRAY = {"encoding-type": "array", "encoding-version": "0.2.0"}
_STRINGS = {"encoding-type": "string-array", "encoding-version": "0.2.0"}
_DICT = {"encoding-type": "dict", "encoding-version": "0.1.0"}
_TABLE = {
    "encoding-type": "anndata",
    "encoding-version": "0.1.0",
    "spatialdata-encoding-type": "ngff:regions_table",
    "region": None,
    "region_key": None,
    "instance_key": None,
    "version": "0.2",
}


def write_spatialdata(
    path: Path, table: str, features: np.ndarray, coords: np.ndarray | None, frame: Mapping[str, Any]
) -> None:
    """Write the group at ``path``.

    Args:
        path: of the group; must not exist.
        table: name of the table; characters that SpatialData does not allow become ``_``.
        features: [n, dim].
        coords: int32 [n, 2], top-left corners in level-0 px, or None.
        frame: slide_id, tile_px, tile_l0, native_mpp, mpp; None where unknown.
    """
    import zarr

    root = zarr.create_group(path)
    root.attrs.update({"spatialdata_attrs": {"version": "0.2", "spatialdata_software_version": "0.7.3"}})
    root.attrs[EXPORT] = {"unit": "px", "level": 0, "origin": "corner", **frame}
    group = root.create_group("tables").create_group(re.sub(r"[^A-Za-z0-9_.-]", "_", table), attributes=_TABLE)
    _array(group, "X", features)
    numbers = [str(row) for row in range(len(features))]
    columns = {"tile_id": np.arange(len(features), dtype=np.int64)}
    if coords is not None:
        columns |= {"x_l0": np.ascontiguousarray(coords[:, 0]), "y_l0": np.ascontiguousarray(coords[:, 1])}
    _frame(group, "obs", numbers, columns)
    _frame(group, "var", [f"feature_{at}" for at in range(features.shape[1])], {})
    for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
        group.create_group(name, attributes=_DICT)
    if coords is not None:
        _array(group["obsm"], "spatial", coords + (frame.get("tile_l0") or 0) / 2)


def _frame(group: Any, name: str, index: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
    """A data frame of AnnData: an index of strings, and columns of numbers."""
    attributes = {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"}
    frame = group.create_group(name, attributes={**attributes, "column-order": list(columns)})
    strings = frame.create_array("_index", data=np.array(index, dtype=np.dtypes.StringDType()), attributes=_STRINGS)
    strings.attrs.update(_STRINGS)
    for column, values in columns.items():
        _array(frame, column, values)


def _array(group: Any, name: str, values: np.ndarray) -> None:
    values = np.ascontiguousarray(values)
    array = group.create_array(name, shape=values.shape, chunks=values.shape, dtype=values.dtype, attributes=_ARRAY)
    array[...] = values
