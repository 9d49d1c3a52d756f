"""docs/store-format.md is enough to read a store: thirty lines that know nothing of Tessera get the same rows."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.slides.slide import Slide
from extract.store import Store, TileRecipe, TilesUnit, create_store, fingerprint, open_store
from extract.store.core.fingerprint import canonical_json
from extract.tiling.tiles import cut_slide
from tests.conftest import REPOSITORY
from tests.test_extract import plain_reader
from tests.test_extract.crash_store import write
from tests.test_extract.plain_reader import read_slides
from tests.test_extract.seeded import ENTRY, EXECUTION, RECIPE, SLIDES, tiles_of

PAGE = (REPOSITORY / "docs" / "store-format.md").read_text(encoding="utf-8")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Four slides with odd ids, each with rows that could not be decoded."""
    write(tmp_path / "s", "zarr")
    return open_store(tmp_path / "s", "r+")


def test_it_gets_what_our_reader_gets(store: Store):
    found = {slide_id: (rows, coords) for slide_id, rows, coords in read_slides(store.path, ENTRY)}
    assert sorted(found) == store.slide_ids(ENTRY) == sorted(SLIDES)
    for slide_id, (rows, coords) in found.items():
        ours = store[slide_id]
        assert (rows.dtype, coords.dtype) == (np.float16, np.int32)
        assert rows.tobytes() == ours.features(ENTRY).tobytes()
        assert coords.tobytes() == ours.coords(ENTRY).tobytes()
        assert len(rows) == ours.n_tiles - 3


