"""Every TIFF is shown as an independent decoder decodes it, whoever reads it, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from extract.errors import ScaleError, SlideUnreadableError, TileDecodeError
from extract.slides.image import PlainImage
from extract.slides.opening import open_slide
from extract.slides.slide import Slide
from tests.test_extract.small import tissue_image

WIDTH, HEIGHT = 150, 101


def picture(samples: int = 3, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Pixels uint8 [height, width, samples] in which no two corners look alike."""
    pixels = tissue_image(width, height, margin=8)
    pixels[:20, :30] = (250, 40, 20)
    if samples == 1:
        return pixels[..., :1]
    if samples == 4:
        alpha = np.linspace(0, 255, width).astype(np.uint8)[None, :, None]
        return np.concatenate([pixels, np.broadcast_to(alpha, (height, width, 1))], axis=2)
    return pixels


def shown(path: Path) -> np.ndarray:
    """Level 0 as Tessera shows it, uint8 [h, w, 3], put together from regions that lie across its tiles."""
    with open_slide(path) as slide:
        width, height = slide.size_l0
        rows = [
            np.concatenate(
                [slide.read_region(x, y, 0, (min(70, width - x), min(60, height - y))) for x in range(0, width, 70)],
                axis=1,
            )
            for y in range(0, height, 60)
        ]
        return np.concatenate(rows)


def stored(path: Path) -> np.ndarray:
    """The first page by tifffile, as colours on white uint8 [h, w, 3]: pixels as they are stored."""
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        pixels = page.asarray()
        if page.samplesperpixel > 1 and int(page.planarconfig) == 2:
            pixels = np.moveaxis(pixels, 0, -1)
        if int(page.photometric) == 3:
            return np.moveaxis(page.colormap[:, pixels] >> 8, 0, -1).astype(np.uint8)
        if int(page.photometric) == 0:
            pixels = 255 - pixels
        pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
        if pixels.shape[2] == 4 and page.extrasamples and int(page.extrasamples[0]) == 2:
            alpha = pixels[..., 3:] / 255.0
            return np.round(pixels[..., :3] * alpha + 255.0 * (1 - alpha)).astype(np.uint8)
        return pixels[..., :3]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_level_0_is_what_tifffile_decodes_or_refused(tmp_path: Path, data: st.DataObject):
    samples = data.draw(st.sampled_from([1, 1, 3, 3, 4]), "samples")
    bits = data.draw(st.sampled_from([8, 8, 8, 8, 16, 32]), "bits")
    tiled = data.draw(st.booleans(), "tiled")
    orientation = data.draw(st.integers(1, 8), "orientation")
    compression = data.draw(
        st.sampled_from([None, "zlib", "lzw", "packbits", "zstd", *(["jpeg"] if samples != 4 and bits == 8 else [])]),
        "compression",
    )
    planar = samples == 3 and compression != "jpeg" and data.draw(st.booleans(), "planar")
    grey = data.draw(st.sampled_from(["minisblack", "miniswhite"]), "grey")
    extra = data.draw(st.sampled_from([["unassalpha"], ["unspecified"]]), "extra")
    pixels = picture(samples).astype({8: np.uint8, 16: np.uint16, 32: np.float32}[bits])
    if samples == 1:
        pixels = pixels[..., 0]
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        np.ascontiguousarray(np.moveaxis(pixels, -1, 0)) if planar else pixels,
        photometric=grey if samples == 1 else "rgb",
        planarconfig=("separate" if planar else "contig") if samples > 1 else None,
        compression=compression,
        tile=(48, 64) if tiled else None,
        rowsperstrip=None if tiled else data.draw(st.sampled_from([7, 200]), "rows"),
        extrasamples=extra if samples == 4 else None,
        extratags=[(274, "H", 1, orientation, True)],
        metadata=None,
    )
    if bits != 8:
        with pytest.raises(SlideUnreadableError, match=f"{bits} bits"):
            open_slide(path)
        return
    difference = np.abs(shown(path).astype(int) - stored(path))
    # transparency is mixed in whole numbers
    assert difference.max() <= (1 if samples == 4 else 0)


def test_palettes_are_shown_in_their_colours(tmp_path: Path):
    colours = np.random.default_rng(0).integers(0, 2**16, (3, 256)).astype(np.uint16)
    for name, options in (("strips", {"rowsperstrip": 9}), ("tiles", {"tile": (48, 64)})):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, picture(1)[..., 0], photometric="palette", colormap=colours, **options)
        np.testing.assert_array_equal(shown(path), stored(path))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("tiled", [False, True])
def test_fewer_than_8_bits_are_refused(tmp_path: Path, bits: int, tiled: bool):
    path = tmp_path / "a.tif"
    pixels = (picture(1)[..., 0] >> (8 - bits)).astype(np.uint8)
    tifffile.imwrite(path, pixels, bitspersample=bits, photometric="minisblack", tile=(48, 64) if tiled else None)
    with pytest.raises(SlideUnreadableError, match=f"1 x {bits} bits"):
        open_slide(path)


