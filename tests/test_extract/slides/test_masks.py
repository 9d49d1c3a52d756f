"""Given masks: the right pixels on the right slide, and a clear refusal of everything else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from extract.errors import MaskError, SlideError
from extract.slides.geojson import tiles_geojson, tissue_geojson
from extract.slides.masks import mask_sha256, read_mask

WHOLE = (0, 0, 800, 600)
SIZE = (800, 600)
SHAPE = (60, 80)


def blobs(shape: tuple[int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """A mask with a hole, several pieces and diagonal contacts, bool [h, w]."""
    y, x = np.mgrid[: shape[0], : shape[1]] / np.array(shape)[:, None, None]
    mask = np.hypot(x - 0.4, y - 0.45) < 0.35
    mask &= np.hypot(x - 0.45, y - 0.4) > 0.12
    mask |= np.random.default_rng(seed).random(shape) < 0.02
    return mask


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union."""
    return float((a & b).sum() / (a | b).sum())


def save(path: Path, labels: np.ndarray) -> Path:
    """Write an array with Pillow."""
    Image.fromarray(labels).save(path)
    return path


def write_json(path: Path, document: Any) -> Path:
    """Write what may be GeoJSON."""
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def square(x: float, y: float, side: float) -> list[list[float]]:
    """A closed ring."""
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def feature(*rings: list[list[float]], name: str | None = None, **geometry: Any) -> dict[str, Any]:
    """A QuPath annotation."""
    properties: dict[str, Any] = {"objectType": "annotation"}
    if name is not None:
        properties["classification"] = {"name": name, "color": [1, 2, 3]}
    shape = geometry or {"type": "Polygon", "coordinates": list(rings)}
    return {"type": "Feature", "id": "7", "geometry": shape, "properties": properties}


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """A rectangle of the thumbnail, bool [60, 80]."""
    mask = np.zeros(SHAPE, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


# ---------------------------------------------------------------- rasters


@pytest.mark.parametrize("factor", [1, 2, 5])
@pytest.mark.parametrize("name", ["m.png", "m.bmp", "m.tif", "m.npy"])
def test_a_raster_of_any_size_comes_to_the_thumbnail(tmp_path: Path, name: str, factor: int):
    mask = blobs()
    labels = np.kron(mask, np.ones((factor, factor), dtype=bool)).astype(np.uint8)
    file = tmp_path / name
    if name == "m.npy":
        np.save(file, labels)
    else:
        save(file, labels)
    np.testing.assert_array_equal(read_mask(file, SIZE, WHOLE, SHAPE), mask)
    coarse = read_mask(file, SIZE, WHOLE, (30, 40))
    cover = mask.reshape(30, 2, 40, 2).mean(axis=(1, 3))
    np.testing.assert_array_equal(coarse, cover >= 0.5)


def test_half_of_a_pixel_decides(tmp_path: Path):
    cells = [(np.arange(25) < covered).reshape(5, 5) for covered in (12, 13)]
    labels = np.hstack(cells).astype(np.uint8)
    mask = read_mask(save(tmp_path / "m.png", labels), (10, 5), (0, 0, 10, 5), (1, 2))
    assert mask.tolist() == [[False, True]]


def test_a_raster_coarser_than_the_thumbnail_is_repeated(tmp_path: Path):
    mask = blobs((15, 20))
    read = read_mask(save(tmp_path / "m.png", mask.astype(np.uint8)), SIZE, WHOLE, SHAPE)
    np.testing.assert_array_equal(read, np.kron(mask, np.ones((4, 4), dtype=bool)))


@pytest.mark.parametrize("kind", ["bool", "uint8", "label", "uint16", "int32", "float", "rgb", "rgba", "grey+alpha"])
def test_whatever_is_above_zero_is_tissue(tmp_path: Path, kind: str):
    mask = blobs()
    if kind in ("rgb", "rgba"):
        labels = np.zeros((*SHAPE, len(kind)), dtype=np.uint8)
        labels[mask, 2] = 1
        labels[..., 3:] = 255
    elif kind == "grey+alpha":
        labels = np.dstack([np.full(SHAPE, 9), mask]).astype(np.uint8)
    else:
        value = {"bool": True, "uint8": 255, "label": 3, "uint16": 700, "int32": 70_000, "float": 0.25}[kind]
        dtype = {"label": "uint8", "float": "float32"}.get(kind, kind)
        labels = (mask * np.array(value)).astype(dtype)
    file = tmp_path / ("m.tif" if kind in ("int32", "float") else "m.png")
    np.testing.assert_array_equal(read_mask(save(file, labels), SIZE, WHOLE, SHAPE), mask)


@pytest.mark.parametrize("name", ["m.png", "m.tif"])
@pytest.mark.parametrize("background", [0, 1])
def test_the_black_of_a_palette_is_background_whatever_its_index(tmp_path: Path, name: str, background: int):
    mask = blobs()
    picture = Image.fromarray(np.where(mask, 1 - background, background).astype(np.uint8), mode="P")
    colours = [(0, 0, 0), (200, 0, 0)] if background == 0 else [(255, 255, 255), (0, 0, 0)]
    picture.putpalette([value for colour in colours for value in colour])
    picture.save(tmp_path / name)
    np.testing.assert_array_equal(read_mask(tmp_path / name, SIZE, WHOLE, SHAPE), mask)


def test_not_a_number_is_no_tissue(tmp_path: Path):
    labels = np.where(blobs(), 1.0, np.nan)
    np.save(tmp_path / "m.npy", labels)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.npy", SIZE, WHOLE, SHAPE), blobs())


def test_of_a_pyramid_the_coarsest_level_that_is_fine_enough_is_read(tmp_path: Path):
    levels = [np.full((600, 800), 0, np.uint8), np.full((300, 400), 1, np.uint8), np.full((150, 200), 0, np.uint8)]
    with tifffile.TiffWriter(tmp_path / "m.tif") as tiff:
        tiff.write(levels[0], subifds=2, tile=(64, 64))
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, tile=(64, 64))
    assert read_mask(tmp_path / "m.tif", SIZE, WHOLE, (180, 240)).all()
    assert not read_mask(tmp_path / "m.tif", SIZE, WHOLE, (400, 500)).any()
    assert not read_mask(tmp_path / "m.tif", SIZE, WHOLE, SHAPE).any()


