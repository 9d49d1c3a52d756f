"""The store beside the other ways to keep embeddings: whole bags, random rows, writing, listing, checksums.

    python -m benchmarks.bench_store                        # about 5 minutes and 3 GB of disk

Every layout holds the same slides and all are read in one run, taking turns. *Whole bag* opens a slide and copies its
matrix into memory of its own; its limit is a copy of the same bytes from memory to memory into a fresh allocation.
*Rows* opens a slide and takes 1,024 random rows. *Warm*: the file is in the page cache. *Cold*: its pages were dropped
before, by ``posix_fadvise(POSIX_FADV_DONTNEED)`` on each synced file; a disk's or a host's own cache is not reached.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import torch
import zarr
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks.machine import Result, print_results, write_results
from extract.store import (
    Execution,
    FeatureRecipe,
    Store,
    TileRecipe,
    TilesUnit,
    TransformRecipe,
    create_store,
    open_store,
)
from extract.store.core.fingerprint import sha256_of

ENTRY = "bench"
PICTURE = np.zeros((64, 64, 3), dtype=np.uint8)
RECORD = {
    "slide": {"size_bytes": 1, "head_sha256": "0", "middle_sha256": "0", "tail_sha256": "0"},
    "mpp": {"native": 0.5, "requested": 0.5, "achieved": 0.5, "source": "file"},
    "size_l0": [1 << 20, 1 << 20],
    "level": 0,
    "downsample": 1.0,
    "tile_px": 224,
    "tile_level": 224.0,
    "tile_l0": 224.0,
}


@dataclass(frozen=True)
class Layout:
    """One way to keep a slide's matrix.

    Attributes:
        name: as it stands in the table.
        write: stores a matrix under a slide's number.
        whole: a slide's matrix, in memory of its own.
        rows: some rows of it, in ascending order.
        files: the files that hold a slide's matrix.
        view: a slide's matrix as it lies in the file, where that is possible.
    """

    name: str
    write: Callable[[int, np.ndarray], object]
    whole: Callable[[int], np.ndarray]
    rows: Callable[[int, np.ndarray], np.ndarray]
    files: Callable[[int], list[Path]]
    view: Callable[[int], np.ndarray] | None = None


def store_layout(folder: Path, kind: str, dim: int, dtype: str) -> Layout:
    """A store of ours, in one of its formats."""
    store = create_store(folder, TileRecipe(), format=kind)
    store.create_entry(ENTRY, feature_recipe(dim, dtype))

    def write(slide: int, matrix: np.ndarray) -> None:
        write_slide(store, f"slide-{slide}", matrix)

    def files(slide: int) -> list[Path]:
        unit = store.feature_path(f"slide-{slide}", ENTRY)
        return [path for path in unit.rglob("*") if path.is_file()] if unit.is_dir() else [unit]

    # each read opens the slide anew, as a training run's first epoch does
    return Layout(
        f"tessera, {kind}",
        write,
        lambda slide: np.array(open_store(folder)[f"slide-{slide}"].features(ENTRY)),
        lambda slide, rows: np.array(open_store(folder)[f"slide-{slide}"].features(ENTRY)[rows]),
        files,
        lambda slide: open_store(folder)[f"slide-{slide}"].features(ENTRY),
    )


def feature_recipe(dim: int, dtype: str) -> FeatureRecipe:
    """A recipe of random features."""
    transform = TransformRecipe(224, "bicubic", (0.0,) * 3, (1.0,) * 3)
    return FeatureRecipe("bench", "bench", "1", "0" * 64, "model", transform, dim, dtype)


def write_slide(store: Store, slide_id: str, matrix: np.ndarray) -> None:
    """A slide's tiles and embeddings, committed."""
    n = len(matrix)
    coords = np.stack([np.arange(n) % 1000, np.arange(n) // 1000], axis=1).astype(np.int32) * 224
    store.write_tiles(TilesUnit(slide_id, coords, np.ones(n, dtype=np.float32), PICTURE, RECORD))
    store.write_features(ENTRY, slide_id, matrix, [], Execution("fp32", "bench", "cpu", 32, {}))


def torch_layout(folder: Path) -> Layout:
    """``torch.save``, as CLAM keeps bags."""

    def path(slide: int) -> Path:
        return folder / f"{slide}.pt"

    def load(slide: int) -> np.ndarray:
        matrix: np.ndarray = torch.load(path(slide), weights_only=True).numpy()
        return matrix

    return Layout(
        "torch .pt",
        lambda slide, matrix: torch.save(torch.from_numpy(matrix), path(slide)),
        load,
        lambda slide, rows: load(slide)[rows],
        lambda slide: [path(slide)],
    )


def safetensors_layout(folder: Path) -> Layout:
    """One safetensors file a slide."""

    def path(slide: int) -> Path:
        return folder / f"{slide}.safetensors"

    def load(slide: int) -> np.ndarray:
        with safe_open(path(slide), "np") as file:
            matrix: np.ndarray = file.get_tensor("features")
            return matrix

    return Layout(
        "safetensors",
        lambda slide, matrix: save_file({"features": matrix}, path(slide)),
        load,
        lambda slide, rows: load(slide)[rows],
        lambda slide: [path(slide)],
    )


def zarr_layout(folder: Path) -> Layout:
    """zarr-python with its defaults: chunks of its choice, compressed."""

    def path(slide: int) -> Path:
        return folder / f"{slide}.zarr"

    return Layout(
        "Zarr, defaults",
        lambda slide, matrix: zarr.create_array(path(slide), data=matrix),
        lambda slide: np.asarray(zarr.open_array(path(slide), mode="r")[:]),
        lambda slide, rows: np.asarray(zarr.open_array(path(slide), mode="r").oindex[rows]),
        lambda slide: [each for each in path(slide).rglob("*") if each.is_file()],
    )


def hdf5_layout(folder: Path, name: str, **options: object) -> Layout:
    """One HDF5 file a slide."""

    def path(slide: int) -> Path:
        return folder / f"{slide}.h5"

    def write(slide: int, matrix: np.ndarray) -> None:
        with h5py.File(path(slide), "w") as file:
            file.create_dataset("features", data=matrix, **options)

    def whole(slide: int) -> np.ndarray:
        with h5py.File(path(slide), "r") as file:
            return np.asarray(file["features"][:])

    def rows(slide: int, wanted: np.ndarray) -> np.ndarray:
        with h5py.File(path(slide), "r") as file:
            return np.asarray(file["features"][wanted])

    return Layout(name, write, whole, rows, lambda slide: [path(slide)])


def layouts(folder: Path, dim: int, dtype: str) -> list[Layout]:
    """Ours first; each in a folder of its own."""
    makers: dict[str, Callable[[Path], Layout]] = {
        "ours.zarr": partial(store_layout, kind="zarr", dim=dim, dtype=dtype),
        "ours.h5": partial(store_layout, kind="h5", dim=dim, dtype=dtype),
        "pt": torch_layout,
        "safetensors": safetensors_layout,
        "zarr": zarr_layout,
        "h5": partial(hdf5_layout, name="HDF5, contiguous"),
        "h5-rows": partial(hdf5_layout, name="HDF5, one row a chunk", chunks=(1, dim)),
    }
    made = []
    for name, make in makers.items():
        (folder / name).mkdir()
        made.append(make(folder / name))
    return made


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def drop_from_cache(paths: Sequence[Path]) -> None:
    """Drop the pages of files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure_layouts(options: argparse.Namespace, folder: Path, dtype: str) -> list[Result]:
    """Every layout: write, whole bags and rows, warm and cold, and the ratios that the product promises."""
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal((options.rows, options.dim)).astype(dtype) for _ in range(options.slides)]
    picks = [np.sort(rng.choice(options.rows, options.picked, replace=False)) for _ in matrices]
    each = layouts(folder, options.dim, dtype)
    gigabytes = sum(matrix.nbytes for matrix in matrices) / 1e9
    values: dict[tuple[str, str, str], list[float]] = {}

    def add(layout: str, metric: str, unit: str, value: float) -> None:
        values.setdefault((layout, metric, unit), []).append(value)

    for layout in each:
        spent = seconds(lambda: [layout.write(i, matrix) for i, matrix in enumerate(matrices)])  # noqa: B023
        add(layout.name, "write", "GB/s", gigabytes / spent)
        add(layout.name, "files a slide", "files", len(layout.files(0)))
        size = sum(path.stat().st_size for i in range(len(matrices)) for path in layout.files(i))
        add(layout.name, "size / matrix", "ratio", size / gigabytes / 1e9)
    for _ in range(options.repeats):
        copy_s = sum(seconds(lambda: np.array(matrix)) for matrix in matrices)  # noqa: B023
        add("memory copy", "whole bag, warm", "GB/s", gigabytes / copy_s)
        times = {(layout.name, *key): spent for layout in each for key, spent in read(layout, matrices, picks).items()}
        for (name, what, state), spent in times.items():
            if what == "whole bag":
                add(name, f"whole bag, {state}", "GB/s", gigabytes / spent)
            else:
                add(name, f"{options.picked} rows, {state}", "ms", 1000 * spent / len(matrices))
            by_rows = times["HDF5, one row a chunk", what, state]
            if name.startswith("tessera"):
                add(name, f"{what}, {state} / HDF5, one row a chunk", "ratio", by_rows / spent)
            if name.startswith("tessera") and (what, state) == ("whole bag", "warm"):
                add(name, "whole bag, warm / memory copy", "ratio", copy_s / spent)
        for layout in each:
            if layout.view is not None:
                view_s = sum(seconds(partial(layout.view, i)) for i in range(len(matrices)))
                add(layout.name, "view of the whole bag, nothing copied", "ms", 1000 * view_s / len(matrices))
        by_rows = times["HDF5, one row a chunk", "whole bag", "warm"]
        add("memory copy", "whole bag, warm / HDF5, one row a chunk", "ratio", by_rows / copy_s)
    subject = f"{options.rows} x {options.dim} {dtype}"
    return [Result.of(f"{subject}, {name}", metric, unit, got) for (name, metric, unit), got in values.items()]


def read(layout: Layout, matrices: list[np.ndarray], picks: list[np.ndarray]) -> dict[tuple[str, str], float]:
    """Seconds to read every slide, whole and some rows, warm and cold; what is read is compared."""
    spent = {}
    for state in ("warm", "cold"):
        for what in ("whole bag", "rows"):
            total = 0.0
            for i, (matrix, rows) in enumerate(zip(matrices, picks, strict=True)):
                work = partial(layout.whole, i) if what == "whole bag" else partial(layout.rows, i, rows)
                work() if state == "warm" else drop_from_cache(layout.files(i))
                total += seconds(work)
                if not np.array_equal(work(), matrix if what == "whole bag" else matrix[rows]):
                    raise AssertionError(f"{layout.name} gave other values")
            spent[what, state] = total
    return spent


def measure_checksums(options: argparse.Namespace, folder: Path) -> list[Result]:
    """What checksums cost: their rate alone, and a commit with them beside a plain write that is synced."""
    matrix = np.random.default_rng(0).standard_normal((options.rows, options.dim)).astype("float16")
    gigabytes = matrix.nbytes / 1e9
    store = create_store(folder / "checks.zarr", TileRecipe())
    store.create_entry(ENTRY, feature_recipe(options.dim, "float16"))
    hashes, verifications, commits, plain = [], [], [], []
    for i in range(options.repeats):
        hashes.append(gigabytes / seconds(lambda: sha256_of(matrix)))
        commits.append(gigabytes / seconds(lambda: write_slide(store, f"slide-{i}", matrix)))  # noqa: B023
        plain.append(gigabytes / seconds(lambda: _write_synced(folder / f"{i}.raw", matrix)))  # noqa: B023
        verifications.append(gigabytes / seconds(lambda: store[f"slide-{i}"].verify_features(ENTRY)))  # noqa: B023
    rows = {
        "SHA-256 alone": hashes,
        "verify a slide, warm": verifications,
        "commit: write, sync, read back, checksum twice": commits,
        "plain write and sync of the same bytes": plain,
    }
    return [Result.of("checksums", metric, "GB/s", values) for metric, values in rows.items()]


def _write_synced(path: Path, matrix: np.ndarray) -> None:
    with open(path, "wb") as file:
        file.write(matrix.data.cast("B"))
        os.fsync(file.fileno())


def measure_listing(options: argparse.Namespace, folder: Path) -> list[Result]:
    """Opening and listing stores of ever more slides, with the index and without; they are made without syncing."""
    results = []
    matrix = np.ones((2, 8), dtype=np.float16)
    for count in options.listed:
        path = folder / f"{count}.zarr"
        store = create_store(path, TileRecipe())
        store.create_entry(ENTRY, feature_recipe(8, "float16"))
        with mock.patch("os.fsync"):
            for i in range(count):
                write_slide(store, f"slide-{i}", matrix)
        without = [seconds(lambda: _list(path)) for _ in range(options.repeats)]  # noqa: B023
        store.write_index()
        listed = [seconds(lambda: _list(path)) for _ in range(options.repeats)]  # noqa: B023
        results.append(Result.of(f"{count} slides", "open, list, count rows, no index", "s", without))
        results.append(Result.of(f"{count} slides", "open, list, count rows", "s", listed))
        shutil.rmtree(path)
    return results


def _list(path: Path) -> None:
    store = open_store(path)
    if not sum(store.n_tiles(slide_id, ENTRY) for slide_id in store.slide_ids(ENTRY)):
        raise AssertionError("the store lists nothing")


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure everything and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--slides", type=int, default=5)
    parser.add_argument("--picked", type=int, default=1024, help="random rows taken of a slide")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"])
    parser.add_argument("--listed", nargs="+", type=int, default=[1000, 10_000], help="slides in the listed stores")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder if absent")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/store.csv"))
    options = parser.parse_args(arguments)
    results: list[Result] = []
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            results += measure_layouts(options, Path(temporary), dtype)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        results += measure_checksums(options, Path(temporary))
        results += measure_listing(options, Path(temporary))
    print_results(results)
    write_results(options.out, results)
    return results


if __name__ == "__main__":
    main()
