"""Who is in a cohort and what is to be predicted: the label table, its joining with a store, targets.

Names are resolved on first use, so that importing one file of the room does not load the others.
"""

from extract.exports import lazy_exports

_HOME = {
    "Attrition": "mil.cohort.cohort",
    "Cohort": "mil.cohort.cohort",
    "join_store": "mil.cohort.joining",
    "read_cohort": "mil.cohort.reading",
}

__all__ = list(_HOME)
__getattr__ = lazy_exports(__name__, _HOME)
