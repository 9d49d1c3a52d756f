"""Which slides a run is about, and their ids: unique, stable, and never a way out of the store."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from extract.errors import MaskError, SlideTableError
from extract.folders import NotTaken
from extract.slides.finding.source import SlideSource
from extract.slides.finding.sources import SLIDE_EXTENSIONS, find_slides, shard
from extract.slides.masks import read_mask
from extract.slides.opening import open_slide
from extract.slides.slide import Slide


def touch(folder: Path, *names: str) -> Path:
    """Empty files; finding slides opens none of them but DICOM."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def ids(*inputs: Path, table: Path | None = None) -> list[str]:
    return [source.slide_id for source in find_slides(list(inputs), table)]


def write_table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------- ids


def test_an_id_is_the_relative_path_without_extension(tmp_path: Path):
    touch(tmp_path, "b.svs", "site A/x.tif", "site A/deep/y.ndpi", "切片/häß lich.tiff")
    assert ids(tmp_path) == ["b", "site A/deep/y", "site A/x", "切片/häß lich"]


def test_the_same_name_in_two_folders_is_two_slides(tmp_path: Path):
    touch(tmp_path, "a/x.svs", "b/x.svs")
    assert ids(tmp_path) == ["a/x", "b/x"]
    assert ids(tmp_path / "a", tmp_path / "b") == ["a/x.svs", "b/x.svs"]
    assert ids(tmp_path / "a" / "x.svs", tmp_path / "b" / "x.svs") == ["a/x.svs", "b/x.svs"]


def test_ids_that_differ_in_capitals_or_extension_only_keep_the_extension(tmp_path: Path):
    touch(tmp_path, "x.svs", "x.tif", "X.ndpi", "y.svs")
    assert ids(tmp_path) == ["X.ndpi", "x.svs", "x.tif", "y"]
    touch(tmp_path / "other", "Y.svs", "y.svs")
    with pytest.raises(SlideTableError, match="capitals"):
        find_slides([tmp_path / "other"])


def test_only_slides_are_taken_from_folders_and_hidden_ones_are_not(tmp_path: Path):
    touch(tmp_path, "a.SVS", "notes.txt", ".hidden.svs", ".trash/b.svs", "c.jpg", "labels.csv")
    assert ids(tmp_path) == ["a"]
    assert ids(tmp_path, tmp_path / "c.jpg") == ["a", "c"]


def test_a_file_named_twice_is_one_slide(tmp_path: Path):
    touch(tmp_path, "a.svs", "b.svs")
    assert ids(tmp_path, tmp_path / "a.svs") == ["a", "b"]


def test_sources_come_sorted_whatever_the_order_given(tmp_path: Path):
    touch(tmp_path, "c.svs", "a.svs", "b.svs")
    files = [tmp_path / name for name in ("c.svs", "a.svs", "b.svs")]
    assert find_slides(files) == find_slides(files[::-1]) == find_slides([tmp_path])


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(
        st.tuples(
            st.sampled_from(["", "a/", "A/", "b/", "a/b/", "ä ö/"]),
            st.sampled_from(["x", "X", "x.y", "x.svs", "ß", "ss", "001", "NA"]),
            st.sampled_from(sorted(SLIDE_EXTENSIONS - {".dcm"})),
        ),
        min_size=1,
        max_size=9,
        unique=True,
    )
)
def test_ids_are_unique_or_refused(tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, str, str]]):
    folder = tmp_path_factory.mktemp("slides")
    touch(folder, *("".join(parts) for parts in names))
    try:
        sources = find_slides([folder])
    except SlideTableError:
        return
    assert len(sources) == len(names)
    assert len({source.slide_id.casefold() for source in sources}) == len(names)
    for source in sources:
        assert source.slide_id in source.path.as_posix()


def test_no_slide_at_all_is_an_error(tmp_path: Path):
    touch(tmp_path, "notes.txt")
    with pytest.raises(SlideTableError, match=r"no slide.*\.svs"):
        find_slides([tmp_path])


def test_the_files_of_a_dicom_series_are_one_slide(data_folder: Path):
    found = find_slides([data_folder / "slides" / "boxes"])
    assert len(found) == 3 < len(list((data_folder / "slides" / "boxes").iterdir()))
    # other slides lie in its folder: it is known by its UID, not by the name of a file
    assert [source.slide_id[:8] for source in found] == ["1.3.6.1.", "boxes", "small"]


