"""Slides to embeddings: tissue, tiles, frozen backbones, and the store.

Names are resolved on first use, so that ``import extract`` loads neither torch, timm nor OpenSlide.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "ExtractError": "extract.errors",
    "Slide": "extract.slide",
    "TileRecipe": "extract.store",
    "list_backbones": "extract.backbones",
    "load_backbone": "extract.backbones",
    "open_store": "extract.store",
    "run_extraction": "extract.pipeline",
}

__all__ = [
    "ExtractError",
    "Slide",
    "TileRecipe",
    "list_backbones",
    "load_backbone",
    "open_store",
    "run_extraction",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'extract' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
