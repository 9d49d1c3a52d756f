"""The direct reader: every pixel is OpenSlide's, or OpenSlide is asked, or it is an error."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.bench_reading import split_tables
from extract.errors import ExtractError, SlideUnreadableError, TileDecodeError
from extract.slides.slide import Slide
from extract.slides.tiff.direct import DirectReader
from extract.slides.tiff.tile_cache import TileCache
from extract.slides.tiff.tile_grid import NotDirectError, find_grids
from tests.test_extract.small import break_tile, tissue_image, write_slide

APERIO = "Aperio Image Library v11.2.1\r\n{width}x{height} (256x256) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"


def encode(tile: np.ndarray, colour_space: str, subsampling: str, quality: int = 70) -> bytes:
    """A JPEG stream without the marker that tells its colour space, as scanners write it."""
    data = imagecodecs.jpeg8_encode(
        tile, level=quality, colorspace="RGB", outcolorspace=colour_space, subsampling=subsampling, optimize=False
    )
    return b"\xff\xd8" + b"".join(part for part in segments(data) if part[1] not in (0xE0, 0xEE))


def segments(data: bytes) -> Iterator[bytes]:
    """The marker segments of a JPEG stream after its start; the last one is the scan with the end marker."""
    at = 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at:end]
        at = end
    yield data[at:]


def write_tiff(
    path: Path,
    levels: list[np.ndarray],
    tile: tuple[int, int] = (64, 48),
    colour_space: str = "YCBCR",
    subsampling: str = "420",
    tables: bool = False,
    aperio: bool = False,
    missing: Callable[[int, int], bool] = lambda level, index: False,
    **writer: object,
) -> Path:
    """A tiled JPEG pyramid; ``missing(level, index)`` says which tiles it leaves out."""
    height, width = tile[1], tile[0]
    with tifffile.TiffWriter(path, **writer) as file:  # type: ignore[arg-type]
        for level, image in enumerate(levels):
            corners = [(y, x) for y in range(0, image.shape[0], height) for x in range(0, image.shape[1], width)]
            streams: list[bytes] = []
            for y, x in corners:
                cut = image[y : y + height, x : x + width]
                cut = np.pad(cut, ((0, height - cut.shape[0]), (0, width - cut.shape[1]), (0, 0)), mode="reflect")
                streams.append(encode(cut, colour_space, subsampling))
            shared = split_tables(streams[0])[1] if tables else None
            streams = [split_tables(each)[0] if tables else each for each in streams]
            file.write(
                iter(b"" if missing(level, i) else each for i, each in enumerate(streams)),
                shape=image.shape,
                dtype=np.uint8,
                tile=(height, width),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"outcolorspace": colour_space},  # only makes the photometric tag
                subsampling={"444": (1, 1), "422": (2, 1), "420": (2, 2)}[subsampling],
                jpegtables=shared,
                subfiletype=0 if aperio else int(level > 0),
                description=APERIO.format(width=image.shape[1], height=image.shape[0]) if aperio else None,
                metadata=None,
            )
    return path


def pyramid(width: int, height: int, downsamples: tuple[int, ...] = (1, 2, 4), seed: int = 0) -> list[np.ndarray]:
    """Levels of noise over tissue, so that no two places look alike."""
    image = tissue_image(width, height, seed, margin=0)
    image ^= np.random.default_rng(seed).integers(0, 32, image.shape, dtype=np.uint8)
    return [np.ascontiguousarray(image[: height // ds * ds : ds, : width // ds * ds : ds]) for ds in downsamples]


def reference(slide: Slide, *place: object) -> np.ndarray | None:
    """What OpenSlide gives, or None where it gives up."""
    try:
        return slide._read_openslide(*place)  # type: ignore[arg-type]
    except TileDecodeError:
        return None


# ---------------------------------------------------------------- identity


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_region_has_the_pixels_of_openslide(tmp_path: Path, data: st.DataObject):
    draw = data.draw
    width, height = draw(st.integers(65, 330), "width"), draw(st.integers(65, 330), "height")
    space = draw(st.sampled_from(["RGB", "YCBCR"]), "colour space")
    gaps = draw(st.sets(st.integers(0, 30), max_size=4), "missing tiles")
    path = write_tiff(
        tmp_path / "a.tif",
        pyramid(width, height, draw(st.sampled_from([(1,), (1, 2), (1, 2, 4), (1, 3)]), "downsamples")),
        tile=(draw(st.sampled_from([16, 48, 64])), draw(st.sampled_from([16, 32, 64]))),
        colour_space=space,
        subsampling="444" if space == "RGB" else draw(st.sampled_from(["420", "422", "444"])),
        tables=draw(st.booleans(), "tables"),
        aperio=draw(st.booleans(), "aperio"),
        missing=lambda level, index: index in gaps and index > 0,
        bigtiff=draw(st.booleans(), "big"),
    )
    served = 0
    with Slide(path) as slide:
        direct = DirectReader.open(slide, cache_bytes=draw(st.sampled_from([0, 20_000, 1 << 20])))
        for _ in range(12):
            level = draw(st.integers(0, len(slide.level_sizes) - 1))
            step = draw(st.sampled_from([1, 16, 64]))
            x, y = (draw(st.integers(-90, 350)) // step * step for _ in range(2))
            x, y = (round(v * slide.downsamples[level]) for v in (x, y))
            place = (x, y, level, (draw(st.integers(1, 200)), draw(st.integers(1, 200))))
            expected, got = reference(slide, *place), direct.read_region(*place)
            assert np.array_equal(slide.read_region(*place), expected)
            if got is not None:
                served += 1
                assert np.array_equal(got, expected)
                out = np.zeros_like(got)
                assert direct.read_region(*place, out=out) is out
                assert np.array_equal(out, expected)
        direct.close()
        if not gaps:
            assert served > 0
            assert slide.reader == "direct"


@pytest.mark.parametrize("aperio", [False, True])
@pytest.mark.parametrize("space", ["RGB", "YCBCR"])
def test_every_source_tile_of_every_level_is_served(tmp_path: Path, space: str, aperio: bool):
    path = write_tiff(
        tmp_path / "a.svs", pyramid(300, 236), colour_space=space, subsampling="444", tables=True, aperio=aperio
    )
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].photometric.name == space
    with Slide(path, reader="direct") as slide:
        assert slide.vendor == ("aperio" if aperio else "generic-tiff")
        assert (slide.reader, slide.reader_note) == ("direct", "")
        direct = DirectReader.open(slide)
        for level, (width, height) in enumerate(slide.level_sizes):
            for y in range(0, height, 48):
                for x in range(0, width, 64):
                    place = (x * 2**level, y * 2**level, level, (64, 48))
                    got = direct.read_region(*place)
                    assert got is not None
                    assert np.array_equal(got, reference(slide, *place))
        direct.close()


def test_the_colour_space_of_the_tag_is_honoured(tmp_path: Path):
    image = pyramid(128, 96, (1,))
    rgb, ycbcr = (
        Slide(write_tiff(tmp_path / f"{space}.tif", image, colour_space=space, subsampling="444"), reader="direct")
        for space in ("RGB", "YCBCR")
    )
    for slide in (rgb, ycbcr):
        assert np.abs(slide.read_region(0, 0, 0, (128, 96)).astype(int) - image[0]).mean() < 12
        slide.close()


def test_between_the_pixels_of_a_level_openslide_reads(tmp_path: Path):
    with Slide(write_tiff(tmp_path / "a.tif", pyramid(301, 237))) as slide:
        direct = DirectReader.open(slide)
        assert slide.downsamples[1] % 1 != 0
        assert direct.read_region(0, 0, 1, (20, 20)) is not None
        assert direct.read_region(101, 0, 1, (20, 20)) is None
        assert direct.read_region(0, 101, 1, (20, 20)) is None
        assert np.array_equal(slide.read_region(101, 33, 1, (20, 20)), reference(slide, 101, 33, 1, (20, 20)))
        direct.close()


def test_a_region_too_large_for_one_read_is_openslides(tmp_path: Path):
    with Slide(write_tiff(tmp_path / "a.tif", pyramid(128, 96, (1,)))) as slide:
        direct = DirectReader.open(slide)
        assert direct.read_region(0, 0, 0, (4096, 1)) is not None
        assert direct.read_region(0, 0, 0, (4097, 1)) is None
        direct.close()


def test_missing_tiles_are_left_to_openslide(tmp_path: Path):
    path = write_tiff(tmp_path / "a.svs", pyramid(300, 236), aperio=True, missing=lambda level, index: index == 6)
    with Slide(path) as slide:
        direct = DirectReader.open(slide)
        assert slide.reader == "direct"
        for level in range(2):
            place = (64 * 2**level, 48 * 2**level, level, (64, 48))
            expected = reference(slide, *place)
            assert expected is not None
            assert np.array_equal(slide.read_region(*place), expected)
        assert direct.read_region(64, 48, 0, (64, 48)) is None
        assert direct.read_region(0, 0, 0, (64, 48)) is not None
        # an Aperio level made from one with missing tiles is not read as it is
        assert direct.read_region(0, 0, 1, (64, 48)) is None
        direct.close()


def test_the_background_colour_fills_what_lies_outside(tmp_path: Path, with_properties: Callable):
    with_properties({"openslide.background-color": "102030"})
    with Slide(write_tiff(tmp_path / "a.tif", pyramid(128, 96, (1,))), reader="direct") as slide:
        region = slide.read_region(-10, -10, 0, (160, 130))
        assert np.array_equal(region, reference(slide, -10, -10, 0, (160, 130)))
    assert (region[:10] == (0x10, 0x20, 0x30)).all()


def test_real_slides_are_read_directly_and_the_same(data_folder: Path):
    paths = [data_folder / "slides" / "CMU-1-Small-Region.svs", *sorted((data_folder / "glas").glob("*.tif"))[:3]]
    rng = np.random.default_rng(0)
    for path in filter(Path.exists, paths):
        with Slide(path, reader="direct") as slide:
            for level in (0, len(slide.level_sizes) - 1):
                for _ in range(12):
                    corner = rng.integers(-50, slide.size_l0, 2)
                    place = (int(corner[0]), int(corner[1]), level, (int(rng.integers(1, 400)), 256))
                    assert np.array_equal(slide.read_region(*place), reference(slide, *place))
    for name in ("test3-DAPI-2-387.ndpi", "ezwsi_multiframe_camelyon.dcm"):
        with Slide(data_folder / "slides" / name) as slide:
            assert slide.reader == "openslide"
            assert slide.reader_note


# ---------------------------------------------------------------- the choice


def test_what_is_no_plain_grid_says_why(slide_file: Path, tmp_path: Path, with_properties: Callable):
    image = tissue_image(200, 150)
    cases: dict[str, dict[str, object]] = {
        "compression": {"compression": "zlib"},
        "planar": {"planarconfig": "separate", "compression": "zlib"},
    }
    for what, how in cases.items():
        pixels = np.moveaxis(image, 2, 0) if what == "planar" else image
        tifffile.imwrite(tmp_path / "b.tif", pixels, photometric="rgb", tile=(64, 64), metadata=None, **how)
        with Slide(tmp_path / "b.tif") as slide:
            assert slide.reader == "openslide"
            assert what in slide.reader_note or "compression" in slide.reader_note
            assert np.array_equal(slide.read_region(0, 0, 0, (200, 150)), image)
    with_properties({"openslide.vendor": "philips"})
    with Slide(slide_file) as slide:
        assert "philips" in slide.reader_note


def test_two_pages_of_one_size_are_ambiguous(tmp_path: Path):
    levels = pyramid(200, 150, (1,))
    path = write_tiff(tmp_path / "a.tif", levels * 2)
    with Slide(path) as slide, pytest.raises(NotDirectError, match="2 tiled TIFF pages"):
        DirectReader.open(slide)


def test_a_chain_of_pages_without_end_is_refused(slide_file: Path, monkeypatch: pytest.MonkeyPatch):
    class Endless:
        pages = property(lambda self: self)

        def __init__(self, path: Path) -> None: ...
        def __enter__(self) -> object:
            return self

        def __exit__(self, *error: object) -> None: ...
        def __getitem__(self, index: int) -> object:
            return SimpleNamespace(is_tiled=False)

    monkeypatch.setattr(tifffile, "TiffFile", Endless)
    with Slide(slide_file) as slide, pytest.raises(NotDirectError, match="more than 256 TIFF pages"):
        find_grids(slide)


def test_huge_source_tiles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("extract.slides.tiff.tile_grid._MAX_TILE_PX", 63)
    with Slide(write_tiff(tmp_path / "a.tif", pyramid(200, 150, (1,)))) as slide:
        assert slide.reader == "openslide"
        assert "64 x 48" in slide.reader_note


# ---------------------------------------------------------------- the sample


def test_the_sample_meets_every_level_its_edges_and_its_tissue(tmp_path: Path):
    levels = pyramid(400, 300)
    levels[0][:200, :] = 255
    with Slide(write_tiff(tmp_path / "a.tif", levels)) as slide:
        direct = DirectReader.open(slide)
        places = list(direct.sample())
        assert len(set(places)) == len(places)
        assert [place[2] for place in places[:3]] == [0, 1, 2]
        by_level = [[place[:2] for place in places if place[2] == level] for level in range(3)]
        assert [len(corners) for corners in by_level] == [4, 2, 2]
        assert (384, 288) in by_level[0]
        # half of the sample lies on the tissue, in the lower third
        assert sum(y >= 192 for _, y in by_level[0]) >= 2
        direct.close()


# ---------------------------------------------------------------- damage


def patched(path: Path, x_l0: int, y_l0: int, change: Callable[[bytearray], object]) -> Path:
    """Change the compressed level-0 TIFF tile at (x, y)."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        index = (y_l0 // page.tilelength) * -(-page.imagewidth // page.tilewidth) + x_l0 // page.tilewidth
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    raw = bytearray(path.read_bytes())
    data = raw[offset : offset + count]
    change(data)
    raw[offset : offset + count] = data[:count]
    path.write_bytes(raw)
    return path


