"""Recipes of imported tiles and features: what is known stands there, what is not is ``unknown:<source hash>``."""

from extract.store.core.fingerprint import fingerprint, sha256_of
from extract.store.core.recipes import UNKNOWN, FeatureRecipe, TileRecipe, TissueRecipe, TransformRecipe
from extract.store.foreign.layouts.base import CutFacts, ForeignBag


def source_hash(layout: str, bag: ForeignBag, part: str, name: str | None) -> str:
    """What stands for a source whose recipe nobody recorded.

    With a ``name`` it is that name's hash: whoever imports says that all features under it were made alike. Without
    one it is the hash of the first bag, so that two sources are alike only if they hold the same bag.

    Args:
        layout: name of the layout.
        bag: the first bag of the source.
        part: ``tiles`` or ``features``.
        name: given by whoever imports, or None.
    """
    if name is not None:
        return fingerprint({"part": part, "name": name})
    matrix = bag.features if part == "features" or bag.coords is None else bag.coords
    return fingerprint({"part": part, "layout": layout, "slide_id": bag.slide_id, "first": sha256_of(matrix)})


def imported_tile_recipe(cut: CutFacts, source: str) -> TileRecipe:
    """The tile recipe of an imported store.

    Edge and tissue method are unknown, so it equals no recipe of ours; numbers that are not known are 0.
    """
    return TileRecipe(
        mpp=cut.mpp,
        tile_px=cut.tile_px,
        overlap_px=cut.overlap_px,
        edge=UNKNOWN + source,
        min_tissue_fraction=0.0,
        tissue=TissueRecipe(method=UNKNOWN + source),
    )


def imported_feature_recipe(bag: ForeignBag, source: str) -> FeatureRecipe:
    """The feature recipe of an imported entry.

    The backbone's name is taken from the files where they give one; its weights, pooling and transform are unknown. The
    transform's numbers are 0, which no transform has: a standard deviation of 0 divides by nothing.
    """
    unknown = UNKNOWN + source
    return FeatureRecipe(
        backbone=bag.backbone or unknown,
        architecture=unknown,
        revision=unknown,
        weights_sha256=unknown,
        pooling=unknown,
        transform=TransformRecipe(0, unknown, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        dim=int(bag.features.shape[1]),
        dtype=bag.features.dtype.name,
    )
