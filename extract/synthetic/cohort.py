"""A seeded cohort of synthetic slides whose truth is known: every pixel is drawn by this file, none is a patient's.

Each slide is a patchwork of ordinary tissues (collagen, fat, benign glands, lymphocytes, blood ...) whose mix varies
strongly from slide to slide and has the same distribution in all four classes. The classes differ only by a lesion on
about a tenth of the tissue. So an average over the tiles is swamped by the mix, and a head that attends finds the
lesion. The lesion polygons are kept, so that attention can be scored against them.

Frames: `_l0` is level-0 pixels, x to the right, y down; `_low` is the same divided by `LOW_PX`. Stain amounts are
optical densities (natural logarithm); colour appears only in `develop`.
"""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from extract.synthetic.drawing import GLASS, LOW_PX, Float, Polygon, SyntheticError
from extract.synthetic.lesions import area_within, lesion_tiles
from extract.synthetic.painting import develop, draw_stain, paint_lesion, paint_normal, place_lesions, tissue_outline
from extract.synthetic.pyramid import break_tile, write_pyramid
from extract.synthetic.textures import Bank, make_bank

SUBTYPES = ("Luminal A", "Luminal B", "HER2(+)", "triple-negative")
NOTICE = "SYNTHETIC: drawn by a program, not taken from any patient; of no diagnostic or scientific value."


@dataclass(frozen=True)
class SyntheticSlide:
    """One slide of the cohort and the truth about it."""

    slide_id: str
    patient_id: str
    subtype: str
    path: Path
    size_l0: tuple[int, int]
    mpp: float
    mpp_in_file: bool
    lesions_l0: tuple[tuple[tuple[float, float], ...], ...]
    lesion_fraction: float
    broken_tile_l0: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class SyntheticCohort:
    """What `make_cohort` wrote: the slides and the paths of the tables beside them."""

    folder: Path
    seed: int
    slides: tuple[SyntheticSlide, ...]

    @property
    def slides_folder(self) -> Path:
        """Where the slides lie."""
        return self.folder / "slides"

    @property
    def labels_path(self) -> Path:
        """The label table."""
        return self.folder / "labels.csv"

    @property
    def slides_table_path(self) -> Path:
        """The slide table, with scales and masks."""
        return self.folder / "slides.csv"

    @property
    def lesions_path(self) -> Path:
        """The planted lesions, see `extract.synthetic.lesions`."""
        return self.folder / "lesions.json"


@dataclass(frozen=True)
class _Plan:
    """What is decided about a slide before it is drawn."""

    index: int
    patient: int
    subtype: str
    path: Path
    size_l0: tuple[int, int]
    mpp: float
    mpp_in_file: bool
    broken: bool


def make_cohort(
    folder: str | Path,
    seed: int = 0,
    patients_per_class: int = 8,
    slides_per_patient: int = 2,
    size_l0: tuple[int, int] = (1792, 1344),
    mpp: float = 0.5,
    mpp_missing_every: int = 8,
    broken_tile: bool = True,
    workers: int = 2,
) -> SyntheticCohort:
    """Write a cohort: `slides/*.tif`, `labels.csv`, `slides.csv`, `lesions.json` and `README.txt`.

    The same arguments give the same bytes, whatever the number of workers.

    Args:
        size_l0: (width, height) of every slide; about 60 % of it is tissue.
        mpp: µm per level-0 px of every slide. The drawings have their natural size at 0.5.
        mpp_missing_every: Every n-th slide lacks the mpp in its file and has it in `slides.csv`; 0 for none.
        broken_tile: Make one level-0 tile of one slide, on tissue and clear of lesions, undecodable.
        workers: Threads.

    Raises:
        SyntheticError: A count is below one, or the slides are too small to hold a lesion.
    """
    if min(patients_per_class, slides_per_patient, workers) < 1 or min(size_l0) < 384:
        raise SyntheticError(
            f"got patients_per_class={patients_per_class}, slides_per_patient={slides_per_patient}, workers={workers}, "
            f"size_l0={size_l0} → expected counts of at least 1 and sides of at least 384 px → raise them"
        )
    folder = Path(folder)
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    patients = np.random.default_rng([seed, 1]).permutation(np.repeat(SUBTYPES, patients_per_class)).tolist()
    subtypes = [subtype for subtype in patients for _ in range(slides_per_patient)]
    has_mpp = [not mpp_missing_every or (i + 1) % mpp_missing_every > 0 for i in range(len(subtypes))]
    broken = len(subtypes) // 2 if broken_tile else -1
    plans = []
    for i, subtype in enumerate(subtypes):
        patient, number = divmod(i, slides_per_patient)
        path = folder / "slides" / f"SYN-{patient + 1:03d}-{number + 1}.tif"
        plans.append(_Plan(i, patient, subtype, path, size_l0, mpp, has_mpp[i], i == broken))
    bank = make_bank(seed)
    with ThreadPoolExecutor(workers) as pool:
        slides = tuple(pool.map(lambda plan: _make_slide(plan, seed, bank), plans))
    cohort = SyntheticCohort(folder, seed, slides)
    _write_tables(cohort)
    return cohort


