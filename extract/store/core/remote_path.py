"""Paths of objects that lie on no disk of this machine: ``s3://``, ``gs://``, ``memory://`` and whatever fsspec opens.

An object appears whole or not at all; there are no folders, and nothing can be renamed.
"""

import errno
import functools
import os
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from extract.errors import ExtractError, StoreError, StoreUnreachableError

_URL = re.compile(r"([a-z][a-z0-9+.:-]+):/+(.*)", re.IGNORECASE | re.DOTALL)
"""A scheme has two letters at least: ``C:/`` is a disk. `pathlib.Path` makes one slash of two; that is taken too."""

_AGES = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
"""What services say of an object that changes when it is written anew; the first that is there is used."""

_PATIENCE: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 3, "read_timeout": 30, "retries": {"total_max_attempts": 2}}}
}
"""Options of a service by its scheme, so that a network that is gone is told within seconds."""


@functools.total_ordering
class RemotePath:
    """The path of an object, or of all objects below a name.

    Names are put together as with any path. What reads or writes goes through fsspec, and asks the service each time.
    It is no `pathlib.Path` and no `os.PathLike`: ``open`` and ``os`` do not take it; see `local_path`.

    Example:
        >>> str(RemotePath("s3://bucket/cohort.zarr") / "tiles")
        's3://bucket/cohort.zarr/tiles'
    """

    __slots__ = ("_pure",)

    def __init__(self, text: str | PurePosixPath) -> None:
        self._pure = PurePosixPath(text)

    def __str__(self) -> str:
        text = str(self._pure)
        # pathlib makes one slash of two
        return text.replace(":/", "://", 1) if self.parts[:1] and self.parts[0].endswith(":") else text

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._pure == other._pure

    def __lt__(self, other: "RemotePath") -> bool:
        return self._pure < other._pure

    def __hash__(self) -> int:
        return hash(self._pure)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self._pure / name)

    @property
    def parts(self) -> tuple[str, ...]:
        """Scheme, bucket and names."""
        return self._pure.parts

    @property
    def name(self) -> str:
        """The last name."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """The last name without its suffix."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """The end of the last name, with its dot; empty where there is none."""
        return self._pure.suffix

    @property
    def parent(self) -> "RemotePath":
        """The path without its last name."""
        return RemotePath(self._pure.parent)

    def with_name(self, name: str) -> "RemotePath":
        """The path with another last name."""
        return RemotePath(self._pure.with_name(name))

    def relative_to(self, other: "RemotePath") -> PurePosixPath:
        """The names that lead here from ``other``.

        Raises:
            ValueError: none do.
        """
        return self._pure.relative_to(other._pure)

    # ---------------------------------------------------------------- what is there

    def info(self) -> Mapping[str, Any] | None:
        """What the service says about it: ``type``, ``size`` and more; None where nothing is.

        Raises:
            StoreUnreachableError: the service does not answer, or does not permit it.
        """
        with _told(self, "read"):
            service, key = self._open()
            try:
                info: Mapping[str, Any] = service.info(key)
                return info
            except FileNotFoundError:
                return None

    def files(self) -> dict[str, Mapping[str, Any]]:
        """All objects below it, by their name relative to it, with what `info` says; one list call per 1,000."""
        with _told(self, "list"):
            service, key = self._open()
            try:
                found = service.find(key, detail=True)
            except FileNotFoundError:
                return {}
            start = len(key.rstrip("/")) + 1
            return {name[start:]: info for name, info in found.items() if len(name) > start}

    def age(self) -> int | None:
        """A number that changes when the object is written anew; None where there is none."""
        info = self.info()
        return None if info is None or info["type"] != "file" else age_of(info)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is an object, or one below it."""
        return self.info() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is an object."""
        info = self.info()
        return info is not None and info["type"] == "file"

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there are objects below it."""
        info = self.info()
        return info is not None and info["type"] == "directory"

    def iterdir(self) -> Generator["RemotePath", None, None]:
        """What lies directly below it."""
        yield from (self / name for name in sorted(self._children()))

    def folders(self) -> list[str]:
        """Sorted names directly below it that have objects below them."""
        return sorted(name for name, kind in self._children().items() if kind == "directory")

    def glob(self, pattern: Any, **_: Any) -> Generator["RemotePath", None, None]:
        """What lies directly below it with a name of this pattern."""
        yield from (each for each in self.iterdir() if fnmatchcase(each.name, str(pattern)))

    def rglob(self, pattern: Any, **_: Any) -> Generator["RemotePath", None, None]:
        """All objects below it with a name of this pattern."""
        yield from (self / name for name in sorted(self.files()) if fnmatchcase(name.rpartition("/")[2], str(pattern)))

    # ---------------------------------------------------------------- reading and writing

    def read_bytes(self) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: there is none.
            StoreUnreachableError: the service does not answer, or does not permit it.
        """
        return self.read_range(None, None)

    def read_range(self, start: int | None, stop: int | None) -> bytes:
        """The bytes from ``start`` up to ``stop``; no others are sent."""
        with _told(self, "read"):
            service, key = self._open()
            return bytes(service.cat_file(key, start=start, end=stop))

    def read_text(self, encoding: str | None = None, errors: str | None = None, *_: Any) -> str:
        """The whole object as text, UTF-8 unless told otherwise."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        """Write the object, in place of one that is there."""
        with _told(self, "write", absent=True):
            service, key = self._open()
            service.pipe_file(key, bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None, *_: Any) -> int:
        """Write the object as text, UTF-8 unless told otherwise."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def create(self, data: bytes) -> None:
        """Write the object unless there is one; in one step where the service can (``If-None-Match``).

        Raises:
            FileExistsError: there is one.
        """
        with _told(self, "write", absent=True):
            service, key = self._open()
            try:
                service.pipe_file(key, data, mode="create")
            except OSError as error:
                # what a service without conditional writes answers
                if error.errno != errno.ENOSYS:
                    raise
                if service.exists(key):
                    raise FileExistsError(str(self)) from error
                service.pipe_file(key, data)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        with _told(self, "write"):
            service, key = self._open()
            try:
                service.rm_file(key)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Make an empty object unless there is one."""
        try:
            self.create(b"")
        except FileExistsError:
            if not exist_ok:
                raise

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""

    def absolute(self) -> "RemotePath":
        """The path itself: a URL says all."""
        return self

    def resolve(self, strict: bool = False) -> "RemotePath":
        """The path itself: there are no links."""
        return self

    def expanduser(self) -> "RemotePath":
        """The path itself: a service has no home folders."""
        return self

    # ---------------------------------------------------------------- within

    def _open(self) -> tuple[Any, str]:
        """The service, and the name that it knows this path by."""
        service = _service(f"{self.parts[0]}//{''.join(self.parts[1:2])}", os.getpid())
        return service, service._strip_protocol(str(self))

    def _children(self) -> dict[str, str]:
        """Name → ``file`` or ``directory`` of what lies directly below."""
        with _told(self, "list"):
            service, key = self._open()
            try:
                found = service.ls(key, detail=True)
            except FileNotFoundError:
                return {}
            names = {str(each["name"]).rstrip("/"): str(each["type"]) for each in found}
            return {name.rpartition("/")[2]: kind for name, kind in names.items() if name != key.rstrip("/")}


StorePath = Path | RemotePath
"""Where a store lies: on a disk of this machine, or not."""


def store_path(text: str | StorePath) -> StorePath:
    """The path of a store: a `RemotePath` for a URL, an ordinary path for all else, ``file://`` included.

    Args:
        text: a path or a URL; also a URL that was made a `pathlib.Path`, which lost one of its slashes.
    """
    if isinstance(text, RemotePath):
        return text
    found = _URL.fullmatch(str(text))
    if found is None:
        return Path(text)
    scheme, rest = found.groups()
    if scheme.lower() in ("file", "local"):
        return Path("/" + unquote(rest))
    return RemotePath(f"{scheme}://{rest}")


def local_path(path: StorePath) -> Path:
    """The path, where only a file of this machine will do.

    Raises:
        StoreError: it lies elsewhere.
    """
    if isinstance(path, Path):
        return path
    raise StoreError(
        f"got {path} where a file of this machine is needed → it lies elsewhere → copy the store to a disk with "
        f"mil store convert {path} <folder> --format zarr, and use that"
    )


def age_of(info: Mapping[str, Any]) -> int:
    """A number that changes when the object of which a service says this is written anew."""
    mark = next((info[name] for name in _AGES if info.get(name) is not None), "")
    return int(sha256(f"{info.get('size')} {mark}".encode()).hexdigest()[:15], 16)


@functools.cache
def _service(root: str, process: int) -> Any:
    """fsspec's file system for a URL; one per process, since its connections do not outlive a fork.

    Raises:
        StoreError: a package is not installed, or nobody knows the scheme.
    """
    scheme = root.partition(":")[0]
    try:
        from fsspec.core import url_to_fs

        # a list that was asked for earlier may be wrong by now
        return url_to_fs(root, use_listings_cache=False, **_PATIENCE.get(scheme, {}))[0]
    except ImportError as error:
        raise StoreError(
            f'got {root} → a package for {scheme}:// is not installed ({error}) → pip install "tessera-mil[remote]" '
            f"for s3://, or what the message names"
        ) from error
    except ValueError as error:
        raise StoreError(
            f"got {root} → nobody knows {scheme}:// ({error}) → expected s3://bucket/name or a folder → correct it"
        ) from error


@contextmanager
def _told(path: RemotePath, what: str, absent: bool = False) -> Iterator[None]:
    """Turn whatever a service raises into our words.

    Args:
        path: what it is about.
        what: ``read``, ``list`` or ``write``.
        absent: whether *not found* can only mean that the bucket is not there.
    """
    try:
        yield
    except (ExtractError, FileExistsError):
        raise
    except FileNotFoundError as error:
        if not absent:
            raise
        raise StoreUnreachableError(
            f"got {path} to {what} → there is no such bucket ({error}) → make it first, or correct the URL"
        ) from error
    # every service has errors of its own, few of which are OSErrors
    except Exception as error:
        denied = isinstance(error, PermissionError) or "redential" in f"{type(error).__name__}{error}"
        raise StoreUnreachableError(
            f"got {path} to {what} → {type(error).__name__}: {error} → expected "
            + (
                f"a login that may {what} it → give its credentials (for s3://, AWS_ACCESS_KEY_ID and the like)"
                if denied
                else "a service that answers → check the network and the URL (for s3://, AWS_ENDPOINT_URL too), then "
                "run the same command again: what is complete is kept"
            )
        ) from error
