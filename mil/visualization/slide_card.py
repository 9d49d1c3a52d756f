"""What a contact sheet says of one slide: pictures, tissue, tiles, scale, flags."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from PIL import Image

from extract.errors import EntryNotFoundError, ExtractError, StoreError
from extract.store import SlideReader, Store
from mil.visualization import slide_picture
from mil.visualization.plotting import MISSING
from mil.visualization.slide_picture import FLAGS

FEW_TILES = 10
TISSUE_RANGE = (0.01, 0.95)
FLAGGED_SHARE = 0.3
FROM_FILE = ("openslide.mpp", "OME PhysicalSize", "ImageJ unit", "TIFF resolution")
COMMON_SHARE, COMMON_LEAST = 0.5, 4

LOOKS = {
    "failed": "failed",
    "damaged": "damaged in the store",
    "bare": "without features",
    "invalid": "tiles that cannot be decoded",
    "flagged": f"more than {FLAGGED_SHARE:.0%} of the tiles flagged",
    "few": f"fewer than {FEW_TILES} tiles",
    "little": f"tissue below {TISSUE_RANGE[0]:.0%}",
    "full": f"tissue above {TISSUE_RANGE[1]:.0%}",
    "scale": "mpp not from the file",
    "unreadable": "thumbnail not fully readable",
}
"""Why a slide deserves a look, the gravest first."""

COMMON = {
    "flagged": "if these slides are as they should be, the thresholds of the flags do not suit this stain or scanner",
    "few": "a cohort of fields of view or of small pieces? Then that is what it is",
    "little": "small pieces on large slides? Else tissue was missed: lower --tissue-threshold, or give masks",
    "full": "fields of view? Then that is what they are; else glass was taken for tissue: raise --tissue-threshold",
    "scale": "check that it is right: a wrong scale shows in no picture",
}
"""What most slides of a cohort may share without one of them deserving a look more than the others; what to think of
it."""

DAMAGES = (ExtractError, OSError, ValueError, LookupError, RuntimeError)
"""What reading a damaged unit raises, here or in Zarr and its codecs; it costs the slide's picture, not the sheet."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoggedSlide:
    """What the run logs say of a slide: its latest outcome and how its tiles were read."""

    outcome: str = ""
    reason: str = ""
    path: str = ""
    run: str = ""
    reader: str = ""


@dataclass
class SlideCard:
    """One slide of the sheet.

    Attributes:
        slide_id: its id.
        looks: why it deserves a look: a key of `LOOKS` → the reason in words.
        facts: label and text of each line.
        counts: tiles that carry each flag, each tile counted once for each.
        area_mm2: tissue; NaN when unknown.
        n_tiles: tiles, flagged ones included; None when unknown.
        n_flagged: tiles with any flag.
        mpp_source: where the native mpp is from; empty when unknown.
        synthetic: whether it was drawn by a program.
        size_px: width and height at which its picture is shown.
        spans: where in the spool the JPEG and the PNG that lies over it are: (start, length).
    """

    slide_id: str
    looks: dict[str, str] = field(default_factory=dict)
    facts: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    area_mm2: float = math.nan
    n_tiles: int | None = None
    n_flagged: int = 0
    mpp_source: str = ""
    synthetic: bool = False
    size_px: tuple[int, int] | None = None
    spans: tuple[tuple[int, int], ...] = ()


# ---------------------------------------------------------------------------------------------- reading


def entries_shown(store: Store, entry: str | None) -> list[str]:
    """Entries in which a slide's flags are looked up; views and surroundings of the tiles come last."""
    if entry is not None:
        store.feature_recipe(entry)
        return [entry]
    return sorted(store.entries(), key=lambda name: ("@" in name, name))


def first_features(slide: SlideReader, entries: Sequence[str]) -> tuple[str, Mapping[str, Any] | None]:
    """Name and record of the slide's first features, or ("", None).

    Raises:
        StoreError: features are there and damaged, or made from other tiles.
    """
    for entry in entries:
        try:
            return entry, slide.feature_record(entry)
        except EntryNotFoundError:
            continue
    return "", None