@pytest.mark.parametrize("size", [(805, 600), (80, 60), (81, 60), (8, 6), (9, 6)])
def test_an_aspect_ratio_within_a_percent_or_a_pixel_is_the_slides(tmp_path: Path, size: tuple[int, int]):
    assert read_mask(save(tmp_path / "m.png", np.ones(size[::-1], np.uint8)), SIZE, WHOLE, SHAPE).all()


@pytest.mark.parametrize("size", [(820, 600), (600, 800), (800, 800), (1, 600)])
def test_another_aspect_ratio_is_another_slides_mask(tmp_path: Path, size: tuple[int, int]):
    file = save(tmp_path / "m.png", np.ones(size[::-1], np.uint8))
    with pytest.raises(MaskError, match=rf"{size[0]} x {size[1]} px.*800 x 600"):
        read_mask(file, SIZE, WHOLE, SHAPE)


def test_a_raster_shows_the_bounds_or_the_whole_slide_by_its_aspect_ratio(tmp_path: Path):
    bounds = (100, 200, 400, 400)
    inside = blobs((40, 40))
    whole = np.zeros(SHAPE, dtype=bool)
    whole[20:60, 10:50] = inside
    whole[:20] = True
    of_bounds = save(tmp_path / "bounds.png", inside.astype(np.uint8))
    of_slide = save(tmp_path / "whole.png", whole.astype(np.uint8))
    np.testing.assert_array_equal(read_mask(of_bounds, SIZE, bounds, (40, 40)), inside)
    np.testing.assert_array_equal(read_mask(of_slide, SIZE, bounds, (40, 40)), inside)


