"""Plain images: the same pixels as the file's, no scale of their own, and nothing strange taken for an image."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from extract.errors import MissingMppError, SlideUnreadableError, TileDecodeError
from extract.geometry import plan_read
from extract.slides import pictures as pictures_module
from extract.slides.image import PlainImage
from extract.slides.opening import open_slide
from extract.slides.slide import Slide
from tests.test_extract.small import tissue_image, write_slide


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    """Write pixels with Pillow, in the format that the name says."""
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def pixels() -> np.ndarray:
    """An RGB picture uint8 [97, 131, 3]."""
    return tissue_image(131, 97, margin=10)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.tif", "a.TIFF", "a.JPG"])
def test_pixels_are_those_of_the_file(tmp_path: Path, pixels: np.ndarray, name: str):
    options = {"lossless": True} if name.endswith("webp") else {}
    file = save(tmp_path / name, pixels, **options)
    with open_slide(file) as image:
        assert isinstance(image, PlainImage)
        assert image.size_l0 == (131, 97)
        assert image.bounds_l0 == (0, 0, 131, 97)
        read = image.read_region(0, 0, 0, (131, 97))
    if name.endswith("JPG"):
        pixels = np.asarray(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(read, pixels)


def test_a_tile_is_the_same_as_that_of_a_pyramid_of_the_same_pixels(tmp_path: Path):
    with Slide(write_slide(tmp_path / "slide.tif", levels=1)) as slide:
        pixels = slide.read_region(0, 0, 0, slide.size_l0)
        with PlainImage(save(tmp_path / "plain.png", pixels)) as plain:
            for mpp in (0.5, 0.83):
                plan = plan_read(0.5, plain.downsamples, mpp, 64)
                out = np.empty((64, 64, 3), dtype=np.uint8)
                for x, y in [(0, 0), (100, 37), (336, 236)]:
                    expected = slide.read_tile(x, y, plan)
                    np.testing.assert_array_equal(plain.read_tile(x, y, plan), expected)
                    assert plain.read_tile(x, y, plan, out) is out
                    np.testing.assert_array_equal(out, expected)
            picture, readable = plain.read_thumbnail(4.0)
            np.testing.assert_array_equal(picture, slide.read_thumbnail(4.0)[0])
            assert readable.all()


def test_what_lies_outside_is_white(tmp_path: Path, pixels: np.ndarray):
    with PlainImage(save(tmp_path / "a.png", pixels)) as image:
        region = image.read_region(-5, 90, 0, (20, 20))
        np.testing.assert_array_equal(region[:7, 5:], pixels[90:, :15])
        assert (region[7:] == 255).all()
        assert (region[:, :5] == 255).all()
        assert (image.read_region(500, 500, 0, (3, 2)) == 255).all()
        with pytest.raises(TileDecodeError):
            image.read_region(0, 0, 1, (3, 2))


def test_grey_and_palette_become_rgb(tmp_path: Path, pixels: np.ndarray):
    grey = pixels[..., 0]
    for name in ("grey.png", "grey.tif"):
        with open_slide(save(tmp_path / name, grey)) as image:
            np.testing.assert_array_equal(image.read_region(0, 0, 0, (131, 97)), np.stack([grey] * 3, axis=2))
    palette = Image.fromarray(pixels).quantize(16)
    palette.save(tmp_path / "palette.png")
    with open_slide(tmp_path / "palette.png") as image:
        np.testing.assert_array_equal(image.read_region(0, 0, 0, (131, 97)), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_transparency_becomes_white(tmp_path: Path, pixels: np.ndarray, name: str):
    alpha = np.zeros((97, 131), dtype=np.uint8)
    alpha[:, 40:80], alpha[:, 80:] = 128, 255
    with open_slide(save(tmp_path / name, np.dstack([pixels, alpha]))) as image:
        read = image.read_region(0, 0, 0, (131, 97))
    assert (read[:, :40] == 255).all()
    np.testing.assert_array_equal(read[:, 80:], pixels[:, 80:])
    half = (pixels[:, 40:80] * 128.0 + 255 * 127) / 255
    assert np.abs(read[:, 40:80] - half).max() <= 1


def test_a_tiff_in_planes_is_read(tmp_path: Path, pixels: np.ndarray):
    tifffile.imwrite(
        tmp_path / "a.tif", np.moveaxis(pixels, -1, 0), photometric="rgb", planarconfig="separate", compression="zlib"
    )
    with open_slide(tmp_path / "a.tif") as image:
        np.testing.assert_array_equal(image.read_region(0, 0, 0, (131, 97)), pixels)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_an_orientation_is_not_applied_and_this_is_said(tmp_path: Path, pixels: np.ndarray, name: str):
    plain = save(tmp_path / f"plain-{name}", pixels)
    exif = Image.Exif()
    exif[274] = 6
    turned = save(tmp_path / name, pixels, exif=exif)
    with open_slide(turned) as image, open_slide(plain) as reference:
        assert image.size_l0 == (131, 97)
        assert "orientation 6" in image.reader_note
        assert reference.reader_note == ""
        np.testing.assert_array_equal(image.read_region(0, 0, 0, (131, 97)), reference.read_region(0, 0, 0, (131, 97)))


def test_threads_share_one_decoding(tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    decoded, decode = [], pictures_module._decode
    monkeypatch.setattr(pictures_module, "_decode", lambda path, size: decoded.append(path) or decode(path, size))
    with PlainImage(save(tmp_path / "a.png", pixels)) as image, ThreadPoolExecutor(8) as pool:
        assert decoded == []
        regions = list(pool.map(lambda x: image.read_region(x, 0, 0, (32, 32)), range(64)))
        assert len(decoded) == 1
    for x, region in enumerate(regions):
        np.testing.assert_array_equal(region, pixels[:32, x : x + 32])


# ---------------------------------------------------------------- the scale


@pytest.mark.parametrize(("name", "dpi"), [("a.png", 50_800), ("a.jpg", 50_800), ("a.tif", 300)])
def test_what_printers_and_screens_want_is_no_scale(tmp_path: Path, pixels: np.ndarray, name: str, dpi: int):
    with open_slide(save(tmp_path / name, pixels, dpi=(dpi, dpi))) as image:
        assert image.native_mpp() == (None, "missing")
        assert image.native_mpp(default=0.5) == (0.5, "--default-mpp")
        assert image.native_mpp(override=0.25, default=0.5) == (0.25, "slide table")
        error = image.missing_mpp()
    assert isinstance(error, MissingMppError)
    assert all(word in str(error) for word in (name, "--default-mpp", "--native", "mpp column"))


def test_a_default_never_wins_over_what_a_tiff_in_strips_says(tmp_path: Path, pixels: np.ndarray):
    with open_slide(save(tmp_path / "a.tif", pixels, dpi=(50_800, 50_800))) as image:
        assert image.native_mpp(default=0.25) == (0.5, "TIFF resolution")
        assert image.native_mpp(override=1.0) == (1.0, "slide table")


# ---------------------------------------------------------------- what opens what


def test_a_tiff_that_openslide_knows_is_a_slide(tmp_path: Path, slide_file: Path):
    with open_slide(slide_file) as slide:
        assert isinstance(slide, Slide)
    with open_slide(slide_file, "case 1", reader="openslide") as slide:
        assert (slide.name, slide.reader) == ("case 1", "openslide")


def test_a_slide_that_openslide_finds_damaged_is_never_a_plain_image(data_folder: Path, tmp_path: Path):
    file = tmp_path / "a.tif"
    file.write_bytes((data_folder / "slides" / "broken" / "unopenable.tiff").read_bytes())
    with pytest.raises(SlideUnreadableError, match="does not open"):
        open_slide(file)


def test_a_truncated_pyramid_is_never_a_plain_image(slide_file: Path, tmp_path: Path):
    whole = slide_file.read_bytes()
    for part in (10, 100, 1000, len(whole) // 2, len(whole) - 20):
        file = tmp_path / f"{part}.tif"
        file.write_bytes(whole[:part])
        try:
            with open_slide(file) as slide:
                assert isinstance(slide, Slide)
        except SlideUnreadableError:
            pass


@pytest.mark.parametrize("name", ["absent.png", "absent.tif", "absent.svs"])
def test_an_absent_or_empty_file_is_said_to_be_so(tmp_path: Path, name: str):
    with pytest.raises(SlideUnreadableError, match="no such file"):
        open_slide(tmp_path / name)
    (tmp_path / name).touch()
    with pytest.raises(SlideUnreadableError, match="empty"):
        open_slide(tmp_path / name)


# ---------------------------------------------------------------- refusals


def write_refused(path: Path, kind: str) -> Path:
    """A file that is no plain 8-bit image."""
    grey = np.arange(6000, dtype=np.uint16).reshape(60, 100)
    if kind == "16-bit.png":
        return save(path, grey)
    if kind == "cmyk.jpg":
        Image.new("CMYK", (60, 40)).save(path)
    elif kind == "frames.webp":
        frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "green")]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "16-bit.tif":
        tifffile.imwrite(path, grey)
    elif kind == "pages.tif":
        tifffile.imwrite(path, np.zeros((3, 40, 60, 3), dtype=np.uint8), photometric="rgb")
    elif kind == "cmyk.tif":
        Image.new("CMYK", (60, 40)).save(path)
    elif kind == "text.png":
        path.write_text("this is no image")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("16-bit.png", "I;16"),
        ("cmyk.jpg", "CMYK"),
        ("frames.webp", "2 frames"),
        ("16-bit.tif", "16 bits"),
        ("pages.tif", "3 pages"),
        ("cmyk.tif", "separated"),
        ("text.png", "cannot identify"),
    ],
)
def test_what_is_no_plain_image_is_refused_with_the_reason(tmp_path: Path, kind: str, message: str):
    with pytest.raises(SlideUnreadableError, match=message) as caught:
        open_slide(write_refused(tmp_path / kind, kind))
    assert kind in str(caught.value)
    assert str(caught.value).count("→") == 2


def png_header(width: int, height: int) -> bytes:
    """A PNG of any stated size whose pixels are almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(12_000, 12_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int]):
    (tmp_path / "a.png").write_bytes(png_header(*size))
    with pytest.raises(SlideUnreadableError, match="pixels"):
        open_slide(tmp_path / "a.png")


