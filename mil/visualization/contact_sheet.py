"""The contact sheet: a whole cohort at a glance, one card a slide; and its tissue and tiles as GeoJSON for QuPath.

Everything comes from the store and its run logs: no slide is opened. The page works offline: pictures, styles and its
one script are in the file, and a content security policy in its head holds the browser to that. Slide ids and reasons
come from other people's files, so all of them reach the page through jinja2's escaping. Pictures wait in a temporary
file while the page is made, so memory does not grow with the cohort.
"""

import base64
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any
from uuid import uuid4

import numpy as np
from PIL import Image

from extract.errors import EntryNotFoundError, ExtractError, StoreError
from extract.store import SlideReader, Store, open_store
from extract.store.core.fingerprint import tiles_text
from extract.store.core.store import encode_id
from mil.errors import ConfigError, listed
from mil.files import write_atomically
from mil.visualization import slide_picture
from mil.visualization.html_page import load_template
from mil.visualization.plotting import MISSING
from mil.visualization.slide_picture import FLAGS

FEW_TILES = 10
TISSUE_RANGE = (0.01, 0.95)
FLAGGED_SHARE = 0.3
FROM_FILE = "openslide.mpp"

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

_DAMAGES = (ExtractError, OSError, ValueError, LookupError, RuntimeError)
"""What reading a damaged unit raises, here or in Zarr and its codecs; it costs the slide's picture, not the sheet."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Logged:
    """What the run logs say of a slide: its latest outcome and how its tiles were read."""

    outcome: str = ""
    reason: str = ""
    path: str = ""
    run: str = ""
    reader: str = ""


@dataclass
class _Card:
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


def write_contact_sheet(
    store: Store | str | Path, path: str | Path, entry: str | None = None, progress: Progress | None = None
) -> Path:
    """Write the contact sheet of a store, one self-contained HTML file, and return its path.

    Args:
        store: an open store or its folder.
        path: the file to write; whole or not at all.
        entry: the features entry whose flags are shown; by default each slide's first one, as flags come from the
            pixels and are the same for every backbone.
        progress: told (slides done, slides in all).

    Raises:
        ConfigError: ``path`` is a folder, or in a folder that does not exist.
        EntryNotFoundError: the store has no such entry.
        MissingExtraError: jinja2 is not installed.

    Example:
        >>> write_contact_sheet("cohort.zarr", "contact_sheet.html")  # doctest: +SKIP
        PosixPath('contact_sheet.html')
    """
    template = load_template("contact_sheet.html", "the contact sheet")
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"got {path} for the contact sheet → expected a file in a folder that exists → correct it")
    store = store if isinstance(store, Store) else open_store(store)
    entries = _entries(store, entry)
    logged = _read_logs(store.path / "runs")
    failed = {slide_id for slide_id, log in logged.items() if log.outcome == "failed"}
    in_store = set(store.slide_ids())
    slide_ids = sorted(in_store | failed)
    with TemporaryFile() as spool:
        cards = []
        for done, slide_id in enumerate(slide_ids, start=1):
            log = logged.get(slide_id, _Logged())
            cards.append(_make_card(store, slide_id, entries, log, spool, slide_id in in_store))
            if progress is not None:
                progress(done, len(slide_ids))
        _write_stream(
            path, template.generate(uri=lambda span, kind: _data_uri(spool, span, kind), **_view(store, cards))
        )
    return path


def write_geojson(
    store: Store | str | Path, folder: str | Path, entry: str | None = None, progress: Progress | None = None
) -> list[Path]:
    """Write each slide's tissue and tiles as GeoJSON that QuPath opens in the right place; return the files.

    The files are ``<slide id>.tissue.geojson`` and ``<slide id>.tiles.geojson``, the id percent-encoded as in the
    store. A flagged tile has the class ``Tile: <flag>``. A slide without a tissue mask, or without the frame of its
    tiles, as imported ones may be, has no such file.

    Args:
        store: an open store or its folder.
        folder: where the files go; made if absent.
        entry: the features entry whose flags are written; by default each slide's first one.
        progress: told (slides done, slides in all).

    Raises:
        ConfigError: ``folder`` is a file.
        EntryNotFoundError: the store has no such entry.
        StoreError: slides of the store are damaged; the files of all others are written first.
    """
    folder = Path(folder)
    store = store if isinstance(store, Store) else open_store(store)
    entries = _entries(store, entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"got {folder} for GeoJSON files → expected a folder → choose another one") from error
    written, damaged = [], {}
    slide_ids = store.slide_ids()
    for done, slide_id in enumerate(slide_ids, start=1):
        try:
            documents = dict(_outlines(store[slide_id], entries))
        except _DAMAGES as error:
            documents, damaged[slide_id] = {}, error
        for kind, document in documents.items():
            file = folder / f"{encode_id(slide_id)}.{kind}.geojson"
            write_atomically(file, json.dumps(document, separators=(",", ":")).encode())
            written.append(file)
        if progress is not None:
            progress(done, len(slide_ids))
    if damaged:
        raise StoreError(
            f"got {len(damaged)} damaged slides, {listed(damaged)} (the first: {next(iter(damaged.values()))}) → the "
            f"{len(written)} files of the others are written → extract these slides again"
        )
    return written


def _outlines(slide: SlideReader, entries: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The GeoJSON documents of a slide, those that its unit has the data for."""
    from extract.slides.masks import tiles_geojson, tissue_geojson

    record = slide.record
    if "bounds_l0" not in record:
        return
    bounds_l0 = tuple(record["bounds_l0"])
    mask = _mask(slide)
    if mask is not None:
        yield "tissue", tissue_geojson(mask, bounds_l0)
    if "tile_l0" in record:
        coords = slide.coords()
        _, features = _features(slide, entries)
        flags = None if features is None else _flags(features, len(coords))
        yield "tiles", tiles_geojson(coords, record["tile_l0"], bounds_l0, flags)


