"""Features of other tools: imported into a store, and exported from one. Imports no torch until a ``.pt`` is read."""

from extract.store.foreign.detect import Survey, survey
from extract.store.foreign.exporting import WRITERS, export_store
from extract.store.foreign.importing import ImportReport, Outcome, import_bags, write_labels
from extract.store.foreign.layouts import LAYOUT_NAMES
from extract.store.foreign.layouts.base import Answers, CutFacts, ForeignBag, ForeignFile, ForeignLayout
from extract.store.foreign.reading import ForeignReader

EXPORT_FORMATS = tuple(WRITERS)

__all__ = [
    "EXPORT_FORMATS",
    "LAYOUT_NAMES",
    "Answers",
    "CutFacts",
    "ForeignBag",
    "ForeignFile",
    "ForeignLayout",
    "ForeignReader",
    "ImportReport",
    "Outcome",
    "Survey",
    "export_store",
    "import_bags",
    "survey",
    "write_labels",
]