def test_a_file_that_is_no_dicom_is_left_for_the_run_to_report(tmp_path: Path):
    touch(tmp_path, "a.dcm", "b.dcm")
    assert ids(tmp_path) == ["a", "b"]
    assert ids(tmp_path / "absent.dcm") == ["absent"]


# ---------------------------------------------------------------- the table


def test_a_table_alone_names_the_slides_relative_to_itself(tmp_path: Path):
    touch(tmp_path, "slides/a.svs", "slides/b.svs")
    table = write_table(tmp_path / "t.csv", "path,slide_id,mpp\nslides/a.svs,001,0.25\nslides/b.svs,,\n")
    assert find_slides([], table) == [
        SlideSource(tmp_path / "slides/a.svs", "001", 0.25),
        SlideSource(tmp_path / "slides/b.svs", "b", None),
    ]


def test_a_table_beside_folders_overrides_what_it_names(tmp_path: Path):
    touch(tmp_path, "slides/a.svs", "slides/b.svs", "slides/c.svs")
    table = write_table(tmp_path / "t.csv", "path,slide_id,mpp\nslides/b.svs,case 2,0.5\n,c,0.25\n")
    assert find_slides([tmp_path / "slides"], table) == [
        SlideSource(tmp_path / "slides/a.svs", "a", None),
        SlideSource(tmp_path / "slides/c.svs", "c", 0.25),
        SlideSource(tmp_path / "slides/b.svs", "case 2", 0.5),
    ]


def test_ids_of_a_table_stay_strings(tmp_path: Path):
    rows = ["001", "1", "NA", "nan", "1e5", "../../etc/passwd", "a\\b", "<b>x</b>", "100 %", "日本"]
    table = write_table(
        tmp_path / "t.csv", "path,slide_id\n" + "".join(f"{i}.svs,{row}\n" for i, row in enumerate(rows))
    )
    assert sorted(rows) == ids(table=table)


def test_a_table_from_excel_with_a_byte_order_mark_is_read(tmp_path: Path):
    table = tmp_path / "t.csv"
    table.write_bytes("\ufeffpath,mpp\r\na.svs,0.5\r\n".encode())
    assert find_slides([], table) == [SlideSource(tmp_path / "a.svs", "a", 0.5)]


def test_an_absolute_path_in_a_table_is_taken_as_it_is(tmp_path: Path):
    file = touch(tmp_path, "far/a.svs") / "far" / "a.svs"
    (tmp_path / "here").mkdir()
    table = write_table(tmp_path / "here" / "t.csv", f"path\n{file}\n")
    assert find_slides([], table) == [SlideSource(file, "a", None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,mpp\na,0.5\n", "path or slide_id"),
        ("", "path or slide_id"),
        ("path|mpp\na.svs|0.5\n", "path or slide_id"),
        ("path;mpp\na.svs;0,25\n", "with a point"),
        ("path;mpp,mask\na.svs;0.5\n", "unknown|columns"),
        ("path,mpp,mpp\na.svs,0.5,0.25\n", "each once"),
        ('path,mpp\n"a.svs,0.5\n', "no CSV"),
        ("path,colour\na.svs,red\n", "colour"),
        ("path,mpp\na.svs,fine\n", "'fine'"),
        ("path,mpp\na.svs,-0.5\n", "'-0.5'"),
        ("path,mpp\na.svs,0\n", "'0'"),
        ("path,mpp\na.svs,nan\n", "'nan'"),
        ("path,mpp\na.svs,inf\n", "'inf'"),
        ('path,mpp\na.svs,"0,25"\n', "'0,25'"),
        ("slide_id,mpp\na,0.5\n", "without path"),
        ("path,slide_id\na.svs,x\nb.svs,X\n", "unique"),
        ("path\na/x.svs\nb/x.svs\n", "unique"),
        ("path\na.svs\nb.svs\n./a.svs\n", "lines 2 and 4"),
        ("path,mpp\n", "no slide"),
    ],
    ids=str,
)
def test_a_table_that_cannot_be_used_is_an_error_with_a_fix(tmp_path: Path, text: str, message: str):
    table = write_table(tmp_path / "täble 1.csv", text)
    with pytest.raises(SlideTableError, match=message) as caught:
        find_slides([], table)
    assert str(caught.value).count("→") >= 2


