"""Whether a slide that is in the store already is the one at hand."""

from collections.abc import Mapping
from typing import Any

from extract.errors import SlideChangedError
from extract.slides.finding.source import SlideSource
from extract.slides.masks import mask_sha256
from extract.slides.parts import slide_fingerprint


def check_same(source: SlideSource, record: Mapping[str, Any], default_mpp: float | None) -> None:
    """A slide's file, scale and mask must be those that it was cut with before.

    Args:
        source: the slide as it is given now.
        record: of its tiles unit.
        default_mpp: ``--default-mpp``.

    Raises:
        SlideChangedError: they are not; the message says which.
    """
    now, then = slide_fingerprint(source.path), record["slide"]
    if not now.matches(then):
        what = "files" if now.parts else "a file"
        raise SlideChangedError(
            f"got {what} for slide {source.slide_id!r} ({now.size_bytes} bytes) unlike the one that was cut before "
            f"({then['size_bytes']} bytes) → one id is one slide → bring the old file back; or, if the new one is "
            f"right, cut and embed it anew with --redo {source.slide_id!r}; or give it another slide_id in the slide "
            f"table"
        )
    mpp = record["mpp"]
    stated = source.mpp or (default_mpp if mpp["source"] == "--default-mpp" else None)
    if stated is not None and stated != mpp["native"]:
        raise SlideChangedError(
            f"got {stated:g} µm/px for slide {source.slide_id!r} → it was cut as {mpp['native']} ({mpp['source']}) → "
            f"state the same mpp, or extract into another --store"
        )
    _check_same_mask(source, record)


def _check_same_mask(source: SlideSource, record: Mapping[str, Any]) -> None:
    now = None if source.mask is None else mask_sha256(source.mask)
    then = record["tissue"]["given_sha256"]
    if now != then:
        raise SlideChangedError(
            f"got {'another mask' if now and then else 'a mask' if now else 'no mask'} for slide {source.slide_id!r} → "
            f"its tiles were cut {'by another one' if now and then else 'with one' if then else 'without one'} → give "
            f"the same mask, or extract into another --store"
        )