def test_the_limit_of_pixels_is_exact(tmp_path: Path, pixels: np.ndarray):
    file = save(tmp_path / "a.png", pixels)
    PlainImage(file, max_pixels=131 * 97).close()
    with pytest.raises(SlideUnreadableError, match="131 x 97"):
        PlainImage(file, max_pixels=131 * 97 - 1)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "deflate.tif", "lzw.tif", "jpeg.tif", "a.bmp", "a.webp"])
def test_a_truncated_image_is_an_error_and_not_part_of_a_picture(tmp_path: Path, pixels: np.ndarray, name: str):
    file = tmp_path / name
    if name.endswith(".tif") and name != "a.tif":
        tifffile.imwrite(file, pixels, photometric="rgb", compression=file.stem, rowsperstrip=16)
    else:
        save(file, pixels)
    whole = file.read_bytes()
    for part in (5, 60, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:part])
        with pytest.raises(SlideUnreadableError, match=name):
            open_slide(file).read_thumbnail(1.0)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_damage_never_ends_in_another_error(tmp_path: Path, pixels: np.ndarray, name: str, rng: np.random.Generator):
    whole = bytearray(
        save(tmp_path / name, pixels, **({"compression": "tiff_lzw"} if "tif" in name else {})).read_bytes()
    )
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 8):
            damaged[place] = rng.integers(0, 256)
        # the first and last bytes hold the structure
        damaged[int(rng.integers(0, 200))] = damaged[-int(rng.integers(1, 200))] = int(rng.integers(0, 256))
        (tmp_path / name).write_bytes(damaged)
        try:
            with open_slide(tmp_path / name) as image:
                picture, _ = image.read_thumbnail(1.0)
                assert picture.shape == (image.size_l0[1], image.size_l0[0], 3)
        except SlideUnreadableError:
            pass


