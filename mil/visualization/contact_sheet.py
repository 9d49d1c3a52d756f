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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any
from uuid import uuid4

from extract.store import Store, open_store
from extract.store.core.recipes import tiles_text
from extract.store.core.remote_path import StorePath
from mil.errors import ConfigError
from mil.visualization import slide_picture
from mil.visualization.html_page import load_template
from mil.visualization.plotting import MISSING
from mil.visualization.slide_card import (
    COMMON,
    COMMON_LEAST,
    COMMON_SHARE,
    LOOKS,
    LoggedSlide,
    Progress,
    SlideCard,
    area_text,
    entries_shown,
    flags_text,
    make_card,
)
from mil.visualization.slide_picture import FLAGS


def write_contact_sheet(
    store: Store | str | StorePath, path: str | Path, entry: str | None = None, progress: Progress | None = None
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
    entries = entries_shown(store, entry)
    logged = _read_logs(store.path / "runs")
    failed = {slide_id for slide_id, log in logged.items() if log.outcome == "failed"}
    in_store = set(store.slide_ids())
    slide_ids = sorted(in_store | failed)
    with TemporaryFile() as spool:
        cards = []
        for done, slide_id in enumerate(slide_ids, start=1):
            log = logged.get(slide_id, LoggedSlide())
            cards.append(make_card(store, slide_id, entries, log, spool, slide_id in in_store))
            if progress is not None:
                progress(done, len(slide_ids))
        _write_stream(
            path, template.generate(uri=lambda span, kind: _data_uri(spool, span, kind), **_view(store, cards))
        )
    return path


def _read_logs(folder: StorePath) -> dict[str, LoggedSlide]:
    """Each slide's latest outcome in the logs of all runs; a slide left to another process has none there."""
    latest: dict[str, LoggedSlide] = {}
    # a log's name begins with the time at which its run started
    logs: Iterable[StorePath] = folder.glob("*.jsonl")
    for file in sorted(logs, key=lambda each: each.name):
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
            reader = noted.get("reader") or latest.get(slide_id, LoggedSlide()).reader
            reason, path = (str(noted.get(key, "")) for key in ("reason", "path"))
            latest[slide_id] = LoggedSlide(outcome, reason, path, _started(file), str(reader))
    return latest


def _started(log: StorePath) -> str:
    """When a run started, from its log's name ``<started>-<host>-<pid>``."""
    day, _, clock = log.stem.split("-")[0].partition("T")
    return f"{day[:4]}-{day[4:6]}-{day[6:]} {clock[:2]}:{clock[2:4]} UTC" if len(day + clock) == 14 else log.stem


def _view(store: Store, cards: Sequence[SlideCard]) -> dict[str, Any]:
    """All that the template shows."""
    common = _take_common(cards)
    looks = Counter(kind for card in cards for kind in card.looks)
    return {
        "common": common,
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


def _take_common(cards: Sequence[SlideCard]) -> list[str]:
    """What most slides have in common, in words; from then on it is no reason to look at one of them."""
    texts = []
    for kind, advice in COMMON.items():
        n = sum(kind in card.looks for card in cards)
        if n >= COMMON_LEAST and n > COMMON_SHARE * len(cards):
            for card in cards:
                card.looks.pop(kind, None)
            texts.append(f"{n} of {len(cards)} slides: {LOOKS[kind]}. {advice[0].upper()}{advice[1:]}.")
    return texts


def _summary(store: Store, cards: Sequence[SlideCard]) -> list[tuple[str, str]]:
    in_store = [card for card in cards if card.n_tiles is not None]
    areas = [card.area_mm2 for card in in_store if not math.isnan(card.area_mm2)]
    unknown = len(in_store) - len(areas)
    unmeasured = f" (unknown for {unknown})" if unknown else ""
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
        ("Tissue", f"{area_text(sum(areas))} mm²{unmeasured}" if areas else MISSING),
        ("Tiles are", tiles_text(store.tile_recipe)),
        ("µm/px from", ", ".join(f"{source}: {n}" for source, n in sources.most_common()) or MISSING),
        ("Flagged tiles", flags_text(flags)),
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