# ---------------------------------------------------------------------------------------------- reading


def _entries(store: Store, entry: str | None) -> list[str]:
    """Entries in which a slide's flags are looked up; views and surroundings of the tiles come last."""
    if entry is not None:
        store.feature_recipe(entry)
        return [entry]
    return sorted(store.entries(), key=lambda name: ("@" in name, name))


def _features(slide: SlideReader, entries: Sequence[str]) -> tuple[str, Mapping[str, Any] | None]:
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


def _mask(slide: SlideReader) -> np.ndarray | None:
    """The tissue mask bool [h, w], or None where the unit holds none."""
    try:
        return slide.tissue_mask
    except StoreError:
        return None


def _flags(features: Mapping[str, Any], n_tiles: int) -> dict[str, np.ndarray]:
    """For each name of `FLAGS` bool [n_tiles]."""
    rows = {"invalid": features["invalid_rows"], **features.get("flagged_rows", {})}
    flags = {name: np.zeros(n_tiles, dtype=bool) for name in FLAGS}
    for name, flag in flags.items():
        flag[list(rows.get(name, []))] = True
    return flags


def _read_logs(folder: Path) -> dict[str, _Logged]:
    """Each slide's latest outcome in the logs of all runs; a slide left to another process has none there."""
    latest: dict[str, _Logged] = {}
    # a log's name begins with the time at which its run started
    for file in sorted(folder.glob("*.jsonl")):
        # at a URL there is no open file
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                noted = json.loads(line)
                slide_id, outcome = str(noted["slide_id"]), str(noted["outcome"])
            except (ValueError, LookupError, TypeError):
                # the last line of a killed run
                continue
            if outcome == "elsewhere":
                continue
            # a slide that was complete before was not read, so its reader is in an earlier line
            reader = noted.get("reader") or latest.get(slide_id, _Logged()).reader
            reason, path = (str(noted.get(key, "")) for key in ("reason", "path"))
            latest[slide_id] = _Logged(outcome, reason, path, _started(file), str(reader))
    return latest


def _started(log: Path) -> str:
    """When a run started, from its log's name ``<started>-<host>-<pid>``."""
    day, _, clock = log.stem.split("-")[0].partition("T")
    return f"{day[:4]}-{day[4:6]}-{day[6:]} {clock[:2]}:{clock[2:4]} UTC" if len(day + clock) == 14 else log.stem


# ---------------------------------------------------------------------------------------------- cards


def _make_card(
    store: Store, slide_id: str, entries: Sequence[str], log: _Logged, spool: IO[bytes], in_store: bool
) -> _Card:
    """Everything of one slide; its pictures go to the spool."""
    card = _Card(slide_id)
    if log.outcome == "failed":
        card.looks["failed"] = f"failed in the run of {log.run}: {log.reason}"
    if in_store:
        try:
            pictures = _fill_card(card, store[slide_id], entries, log)
        except _DAMAGES as error:
            card.looks["damaged"] = _damage_text(error)
        else:
            card.spans = tuple(_spool(spool, picture) for picture in pictures)
    if log.outcome == "failed" and log.path:
        card.facts.append(("File", log.path))
    card.looks = {kind: card.looks[kind] for kind in LOOKS if kind in card.looks}
    return card


def _fill_card(card: _Card, slide: SlideReader, entries: Sequence[str], log: _Logged) -> tuple[bytes, ...]:
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


