"""Which slide of a store a row of the table means: the exact id, else a unique file name or stem."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from mil.cohort.cohort import Cohort, refuse_unlearnable
from mil.cohort.identities import slide_key
from mil.cohort.targets import find_strata
from mil.errors import CohortError, listed

_MOST_PAIRS = 5
# Endings that tables add to ids. Anything else after a dot belongs to the name ("S1.A1", "TCGA-A1.0a7f").
SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi", ".dcm")
OTHER_SUFFIXES = (".jpg", ".jpeg", ".png", ".h5", ".hdf5", ".pt", ".npy", ".zarr")


def join_store(cohort: Cohort, available_slide_ids: Iterable[str], for_training: bool = True) -> Cohort:
    """Keep the slides that a store holds, under the store's ids, and complete the attrition.

    A row joins the slide of exactly its id; else the only slide of its file name, with or without a file's ending
    (`x.svs` joins `siteA/x`). Folders that both sides name must agree: `siteB/x` never joins `siteA/x`.

    Raises:
        CohortError: a row fits several slides, two rows fit one, nothing fits, a row would fit a slide if case, blanks
            or the form of a number did not count, or a class is left with fewer than
            two patients although it is ``for_training``.
    """
    available = tuple(dict.fromkeys(available_slide_ids))
    index = SlideIndex(available)
    found = [index.find(slide_id) for slide_id in cohort.slide_ids]
    _refuse_ambiguous(cohort.slide_ids, found)
    joined = {position: ids[0] for position, ids in enumerate(found) if ids}
    if not joined:
        raise CohortError(
            f"got no slide in common: table ids such as {listed(cohort.slide_ids, 3)}, store ids such as "
            f"{listed(available, 3)} → expected the same names → choose the table's slide column with slide_column="
        )
    _refuse_respelled(cohort.slide_ids, joined, available)
    old = cohort.attrition
    unlabelled = (*old.no_label, *old.missing_label, *old.other_class)
    has_row = set(joined.values()).union(*(index.find(slide_id) for slide_id in unlabelled))
    attrition = replace(
        old,
        n_kept=len(joined),
        no_slide=tuple(name for at, name in enumerate(cohort.slide_ids) if at not in joined),
        no_row=tuple(name for name in available if name not in has_row),
    )
    result = replace(cohort.subset(joined), slide_ids=tuple(joined.values()), attrition=attrition)
    where = f"slides of column {cohort.target!r} that the store holds"
    if attrition.no_slide:
        where = (
            f"{where} ({len(attrition.no_slide)} rows name slides that it lacks, such as "
            f"{listed(attrition.no_slide, 3)}; it "
            f"has {listed(available, 3)}; were leading zeros lost?)"
        )
    if result.values is not None:
        labels, class_names = find_strata(result.task, result.columns, result.values, result.patient_ids)
        result = replace(result, labels=labels, class_names=class_names)
    if for_training:
        refuse_unlearnable(result, where)
    return result


class SlideIndex:
    """Store ids by file name, to find the one that a table means."""

    def __init__(self, slide_ids: Iterable[str]) -> None:
        self._exact = frozenset(slide_ids)
        self._full: dict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
        self._stem: dict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
        for slide_id in self._exact:
            full, stem = _path_parts(slide_id)
            self._full[full[-1]].append((slide_id, full))
            if stem != full:
                self._stem[stem[-1]].append((slide_id, stem))

    def find(self, slide_id: str) -> list[str]:
        """The store ids that this table id may mean: none, one, or several where it is ambiguous."""
        if slide_id in self._exact:
            return [slide_id]
        full, stem = _path_parts(slide_id)
        for wanted, names in ((full, self._full), (stem, self._full), (full, self._stem)):
            near = names.get(wanted[-1], [])
            same = [name for name, parts in near if parts == wanted]
            tails = [name for name, parts in near if _one_ends_with_other(parts, wanted)]
            if same or tails:
                return sorted(same or tails)
        return []


def _path_parts(slide_id: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The folders and name of an id, and the same without a file's ending."""
    # macOS writes file names decomposed (NFD), spreadsheets composed (NFC): the same letters to a reader.
    path = PurePosixPath(unicodedata.normalize("NFC", slide_id).replace("\\", "/"))
    parts = path.parts or (slide_id,)
    stem = path.stem if path.suffix.lower() in (*SLIDE_SUFFIXES, *OTHER_SUFFIXES) else parts[-1]
    return parts, (*parts[:-1], stem)


def _one_ends_with_other(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    shared = min(len(one), len(other))
    return one[-shared:] == other[-shared:]


def _refuse_respelled(slide_ids: Sequence[str], joined: Mapping[int, str], available: Sequence[str]) -> None:
    """Refuse to leave out a row whose slide lies in the store under another spelling."""
    free = {_respelled(each): each for each in sorted(set(available) - set(joined.values()))}
    index = SlideIndex(free)
    unmatched = [each for at, each in enumerate(slide_ids) if at not in joined]
    meant = {each: index.find(_respelled(each)) for each in unmatched}
    pairs = [f"{each!r} for {free[found[0]]!r}" for each, found in meant.items() if found]
    if pairs:
        raise CohortError(
            f"got {len(pairs)} table ids that the store spells otherwise: {', '.join(pairs[:_MOST_PAIRS])} → expected "
            f"the store's ids → write them so in the table, or empty the label of a row that is to be left out"
        )


def _respelled(slide_id: str) -> str:
    """An id whose folders and name are the same for all spellings of them."""
    return "/".join(map(slide_key, _path_parts(slide_id)[0]))


def _refuse_ambiguous(slide_ids: tuple[str, ...], found: list[list[str]]) -> None:
    owners: dict[str, str] = {}
    for slide_id, candidates in zip(slide_ids, found, strict=True):
        if len(candidates) > 1:
            raise CohortError(
                f"got table id {slide_id!r}, which fits several slides of the store: {listed(candidates)} → expected "
                f"one → write the store's id of the slide that is meant into the table"
            )
        for candidate in candidates:
            if candidate in owners:
                raise CohortError(
                    f"got table ids {owners[candidate]!r} and {slide_id!r}, which both fit the slide {candidate!r} of "
                    f"the store → expected one row per slide → delete one, or write the store's ids into the table"
                )
            owners[candidate] = slide_id
