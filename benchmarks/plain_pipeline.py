"""The pipeline that most people write, for comparison; a process of its own, since it must not profit from ours.

A DataLoader of OpenSlide's read_region with two workers and torchvision's ToTensor and Normalize, torch in float32, and
one HDF5 file per slide. It is given the tile corners, so that it spends nothing on tissue.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class PlainTiles(Dataset):  # type: ignore[type-arg]
    """One slide's tiles, read and transformed as most pipelines do."""

    def __init__(self, path: str, coords: np.ndarray, tile_px: int, mean: Sequence[float], std: Sequence[float]):
        self._path, self._coords, self._tile_px = path, coords, tile_px
        self._slide: Any = None
        self._transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self._coords)

    def __getitem__(self, index: int) -> Any:
        if self._slide is None:
            self._slide = openslide.OpenSlide(self._path)
        x, y = self._coords[index]
        tile = self._slide.read_region((int(x), int(y)), 0, (self._tile_px, self._tile_px)).convert("RGB")
        return self._transform(tile)


@torch.inference_mode()
def run(model: Callable[[Tensor], Tensor], dim: int, options: dict[str, Any], coords: np.ndarray) -> float:
    """Tiles per second, files included."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for path in options["slides"]:
            tiles = PlainTiles(path, coords, options["tile_px"], options["mean"], options["std"])
            with h5py.File(Path(folder, f"{Path(path).stem}.h5"), "w") as file:
                features = file.create_dataset("features", (0, dim), "float32", maxshape=(None, dim))
                for images in DataLoader(tiles, options["batch"], num_workers=2):
                    rows = model(images).numpy()
                    features.resize(len(features) + len(rows), axis=0)
                    features[-len(rows) :] = rows
                file["coords"] = coords
    return len(options["slides"]) * len(coords) / (time.monotonic() - started)


def measure(
    slides: Sequence[Path],
    coords: np.ndarray,
    backbone: str,
    tile_px: int,
    batch: int,
    mean: Sequence[float] = (0.0,) * 3,
    std: Sequence[float] = (1.0,) * 3,
) -> float:
    """Tiles per second in a process of its own; loading the model does not count.

    Args:
        slides: files.
        coords: [n, 2] corners of their tiles in level-0 px, the same on each.
        backbone: a name for `extract.load_backbone`, or ``mean colour``.
        tile_px: side of a tile.
        batch: tiles per batch.
        mean: of the normalisation.
        std: of the normalisation.
    """
    options = {"slides": [str(slide) for slide in slides], "backbone": backbone, "tile_px": tile_px, "batch": batch}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "coords.npy"), coords)
        text = json.dumps(options | {"mean": list(mean), "std": list(std), "coords": str(Path(folder, "coords.npy"))})
        command = [sys.executable, "-m", "benchmarks.plain_pipeline", text]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure what the arguments say, and print the rate."""
    options = json.loads(sys.argv[1])
    model: Callable[[Tensor], Tensor] = _mean_colour
    dim = 3
    if options["backbone"] != "mean colour":
        from extract.backbones.backbone import load_backbone

        backbone = load_backbone(options["backbone"], tile_px=options["tile_px"], device="cpu")
        model, dim = backbone.module.to(memory_format=torch.contiguous_format), backbone.recipe.dim
    print(run(model, dim, options, np.load(options["coords"])))


def _mean_colour(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3))


if __name__ == "__main__":
    main()
