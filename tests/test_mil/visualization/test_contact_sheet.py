"""The contact sheet: every slide is on it, drawn where its tiles are; nothing of a slide is markup; and the GeoJSON."""

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from extract.errors import EntryNotFoundError, StoreError
from extract.slides.masks import read_mask
from extract.slides.opening import open_slide
from extract.store import Execution, TileRecipe, TilesUnit, ZarrStore
from extract.store.core.unit import encode_id
from extract.tiling.tiles import cut_slide
from mil.cli.slides.sheet import sheet
from mil.errors import ConfigError, MissingExtraError
from mil.visualization import contact_sheet
from mil.visualization.contact_sheet import write_contact_sheet
from mil.visualization.geojson import write_geojson
from mil.visualization.slide_card import SlideCard
from mil.visualization.slide_picture import (
    COLOURS,
    JPEG_BYTES,
    PICTURE_PX,
    encode_jpeg,
    encode_overlay,
    shrink,
    tile_boxes,
)
from tests.test_extract.small import write_slide
from tests.test_mil.small import DIM, FEATURES

HOSTILE_IDS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "../../etc/passwd",
    "Schnitt Größe/плитка/切片 7",
    "not UTF-8 \udcff",
    "\u202egnp.exe",
    "{{ 7 * 7 }}",
    "&lt;b&gt;",
    "x" * 300,
)
EXECUTION = Execution("fp32", "torch", "cpu", 4, {"torch": "2"})
TILE_L0, ORIGIN, SCALE = 400, (1000, 600), 20.0


def make_store(folder: Path, entries: Sequence[str] = ("tiny",)) -> ZarrStore:
    """An empty store."""
    store = ZarrStore.create(folder / "cohort.zarr", TileRecipe())
    for entry in entries:
        store.create_entry(entry, FEATURES)
    return store


def add_slide(
    store: ZarrStore,
    slide_id: str,
    n_tiles: int = 12,
    invalid: Sequence[int] = (),
    flagged: Mapping[str, Sequence[int]] | None = None,
    entry: str | None = "tiny",
    tissue: Mapping[str, Any] | None = None,
    source: str = "openslide.mpp",
    **record: Any,
) -> np.ndarray:
    """A slide of 4,000 x 2,400 level-0 px whose left half is tissue; returns its coords, row-major."""
    thumbnail = np.full((120, 200, 3), 245, dtype=np.uint8)
    thumbnail[:, :100] = (190, 110, 160)
    mask = thumbnail[..., 1] < 200
    y, x = np.divmod(np.arange(n_tiles), 5)
    coords = np.stack([ORIGIN[0] + x * TILE_L0, ORIGIN[1] + y * TILE_L0], axis=1).astype(np.int32)
    facts = {
        "mpp": {"native": 0.25, "requested": 0.5, "achieved": 0.5, "source": source},
        "bounds_l0": [*ORIGIN, 4000, 2400],
        "size_l0": [6000, 4000],
        "tile_l0": TILE_L0,
        "level": 1,
        "vendor": "aperio",
        "grid_tiles": 60,
        "synthetic": False,
        "thumbnail": {"origin_l0": list(ORIGIN), "downsample": [SCALE, SCALE]},
        "thumbnail_unreadable": 0,
        "tissue": {"method": "default", "fraction": 0.5, "area_mm2": 0.3, **(tissue or {})},
        **record,
    }
    store.write_tiles(TilesUnit(slide_id, coords, np.ones(n_tiles, np.float32), thumbnail, facts, mask))
    if entry is not None:
        features = np.zeros((n_tiles, DIM), dtype=np.float16)
        rows = {"blurred": [], "empty": [], "pen": [], **{name: list(rows) for name, rows in (flagged or {}).items()}}
        store.write_features(entry, slide_id, features, list(invalid), EXECUTION, rows)
    return coords