def test_an_absent_table_is_an_error(tmp_path: Path):
    with pytest.raises(SlideTableError, match="no such file"):
        find_slides([], tmp_path / "t.csv")


def test_a_row_with_too_many_values_is_an_error_with_a_fix(tmp_path: Path):
    with pytest.raises(SlideTableError):
        find_slides([], write_table(tmp_path / "t.csv", "path,mpp\na.svs,0,25\n"))


def test_a_table_that_is_not_utf_8_is_an_error_with_a_fix(tmp_path: Path):
    table = tmp_path / "t.csv"
    table.write_bytes("path,mpp\nPräparat.svs,0.5\n".encode("latin-1"))
    with pytest.raises(SlideTableError, match="UTF-8"):
        find_slides([], table)


@pytest.mark.parametrize("row", ["slides/typo.svs,,0.5", ",typo,0.5"])
def test_a_row_that_names_no_slide_is_reported(tmp_path: Path, row: str):
    touch(tmp_path, "slides/a.svs")
    with pytest.raises(SlideTableError, match="typo"):
        find_slides([tmp_path / "slides"], write_table(tmp_path / "t.csv", f"path,slide_id,mpp\n{row}\n"))


def test_one_file_may_be_two_slides_of_different_ids(tmp_path: Path):
    assert ids(table=write_table(tmp_path / "t.csv", "path,slide_id,mask\na.svs,l,l.png\na.svs,r,r.png\n")) == [
        "l",
        "r",
    ]


@pytest.mark.parametrize(
    ("image", "mask", "flags"),
    [
        ("img_0001.png", "mask_0001.png", "--images 'img_{}.png' --masks 'mask_{}.png';"),
        ("0001.jpg", "0001_mask.png", "give --masks '{}_mask.png';"),
        ("a7 x.bmp", "a7-Masks.bmp", "--images '{} x.bmp' --masks '{}-Masks.bmp';"),
    ],
)
def test_masks_beside_images_are_no_slides_and_the_flags_are_named(tmp_path: Path, image: str, mask: str, flags: str):
    touch(tmp_path, "deep/other.png", f"deep/{image}", f"deep/{mask}")
    with pytest.raises(SlideTableError) as caught:
        find_slides([tmp_path])
    assert flags in str(caught.value)
    given = flags.removeprefix("give ").rstrip(";").split("'")[1::2]
    found = find_slides([tmp_path], masks=given[-1], images=given[0] if len(given) == 2 else None)
    assert (tmp_path / "deep" / image, tmp_path / "deep" / mask) in [(s.path, s.mask) for s in found]


@pytest.mark.parametrize("names", [("mask_1.png", "img_11.png"), ("unmasked_1.png", "1.png"), ("mask.png", "a.png")])
def test_images_that_only_sound_like_masks_are_slides(tmp_path: Path, names: tuple[str, str]):
    touch(tmp_path, *names)
    assert len(ids(tmp_path)) == 2


def test_two_rows_for_one_slide_are_refused(tmp_path: Path):
    touch(tmp_path, "slides/a.svs")
    table = write_table(tmp_path / "t.csv", "path,mpp\nslides/a.svs,0.5\nslides/a.svs,0.25\n")
    with pytest.raises(SlideTableError, match=r"a\.svs"):
        find_slides([tmp_path / "slides"], table)


def test_a_row_without_path_and_id_is_refused(tmp_path: Path):
    touch(tmp_path, "slides/a.svs")
    with pytest.raises(SlideTableError):
        find_slides([tmp_path / "slides"], write_table(tmp_path / "t.csv", "path,slide_id,mpp\n,,0.5\n"))


def test_ids_do_not_depend_on_how_a_folder_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path, "a/x.svs", "b/x.svs", "b/deep/y.svs")
    monkeypatch.chdir(tmp_path / "b" / "deep")
    assert ids(Path("../x.svs"), Path("../../a/x.svs")) == ids(tmp_path / "b/x.svs", tmp_path / "a/x.svs")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_of_any_spreadsheet_is_read(tmp_path: Path, delimiter: str, start: bytes, end: str):
    rows = [
        ["path", "slide_id", "mpp"],
        ["a, b.svs", "x;y", "0.5"],
        ["", "", ""],
        ["c.svs", "two\tcells", ""],
        ["", "", ""],
    ]
    lines = [delimiter.join(f'"{cell}"' if set(cell) & set(",;\t") else cell for cell in row) for row in rows]
    (tmp_path / "t.csv").write_bytes(start + end.join([*lines, ""]).encode())
    assert find_slides([], tmp_path / "t.csv") == [
        SlideSource(tmp_path / "c.svs", "two\tcells", None),
        SlideSource(tmp_path / "a, b.svs", "x;y", 0.5),
    ]


