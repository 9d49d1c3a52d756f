"""Files that a reader sees whole or not at all: partials, syncs, renames, and a full disk told plainly."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from extract.errors import StoreFullError


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a part."""
    partial = partial_path(path)
    try:
        write_json(partial, value)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def commit(final: Path, build: Callable[[Path], None], needed_bytes: int) -> None:
    """Build a unit beside its final path and rename it into place; whoever comes second changes nothing."""
    if final.exists():
        return
    partial = partial_path(final)
    try:
        with clear_when_full(final, needed_bytes):
            partial.mkdir(parents=True)
            build(partial)
            for folder, _, files in os.walk(partial, topdown=False):
                for name in files:
                    sync(Path(folder, name))
                sync(Path(folder))
            try:
                os.rename(partial, final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def discard(unit: Path) -> None:
    """Take a unit out of the store in one step, then delete it."""
    aside = partial_path(unit)
    # another writer may have been first
    with suppress(FileNotFoundError):
        os.rename(unit, aside)
    shutil.rmtree(aside, ignore_errors=True)


def partial_path(final: Path) -> Path:
    """A name beside ``final`` that no slide id is encoded to: encoded ids never begin with ``~``."""
    return final.with_name(f"~{uuid.uuid4().hex}.partial")


def members(folder: Path) -> list[str]:
    """Sorted names of the folders in ``folder``, without what is still being built; empty if it is absent."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith("~") and entry.is_dir())
    except FileNotFoundError:
        return []


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class clear_when_full:
    """Turn 'no space left' into a message that says how much is needed."""

    def __init__(self, path: Path, needed_bytes: int = 0) -> None:
        self._path, self._needed = path, needed_bytes

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return
        folder = next(parent for parent in (self._path, *self._path.parents) if parent.exists())
        free = shutil.disk_usage(folder).free
        raise StoreFullError(
            f"got no space left while writing {self._path.name} ({free / 1e6:.1f} MB free) → this unit needs about "
            f"{self._needed / 1e6:.1f} MB → free some space or move the store, then run the same command "
            f"again: the store is "
            f"valid and finished slides are kept"
        ) from error
