"""Slides of several files: which files make up a slide, and by what it is known again."""

import os
import re
from pathlib import Path

from extract.slides.dicom import series_files
from extract.store.core.fingerprint import SlideFingerprint

_WITH_FOLDER = ".mrxs"
_WITH_INDEX = (".vms", ".vmu")
_PART = re.compile(r"^(?:ImageFile|MapFile|OptimisationFile|MacroImage)[^=]*=(.+?)\s*$", re.MULTILINE | re.IGNORECASE)
_MAX_INDEX_BYTES = 1 << 20


def real_path(path: Path) -> Path:
    """The file to give to OpenSlide: of a link to a slide of several files its target, beside which they lie."""
    if path.suffix.lower() in (_WITH_FOLDER, *_WITH_INDEX) and path.is_symlink() and not _companions(path):
        return Path(os.path.realpath(path))
    return path


def slide_parts(path: Path) -> list[Path]:
    """All files of a slide, the most important one first.

    Of MIRAX the .mrxs file and what lies in the folder of its name, of Hamamatsu VMS and VMU the files that their index
    names, of DICOM the files beside it of the same series, the one with the most pixels first; of all others the file.
    """
    if path.suffix.lower() == ".dcm":
        return series_files(path)
    real = real_path(path)
    return [real, *_companions(real)]


def size_bytes(path: Path) -> int:
    """Bytes of all files of a slide; 0 where there is nothing."""
    try:
        return sum(part.stat().st_size for part in slide_parts(path))
    except OSError:
        return 0


def slide_fingerprint(path: Path) -> SlideFingerprint:
    """Which files a slide is, whatever they are called."""
    first, *others = slide_parts(path)
    prints = [SlideFingerprint.of(each) for each in others]
    whole = SlideFingerprint.of(first)
    parts = tuple(sorted(f"{each.size_bytes}:{each.sampled_sha256}" for each in prints))
    return SlideFingerprint(whole.size_bytes, whole.sampled_sha256, parts, may_grow=path.suffix.lower() == ".dcm")


def _companions(path: Path) -> list[Path]:
    """The files that belong to a slide beside the one that names it."""
    suffix = path.suffix.lower()
    try:
        if suffix == _WITH_FOLDER:
            return sorted(each for each in path.with_suffix("").rglob("*") if each.is_file())
        if suffix in _WITH_INDEX and path.stat().st_size <= _MAX_INDEX_BYTES:
            names = _PART.findall(path.read_text(encoding="latin-1"))
            found = (path.with_name(Path(name.replace("\\", "/")).name) for name in names)
            return sorted({each for each in found if each.is_file()})
    except OSError:
        pass
    return []
