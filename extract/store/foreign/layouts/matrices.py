"""Feature matrices of other tools: out of torch files, checked, and in a dtype that the store holds.

Of torch files nothing but tensors is loaded, whatever the file asks for.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from extract.errors import FeatureRangeError, ForeignFileError

_CHECK_ROWS = 4096
_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch.save began a file before version 1.6: its magic number, pickled."""


def clean_features(matrix: Any, slide_id: str) -> np.ndarray:
    """Features as the store holds them: [n, dim], float16 or float32, finite, in this machine's byte order.

    float16 and float32 keep every bit. float64 is rounded to the nearest float32, and refused where a value has none;
    bfloat16 becomes float32, which is exact, since each bfloat16 is the upper half of a float32. Other dtypes are
    refused. A leading axis of length one, [1, n, dim], is dropped.

    Args:
        matrix: array-like.
        slide_id: for the message.

    Raises:
        ForeignFileError: it is no matrix of numbers, or has no rows or columns.
        FeatureRangeError: a value is not finite, or beyond float32.
    """
    array = np.asarray(matrix)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2 or 0 in array.shape:
        raise ForeignFileError(
            f"got features of shape {tuple(array.shape)} in slide {slide_id!r} → expected [tiles, dim] or "
            f"[1, tiles, dim], not empty → slide embeddings and empty bags cannot be imported; leave the file out"
        )
    array = _as_stored_dtype(array, slide_id)
    for start in range(0, len(array), _CHECK_ROWS):
        finite = np.isfinite(array[start : start + _CHECK_ROWS])
        if not finite.all():
            row, column = (int(at) for at in np.argwhere(~finite)[0])
            raise FeatureRangeError(
                f"got {array[start + row, column]} in row {start + row}, column {column} of the features of slide "
                f"{slide_id!r} → expected finite numbers that float32 holds → extract this slide again"
            )
    return array


def _as_stored_dtype(array: np.ndarray, slide_id: str) -> np.ndarray:
    if array.dtype.kind == "f" and array.dtype.itemsize in (2, 4):
        return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if array.dtype == np.float64 or array.dtype.name == "bfloat16":
        # beyond float32 becomes infinite, which the caller refuses
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype=np.float32)
    raise ForeignFileError(
        f"got features of dtype {array.dtype} in slide {slide_id!r} → expected float16, float32, float64 or bfloat16 → "
        f"convert them first"
    )


def check_rows(features: np.ndarray, coords: np.ndarray | None, slide_id: str) -> None:
    """Refuse coordinates that do not go row for row with the features.

    Raises:
        ForeignFileError: their numbers differ.
    """
    if coords is not None and len(coords) != len(features):
        raise ForeignFileError(
            f"got {len(features)} rows of features and {len(coords)} of coordinates in slide {slide_id!r} → expected "
            f"as many → which row belongs to which tile cannot be known; extract this slide again, or leave the "
            f"coordinates behind with --no-coords"
        )


def is_tensor_file(path: Path) -> bool:
    """Whether a file is as torch.save writes it: a zip archive since version 1.6, a marked stream before."""
    with open(path, "rb") as file:
        head = file.read(len(_BEFORE_1_6))
    if head == _BEFORE_1_6:
        return True
    if not head.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") or name == "data.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        # a damaged directory: names that are no text, a version that nobody knows
        return False


def load_tensor(path: Path, slide_id: str) -> np.ndarray:
    """The tensor in a ``.pt`` file; bfloat16 comes as float32, which is exact.

    Raises:
        ForeignFileError: the file is damaged, holds code, or holds no tensor.
    """
    import pickle

    import torch

    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForeignFileError(
            f"got {path} → it holds objects other than tensors, which may run code when they are loaded → save the "
            f"feature tensor of slide {slide_id!r} alone, with torch.save"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ForeignFileError(
            f"got {path} → torch cannot load it ({str(error).splitlines()[0]}) → copy it again or leave it out"
        ) from error
    if isinstance(value, dict) and isinstance(value.get("features"), torch.Tensor):
        value = value["features"]
    if not isinstance(value, torch.Tensor):
        inside = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ForeignFileError(
            f"got {path} → it holds {inside} → expected one tensor of features [tiles, dim] → save the tensor of slide "
            f"{slide_id!r} alone"
        )
    value = value.detach()
    return np.asarray((value.float() if value.dtype == torch.bfloat16 else value).numpy())
