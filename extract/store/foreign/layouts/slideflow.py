"""slideflow: ``<slide>.pt`` with the features, ``<slide>.index.npz`` with the centres of the tiles.

    <slide>.pt            float32 tensor [n, dim]
    <slide>.index.npz     arr_0: [n, 2], centres of the tiles in level-0 px, rounded down
    bags_config.json      extractor, tile_px, tile_um

A tile is ``int(tile_um / mpp)`` level-0 px wide, so the corner needs the slide's mpp, or the side itself.
Reference: Dolezal et al., 2024, BMC Bioinformatics 25:134.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from extract.errors import ForeignFileError
from extract.store.foreign.layouts.base import NO, SURE, Answers, CutFacts, ForeignBag, ForeignFile, ForeignLayout
from extract.store.foreign.layouts.frames import Frame, corners_l0
from extract.store.foreign.layouts.hdf5 import number, plain_value
from extract.store.foreign.layouts.matrices import check_rows, clean_features, load_tensor

INDEX_SUFFIX = ".index.npz"
_CONFIG = "bags_config.json"


class Slideflow(ForeignLayout):
    """A folder of bags as slideflow exports them."""

    name = "slideflow"
    kind = "pt"

    def fits(self, file: ForeignFile) -> int:
        """Sure when an index lies beside the tensor, or slideflow's configuration in its folder."""
        return SURE if _index_path(file.path).is_file() or (file.path.parent / _CONFIG).is_file() else NO

    def read(self, file: ForeignFile, slide_id: str, answers: Answers) -> ForeignBag:
        """Centres become corners by half of the tile's side."""
        features = clean_features(load_tensor(file.path, slide_id), slide_id)
        config = _config(file.path.parent)
        mpp, tile_um = answers.mpp_of(slide_id), number(config, "tile_um")
        tile_l0: float | None = answers.tile_l0
        if tile_l0 is None and tile_um is not None and mpp is not None:
            tile_l0 = float(int(tile_um / mpp))
        corners, index = None, _index_path(file.path)
        if index.is_file() and not answers.without_coords:
            centres = _read_index(index, slide_id)
            check_rows(features, centres, slide_id)
            corners = corners_l0(centres, Frame("px", "centre", tile_l0=tile_l0).completed(answers, slide_id), slide_id)
        tile_px = number(config, "tile_px")
        cut = CutFacts(int(tile_px or 0), 0, tile_um / tile_px if tile_um and tile_px else None)
        return ForeignBag(slide_id, features, corners, cut, tile_l0, mpp, _extractor(config), plain_value(config))


def _index_path(tensor: Path) -> Path:
    return tensor.with_name(tensor.name.removesuffix(tensor.suffix) + INDEX_SUFFIX)


def _read_index(path: Path, slide_id: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return np.asarray(archive["arr_0"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ForeignFileError(
            f"got {path} → it is no index of slide {slide_id!r} ({error}) → expected an array arr_0 [tiles, 2] of tile "
            f"centres → export the bags again, or leave the coordinates behind with --no-coords"
        ) from error


def _config(folder: Path) -> Mapping[str, Any]:
    """slideflow's account of the bags in a folder; empty where there is none."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ForeignFileError(f"got {folder / _CONFIG} → it is not JSON ({error}) → copy it again") from error
    return config if isinstance(config, dict) else {}


def _extractor(config: Mapping[str, Any]) -> str | None:
    """Last part of the extractor's class."""
    extractor = config.get("extractor")
    name = extractor.get("class") if isinstance(extractor, dict) else extractor
    return name.rsplit(".", 1)[-1] if isinstance(name, str) and name else None
