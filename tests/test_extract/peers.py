"""Small writers of other tools' files, each after that tool's published layout and independent of ours."""

import json
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr

GRID_L0 = 512


def matrix(n: int = 12, dim: int = 5, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Features [n, dim]."""
    return np.random.default_rng((n, dim, seed)).normal(size=(n, dim)).astype(dtype)


def corners(n: int = 12, step_l0: int = GRID_L0, seed: int = 0) -> np.ndarray:
    """Corners int64 [n, 2] on a grid, in no particular order."""
    places = np.random.default_rng((n, seed)).permutation(n * n)[:n]
    return np.stack([places % n, places // n], axis=1).astype(np.int64) * step_l0


def write_trident(path: Path, features: np.ndarray, coords: np.ndarray, **changes: Any) -> Path:
    """``<slide>.h5`` of TRIDENT; an attribute that is None is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"patch_size": 256, "patch_size_level0": GRID_L0, "level0_magnification": 40}
    facts |= {"target_magnification": 20, "overlap": 0, "name": path.stem, "savetodir": "job/20x"} | changes
    with h5py.File(path, "w") as file:
        # one row a chunk, as TRIDENT's files have it
        file.create_dataset("features", data=features, chunks=(1, *features.shape[1:]))
        file["features"].attrs["name"] = path.stem
        file.create_dataset("coords", data=coords)
        for key, value in facts.items():
            if value is not None:
                file["coords"].attrs[key] = value
    return path


def write_clam(folder: Path, slide_id: str, features: np.ndarray, coords: np.ndarray) -> None:
    """``h5_files/<slide>.h5`` and ``pt_files/<slide>.pt`` of CLAM."""
    for name in ("h5_files", "pt_files"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "h5_files" / f"{slide_id}.h5", "w") as file:
        file.create_dataset(
            "features", data=features, maxshape=(None, features.shape[1]), chunks=(1, features.shape[1])
        )
        file.create_dataset("coords", data=coords.astype(np.int32), maxshape=(None, 2), chunks=(1, 2))
    torch.save(torch.from_numpy(features), folder / "pt_files" / f"{slide_id}.pt")


def write_stamp(path: Path, features: np.ndarray, coords_um: np.ndarray, version: str = "2.1") -> Path:
    """``<slide>.h5`` of STAMP 2.1, 2.0 or 1; coordinates of version 1 are given in its own pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"extractor": "ctranspath"} if version != "1" else {}
    if version == "2.1":
        facts |= {"stamp_version": "2.1.0", "unit": "um", "tile_size_um": 256.0, "tile_size_px": 224}
        facts |= {"feat_type": "tile", "code_hash": "abcdef"}
    if version == "2.0":
        facts |= {"unit": "um", "tile_size": 256.0}
    with h5py.File(path, "w") as file:
        file["coords"], file["feats"] = coords_um, features
        file.attrs.update(facts)
    return path


def write_slideflow(
    folder: Path, slide_id: str, features: np.ndarray, centres: np.ndarray, config: bool = True
) -> None:
    """``<slide>.pt``, ``<slide>.index.npz`` and ``bags_config.json`` of slideflow."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(features), folder / f"{slide_id}.pt")
    np.savez(folder / f"{slide_id}.index.npz", centres)
    if config:
        extractor = {"class": "slideflow.model.extractors.ctranspath.CTransPathFeatures", "kwargs": {}}
        facts = {"extractor": extractor, "normalizer": None, "num_features": 5, "tile_px": 299, "tile_um": 302}
        (folder / "bags_config.json").write_text(json.dumps(facts))


def write_atlaspatch(path: Path, matrices: dict[str, np.ndarray], coords: np.ndarray) -> Path:
    """``<slide>.h5`` of AtlasPatch, with one matrix per backbone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    read = np.tile(np.array([[512, 512, 0]]), (len(coords), 1))
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "coords", data=np.hstack([coords, read]).astype(np.int32), maxshape=(None, 5), chunks=(8, 5)
        )
        file["passports"] = np.array([b"passport"] * len(coords))
        for name, values in matrices.items():
            file.create_dataset(f"features/{name}", data=values)
        facts = {"patch_size": 256, "patch_size_level0": GRID_L0, "level0_magnification": 40}
        file.attrs.update(facts | {"target_magnification": 20, "overlap": 0, "num_patches": len(coords)})
    return path


def write_wsidata(path: Path, features: np.ndarray, coords: np.ndarray, parquet: Any, shuffle: bool = True) -> Path:
    """``<slide>.zarr`` of wsidata: a table that annotates a layer of squares, given in another order."""
    root = zarr.create_group(path)
    root.attrs["spatialdata_attrs"] = {"version": "0.2", "spatialdata_software_version": "0.7.3"}
    spec = {"width": 256, "height": 256, "mpp": 0.5, "base_downsample": 2.0, "ops_level": 0}
    root.attrs["tile_spec"] = {"tiles": spec}
    facts = {"region": "tiles", "region_key": "library_id", "instance_key": "tile_id", "encoding-type": "anndata"}
    table = root.create_group("tables").create_group("uni_tiles", attributes=facts)
    table.create_array("X", data=features)
    order = np.random.default_rng(1).permutation(len(coords)) if shuffle else np.arange(len(coords))
    table.create_group("obs").create_array("tile_id", data=np.arange(len(coords)))
    folder = path / "shapes" / "tiles"
    folder.mkdir(parents=True)
    squares = [square(int(coords[at, 0]), int(coords[at, 1]), GRID_L0) for at in order]
    parquet.write(folder / "shapes.parquet", {"tile_id": order.tolist(), "geometry": squares})
    return path


def square(x_l0: int, y_l0: int, side: int) -> bytes:
    """A square as well-known binary, as shapely's ``box`` gives it."""
    right, bottom = x_l0 + side, y_l0 + side
    ring = [(right, y_l0), (right, bottom), (x_l0, bottom), (x_l0, y_l0), (right, y_l0)]
    return struct.pack("<BIII", 1, 3, 1, len(ring)) + b"".join(struct.pack("<dd", *point) for point in ring)
