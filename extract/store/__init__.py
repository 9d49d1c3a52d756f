"""The embedding store: what was cut, what was computed, and readers that copy nothing. Imports no torch."""

from extract.store.core.fingerprint import SlideFingerprint, difference, fingerprint, to_dict
from extract.store.core.recipes import (
    AugmentRecipe,
    Execution,
    FeatureRecipe,
    PenRecipe,
    QualityRecipe,
    TileRecipe,
    TissueRecipe,
    TransformRecipe,
    from_dict,
)
from extract.store.core.slide_reader import SlideReader
from extract.store.core.store import Store
from extract.store.core.unit import TilesUnit
from extract.store.formats.h5_store import H5Store
from extract.store.formats.opening import create_store, find_format, open_store
from extract.store.formats.zarr_store import ZarrStore
from extract.store.upkeep.convert import ConversionReport, convert_store

__all__ = [
    "AugmentRecipe",
    "ConversionReport",
    "Execution",
    "FeatureRecipe",
    "H5Store",
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
    "convert_store",
    "create_store",
    "difference",
    "find_format",
    "fingerprint",
    "from_dict",
    "open_store",
    "to_dict",
]
