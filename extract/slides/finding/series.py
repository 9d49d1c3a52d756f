"""DICOM series among the files found: one slide each, named by what does not depend on the names of its files."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from extract.slides.dicom import DicomHeader, is_dicom, read_header

Pair = tuple[Path, Path]
"""(root, file)."""


def merge_series(pairs: list[Pair]) -> tuple[list[Pair], dict[Path, str]]:
    """Keep one file of each DICOM series, the one with the most pixels; OpenSlide finds the others beside it.

    Args:
        pairs: (root, file) of every file found.

    Returns:
        the pairs that are left, in their order; and file → the id of its series, relative to the root: the path of
        their folder, or where that holds other slides too, that of the folder and the SeriesInstanceUID.
    """
    series: dict[tuple[Path, str], list[tuple[int, str, Pair]]] = defaultdict(list)
    headers: dict[Path, DicomHeader | None] = {}
    others = []
    for position, (root, path) in enumerate(pairs):
        header = headers[path] = read_header(path) if is_dicom(path) else None
        if header is None:
            others.append((position, (root, path)))
        else:
            series[path.parent, header.series].append((-header.area, path.name, (root, path)))
    shared = {path.parent for _, (_, path) in others}
    order = {pair: position for position, pair in enumerate(pairs)}
    kept, names = list(others), {}
    for (folder, uid), members in series.items():
        pair = min(members)[2]
        # the place of a series is that of the first of its files
        kept.append((min(order[member[2]] for member in members), pair))
        alone = folder not in shared and _is_alone(folder, uid, headers)
        names[pair[1]] = _series_name(pair[0], folder, uid, alone)
    return [pair for _, pair in sorted(kept)], names


def _is_alone(folder: Path, series: str, known: Mapping[Path, DicomHeader | None]) -> bool:
    """Whether a folder holds no other series, beside the files that were found in it either."""
    for path in folder.iterdir():
        header = known[path] if path in known else read_header(path) if is_dicom(path) else None
        if header is not None and header.series != series:
            return False
    return True


def _series_name(root: Path, folder: Path, series: str, alone: bool) -> str:
    below = folder.relative_to(root)
    if not alone:
        return (below / series).as_posix()
    # a folder that was itself given, or whose file was, has no path below the root
    return below.as_posix() if below.parts else folder.resolve().name
