"""How a split was made, as plain values that a run keeps."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

USED_TEST_FOR_CHOICE = "used_test_for_choice"
"""The mark of a split whose test parts have helped to choose something."""


@dataclass(frozen=True)
class SplitRecord:
    """Method, parameters and source of a split.

    Attributes:
        method: ``kfold``, ``inner``, ``site_preserved``, ``leave_one_site_out``, ``fixed`` or ``file``.
        parameters: what the parts depend on, besides the cohort and the source; plain values.
        source: the file, folder or column that the parts were read from, or None.
        sha256: of the source's content, or None.
        validation: ``drawn`` from the training part by seed, ``given`` by the source, or ``mixed`` where the source
            gives it in some folds only.
        marks: what readers of the result have to know, such as `USED_TEST_FOR_CHOICE`.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    sha256: str | None = None
    validation: Literal["drawn", "given", "mixed"] = "drawn"
    marks: tuple[str, ...] = ()

    def marked(self, mark: str) -> "SplitRecord":
        """The same with one more mark, which is never taken off.

        >>> SplitRecord("kfold").marked(USED_TEST_FOR_CHOICE).marks
        ('used_test_for_choice',)
        """
        return replace(self, marks=tuple(dict.fromkeys((*self.marks, mark))))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self) | {"parameters": dict(self.parameters), "marks": list(self.marks)}


def file_hash(*paths: Path) -> str:
    """SHA-256 of the names and contents of some files, in this order."""
    digest = sha256()
    for path in paths:
        content = path.read_bytes()
        # lengths keep the end of one file apart from the beginning of the next
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
