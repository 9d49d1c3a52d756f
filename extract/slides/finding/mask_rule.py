"""Which file is the mask of which image: by a folder, or by a pattern of names."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from extract.errors import SlideTableError
from extract.slides.masks import MASK_EXTENSIONS


class MaskRule:
    """Which file is the mask of which image."""

    def __init__(self, masks: str | Path, images: str | None) -> None:
        self._images = None if images is None else image_pattern(images)
        self._folder = Path(masks) if Path(masks).is_dir() else None
        self._pattern = Path(masks)
        if self._folder is None and re.search(r"\{(stem)?\}|\*", str(self._pattern.parent)):
            raise SlideTableError(
                f"got masks {str(masks)!r} → {{}} and {{stem}} stand in the file name, not in a folder's → write for "
                f"instance ../masks/{{}}.png"
            )
        wild = re.escape(self._pattern.name).replace(r"\{stem\}", "{}").replace(r"\{\}", "{}")
        self._name = re.compile(wild.replace("{}", ".+"))

    def mask_of(self, root: Path, path: Path) -> Path:
        """Where the mask of the image ``path`` below ``root`` is expected."""
        if self._folder is not None:
            return self._in_folder(self._folder, path.relative_to(root))
        match = self._images.fullmatch(path.name) if self._images else None
        part = match[1] if match and match.groups() else path.stem
        name = self._pattern.name.replace("{stem}", path.stem).replace("{}", part)
        return path.parent / self._pattern.parent / name

    def without_masks(self, files: Sequence[Path]) -> list[Path]:
        """The files that are no masks of the others."""
        if self._folder is not None:
            return [file for file in files if not file.resolve().is_relative_to(self._folder.resolve())]
        folders = {os.path.normpath(folder / self._pattern.parent) for folder in {file.parent for file in files}}
        return [f for f in files if not (os.path.normpath(f.parent) in folders and self._name.fullmatch(f.name))]

    @staticmethod
    def _in_folder(folder: Path, relative: Path) -> Path:
        for stem in (relative.with_suffix(""), Path(relative.stem)):
            # not with_suffix: a stem may hold a point
            found = [path for end in MASK_EXTENSIONS if (path := folder / f"{stem}{end}").is_file()]
            if len(found) > 1:
                raise SlideTableError(
                    f"got masks {[str(path) for path in found]} for {relative} → expected one → remove the other, or "
                    f"give a pattern such as {folder}/{{}}.png"
                )
            if found:
                return found[0]
        return folder / f"{relative.stem}.png"


def image_pattern(images: str) -> re.Pattern[str]:
    """A pattern of file names with one group for ``{}``."""
    if "/" in images or "*" in images or images.count("{}") > 1 or "{stem}" in images:
        raise SlideTableError(
            f"got images {images!r} → expected the pattern of a file name with one {{}} → write for instance "
            f"img_{{}}.png"
        )
    return re.compile(re.escape(images).replace(r"\{\}", "(.+)"))
