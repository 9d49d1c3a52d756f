"""Which layout a file has, judged by what is in it."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from extract.errors import AmbiguousError, ForeignFileError
from extract.folders import NotTaken, files_below
from extract.store.foreign.layouts.atlaspatch import AtlasPatch
from extract.store.foreign.layouts.base import MAYBE, NO, SURE, Answers, ForeignFile, ForeignLayout
from extract.store.foreign.layouts.clam import Clam, ClamTensor
from extract.store.foreign.layouts.classic import ClassicCsv, ClassicNpz
from extract.store.foreign.layouts.matrices import is_tensor_file
from extract.store.foreign.layouts.plain_h5 import PlainH5
from extract.store.foreign.layouts.slideflow import INDEX_SUFFIX, Slideflow
from extract.store.foreign.layouts.stamp import Stamp
from extract.store.foreign.layouts.trident import Trident
from extract.store.foreign.layouts.wsidata import WsiData

LAYOUTS: tuple[ForeignLayout, ...] = (
    Trident(),
    Clam(),
    Stamp(),
    AtlasPatch(),
    PlainH5(),
    Slideflow(),
    ClamTensor(),
    WsiData(),
    ClassicNpz(),
    ClassicCsv(),
)
LAYOUT_NAMES = tuple(dict.fromkeys(layout.name for layout in LAYOUTS))

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_EXPECTED = {".h5": "h5", ".hdf5": "h5", ".pt": "pt", ".pth": "pt", ".npz": "npz"}
_CLAM_FOLDERS = ("h5_files", "pt_files")


@dataclass(frozen=True)
class Found:
    """A bag to import: which file, which layout, which slide of it."""

    file: ForeignFile
    layout: ForeignLayout
    slide_id: str


@dataclass(frozen=True)
class Survey:
    """What a source holds.

    Attributes:
        bags: in the order of their ids.
        failures: reason by name, of files that cannot be taken.
        skipped: reason by name, of files that are none of ours.
        labels: label by slide id, where the source has any.
        not_taken: files that are no features at all, counted by their reason.
    """

    bags: tuple[Found, ...]
    failures: dict[str, str]
    skipped: dict[str, str]
    labels: dict[str, str]
    not_taken: NotTaken = field(default_factory=NotTaken)


def survey(source: Path, answers: Answers) -> Survey:
    """Look at every file of a source and say what can be imported. Files are judged by their bytes, not their names.

    Args:
        source: a file, or a folder that is searched with all its folders.
        answers: names the layout where files can be read in several ways.

    Raises:
        ForeignFileError: there is no source, nothing in it that can be imported, or an unknown layout was named.
        AmbiguousError: it holds two layouts.
    """
    if answers.layout is not None and answers.layout not in LAYOUT_NAMES:
        raise ForeignFileError(
            f"got --layout {answers.layout} → expected one of {', '.join(LAYOUT_NAMES)} → choose one"
        )
    not_taken = NotTaken()
    files, failures, skipped = _collect(source, not_taken)
    chosen: dict[str, list[tuple[ForeignFile, ForeignLayout]]] = {}
    for file in files:
        try:
            layout = _layout(file, answers.layout)
        except ForeignFileError as error:
            failures[file.name] = str(error)
            continue
        if layout is None:
            skipped[str(file.path)] = f"no features of {answers.layout or 'a known'} layout"
        else:
            chosen.setdefault(layout.name, []).append((file, layout))
    if "clam" in chosen or "trident" in chosen:
        _drop_copies(chosen, skipped)
    _check_one(chosen, source)
    pairs = [pair for each in chosen.values() for pair in each]
    _check_one_table(pairs, source)
    bags, labels = _unique(pairs, failures)
    if not bags and not failures:
        raise ForeignFileError(
            f"got {source} → there are no features in it that can be imported → expected files of "
            f"{', '.join(LAYOUT_NAMES)} → give the folder of the features"
        )
    return Survey(tuple(bags), failures, skipped, labels, not_taken)


def _collect(source: Path, not_taken: NotTaken) -> tuple[list[ForeignFile], dict[str, str], dict[str, str]]:
    """Files by kind, and the reasons of those that are not what their extension says."""
    if not source.exists():
        raise ForeignFileError(f"got {source} → there is no such file or folder → check the path")
    if any((source / name).exists() for name in ("tessera.json",)) or _is_our_store(source):
        raise ForeignFileError(f"got {source} → it is a store of ours → use it as it is, or mil store convert")
    files: list[ForeignFile] = []
    failures: dict[str, str] = {}
    alone = source.is_file() or _is_zarr(source)
    for path in [source] if alone else files_below(source, not_taken, (".", "~"), _is_zarr):
        name = _name(path, source)
        kind = _kind(path)
        expected = _EXPECTED.get(path.suffix.lower())
        if kind is not None:
            files.append(ForeignFile(path, name, kind))
        elif expected is not None and not path.name.endswith(INDEX_SUFFIX):
            failures[name] = (
                f"got {path} → its bytes are not those of {path.suffix} → expected a file of features → it was cut "
                f"short or is something else; copy it again"
            )
        else:
            not_taken.add(path, "no features")
    return files, failures, {}


def _is_zarr(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zgroup"))


def _is_our_store(path: Path) -> bool:
    marker = path / "zarr.json"
    return marker.is_file() and b'"tile_recipe"' in marker.read_bytes()[:65536]


def _kind(path: Path) -> str | None:
    """What the bytes of a file are."""
    if path.is_dir():
        return "zarr"
    with open(path, "rb") as file:
        head = file.read(8)
    if head == _HDF5_SIGNATURE:
        return "h5"
    if head.startswith(b"PK"):
        if is_tensor_file(path):
            return "pt"
        return "npz" if _is_npz(path) and not path.name.endswith(INDEX_SUFFIX) else None
    return "csv" if path.suffix.lower() == ".csv" else None


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _name(path: Path, source: Path) -> str:
    """The slide id of a file: its path below the source without extension, and without CLAM's two folders."""
    below = path.relative_to(source) if path != source else Path(path.name)
    folders = [part for part in below.parts[:-1] if part not in _CLAM_FOLDERS]
    return "/".join([*folders, below.name.removesuffix(below.suffix) or below.name])