def test_a_raster_that_may_show_either_is_refused_unless_its_size_says_it(tmp_path: Path):
    bounds = (200, 150, 400, 300)
    with pytest.raises(MaskError, match="may show the whole slide"):
        read_mask(save(tmp_path / "a.png", np.ones((60, 80), np.uint8)), SIZE, bounds, (30, 40))
    labels = np.zeros((600, 800), np.uint8)
    labels[150:450, 200:600] = 1
    assert read_mask(save(tmp_path / "b.png", labels), SIZE, bounds, (30, 40)).all()
    assert read_mask(save(tmp_path / "c.png", np.ones((300, 400), np.uint8)), SIZE, bounds, (30, 40)).all()


def test_bounds_that_begin_before_the_slide_are_not_tissue_there(tmp_path: Path):
    file = save(tmp_path / "m.png", np.ones((60, 80), np.uint8))
    mask = read_mask(file, SIZE, (-100, 0, 400, 600), (60, 40))
    assert not mask[:, :10].any()
    assert mask[:, 10:].all()


# ---------------------------------------------------------------- GeoJSON in


@pytest.mark.parametrize("bounds", [WHOLE, (1000, 500, 800, 600)])
def test_coordinates_count_from_the_corner_of_the_bounds(tmp_path: Path, bounds: tuple[int, int, int, int]):
    size = (bounds[0] + 900, bounds[1] + 700)
    file = write_json(tmp_path / "m.geojson", feature(square(100, 200, 150)))
    np.testing.assert_array_equal(read_mask(file, size, bounds, SHAPE), box(10, 20, 25, 35))


ONE, TWO = feature(square(100, 200, 150)), feature(square(400, 300, 100))
MULTI = feature(type="MultiPolygon", coordinates=[[square(100, 200, 150)], [square(400, 300, 100)]])
GEOMETRIES = [ONE["geometry"], {"type": "GeometryCollection", "geometries": [TWO["geometry"]]}]


@pytest.mark.parametrize(
    "document",
    [
        {"type": "FeatureCollection", "features": [ONE, TWO]},
        [ONE, TWO],
        MULTI,
        MULTI["geometry"],
        {"type": "GeometryCollection", "geometries": GEOMETRIES},
        feature(type="GeometryCollection", geometries=GEOMETRIES),
        [
            ONE,
            TWO,
            feature(type="Point", coordinates=[5, 5]),
            {"type": "Feature", "geometry": None, "properties": None},
        ],
        [ONE, TWO, feature(type="LineString", coordinates=[[0, 0], [700, 500]])],
        [ONE, TWO, feature()],
        [ONE, feature([[*xy, 0.0] for xy in square(400, 300, 100)])],
        [ONE, feature(square(400, 300, 100)[:-1])],
    ],
    ids=lambda document: str(document)[:40],
)
def test_every_form_of_the_same_outlines_is_the_same_mask(tmp_path: Path, document: Any):
    file = write_json(tmp_path / "m.geojson", document)
    np.testing.assert_array_equal(read_mask(file, SIZE, WHOLE, SHAPE), box(10, 20, 25, 35) | box(40, 30, 50, 40))


def test_rings_within_a_ring_are_holes_and_outlines_unite(tmp_path: Path):
    ring = feature(square(100, 100, 400), square(200, 200, 200))
    expected = box(10, 10, 50, 50) & ~box(20, 20, 40, 40)
    np.testing.assert_array_equal(read_mask(write_json(tmp_path / "a.json", ring), SIZE, WHOLE, SHAPE), expected)
    both = [ring, feature(square(250, 250, 100)), feature(square(250, 250, 100))]
    np.testing.assert_array_equal(
        read_mask(write_json(tmp_path / "b.json", both), SIZE, WHOLE, SHAPE), expected | box(25, 25, 35, 35)
    )


