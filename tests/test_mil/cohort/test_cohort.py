"""Label tables: what is read, what is refused, and what is left out in plain sight."""

import re
from pathlib import Path

import pytest

from mil.cohort.cohort import Cohort
from mil.cohort.joining import join_store
from mil.cohort.reading import read_cohort
from mil.errors import CohortError

TABLE = """slide_id,patient_id,subtype
001,01,LumA
NA,NA,LumB
siteA/slide 3,02,LumA
schön,03,LumB
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str | bytes, name: str = "labels.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


def lost(cohort: Cohort, start: str) -> tuple[str, ...]:
    """The ids of the attrition row whose reason starts like this."""
    (ids,) = [ids for reason, _, ids in cohort.attrition.rows() if reason.startswith(start)]
    return ids


def test_ids_stay_as_written(write):
    cohort = read_cohort(write(TABLE), "subtype")
    assert cohort.slide_ids == ("001", "NA", "siteA/slide 3", "schön")
    assert cohort.patient_ids == ("01", "NA", "02", "03")
    assert cohort.class_names == ("LumA", "LumB")
    assert cohort.labels.tolist() == [0, 1, 0, 1]
    assert (len(cohort), cohort.target) == (4, "subtype")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf", b"\n\r\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_dialects_read_alike(write, delimiter, prefix, newline):
    text = TABLE.replace(",", delimiter).replace("\n", newline) + newline + delimiter * 2 + newline
    cohort = read_cohort(write(prefix + text.encode()), "subtype")
    assert cohort.slide_ids == ("001", "NA", "siteA/slide 3", "schön")
    assert cohort.attrition.n_rows == 4  # blank lines are no rows


def test_a_comma_inside_a_semicolon_table_is_text(write):
    text = "slide_id;patient_id;ER, PR\na;1;pos, pos\nb;2;pos, pos\nc;3;neg\nd;4;neg\n"
    assert read_cohort(write(text), "ER, PR").class_names == ("neg", "pos, pos")


def test_quoted_cells_hold_separators(write):
    text = TABLE.replace("schön", '"a, b"')
    assert read_cohort(write(text), "subtype").slide_ids[3] == "a, b"


@pytest.mark.parametrize("header", ["case_id,slide_id,label", "PATIENT,FILENAME,label", "Patient_ID,Slide,label"])
def test_known_column_names_are_found(write, header):
    cohort = read_cohort(write(f"{header}\np1,s1,x\np2,s2,x\np3,s3,y\np4,s4,y\n"), "label")
    assert cohort.slide_ids == ("s1", "s2", "s3", "s4")
    assert cohort.patient_ids == ("p1", "p2", "p3", "p4")


def test_any_column_can_be_mapped(write):
    text = "slide_id,who,image,y\n1,a,s1,0\n2,b,s2,0\n3,c,s3,1\n4,d,s4,1\n"
    cohort = read_cohort(write(text), "y", slide_column="image", patient_column="who")
    assert (cohort.slide_ids, cohort.patient_ids) == (("s1", "s2", "s3", "s4"), ("a", "b", "c", "d"))
    each_its_own = read_cohort(write(text), "y", slide_column="image", patient_column="image")
    assert each_its_own.patient_ids == each_its_own.slide_ids


def test_rows_without_a_label_are_listed(write):
    rows = "e1,9,\nm1,9,NA\nm2,9,nan\nm3,9,n/a\nn1,9,none\nn2,8,none\n,7,LumA\n"
    cohort = read_cohort(write(TABLE + rows), "subtype")
    assert lost(cohort, "rows without a label") == ("e1",)
    assert lost(cohort, "rows whose label reads as missing") == ("m1", "m2", "m3")
    assert lost(cohort, "rows without a slide id") == ("row 12 (patient '7')",)
    assert cohort.class_names == ("LumA", "LumB", "none")
    counts = [count for _, count, _ in cohort.attrition.rows()]
    assert counts[0] == 11 == sum(counts[1:])


def test_classes_choose_and_rescue_labels(write):
    rows = "m1,8,NA\nm2,9,NA\n"
    cohort = read_cohort(write(TABLE + rows), "subtype", classes=["LumA", "NA"])
    assert cohort.class_names == ("LumA", "NA")
    assert lost(cohort, "rows of a class") == ("NA", "schön")
    assert lost(cohort, "rows whose label reads") == ()


def test_subset_keeps_rows_together(write):
    cohort = read_cohort(write(TABLE), "subtype").subset([3, 0])
    assert (cohort.slide_ids, cohort.patient_ids) == (("schön", "001"), ("03", "01"))
    assert (cohort.labels.tolist(), cohort.class_names) == ([1, 0], ("LumA", "LumB"))


REFUSED = {
    "empty file": ("", "an empty file"),
    "header only": ("slide_id,patient_id,subtype\n", "no rows"),
    "one column": ("slide_id\na\n", "no separator"),
    "two separators": ("slide_id,a;patient_id,subtype\n1,2;3,4\n", "',', ';'"),
    "unknown target": (TABLE.replace("subtype", "subtipe"), "did you mean 'subtipe'"),
    "no slide column": (TABLE.replace("slide_id", "image"), "slide_column="),
    "no patient column": (TABLE.replace("patient_id", "person"), "patient_column=<the slide column>"),
    "ambiguous column": (TABLE.replace("subtype", "PATIENT_ID"), "2 columns named 'patient_id'"),
    "target is an id": (TABLE.replace("patient_id,subtype", "subtype,x"), "no patient column"),
    "ragged row": (TABLE + "x,1\n", "2 cells in row 6 → expected 3"),
    "open quote": (TABLE + '"x,1,LumA\n', "does not parse"),
    "not UTF-8": (TABLE.encode("latin-1"), "not UTF-8"),
    "UTF-16": (TABLE.encode("utf-16"), "not UTF-8"),
    "identical duplicate": (TABLE + "001,01,LumA\n", "'001' in rows 2, 6 →"),
    "two labels": (TABLE + "001,01,LumB\n", "'001' in rows 2, 6 with labels 'LumA' and 'LumB'"),
    "two patients": (TABLE + "001,77,LumA\n", "with patients '01' and '77'"),
    "empty patient": (TABLE + "x,,LumB\n", "no patient id in column 'patient_id' for 'x (row 6)'"),
    "one class": (TABLE.replace("LumB", "LumA"), "1 class(es), 'LumA'"),
    "no class": ("slide_id,patient_id,subtype\na,1,\n", "no labelled slide"),
    "one patient": (TABLE.replace("schön,03", "schön,NA"), "class 'LumB' ('NA')"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tables_are_refused_with_a_way_out(write, case):
    text, message = REFUSED[case]
    with pytest.raises(CohortError, match=re.escape(message)) as caught:
        read_cohort(write(text), "subtype")
    assert str(caught.value).count("→") == 2


def test_a_missing_file_is_refused_with_its_neighbour(write):
    path = write(TABLE)
    with pytest.raises(CohortError, match=r"did you mean 'labels\.csv'"):
        read_cohort(path.with_name("label.csv"), "subtype")
    with pytest.raises(CohortError, match="a folder"):
        read_cohort(path.parent, "subtype")


def test_target_must_not_be_an_id_column(write):
    with pytest.raises(CohortError, match="as target and as id column"):
        read_cohort(write(TABLE), "patient_id")


def test_an_asked_for_column_must_exist(write):
    with pytest.raises(CohortError, match="did you mean 'slide_id'"):
        read_cohort(write(TABLE), "subtype", slide_column="slide_ids")
    with pytest.raises(CohortError, match="did you mean 'LumA'"):
        read_cohort(write(TABLE), "subtype", classes=["Lum A", "LumB"])


def cohort_of(write, *slide_ids: str) -> Cohort:
    """These slides, of patients and classes that never are the reason for an error; and one unlabelled row."""
    rows = "".join(f'"{name}",{at},{"ab"[at // 2 % 2]}\n' for at, name in enumerate(slide_ids))
    return read_cohort(write("slide_id,patient_id,y\n" + rows + "f1,100,a\nf2,101,a\nf3,102,b\nf4,103,b\nu,9,\n"), "y")


def joined(write, table_id: str, *store_ids: str) -> str | None:
    result = join_store(cohort_of(write, table_id), [*store_ids, "f1", "f2", "f3", "f4"])
    return result.slide_ids[0] if len(result) == 5 else None


@pytest.mark.parametrize(
    ("table_id", "store_ids", "expected"),
    [
        ("x", ["x", "siteA/x", "siteB/x"], "x"),  # exact before all
        ("x.svs", ["x"], "x"),
        ("x.SVS", ["siteA/x"], "siteA/x"),
        ("x", ["siteA/x.svs"], "siteA/x.svs"),  # the store kept the ending to tell two files apart
        ("siteA/x.svs", ["x", "siteA/x", "siteB/x"], "siteA/x"),
        ("/mnt/slides/siteB/x.svs", ["siteA/x", "siteB/x"], "siteB/x"),
        ("siteA\\x.svs", ["siteA/x", "siteB/x"], "siteA/x"),
        ("siteB/x", ["siteA/x"], None),  # another folder is another slide
        ("slide 1.tif", ["siteA/slide 1"], "siteA/slide 1"),
        ("sch\u00f6n", ["siteA/scho\u0308n"], "siteA/scho\u0308n"),
        ("x.1", ["x", "x.2"], None),  # what follows a dot is a name unless it is a file's ending
        ("S1.A1", ["S1"], None),
        ("x.svs", ["x.tif"], None),
        ("x", ["y"], None),
    ],
)
def test_rows_join_the_slide_they_mean(write, table_id, store_ids, expected):
    assert joined(write, table_id, *store_ids) == expected


@pytest.mark.parametrize(
    ("table_id", "store_id"),
    [
        ("X", "x"),
        ("X.svs", "siteA/x"),
        ("100.0", "100"),
        ("0100", "100.svs"),
        ("slide 1", "slide1"),
        ("A/x", "a/X.svs"),
    ],
)
def test_a_row_that_the_store_spells_otherwise_is_not_left_out(write, table_id, store_id):
    with pytest.raises(CohortError, match="spells otherwise") as error:
        joined(write, table_id, store_id)
    assert repr(table_id) in str(error.value)
    assert repr(store_id) in str(error.value)


def test_a_row_beside_the_one_that_the_slide_belongs_to_is_left_out_as_before(write):
    result = join_store(cohort_of(write, "X", "x"), ["x", "f1", "f2", "f3", "f4"])
    assert lost(result, "rows whose slide is not in the store") == ("X",)


def test_join_lists_what_is_left_on_both_sides(write):
    cohort = cohort_of(write, "gone", "kept.svs")
    result = join_store(cohort, ["siteA/kept", "orphan", "siteB/u", "f1", "f2", "f3", "f4"])
    assert result.slide_ids == ("siteA/kept", "f1", "f2", "f3", "f4")
    assert result.patient_ids == ("1", "100", "101", "102", "103")
    assert result.labels.tolist() == [0, 0, 0, 1, 1]
    assert lost(result, "rows whose slide is not in the store") == ("gone",)
    assert lost(result, "slides in the store without a row") == ("orphan",)  # `u` has a row, without a label
    assert result.attrition.rows()[-1] == ("slides kept", 5, ())


@pytest.mark.parametrize(
    ("table_ids", "store_ids", "message"),
    [
        (["x"], ["siteA/x", "siteB/x"], "fits several slides of the store: 'siteA/x', 'siteB/x'"),
        (["x"], ["x.svs", "x.tif"], "'x.svs', 'x.tif'"),
        (["x", "x.svs"], ["x"], "'x' and 'x.svs', which both fit the slide 'x'"),
    ],
)
def test_ambiguous_joins_are_refused(write, table_ids, store_ids, message):
    with pytest.raises(CohortError, match=re.escape(message)):
        join_store(cohort_of(write, *table_ids), [*store_ids, "f1", "f2", "f3", "f4"])


def test_join_refuses_classes_that_the_store_thins_out(write):
    with pytest.raises(CohortError, match=re.escape("class 'b' ('102')")):
        join_store(cohort_of(write), ["f1", "f2", "f3"])
    with pytest.raises(CohortError, match="no slide in common"):
        join_store(cohort_of(write), ["other"])


@pytest.mark.data
def test_glas_table_reads(data_folder: Path):
    cohort = read_cohort(data_folder / "glas" / "labels.csv", "grade")
    assert (len(cohort), len(set(cohort.patient_ids)), len(cohort.class_names)) == (106, 10, 5)