def resize_frame(data: bytearray) -> None:
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xdc\xff\xdc"


def cut_half(data: bytearray) -> None:
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [(resize_frame, "65500 x 65500"), (lambda data: data.__setitem__(0, 0), "no JPEG")],
)
def test_a_tile_that_is_not_what_the_file_says_is_an_error_that_names_slide_and_place(
    tmp_path: Path, change: Callable, problem: str
):
    path = write_tiff(tmp_path / "a.tif", pyramid(300, 236))
    with Slide(path) as slide:
        whole = slide.read_region(128, 0, 0, (64, 48))
    patched(path, 64, 48, change)
    with Slide(path, "hurt") as slide:
        assert slide.reader == "direct"
        for place in ((64, 48, 0, (64, 48)), (40, 40, 0, (64, 48))):
            with pytest.raises(TileDecodeError, match=rf"'hurt' at \(64, 48\) level 0: got .*{problem}.* → .* → "):
                slide.read_region(*place)
            assert reference(slide, *place) is None
        assert np.array_equal(slide.read_region(128, 0, 0, (64, 48)), whole)


def test_a_tile_cut_short_is_left_to_openslide_which_raises(tmp_path: Path):
    path = patched(write_tiff(tmp_path / "a.tif", pyramid(300, 236)), 64, 48, cut_half)
    with Slide(path, "hurt") as slide:
        direct = DirectReader.open(slide)
        assert direct.read_region(64, 48, 0, (64, 48)) is None
        direct.close()
        with pytest.raises(TileDecodeError, match=r"'hurt' at \(64, 48\) level 0"):
            slide.read_region(64, 48, 0, (64, 48))