def test_cmyk_in_tiles_is_refused(tmp_path: Path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(4), photometric="separated", tile=(48, 64))
    with pytest.raises(SlideUnreadableError, match="CMYK"):
        open_slide(path)


# ---------------------------------------------------------------- planes


def write_planes(path: Path, names: list[str] | None, count: int = 3, **options: Any) -> np.ndarray:
    """Planes [count, h, w] as pages of an OME-TIFF; with the names of channels, if there are any."""
    planes = np.stack([picture()[..., i % 3] for i in range(count)])
    metadata: dict[str, Any] = {"axes": "CYX"}
    if names is not None:
        metadata["Channel"] = {"Name": names}
    tifffile.imwrite(path, planes, photometric="minisblack", ome=True, metadata=metadata, tile=(48, 64), **options)
    return np.moveaxis(planes, 0, -1)


@pytest.mark.parametrize("names", [["Red", "Green", "Blue"], ["R", "G", "B"], ["red", "green", "blue"]])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_planes_named_red_green_and_blue_are_colours(tmp_path: Path, names: list[str], compression: str | None):
    pixels = write_planes(tmp_path / "a.ome.tif", names, compression=compression)
    np.testing.assert_array_equal(shown(tmp_path / "a.ome.tif"), pixels)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert "three planes" in slide.reader_note


@pytest.mark.parametrize(
    ("names", "count"),
    [(None, 3), (["DAPI", "CD8", "PanCK"], 3), (["Red", "Green", "Blue", "DAPI"], 4), (["Blue", "Green", "Red"], 3)],
)
def test_channels_that_are_no_colours_are_refused_by_their_number(tmp_path: Path, names: list[str] | None, count: int):
    write_planes(tmp_path / "a.ome.tif", names, count)
    with pytest.raises(SlideUnreadableError, match=f"it holds {count} planes by its OME-XML") as caught:
        open_slide(tmp_path / "a.ome.tif")
    assert "Red, Green and Blue" in str(caught.value)
    with pytest.raises(SlideUnreadableError):
        Slide(tmp_path / "a.ome.tif")


@pytest.mark.parametrize("axes", ["ZYXS", "TYXS"])
def test_depths_and_times_are_refused(tmp_path: Path, axes: str):
    stack = np.stack([picture()] * 4)
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, photometric="rgb", ome=True, metadata={"axes": axes}, tile=(48, 64))
    with pytest.raises(SlideUnreadableError, match="it holds 4 planes"):
        open_slide(tmp_path / "a.ome.tif")


@pytest.mark.parametrize("tiled", [False, True])
def test_pages_of_one_size_and_imagej_stacks_are_refused(tmp_path: Path, tiled: bool):
    tile = (48, 64) if tiled else None
    stack = np.stack([picture()] * 3)
    tifffile.imwrite(tmp_path / "pages.tif", stack, photometric="rgb", tile=tile, metadata=None)
    with pytest.raises(SlideUnreadableError, match="3 pages"):
        open_slide(tmp_path / "pages.tif")
    if not tiled:
        tifffile.imwrite(tmp_path / "ij.tif", stack[..., 0], imagej=True, metadata={"axes": "ZYX"})
        with pytest.raises(SlideUnreadableError, match="3 planes by ImageJ"):
            open_slide(tmp_path / "ij.tif")


