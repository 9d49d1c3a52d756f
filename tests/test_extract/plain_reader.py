"""Reads a Zarr store with the standard library and NumPy, as docs/store-format.md says; it knows nothing of Tessera."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def fingerprint(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def read_record(folder: Path) -> dict:
    found = json.loads((folder / "zarr.json").read_bytes())["attributes"]
    if found["tessera_sha256"] != fingerprint(found["tessera"]) or found["tessera"].get("format", 1) != 1:
        raise ValueError(f"the record of {folder} was changed, or is not of format 1")
    return found["tessera"]


def read_array(folder: Path, checksum: str) -> np.ndarray:
    node, content = json.loads((folder / "zarr.json").read_bytes()), (folder / "c/0/0").read_bytes()
    raw = node["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]
    if not raw or hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError(f"{folder} is not one raw chunk, or does not match its checksum")
    return np.frombuffer(content, np.dtype(node["data_type"]).newbyteorder("<")).reshape(node["shape"])


def read_slides(store: Path, entry: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Of each slide: id, embeddings of its valid tiles [n, dim], their corners [n, 2] in level-0 px."""
    read_record(store)
    recipe = read_record(store / "features" / entry)["feature_recipe"]
    for unit in sorted(path.parent for path in (store / "features" / entry).glob("[!~]*/zarr.json")):
        record, tiles = read_record(unit), read_record(store / "tiles" / unit.name)
        if record["tiles_sha256"] == fingerprint(tiles):
            rows = read_array(unit, record["sha256"]).reshape(-1, recipe["dim"])
            coords = read_array(store / "tiles" / unit.name / "coords", tiles["sha256"]["coords"])
            valid = np.setdiff1d(np.arange(record["n_tiles"]), record["invalid_rows"])
            yield record["slide_id"], rows[valid], coords[valid]
