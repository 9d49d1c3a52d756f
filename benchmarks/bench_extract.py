"""Slides to embeddings, end to end: Tessera beside a straightforward pipeline, and both beside their limits.

    python -m benchmarks.bench_extract                                   # on a CPU: about 20 minutes on two cores
    python -m benchmarks.bench_extract --device cuda --backbones vit_large_patch16_224 vit_small_patch16_224

The straightforward pipeline is that of `benchmarks/plain_pipeline.py`. It is measured at batch 64 and at its own best
batch size, in the same run as Tessera, repeats taking turns. With the trivial backbone (the mean colour of a tile)
reading and moving tiles alone decide, and Tessera's quality flags, which the other has not.

The limit on a CPU is cores / (CPU seconds of reading + backbone a tile), both measured alone with all cores at work. On
a GPU it is the fastest rate of the backbone alone, over batch sizes, on tiles that already are in its memory.
"""

import argparse
import gc
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import plain_pipeline
from benchmarks.bench_first_end import parallel
from benchmarks.bench_reading import write_aperio
from benchmarks.machine import Result, print_results, write_results
from extract.backbones.backbone import Backbone, load_backbone
from extract.memory import keep_freed_memory
from extract.pipeline.batches import RUN_TILES
from extract.pipeline.extraction import run_extraction
from extract.pipeline.jobs import CPU_BATCH_SIZE, available_cores
from extract.slides.opening import open_slide
from extract.slides.slide import Slide
from extract.store import FeatureRecipe, TileRecipe, TissueRecipe, TransformRecipe
from extract.tiling.tiles import cut_slide, plan_slide

PLAIN_BATCHES = (1, 4, 8, 16, 32, 64)


class MeanColour(Backbone):
    """The trivial backbone: the mean of each channel."""

    def __init__(self, tile_px: int, device: torch.device) -> None:
        transform = TransformRecipe(tile_px, "bicubic", (0.0,) * 3, (1.0,) * 3)
        recipe = FeatureRecipe("mean_colour", "mean_colour", "1", "0" * 64, "model", transform, 3, "float32")
        super().__init__(torch.nn.Flatten(), recipe, device)

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        """uint8 [n, s, s, 3] to float32 [n, 3]."""
        n, size = tiles.shape[:2]
        # rows first, in 16 bits, which hold 257 rows of 255
        rows = np.add.reduce(tiles.reshape(n, size, -1), axis=1, dtype=np.uint16 if size <= 257 else np.uint32)
        return (rows.reshape(n, size, 3).sum(axis=1, dtype=np.uint32) / (size * size * 255)).astype(np.float32)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The same on a device: images [n, 3, s, s] to [n, 3]."""
        return images.mean(dim=(2, 3))


def best_plain_batch(plain: Callable[[int, int], float], tiles: int) -> int:
    """The batch size at which the straightforward pipeline is fastest, on the first tiles."""
    rates = {batch: plain(batch, tiles) for batch in PLAIN_BATCHES}
    return max(rates, key=lambda batch: rates[batch])


def cut(path: Path, recipe: TileRecipe) -> np.ndarray:
    """The corners of a slide's tiles."""
    with Slide(path) as slide:
        return cut_slide(slide, path.stem, recipe).coords


def reading_cpu_s(path: Path, recipe: TileRecipe, reader: str = "auto") -> float:
    """CPU seconds to read a tile, all cores reading runs of tiles."""
    coords = cut(path, recipe)
    slide = open_slide(path, path.stem, reader)
    plan, _ = plan_slide(slide, recipe, None, None)
    runs = [coords[i : i + RUN_TILES] for i in range(0, len(coords), RUN_TILES)]

    def read(index: int) -> None:
        for x, y in runs[index]:
            slide.read_tile(int(x), int(y), plan)

    _, cpu = parallel(read, len(runs))
    slide.close()
    return cpu / len(coords)


