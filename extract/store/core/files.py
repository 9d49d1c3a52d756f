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

from extract.errors import StoreError, StoreFullError
from extract.store.core.remote_path import RemotePath, StorePath, local_path

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
"""What file systems without hard links answer."""


def write_json(path: StorePath, value: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write a JSON file that nobody reads before it is whole."""
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")


def replace_json(path: StorePath, value: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a part."""
    if isinstance(path, RemotePath):
        # an object is replaced whole
        path.write_text(json.dumps(value, indent=indent))
        return
    partial = partial_path(path)
    try:
        write_json(partial, value, indent)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def commit(final: Path, build: Callable[[Path], None], needed_bytes: int) -> None:
    """Build a unit, a folder or a file, beside its final path and move it into place; the second changes nothing."""
    if final.exists():
        return
    partial = partial_path(final)
    try:
        with clear_when_full(final, needed_bytes):
            final.parent.mkdir(parents=True, exist_ok=True)
            build(partial)
            for folder, _, files in os.walk(partial, topdown=False):
                for name in files:
                    sync(Path(folder, name))
                sync(Path(folder))
            if partial.is_dir():
                _place_folder(partial, final)
            else:
                sync(partial)
                _place_file(partial, final)
            sync(final.parent)
    finally:
        remove(partial)


def _place_folder(partial: Path, final: Path) -> None:
    try:
        os.rename(partial, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _place_file(partial: Path, final: Path) -> None:
    """Give a file its final name, unless there is one: a rename would replace it, a hard link does not."""
    try:
        os.link(partial, final)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # the later of two writers at the same moment wins here; their units are equal, and whole
        os.rename(partial, final)


def remove(path: Path) -> None:
    """Delete a folder or a file as far as possible."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def discard(unit: Path, meant: tuple[int, int] | None = None) -> None:
    """Take a unit out of the store in one step, then delete it.

    Args:
        unit: its path.
        meant: `identity` of the unit that is meant; what another writer has put in its place since goes back.
    """
    aside = partial_path(unit)
    # another writer may have been first
    with suppress(FileNotFoundError):
        os.rename(unit, aside)
        if meant is not None and identity(aside) != meant:
            (_place_folder if aside.is_dir() else _place_file)(aside, unit)
    remove(aside)


def identity(unit: Path) -> tuple[int, int]:
    """What tells a unit from another one at the same path; the number of a removed file may be given again."""
    stat = unit.stat()
    return stat.st_ino, stat.st_mtime_ns


def partial_path(final: Path) -> Path:
    """A name beside ``final`` that no slide id is encoded to: encoded ids never begin with ``~``."""
    return final.with_name(f"~{uuid.uuid4().hex}.partial")


def members(folder: StorePath) -> list[str]:
    """Sorted names of the folders in ``folder``, without what is still being built; empty if it is absent."""
    if isinstance(folder, RemotePath):
        return [name for name in folder.folders() if not name.startswith("~")]
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith("~") and entry.is_dir())
    except FileNotFoundError:
        return []


def disk_bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder; 0 for what is not there."""
    try:
        if not path.is_dir():
            return path.stat().st_size
    except OSError:
        return 0
    return _folder_bytes(os.fspath(path))


def _folder_bytes(folder: str) -> int:
    total = 0
    # removed meanwhile, or not to be read: its size is unknown
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += _folder_bytes(entry.path)
                continue
            with suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def make_folder(path: StorePath) -> None:
    """Make the folder of a store.

    Raises:
        StoreError: something else is in the way, or it is not permitted.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise StoreError(
            f"got {path} as store → it cannot be made ({error.strerror}) → choose another --store"
        ) from error


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class clear_when_full:
    """Turn 'no space left' into a message that says how much is needed; and 'not permitted' into one of ours."""

    def __init__(self, path: StorePath, needed_bytes: int = 0) -> None:
        self._path, self._needed = path, needed_bytes

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StoreError(
                f"got {self._path} as a place to write → it may only be read ({error.strerror}) → change its "
                f"permissions or how its disk is mounted, or choose another --store"
            ) from error
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return
        path = local_path(self._path)
        folder = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(folder).free
        raise StoreFullError(
            f"got no space left while writing {self._path.name} ({free / 1e6:.1f} MB free) → this unit needs about "
            f"{self._needed / 1e6:.1f} MB → free some space or move the store, then run the same command "
            f"again: the store is "
            f"valid and finished slides are kept"
        ) from error
