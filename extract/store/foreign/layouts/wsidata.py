"""LazySlide / wsidata: a SpatialData Zarr group a slide; a table of features that annotates a layer of tile polygons.

    tables/<name>/X                      [n, dim]
    tables/<name>/obs/<instance key>     which tile each row is
    tables/<name>                        attributes: region (the layer), instance_key
    shapes/<region>/shapes.parquet       one rectangle per tile, in level-0 px
    attributes of the group              tile_spec: by layer: width, height, mpp, base_downsample ...

The rectangles are read with pyarrow, which is no dependency of ours. What we export ourselves names its corners in
``obs`` and needs none. Reference: Zheng et al., 2026, LazySlide; Marconato et al., 2025, SpatialData, Nature Methods
22:58.
"""

import struct
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from extract.errors import AmbiguousError, ForeignFileError
from extract.store.foreign.layouts.atlaspatch import choose
from extract.store.foreign.layouts.base import NO, SURE, Answers, CutFacts, ForeignBag, ForeignFile, ForeignLayout
from extract.store.foreign.layouts.frames import Frame, corners_l0
from extract.store.foreign.layouts.hdf5 import number, plain_attributes
from extract.store.foreign.layouts.matrices import check_rows, clean_features

EXPORT = "tessera_export"
"""Attribute of groups that we exported: the frame of the corners in ``obs``."""

_POLYGON = struct.Struct("<BIII")


class WsiData(ForeignLayout):
    """``<slide>.zarr`` of wsidata, of SpatialData, or of our export."""

    name = "wsidata"
    kind = "zarr"

    def fits(self, file: ForeignFile) -> int:
        """Sure when the group holds tables, or is one."""
        root = _open(file.path)
        return SURE if "tables" in root or root.attrs.get("encoding-type") == "anndata" else NO

    def read(self, file: ForeignFile, slide_id: str, answers: Answers) -> ForeignBag:
        """Corners come from the polygons that the table annotates."""
        root = _open(file.path)
        tables = (
            {name: root["tables"][name] for name in sorted(root["tables"].group_keys())} if "tables" in root else {}
        )
        tables = tables or ({"table": root} if "X" in root else {})
        name = choose([each for each, table in tables.items() if _is_matrix(table)], answers.dataset, slide_id)
        table = tables[name]
        features = clean_features(_read_array(table["X"], slide_id), slide_id)
        region = table.attrs.get("region")
        region = region[0] if isinstance(region, list) and len(region) == 1 else region
        ours = root.attrs.get(EXPORT) or {}
        spec = (root.attrs.get("tile_spec") or {}).get(region, {}) if isinstance(region, str) else {}
        tile_l0 = number(ours, "tile_l0") or _side(spec)
        corners = None
        if not answers.without_coords:
            corners = _corners(file.path, table, region, Frame("px", "corner"), answers, slide_id)
            check_rows(features, corners, slide_id)
        return ForeignBag(
            slide_id,
            features,
            corners,
            CutFacts(int(number(spec, "width") or number(ours, "tile_px") or 0), 0, number({**ours, **spec}, "mpp")),
            tile_l0 if tile_l0 is not None else answers.tile_l0,
            number(ours, "native_mpp") or answers.mpp_of(slide_id),
            name,
            {"": plain_attributes(dict(root.attrs)), "table": plain_attributes(dict(table.attrs))},
        )


def _open(path: Path) -> Any:
    import zarr

    try:
        return zarr.open_group(path, mode="r", use_consolidated=False)
    except (OSError, ValueError, KeyError) as error:
        raise ForeignFileError(f"got {path} → it cannot be read as a Zarr group ({error}) → leave it out") from error