def test_a_hole_may_share_an_edge_with_its_outline(tmp_path: Path):
    file = write_json(tmp_path / "m.json", feature(square(100, 100, 400), square(100, 200, 200)))
    np.testing.assert_array_equal(read_mask(file, SIZE, WHOLE, SHAPE), box(10, 10, 50, 50) & ~box(10, 20, 30, 40))


def test_classes_are_chosen_and_the_ignored_one_is_cut_out(tmp_path: Path):
    features = [
        feature(square(150, 150, 100), name="Ignore*"),
        feature(square(100, 100, 300), name="Tumor"),
        feature(square(500, 100, 100), name="Stroma"),
        feature(square(500, 300, 100), name="Region*"),
        feature(square(100, 500, 80)),
    ]
    features[2]["properties"]["classification"] = {"names": ["Stroma", "Positive"]}
    file = write_json(tmp_path / "m.geojson", {"type": "FeatureCollection", "features": features})
    tumor = box(10, 10, 40, 40) & ~box(15, 15, 25, 25)
    stroma, region, other = box(50, 10, 60, 20), box(50, 30, 60, 40), box(10, 50, 18, 58)
    np.testing.assert_array_equal(read_mask(file, SIZE, WHOLE, SHAPE), tumor | stroma | region | other)
    np.testing.assert_array_equal(read_mask(file, SIZE, WHOLE, SHAPE, {"Tumor"}), tumor)
    chosen = read_mask(file, SIZE, WHOLE, SHAPE, ["Stroma: Positive", "Region*"])
    np.testing.assert_array_equal(chosen, stroma | region)
    with pytest.raises(MaskError, match=r"none is tissue.*Necrosis") as caught:
        read_mask(file, SIZE, WHOLE, SHAPE, ["Necrosis"])
    assert "Region*" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(st.floats(-60, 860), st.floats(-50, 650)), min_size=3, max_size=12),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_a_pixel_is_tissue_exactly_where_its_centre_lies_in_the_outline(
    tmp_path_factory: pytest.TempPathFactory, points: list[tuple[float, float]], shape: tuple[int, int]
):
    file = write_json(tmp_path_factory.mktemp("masks") / "m.json", feature([list(p) for p in points]))
    x = (np.arange(shape[1]) + 0.5) * 800 / shape[1]
    y = (np.arange(shape[0]) + 0.5) * 600 / shape[0]
    expected = np.zeros(shape, dtype=bool)
    near = np.zeros(shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        crosses = (y0 <= y) != (y1 <= y)
        at = x0 + (y[crosses] - y0) * (x1 - x0) / (y1 - y0) if crosses.any() else np.empty(0)
        expected[crosses] ^= x[None, :] >= at[:, None]
        near[crosses] |= np.abs(x[None, :] - at[:, None]) < 1e-6
    near[np.isclose(y[:, None], [y for _, y in points], atol=1e-6).any(axis=1)] = True
    try:
        mask = read_mask(file, SIZE, WHOLE, shape)
    except MaskError:
        mask = np.zeros(shape, dtype=bool)
    np.testing.assert_array_equal(mask[~near], expected[~near])


# ---------------------------------------------------------------- GeoJSON out


@pytest.mark.parametrize("bounds", [WHOLE, (1237, 411, 800, 600), (0, 0, 4003, 3001)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_mask_comes_back_from_its_outlines(tmp_path: Path, bounds: tuple[int, int, int, int], seed: int):
    size = (bounds[0] + bounds[2] + 10, bounds[1] + bounds[3])
    for mask in (blobs(seed=seed), np.random.default_rng(seed).random(SHAPE) < 0.5, np.ones(SHAPE, dtype=bool)):
        file = write_json(tmp_path / "m.geojson", tissue_geojson(mask, bounds))
        assert iou(read_mask(file, size, bounds, SHAPE), mask) > 0.98
    large = np.kron(blobs(seed=seed), np.ones((3, 3), dtype=bool))
    assert (
        iou(read_mask(file := write_json(file, tissue_geojson(large, bounds)), size, bounds, large.shape), large) > 0.98
    )
    assert iou(read_mask(file, size, bounds, (90, 120)), large[::2, ::2]) > 0.85


def test_outlines_are_closed_lie_in_qupaths_frame_and_hold_their_holes():
    mask = box(10, 10, 50, 50) & ~box(20, 20, 40, 40) | box(70, 0, 80, 5)
    document = tissue_geojson(mask, (1000, 500, 800, 600))
    assert json.loads(json.dumps(document)) == document
    assert document["type"] == "FeatureCollection"
    rings = [feature["geometry"]["coordinates"] for feature in document["features"]]
    assert sorted(map(len, rings)) == [1, 2]
    for polygon in rings:
        for ring in polygon:
            assert ring[0] == ring[-1]
    outer, hole = (np.array(ring) for polygon in rings if len(polygon) == 2 for ring in polygon)
    np.testing.assert_allclose([outer.min(0), outer.max(0)], [[100, 100], [500, 500]])
    np.testing.assert_allclose([hole.min(0), hole.max(0)], [[200, 200], [400, 400]])
    corner = next(np.array(polygon[0]) for polygon in rings if len(polygon) == 1)
    np.testing.assert_allclose([corner.min(0), corner.max(0)], [[700, 0], [800, 50]])
    assert tissue_geojson(np.zeros(SHAPE, dtype=bool), WHOLE)["features"] == []


def test_tiles_lie_in_qupaths_frame_and_carry_their_flags(tmp_path: Path):
    coords = np.array([[1100, 700], [1400, 800]], dtype=np.int32)
    bounds = (1000, 500, 800, 600)
    flags = {"blurred": np.array([False, True]), "pen": np.array([False, True])}
    document = tiles_geojson(coords, 100.0, bounds, flags)
    names = [feature["properties"]["classification"]["name"] for feature in document["features"]]
    assert names == ["Tile", "Tile: blurred: pen"]
    assert {feature["properties"]["objectType"] for feature in document["features"]} == {"tile"}
    assert document["features"][0]["geometry"]["coordinates"] == [square(100, 200, 100)]
    mask = read_mask(write_json(tmp_path / "m.geojson", document), (2000, 1500), bounds, SHAPE)
    np.testing.assert_array_equal(mask, box(10, 20, 20, 30) | box(40, 30, 50, 40))
    assert [f["properties"]["classification"]["name"] for f in tiles_geojson(coords, 1, bounds)["features"]] == [
        "Tile"
    ] * 2


# ---------------------------------------------------------------- refusals


DEEP = "[" * 200_000 + "]" * 200_000
NESTED = '{"type":"GeometryCollection","geometries":[' * 700 + "]}" * 700


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "7",
        '"Polygon"',
        "[null]",
        "not json",
        DEEP,
        NESTED,
        '{"type": "FeatureCollection"}',
        '{"type": "FeatureCollection", "features": {}}',
        '{"type": "Feature", "geometry": 5}',
        '{"type": ["Polygon"]}',
        '{"type": "Polygon"}',
        '{"type": "Polygon", "coordinates": []}',
        '{"type": "Polygon", "coordinates": [[]]}',
        '{"type": "Polygon", "coordinates": [5]}',
        '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}',
        '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], [5]]]}',
        '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], "five"]]}',
        '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], [null, 6]]]}',
        '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], [NaN, 6]]]}',
        '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], [1e999, 6]]]}',
        '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], [1e300, 6]]]}',
        '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], [' + "9" * 5000 + ", 6]]]}",
        '{"type": "Polygon", "coordinates": [[[1, 2], [1.1, 2], [1, 2.1]]]}',
        '{"type": "Point", "coordinates": [1, 2]}',
        '{"type": "Triangle", "coordinates": [[[1, 2], [3, 4], [5, 7]]]}',
    ],
    ids=lambda text: text[:60],
)
def test_what_is_no_geojson_of_outlines_is_a_mask_error(tmp_path: Path, text: str):
    file = tmp_path / "mäsk.geojson"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(MaskError, match=r"mäsk\.geojson") as caught:
        read_mask(file, SIZE, WHOLE, SHAPE)
    assert str(caught.value).count("→") >= 2
    assert len(str(caught.value)) < 1000
    assert isinstance(caught.value, SlideError)


def test_outlines_of_another_slide_are_refused(tmp_path: Path):
    file = write_json(tmp_path / "m.geojson", feature(square(700, 100, 400)))
    with pytest.raises(MaskError, match="1100, 500"):
        read_mask(file, SIZE, WHOLE, SHAPE)
    slightly = write_json(tmp_path / "n.geojson", feature(square(-20, -20, 420)))
    np.testing.assert_array_equal(read_mask(slightly, SIZE, WHOLE, SHAPE), box(0, 0, 40, 40))


def test_an_outline_that_would_take_all_memory_is_refused(tmp_path: Path):
    zigzag = [[i % 800, 600 * (i % 2)] for i in range(20_000)]
    file = write_json(tmp_path / "m.geojson", feature(zigzag))
    with pytest.raises(MaskError, match="crosses"):
        read_mask(file, SIZE, WHOLE, (3000, 4000))


def test_a_geojson_file_too_large_to_be_outlines_is_not_even_read(tmp_path: Path):
    with open(tmp_path / "m.geojson", "wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(MaskError, match="256 MiB"):
        read_mask(tmp_path / "m.geojson", SIZE, WHOLE, SHAPE)


@pytest.mark.parametrize("name", ["m.jpg", "m.svg", "m", "m.h5"])
def test_another_kind_of_file_is_refused_by_its_name(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    with pytest.raises(MaskError, match=r"\.geojson"):
        read_mask(tmp_path / name, SIZE, WHOLE, SHAPE)


@pytest.mark.parametrize("name", ["m.png", "m.tif", "m.npy", "m.bmp", "m.geojson"])
def test_an_absent_empty_or_damaged_mask_is_a_mask_error(tmp_path: Path, name: str):
    file = tmp_path / name
    with pytest.raises(MaskError, match="no such file"):
        read_mask(file, SIZE, WHOLE, SHAPE)
    for content in (b"", b"\x00\xff" * 50, b"\x89PNG\r\n\x1a\n", b"II*\x00\x08\x00\x00\x00"):
        file.write_bytes(content)
        with pytest.raises(MaskError, match=name):
            read_mask(file, SIZE, WHOLE, SHAPE)


def test_pickles_objects_and_stacks_are_no_masks(tmp_path: Path):
    file = tmp_path / "m.npy"
    for labels in (
        np.array([{"a": 1}], dtype=object),
        np.ones((60, 80, 3, 2)),
        np.full(SHAPE, "x"),
        np.ones(SHAPE, "c8"),
    ):
        np.save(file, labels, allow_pickle=True)
        with pytest.raises(MaskError):
            read_mask(file, SIZE, WHOLE, SHAPE)
    tifffile.imwrite(tmp_path / "m.tif", np.ones((6, 60, 80), np.uint8), photometric="minisblack")
    with pytest.raises(MaskError):
        read_mask(tmp_path / "m.tif", SIZE, WHOLE, SHAPE)


def test_the_hash_is_that_of_the_file(tmp_path: Path):
    file = tmp_path / "m.png"
    file.write_bytes(b"abc")
    assert mask_sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(MaskError):
        mask_sha256(tmp_path / "absent.png")
