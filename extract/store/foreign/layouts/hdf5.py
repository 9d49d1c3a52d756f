"""What an HDF5 file of another tool holds, seen without reading its arrays."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from extract.errors import ForeignFileError

_MAX_ITEMS = 64


@dataclass(frozen=True)
class H5Contents:
    """Names, shapes and attributes of an HDF5 file.

    Attributes:
        shapes: shape of each dataset by its path, ``features/resnet50``.
        kinds: NumPy kind of each dataset's dtype: ``f``, ``i``, ``O`` ...
        attributes: by path of the object, ``""`` for the file: its attributes as JSON values.
    """

    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str]
    attributes: Mapping[str, Mapping[str, Any]]

    def of(self, name: str) -> Mapping[str, Any]:
        """Attributes of an object; empty where there are none."""
        return self.attributes.get(name, {})

    def columns(self, name: str) -> int:
        """Columns of a dataset that can be coordinates, [n, k] or [1, n, k]; 0 for what cannot."""
        return self.shapes[name][-1] if self.is_matrix(name) else 0

    def is_matrix(self, name: str) -> bool:
        """Whether a dataset can be features: [n, dim] or [1, n, dim]."""
        shape = self.shapes.get(name, ())
        return len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)


@contextmanager
def open_h5(path: Path) -> Iterator[Any]:
    """Open a file for reading, without locks, so that read-only and network file systems work.

    Raises:
        ForeignFileError: it is no HDF5 file, or breaks while it is read.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise ForeignFileError(
            f"got {path} → it cannot be read as HDF5 ({error}) → it is damaged or no HDF5 file; copy it again or leave "
            f"it out"
        ) from error


@lru_cache(maxsize=4)
def _contents(path: Path, stamp: tuple[int, int]) -> H5Contents:
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, str] = {}
    attributes: dict[str, Mapping[str, Any]] = {}
    with open_h5(path) as file:
        attributes[""] = plain_attributes(file.attrs)

        def visit(name: str, node: Any) -> None:
            attributes[name] = plain_attributes(node.attrs)
            if hasattr(node, "dtype"):
                shapes[name], kinds[name] = tuple(node.shape), node.dtype.kind

        file.visititems(visit)
    return H5Contents(shapes, kinds, attributes)


def contents(path: Path) -> H5Contents:
    """Look into a file.

    Raises:
        ForeignFileError: it cannot be read.
    """
    status = path.stat()
    return _contents(path, (status.st_size, status.st_mtime_ns))


def plain_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as JSON values; long arrays are told by their shape."""
    return {str(name): plain_value(value) for name, value in attributes.items()}


def plain_value(value: Any) -> Any:
    """One value as JSON holds it: what is not finite, or not a plain value, becomes text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    if isinstance(value, np.generic):
        return plain_value(value.item())
    if isinstance(value, np.ndarray):
        return [plain_value(item) for item in value.tolist()] if value.size <= _MAX_ITEMS else f"array {value.shape}"
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def read_dataset(file: Any, name: str, slide_id: str) -> np.ndarray:
    """All of a dataset.

    Raises:
        ForeignFileError: there is none of this name.
    """
    if name not in file or not hasattr(file[name], "dtype"):
        raise ForeignFileError(
            f"got no dataset {name!r} for slide {slide_id!r} → the file holds {sorted(file)} → extract the slide "
            f"again, or leave the file out"
        )
    return np.asarray(file[name][()])


def read_pairs(file: Any, name: str, slide_id: str) -> np.ndarray:
    """All of a dataset of coordinates; a leading axis of length one, [1, n, k], is dropped as it is of features.

    Raises:
        ForeignFileError: there is none of this name.
    """
    pairs = read_dataset(file, name, slide_id)
    return pairs[0] if pairs.ndim == 3 and len(pairs) == 1 else pairs


def number(attributes: Mapping[str, Any], *names: str) -> float | None:
    """The first of some attributes that is a number above 0; tools write the others as text or leave them out."""
    for name in names:
        value = attributes.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return float(value)
    return None