def _make_slide(plan: _Plan, seed: int, bank: Bank) -> SyntheticSlide:
    # separate streams: what is normal on a slide does not depend on its class
    patient_rng = np.random.default_rng([seed, 2, plan.patient])
    rng = np.random.default_rng([seed, 3, plan.index])
    lesion_rng = np.random.default_rng([seed, 4, plan.index])
    width, height = plan.size_l0
    outline_low = tissue_outline(rng, -(-height // LOW_PX), -(-width // LOW_PX))
    stain = draw_stain(patient_rng, rng)
    canvas = paint_normal(height, width, bank, rng)
    polygons = place_lesions(outline_low > 0, lesion_rng)
    for polygon in polygons:
        paint_lesion(canvas, polygon, plan.subtype, bank, lesion_rng)
    image = develop(canvas, outline_low, stain, bank, rng)
    write_pyramid(plan.path, image, plan.mpp if plan.mpp_in_file else None)
    broken = break_tile(plan.path, *_pick_tile(outline_low, polygons)) if plan.broken else None
    cells = sum(area_within(polygon, np.zeros(2), float(max(plan.size_l0))) for polygon in polygons) / LOW_PX**2
    return SyntheticSlide(
        slide_id=plan.path.stem,
        patient_id=f"SYN-{plan.patient + 1:03d}",
        subtype=plan.subtype,
        path=plan.path,
        size_l0=plan.size_l0,
        mpp=plan.mpp,
        mpp_in_file=plan.mpp_in_file,
        lesions_l0=tuple(tuple((x, y) for x, y in polygon.tolist()) for polygon in polygons),
        lesion_fraction=round(float(cells / (outline_low > 0).sum()), 4),
        broken_tile_l0=broken,
    )


def _pick_tile(outline_low: Float, polygons: list[Polygon], tile_px: int = 256) -> tuple[int, int]:
    """Corner of the TIFF tile with the most tissue among those that touch no lesion, or the least of it."""
    step = tile_px // LOW_PX
    height, width = outline_low.shape
    corners = np.array([(x, y) for y in range(0, height, step) for x in range(0, width, step)])
    tissue = np.array([(outline_low[y : y + step, x : x + step] > 0).sum() / step**2 for x, y in corners])
    lesion = lesion_tiles({"": polygons}, "", corners * LOW_PX, tile_px)
    x, y = corners[np.argmax(tissue - 2 * lesion)] * LOW_PX
    return int(x), int(y)


def _write_tables(cohort: SyntheticCohort) -> None:
    with cohort.labels_path.open("w", newline="", encoding="utf-8") as file:
        labels = csv.writer(file, lineterminator="\n")
        labels.writerow(["slide_id", "patient_id", "subtype"])
        labels.writerows([slide.slide_id, slide.patient_id, slide.subtype] for slide in cohort.slides)
    with cohort.slides_table_path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "slide_id", "mpp"])
        for slide in cohort.slides:
            mpp = "" if slide.mpp_in_file else slide.mpp
            table.writerow([slide.path.relative_to(cohort.folder).as_posix(), slide.slide_id, mpp])
    truth = {
        "notice": NOTICE,
        "frame": "level-0 pixels, (x, y), x to the right, y down, origin at the top left of the slide",
        "seed": cohort.seed,
        "slides": {
            slide.slide_id: {
                "subtype": slide.subtype,
                "size_l0": slide.size_l0,
                "mpp": slide.mpp,
                "lesion_fraction_of_tissue": slide.lesion_fraction,
                "broken_tile_l0": slide.broken_tile_l0,
                "polygons_l0": slide.lesions_l0,
            }
            for slide in cohort.slides
        },
    }
    cohort.lesions_path.write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    (cohort.folder / "README.txt").write_text(_readme(cohort), encoding="utf-8")


def _readme(cohort: SyntheticCohort) -> str:
    return f"""{NOTICE}

These {len(cohort.slides)} slides, the patients and the labels are invented (seed {cohort.seed}).
The class names are those of breast cancer subtypes so that the example reads like
a real one; the drawings teach nothing about the disease.

slides/        pyramidal TIFF files; some carry no micrometres per pixel, and one has a tile that cannot be decoded
labels.csv     slide_id, patient_id, subtype
slides.csv     path (relative to this folder), slide_id, mpp for the slides whose file has none
lesions.json   the true lesion outlines in level-0 pixels, and the broken tile
"""


def make_large_slide(
    path: str | Path, size_px: int = 8000, seed: int = 0, mpp: float = 0.5, block_px: int = 2000
) -> None:
    """Write one square slide, nearly all tissue, for benchmarks.

    Mirrored copies of one drawn block of block_px fill it, so that drawing takes no longer than for a small slide.

    Raises:
        SyntheticError: The block is below 384 px or larger than the slide.
    """
    if not 384 <= block_px <= size_px:
        raise SyntheticError(
            f"got size_px={size_px}, block_px={block_px} → expected 384 <= block_px <= size_px → change either"
        )
    rng = np.random.default_rng([seed, 5])
    bank = make_bank(seed)
    canvas = paint_normal(block_px, block_px, bank, rng)
    block = develop(canvas, np.ones((1, 1), np.float32), draw_stain(rng, rng), bank, rng)
    # reflected at each seam, so that none is seen
    position = np.arange(size_px) % (2 * block_px)
    position = np.minimum(position, 2 * block_px - 1 - position)
    image = block[position][:, position]
    margin = size_px // 40
    for glass in (image[:margin], image[-margin:], image[:, :margin], image[:, -margin:]):
        glass[:] = GLASS
    write_pyramid(path, image, mpp, levels=4)
