"""What every foreign layout is turned into: a bag of features, with level-0 corners where they can be known."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

Unit = Literal["px", "um"]
Origin = Literal["corner", "centre"]

NO = 0
"""A file that a layout cannot be."""
MAYBE = 1
"""A file that a layout can be, if someone says so."""
SURE = 2
"""A file that can be nothing else."""


@dataclass(frozen=True)
class Answers:
    """What the files do not say, said by whoever imports them; None where nothing was said.

    Attributes:
        layout: name of the layout, where it is not recognised.
        unit: unit of the coordinates: level-0 pixels or micrometres.
        origin: whether coordinates are top-left corners or centres of tiles.
        mpp: µm/px of level 0, of every slide that ``mpps`` does not name.
        mpps: µm/px of level 0 by slide id.
        tile_l0: side of a tile in level-0 px.
        dataset: which feature matrix to take from files that hold several.
        without_coords: leave the coordinates behind.
    """

    layout: str | None = None
    unit: Unit | None = None
    origin: Origin | None = None
    mpp: float | None = None
    mpps: Mapping[str, float] = field(default_factory=dict)
    tile_l0: int | None = None
    dataset: str | None = None
    without_coords: bool = False

    def mpp_of(self, slide_id: str) -> float | None:
        """µm/px of a slide's level 0."""
        return self.mpps.get(slide_id, self.mpp)


@dataclass(frozen=True)
class CutFacts:
    """How the tiles of all slides of a source were cut, as far as it says so.

    Attributes:
        tile_px: side of a tile in pixels as the backbone saw it, 0 when unknown.
        overlap_px: pixels that neighbouring tiles share, 0 when unknown.
        mpp: µm/px of the tiles, or None when unknown.
    """

    tile_px: int = 0
    overlap_px: int = 0
    mpp: float | None = None


@dataclass(frozen=True, eq=False)
class ForeignBag:
    """One slide as another tool left it, in our frame.

    Attributes:
        slide_id: the slide's id.
        features: [n, dim], float16 or float32, finite.
        coords: int32 [n, 2], top-left corners in level-0 px, row for row those of the features; None when unknown.
        cut: how the tiles were cut.
        tile_l0: side of a tile in level-0 px, or None when unknown.
        mpp: µm/px of level 0, or None when unknown.
        backbone: name of the backbone, or None when unknown.
        attributes: what the file says of itself, word for word, as JSON values.
    """

    slide_id: str
    features: np.ndarray
    coords: np.ndarray | None = None
    cut: CutFacts = CutFacts()
    tile_l0: float | None = None
    mpp: float | None = None
    backbone: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ForeignFile:
    """A file, or a folder such as a Zarr group, that holds one or more bags.

    Attributes:
        path: where it is.
        name: its path below the source, without its extension; the slide id where it holds one bag.
        kind: what its bytes are: ``h5``, ``pt``, ``npz``, ``csv`` or ``zarr``.
    """

    path: Path
    name: str
    kind: str


class ForeignLayout(ABC):
    """How one tool lays out its features.

    Attributes:
        name: of the layout, as given to ``--layout``.
        kind: what its files are, as in `ForeignFile`.
    """

    name: ClassVar[str]
    kind: ClassVar[str]

    @abstractmethod
    def fits(self, file: ForeignFile) -> int:
        """Whether a file has this layout: `NO`, `MAYBE` or `SURE`. Looks at names and shapes, reads no features.

        Raises:
            ForeignFileError: the file is damaged.
        """

    def slide_ids(self, file: ForeignFile) -> list[str]:
        """The slides of a file, in order.

        Raises:
            ForeignFileError: the file is damaged.
        """
        return [file.name]

    @abstractmethod
    def read(self, file: ForeignFile, slide_id: str, answers: Answers) -> ForeignBag:
        """Read one slide.

        Raises:
            AmbiguousError: the file can be read in several ways; the message asks.
            ForeignFileError: the file is damaged, incomplete or not what its layout says.
        """

    def labels(self, file: ForeignFile) -> dict[str, str]:
        """Label by slide id, where the file has any."""
        return {}