class Page(HTMLParser):
    """The parts of a sheet that the tests look at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cards: dict[str, dict[str, str]] = {}
        self._card: dict[str, str] | None = None
        self.text = ""
        self.feed(self.html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append((tag, values))
        if tag == "article":
            self._card = {"looks": values["data-looks"] or "", "text": "", "images": ""}
        elif tag == "h2" and self._card is not None:
            self.cards[values["title"] or ""] = self._card
        elif tag == "img" and self._card is not None:
            self._card["images"] += f"{values['src']} "

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._card = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._card is not None:
            self._card["text"] += data

    def looks(self, slide_id: str) -> set[str]:
        """Why a slide deserves a look."""
        return set(self.cards[slide_id]["looks"].split())

    def images(self, slide_id: str) -> list[Image.Image]:
        """Picture and overlay of a slide."""
        uris = self.cards[slide_id]["images"].split()
        return [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) for uri in uris]


def written(store: ZarrStore, **keywords: Any) -> Page:
    """The sheet of a store."""
    return Page(write_contact_sheet(store, store.path.parent / "sheet.html", **keywords))


# ---------------------------------------------------------------------------------------------- the page


def test_hostile_ids_are_text_and_nothing_is_asked_of_the_network(tmp_path: Path):
    store = make_store(tmp_path)
    for slide_id in HOSTILE_IDS:
        add_slide(store, slide_id)
    log = store.start_run()
    log.append({"slide_id": "<b>gone", "outcome": "failed", "reason": "<img src=x>", "path": "/x/\udcfe'\">.svs"})
    page = written(store)
    shown = {"".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name) for name in HOSTILE_IDS}
    assert set(page.cards) == shown | {"<b>gone"}
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert {values["src"].split(":")[0] for tag, values in page.tags if tag == "img"} == {"data"}
    assert all(values["href"].startswith("#s") for _, values in page.tags if "href" in values)
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    script = re.search(r"<script>(.*)</script>", page.html, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(values["content"] for tag, values in page.tags if tag == "meta" and "http-equiv" in values)
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_a_card_says_area_tiles_scale_reader_and_flags(tmp_path: Path):
    store = make_store(tmp_path)
    add_slide(store, "a/one", invalid=[3], flagged={"blurred": [0, 1], "pen": [1]})
    store.start_run().append({"slide_id": "a/one", "outcome": "embedded", "reader": "direct"})
    page = written(store)
    text = " ".join(page.cards["a/one"]["text"].split())
    for part in ("0.3 mm², 50 %", "12 of 60", "0.25 → 0.5 (openslide.mpp)", "level 1, aperio, direct", "tiny, torch"):
        assert part in text
    assert "1 invalid, 1 pen, 2 blurred" in text
    assert page.looks("a/one") == {"invalid"}
    summary = " ".join(page.text.split())
    assert "Tiles12" in summary
    assert "openslide.mpp: 1" in summary
    assert "SYNTHETIC" not in page.html


@pytest.mark.parametrize(
    ("look", "values"),
    [
        ("few", {"n_tiles": 9}),
        ("little", {"tissue": {"fraction": 0.009}}),
        ("full", {"tissue": {"fraction": 0.951}}),
        ("scale", {"source": "slide table"}),
        ("scale", {"source": "missing", "mpp": {"native": None, "achieved": None, "source": "missing"}}),
        ("unreadable", {"thumbnail_unreadable": 1}),
        ("flagged", {"flagged": {"blurred": [0, 1], "pen": [1, 2, 3]}}),
        ("bare", {"entry": None}),
        ("", {"n_tiles": 10, "flagged": {"empty": [0, 1], "pen": [1, 2]}}),
        ("", {"tissue": {"fraction": 1.0, "method": "none", "area_mm2": None}}),
    ],
)
def test_what_deserves_a_look_is_told(tmp_path: Path, look: str, values: dict[str, Any]):
    store = make_store(tmp_path)
    add_slide(store, "slide", **values)
    page = written(store)
    assert page.looks("slide") == {look} - {""}
    if look:
        assert f'<option value="{look}">' in page.html


def test_a_slide_that_failed_last_is_on_the_sheet_and_one_that_failed_before_is_not(tmp_path: Path):
    store = make_store(tmp_path)
    add_slide(store, "mended")
    runs = store.path / "runs"
    runs.mkdir()
    old = [{"slide_id": name, "outcome": "failed", "reason": "old"} for name in ("mended", "broken")]
    new = [
        {"slide_id": "mended", "outcome": "embedded", "reason": ""},
        {"slide_id": "mended", "outcome": "elsewhere", "reason": "busy"},
        {"slide_id": "broken", "outcome": "failed", "reason": "no such file", "path": "in/broken.svs"},
        {"slide_id": "broken", "outcome": "elsewhere", "reason": "busy"},
    ]
    for name, lines in (("20260102T030405-host-9", new), ("20251231T235959-host-10", old)):
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (runs / f"{name}.jsonl").write_text(text + '{"slide_id": "mended", "outc')
    page = written(store)
    assert page.looks("mended") == set()
    assert page.looks("broken") == {"failed"}
    for part in ("no such file", "in/broken.svs", "2026-01-02 03:04 UTC"):
        assert part in page.cards["broken"]["text"]
    assert "old" not in page.cards["broken"]["text"]


def test_synthetic_slides_are_marked_and_the_others_are_not(tmp_path: Path):
    store = make_store(tmp_path)
    add_slide(store, "drawn", synthetic=True)
    add_slide(store, "real")
    page = written(store)
    assert "SYNTHETIC" in page.cards["drawn"]["text"]
    assert "SYNTHETIC" not in page.cards["real"]["text"]
    assert "SYNTHETIC DATA" in page.text


def test_a_store_without_features_and_units_half_written(tmp_path: Path):
    store = make_store(tmp_path, entries=())
    add_slide(store, "cut", entry=None)
    (store.path / "tiles" / "~half.0.partial").mkdir()
    (store.path / "tiles" / "other").mkdir()
    page = written(store)
    assert set(page.cards) == {"cut"}
    assert page.looks("cut") == set()
    assert "none yet: tiles only" in page.text


def test_an_imported_slide_without_frame_and_mask_has_a_picture_and_no_geojson(tmp_path: Path):
    store = make_store(tmp_path)
    grey, coords = np.full((9, 12, 3), 128, dtype=np.uint8), np.zeros((12, 2), dtype=np.int32)
    store.write_tiles(TilesUnit("imported", coords, np.ones(12, np.float32), grey, {"mpp": None}))
    features = np.zeros((12, DIM), dtype=np.float16)
    store.write_features("tiny", "imported", features, [1], EXECUTION)
    page = written(store)
    assert page.looks("imported") == {"invalid"}
    assert [image.size for image in page.images("imported")] == [(12, 9), (12, 9)]
    assert write_geojson(store, tmp_path / "qupath") == []


def test_an_imported_slide_without_picture_is_not_damaged(tmp_path: Path):
    store = make_store(tmp_path)
    store.write_tiles(TilesUnit("imported", None, None, None, {"n_tiles": 12, "mpp": {"source": "import"}}))
    store.write_features("tiny", "imported", np.zeros((12, DIM), dtype=np.float16), [1], EXECUTION)
    page = written(store)
    assert page.looks("imported") == {"invalid", "scale"}
    assert page.images("imported") == []
    assert "no picture" in page.text
    assert "0 mm²" not in page.text


def test_a_damaged_unit_costs_its_picture_and_not_the_sheet(tmp_path: Path):
    store = make_store(tmp_path)
    for slide_id in ("a", "picture", "record", "stale"):
        add_slide(store, slide_id)
    for chunk in (store.path / "tiles" / "picture" / "thumbnail" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"no picture")
    (store.path / "tiles" / "record" / "zarr.json").write_text("{")
    shutil.rmtree(store.path / "tiles" / "stale")
    add_slide(store, "stale", n_tiles=11, entry=None)
    page = written(store)
    assert page.looks("a") == set()
    for slide_id in ("picture", "record", "stale"):
        assert page.looks(slide_id) == {"damaged"}
    assert page.images("picture") == page.images("record") == []
    assert len(page.images("stale")) == 2
    assert "tiles were cut again" in page.cards["stale"]["text"]


def test_wrong_inputs_are_refused_and_leave_the_old_sheet(tmp_path: Path):
    store = make_store(tmp_path)
    add_slide(store, "slide")
    for path in (tmp_path, tmp_path / "absent" / "sheet.html"):
        with pytest.raises(ConfigError, match="expected a file in a folder that exists"):
            write_contact_sheet(store, path)
    with pytest.raises(EntryNotFoundError, match="'tiny'"):
        write_contact_sheet(store, tmp_path / "sheet.html", entry="other")
    with pytest.raises(StoreError, match="there is nothing"):
        write_contact_sheet(tmp_path / "absent.zarr", tmp_path / "sheet.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="expected a folder"):
        write_geojson(store, tmp_path / "file")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "sheet.html").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_contact_sheet(store, tmp_path / "sheet.html", progress=stop)
    assert (tmp_path / "sheet.html").read_text() == "old"
    assert not list(tmp_path.glob("*.partial"))


def test_without_jinja2_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"tessera-mil\[report\]"):
        write_contact_sheet(make_store(tmp_path), tmp_path / "sheet.html")


def test_flags_are_those_of_the_entry_that_is_asked_for(tmp_path: Path):
    store = make_store(tmp_path, entries=("first", "second", "a@view-1"))
    add_slide(store, "slide", entry="second", flagged={"pen": [0]})
    features = np.zeros((12, DIM), dtype=np.float16)
    store.write_features("a@view-1", "slide", features, [4], EXECUTION)
    assert "1 pen" in written(store).cards["slide"]["text"]
    assert "1 invalid, quality was not looked at" in written(store, entry="a@view-1").cards["slide"]["text"]
    assert written(store, entry="first").looks("slide") == {"bare"}


# ---------------------------------------------------------------------------------------------- pictures


def rgb(name: str) -> tuple[int, ...]:
    """A colour of the overlay."""
    return tuple(int(COLOURS[name][i : i + 2], 16) for i in (1, 3, 5))


def test_tiles_and_tissue_are_drawn_where_they_are(tmp_path: Path):
    store = make_store(tmp_path)
    coords = add_slide(store, "slide", invalid=[6], flagged={"blurred": [1, 2], "pen": [2]})
    picture, overlay = written(store).images("slide")
    assert picture.size == overlay.size == (200, 120)
    pixels = np.asarray(overlay.convert("RGBA")).astype(int)
    centres = ((coords - np.array(ORIGIN) + TILE_L0 / 2) / SCALE).astype(int)
    for row, (x, y) in enumerate(centres.tolist()):
        *colour, alpha = pixels[y, x]
        flag = {1: "blurred", 2: "pen", 6: "invalid"}.get(row)
        assert (alpha > 0) == (flag is not None)
        assert flag is None or tuple(colour) == rgb(flag)
    # tile 11 is the second of the third row; its lower edge lies on no other tile
    assert tuple(pixels[60, 30][:3]) == rgb("tile")
    assert pixels[60, 30, 3] > pixels[90, 150, 3] == 0
    # the tissue ends at x = 99
    assert tuple(pixels[100, 99]) == (*rgb("tissue"), 255)
    assert not pixels[100:, 100:, 3].any()


def test_tiles_too_small_for_outlines_are_filled():
    coords = np.stack(np.meshgrid(np.arange(0, 3000, 100), np.arange(0, 3000, 100)), axis=-1).reshape(-1, 2)
    boxes = tile_boxes(coords, 100, np.zeros(2), np.array([0.03, 0.03]))
    flags = {"invalid": np.arange(len(coords)) == 31}
    overlay = Image.open(io.BytesIO(encode_overlay((100, 100), None, boxes, flags)))
    pixels = np.asarray(overlay.convert("RGBA"))
    assert (pixels[:90, :90, 3] > 0).all()
    assert not pixels[90:, 90:, 3].any()
    red = (pixels[..., :3] == rgb("invalid")).all(axis=-1)
    assert np.argwhere(red).tolist() == [[y, x] for y in (3, 4, 5) for x in (3, 4, 5)]


@pytest.mark.parametrize("size", [(1400, 900), (2000, 3), (20, 30), (1, 1)])
def test_pictures_are_small_whatever_they_show(size: tuple[int, int]):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = shrink(noise)
    assert max(picture.size) == min(PICTURE_PX, *[max(size)])
    assert len(encode_jpeg(picture)) <= JPEG_BYTES
    assert Image.open(io.BytesIO(encode_jpeg(picture))).width > min(picture.width, 100) / 3


# ---------------------------------------------------------------------------------------------- GeoJSON


def test_geojson_lies_where_qupath_looks_for_it(tmp_path: Path):
    store = make_store(tmp_path)
    slide_id = 'a/b <"\udcff>'
    coords = add_slide(store, slide_id, invalid=[6], flagged={"pen": [2]})
    files = write_geojson(store, tmp_path / "new" / "qupath")
    assert [file.name for file in files] == [f"{encode_id(slide_id)}.{kind}.geojson" for kind in ("tissue", "tiles")]
    record = store[slide_id].record
    mask = read_mask(files[0], tuple(record["size_l0"]), tuple(record["bounds_l0"]), (120, 200))
    assert (mask == store[slide_id].tissue_mask).mean() > 0.98
    features = json.loads(files[1].read_text())["features"]
    corners = np.array([feature["geometry"]["coordinates"][0] for feature in features])
    assert np.array_equal(corners.min(axis=1), coords - np.array(ORIGIN))
    assert np.array_equal(corners.max(axis=1), coords - np.array(ORIGIN) + TILE_L0)
    names = [feature["properties"]["classification"]["name"] for feature in features]
    assert {row: name for row, name in enumerate(names) if name != "Tile"} == {2: "Tile: pen", 6: "Tile: invalid"}


def test_a_damaged_slide_does_not_keep_the_others_from_qupath(tmp_path: Path):
    store = make_store(tmp_path)
    for slide_id in ("a", "b", "c"):
        add_slide(store, slide_id)
    (store.path / "tiles" / "b" / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"'b'.*4 files of the others are written"):
        write_geojson(store, tmp_path / "qupath")
    assert len(list((tmp_path / "qupath").iterdir())) == 4


# ---------------------------------------------------------------------------------------------- end to end


def test_real_slides_and_the_command_line(tmp_path: Path):
    store = make_store(tmp_path, entries=())
    recipe = TileRecipe(mpp=0.5, tile_px=64)
    with open_slide(write_slide(tmp_path / "slide.tif")) as slide:
        unit = cut_slide(slide, "slide", recipe)
        store.write_tiles(unit)
    app = typer.Typer()
    app.command()(sheet)
    out = tmp_path / "sheet.html"
    arguments = [str(store.path), "--out", str(out), "--geojson", str(tmp_path / "qupath")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "2 GeoJSON files" in result.output
    page = Page(out)
    assert f"{len(unit.coords)} of {unit.record['grid_tiles']} in the grid" in page.cards["slide"]["text"]
    assert f"{unit.record['tissue']['area_mm2']:.3g} mm²" in page.cards["slide"]["text"]
    assert CliRunner().invoke(app, [str(store.path), "--out", str(tmp_path)]).exit_code == 2


def test_a_real_field(tmp_path: Path, data_folder: Path):
    store = make_store(tmp_path, entries=())
    with open_slide(data_folder / "glas" / "testA_1.tif") as slide:
        unit = cut_slide(slide, "testA_1", TileRecipe(mpp=0.62))
        store.write_tiles(unit)
    page = written(store)
    picture, overlay = page.images("testA_1")
    assert PICTURE_PX / 2 < picture.width <= overlay.width == PICTURE_PX
    assert "0.62 → 0.62 (openslide.mpp)" in page.cards["testA_1"]["text"]
    assert len(page.cards["testA_1"]["images"]) < 12_000


def test_what_most_slides_share_is_said_once_above(tmp_path: Path):
    cards = [
        SlideCard(f"s{i}", {"full": "tissue covers 100 % of the slide"} if i else {"invalid": "3"}) for i in range(6)
    ]
    texts = contact_sheet._take_common(cards)
    (text,) = texts
    assert text.startswith("5 of 6 slides: tissue above 95%")
    assert "--tissue-threshold" in text
    assert [card.looks for card in cards] == [{"invalid": "3"}, *[{}] * 5]
    # of three slides nothing is common, and damage never is
    few = [SlideCard(f"s{i}", {"full": "x"}) for i in range(3)]
    damaged = [SlideCard(f"s{i}", {"damaged": "x", "invalid": "3"}) for i in range(9)]
    assert contact_sheet._take_common(few) == contact_sheet._take_common(damaged) == []
    assert all(len(card.looks) == 2 for card in damaged)
