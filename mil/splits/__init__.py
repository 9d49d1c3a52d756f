"""Patient-grouped folds: drawn, given or by site; verified, and written.

Names are resolved on first use, so that importing one file of the room does not load the others.
"""

from extract.exports import lazy_exports

_HOME = {
    "Splits": "mil.splits.splits",
    "make_splits": "mil.splits.folds",
    "read_splits": "mil.splits.tables",
    "verify_splits": "mil.splits.verification",
    "write_splits": "mil.splits.tables",
}

__all__ = list(_HOME)
__getattr__ = lazy_exports(__name__, _HOME)
