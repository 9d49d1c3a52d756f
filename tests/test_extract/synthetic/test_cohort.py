"""The synthetic cohort: readable slides, tables that agree, the same bytes for the same seed, a truth that is true."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import pytest

from extract.synthetic import cohort as synthetic
from extract.synthetic.cohort import SUBTYPES, SyntheticCohort, SyntheticSlide, make_cohort, make_large_slide
from extract.synthetic.drawing import SyntheticError
from extract.synthetic.lesions import lesion_tiles, read_lesions
from extract.synthetic.pyramid import write_pyramid

TINY = {"patients_per_class": 2, "slides_per_patient": 2, "size_l0": (576, 512), "mpp_missing_every": 5}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCohort:
    return make_cohort(tmp_path_factory.mktemp("demo") / "Übung eins", seed=3, **TINY)


def pixels(path: Path, level: int = 0) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("photometric", ["ycbcr", "rgb"])
def test_openslide_reads_what_was_written(tmp_path: Path, photometric: str) -> None:
    path = tmp_path / "ein Schnitt é.tif"
    image = gradient(300, 420)
    write_pyramid(path, image, mpp=0.2425, tile_px=64, quality=95, photometric=photometric)
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.level_dimensions == ((420, 300), (210, 150), (105, 75))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.2425, rel=1e-6)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.2425, rel=1e-6)
    for level, step in enumerate([1, 2, 4]):
        shown = image.reshape(300 // step, step, 420 // step, step, 3).mean(axis=(1, 3)) if step > 1 else image
        assert np.abs(pixels(path, level) - shown.astype(float)).max() < 6


def test_no_mpp_is_written_unless_given(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tif", gradient(64, 64), tile_px=64, levels=1)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert not [name for name in slide.properties if name.startswith("openslide.mpp")]


@pytest.mark.parametrize(
    ("size", "downsample", "rounding", "expected"),
    [((2001, 400), 2, "floor", 2.0005), ((9999, 400), 4, "ceil", 3.9998), ((130, 90), 2, "ceil", 2.0)],
)
def test_levels_round_as_scanners_do(
    tmp_path: Path, size: tuple[int, int], downsample: int, rounding: str, expected: float
) -> None:
    write_pyramid(tmp_path / "a.tif", gradient(size[1], size[0]), 0.5, 2, downsample=downsample, rounding=rounding)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.level_downsamples[1] == pytest.approx(expected, abs=1e-9)


def test_a_pyramid_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SyntheticError, match="float64"):
        write_pyramid(tmp_path / "a.tif", np.zeros((64, 64, 3)))  # type: ignore[arg-type]
    with pytest.raises(SyntheticError, match="levels=8"):
        write_pyramid(tmp_path / "a.tif", gradient(64, 64), levels=8)
    assert not list(tmp_path.iterdir())


def test_tables_agree_with_the_files(cohort: SyntheticCohort) -> None:
    labels, table = rows(cohort.labels_path), rows(cohort.slides_table_path)
    ids = [slide.slide_id for slide in cohort.slides]
    assert [row["slide_id"] for row in labels] == [row["slide_id"] for row in table] == ids
    assert list(read_lesions(cohort.lesions_path)) == ids
    assert Counter(row["subtype"] for row in labels) == dict.fromkeys(SUBTYPES, 4)
    assert set(Counter(row["patient_id"] for row in labels).values()) == {2}
    assert len({(row["patient_id"], row["subtype"]) for row in labels}) == 8
    in_file = []
    for row in table:
        with openslide.OpenSlide(cohort.folder / row["path"]) as slide:
            in_file.append("openslide.mpp-x" in slide.properties)
            stated = slide.properties.get("openslide.mpp-x", row["mpp"])
            assert float(stated) == pytest.approx(0.5)
    assert in_file == [row["mpp"] == "" for row in table] == [slide.mpp_in_file for slide in cohort.slides]
    assert in_file.count(False) == 3


def test_everything_says_that_it_is_synthetic(cohort: SyntheticCohort) -> None:
    truth = json.loads(cohort.lesions_path.read_text(encoding="utf-8"))
    for text in ((cohort.folder / "README.txt").read_text(encoding="utf-8"), truth["notice"]):
        assert text.startswith("SYNTHETIC")
    assert "level-0" in truth["frame"]
    assert all(slide.slide_id.startswith("SYN-") for slide in cohort.slides)
    for slide in cohort.slides:
        with openslide.OpenSlide(slide.path) as file:
            assert "synthetic" in file.properties["tiff.Software"]


def test_the_seed_decides_every_byte(cohort: SyntheticCohort, tmp_path: Path) -> None:
    make_cohort(tmp_path / "again", seed=3, workers=1, **TINY)
    assert digests(tmp_path / "again") == digests(cohort.folder)
    other = make_cohort(tmp_path / "other", seed=4, **{**TINY, "patients_per_class": 1, "slides_per_patient": 1})
    assert not np.array_equal(pixels(other.slides[0].path, 2), pixels(cohort.slides[0].path, 2))


def test_lesions_are_small_alike_in_all_classes_and_on_tissue(cohort: SyntheticCohort) -> None:
    fractions = {subtype: [s.lesion_fraction for s in cohort.slides if s.subtype == subtype] for subtype in SUBTYPES}
    assert all(0.06 <= fraction <= 0.15 for group in fractions.values() for fraction in group)
    means = [np.mean(group) for group in fractions.values()]
    assert max(means) < 1.6 * min(means)
    for slide in cohort.slides:
        for polygon in slide.lesions_l0:
            x, y = np.mean(polygon, axis=0)
            assert 0 < x < slide.size_l0[0]
            assert 0 < y < slide.size_l0[1]


def test_the_class_changes_nothing_but_the_lesion(tmp_path: Path) -> None:
    bank = synthetic.make_bank(0)

    def draw(subtype: str) -> SyntheticSlide:
        plan = synthetic._Plan(0, 0, subtype, tmp_path / f"{subtype}.tif", (896, 768), 0.5, True, False)
        return synthetic._make_slide(plan, 0, bank)

    first, *others = [draw(subtype) for subtype in SUBTYPES]
    polygons = {"": [np.array(polygon) for polygon in first.lesions_l0]}
    corners = np.stack(np.meshgrid(np.arange(0, 896, 16), np.arange(0, 768, 16)), axis=-1).reshape(-1, 2)
    # a nest whose centre lies in the lesion reaches over its edge
    near = lesion_tiles(polygons, "", corners - 128, 272).reshape(48, 56) > 0
    near_px, inside_px = (
        mask.repeat(16, axis=0).repeat(16, axis=1)
        for mask in (near, lesion_tiles(polygons, "", corners, 16).reshape(48, 56) == 1)
    )
    assert 0.1 < (~near).mean() < 0.9
    for other in others:
        assert other.lesions_l0 == first.lesions_l0
        differs = (pixels(other.path) != pixels(first.path)).any(axis=-1)
        assert not differs[~near_px].any()
        assert differs[inside_px].mean() > 0.9


def level0_tiles(path: Path) -> Iterator[tuple[int, int]]:
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
    for y in range(0, height, 256):
        for x in range(0, width, 256):
            yield x, y


def test_exactly_one_tile_is_broken_and_its_neighbours_read(cohort: SyntheticCohort) -> None:
    broken = [slide for slide in cohort.slides if slide.broken_tile_l0]
    assert len(broken) == 1
    failed = []
    for slide in cohort.slides:
        for corner in level0_tiles(slide.path):
            # an OpenSlide handle that met an error stays in error
            with openslide.OpenSlide(slide.path) as file:
                try:
                    file.read_region(corner, 0, (256, 256))
                except openslide.OpenSlideError:
                    failed.append((slide.slide_id, *corner))
        assert pixels(slide.path, 1).shape[:2] == (256, 288)
    x, y, width, height = broken[0].broken_tile_l0 or (0, 0, 0, 0)
    assert failed == [(broken[0].slide_id, x, y)]
    assert (width, height) == (256, 256)
    shown = pixels(broken[0].path, 1)[y // 2 : y // 2 + 128, x // 2 : x // 2 + 128].astype(int)
    assert (shown.max(axis=-1) - shown.min(axis=-1) > 15).mean() > 0.5


def test_lesion_tiles_are_exact_by_hand() -> None:
    square = np.array([[50.0, 50.0], [150.0, 50.0], [150.0, 150.0], [50.0, 150.0]])
    triangle = np.array([[300.0, 0.0], [400.0, 0.0], [300.0, 100.0]])
    # a horseshoe open to the right: 100 x 100 less 50 x 20
    horseshoe = np.array([[0, 300], [100, 300], [100, 340], [50, 340], [50, 360], [100, 360], [100, 400], [0, 400.0]])
    lesions = {"a": [square, triangle, horseshoe], "b": []}
    coords = np.array([[0, 0], [100, 0], [50, 50], [200, 200], [300, 0], [0, 300]], np.int32)
    assert lesion_tiles(lesions, "a", coords, 100).tolist() == pytest.approx([0.25, 0.25, 1.0, 0.0, 0.5, 0.9])
    assert lesion_tiles(lesions, "a", coords[:1], 37.5).tolist() == [0.0]
    assert lesion_tiles(lesions, "b", coords, 100).tolist() == [0.0] * 6
    with pytest.raises(SyntheticError, match="'c'"):
        lesion_tiles(lesions, "c", coords, 100)


def test_a_large_slide_is_tissue_with_a_glass_margin(tmp_path: Path) -> None:
    make_large_slide(tmp_path / "large.tif", size_px=1100, block_px=512)
    with openslide.OpenSlide(tmp_path / "large.tif") as slide:
        assert slide.level_dimensions == ((1100, 1100), (550, 550), (275, 275), (137, 137))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
    image = pixels(tmp_path / "large.tif").astype(int)
    assert image[:16].min() > 230
    assert image[:, -16:].min() > 230
    assert image[40:-40, 40:-40].mean() < 225
    # the block of 512 px is reflected at its lower edge
    assert np.abs(image[52:472, 600:900] - image[552:972, 600:900][::-1]).mean() < 10


@pytest.mark.parametrize("wrong", [{"patients_per_class": 0}, {"workers": 0}, {"size_l0": (300, 600)}])
def test_a_cohort_that_cannot_be_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(SyntheticError, match=str(next(iter(wrong)))):
        make_cohort(tmp_path / "cohort", **wrong)
    assert not (tmp_path / "cohort").exists()
