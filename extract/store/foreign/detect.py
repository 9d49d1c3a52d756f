"""What a source holds: every file is looked at, and said to be of a layout, to have failed, or to be none of ours."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from extract.errors import AmbiguousError, ExtractError, ForeignFileError
from extract.folders import NotTaken, files_below
from extract.store.foreign.layouts import LAYOUT_NAMES
from extract.store.foreign.layouts.base import Answers, ForeignFile, ForeignLayout
from extract.store.foreign.layouts.classic import ClassicNpz
from extract.store.foreign.layouts.slideflow import INDEX_SUFFIX
from extract.store.foreign.reading import ForeignReader, Looked

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


def survey(source: Path, answers: Answers, reader: ForeignReader) -> Survey:
    """Look at every file of a source and say what can be imported. Files are judged by their bytes, not their names.

    Args:
        source: a file, or a folder that is searched with all its folders and links to folders.
        answers: names the layout where files can be read in several ways.
        reader: looks into the files.

    Raises:
        ForeignFileError: there is no source, nothing in it that can be imported, or an unknown layout was named.
        AmbiguousError: it holds two layouts.
    """
    if answers.layout is not None and answers.layout not in LAYOUT_NAMES:
        raise ForeignFileError(
            f"got --layout {answers.layout} → expected one of {', '.join(LAYOUT_NAMES)} → choose one"
        )
    failures: dict[str, str] = {}
    skipped: dict[str, str] = {}
    not_taken = NotTaken()
    chosen: dict[str, list[_Pair]] = {}
    for path in _files(source, not_taken):
        name = _name(path, source)
        try:
            looked = reader.look(path, name, answers.layout)
        except (ExtractError, OSError) as error:
            failures[name] = str(error)
            continue
        if looked.kind is None:
            _note_no_features(path, name, failures, not_taken)
        elif looked.layout is None:
            skipped[str(path)] = f"no features of {answers.layout or 'a known'} layout"
        else:
            file = ForeignFile(path, name, looked.kind)
            chosen.setdefault(looked.layout.name, []).append(_Pair(file, looked.layout, looked))
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


@dataclass(frozen=True)
class _Pair:
    """A file, its layout, and what was seen in it."""

    file: ForeignFile
    layout: ForeignLayout
    looked: Looked


def _files(source: Path, not_taken: NotTaken) -> list[Path]:
    """The files of a source, and the folders that are Zarr groups."""
    if not source.exists():
        raise ForeignFileError(f"got {source} → there is no such file or folder → check the path")
    if (source / "tessera.json").exists() or _is_our_store(source):
        raise ForeignFileError(f"got {source} → it is a store of ours → use it as it is, or mil store convert")
    if source.is_file() or _is_zarr(source):
        return [source]
    return list(files_below(source, not_taken, (".", "~"), _is_zarr))


def _note_no_features(path: Path, name: str, failures: dict[str, str], not_taken: NotTaken) -> None:
    """A file that is named like one of features has failed; any other is none of ours."""
    if path.suffix.lower() in _EXPECTED and not path.name.endswith(INDEX_SUFFIX):
        failures[name] = (
            f"got {path} → its bytes are not those of {path.suffix} → expected a file of features → it was cut "
            f"short or is something else; copy it again"
        )
    else:
        not_taken.add(path, "no features")


def _is_zarr(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("zarr.json", ".zgroup"))


def _is_our_store(path: Path) -> bool:
    marker = path / "zarr.json"
    return marker.is_file() and b'"tile_recipe"' in marker.read_bytes()[:65536]


def _name(path: Path, source: Path) -> str:
    """The slide id of a file: its path below the source without extension, and without CLAM's two folders."""
    below = path.relative_to(source) if path != source else Path(path.name)
    folders = [part for part in below.parts[:-1] if part not in _CLAM_FOLDERS]
    return "/".join([*folders, below.name.removesuffix(below.suffix) or below.name])


def _drop_copies(chosen: dict[str, list[_Pair]], skipped: dict[str, str]) -> None:
    """CLAM writes the same features twice: where there is an h5, its ``.pt`` is left out."""
    names = {pair.file.name for layout in ("clam", "trident") for pair in chosen.get(layout, [])}
    kept = []
    for pair in chosen.pop("pt", []):
        if pair.file.name in names:
            skipped[str(pair.file.path)] = "an .h5 of the same name is there, and was taken"
        else:
            kept.append(pair)
    if kept:
        chosen["pt"] = kept


def _check_one(chosen: dict[str, list[_Pair]], source: Path) -> None:
    if len(chosen) > 1:
        counts = ", ".join(
            f"{len(pairs)} {name} (such as {pairs[0].file.name})" for name, pairs in sorted(chosen.items())
        )
        raise AmbiguousError(
            f"got files of {len(chosen)} layouts in {source}: {counts} → which ones? → --layout with one of "
            f"{sorted(chosen)}, or give the folder of one of them"
        )


def _check_one_table(pairs: Sequence[_Pair], source: Path) -> None:
    """A table is a cohort of its own, with features of its own."""
    tables = [pair.file.path.name for pair in pairs if isinstance(pair.layout, ClassicNpz)]
    if len(tables) > 1:
        raise AmbiguousError(
            f"got {len(tables)} tables of bags in {source}: {', '.join(tables[:4])} ... → which one? → give the file; "
            f"one store holds one"
        )


def _unique(pairs: Sequence[_Pair], failures: dict[str, str]) -> tuple[list[Found], dict[str, str]]:
    """The bags by id; ids that two files claim are refused, compared without case as file systems may."""
    bags: dict[str, Found] = {}
    labels: dict[str, str] = {}
    claims: dict[str, list[ForeignFile]] = {}
    for pair in pairs:
        labels |= pair.looked.labels or {}
        for slide_id in pair.looked.ids:
            claims.setdefault(slide_id.casefold(), []).append(pair.file)
            bags[slide_id] = Found(pair.file, pair.layout, slide_id)
    for slide_id in list(bags):
        files = claims[slide_id.casefold()]
        if len({file.path for file in files}) > 1:
            del bags[slide_id]
            failures[slide_id] = (
                f"got slide {slide_id!r} from {len(files)} files: {', '.join(str(file.path) for file in files[:3])} → "
                f"expected one → rename or remove the others"
            )
    return [bags[slide_id] for slide_id in sorted(bags)], labels
