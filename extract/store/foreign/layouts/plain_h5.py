"""HDF5 files that name no tool: a matrix of features, perhaps with coordinates whose frame must be said."""

from extract.errors import AmbiguousError
from extract.store.foreign.layouts.atlaspatch import choose
from extract.store.foreign.layouts.base import MAYBE, NO, Answers, ForeignBag, ForeignFile, ForeignLayout
from extract.store.foreign.layouts.frames import Frame, corners_l0
from extract.store.foreign.layouts.hdf5 import H5Contents, contents, open_h5, read_dataset, read_pairs
from extract.store.foreign.layouts.matrices import check_rows, clean_features

_FEATURES = ("features", "feats", "feat", "embeddings")
_COORDS = ("coords", "coordinates", "coord", "locations")


class PlainH5(ForeignLayout):
    """A file with ``features``, ``feats`` or ``embeddings``, and nothing that tells its tool."""

    name = "plain"
    kind = "h5"

    def fits(self, file: ForeignFile) -> int:
        """Anything with a matrix of a usual name."""
        return MAYBE if _matrices(contents(file.path)) else NO

    def read(self, file: ForeignFile, slide_id: str, answers: Answers) -> ForeignBag:
        """Coordinates are taken only when someone says what they are."""
        found = contents(file.path)
        name = choose(_matrices(found), answers.dataset, slide_id)
        pairs = [each for each in _COORDS if each in found.shapes]
        if len(pairs) > 1 and not answers.without_coords:
            raise AmbiguousError(
                f"got {pairs} in slide {slide_id!r} → which are the coordinates? → keep one, or leave them behind with "
                f"--no-coords"
            )
        with open_h5(file.path) as h5:
            features = clean_features(read_dataset(h5, name, slide_id), slide_id)
            raw = read_pairs(h5, pairs[0], slide_id) if pairs and not answers.without_coords else None
        corners = None
        if raw is not None:
            check_rows(features, raw, slide_id)
            corners = corners_l0(raw, Frame(None, None).completed(answers, slide_id), slide_id)
        facts = {key: dict(found.of(key)) for key in ("", name, *pairs) if found.of(key)}
        return ForeignBag(
            slide_id,
            features,
            corners,
            tile_l0=answers.tile_l0,
            mpp=answers.mpp_of(slide_id),
            attributes=facts,
        )


def _matrices(found: H5Contents) -> list[str]:
    return [name for name in _FEATURES if found.is_matrix(name) and found.kinds[name] == "f"]