def _layout(file: ForeignFile, wanted: str | None) -> ForeignLayout | None:
    """The layout of a file, or None when it has none."""
    fits = {layout: layout.fits(file) for layout in LAYOUTS if layout.kind == file.kind}
    if wanted is not None:
        return next((layout for layout, fit in fits.items() if layout.name == wanted and fit != NO), None)
    sure = [layout for layout, fit in fits.items() if fit == SURE]
    if len(sure) > 1:
        raise AmbiguousError(
            f"got {file.path} → it can be {' or '.join(layout.name for layout in sure)} → which? → add --layout"
        )
    if sure:
        return sure[0]
    maybe = [layout for layout, fit in fits.items() if fit == MAYBE]
    # a file that several could be is none of them for sure: it is read as one that names no tool
    return maybe[-1] if maybe else None


def _drop_copies(chosen: dict[str, list[tuple[ForeignFile, ForeignLayout]]], skipped: dict[str, str]) -> None:
    """CLAM writes the same features twice: where there is an h5, its ``.pt`` is left out."""
    names = {file.name for layout in ("clam", "trident") for file, _ in chosen.get(layout, [])}
    kept = []
    for file, layout in chosen.pop("pt", []):
        if file.name in names:
            skipped[str(file.path)] = "the same features as its .h5"
        else:
            kept.append((file, layout))
    if kept:
        chosen["pt"] = kept


def _check_one(chosen: dict[str, list[tuple[ForeignFile, ForeignLayout]]], source: Path) -> None:
    if len(chosen) > 1:
        counts = ", ".join(
            f"{len(files)} {name} (such as {files[0][0].name})" for name, files in sorted(chosen.items())
        )
        raise AmbiguousError(
            f"got files of {len(chosen)} layouts in {source}: {counts} → which ones? → --layout with one of "
            f"{sorted(chosen)}, or give the folder of one of them"
        )


def _check_one_table(pairs: Sequence[tuple[ForeignFile, ForeignLayout]], source: Path) -> None:
    """A table is a cohort of its own, with features of its own."""
    tables = [file.path.name for file, layout in pairs if isinstance(layout, ClassicNpz)]
    if len(tables) > 1:
        raise AmbiguousError(
            f"got {len(tables)} tables of bags in {source}: {', '.join(tables[:4])} ... → which one? → give the file; "
            f"one store holds one"
        )


def _unique(
    pairs: Sequence[tuple[ForeignFile, ForeignLayout]], failures: dict[str, str]
) -> tuple[list[Found], dict[str, str]]:
    """The bags by id; ids that two files claim are refused, compared without case as file systems may."""
    bags: dict[str, Found] = {}
    labels: dict[str, str] = {}
    claims: dict[str, list[ForeignFile]] = {}
    for file, layout in pairs:
        try:
            ids = layout.slide_ids(file)
            labels |= layout.labels(file)
        except ForeignFileError as error:
            failures[file.name] = str(error)
            continue
        for slide_id in ids:
            claims.setdefault(slide_id.casefold(), []).append(file)
            bags[slide_id] = Found(file, layout, slide_id)
    for slide_id in list(bags):
        files = claims[slide_id.casefold()]
        if len({file.path for file in files}) > 1:
            del bags[slide_id]
            failures[slide_id] = (
                f"got slide {slide_id!r} from {len(files)} files: {', '.join(str(file.path) for file in files[:3])} → "
                f"expected one → rename or remove the others"
            )
    return [bags[slide_id] for slide_id in sorted(bags)], labels
