"""One slide to extract, as it was found."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SlideSource:
    """One slide to extract.

    Attributes:
        path: the file.
        slide_id: its id in the store.
        mpp: µm/px of level 0 from the slide table, or None.
        mask: the mask given for it, or None. It may not exist: then it is this slide that fails, and no other.
        patient_id: the patient from the slide table, or None.
    """

    path: Path
    slide_id: str
    mpp: float | None = None
    mask: Path | None = None
    patient_id: str | None = None