def test_a_first_page_that_is_a_thumbnail_is_not_taken_for_the_slide(tmp_path: Path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(picture(width=64, height=48), photometric="rgb", tile=(48, 64), metadata=None)
        tiff.write(picture(), photometric="rgb", tile=(48, 64), metadata=None)
    with pytest.raises(SlideUnreadableError, match="2 pages as large"):
        open_slide(tmp_path / "a.tif")


# ---------------------------------------------------------------- levels and scale


def test_levels_in_subifds_are_read(tmp_path: Path):
    path, full = tmp_path / "a.ome.tif", picture(width=640, height=448)
    small = np.asarray(Image.fromarray(full).resize((160, 112), Image.Resampling.BOX))
    with tifffile.TiffWriter(path, ome=True) as tiff:
        options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "compression": "zlib"}
        tiff.write(full, subifds=1, metadata={"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}, **options)
        tiff.write(small, subfiletype=1, metadata=None, **options)
    with open_slide(path) as slide:
        assert slide.downsamples == (1.0, 4.0)
        assert slide.native_mpp(default=0.5) == (0.25, "OME PhysicalSize")
        np.testing.assert_array_equal(slide.read_region(128, 64, 1, (90, 70)), small[16:86, 32:122])
        np.testing.assert_array_equal(slide.read_region(128, 64, 0, (90, 70)), full[64:134, 128:218])


@pytest.mark.parametrize(
    ("value", "unit", "mpp"),
    [(0.25, "µm", 0.25), (250.0, "nm", 0.25), (0.0005, "mm", 0.5), (2500.0, "Å", 0.25), (0.25, None, 0.25)],
)
def test_the_physical_size_of_an_ome_tiff_is_its_scale(tmp_path: Path, value: float, unit: str | None, mpp: float):
    said = {f"PhysicalSize{axis}": value for axis in "XY"}
    if unit is not None:
        said |= {f"PhysicalSize{axis}Unit": unit for axis in "XY"}
    for name, tile in (("tiles", (48, 64)), ("strips", None)):
        path = tmp_path / f"{name}.ome.tif"
        tifffile.imwrite(path, picture(), photometric="rgb", ome=True, metadata={"axes": "YXS", **said}, tile=tile)
        with open_slide(path) as slide:
            assert slide.native_mpp(default=9.0) == (pytest.approx(mpp), "OME PhysicalSize")
            assert slide.native_mpp(override=0.4) == (0.4, "slide table")


@pytest.mark.parametrize(("unit", "value"), [("pixel", 1.0), ("reference frame", 1.0), ("µm", 0.0), ("µm", 352.8)])
def test_a_physical_size_that_is_no_scale_is_none(tmp_path: Path, unit: str, value: float):
    said = {f"PhysicalSize{axis}": value for axis in "XY"} | {f"PhysicalSize{axis}Unit": unit for axis in "XY"}
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, picture(), photometric="rgb", ome=True, metadata={"axes": "YXS", **said}, tile=(48, 64))
    with open_slide(path) as slide:
        assert slide.native_mpp(default=0.5) == (0.5, "--default-mpp")


def test_imagejs_unit_is_a_scale_and_pixels_must_be_square(tmp_path: Path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(1)[..., 0], imagej=True, resolution=(4.0, 4.0), metadata={"unit": "um"})
    with open_slide(path) as slide:
        assert slide.native_mpp(default=9.0) == (pytest.approx(0.25), "ImageJ unit")
    tifffile.imwrite(path, picture(1)[..., 0], imagej=True, resolution=(4.0, 2.0), metadata={"unit": "um"})
    with open_slide(path) as slide, pytest.raises(ScaleError, match="square"):
        slide.native_mpp()


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
@pytest.mark.parametrize("tiled", [False, True])
def test_a_damaged_piece_is_an_error_and_the_others_are_read(tmp_path: Path, compression: str, tiled: bool):
    path, pixels = tmp_path / "a.tif", picture(width=256, height=192)
    layout: dict[str, Any] = {"tile": (64, 64)} if tiled else {"rowsperstrip": 64}
    # turned by a tag, so that its pages are read, not OpenSlide's pixels
    extra = [(274, "H", 1, 3, True)]
    tifffile.imwrite(path, pixels, photometric="rgb", compression=compression, extratags=extra, **layout)
    whole = shown(path)
    with tifffile.TiffFile(path) as tiff:
        index = 4 if tiled else 1
        offset, count = tiff.pages[0].dataoffsets[index], tiff.pages[0].databytecounts[index]
    data = bytearray(path.read_bytes())
    data[offset + count // 2 : offset + count // 2 + 40] = (b"\xff\xd9" if compression == "jpeg" else b"\0\0") * 20
    path.write_bytes(data)
    with open_slide(path) as slide:
        assert isinstance(slide, PlainImage)
        with pytest.raises(TileDecodeError, match=r"slide 'a.tif' level 0.*rows 64 to 127"):
            slide.read_region(0, 64, 0, (64, 64))
        np.testing.assert_array_equal(slide.read_region(0, 128, 0, (256, 64)), whole[128:])
        picture_, readable = slide.read_thumbnail(1.0)
        assert picture_.shape == (192, 256, 3)
        assert not readable.all()


def test_a_tile_that_was_left_out_is_background(tmp_path: Path):
    path, pixels = tmp_path / "a.tif", picture(width=256, height=192)
    extra = [(274, "H", 1, 3, True)]
    tifffile.imwrite(path, pixels, photometric="rgb", compression="zlib", tile=(64, 64), extratags=extra)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for tag in ("TileByteCounts", "TileOffsets"):
            values = list(tiff.pages[0].tags[tag].value)
            tiff.pages[0].tags[tag].overwrite([0 if i == 5 else value for i, value in enumerate(values)])
    expected = pixels.copy()
    expected[64:128, 64:128] = 255
    np.testing.assert_array_equal(shown(path), expected)


def test_a_file_cut_short_is_refused_at_opening(tmp_path: Path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(), photometric="rgb", compression="zlib", rowsperstrip=16, metadata=None)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 20])
    with pytest.raises(SlideUnreadableError, match="ends before"):
        open_slide(path)