def test_a_missing_strip_is_an_error_and_not_black(tmp_path: Path, pixels: np.ndarray):
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, pixels, photometric="rgb", compression="deflate", rowsperstrip=16)
    with tifffile.TiffFile(file, mode="r+b") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        tiff.pages[0].tags["StripByteCounts"].overwrite([0, *counts[1:]])
    with pytest.raises(SlideUnreadableError, match="ends before"):
        open_slide(file)


def test_the_pages_of_a_tiled_file_are_what_openslide_shows(tmp_path: Path):
    file = write_slide(tmp_path / "a.tif", levels=3)
    with PlainImage(file, vendor="generic-tiff") as image, Slide(file, reader="openslide") as slide:
        assert (image.level_sizes, image.downsamples) == (slide.level_sizes, slide.downsamples)
        for level, size in enumerate(slide.level_sizes):
            np.testing.assert_array_equal(image.read_region(0, 0, level, size), slide.read_region(0, 0, level, size))


def test_a_broken_image_fails_once_and_then_at_once(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    file = save(tmp_path / "a.png", pixels)
    file.write_bytes(file.read_bytes()[:-400])
    image = open_slide(file)
    with pytest.raises(SlideUnreadableError):
        image.read_thumbnail(2.0)
    monkeypatch.setattr(pictures_module, "_decode", lambda path, size: pytest.fail("decoded again"))
    with pytest.raises(SlideUnreadableError, match=r"a\.png"):
        image.read_region(0, 0, 0, (8, 8))


def test_real_fields_as_png_give_the_pixels_of_the_slide(data_folder: Path, tmp_path: Path):
    for file in sorted((data_folder / "glas").glob("*.tif"))[:3]:
        with Slide(file) as slide:
            pixels = slide.read_region(0, 0, 0, slide.size_l0)
            with open_slide(save(tmp_path / f"{file.stem}.png", pixels)) as image:
                plan = plan_read(slide.native_mpp()[0], (1.0,), 1.0, 128)
                np.testing.assert_array_equal(image.read_tile(50, 40, plan), slide.read_tile(50, 40, plan))
