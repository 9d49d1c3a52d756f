"""Tensors that other tools saved with torch. Loads nothing but tensors, whatever the file asks for."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from extract.errors import ForeignFileError


def is_tensor_file(path: Path) -> bool:
    """Whether a file is a zip archive as torch.save writes it since version 1.6."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") or name == "data.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
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
