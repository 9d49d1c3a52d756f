"""Which slides a run is about, and their ids: unique, stable, and never a way out of the store."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract.errors import SlideTableError
from extract.sources import SLIDE_EXTENSIONS, SlideSource, find_slides


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
    assert [source.slide_id for source in found] == ["boxes", "boxes_0", "small"]
    assert len(found) < len(list((data_folder / "slides" / "boxes").iterdir()))


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
        ("path;mpp\na.svs;0.5\n", "path or slide_id"),
        ("path,colour\na.svs,red\n", "colour"),
        ("path,mask\na.svs,m.png\n", "mask"),
        ("path,mpp\na.svs,fine\n", "'fine'"),
        ("path,mpp\na.svs,-0.5\n", "'-0.5'"),
        ("path,mpp\na.svs,0\n", "'0'"),
        ("path,mpp\na.svs,nan\n", "'nan'"),
        ("path,mpp\na.svs,inf\n", "'inf'"),
        ('path,mpp\na.svs,"0,25"\n', "'0,25'"),
        ("slide_id,mpp\na,0.5\n", "without path"),
        ("path,slide_id\na.svs,x\nb.svs,X\n", "unique"),
        ("path\na/x.svs\nb/x.svs\n", "unique"),
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
