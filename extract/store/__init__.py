"""The embedding store: what was cut, what was computed, and readers that copy nothing. Imports no torch."""

from pathlib import Path

from extract.errors import StoreError
from extract.store.base import SlideReader, Store, TilesUnit
from extract.store.fingerprint import (
    AugmentRecipe,
    Execution,
    FeatureRecipe,
    PenRecipe,
    QualityRecipe,
    SlideFingerprint,
    TileRecipe,
    TissueRecipe,
    TransformRecipe,
    difference,
    fingerprint,
    from_dict,
    to_dict,
)
from extract.store.zarr_store import ZarrStore

__all__ = [
    "AugmentRecipe",
    "Execution",
    "FeatureRecipe",
    "PenRecipe",
    "QualityRecipe",
    "SlideFingerprint",
    "SlideReader",
    "Store",
    "TileRecipe",
    "TilesUnit",
    "TissueRecipe",
    "TransformRecipe",
    "ZarrStore",
    "difference",
    "fingerprint",
    "from_dict",
    "open_store",
    "to_dict",
]


def open_store(path: str | Path) -> Store:
    """Open a store for reading.

    Args:
        path: the folder that ``mil extract --store`` wrote.

    Raises:
        StoreError: there is no store at ``path``.

    Example:
        >>> store = open_store("cohort.zarr")                      # doctest: +SKIP
        >>> store["site A/slide 1"].features("efficientnet_lite0").shape  # doctest: +SKIP
        (1205, 1280)
    """
    path = Path(path)
    if not (path / "zarr.json").is_file():
        raise StoreError(
            f"got {path} as store → there is no zarr.json in it → make a store with mil extract ... --store {path}"
        )
    return ZarrStore(path)
