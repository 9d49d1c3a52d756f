"""STAMP: one HDF5 file a slide; corners in micrometres.

    feats      float16 [n, dim]
    coords     float32 [n, 2], top-left corners
    attributes of the file, by version:
        2.1 and later   unit "um", tile_size_um, tile_size_px, extractor, stamp_version, feat_type "tile"
        2.0             unit "um", tile_size (µm)
        1               no unit: pixels of tiles of 224 px that are 256 µm wide, so µm = coords / 224 * 256

Reference: El Nahhal et al., 2025, Nature Protocols 20:293.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from extract.errors import AmbiguousError, ForeignFileError
from extract.store.foreign.layouts.base import (
    MAYBE,
    NO,
    SURE,
    Answers,
    CutFacts,
    ForeignBag,
    ForeignFile,
    ForeignLayout,
)
from extract.store.foreign.layouts.frames import Frame, corners_l0
from extract.store.foreign.layouts.hdf5 import contents, number, open_h5, read_dataset, read_pairs
from extract.store.foreign.layouts.matrices import check_rows, clean_features

_V1_TILE_PX, _V1_TILE_UM = 224.0, 256.0


class Stamp(ForeignLayout):
    """``<slide>.h5`` of STAMP's preprocessing."""

    name = "stamp"
    kind = "h5"

    def fits(self, file: ForeignFile) -> int:
        """Sure when the file names micrometres, or STAMP."""
        found = contents(file.path)
        if not found.is_matrix("feats") or "coords" not in found.shapes:
            return NO
        facts = found.of("")
        return SURE if facts.get("unit") == "um" or {"stamp_version", "tile_size_um"} & set(facts) else MAYBE

    def read(self, file: ForeignFile, slide_id: str, answers: Answers) -> ForeignBag:
        """Micrometres become level-0 px, which needs the slide's mpp."""
        facts = contents(file.path).of("")
        if facts.get("feat_type", "tile") != "tile":
            raise ForeignFileError(
                f"got features of type {facts['feat_type']!r} in slide {slide_id!r} → expected one row per tile, type "
                f"'tile' → import the folder of tile features instead"
            )
        with open_h5(file.path) as h5:
            features = clean_features(read_dataset(h5, "feats", slide_id), slide_id)
            raw = None if answers.without_coords else read_pairs(h5, "coords", slide_id)
        tile_um, tile_px = _tile(facts)
        corners, mpp = None, answers.mpp_of(slide_id)
        if raw is not None:
            check_rows(features, raw, slide_id)
            if tile_um is None:
                raw, tile_um, tile_px = _from_version_1(raw, facts, slide_id)
            corners = corners_l0(raw, Frame("um", "corner").completed(_without_side(answers), slide_id), slide_id)
        cut = CutFacts(int(tile_px or 0), 0, tile_um / tile_px if tile_um and tile_px else None)
        tile_l0 = tile_um / mpp if tile_um and mpp else answers.tile_l0
        backbone = facts.get("extractor")
        return ForeignBag(slide_id, features, corners, cut, tile_l0, mpp, _text(backbone), {"": dict(facts)})


def _tile(facts: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Side of a tile in µm and in px, where the file says so."""
    tile_px = number(facts, "tile_size_px")
    if "tile_size_um" in facts:
        return number(facts, "tile_size_um"), tile_px
    return (number(facts, "tile_size") if facts.get("unit") == "um" else None), tile_px


def _from_version_1(raw: np.ndarray, facts: Mapping[str, Any], slide_id: str) -> tuple[np.ndarray, float, float]:
    """Micrometres from the pixels of version 1, known by its stride of 224."""
    steps = np.diff(np.unique(raw[:, 0])) if raw.ndim == 2 and len(raw) else np.empty(0)
    stride = number(facts, "tile_size") or (float(steps.min()) if len(steps) else 0.0)
    if round(stride) != _V1_TILE_PX:
        raise AmbiguousError(
            f"got coordinates of slide {slide_id!r} without a unit, {stride:g} apart → STAMP 1 wrote steps of 224 → "
            f"micrometres or pixels? leave --layout out and say --coords px or um, or leave them with --no-coords"
        )
    return np.asarray(raw, dtype=np.float64) / _V1_TILE_PX * _V1_TILE_UM, _V1_TILE_UM, _V1_TILE_PX


def _without_side(answers: Answers) -> Answers:
    """The side of a tile follows from µm and mpp, so that an answer to it is not needed."""
    return replace(answers, tile_l0=None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
