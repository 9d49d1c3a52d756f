"""Whether everything is there already, told without loading a backbone, which takes longer than looking.

A run that has checked that its settings are those of the entries notes both in the store, in ``runs/settings.json``:
a hash of the settings, and the fingerprint of each entry's recipe. Whoever comes with the same settings, and finds the
entries unchanged and every slide complete, need not load what they were computed with. Anything else is left to a run.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from extract.errors import ExtractError
from extract.folders import NotTaken
from extract.pipeline.config import ExtractionConfig
from extract.pipeline.jobs import StreamStats
from extract.pipeline.report import ExtractionReport, Progress, SlideOutcome
from extract.slides.finding.source import SlideSource
from extract.store import Store, difference, find_format, open_store, to_dict
from extract.store.core.files import replace_json
from extract.store.core.fingerprint import SlideFingerprint, fingerprint
from extract.store.core.remote_path import RemotePath, StorePath, store_path
from extract.tiling.sameness import check_same

_NAME = "settings.json"
_MOST = 32


def remember(store: Store, config: ExtractionConfig, entries: Sequence[str]) -> None:
    """Note that these settings are those of these entries; where it cannot be written, nothing is lost but time."""
    key = _settings(config)
    if key is None or isinstance(store.path, RemotePath):
        return
    noted = dict(list(_read(store).items())[-_MOST:])
    line = {entry: fingerprint(store.feature_recipe(entry)) for entry in entries}
    if noted.get(key) != line:
        try:
            replace_json(store.path / "runs" / _NAME, {**noted, key: line})
        except OSError:
            return


def find_complete(path: str | StorePath, config: ExtractionConfig, progress: Progress) -> ExtractionReport | None:
    """The report of a run that has nothing to do; None where a run must look itself.

    Raises:
        SlideTableError: as a run would.
    """
    began, key, at = time.monotonic(), _settings(config), store_path(path)
    if key is None or isinstance(at, RemotePath) or find_format(at) is None or config.reading.redo:
        return None
    try:
        store = open_store(at)
        entries = _read(store).get(key) or {}
        known = entries and all(fingerprint(store.feature_recipe(name)) == recipe for name, recipe in entries.items())
        if not known or difference(store.tile_recipe, config.recipe):
            return None
    except (ExtractError, OSError, LookupError, TypeError, ValueError):
        return None
    not_taken = NotTaken()
    sources, outcomes = config.slides.find(not_taken), []
    for source in sources:
        try:
            outcome = _complete(store, source, list(entries), config.reading.default_mpp)
        except (ExtractError, OSError, LookupError, TypeError, ValueError):
            return None
        if outcome is None:
            return None
        outcomes.append(outcome)
    progress.start(len(sources))
    for each in outcomes:
        progress.slide_done(each)
    log = store.path / "runs" / _NAME
    seconds = time.monotonic() - began
    return ExtractionReport(
        store.path, next(iter(entries)), tuple(entries), tuple(outcomes), StreamStats(), seconds, log, not_taken
    )


def _complete(
    store: Store, source: SlideSource, entries: Sequence[str], default_mpp: float | None
) -> SlideOutcome | None:
    """A slide that is the one that was cut, and has all of its embeddings; None for any other."""
    slide_id = source.slide_id
    if slide_id not in store or not all(store.has_features(slide_id, entry) for entry in entries):
        return None
    tiles = store[slide_id]
    check_same(source, tiles.record, default_mpp)
    records = [tiles.feature_record(entry) for entry in entries]
    if any(record["invalid_rows"] for record in records):
        # they are tried again
        return None
    n_tiles, mpp = int(records[0]["n_tiles"]), dict(tiles.record["mpp"])
    return SlideOutcome(slide_id, str(source.path), "complete", n_tiles=n_tiles, mpp=mpp)


def _read(store: Store) -> dict[str, dict[str, str]]:
    try:
        noted = json.loads((store.path / "runs" / _NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    lines = noted.items() if isinstance(noted, dict) else ()
    return {str(key): dict(line) for key, line in lines if isinstance(line, dict)}


def _settings(config: ExtractionConfig) -> str | None:
    """A hash of all that decides what is computed; None where that is not told by names."""
    backbone = config.backbone
    if not all(isinstance(each, str) for each in backbone.backbones):
        return None
    values: dict[str, Any] = {
        "recipe": to_dict(config.recipe),
        "backbones": list(backbone.backbones),
        "pooling": backbone.pooling,
        "dtype": backbone.dtype,
        "mean": None if backbone.mean is None else list(backbone.mean),
        "std": None if backbone.std is None else list(backbone.std),
        "entries": asdict(config.entries),
        "versions": [_version(name) for name in ("tessera-mil", "timm", "torch")],
        "files": [_identity(Path(each)) for each in _local_files(config)],
    }
    try:
        return fingerprint(values)
    except (TypeError, ValueError):
        return None


def _local_files(config: ExtractionConfig) -> list[str]:
    """Weights and models that lie in files of this machine, and may be others by now."""
    named = [str(each).removeprefix("local-dir:") for each in config.backbone.backbones if "local-dir:" in str(each)]
    return [*named, *([] if config.backbone.weights is None else [str(config.backbone.weights)])]


def _identity(path: Path) -> list[Any]:
    """What tells a file, or the files of a folder, from others."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return [[str(each), SlideFingerprint.of(each).sampled_sha256, each.stat().st_mtime_ns] for each in files]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
