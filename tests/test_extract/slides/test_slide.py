"""Slides: scale and its source, pixels at an exact scale, and damage that stays where it is."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from extract.errors import MissingMppError, RecipeError, ScaleError, SlideUnreadableError, TileDecodeError
from extract.geometry import plan_read, resample_area, tile_grid
from extract.slides.slide import Slide
from extract.slides.tiff.direct import DirectReader
from extract.synthetic.pyramid import write_pyramid
from tests.test_extract.small import break_tile, tissue_image, write_slide


def whole_level(path: Path, level: int) -> np.ndarray:
    """All of a level as OpenSlide gives it, uint8 [h, w, 3]."""
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]


# ---------------------------------------------------------------- the scale


def test_mpp_comes_from_the_table_then_the_file_then_the_default(slide_file: Path, tmp_path: Path):
    with Slide(slide_file) as slide:
        assert slide.native_mpp() == (pytest.approx(0.5), "openslide.mpp")
        assert slide.native_mpp(default=0.25) == (pytest.approx(0.5), "openslide.mpp")
        assert slide.native_mpp(override=0.3, default=0.25) == (0.3, "slide table")
    with Slide(write_slide(tmp_path / "bare.tif", mpp=None)) as slide:
        assert slide.native_mpp() == (None, "missing")
        assert slide.native_mpp(default=0.25) == (0.25, "--default-mpp")
        assert slide.native_mpp(override=0.3, default=0.25) == (0.3, "slide table")


@pytest.mark.parametrize("dpi", [72, 96, 300, 600])
def test_a_printing_default_of_a_plain_tiff_is_no_scale(tmp_path: Path, dpi: int):
    file = tmp_path / "print.tif"
    tifffile.imwrite(
        file, tissue_image(300, 300), photometric="rgb", tile=(64, 64), resolution=(dpi, dpi), resolutionunit="INCH"
    )
    with Slide(file) as slide:
        assert slide.vendor == "generic-tiff"
        assert slide.native_mpp() == (None, "missing")
        assert slide.native_mpp(default=0.5)[1] == "--default-mpp"
        error = slide.missing_mpp()
    assert isinstance(error, MissingMppError)
    assert "printing default" in str(error)
    assert "--default-mpp" in str(error)


def test_a_coarse_scale_of_another_format_is_believed(slide_file: Path, with_properties: Callable):
    with_properties({"openslide.vendor": "dicom", "openslide.mpp-x": "57.9", "openslide.mpp-y": "57.9"})
    with Slide(slide_file) as slide:
        assert slide.native_mpp() == (57.9, "openslide.mpp")


def test_pixels_that_are_not_square_are_refused(slide_file: Path, with_properties: Callable):
    with_properties({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.6"})
    with Slide(slide_file, "odd one") as slide:
        with pytest.raises(ScaleError, match="odd one"):
            slide.native_mpp()
        assert slide.native_mpp(override=0.5) == (0.5, "slide table")


@pytest.mark.parametrize("text", ["nan", "0", "-1", "inf", "unknown", ""])
def test_a_senseless_mpp_property_is_missing(slide_file: Path, with_properties: Callable, text: str):
    with_properties({"openslide.mpp-x": text, "openslide.mpp-y": text})
    with Slide(slide_file) as slide:
        assert slide.native_mpp() == (None, "missing")


def test_a_senseless_mpp_property_can_be_reported(slide_file: Path, with_properties: Callable):
    with_properties({"openslide.mpp-x": "unknown", "openslide.mpp-y": "unknown"})
    with Slide(slide_file) as slide:
        assert isinstance(slide.missing_mpp(), MissingMppError)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("mpp", [0.25, 0.4, 0.55, 0.73, 1.0, 1.3])
def test_a_tile_is_the_area_resampling_of_the_whole_level(tmp_path: Path, mpp: float):
    file = tmp_path / "a.tif"
    # sides that every level divides: downsamples of exactly 2 and 4
    write_pyramid(file, tissue_image(640, 512), 0.25, levels=3, tile_px=64)
    with Slide(file) as slide:
        assert slide.downsamples == (1.0, 2.0, 4.0)
        plan = plan_read(0.25, slide.downsamples, mpp, 48)
        level = whole_level(file, plan.level)
        for x_l0, y_l0 in tile_grid((0, 0), slide.size_l0, plan, overlap_px=5).coords_l0():
            x, y, side = int(x_l0 / plan.downsample), int(y_l0 / plan.downsample), int(np.ceil(plan.tile_level - 1e-6))
            assert (x * plan.downsample, y * plan.downsample) == (x_l0, y_l0)
            cut = level[y : y + side, x : x + side]
            assert cut.shape == (side, side, 3)
            expected = resample_area(cut, plan.tile_level, 48) if plan.resampled else cut
            assert np.array_equal(slide.read_tile(int(x_l0), int(y_l0), plan), expected)


@pytest.mark.parametrize(("size", "downsample", "rounding"), [((901, 1201), 2, "floor"), ((801, 599), 4, "ceil")])
def test_a_tile_of_a_fractional_level_is_off_by_less_than_a_pixel(
    tmp_path: Path, size: tuple[int, int], downsample: int, rounding: str
):
    file = tmp_path / "a.tif"
    write_pyramid(file, tissue_image(*size), 0.25, levels=2, tile_px=64, downsample=downsample, rounding=rounding)
    with Slide(file) as slide:
        assert slide.downsamples[1] % 1 != 0
        plan = plan_read(0.25, slide.downsamples, 0.25 * slide.downsamples[1], 48)
        level = whole_level(file, 1)
        for x_l0, y_l0 in tile_grid((0, 0), slide.size_l0, plan).coords_l0():
            x, y = round(x_l0 / plan.downsample), round(y_l0 / plan.downsample)
            cut = level[y : y + 48, x : x + 48].astype(int)
            # OpenSlide blends neighbours there, so it is not exact; but it is nearer than any whole pixel's shift
            difference = np.abs(slide.read_tile(int(x_l0), int(y_l0), plan) - cut)
            assert difference.mean() < np.abs(np.roll(cut, 1, axis=0) - cut).mean() / 2
            assert difference.mean() < np.abs(np.roll(cut, 1, axis=1) - cut).mean() / 2


def test_bounds_are_the_scanned_area_and_are_kept_inside_the_slide(slide_file: Path, with_properties: Callable):
    with Slide(slide_file) as slide:
        assert slide.bounds_l0 == (0, 0, 400, 300)
    bounds = {"x": "37", "y": "21", "width": "200", "height": "900"}
    with_properties({f"openslide.bounds-{name}": value for name, value in bounds.items()})
    with Slide(slide_file) as slide:
        assert slide.bounds_l0 == (37, 21, 200, 279)
        thumbnail, readable = slide.read_thumbnail(1.0)
        assert np.array_equal(thumbnail, whole_level(slide_file, 0)[21:300, 37:237])
        assert readable.all()


def test_outside_the_slide_is_the_background_colour(slide_file: Path, with_properties: Callable):
    with Slide(slide_file) as slide:
        assert (slide.read_region(-20, 0, 0, (10, 10)) == 255).all()
    with_properties({"openslide.background-color": "102030"})
    with Slide(slide_file) as slide:
        region = slide.read_region(-20, 0, 0, (40, 10))
    assert (region[:, :20] == (0x10, 0x20, 0x30)).all()
    assert np.array_equal(region[:, 20:], whole_level(slide_file, 0)[:10, :20])


def test_half_transparent_pixels_are_mixed_with_the_background(
    slide_file: Path, with_properties: Callable, monkeypatch: pytest.MonkeyPatch
):
    with_properties({"openslide.background-color": "ff0080"})
    from PIL import Image

    pixel = Image.new("RGBA", (3, 3), (0, 200, 100, 51))
    monkeypatch.setattr(openslide.OpenSlide, "read_region", lambda *_: pixel)
    with Slide(slide_file) as slide:
        mixed = slide.read_region(0, 0, 0, (3, 3))
    assert (mixed == (204, 40, 122)).all()


# ---------------------------------------------------------------- thumbnails


@pytest.mark.parametrize("downsample", [1.0, 2.0, 3.7, 9.3, 40.0])
def test_a_thumbnail_has_the_asked_size_and_the_slides_mean(slide_file: Path, downsample: float):
    with Slide(slide_file) as slide:
        picture, readable = slide.read_thumbnail(downsample)
    assert picture.shape == (round(300 / downsample), round(400 / downsample), 3)
    assert readable.all()
    assert np.abs(picture.mean(axis=(0, 1)) - whole_level(slide_file, 0).mean(axis=(0, 1))).max() < 2.5


def test_a_thumbnail_read_in_blocks_is_the_one_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_slide(tmp_path / "a.tif", 640, 448, levels=1)
    with Slide(file) as slide:
        at_once, _ = slide.read_thumbnail(4.0)
        monkeypatch.setattr("extract.slides.slide_like._BLOCK_PX", 100)
        in_blocks, _ = slide.read_thumbnail(4.0)
    # Pillow picks the order of its two passes, each rounded, by the shape of the block
    assert np.abs(at_once.astype(int) - in_blocks).max() <= 1


def test_a_broken_block_costs_only_itself_in_the_thumbnail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_slide(tmp_path / "a.tif", 640, 448, levels=1)
    with Slide(file) as slide:
        whole, _ = slide.read_thumbnail(2.0)
    break_tile(file, 320, 192)
    monkeypatch.setattr("extract.slides.slide_like._BLOCK_PX", 128)
    with Slide(file) as slide:
        picture, readable = slide.read_thumbnail(2.0)
    # blocks of 128 px: the broken tile spans x 320..384, y 192..256
    expected = np.ones_like(readable)
    expected[64:128, 128:192] = False
    assert np.array_equal(readable, expected)
    assert np.array_equal(picture[readable], whole[readable])
    assert (picture[~readable] == 255).all()


# ---------------------------------------------------------------- damage


def test_a_broken_tile_is_an_error_and_its_neighbours_read_on(tmp_path: Path):
    file = write_slide(tmp_path / "a.tif", 640, 448)
    with Slide(file) as slide:
        plan = plan_read(0.5, slide.downsamples, 0.5, 64)
        coords = tile_grid((0, 0), slide.size_l0, plan).coords_l0()
        good = [slide.read_tile(int(x), int(y), plan) for x, y in coords]
    break_tile(file, 128, 192)
    with Slide(file, "hurt") as slide:
        for _ in range(2):
            for (x, y), tile in zip(coords, good, strict=True):
                if (x, y) == (128, 192):
                    with pytest.raises(TileDecodeError, match=r"hurt.*128, 192"):
                        slide.read_tile(int(x), int(y), plan)
                else:
                    assert np.array_equal(slide.read_tile(int(x), int(y), plan), tile)


def test_four_threads_on_a_broken_slide_get_the_pixels_of_the_whole_one(tmp_path: Path):
    file = write_slide(tmp_path / "a.tif", 640, 448)
    with Slide(file) as slide:
        plan = plan_read(0.5, slide.downsamples, 0.5, 50)
        coords = tile_grid((0, 0), slide.size_l0, plan, overlap_px=10).coords_l0()
        good = [slide.read_tile(int(x), int(y), plan) for x, y in coords]
    break_tile(file, 128, 192)
    hit = [78 < x < 192 and 142 < y < 256 for x, y in coords]

    with Slide(file) as slide, ThreadPoolExecutor(4) as pool:

        def read(i: int) -> np.ndarray | None:
            try:
                return slide.read_tile(int(coords[i, 0]), int(coords[i, 1]), plan)
            except TileDecodeError:
                return None

        order = np.random.default_rng(0).permutation(np.tile(np.arange(len(coords)), 4))
        for i, tile in zip(order, pool.map(read, order), strict=True):
            assert (tile is None) == hit[i]
            assert tile is None or np.array_equal(tile, good[i])
    assert 0 < sum(hit) < len(coords)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.svs", None, "no such file"),
        ("empty.svs", b"", "empty"),
        ("text.svs", b"not a slide at all", "no whole slide that OpenSlide reads"),
        ("häß lich 切片.tif", b"II*\0", "no whole slide that OpenSlide reads|does not open"),
    ],
)
def test_what_is_not_a_slide_is_an_error_with_a_fix(tmp_path: Path, name: str, content: bytes | None, message: str):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SlideUnreadableError, match=message) as caught:
        Slide(file)
    assert name in str(caught.value)
    assert str(caught.value).count("→") >= 2
    assert isinstance(caught.value, OSError)


def test_a_folder_is_not_a_slide(tmp_path: Path):
    with pytest.raises(SlideUnreadableError):
        Slide(tmp_path)


def test_a_path_with_spaces_and_other_letters_opens(tmp_path: Path):
    with Slide(write_slide(tmp_path / "Präparat 7 — 切片" / "é è.tif")) as slide:
        assert slide.size_l0 == (400, 300)


# ---------------------------------------------------------------- the two readers


def test_auto_reads_directly_where_the_sample_agrees(tmp_path: Path):
    file = write_slide(tmp_path / "a.tif", 640, 448)
    with Slide(file) as auto, Slide(file, reader="direct") as direct, Slide(file, reader="openslide") as plain:
        assert (auto.reader, auto.reader_note) == ("direct", "")
        assert (direct.reader, direct.reader_note) == ("direct", "")
        assert plain.reader == "openslide"
        assert plain.reader_note
        for mpp in (0.5, 0.7, 1.0):
            plan = plan_read(0.5, auto.downsamples, mpp, 50)
            for x, y in tile_grid((0, 0), auto.size_l0, plan, overlap_px=7).coords_l0().tolist():
                expected, out = plain.read_tile(x, y, plan), np.zeros((50, 50, 3), dtype=np.uint8)
                assert np.array_equal(auto.read_tile(x, y, plan), expected)
                assert auto.read_tile(x, y, plan, out=out) is out
                assert np.array_equal(out, expected)
                assert np.array_equal(plain.read_tile(x, y, plan, out=out), expected)


def test_the_choice_is_made_at_the_first_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    real = DirectReader.open
    monkeypatch.setattr(DirectReader, "open", lambda slide: opened.append(slide.name) or real(slide))
    with Slide(write_slide(tmp_path / "a.tif", 640, 448)) as slide, ThreadPoolExecutor(4) as pool:
        slide.native_mpp()
        assert opened == []
        list(pool.map(lambda x: slide.read_region(x, 0, 0, (64, 64)), range(0, 512, 32)))
        assert opened == ["a.tif"]


def test_pixels_that_differ_from_openslides_are_never_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_slide(tmp_path / "a.tif", 640, 448)
    with Slide(file, reader="openslide") as slide:
        expected = slide.read_region(30, 40, 0, (100, 100))
    read = DirectReader.read_region

    def off_by_one(self: DirectReader, *place: object) -> np.ndarray | None:
        pixels = read(self, *place)  # type: ignore[arg-type]
        return pixels if pixels is None else pixels ^ 1

    monkeypatch.setattr(DirectReader, "read_region", off_by_one)
    with Slide(file) as slide:
        assert slide.reader == "openslide"
        assert "differ" in slide.reader_note
        assert np.array_equal(slide.read_region(30, 40, 0, (100, 100)), expected)
    with pytest.raises(SlideUnreadableError, match=r"'hurt'.*differ.*→.*→"):
        Slide(file, "hurt", reader="direct")


def test_a_damaged_tile_in_the_sample_does_not_decide(tmp_path: Path):
    file = write_slide(tmp_path / "a.tif", 640, 448)
    with Slide(file) as slide:
        places = [place[:2] for place in DirectReader.open(slide).sample() if place[2] == 0]
    for x, y in places[:-1]:
        break_tile(file, x, y)
    with Slide(file) as slide:
        assert slide.reader == "direct"
        with pytest.raises(TileDecodeError):
            slide.read_region(*places[0], 0, (64, 64))


def test_a_level_that_could_not_be_compared_stays_with_openslide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_slide(tmp_path / "a.tif", 640, 448)
    sample = DirectReader.sample
    monkeypatch.setattr(DirectReader, "sample", lambda self: (place for place in sample(self) if place[2] == 0))
    levels: list[int] = []
    read = DirectReader.read_region
    with Slide(file) as slide:
        assert slide.reader == "direct"
        monkeypatch.setattr(DirectReader, "read_region", lambda *a: levels.append(a[3]) or read(*a))
        slide.read_region(0, 0, 0, (64, 64))
        slide.read_region(0, 0, 1, (64, 64))
    assert levels == [0]


def test_a_slide_can_still_be_read_after_it_was_closed(tmp_path: Path):
    slide = Slide(write_slide(tmp_path / "a.tif", 640, 448))
    before = slide.read_region(64, 64, 0, (64, 64))
    slide.close()
    assert np.array_equal(slide.read_region(64, 64, 0, (64, 64)), before)
    assert slide.reader == "direct"
    slide.close()


def test_an_unknown_reader_is_an_error(slide_file: Path):
    with pytest.raises(RecipeError, match=r"'fast'.*auto, direct, openslide"):
        Slide(slide_file, reader="fast")


# ---------------------------------------------------------------- real files


def test_real_slides_open_with_their_scale(data_folder: Path):
    slides = data_folder / "slides"
    for name, vendor, size, mpp in (
        ("CMU-1-Small-Region.svs", "aperio", (2220, 2967), 0.499),
        ("test3-DAPI-2-387.ndpi", "hamamatsu", (3968, 4864), 0.228),
        ("ezwsi_multiframe_camelyon.dcm", "dicom", (1152, 700), 28.97),
    ):
        with Slide(slides / name) as slide:
            assert (slide.vendor, slide.size_l0) == (vendor, size)
            native, source = slide.native_mpp()
            assert native == pytest.approx(mpp, rel=0.005)
            assert source == "openslide.mpp"


def test_real_broken_slides_are_errors(data_folder: Path):
    for name in ("broken.svs", "unopenable.tiff"):
        with pytest.raises(SlideUnreadableError, match=name):
            Slide(data_folder / "slides" / "broken" / name)


def test_of_the_properties_only_those_by_name_are_read(tmp_path: Path, with_properties: Callable, monkeypatch):
    with_properties({"tiff.ImageDescription": "Patient = Doe, Jane", "aperio.Patient": "Doe", "openslide.mpp-x": "0.3"})
    with Slide(write_slide(tmp_path / "a.tif", mpp=None)) as slide:
        kept = repr(vars(slide))
    assert "Doe" not in kept
    assert "0.3" in kept


def test_a_thumbnail_is_the_same_by_either_reader(tmp_path: Path):
    file = write_slide(tmp_path / "a.tif", 1640, 1248, levels=3)
    with Slide(file, reader="direct") as direct, Slide(file, reader="openslide") as plain:
        for downsample in (1.0, 2.0, 3.7, 4.0, 11.3):
            (one, seen), (other, also_seen) = direct.read_thumbnail(downsample), plain.read_thumbnail(downsample)
            assert np.array_equal(one, other)
            assert np.array_equal(seen, also_seen)