def tissue_mask_of(slide: SlideReader) -> np.ndarray | None:
    """The tissue mask bool [h, w], or None where the unit holds none."""
    try:
        return slide.tissue_mask
    except StoreError:
        return None


def flag_masks(features: Mapping[str, Any], n_tiles: int) -> dict[str, np.ndarray]:
    """For each name of `FLAGS` bool [n_tiles]."""
    rows = {"invalid": features["invalid_rows"], **features.get("flagged_rows", {})}
    flags = {name: np.zeros(n_tiles, dtype=bool) for name in FLAGS}
    for name, flag in flags.items():
        flag[list(rows.get(name, []))] = True
    return flags


# ---------------------------------------------------------------------------------------------- cards


def make_card(
    store: Store, slide_id: str, entries: Sequence[str], log: LoggedSlide, spool: IO[bytes], in_store: bool
) -> SlideCard:
    """Everything of one slide; its pictures go to the spool."""
    card = SlideCard(slide_id)
    if log.outcome == "failed":
        card.looks["failed"] = f"failed in the run of {log.run}: {log.reason}"
    if in_store:
        try:
            pictures = _fill_card(card, store[slide_id], entries, log)
        except DAMAGES as error:
            card.looks["damaged"] = _damage_text(error)
        else:
            card.spans = tuple(_spool(spool, picture) for picture in pictures)
    if log.outcome == "failed" and log.path:
        card.facts.append(("File", log.path))
    card.looks = {kind: card.looks[kind] for kind in LOOKS if kind in card.looks}
    return card


def _fill_card(card: SlideCard, slide: SlideReader, entries: Sequence[str], log: LoggedSlide) -> tuple[bytes, ...]:
    """Note what the store holds of a slide; returns its pictures, none where it was imported without."""
    record = slide.record
    tissue, mpp = record.get("tissue") or {}, record.get("mpp") or {}
    card.synthetic = bool(record.get("synthetic"))
    card.n_tiles = int(record["n_tiles"])
    card.mpp_source = str(mpp.get("source") or "")
    card.area_mm2 = math.nan if tissue.get("area_mm2") is None else float(tissue["area_mm2"])
    _look_at_tiles(card, tissue, int(record.get("thumbnail_unreadable") or 0))
    card.facts += [
        ("Tissue", _tissue_text(card.area_mm2, tissue)),
        ("Tiles", _tiles_text(record)),
        ("µm/px", _mpp_text(mpp)),
        ("Read from", _reading_text(record, log.reader)),
    ]
    flags = _add_flags(card, slide, entries)
    if "thumbnail" not in record["sha256"]:
        return ()
    picture, overlay = _draw(slide, flags)
    card.size_px = picture.size
    return slide_picture.encode_jpeg(picture), overlay


def _add_flags(card: SlideCard, slide: SlideReader, entries: Sequence[str]) -> dict[str, np.ndarray]:
    """Note what the features' record says of the tiles; returns their flags, none where there are no features."""
    try:
        entry, features = first_features(slide, entries)
    except DAMAGES as error:
        card.looks["damaged"] = _damage_text(error)
        return {}
    if features is None:
        if entries:
            card.looks["bare"] = f"no features in {', '.join(entries)}"
        return {}
    flags = flag_masks(features, card.n_tiles or 0)
    _look_at_flags(card, flags)
    card.facts += [("Flags", flags_text(card.counts, features)), ("Features", _execution_text(entry, features))]
    return flags


def _look_at_tiles(card: SlideCard, tissue: Mapping[str, Any], n_unreadable_px: int) -> None:
    """What the tiles unit alone gives reason to look at."""
    fraction, (low, high) = tissue.get("fraction"), TISSUE_RANGE
    if card.n_tiles is not None and card.n_tiles < FEW_TILES:
        card.looks["few"] = f"only {card.n_tiles} tile{'s' * (card.n_tiles != 1)}"
    # without a method everything is tissue, as was asked for
    if fraction is not None and tissue.get("method") != "none":
        covers = f"tissue covers {_percent(fraction)} of the slide"
        card.looks |= {"little": covers} if fraction < low else {"full": covers} if fraction > high else {}
    if card.mpp_source not in ("", *FROM_FILE):
        card.looks["scale"] = "no µm/px known" if card.mpp_source == "missing" else f"µm/px from {card.mpp_source}"
    if n_unreadable_px:
        card.looks["unreadable"] = f"{n_unreadable_px} px of the thumbnail cannot be read"


