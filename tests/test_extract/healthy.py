"""A store in which every unit has all that extraction records, for tests that damage it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from extract.store import Store, TileRecipe, TilesUnit, create_store
from extract.store.core.fingerprint import sha256_of
from tests.test_extract.small import EXECUTION, feature_recipe, matrix

RECIPE = TileRecipe(mpp=0.5, tile_px=64)
FORMATS = ("zarr", "h5")


def whole_unit(slide_id: str, n: int = 6, seed: int = 0) -> TilesUnit:
    """Tiles of ``n`` places of a grid of 4 columns, with the record that a cut slide has."""
    rng = np.random.default_rng([seed, n])
    place = np.sort(rng.choice(16, n, replace=False))
    coords = np.stack([place % 4, place // 4], axis=1).astype(np.int32) * 64
    mask = np.zeros((20, 24), dtype=bool)
    mask[4:15, 3:20] = True
    record = {
        "size_l0": [260, 300],
        "downsamples": [1.0, 2.0],
        "vendor": "generic-tiff",
        "synthetic": False,
        "slide": {"size_bytes": 1234, "sampled_sha256": "ab" * 32},
        "mpp": {"native": 0.5, "requested": 0.5, "achieved": 0.5, "source": "openslide.mpp"},
        "downsample": 1.0,
        "tile_px": 64,
        "tile_l0": 64.0,
        "grid_tiles": 16,
        "tissue": {"method": "default", "mask_sha256": sha256_of(np.packbits(mask))},
    }
    picture = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
    return TilesUnit(slide_id, coords, rng.random(n, dtype=np.float32), picture, record, mask)


def healthy_store(path: Path, format: str, slides: tuple[str, ...] = ("a", "b", "site 1/c")) -> Store:
    """A store of some slides and two entries, one of them in float32; row 2 of every slide could not be decoded."""
    store = create_store(path, RECIPE, format)
    for entry, dtype in (("tiny", "float16"), ("wide", "float32")):
        store.create_entry(entry, feature_recipe(dtype=dtype))
        for seed, slide_id in enumerate(slides):
            store.write_tiles(whole_unit(slide_id, seed=seed))
            features = matrix(6, seed=seed, dtype=dtype)
            features[2] = 0
            store.write_features(entry, slide_id, features, [2], EXECUTION, {"blurred": [1, 4], "pen": []})
    return store


def unit_files(unit: Path) -> list[Path]:
    """The files of a unit, which may be one."""
    return [unit] if unit.is_file() else sorted(path for path in unit.rglob("*") if path.is_file())


def change_bytes(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of a file in place."""
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(bytes(content))
