"""Slides to embeddings: tissue, tiles, frozen backbones, and the store.

Names are resolved on first use, so that ``import extract`` loads neither torch, timm nor OpenSlide.
"""

from extract.exports import MovedModules, lazy_exports

_HOME = {
    "ExtractError": "extract.errors",
    "Slide": "extract.slides.slide",
    "TileRecipe": "extract.store",
    "list_backbones": "extract.backbones.backbone",
    "load_backbone": "extract.backbones.backbone",
    "open_store": "extract.store",
    "run_extraction": "extract.pipeline.extraction",
}

__all__ = list(_HOME)
__getattr__ = lazy_exports(__name__, _HOME)

# what was imported from its own file in 0.1, for one version more
MovedModules(
    {
        "extract.image": ("extract.slides.image", "extract.slides.opening"),
        "extract.pen": ("extract.tiling.pen",),
        "extract.plan": ("extract.planning.plan", "extract.planning.planned"),
        "extract.presets": ("extract.backbones.presets",),
        "extract.slide": ("extract.slides.slide",),
        "extract.tiles": ("extract.tiling.tiles",),
        "extract.tissue": ("extract.tiling.tissue",),
    }
).install()
