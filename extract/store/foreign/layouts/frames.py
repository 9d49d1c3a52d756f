"""Coordinates of other tools, turned into top-left corners in level-0 pixels."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from extract.errors import AmbiguousError, ForeignFileError
from extract.store.foreign.layouts.base import Answers, Origin, Unit

PX_TOLERANCE = 1 / 64
"""Pixels may be this far from a whole number: what float32 leaves of one on the widest slides."""

_MAX_L0 = 2**31 - 1


@dataclass(frozen=True)
class Frame:
    """What a pair of coordinates means; None where it is not known.

    Attributes:
        unit: ``px`` (level-0 pixels) or ``um`` (micrometres).
        origin: ``corner`` (top left) or ``centre`` of the tile.
        mpp: µm/px of level 0; needed for ``um``.
        tile_l0: side of a tile in level-0 px; needed for ``centre``.
    """

    unit: Unit | None
    origin: Origin | None
    mpp: float | None = None
    tile_l0: float | None = None

    def completed(self, answers: Answers, slide_id: str) -> "Frame":
        """The frame with what the file leaves open filled in by the answers.

        Raises:
            AmbiguousError: something is still open; the message asks.
            ForeignFileError: the answers contradict the file.
        """
        frame = Frame(
            _agreed("unit of coordinates", self.unit, answers.unit, "--coords", slide_id),
            _agreed("origin of coordinates", self.origin, answers.origin, "--origin", slide_id),
            self.mpp if self.mpp is not None else answers.mpp_of(slide_id),
            _agreed("tile side in level-0 px", self.tile_l0, answers.tile_l0, "--tile-px", slide_id),
        )
        if questions := frame.questions():
            raise AmbiguousError(
                f"got coordinates of slide {slide_id!r} that can be read in several ways → {'; '.join(questions)} → "
                f"answer, or leave the coordinates behind with --no-coords"
            )
        return frame

    def questions(self) -> list[str]:
        """What is still open, with the flag that answers it."""
        asked = []
        if self.unit is None:
            asked.append("level-0 pixels or micrometres? (--coords px or --coords um)")
        if self.origin is None:
            asked.append("top-left corners or centres of tiles? (--origin corner or --origin centre)")
        if self.unit == "um" and self.mpp is None:
            asked.append("how many µm is a level-0 pixel? (--mpp, or --mpps TABLE where slides differ)")
        if self.origin == "centre" and self.tile_l0 is None:
            asked.append("how wide is a tile in level-0 pixels? (--tile-px)")
        return asked


def _agreed(what: str, said: Any, answered: Any, flag: str, slide_id: str) -> Any:
    """What the file says, else the answer."""
    if said is not None and answered is not None and said != answered:
        raise ForeignFileError(
            f"got {flag} {answered} for slide {slide_id!r} → its file says {what} {said} → leave {flag} out"
        )
    return said if said is not None else answered


def corners_l0(raw: Any, frame: Frame, slide_id: str) -> np.ndarray:
    """Top-left corners int32 [n, 2] in level-0 px, in the order of the rows.

    Which rounding is exact:

    * Whole pixels stay as they are. Fractional ones are refused if they are more than 1/64 px from a whole number.
    * Micrometres are divided by the mpp in double precision and rounded to the nearest pixel. Coordinates that were
      whole pixels come back exactly, also through float32 below 8,388,608 px; others, as of tiles whose
      side is no whole number of pixels, move by at most half a pixel. Values that are stored so coarsely that the
      nearest pixel is not decided are refused.
    * From a centre, half the tile's side is taken off. A whole centre of a tile with an odd side is taken to be
      rounded down, so the smaller half is taken off; other halves must give whole pixels, as above.

    Args:
        raw: [n, 2], (x, y).
        frame: what they mean, complete.
        slide_id: for the message.

    Raises:
        ForeignFileError: not [n, 2], not finite, negative, too large, or no whole pixels.
    """
    array = np.asarray(raw)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iuf":
        raise ForeignFileError(
            f"got coordinates of shape {tuple(array.shape)} and dtype {array.dtype} in slide {slide_id!r} → expected "
            f"numbers [tiles, 2] → leave them behind with --no-coords"
        )
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ForeignFileError(
            f"got coordinates that are not finite in slide {slide_id!r} → expected pixels or micrometres → extract "
            f"the slide again, or leave them behind with --no-coords"
        )
    if frame.unit == "um" and frame.mpp is not None:
        _check_precision(array, frame.mpp, slide_id)
        corners = np.rint(_without_half(values / frame.mpp, frame))
    else:
        corners = _whole(_without_half(values, frame), slide_id)
    return _in_range(corners, slide_id)


def _without_half(centres: np.ndarray, frame: Frame) -> np.ndarray:
    """Corners of the tiles, given their corners or centres [n, 2] in px."""
    if frame.origin != "centre" or frame.tile_l0 is None:
        return centres
    half = frame.tile_l0 / 2
    if frame.unit == "px" and (centres == np.rint(centres)).all():
        half = np.floor(half)
    return centres - half


def _whole(values: np.ndarray, slide_id: str) -> np.ndarray:
    rounded: np.ndarray = np.rint(values)
    off = np.abs(values - rounded).max(initial=0.0)
    if off > PX_TOLERANCE:
        raise ForeignFileError(
            f"got coordinates of slide {slide_id!r} that are {off:.3f} px from a whole level-0 pixel → expected whole "
            f"pixels → they may be micrometres (--coords um), centres (--origin centre, --tile-px) or pixels of "
            f"another level; leave them behind with --no-coords if none of these"
        )
    return rounded


def _check_precision(array: np.ndarray, mpp: float, slide_id: str) -> None:
    """Refuse floats whose own spacing leaves the nearest pixel open."""
    if array.dtype.kind != "f" or not len(array):
        return
    spacing = float(np.spacing(np.abs(array).max()))
    if spacing > mpp:
        raise ForeignFileError(
            f"got coordinates of slide {slide_id!r} stored as {array.dtype} in steps of {spacing:g} µm → expected "
            f"steps of at most one pixel, {mpp:g} µm → leave them behind with --no-coords"
        )


def _in_range(corners: np.ndarray, slide_id: str) -> np.ndarray:
    low, high = float(corners.min(initial=0.0)), float(corners.max(initial=0.0))
    if low < 0:
        raise ForeignFileError(
            f"got the coordinate {low:.0f} in slide {slide_id!r} → expected level-0 pixels from 0 on → they may be "
            f"corners, not centres (--origin), or of another frame; leave them behind with --no-coords"
        )
    if high > _MAX_L0:
        raise ForeignFileError(
            f"got the coordinate {high:.0f} in slide {slide_id!r} → expected level-0 pixels up to {_MAX_L0} → "
            f"check --coords and --mpp"
        )
    return np.asarray(corners, dtype=np.int32)
