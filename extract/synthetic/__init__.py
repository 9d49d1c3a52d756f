"""Synthetic slides with planted lesions.

Names are resolved on first use, so that importing one file of the room does not load the others.
"""

from extract.exports import lazy_exports

_HOME = {
    "lesion_tiles": "extract.synthetic.lesions",
    "make_cohort": "extract.synthetic.cohort",
    "read_lesions": "extract.synthetic.lesions",
    "write_pyramid": "extract.synthetic.pyramid",
}

__all__ = list(_HOME)
__getattr__ = lazy_exports(__name__, _HOME)