def test_patients_and_masks_come_from_the_table(tmp_path: Path):
    touch(tmp_path, "a.svs", "b.svs", "c.svs", "m/a.png")
    text = "path,patient_id,mask\na.svs,007,m/a.png\nb.svs,,m/absent.geojson\nc.svs,P 1,\n"
    expected = [
        SlideSource(tmp_path / "a.svs", "a", None, tmp_path / "m/a.png", "007"),
        SlideSource(tmp_path / "b.svs", "b", None, tmp_path / "m/absent.geojson", None),
        SlideSource(tmp_path / "c.svs", "c", None, None, "P 1"),
    ]
    table = write_table(tmp_path / "t.csv", text)
    assert find_slides([], table) == expected
    assert find_slides([tmp_path], table) == expected


def test_a_mask_of_the_table_is_no_slide(tmp_path: Path):
    touch(tmp_path, "a.png", "b.png", "a_tissue.png")
    table = write_table(tmp_path / "t.csv", "slide_id,mask\na,a_tissue.png\n")
    assert [(s.slide_id, s.mask) for s in find_slides([tmp_path], table)] == [
        ("a", tmp_path / "a_tissue.png"),
        ("b", None),
    ]


# ---------------------------------------------------------------- plain images and masks


def pairs(*inputs: Path, **options: object) -> dict[str, str | None]:
    """Slide id → the mask's path relative to the first folder."""
    found = find_slides(list(inputs), **options)  # type: ignore[arg-type]
    return {
        source.slide_id: source.mask and Path(*source.mask.resolve().relative_to(inputs[0].resolve()).parts).as_posix()
        for source in found
    }