def backbone_cpu_s(backbone: Backbone, batch: int, tile_px: int, tiles: int) -> float:
    """CPU seconds to embed a tile, all cores embedding batches."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch, tile_px, tile_px, 3), dtype=np.uint8)
    count = max(tiles // batch, 2)

    def embed(_: int) -> None:
        backbone.embed(pixels)

    embed(0)
    # of the process: a runtime may compute in threads of its own
    started = time.process_time()
    parallel(embed, count)
    return (time.process_time() - started) / (count * batch)


def extraction_rate(
    slides: Path | Sequence[Path], backbone: Backbone, recipe: TileRecipe, batch: int, **options: Any
) -> Any:
    """One whole extraction into a new store; its report."""
    with tempfile.TemporaryDirectory() as folder:
        return run_extraction(slides, Path(folder, "s.zarr"), backbone, recipe=recipe, batch_size=batch, **options)


def compare_on_cpu(options: argparse.Namespace, name: str, paths: Sequence[Path], recipe: TileRecipe) -> list[Result]:
    """Tessera, by each runtime, beside the straightforward pipeline and its own limit."""
    trivial, cores = name == "mean colour", available_cores()
    coords, transform = cut(paths[0], recipe), load(name, recipe).recipe.transform
    tiles = options.search_tiles * (8 if trivial else 1)

    def plain(batch: int, first: int | None = None) -> float:
        slides = paths if first is None else paths[:1]
        return plain_pipeline.measure(
            slides, coords[:first], name, recipe.tile_px, batch, transform.mean, transform.std
        )

    best = best_plain_batch(plain, tiles)
    batch = 32 if trivial else CPU_BATCH_SIZE
    ours = {runtime: load(name, recipe) for runtime in (["torch"] if trivial else options.runtimes)}
    values: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.repeats):
        row = {
            ("plain pipeline, batch 64", "tiles/s"): plain(64),
            (f"plain pipeline, its best batch: {best}", "tiles/s"): plain(best),
        }
        at_64, at_best = row.values()
        reading_s = reading_cpu_s(paths[0], recipe)
        row["reading, CPU time", "s/tile"] = reading_s
        for runtime, backbone in ours.items():
            report = extraction_rate(paths, backbone, recipe, batch, runtime=runtime)
            rate = report.stats.tiles / report.seconds
            # the run let a copy compute by its runtime
            copy_of = load(name, recipe)
            copy_of.use_runtime(runtime, batch, cores)
            backbone_s = backbone_cpu_s(copy_of, batch, recipe.tile_px, tiles)
            who = f"tessera, {runtime}"
            row |= {
                (who, "tiles/s"): rate,
                (f"{who} / plain at 64", "ratio"): rate / at_64,
                (f"{who} / plain at its best", "ratio"): rate / at_best,
                (f"{who}, backbone, CPU time", "s/tile"): backbone_s,
                (f"{who} / (cores / CPU time a tile)", "ratio"): rate * (reading_s + backbone_s) / cores,
                (f"{who}, device busy", "ratio"): report.stats.device_busy,
            }
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    subject = f"{name}, {len(paths)} x {len(coords)} tiles"
    return [Result.of(subject, what, unit, found) for (what, unit), found in values.items()]


def load(name: str, recipe: TileRecipe) -> Backbone:
    """A backbone of its own."""
    if name == "mean colour":
        return MeanColour(recipe.tile_px, torch.device("cpu"))
    return load_backbone(name, tile_px=recipe.tile_px, dtype="float32", device="cpu")


def measure_growth(options: argparse.Namespace, path: Path, recipe: TileRecipe) -> list[Result]:
    """Peak memory and rate with ever more slides; the trivial backbone, so that bookkeeping shows."""
    results = []
    trivial = MeanColour(recipe.tile_px, torch.device(options.device))
    for count in options.slides:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "slides")
            folder.mkdir()
            for i in range(count):
                (folder / f"{i:05d}.svs").symlink_to(path.absolute())
            gc.collect()
            peak = _Peak()
            report = run_extraction(
                folder, Path(temporary, "s.zarr"), trivial, recipe=recipe, batch_size=32, runtime="torch"
            )
            memory = peak.stop()
        rate = report.stats.tiles / report.seconds
        subject = f"{count} slides"
        results.append(Result.of(subject, "rate, mean colour", "tiles/s", [rate]))
        results.append(Result.of(subject, "memory, this process and its reader", "MB", [memory]))
    return results


class _Peak:
    """Peak resident memory of this process and its children, sampled."""

    def __init__(self) -> None:
        self._most, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Megabytes."""
        self._ended.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        page = resource.getpagesize() / 1e6
        while not self._ended.wait(0.05):
            pages = 0
            children = Path("/proc/self/task").glob("*/children")
            numbers = ["self", *(number for file in children for number in file.read_text().split())]
            for number in numbers:
                try:
                    pages += int(Path("/proc", number, "statm").read_text().split()[1])
                except OSError:
                    continue
            self._most = max(self._most, pages * page)


