"""How other tools lay out their bags, one layout a file; and all of them, in the order in which they are tried."""

from extract.store.foreign.layouts.atlaspatch import AtlasPatch
from extract.store.foreign.layouts.base import ForeignLayout
from extract.store.foreign.layouts.clam import Clam, ClamTensor
from extract.store.foreign.layouts.classic import ClassicCsv, ClassicNpz
from extract.store.foreign.layouts.plain_h5 import PlainH5
from extract.store.foreign.layouts.slideflow import Slideflow
from extract.store.foreign.layouts.stamp import Stamp
from extract.store.foreign.layouts.trident import Trident
from extract.store.foreign.layouts.wsidata import WsiData

LAYOUTS: tuple[ForeignLayout, ...] = (
    Trident(),
    Clam(),
    Stamp(),
    AtlasPatch(),
    PlainH5(),
    Slideflow(),
    ClamTensor(),
    WsiData(),
    ClassicNpz(),
    ClassicCsv(),
)
LAYOUT_NAMES = tuple(dict.fromkeys(layout.name for layout in LAYOUTS))

__all__ = ["LAYOUTS", "LAYOUT_NAMES", "ForeignLayout"]
