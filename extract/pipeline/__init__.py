"""From slides to a store: the stream of tiles, its jobs, many processes, parity.

Names are resolved on first use, so that importing one file of the room does not load the others.
"""

from extract.exports import lazy_exports

_HOME = {
    "ExtractionReport": "extract.pipeline.report",
    "Progress": "extract.pipeline.report",
    "SlideOutcome": "extract.pipeline.report",
    "run_extraction": "extract.pipeline.extraction",
}

__all__ = list(_HOME)
__getattr__ = lazy_exports(__name__, _HOME)
