"""AtlasPatch: one HDF5 file a slide; five columns of coordinates and a group of feature matrices.

    coords           int32 [n, 5]: x, y (top-left corner in level-0 px), then width, height and level that were read
    features/<name>  float32 [n, dim], one per backbone
    attributes of the file: patch_size (px at the target magnification), patch_size_level0, level0_magnification,
    target_magnification, overlap

Reference: documentation of AtlasPatch, 2026.
"""

from extract.errors import AmbiguousError, ForeignFileError
from extract.store.foreign.layouts.base import NO, SURE, Answers, CutFacts, ForeignBag, ForeignFile, ForeignLayout
from extract.store.foreign.layouts.frames import Frame, corners_l0
from extract.store.foreign.layouts.hdf5 import H5Contents, contents, number, open_h5, read_dataset, read_pairs
from extract.store.foreign.layouts.matrices import check_rows, clean_features


class AtlasPatch(ForeignLayout):
    """``patches/<slide>.h5`` of AtlasPatch."""

    name = "atlaspatch"
    kind = "h5"

    def fits(self, file: ForeignFile) -> int:
        """Sure when a group of matrices lies beside five-column coordinates."""
        found = contents(file.path)
        return SURE if _matrices(found) and found.columns("coords") == 5 else NO

    def read(self, file: ForeignFile, slide_id: str, answers: Answers) -> ForeignBag:
        """The first two columns are the corners; the others say how the pixels were read."""
        found = contents(file.path)
        name = choose(_matrices(found), answers.dataset, slide_id)
        with open_h5(file.path) as h5:
            features = clean_features(read_dataset(h5, f"features/{name}", slide_id), slide_id)
            raw = None if answers.without_coords else read_pairs(h5, "coords", slide_id)
        facts = dict(found.of("coords")) | dict(found.of(""))
        tile_l0 = number(facts, "patch_size_level0")
        corners = None
        if raw is not None:
            check_rows(features, raw, slide_id)
            frame = Frame("px", "corner", tile_l0=tile_l0).completed(answers, slide_id)
            corners = corners_l0(raw[:, :2], frame, slide_id)
        return ForeignBag(
            slide_id,
            features,
            corners,
            CutFacts(int(number(facts, "patch_size") or 0), int(number(facts, "overlap") or 0)),
            tile_l0 if tile_l0 is not None else answers.tile_l0,
            answers.mpp_of(slide_id),
            name,
            {"": dict(found.of(""))},
        )


def choose(names: list[str], wanted: str | None, slide_id: str) -> str:
    """The only feature matrix, or the one that is wanted.

    Raises:
        AmbiguousError: there are several and none was named.
        ForeignFileError: the one that is wanted is not there.
    """
    if wanted is None and len(names) > 1:
        raise AmbiguousError(
            f"got {len(names)} feature matrices in slide {slide_id!r} → which one? → --dataset with one of {names}; "
            f"import again with --as for each other one"
        )
    if wanted is not None and wanted not in names:
        raise ForeignFileError(
            f"got --dataset {wanted} → slide {slide_id!r} holds {names} → name one of these, or extract the slide again"
        )
    return wanted if wanted is not None else names[0]


def _matrices(found: H5Contents) -> list[str]:
    return sorted(name.removeprefix("features/") for name in found.shapes if name.startswith("features/"))
