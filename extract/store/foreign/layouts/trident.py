"""TRIDENT: one HDF5 file a slide; features beside level-0 corners that carry the facts of the cut.

    features   [n, dim] or [1, n, dim]
    coords     [n, 2], top-left corners in level-0 px; attributes patch_size (px at the target magnification),
               patch_size_level0, level0_magnification, target_magnification, overlap

Reference: Zhang et al., 2025, arXiv:2502.06750; layout of releases up to 2026.
"""

import numpy as np

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
from extract.store.foreign.layouts.hdf5 import H5Contents, contents, number, open_h5, read_dataset, read_pairs
from extract.store.foreign.layouts.matrices import check_rows, clean_features


class Trident(ForeignLayout):
    """``<slide>.h5`` of TRIDENT's patch features."""

    name = "trident"
    kind = "h5"

    def fits(self, file: ForeignFile) -> int:
        """Sure when the coordinates carry TRIDENT's attributes."""
        found = contents(file.path)
        if not found.is_matrix("features") or "coords" not in found.shapes:
            return NO
        marks = {"patch_size_level0", "level0_magnification", "target_magnification"}
        return SURE if len(marks & set(found.of("coords"))) >= 2 else MAYBE

    def read(self, file: ForeignFile, slide_id: str, answers: Answers) -> ForeignBag:
        """Corners are taken as they are."""
        found = contents(file.path)
        with open_h5(file.path) as h5:
            features = clean_features(read_dataset(h5, "features", slide_id), slide_id)
            raw = None if answers.without_coords else read_pairs(h5, "coords", slide_id)
        facts = found.of("coords")
        tile_l0 = _tile_l0(found)
        corners = None
        if raw is not None:
            check_rows(features, raw, slide_id)
            corners = corners_l0(raw, Frame("px", "corner", tile_l0=tile_l0).completed(answers, slide_id), slide_id)
        return ForeignBag(
            slide_id,
            features,
            corners,
            CutFacts(int(number(facts, "patch_size") or 0), int(number(facts, "overlap") or 0)),
            tile_l0 if tile_l0 is not None else answers.tile_l0,
            answers.mpp_of(slide_id),
            None,
            {name: dict(found.of(name)) for name in ("features", "coords") if found.of(name)},
        )


def _tile_l0(found: H5Contents) -> float | None:
    """Side of a tile in level-0 px: as stated, else from the patch and the two magnifications, where that is whole."""
    facts = found.of("coords")
    stated = number(facts, "patch_size_level0")
    if stated is not None:
        return stated
    side, native, target = (
        number(facts, name) for name in ("patch_size", "level0_magnification", "target_magnification")
    )
    if side is None or native is None or target is None:
        return None
    ratio = side * native / target
    return ratio if ratio == np.rint(ratio) else None
