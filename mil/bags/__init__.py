"""What heads read: the bags of a store, samples, augmentation, forward passes within memory.

Names are resolved on first use, so that importing one file of the room does not load the others.
"""

from extract.exports import lazy_exports

_HOME = {
    "Bags": "mil.bags.bags",
    "open_bags": "mil.bags.stored",
}

__all__ = list(_HOME)
__getattr__ = lazy_exports(__name__, _HOME)