def test_it_is_thirty_lines_of_the_standard_library_and_numpy():
    source = Path(plain_reader.__file__).read_text(encoding="utf-8")
    assert len([line for line in source.partition('"""\n')[2].splitlines() if line.strip()]) <= 30
    code = f"import sys\nsys.path.insert(0, {str(Path(plain_reader.__file__).parent)!r})\nimport plain_reader\n"
    code += "print(sorted({'extract', 'zarr', 'h5py', 'torch'} & {name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_refuses_what_the_page_says(store: Store):
    unit = store.feature_path(SLIDES[0], ENTRY)
    chunk, tiles = unit / "c/0/0", store.tiles_path(SLIDES[0]) / "zarr.json"
    for path, old, new, message in (
        (chunk, chunk.read_bytes()[:2], b"\x01\x02", "checksum"),
        (store.path / "zarr.json", b'"format": 1', b'"format": 2', "format 1"),
        (store.path / "zarr.json", b'"tile_px": 224', b'"tile_px": 225', "changed"),
        (unit.parent / "zarr.json", b'"dim": 16', b'"dim": 17', "changed"),
        (unit / "zarr.json", b'"invalid_rows": [', b'"invalid_rows": [ 0,', "changed"),
        (tiles, b'"requested": 0.5', b'"requested": 0.6', "changed"),
        (unit / "zarr.json", b'"little"', b'"big"', "raw"),
    ):
        original = path.read_bytes()
        assert old in original
        path.write_bytes(original.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            list(read_slides(store.path, ENTRY))
        path.write_bytes(original)
    shutil.rmtree(tiles.parent)
    store.write_tiles(tiles_of(SLIDES[0], variant=1))
    assert SLIDES[0] not in [slide_id for slide_id, _, _ in read_slides(store.path, ENTRY)]
    unit.rename(unit.with_name("~0123.partial"))
    assert len(list(read_slides(store.path, ENTRY))) == len(SLIDES) - 1


VALUES = [
    {"b": 1, "a": [0.1, 1.0, 1e-5, 1e16, 123456.789, 5e-324, -0.0], "Z": None, "é": True, "": "日本\x7f\u2028"},
    {"text": 'quote " backslash \\ / \b\f\n\r\t\x00\x1f', "surrogate": "Pr\udce4parat", "beyond": "\U0001f52c"},
]


@pytest.mark.parametrize("value", VALUES)
def test_canonical_json_is_as_the_page_says(value: dict):
    """Written here from the page's words alone."""
    assert canonical_json(value) == canonical(value)
    assert plain_reader.fingerprint(value) == fingerprint(value)


def canonical(value: object) -> str:
    """Canonical JSON without a JSON library."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, str):
        short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
        return '"' + "".join(short.get(c, f"\\u{ord(c):04x}" if c < " " else c) for c in value) + '"'
    return {None: "null", True: "true", False: "false"}[value] if value is None or value is True else number(value)


def number(value: float) -> str:
    """A number in the shortest form that reads back."""
    if isinstance(value, int):
        return str(value)
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    text = "".join(map(str, digits)).rstrip("0") or "0"
    # value = 0.text * 10 ** point
    point = len(digits) + int(exponent) if value else 1
    if -3 <= point <= 16:
        text = text.rjust(len(text) - min(point - 1, 0), "0").ljust(point, "0")
        whole = max(point, 1)
        return "-" * sign + text[:whole] + "." + (text[whole:] or "0")
    fraction = f".{text[1:]}" if text[1:] else ""
    return "-" * sign + f"{text[0]}{fraction}e{point - 1:+03d}"


@settings(max_examples=500)
@given(st.floats(allow_nan=False, allow_infinity=False))
@example_of(1e16)
@example_of(9999999999999998.0)
@example_of(0.0001)
@example_of(0.00001)
@example_of(-0.0)
@example_of(5e-324)
def test_numbers_are_written_as_the_page_says(value: float):
    assert canonical_json([value]) == f"[{number(value)}]"


def test_every_field_of_a_record_is_on_the_page(store: Store):
    slide = store[SLIDES[0]]
    fields = {*slide.feature_record(ENTRY), *slide.record, *json.loads((store.path / "zarr.json").read_text())}
    named = set(re.findall(r"`([a-z0-9_]+)`", PAGE))
    assert fields - {"variant", "attributes", "zarr_format", "node_type"} <= named


def test_every_field_that_extraction_writes_is_on_the_page(slide_file: Path):
    with Slide(slide_file) as slide:
        record = cut_slide(slide, "a", TileRecipe(tile_px=64)).record
    names = {name for key, value in record.items() for name in (key, *(value if isinstance(value, dict) else ()))}
    assert names <= set(re.findall(r"`([a-z0-9_]+)`", PAGE))


# ---------------------------------------------------------------- the page's example


def example(folder: Path) -> Store:
    """The store of the page."""
    store = create_store(folder / "cohort.zarr", TileRecipe())
    store.create_entry("tiny", replace(RECIPE, dim=2))
    coords = np.array([[0, 0], [448, 0], [0, 448]], dtype=np.int32)
    store.write_tiles(
        TilesUnit(
            "site A/1", coords, np.ones(3, np.float32), np.full((2, 2, 3), 255, np.uint8), {"mpp": {"native": 0.25}}
        )
    )
    rows = np.array([[0.5, -1], [0, 0], [2, 0.25]], dtype=np.float16)
    store.write_features("tiny", "site A/1", rows, [1], EXECUTION)
    return store


def test_the_example_is_what_is_written(tmp_path: Path):
    store = example(tmp_path)
    unit = store.feature_path("site A/1", "tiny")
    shown = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1]
    assert json.loads(shown) == json.loads((unit / "zarr.json").read_text())
    assert (unit / "c/0/0").read_bytes().hex(" ") in PAGE
    assert f"    {canonical_json(EXECUTION)}\n" in PAGE
    listing = PAGE.partition("    cohort.zarr/\n")[2].partition("\n\n")[0]
    names = set(re.findall(r"\S*zarr\.json|\S+/c/\S+", listing))
    assert names == {path.relative_to(store.path).as_posix() for path in store.path.rglob("*") if path.is_file()}