@pytest.mark.parametrize(("field", "value"), [("TileOffsets", 1 << 31), ("TileByteCounts", 1 << 31)])
def test_offsets_and_counts_beyond_the_file_are_errors(tmp_path: Path, field: str, value: int):
    path = write_tiff(tmp_path / "a.tif", pyramid(300, 236))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages[0].tags[field]
        tag.overwrite([value if i == 6 else v for i, v in enumerate(tag.value)])
    with Slide(path) as slide:
        assert slide.reader == "direct"
        with pytest.raises(TileDecodeError, match="bytes at"):
            slide.read_region(64, 48, 0, (64, 48))
        assert reference(slide, 64, 48, 0, (64, 48)) is None


def test_a_file_cut_short_after_opening_is_an_error(tmp_path: Path):
    path = write_tiff(tmp_path / "a.tif", pyramid(300, 236))
    with Slide(path, reader="direct") as slide:
        os.truncate(path, path.stat().st_size // 4)
        with pytest.raises(SlideUnreadableError, match="run the same command again"):
            slide.read_region(0, 0, 2, (64, 48))


def test_a_failing_disk_is_the_slides_fault_and_no_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with Slide(write_tiff(tmp_path / "a.tif", pyramid(300, 236)), reader="direct") as slide:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(SlideUnreadableError, match="Input/output error"):
            slide.read_region(0, 0, 0, (64, 64))


@pytest.mark.parametrize("place", [(-64, 0), (0, -48), (-64, -48), (-640, 0)])
def test_what_lies_before_the_slide_is_background(tmp_path: Path, place: tuple[int, int]):
    with Slide(write_tiff(tmp_path / "a.tif", pyramid(300, 236), tile=(64, 48)), reader="direct") as slide:
        assert np.array_equal(slide.read_region(*place, 0, (64, 48)), reference(slide, *place, 0, (64, 48)))


def test_no_flipped_bit_of_a_tile_gives_other_pixels_than_openslide(tmp_path: Path):
    """Where OpenSlide gives up at a warning of libjpeg, so does the direct reader."""
    rng = np.random.default_rng(0)
    clean = write_tiff(tmp_path / "a.tif", pyramid(130, 100, (1,)), tile=(64, 64)).read_bytes()
    same = refused = garbage = 0
    for trial in range(300):
        path = tmp_path / f"{trial % 2}.tif"
        path.write_bytes(clean)

        def flip(data: bytearray) -> None:
            for position in rng.integers(0, len(data), rng.integers(1, 4)):
                data[position] ^= 1 << int(rng.integers(8))

        patched(path, 64, 0, flip)
        with Slide(path) as slide:
            direct, place = DirectReader.open(slide), (64, 0, 0, (64, 64))
            expected = reference(slide, *place)
            try:
                got = direct.read_region(*place)
            except TileDecodeError:
                assert expected is None
                got = None
            direct.close()
            if got is None:
                refused += 1
            elif expected is None:
                garbage += 1
            else:
                assert np.array_equal(got, expected)
                same += 1
    assert same > 150
    assert refused > 10
    assert garbage == 0


def test_a_flipped_header_never_hangs_or_kills(tmp_path: Path):
    """Flips in the directories: the slide does not open, or falls back, or reads what OpenSlide reads."""
    rng = np.random.default_rng(1)
    levels = pyramid(130, 100, (1, 2))
    clean = write_tiff(tmp_path / "a.tif", levels, tile=(64, 64), tables=True).read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        spans = [(page.offset, page.offset + 14 * 12) for page in tiff.pages]
    path = tmp_path / "b.tif"
    outcomes = set()
    for _ in range(120):
        raw = bytearray(clean)
        for _ in range(rng.integers(1, 3)):
            raw[rng.integers(*spans[rng.integers(2)])] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
        try:
            with Slide(path) as slide:
                outcomes.add(slide.reader)
                if max(slide.size_l0) < 10_000:
                    expected = reference(slide, 0, 0, 0, (64, 64))
                    try:
                        got = slide.read_region(0, 0, 0, (64, 64))
                    except TileDecodeError:
                        continue
                    assert np.array_equal(got, expected)
        except ExtractError:
            outcomes.add("unreadable")
    assert {"direct", "openslide", "unreadable"} <= outcomes


# ---------------------------------------------------------------- cache and threads


def test_an_unaligned_grid_decodes_each_source_tile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decode, decoded = simplejpeg.decode_jpeg, []
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    with Slide(write_tiff(tmp_path / "a.tif", pyramid(640, 480, (1,)), tile=(64, 48))) as slide:
        direct = DirectReader.open(slide, cache_bytes=3 * 10 * 64 * 48 * 3)
        for y in range(20, 400, 48):
            for x in range(30, 540, 64):
                direct.read_region(x, y, 0, (64, 48))
        assert len(decoded) <= 100
        assert direct.cache.held_bytes <= direct.cache.limit_bytes
        direct.close()
        assert direct.cache.held_bytes == 0
        assert direct.read_region(0, 0, 0, (64, 48)) is None


def test_the_cache_drops_the_least_recently_used_and_keeps_its_bound():
    made: list[int] = []

    def tile(number: int) -> np.ndarray:
        def make() -> np.ndarray:
            made.append(number)
            return np.full(100, number, dtype=np.uint8)

        return cache.get((0, 0, number), make)

    cache = TileCache(250)
    for number in (1, 2, 1, 3, 1, 2):
        assert (tile(number) == number).all()
        assert cache.held_bytes <= 250
    assert made == [1, 2, 3, 2]
    none = TileCache(0)
    none.get((0, 0, 0), lambda: np.zeros(5, dtype=np.uint8))
    assert none.held_bytes == 0


def test_a_tile_starts_where_the_decoder_writes_through_the_cache(tmp_path: Path):
    with Slide(write_tiff(tmp_path / "a.tif", pyramid(300, 236))) as slide:
        direct = DirectReader.open(slide)
        for x in range(0, 256, 64):
            tile = direct.read_region(x, 0, 0, (64, 48))
            assert tile is not None
            assert tile.ctypes.data % 32 == 16
        direct.close()


def test_threads_get_the_same_pixels_and_decode_a_tile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_tiff(tmp_path / "a.tif", pyramid(640, 480))
    decode, decoded = simplejpeg.decode_jpeg, []
    with Slide(path) as slide, ThreadPoolExecutor(8) as pool:
        rng = np.random.default_rng(0)
        corners = [(int(x), int(y)) for x, y in rng.integers(0, 500, (60, 2))]
        places = [(x * 2**level, y * 2**level, level, (70, 50)) for level in (0, 1) for x, y in corners]
        expected = [reference(slide, *place) for place in places]
        monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: decoded.append(1) or decode(*a, **k))
        direct = DirectReader.open(slide)
        order = rng.permutation(np.tile(np.arange(len(places)), 5))
        for i, got in zip(order, pool.map(lambda i: direct.read_region(*places[i]), order), strict=True):
            assert np.array_equal(got, expected[i])
        assert len(decoded) <= sum(grid.counts.size for grid in direct.grids)
        direct.close()


def test_a_broken_tile_costs_only_itself_among_threads(tmp_path: Path):
    path = write_slide(tmp_path / "a.tif", 640, 448)
    break_tile(path, 128, 192)
    with Slide(path, reader="direct") as slide, ThreadPoolExecutor(4) as pool:
        places = [(x, y, 0, (64, 64)) for y in range(0, 448, 32) for x in range(0, 640, 32)]

        def read(place: tuple) -> np.ndarray | None:
            try:
                return slide.read_region(*place)
            except TileDecodeError:
                return None

        for place, got in zip(places, pool.map(read, places), strict=True):
            hit = 64 < place[0] < 192 and 128 < place[1] < 256
            assert (got is None) == hit
            assert got is None or np.array_equal(got, reference(slide, *place))
