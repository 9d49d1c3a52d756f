"""Frozen backbones: presets, weights, runtimes, augmented views.

Names are resolved on first use, so that importing one file of the room does not load the others.
"""

from extract.exports import lazy_exports

_HOME = {
    "Backbone": "extract.backbones.backbone",
    "DEFAULT_BACKBONE": "extract.backbones.presets",
    "list_backbones": "extract.backbones.backbone",
    "load_backbone": "extract.backbones.backbone",
}

__all__ = list(_HOME)
__getattr__ = lazy_exports(__name__, _HOME)