def _add_flags(card: _Card, slide: SlideReader, entries: Sequence[str]) -> dict[str, np.ndarray]:
    """Note what the features' record says of the tiles; returns their flags, none where there are no features."""
    try:
        entry, features = _features(slide, entries)
    except _DAMAGES as error:
        card.looks["damaged"] = _damage_text(error)
        return {}
    if features is None:
        if entries:
            card.looks["bare"] = f"no features in {', '.join(entries)}"
        return {}
    flags = _flags(features, card.n_tiles or 0)
    _look_at_flags(card, flags)
    card.facts += [("Flags", _flags_text(card.counts, features)), ("Features", _execution_text(entry, features))]
    return flags


def _look_at_tiles(card: _Card, tissue: Mapping[str, Any], n_unreadable_px: int) -> None:
    """What the tiles unit alone gives reason to look at."""
    fraction, (low, high) = tissue.get("fraction"), TISSUE_RANGE
    if card.n_tiles is not None and card.n_tiles < FEW_TILES:
        card.looks["few"] = f"only {card.n_tiles} tile{'s' * (card.n_tiles != 1)}"
    # without a method everything is tissue, as was asked for
    if fraction is not None and tissue.get("method") != "none":
        covers = f"tissue covers {_percent(fraction)} of the slide"
        card.looks |= {"little": covers} if fraction < low else {"full": covers} if fraction > high else {}
    if card.mpp_source not in ("", FROM_FILE):
        card.looks["scale"] = "no µm/px known" if card.mpp_source == "missing" else f"µm/px from {card.mpp_source}"
    if n_unreadable_px:
        card.looks["unreadable"] = f"{n_unreadable_px} px of the thumbnail cannot be read"


def _look_at_flags(card: _Card, flags: Mapping[str, np.ndarray]) -> None:
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
    return picture, slide_picture.encode_overlay(picture.size, _mask(slide), boxes, flags)


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
    area = "area unknown" if math.isnan(area_mm2) else f"{_area(area_mm2)} mm²"
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


def _flags_text(counts: Mapping[str, int], features: Mapping[str, Any] | None = None) -> str:
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


def _area(area_mm2: float) -> str:
    return f"{area_mm2:.3g}" if area_mm2 < 100 else f"{area_mm2:,.0f}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction < 0.1 else f"{100 * fraction:.0f} %"


# ---------------------------------------------------------------------------------------------- the page


def _view(store: Store, cards: Sequence[_Card]) -> dict[str, Any]:
    """All that the template shows."""
    looks = Counter(kind for card in cards for kind in card.looks)
    return {
        "name": store.path.name,
        "cards": cards,
        "failed": [(at, card) for at, card in enumerate(cards) if "failed" in card.looks],
        "n_look": sum(bool(card.looks) for card in cards),
        "looks": [(kind, text, looks[kind]) for kind, text in LOOKS.items() if looks[kind]],
        "facts": _summary(store, cards),
        "n_synthetic": sum(card.synthetic for card in cards),
        "colours": slide_picture.COLOURS,
        "flags": FLAGS,
    }


def _summary(store: Store, cards: Sequence[_Card]) -> list[tuple[str, str]]:
    in_store = [card for card in cards if card.n_tiles is not None]
    areas = [card.area_mm2 for card in in_store if not math.isnan(card.area_mm2)]
    unknown = len(in_store) - len(areas)
    flags = Counter[str]()
    for card in cards:
        flags.update(card.counts)
    sources = Counter(card.mpp_source or "not recorded" for card in in_store)
    n_failed = sum("failed" in card.looks for card in cards)
    return [
        ("Slides", f"{len(cards):,}"),
        ("Failed", f"{n_failed}" if n_failed else "none"),
        ("Deserve a look", f"{sum(bool(card.looks) for card in cards)}"),
        ("Tiles", f"{sum(card.n_tiles or 0 for card in cards):,}"),
        ("Tissue", f"{_area(sum(areas))} mm²" + (f" (unknown for {unknown})" if unknown else "") if areas else MISSING),
        ("Tiles are", tiles_text(store.tile_recipe)),
        ("µm/px from", ", ".join(f"{source}: {n}" for source, n in sources.most_common()) or MISSING),
        ("Flagged tiles", _flags_text(flags)),
        ("Features", ", ".join(store.entries()) or "none yet: tiles only"),
    ]


def _data_uri(spool: IO[bytes], span: tuple[int, int], kind: str) -> str:
    spool.seek(span[0])
    return f"data:image/{kind};base64,{base64.b64encode(spool.read(span[1])).decode()}"


def _write_stream(path: Path, pieces: Iterator[str]) -> None:
    """Write piece by piece beside ``path``, then rename: it is never seen half written, nor held in memory."""
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            # a file name that is not UTF-8 reaches us with lone surrogates, which no HTML file can hold
            file.writelines(piece.encode("utf-8", "backslashreplace") for piece in pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
