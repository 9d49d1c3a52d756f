"""Some rows of a matrix: what may be asked for, and reading only those."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from extract.errors import StoreError

Rows = slice | Sequence[int] | npt.NDArray[Any]
"""A slice, row numbers in any order, or one bool per row."""


def row_index(rows: Rows, n: int, what: str) -> slice | npt.NDArray[np.int64]:
    """Rows as a slice or as row numbers 0 to n - 1.

    Args:
        rows: a slice, numbers (negative ones count from the end), or bool [n].
        n: rows there are.
        what: whose rows, for the message.

    Raises:
        StoreError: a row that is not there, or something that names no rows.
    """
    if isinstance(rows, slice):
        return rows
    index = np.asarray(rows)
    if index.dtype == bool and index.shape == (n,):
        return np.flatnonzero(index)
    if index.size == 0 and index.ndim == 1:
        return np.empty(0, dtype=np.int64)
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise StoreError(
            f"got rows of shape {index.shape} and type {index.dtype} of {what} → expected a slice, a list of row "
            f"numbers, or {n} bools → correct them"
        )
    if index.min() < -n or index.max() >= n:
        raise StoreError(
            f"got rows {index.min()} to {index.max()} of {what} → expected numbers below {n}, its rows → correct them"
        )
    return index.astype(np.int64) % n


def take_rows(array: Any, shape: Sequence[int], rows: slice | npt.NDArray[np.int64] | None) -> np.ndarray:
    """Rows of an array that is not in memory, such as one of zarr-python or h5py; no others are read.

    Args:
        array: takes increasing row numbers as its index.
        shape: [n, ...].
        rows: what `row_index` returned; None for all.
    """
    if rows is None:
        return np.asarray(array[...])
    increasing, place = np.unique(np.arange(shape[0])[rows], return_inverse=True)
    return np.asarray(array[increasing])[place]