def _look_at_flags(card: SlideCard, flags: Mapping[str, np.ndarray]) -> None:
    card.counts = {name: int(flag.sum()) for name, flag in flags.items()}
    card.n_flagged = int(np.logical_or.reduce(list(flags.values())).sum())
    if card.counts["invalid"]:
        card.looks["invalid"] = f"{card.counts['invalid']:,} of {card.n_tiles:,} tiles cannot be decoded"
    if card.n_tiles and card.n_flagged > FLAGGED_SHARE * card.n_tiles:
        card.looks["flagged"] = f"{card.n_flagged:,} of {card.n_tiles:,} tiles flagged"


def _draw(slide: SlideReader, flags: Mapping[str, np.ndarray]) -> tuple[Image.Image, bytes]:
    """A slide's small picture, and the PNG with its tiles and tissue that lies over it."""
    thumbnail, record = slide.thumbnail, slide.record
    picture = slide_picture.shrink(thumbnail)
    if "thumbnail" in record and "tile_l0" in record:
        frame = record["thumbnail"]
        scale = np.array(picture.size) / thumbnail.shape[1::-1] / np.array(frame["downsample"])
        boxes = slide_picture.tile_boxes(slide.coords(), record["tile_l0"], np.array(frame["origin_l0"]), scale)
    else:
        # imported: nobody knows where its tiles are
        boxes, flags = np.empty((0, 4)), {}
    return picture, slide_picture.encode_overlay(picture.size, tissue_mask_of(slide), boxes, flags)


def _spool(spool: IO[bytes], content: bytes) -> tuple[int, int]:
    start = spool.seek(0, os.SEEK_END)
    spool.write(content)
    return start, len(content)


# ---------------------------------------------------------------------------------------------- texts


def _damage_text(error: Exception) -> str:
    return f"damaged in the store: {error or type(error).__name__}"


def _tissue_text(area_mm2: float, tissue: Mapping[str, Any]) -> str:
    if "fraction" not in tissue:
        return MISSING
    area = "area unknown" if math.isnan(area_mm2) else f"{area_text(area_mm2)} mm²"
    return f"{area}, {_percent(tissue['fraction'])} of the slide ({tissue['method']})"


def _tiles_text(record: Mapping[str, Any]) -> str:
    of_grid = f" of {record['grid_tiles']:,} in the grid" if "grid_tiles" in record else ""
    return f"{record['n_tiles']:,}{of_grid}"


def _mpp_text(mpp: Mapping[str, Any]) -> str:
    native, achieved = mpp.get("native"), mpp.get("achieved")
    if native is None:
        return "unknown, read as it is" if mpp and mpp.get("source") != "import" else MISSING
    return f"{native:.4g} → {MISSING if achieved is None else format(achieved, '.4g')} ({mpp.get('source')})"


def _reading_text(record: Mapping[str, Any], reader: str) -> str:
    level = f"level {record['level']}" if "level" in record else ""
    return ", ".join(text for text in (level, str(record.get("vendor") or ""), reader) if text) or MISSING


def flags_text(counts: Mapping[str, int], features: Mapping[str, Any] | None = None) -> str:
    """How many tiles carry each flag, to be read."""
    found = [f"{counts[name]:,} {name}" for name in FLAGS if counts.get(name)]
    # where quality was looked at, every flag has a list, if an empty one
    if features is not None and not features.get("flagged_rows"):
        found.append("quality was not looked at")
    return ", ".join(found) or "none"


def _execution_text(entry: str, features: Mapping[str, Any]) -> str:
    execution = features.get("execution", {})
    known = [
        str(execution[key]) for key in ("runtime", "device", "precision") if execution.get(key, "unknown") != "unknown"
    ]
    return ", ".join([entry, *known])


def area_text(area_mm2: float) -> str:
    """Square millimetres, to be read."""
    return f"{area_mm2:.3g}" if area_mm2 < 100 else f"{area_mm2:,.0f}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction < 0.1 else f"{100 * fraction:.0f} %"
