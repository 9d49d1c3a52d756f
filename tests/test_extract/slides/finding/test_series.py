"""A slide of several files is one slide: its id does not depend on the names of its files, and all of them are it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extract.errors import SlideChangedError
from extract.slides.finding.sources import find_slides
from extract.slides.opening import open_slide
from extract.slides.parts import slide_fingerprint, slide_parts
from extract.store import TissueRecipe
from extract.tiling.sameness import check_same
from extract.tiling.tiles import cut_slide
from tests.test_extract.slides.dicom_files import write_level
from tests.test_extract.small import TILES, tissue_image


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A folder with a series of two levels, whose files are named by nothing."""
    folder = tmp_path / "slides" / "SM_1"
    full = tissue_image(512, 384)
    write_level(folder / "c1.dcm", full, 0.5, series="1.2.3.4", number=1)
    write_level(folder / "b7.dcm", full[::4, ::4], 2.0, series="1.2.3.4", number=2)
    return folder


def ids(*inputs: Path) -> list[str]:
    return [source.slide_id for source in find_slides(list(inputs))]


def test_the_id_of_a_series_is_its_folders_whatever_its_files_are_called(series: Path):
    root = series.parent
    assert ids(root) == ids(series) == ids(series / "c1.dcm") == ids(series / "b7.dcm") == ["SM_1"]
    (series / "b7.dcm").rename(series / "zz.dcm")
    assert ids(root) == ["SM_1"]
    write_level(series / "a0.dcm", tissue_image(512, 384)[::8, ::8], 4.0, series="1.2.3.4", number=3)
    assert ids(root) == ["SM_1"]
    (found,) = find_slides([root])
    assert found.path.name == "c1.dcm"


def test_several_series_in_a_folder_are_known_by_their_uids(series: Path):
    write_level(series / "other.dcm", tissue_image(128, 128), 0.5, series="1.2.3.9", number=1)
    assert ids(series.parent) == ["SM_1/1.2.3.4", "SM_1/1.2.3.9"]
    assert ids(series) == ["1.2.3.4", "1.2.3.9"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    jpeg=st.sampled_from(["", "422", "420"]),
    tile=st.sampled_from([64, 128, 256]),
    size=st.tuples(st.integers(64, 400), st.integers(64, 300)),
)
def test_pixels_are_those_of_pydicom(tmp_path: Path, jpeg: str, tile: int, size: tuple[int, int]):
    import pydicom

    path = tmp_path / f"{jpeg}-{tile}-{size[0]}-{size[1]}" / "a.dcm"
    write_level(path, tissue_image(*size, margin=8), 0.5, series="1.2.3.4", number=1, tile=tile, jpeg=jpeg)
    dataset = pydicom.dcmread(path)
    frames = pydicom.pixels.pixel_array(dataset, raw=False)
    frames = frames if frames.ndim == 4 else frames[None]
    with open_slide(path) as slide:
        assert slide.size_l0 == size
        for i, frame in enumerate(frames):
            row, column = divmod(i, -(-size[0] // tile))
            width, height = min(tile, size[0] - column * tile), min(tile, size[1] - row * tile)
            shown = slide.read_region(column * tile, row * tile, 0, (width, height))
            # pydicom turns YCbCr into RGB in floating point, libjpeg in whole numbers
            assert np.abs(shown.astype(int) - frame[:height, :width]).max() <= (2 if jpeg else 0)


def record_of(path: Path) -> dict[str, Any]:
    with open_slide(path) as slide:
        return dict(cut_slide(slide, "s", replace(TILES, mpp=None, tissue=TissueRecipe("none"))).record)


def test_another_level_0_is_another_slide_and_a_further_level_is_not(series: Path, tmp_path: Path):
    (source,) = find_slides([series])
    record = record_of(source.path)
    write_level(series / "a0.dcm", tissue_image(512, 384)[::8, ::8], 4.0, series="1.2.3.4", number=3)
    (source,) = find_slides([series])
    check_same(source, record, None)
    whole = (series / "c1.dcm").read_bytes()
    write_level(series / "c1.dcm", tissue_image(512, 384, seed=4), 0.5, series="1.2.3.4", number=1)
    with pytest.raises(SlideChangedError, match="--redo"):
        check_same(source, record, None)
    (series / "c1.dcm").write_bytes(whole)
    check_same(source, record, None)
    (series / "b7.dcm").unlink()
    with pytest.raises(SlideChangedError):
        check_same(source, record, None)


def test_level_0_that_comes_late_is_noticed(series: Path, tmp_path: Path):
    late = tmp_path / "c1.dcm"
    shutil.move(series / "c1.dcm", late)
    (source,) = find_slides([series])
    record = record_of(source.path)
    shutil.move(late, series / "c1.dcm")
    (source,) = find_slides([series])
    with pytest.raises(SlideChangedError):
        check_same(source, record, None)


def test_every_file_of_a_mirax_slide_is_part_of_it(tmp_path: Path):
    for name in ("m.mrxs", "m/Slidedat.ini", "m/Index.dat", "m/Data0000.dat", "n/Data0000.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    parts = slide_parts(tmp_path / "m.mrxs")
    assert [part.name for part in parts] == ["m.mrxs", "Data0000.dat", "Index.dat", "Slidedat.ini"]
    before = slide_fingerprint(tmp_path / "m.mrxs")
    record = before.to_record()
    assert before.matches(record)
    (tmp_path / "m" / "Data0000.dat").write_text("complete now")
    assert not slide_fingerprint(tmp_path / "m.mrxs").matches(record)
    # a store of 0.1 noted the .mrxs file alone
    assert slide_fingerprint(tmp_path / "m.mrxs").matches({k: record[k] for k in ("size_bytes", "sampled_sha256")})
    # a link is followed to what lies beside its target
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "linked.mrxs").symlink_to("../m.mrxs")
    assert slide_parts(tmp_path / "cohort" / "linked.mrxs")[1:] == slide_parts(tmp_path / "m.mrxs")[1:]


def test_the_files_that_an_index_names_are_parts_of_the_slide(tmp_path: Path):
    (tmp_path / "a.vms").write_text(
        "[Virtual Microscope Specimen]\nImageFile=a_1.jpg\nImageFile(0,1)=a_2.jpg\nMapFile=a.map\n"
    )
    for name in ("a_1.jpg", "a_2.jpg", "a.map", "b.jpg"):
        (tmp_path / name).write_text(name)
    assert [part.name for part in slide_parts(tmp_path / "a.vms")] == ["a.vms", "a.map", "a_1.jpg", "a_2.jpg"]