def test_plain_images_are_taken_where_there_are_no_slides(tmp_path: Path):
    touch(tmp_path / "images", "a.PNG", "b.jpg", "c.jpeg", "d.bmp", "e.webp", "f.gif", "deep/g.png")
    assert ids(tmp_path / "images") == ["a", "b", "c", "d", "deep/g", "e"]
    touch(tmp_path / "slides", "a.svs", "a.png", "thumbnails/a.jpg")
    assert ids(tmp_path / "slides") == ["a"]
    assert ids(tmp_path / "slides", tmp_path / "images") == ["a.PNG", "a.svs", "b", "c", "d", "deep/g", "e"]


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        (
            ["img_0001.png", "mask_0001.png", "img_0002.png", "mask_0002.png", "img_0003.png"],
            {"images": "img_{}.png", "masks": "mask_{}.png"},
            {"img_0001": "mask_0001.png", "img_0002": "mask_0002.png", "img_0003": "mask_0003.png"},
        ),
        (
            ["x.png", "x_mask.png", "y.jpg", "y_mask.png"],
            {"masks": "{stem}_mask.png"},
            {"x": "x_mask.png", "y": "y_mask.png"},
        ),
        (["x.png", "x_mask.png", "y_mask.png"], {"masks": "{}_mask.png", "images": "{}.png"}, {"x": "x_mask.png"}),
        (
            ["p1/x.png", "p1/masks/mask_x.png", "p2/x.png", "p2/masks/mask_x.png"],
            {"masks": "masks/mask_{}.png"},
            {"p1/x": "p1/masks/mask_x.png", "p2/x": "p2/masks/mask_x.png"},
        ),
        (["images/x.png", "masks/x.png"], {"masks": "../masks/{}.png"}, {"images/x": "masks/x.png"}),
        (
            ["c1/image.png", "c1/mask.png", "c2/image.png"],
            {"masks": "mask.png"},
            {"c1/image": "c1/mask.png", "c2/image": "c2/mask.png"},
        ),
        (["img_1.tif", "mask_1.png"], {"images": "img_{}.tif", "masks": "mask_{}.png"}, {"img_1": "mask_1.png"}),
        (["x.png", "x.tif"], {"masks": "{}.tif"}, {"x": "x.tif"}),
        (["a.svs", "a.geojson", "b.svs"], {"masks": "{}.geojson"}, {"a": "a.geojson", "b": "b.geojson"}),
        (["img_1.png", "img_1_gt.png"], {"images": "img_{}.png", "masks": "{stem}_gt.png"}, {"img_1": "img_1_gt.png"}),
        (["a+(1).png", "m_a+(1).png"], {"images": "{}.png", "masks": "m_{}.png"}, {"a+(1)": "m_a+(1).png"}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_pattern_finds_the_mask_of_each_image(
    tmp_path: Path, files: list[str], options: dict[str, str], expected: dict[str, str]
):
    touch(tmp_path, *files)
    assert pairs(tmp_path, **options) == expected


def test_a_folder_of_masks_is_searched_by_relative_path_and_by_stem(tmp_path: Path):
    touch(tmp_path, "p1/x.png", "p2/x.png", "y.v2.png", "z.png")
    touch(tmp_path, "masks/p1/x.png", "masks/p2/x.geojson", "masks/y.v2.tif")
    assert pairs(tmp_path, masks=tmp_path / "masks") == {
        "p1/x": "masks/p1/x.png",
        "p2/x": "masks/p2/x.geojson",
        "y.v2": "masks/y.v2.tif",
        "z": "masks/z.png",
    }


def test_a_missing_mask_fails_its_slide_and_no_other(tmp_path: Path):
    touch(tmp_path, "x.png", "y.png", "x_mask.png")
    found = {source.slide_id: source for source in find_slides([tmp_path], masks="{}_mask.png")}
    assert found["x"].mask.is_file()
    with pytest.raises(MaskError, match=r"y_mask\.png.*no such file"):
        read_mask(found["y"].mask, (8, 8), (0, 0, 8, 8), (8, 8))


def test_masks_of_files_named_directly_and_of_a_table(tmp_path: Path):
    touch(tmp_path, "x.png", "x_mask.png", "y.png", "y_mask.png", "other.png")
    for pattern in ("{}_mask.png", str(tmp_path / "{}_mask.png")):
        assert [s.mask for s in find_slides([tmp_path / "x.png"], masks=pattern)] == [tmp_path / "x_mask.png"]
    table = write_table(tmp_path / "t.csv", "path,mask\nx.png,\ny.png,other.png\n")
    masks = [source.mask for source in find_slides([], table, masks="{}_mask.png")]
    assert masks == [tmp_path / "x_mask.png", tmp_path / "other.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": "mask_{}.png"}, "no mask for any.*--images"),
        ({"masks": "nowhere"}, "no mask for any"),
        ({"masks": "{}/mask.png"}, "not in a folder"),
        ({"masks": "{}.png"}, "no mask for any"),
        ({"masks": "one.tif"}, "one mask .* for two slides"),
        ({"images": "img_*.png"}, "img_"),
        ({"images": "images/{}.png"}, "pattern of a file name"),
        ({"images": "{}_{}.png"}, "one {}"),
        ({"images": "scan_{}.png"}, r"searched for scan_\{\}\.png"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_an_error_with_a_fix(tmp_path: Path, options: dict[str, str], message: str):
    touch(tmp_path, "img_1.png", "img_2.png", "one.tif")
    with pytest.raises(SlideTableError, match=message) as caught:
        find_slides([tmp_path], **options)
    assert str(caught.value).count("→") >= 2


def test_two_masks_for_one_image_in_a_folder_are_refused(tmp_path: Path):
    touch(tmp_path, "i/x.png", "m/x.png", "m/x.geojson")
    with pytest.raises(SlideTableError, match="expected one"):
        find_slides([tmp_path / "i"], masks=tmp_path / "m")


def test_real_fields_as_a_challenge_set(data_folder: Path, tmp_path: Path):
    for number, file in enumerate(sorted((data_folder / "glas").glob("*.tif"))[:3]):
        with Slide(file) as slide:
            pixels = slide.read_region(0, 0, 0, slide.size_l0)
        Image.fromarray(pixels).save(tmp_path / f"img_{number:04}.png")
        Image.fromarray((pixels.mean(axis=2) < 200).astype(np.uint8)).save(tmp_path / f"mask_{number:04}.png")
    sources = find_slides([tmp_path], images="img_{}.png", masks="mask_{}.png")
    assert [source.slide_id for source in sources] == ["img_0000", "img_0001", "img_0002"]
    for source in sources:
        with open_slide(source.path, source.slide_id) as image:
            picture, _ = image.read_thumbnail(3.0)
            mask = read_mask(source.mask, image.size_l0, image.bounds_l0, picture.shape[:2])
        assert ((picture.mean(axis=2) < 200) == mask).mean() > 0.9


# ---------------------------------------------------------------- shards


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=40), count=st.integers(1, 12))
def test_shards_divide_the_slides_evenly(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], count: int):
    folder = tmp_path_factory.mktemp("slides")
    for i, size in enumerate(sizes):
        (folder / f"{i}.svs").write_bytes(bytes(size))
    sources = find_slides([folder])
    shards = [shard(sources, f"{i}/{count}") for i in range(1, count + 1)]
    assert Counter(source.slide_id for part in shards for source in part) == Counter({s.slide_id: 1 for s in sources})
    assert shards == [shard(sources[::-1], f"{i}/{count}")[::-1] for i in range(1, count + 1)]
    loads = [sum(source.path.stat().st_size + 1 for source in part) for part in shards]
    # dealing the largest first leaves the fullest shard at most one slide above the emptiest
    assert max(loads) - min(loads) <= max(sizes) + 1


