"""CLAM: ``h5_files/<slide>.h5`` with features and level-0 corners, and the same features as ``pt_files/<slide>.pt``.

    features   float32 [n, dim]
    coords     whole numbers [n, 2], top-left corners in level-0 px, without attributes; some versions keep patch_size,
               patch_level and downsample of the patching

Reference: Lu et al., 2021, Nature Biomedical Engineering 5:555; layout of ``extract_features_fp.py``. The earlier
pipeline, which stored images in the file, counted in pixels of the patching level; its files hold ``imgs``.
"""

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
from extract.store.foreign.layouts.matrices import check_rows, clean_features, load_tensor

_TRIDENT = {"patch_size_level0", "level0_magnification", "target_magnification"}


class Clam(ForeignLayout):
    """``<slide>.h5`` of CLAM's features."""

    name = "clam"
    kind = "h5"

    def fits(self, file: ForeignFile) -> int:
        """Sure when features lie beside whole-number pairs that carry no attributes of another tool."""
        found = contents(file.path)
        if not found.is_matrix("features") or not found.is_matrix("coords"):
            return NO
        pairs = found.columns("coords") == 2 and found.kinds["coords"] in "iu"
        known = {"patch_size", "patch_level", "downsample", "downsampled_level_dim", "level_dim", "name", "save_path"}
        stray = set(found.of("coords")) - known or set(found.of("")) - {"tessera"} or "imgs" in found.shapes
        return SURE if pairs and not stray else MAYBE

    def read(self, file: ForeignFile, slide_id: str, answers: Answers) -> ForeignBag:
        """Corners are taken as they are."""
        found = contents(file.path)
        with open_h5(file.path) as h5:
            features = clean_features(read_dataset(h5, "features", slide_id), slide_id)
            raw = None if answers.without_coords else read_pairs(h5, "coords", slide_id)
        facts = found.of("coords")
        side, level, downsample = (number(facts, name) for name in ("patch_size", "patch_level", "downsample"))
        # patch_level 0 is no number above 0
        if downsample is None and level is None and "patch_level" in facts:
            downsample = 1.0
        tile_l0 = side * downsample if side is not None and downsample is not None else None
        corners = None
        if raw is not None:
            check_rows(features, raw, slide_id)
            corners = corners_l0(raw, Frame("px", "corner", tile_l0=tile_l0).completed(answers, slide_id), slide_id)
        return ForeignBag(
            slide_id,
            features,
            corners,
            CutFacts(int(side or 0)),
            tile_l0 if tile_l0 is not None else answers.tile_l0,
            answers.mpp_of(slide_id),
            None,
            {"coords": dict(facts)} if facts else {},
        )


class ClamTensor(ForeignLayout):
    """``<slide>.pt`` of CLAM and others: a tensor of features, and no coordinates."""

    name = "pt"
    kind = "pt"

    def fits(self, file: ForeignFile) -> int:
        """Any tensor file that no other layout claims."""
        return MAYBE

    def read(self, file: ForeignFile, slide_id: str, answers: Answers) -> ForeignBag:
        """The tensor as it is."""
        return ForeignBag(slide_id, clean_features(load_tensor(file.path, slide_id), slide_id))