def _read_array(array: Any, slide_id: str) -> np.ndarray:
    """All of an array; Zarr itself would give zeros for chunks that are missing."""
    try:
        if array.nchunks_initialized < array.nchunks:
            raise ForeignFileError(
                f"got {array.nchunks_initialized} of {array.nchunks} chunks of {array.name} of slide {slide_id!r} → "
                f"expected all → the copy is incomplete; copy it again"
            )
        return np.asarray(array[:])
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ForeignFileError):
            raise
        raise ForeignFileError(
            f"got {array.name} of slide {slide_id!r} → it cannot be read ({error}) → it is damaged; copy it again"
        ) from error


def _is_matrix(table: Any) -> bool:
    return "X" in table and len(getattr(table["X"], "shape", ())) == 2


def _side(spec: Mapping[str, Any]) -> float | None:
    """Side of a tile in level-0 px; wsidata cuts the product down to whole pixels."""
    width, downsample = number(spec, "width"), number(spec, "base_downsample")
    if width is None or downsample is None or width != number(spec, "height"):
        return None
    return float(int(width * downsample))


def _corners(path: Path, table: Any, region: Any, frame: Frame, answers: Answers, slide_id: str) -> np.ndarray | None:
    """int32 [n, 2], in the order of the table's rows; None where the slide has no coordinates at all."""
    obs: Any = table.get("obs", {})
    if "x_l0" in obs and "y_l0" in obs:
        return corners_l0(
            np.stack([_read_array(obs[name], slide_id) for name in ("x_l0", "y_l0")], axis=1), frame, slide_id
        )
    shapes = path / "shapes" / str(region) / "shapes.parquet"
    if isinstance(region, str) and shapes.is_file():
        ids, boxes = _read_shapes(shapes, str(table.attrs.get("instance_key")), slide_id)
        rows = {tile: row for row, tile in enumerate(ids)}
        wanted = obs[table.attrs["instance_key"]][:].tolist() if table.attrs.get("instance_key") in obs else list(ids)
        missing = [tile for tile in wanted if tile not in rows]
        if missing:
            raise ForeignFileError(
                f"got {len(missing)} features of slide {slide_id!r} without a tile in layer {region!r}, such as "
                f"{missing[0]} → expected one polygon per row → extract the slide again, or add --no-coords"
            )
        return corners_l0(boxes[[rows[tile] for tile in wanted]], frame, slide_id)
    if "obsm" in table and "spatial" in table["obsm"]:
        asked = Frame(None, None).completed(answers, slide_id)
        return corners_l0(table["obsm"]["spatial"][:], asked, slide_id)
    return None


def _read_shapes(path: Path, instance_key: str, slide_id: str) -> tuple[list[Any], np.ndarray]:
    """Ids of the tiles of a layer, and their top-left corners float64 [n, 2]."""
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise AmbiguousError(
            f"got the tiles of slide {slide_id!r} as {path.name} → pyarrow reads it and is not installed → "
            f"pip install pyarrow, or leave the coordinates behind with --no-coords"
        ) from error
    layer = parquet.read_table(path)
    names = layer.column_names
    if "geometry" not in names:
        raise ForeignFileError(f"got {path} → it holds {names} → expected a geometry per tile → add --no-coords")
    corners = np.array([_top_left(each, slide_id) for each in layer["geometry"].to_pylist()]).reshape(-1, 2)
    index = next((name for name in (instance_key, "__index_level_0__") if name in names), None)
    return (layer[index].to_pylist() if index else list(range(len(corners)))), corners


def _top_left(geometry: Any, slide_id: str) -> tuple[float, float]:
    """Smallest x and y of a polygon in well-known binary (little-endian, one ring)."""
    if isinstance(geometry, bytes) and len(geometry) >= _POLYGON.size:
        order, kind, rings, points = _POLYGON.unpack_from(geometry)
        if (order, kind, rings) == (1, 3, 1) and len(geometry) == _POLYGON.size + 16 * points:
            ring = np.frombuffer(geometry, dtype="<f8", offset=_POLYGON.size).reshape(-1, 2)
            return float(ring[:, 0].min()), float(ring[:, 1].min())
    raise ForeignFileError(
        f"got a tile of slide {slide_id!r} that is no simple polygon → expected rectangles → add --no-coords"
    )
