"""Cutting a slide: what is kept, what is recorded, and which slides are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from extract.errors import MaskError, MissingMppError, NoTissueError, ScaleError
from extract.geometry import plan_read, tile_grid
from extract.slides.image import PlainImage
from extract.slides.slide import Slide
from extract.store import SlideFingerprint, TileRecipe, TissueRecipe, ZarrStore
from extract.store.core.fingerprint import sha256_of
from extract.synthetic.pyramid import write_pyramid
from extract.tiling.tiles import context_tiles, cut_slide, grid_shift, plan_slide, recorded_plan
from tests.test_extract.small import TILES, break_tile, tissue_image, write_slide

EVERYTHING = replace(TILES, tissue=TissueRecipe(method="none"))


def cut(path: Path, recipe: TileRecipe = TILES, **keywords: float | Path):
    with Slide(path) as slide:
        return cut_slide(slide, "s", recipe, **keywords)


def test_tiles_lie_on_tissue_in_row_major_order(slide_file: Path):
    unit, all_tiles = cut(slide_file), cut(slide_file, EVERYTHING)
    assert 0 < len(unit.coords) < len(all_tiles.coords)
    assert np.array_equal(np.lexsort((unit.coords[:, 0], unit.coords[:, 1])), np.arange(len(unit.coords)))
    kept = {tuple(c) for c in unit.coords.tolist()}
    # tissue is x 40..360, y 40..260: its share of each 64 px tile is known
    for x, y in all_tiles.coords.tolist():
        share = max(0, min(x + 64, 360) - max(x, 40)) * max(0, min(y + 64, 260) - max(y, 40)) / 64**2
        if abs(share - TILES.min_tissue_fraction) > 0.1:
            assert ((x, y) in kept) == (share > TILES.min_tissue_fraction)
    assert (unit.tissue_fraction >= TILES.min_tissue_fraction).all()


def test_tissue_none_keeps_the_whole_grid_even_of_white_glass(tmp_path: Path):
    file = tmp_path / "white.tif"
    write_pyramid(file, np.full((300, 410, 3), 255, dtype=np.uint8), 0.5, levels=1, tile_px=64)
    unit = cut(file, replace(EVERYTHING, min_tissue_fraction=1.0))
    grid = tile_grid((0, 0), (410, 300), plan_read(0.5, (1.0,), 0.5, 64))
    assert np.array_equal(unit.coords, grid.coords_l0())
    assert (unit.tissue_fraction == 1.0).all()
    assert unit.record["shifted"] == {"x_l0": 346, "y_l0": 236}


def test_tissue_none_keeps_a_tile_that_sticks_out_by_a_fraction_of_a_pixel(tmp_path: Path):
    file = tmp_path / "white.tif"
    write_pyramid(file, np.full((128, 128, 3), 255, dtype=np.uint8), 0.5, levels=1, tile_px=64)
    # 64 px at 1.003 µm/px are 128.4 level-0 px
    unit = cut(file, replace(EVERYTHING, mpp=1.003, min_tissue_fraction=1.0))
    assert unit.coords.tolist() == [[0, 0]]


def test_the_record_is_plain_json_and_says_the_frames(slide_file: Path):
    unit = cut(slide_file, replace(TILES, mpp=0.6))
    record = json.loads(json.dumps(unit.record, allow_nan=False))
    assert record["mpp"] == {
        "native": pytest.approx(0.5),
        "requested": 0.6,
        "achieved": 0.6,
        "source": "openslide.mpp",
    }
    assert record["size_l0"] == [400, 300]
    assert record["tile_l0"] == pytest.approx(64 * 0.6 / 0.5)
    assert record["tile_px"] == 64
    assert record["slide"] == {
        "size_bytes": slide_file.stat().st_size,
        "sampled_sha256": SlideFingerprint.of(slide_file).sampled_sha256,
    }
    height, width, _ = unit.thumbnail.shape
    down_x, down_y = record["thumbnail"]["downsample"]
    assert (width * down_x, height * down_y) == (pytest.approx(400), pytest.approx(300))
    # the drawn tissue is 320 x 220 px of 0.5 µm
    assert record["tissue"]["area_mm2"] == pytest.approx(320 * 220 * 0.25e-6, rel=0.05)


def test_the_origin_offset_moves_tiles_and_thumbnail(tmp_path: Path, with_properties: Callable):
    file = write_slide(tmp_path / "a.tif", 500, 420)
    bounds = {"x": "83", "y": "57", "width": "300", "height": "240"}
    with_properties({f"openslide.bounds-{name}": value for name, value in bounds.items()})
    unit = cut(file, EVERYTHING)
    assert unit.coords.min(axis=0).tolist() == [83, 57]
    assert (unit.coords + 64).max(axis=0).tolist() == [383, 297]
    assert unit.record["bounds_l0"] == [83, 57, 300, 240]
    assert unit.record["thumbnail"]["origin_l0"] == [83, 57]


def test_the_same_slide_at_another_scale_keeps_the_same_tissue(tmp_path: Path):
    file = write_slide(tmp_path / "a.tif", 800, 640, mpp=0.25)
    fine, coarse = cut(file, replace(TILES, mpp=0.25)), cut(file, replace(TILES, mpp=0.5))
    assert fine.record["tile_l0"] == 64
    assert coarse.record["tile_l0"] == 128
    assert coarse.record["level"] == 1
    assert fine.record["tissue"]["area_mm2"] == pytest.approx(coarse.record["tissue"]["area_mm2"], rel=0.05)


def test_an_unreadable_block_of_the_thumbnail_counts_as_tissue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_slide(tmp_path / "a.tif", 640, 448, levels=1)
    break_tile(file, 0, 0)  # on glass
    monkeypatch.setattr("extract.slides.slide_like._BLOCK_PX", 64)
    unit = cut(file)
    assert [0, 0] in unit.coords.tolist()
    assert unit.record["thumbnail_unreadable"] > 0


def test_no_tissue_is_an_error_that_says_how_to_go_on(tmp_path: Path):
    file = tmp_path / "white.tif"
    write_pyramid(file, np.full((300, 400, 3), 250, dtype=np.uint8), 0.5, levels=1, tile_px=64)
    with pytest.raises(NoTissueError, match=r"'s'.*--tissue none"):
        cut(file)


def test_a_missing_mpp_is_never_guessed(tmp_path: Path):
    file = write_slide(tmp_path / "bare.tif", mpp=None)
    with pytest.raises(MissingMppError, match=r"bare\.tif.*--default-mpp"):
        cut(file)
    assert cut(file, default_mpp=0.5).record["mpp"]["source"] == "--default-mpp"
    assert cut(file, mpp=0.25).record["tile_l0"] == 128
    native = cut(file, replace(TILES, mpp=None))
    assert native.record["mpp"] == {"native": None, "requested": None, "achieved": None, "source": "missing"}
    assert native.record["tile_l0"] == 64


def test_a_scale_that_cannot_be_had_names_the_slide(slide_file: Path):
    with Slide(slide_file, "case 7") as slide:
        with pytest.raises(ScaleError, match="case 7"):
            plan_slide(slide, replace(TILES, mpp=0.25), None, None)
        with pytest.raises(ScaleError, match=r"case 7.*tile-px"):
            cut_slide(slide, "case 7", replace(TILES, tile_px=512))


# ---------------------------------------------------------------- the mask


def test_the_unit_holds_the_mask_by_which_tiles_were_kept(slide_file: Path, tmp_path: Path):
    unit = cut(slide_file)
    assert unit.tissue_mask is not None
    assert unit.tissue_mask.shape == unit.thumbnail.shape[:2]
    assert unit.record["tissue"]["mask_sha256"] == sha256_of(np.packbits(unit.tissue_mask))
    assert unit.record["tissue"]["fraction"] == pytest.approx(unit.tissue_mask.mean())
    assert (unit.record["tissue"]["method"], unit.record["tissue"]["given_sha256"]) == ("default", None)
    store = ZarrStore.create(tmp_path / "s.zarr", TILES)
    store.write_tiles(unit)
    assert np.array_equal(store["s"].tissue_mask, unit.tissue_mask)


@pytest.mark.parametrize("method", ["default", "mask"])
def test_a_given_mask_decides_which_tiles_are_kept(slide_file: Path, tmp_path: Path, method: str):
    mask = np.zeros((300, 400), dtype=np.uint8)
    mask[:128, :64] = 255  # on glass as much as on tissue
    file = tmp_path / "mask.png"
    Image.fromarray(mask).save(file)
    unit = cut(slide_file, replace(TILES, tissue=TissueRecipe(method=method, thumbnail_px=64)), mask=file)
    assert unit.coords.tolist() == [[0, 0], [0, 64]]
    assert unit.record["tissue"]["method"] == "mask"
    assert len(unit.record["tissue"]["given_sha256"]) == 64
    assert unit.record["tissue"]["area_mm2"] == pytest.approx(128 * 64 * 0.25e-6, rel=0.05)


def test_a_mask_that_is_absent_or_unusable_names_the_slide(slide_file: Path, tmp_path: Path):
    with pytest.raises(MaskError, match=r"slide 'slide\.tif': got no mask"):
        cut(slide_file, replace(TILES, tissue=TissueRecipe(method="mask")))
    with pytest.raises(MaskError, match=r"slide 'slide\.tif': got mask .*nothing\.png"):
        cut(slide_file, mask=tmp_path / "nothing.png")


def test_pen_beside_the_tissue_gives_no_tiles(tmp_path: Path):
    pixels = tissue_image(700, 300, margin=40)
    pixels[:, 400:] = 245
    pixels[:, 520:600] = (40, 60, 170)
    file = tmp_path / "pen.tif"
    write_pyramid(file, pixels, 0.5, levels=1, tile_px=64)
    assert cut(file).coords[:, 0].max() < 400
    with_pen = replace(TILES, tissue=replace(TILES.tissue, exclude_pen=False))
    assert cut(file, with_pen).coords[:, 0].max() > 500


def test_a_plain_image_is_cut_like_a_slide(tmp_path: Path):
    file = tmp_path / "a.png"
    Image.fromarray(tissue_image()).save(file)
    with PlainImage(file) as image:
        unit = cut_slide(image, "s", TILES, mpp=0.5)
    slide = cut(write_slide(tmp_path / "a.tif"), TILES)
    # JPEG moves the mask by a pixel here and there
    assert set(map(tuple, unit.coords.tolist())) & set(map(tuple, slide.coords.tolist()))
    assert unit.record["mpp"]["source"] == "slide table"


# ---------------------------------------------------------------- gap, jitter, context


def test_a_gap_leaves_pixels_out(slide_file: Path):
    unit = cut(slide_file, replace(EVERYTHING, gap_px=36))
    assert sorted(set(unit.coords[:, 0].tolist())) == [0, 100, 200, 300]
    assert unit.record["grid_tiles"] == len(unit.coords)


def test_jitter_moves_the_grid_by_one_draw_a_slide(slide_file: Path):
    recipe = replace(EVERYTHING, jitter_px=40, jitter_seed=3)
    x, y = grid_shift(recipe, "s")
    unit = cut(slide_file, recipe)
    assert unit.record["jitter_px"] == [x, y]
    assert {x, x + 64, x + 128} <= set(unit.coords[:, 0].tolist())
    assert {y, y + 64, y + 128} <= set(unit.coords[:, 1].tolist())
    assert unit.record["shifted_first"] == {"x_l0": 0 if x else None, "y_l0": 0 if y else None}
    assert np.array_equal(cut(slide_file, recipe).coords, unit.coords)


def test_jitter_is_uniform_seeded_and_of_the_slide():
    recipe = TileRecipe(jitter_px=9)
    draws = np.array([grid_shift(recipe, f"slide {i}") for i in range(2000)])
    assert draws.min() == 0
    assert draws.max() == 9
    for axis in (0, 1):
        assert (np.abs(np.bincount(draws[:, axis]) - 200) < 70).all()
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.1
    assert grid_shift(recipe, "slide 1") == grid_shift(recipe, "slide 1")
    others = [grid_shift(replace(recipe, jitter_seed=1), f"slide {i}") for i in range(50)]
    assert others != [tuple(draw) for draw in draws[:50].tolist()]
    assert grid_shift(TileRecipe(), "slide 1") == (0, 0)
    # pinned: stores depend on it
    assert grid_shift(TileRecipe(jitter_px=223, jitter_seed=7), "a/ü\udcff") == (50, 136)


def test_context_shows_the_same_centre_at_a_coarser_scale(tmp_path: Path):
    file = tmp_path / "a.tif"
    pixels = np.full((600, 800, 3), 245, dtype=np.uint8)
    pixels[296:304, 396:404] = (120, 40, 140)
    write_pyramid(file, pixels, 0.5, levels=3, tile_px=64)
    record = {**cut(file, EVERYTHING).record, "slide_id": "s"}
    coords = np.array([[400 - 32, 300 - 32], [0, 0]], dtype=np.int32)
    plan = recorded_plan(record)
    context, corners = context_tiles(record, coords, 1.5)
    with Slide(file) as slide:
        assert plan == plan_slide(slide, EVERYTHING, None, None)[0]
        tile, wide = slide.read_tile(*coords[0], plan), slide.read_tile(*corners[0], context)
        outside = slide.read_tile(*corners[1], context)
    with pytest.raises(ScaleError, match=r"slide 's': .*coarser"):
        context_tiles(record, coords, 0.5)
    for picture, side in ((tile, 8), (wide, 8 / 3)):
        dark = np.argwhere(picture[..., 1] < 200)
        assert dark.mean(axis=0) == pytest.approx((31.5, 31.5), abs=1)
        assert np.sqrt(len(dark)) == pytest.approx(side, abs=1.5)
    assert (corners[1] < 0).all()
    assert (outside[:20, :20] == 255).all()
