"""How close the first end comes to its limits: reading, backbone, end to end, bag loading, one epoch.

    python -m benchmarks.bench_first_end --glas GLAS_FOLDER --labels GLAS_FOLDER/labels.csv

The limit of an extraction is ``cores / (CPU seconds of reading + CPU seconds of the backbone, per tile)``. Both are
measured alone, with all cores at work on one thread each, on the very tiles of the slide; then the whole pipeline runs
on them: opening, tissue, tiles, reading, backbone, checksummed commits. Bag loading is compared with a copy of the
same bytes from memory to memory, the files being in the page cache.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import Result, print_results, write_results
from extract.backbones.backbone import Backbone, load_backbone
from extract.memory import keep_freed_memory
from extract.pipeline.extraction import run_extraction
from extract.pipeline.jobs import CPU_BATCH_SIZE, GPU_BATCH_SIZE, available_cores
from extract.slides.finding.source import SlideSource
from extract.slides.finding.sources import find_slides
from extract.slides.slide import Slide
from extract.store import TileRecipe, TissueRecipe, open_store
from extract.synthetic.cohort import make_large_slide
from extract.tiling.tiles import cut_slide, plan_slide


def parallel(work: Callable[[int], None], count: int) -> tuple[float, float]:
    """Run ``work(0..count-1)`` on all cores; wall seconds, and CPU seconds of the working threads."""

    def timed(index: int) -> float:
        started = time.thread_time()
        work(index)
        return time.thread_time() - started

    wall = time.monotonic()
    with ThreadPoolExecutor(available_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        cpu = sum(pool.map(timed, range(count)))
    return time.monotonic() - wall, cpu


def measure_reading(sources: Sequence[SlideSource], recipe: TileRecipe) -> tuple[float, float, int]:
    """Wall and CPU seconds to decode every tile once, and the number of tiles."""
    slides = [Slide(source.path, source.slide_id) for source in sources]
    units = [cut_slide(slide, slide.name, recipe) for slide in slides]
    plans = [plan_slide(slide, recipe, None, None)[0] for slide in slides]
    tiles = [(i, int(x), int(y)) for i, unit in enumerate(units) for x, y in unit.coords]
    runs = [tiles[k : k + CPU_BATCH_SIZE] for k in range(0, len(tiles), CPU_BATCH_SIZE)]

    def read(index: int) -> None:
        for i, x, y in runs[index]:
            slides[i].read_tile(x, y, plans[i])

    wall, cpu = parallel(read, len(runs))
    for slide in slides:
        slide.close()
    return wall, cpu, len(tiles)


def measure_backbone(backbone: Backbone, tile_px: int, n_tiles: int) -> tuple[float, float]:
    """Wall and CPU seconds to embed ``n_tiles`` random tiles."""
    batch_size = CPU_BATCH_SIZE if backbone.device.type == "cpu" else GPU_BATCH_SIZE
    tiles = np.random.default_rng(0).integers(0, 256, (batch_size, tile_px, tile_px, 3), dtype=np.uint8)

    def embed(_: int) -> None:
        backbone.embed(tiles)

    return parallel(embed, n_tiles // batch_size)


def measure_extraction(
    subject: str, slides: Path, recipe: TileRecipe, backbone: Backbone, folder: Path, repeats: int
) -> list[Result]:
    """Reading alone, backbone alone, end to end, and the part of the limit that is reached."""
    sources = find_slides([slides])
    rows: dict[str, list[float]] = {name: [] for name in ("read", "read_cpu", "net", "net_cpu", "end", "share")}
    for repeat in range(repeats):
        read_wall, read_cpu, n_tiles = measure_reading(sources, recipe)
        net_tiles = min(n_tiles, 512)
        net_wall, net_cpu = measure_backbone(backbone, recipe.tile_px, net_tiles)
        report = run_extraction(slides, folder / f"{subject}-{repeat}.zarr", backbone, recipe=recipe)
        rate = report.stats.tiles / report.seconds
        limit = available_cores() / (read_cpu / n_tiles + net_cpu / net_tiles)
        values = (
            n_tiles / read_wall,
            read_cpu / n_tiles,
            net_tiles / net_wall,
            net_cpu / net_tiles,
            rate,
            rate / limit,
        )
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
    labels = {
        "read": ("reading alone", "tiles/s"),
        "read_cpu": ("reading, CPU time", "s/tile"),
        "net": ("backbone alone", "tiles/s"),
        "net_cpu": ("backbone, CPU time", "s/tile"),
        "end": ("end to end", "tiles/s"),
        "share": ("end to end / (cores / CPU time a tile)", "ratio"),
    }
    return [Result.of(subject, *labels[name], values) for name, values in rows.items()]


def measure_bags(subject: str, store: Path, repeats: int) -> list[Result]:
    """Rate of loading every bag, and of copying the same bytes in memory."""
    reader = open_store(store)
    (entry,) = reader.entries()
    bags = [reader[slide_id].features(entry) for slide_id in reader.slide_ids(entry)]
    gigabytes = sum(bag.nbytes for bag in bags) / 1e9
    in_memory = [np.array(bag) for bag in bags]
    loops = max(1, int(0.2 / gigabytes))
    loads, copies = [], []
    for _ in range(repeats):
        for source, rates in ((bags, loads), (in_memory, copies)):
            started = time.monotonic()
            for _ in range(loops):
                for bag in source:
                    np.array(bag)
            rates.append(gigabytes * loops / (time.monotonic() - started))
    ratios = [load / copy for load, copy in zip(loads, copies, strict=True)]
    return [
        Result.of(subject, "bag load from an open memory map", "GB/s", loads),
        Result.of(subject, "memory copy of the same bytes", "GB/s", copies),
        Result.of(subject, "bag load / memory copy", "ratio", ratios),
    ]


def measure_epoch(store: Path, labels: Path, target: str, epochs: int) -> list[Result]:
    """Seconds of one training epoch of ABMIL, per replica of five folds, the first epoch left out.

    The labels are shuffled over patients: only time is measured, and no test fold of the real labels is looked at.
    """
    import mil

    cohort = mil.read_cohort(labels, target=target)
    shuffled = replace(cohort, labels=np.random.default_rng(0).permutation(cohort.labels))
    run = mil.train(mil.open_store(store), shuffled, head="abmil", folds=5, seeds=1, epochs=epochs)
    seconds = [record.seconds for each in run.trained for record in each.history[1:]]
    return [Result.of("glas", "training epoch, abmil, one replica", "s", seconds)]


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure everything and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glas", type=Path, help="folder of the GlaS slides; left out if absent")
    parser.add_argument("--labels", type=Path, help="its label table, for the training epoch")
    parser.add_argument("--size-px", type=int, default=8000, help="side of the synthetic slide")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/first_end.csv"))
    options = parser.parse_args(arguments)
    # the backbone alone gets what the pipeline gives it, or the limit would be too low
    keep_freed_memory()
    backbone = load_backbone()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "large").mkdir()
        make_large_slide(folder / "large" / "large.tif", options.size_px, block_px=min(options.size_px, 2000))
        recipe = TileRecipe(mpp=0.5, tissue=TissueRecipe(method="none"))
        results += measure_extraction("large slide", folder / "large", recipe, backbone, folder, options.repeats)
        results += measure_bags("large slide", folder / "large slide-0.zarr", options.repeats)
        if options.glas is not None:
            results += measure_extraction("glas", options.glas, TileRecipe(mpp=0.62), backbone, folder, options.repeats)
            results += measure_bags("glas", folder / "glas-0.zarr", options.repeats)
        if options.labels is not None:
            results += measure_epoch(folder / "glas-0.zarr", options.labels, "label", options.epochs)
    print_results(results)
    write_results(options.out, results)
    return results


if __name__ == "__main__":
    main()
