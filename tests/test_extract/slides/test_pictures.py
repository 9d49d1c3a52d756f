"""Pictures are decoded strictly, to the pixels of an independent decoder, and large ones in bounded memory."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from extract.errors import SlideUnreadableError
from extract.slides import pictures
from extract.slides.opening import open_slide
from tests.test_extract.small import tissue_image


def whole(path: Path) -> np.ndarray:
    """All pixels as Tessera shows them."""
    with open_slide(path) as image:
        return image.read_region(0, 0, 0, image.size_l0)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    mode=st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA"]),
    kind=st.sampled_from(["png", "jpg", "bmp", "webp"]),
    size=st.tuples(st.integers(1, 90), st.integers(1, 70)),
    progressive=st.booleans(),
    spooled=st.booleans(),
)
def test_pixels_are_those_of_pillow(
    tmp_path: Path, mode: str, kind: str, size: tuple[int, int], progressive: bool, spooled: bool
):
    if (kind == "jpg" and mode not in ("L", "RGB")) or (kind, mode) == ("bmp", "LA"):
        return
    picture = Image.fromarray(tissue_image(*size, margin=3)).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(size))
    path = tmp_path / f"a.{kind}"
    picture.convert(mode).save(path, **({"progressive": progressive} if kind == "jpg" else {}))
    with Image.open(path) as image:
        canvas = Image.new("RGBA", size, "white")
        expected = np.asarray(Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")).astype(int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "SPOOLED_PX", 0 if spooled else 2**27)
        assert np.abs(whole(path) - expected).max() <= 1


def test_a_16_bit_colour_png_is_refused(tmp_path: Path):
    import imagecodecs

    pixels = (tissue_image(60, 40).astype(np.uint16)) << 4
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    with pytest.raises(SlideUnreadableError, match="16 bits"):
        open_slide(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.jpg", "grey.jpg", "a.png"])
def test_a_damaged_picture_is_an_error_and_not_grey(tmp_path: Path, name: str):
    path = tmp_path / name
    pixels = tissue_image(400, 300, margin=10)
    Image.fromarray(pixels[..., 0] if name == "grey.jpg" else pixels).save(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if path.suffix == ".png":
        data[middle] ^= 0xFF
    else:
        del data[middle : middle + 200]
    path.write_bytes(data)
    with open_slide(path) as image, pytest.raises(SlideUnreadableError, match=f"{name}.*(Corrupt|damaged)"):
        image.read_region(0, 0, 0, (10, 10))


def test_no_damaged_png_is_shown_as_something_else(tmp_path: Path, rng: np.random.Generator):
    path = tmp_path / "a.png"
    Image.fromarray(tissue_image(120, 90, margin=4)).save(path)
    data, expected = path.read_bytes(), whole(path)
    for _ in range(150):
        damaged = bytearray(data)
        damaged[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with suppress(SlideUnreadableError):
            np.testing.assert_array_equal(whole(path), expected)


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_a_picture_beyond_pillows_own_limit_opens(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / f"a.{kind}"
    pixels = tissue_image(60, 40)
    Image.fromarray(pixels).save(path)
    # by Pillow's limit a picture of twice as many pixels is a bomb
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    np.testing.assert_array_equal(whole(path), pixels)


def test_no_room_for_a_large_picture_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.fromarray(tissue_image(60, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "SPOOLED_PX", 100)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SlideUnreadableError, match=r"GB are needed in .*TMPDIR"):
        whole(tmp_path / "a.png")


_READ = """
import re, resource, sys
import imagecodecs, numpy as np, simplejpeg, tifffile
from extract.slides import pictures
from extract.slides.opening import open_slide
pictures.SPOOLED_PX = 1 << 20
used = int(re.search(r"VmData:\\s*(\\d+)", open("/proc/self/status").read())[1]) << 10
limit = used + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
with open_slide(sys.argv[1]) as image:
    width, height = image.size_l0
    print(image.read_region(width - 3, height - 2, 0, (3, 2)).ravel().tolist())
"""


@pytest.mark.parametrize("kind", ["png", "jpg", "deflate.tif", "none.tif"])
def test_a_large_picture_takes_a_bounded_part_of_memory(tmp_path: Path, kind: str):
    import tifffile

    side = 6_000
    path = tmp_path / f"a.{kind}"
    pixels = np.full((side, side, 3), 200, dtype=np.uint8)
    pixels[-2:, -3:] = 40
    if kind.endswith("tif"):
        compression = None if kind == "none.tif" else "deflate"
        rows = side if compression is None else 64
        tifffile.imwrite(path, pixels, photometric="rgb", compression=compression, rowsperstrip=rows, metadata=None)
    else:
        Image.fromarray(pixels).save(path, **({"compress_level": 1} if kind == "png" else {"quality": 95}))
    n_bytes = pixels.nbytes
    del pixels
    # 108 MB of pixels in 60 MB beside what Python and its libraries take
    room = 60 << 20
    run = subprocess.run(
        [sys.executable, "-c", _READ, str(path), str(room)], capture_output=True, text=True, check=False
    )
    assert n_bytes > 1.5 * room
    assert run.returncode == 0, run.stderr
    values = np.array(json.loads(run.stdout))
    assert np.abs(values - 40).max() <= (30 if kind == "jpg" else 0)