def test_slides_that_cannot_be_measured_are_dealt_out_too(tmp_path: Path):
    sources = [SlideSource(tmp_path / f"absent {i}.svs", str(i)) for i in range(10)]
    assert [len(shard(sources, f"{i}/5")) for i in range(1, 6)] == [2] * 5


def test_a_mirax_slide_weighs_what_its_folder_does(tmp_path: Path):
    touch(tmp_path, "a.mrxs", "a/Data0000.dat", "b.svs", "c.svs")
    (tmp_path / "a/Data0000.dat").write_bytes(bytes(1000))
    for name in ("b.svs", "c.svs"):
        (tmp_path / name).write_bytes(bytes(400))
    sources = [SlideSource(tmp_path / name, name) for name in ("a.mrxs", "b.svs", "c.svs")]
    assert [source.slide_id for source in shard(sources, "1/2")] == ["a.mrxs"]


@pytest.mark.parametrize(
    "text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "a/b", "1.5/3", "1/2/3", "1 of 2", "١/٢x", "9" * 50 + "/1"]
)
def test_a_shard_that_is_none_is_an_error(text: str):
    with pytest.raises(SlideTableError, match="i/n"):
        shard([SlideSource(Path("a.svs"), "a")], text)


# ---------------------------------------------------------------- links, and what is not taken


def test_linked_folders_are_searched_and_a_circle_of_links_ends(tmp_path: Path):
    touch(tmp_path, "slides/a.tif", "nas/b.tif", "nas/deep/c.tif")
    (tmp_path / "slides" / "tcga").symlink_to("../nas")
    (tmp_path / "nas" / "deep" / "up").symlink_to("../..")
    assert ids(tmp_path / "slides")[:3] == ["a", "tcga/b", "tcga/deep/c"]
    only = tmp_path / "only"
    only.mkdir()
    (only / "x").symlink_to("../nas/deep")
    assert "x/c" in ids(only)


def test_pyramids_of_every_ending_are_taken(tmp_path: Path):
    touch(tmp_path, "a.tif", "b.qptiff", "c.btf", "d.tf8", "e.tf2")
    assert ids(tmp_path) == ["a", "b", "c", "d", "e"]


def test_every_file_of_a_folder_is_taken_or_counted_with_its_reason(tmp_path: Path):
    touch(tmp_path, "a.svs", "e.png", "f.sdpc", "g.jp2", "h.JP2", ".hidden", "sub/readme", "m.mrxs", "m/Data0000.dat")
    not_taken = NotTaken()
    found = find_slides([tmp_path], not_taken=not_taken)
    assert [source.slide_id for source in found] == ["a", "m"]
    assert len(not_taken) == 6
    (line,) = not_taken.lines()
    assert line.startswith("6 files not taken: ")
    for part in ("1 .png (plain images beside slides", "2 .jp2", "1 .sdpc", "1 without ending", "(hidden)"):
        assert part in line
    not_taken = NotTaken()
    find_slides([tmp_path], images="{}.png", not_taken=not_taken)
    assert "not named like --images" in not_taken.lines()[0]


def test_masks_and_files_of_a_series_are_not_counted(tmp_path: Path):
    touch(tmp_path, "img_1.png", "mask_1.png")
    not_taken = NotTaken()
    find_slides([tmp_path], masks="mask_{}.png", images="img_{}.png", not_taken=not_taken)
    assert not_taken.lines() == []