def compare_on_gpu(options: argparse.Namespace, slides: Sequence[Path], recipe: TileRecipe) -> list[Result]:
    """End to end beside the fastest rate of each backbone alone."""
    import timm

    results = []
    for name in options.backbones:
        model = timm.create_model(name, pretrained=False, num_classes=0)
        backbone = random_backbone(model, name, recipe.tile_px, options)
        alone = {batch: backbone_rate(backbone, batch, recipe.tile_px) for batch in options.batches}
        batch = max(alone, key=lambda size: alone[size])
        reports = [extraction_rate(slides, backbone, recipe, batch) for _ in range(options.repeats)]
        rates = [report.stats.tiles / report.seconds for report in reports]
        for size, rate in alone.items():
            results.append(Result.of(name, f"backbone alone, batch {size}", "tiles/s", [rate]))
        results.append(Result.of(name, f"end to end, batch {batch}", "tiles/s", rates))
        results.append(Result.of(name, "end to end / backbone alone", "ratio", [rate / alone[batch] for rate in rates]))
        results.append(Result.of(name, "device busy", "ratio", [report.stats.device_busy for report in reports]))
    return results


def random_backbone(model: torch.nn.Module, name: str, tile_px: int, options: argparse.Namespace) -> Backbone:
    """A timm model with random weights, which take as long as others."""
    transform = TransformRecipe(tile_px, "bicubic", (0.5,) * 3, (0.5,) * 3)
    dim = int(getattr(model, "num_features", 0))
    recipe = FeatureRecipe(name, name, "random", "0" * 64, "model", transform, dim)
    return Backbone(model, recipe, torch.device(options.device), options.precision, options.compile)


def backbone_rate(backbone: Backbone, batch: int, tile_px: int, seconds: float = 5.0) -> float:
    """Tiles per second of the backbone alone, on tiles that are in the device's memory."""
    tiles = torch.randint(0, 256, (batch, tile_px, tile_px, 3), dtype=torch.uint8, device=backbone.device)
    synchronize = torch.cuda.synchronize if backbone.device.type == "cuda" else lambda: None
    for _ in range(3):
        backbone.forward(backbone.prepare(tiles))
    synchronize()
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        for _ in range(4):
            backbone.forward(backbone.prepare(tiles))
        synchronize()
        count += 4
    return count * batch / (time.monotonic() - started)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Measure everything and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--backbones", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument("--runtimes", nargs="+", default=["torch", "openvino"], help="on a CPU")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile, on a GPU")
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256, 512], help="on a GPU")
    parser.add_argument("--size-px", type=int, default=8960, help="side of the slide that backbones embed on a CPU")
    parser.add_argument(
        "--large-px", type=int, default=28672, help="side of the slides of the trivial backbone and a GPU"
    )
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--search-tiles", type=int, default=256, help="tiles for choosing batches and CPU seconds")
    parser.add_argument("--slides", nargs="+", type=int, default=[10, 100, 1000], help="counts for the memory table")
    parser.add_argument("--copies", type=int, default=3, help="how many of the latter")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    recipe = TileRecipe(mpp=0.5, tile_px=options.tile_px, tissue=TissueRecipe(method="none"))
    with tempfile.TemporaryDirectory() as temporary:
        slide, large = Path(temporary, "slide.svs"), Path(temporary, "large.svs")
        write_aperio(large, options.large_px)
        copies = [Path(temporary, f"copy-{i}.svs") for i in range(options.copies)]
        for copy in copies:
            copy.symlink_to(large)
        if options.device == "cpu":
            write_aperio(slide, options.size_px)
            results = [r for name in options.backbones for r in compare_on_cpu(options, name, [slide], recipe)]
            results += compare_on_cpu(options, "mean colour", copies, recipe)
        else:
            results = compare_on_gpu(options, copies, recipe)
        small = Path(temporary, "small.svs")
        write_aperio(small, min(options.size_px, 2240))
        results += measure_growth(options, small, replace(recipe, tissue=TissueRecipe()))
    print_results(results)
    device = options.device.replace(":", "")
    write_results(options.out or Path(f"benchmarks/results/extract_{device}.csv"), results)
    return results


if __name__ == "__main__":
    main()
