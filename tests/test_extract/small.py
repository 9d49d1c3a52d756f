"""Small slides, recipes and a backbone of a few hundred weights, for tests that must be fast."""

from pathlib import Path

import numpy as np
import tifffile
import torch
from scipy import ndimage
from torch import Tensor, nn

from extract.backbones.backbone import Backbone
from extract.store import Execution, FeatureRecipe, TileRecipe, TilesUnit, TissueRecipe, TransformRecipe
from extract.synthetic.pyramid import write_pyramid

TILE_PX = 64
TILES = TileRecipe(mpp=0.5, tile_px=TILE_PX, tissue=TissueRecipe(thumbnail_px=64))
EXECUTION = Execution("fp32", "torch", "cpu", 4, {"torch": "2"})


def tissue_image(width: int = 400, height: int = 300, seed: int = 0, margin: int = 40) -> np.ndarray:
    """Pink, grainy tissue on white glass, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    grain = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (2, 2, 0)) * 160
    pixels = np.clip(np.array([200.0, 120.0, 170.0]) + grain, 0, 255)
    glass = np.ones((height, width), dtype=bool)
    glass[margin : height - margin or None, margin : width - margin or None] = False
    pixels[glass] = 245
    return pixels.astype(np.uint8)


def write_slide(
    path: Path, width: int = 400, height: int = 300, mpp: float | None = 0.5, seed: int = 0, levels: int = 2
) -> Path:
    """A pyramidal TIFF of `tissue_image` with 64 px TIFF tiles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pyramid(path, tissue_image(width, height, seed), mpp, levels=levels, tile_px=64)
    return path


def break_tile(path: Path, x_l0: int, y_l0: int) -> None:
    """Overwrite the compressed level-0 TIFF tile at (x, y) with zeros."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        index = (y_l0 // page.tilelength) * -(-page.imagewidth // page.tilewidth) + x_l0 // page.tilewidth
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(bytes(count))


def feature_recipe(dim: int = 6, dtype: str = "float16", **changes: object) -> FeatureRecipe:
    """The recipe of `tiny_backbone`."""
    transform = TransformRecipe(TILE_PX, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    values: dict[str, object] = {
        "backbone": "tiny",
        "architecture": "tiny",
        "revision": "1",
        "weights_sha256": "0" * 64,
        "pooling": "model",
        "transform": transform,
        "dim": dim,
        "dtype": dtype,
    }
    return FeatureRecipe(**(values | changes))  # type: ignore[arg-type]


class TinyModel(nn.Module):
    """Strided convolution, mean and scale; ``scale`` makes embeddings that leave float16."""

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(dim, 3, 8, 8, generator=generator))
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] to [n, dim]."""
        maps = torch.relu(nn.functional.conv2d(images, self.weight, stride=8))
        return maps.mean(dim=(2, 3)) * self.scale


def tiny_backbone(dim: int = 6, scale: float = 1.0, **recipe: object) -> Backbone:
    """A frozen `TinyModel` on the CPU."""
    return Backbone(TinyModel(dim, scale), feature_recipe(dim, **recipe), torch.device("cpu"))  # type: ignore[arg-type]


def tiles_unit(slide_id: str, n: int = 5, seed: int = 0, **record: object) -> TilesUnit:
    """A tiles unit of ``n`` random tiles."""
    rng = np.random.default_rng([seed, n])
    return TilesUnit(
        slide_id,
        rng.integers(0, 1 << 20, (n, 2), dtype=np.int32),
        rng.random(n, dtype=np.float32),
        rng.integers(0, 255, (9, 12, 3), dtype=np.uint8),
        {"mpp": {"native": 0.5, "requested": 0.5, "achieved": 0.5, "source": "openslide.mpp"}, **record},
    )


def matrix(n: int = 5, dim: int = 6, seed: int = 0, dtype: str = "float16") -> np.ndarray:
    """Random embeddings [n, dim]."""
    return np.random.default_rng([seed, n, dim]).normal(size=(n, dim)).astype(dtype)


def tree(folder: Path, but: tuple[str, ...] = ("runs", "index.json")) -> dict[str, bytes]:
    """Every file under ``folder`` by its relative path, without what is under ``but`` and half-built units.

    ``index.json`` holds the age of files, which no two stores share.
    """
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: path.read_bytes()
        for name, path in named.items()
        if name.split("/")[0] not in but and ".partial" not in name
    }
