"""Recipes, and the fingerprints that keep two recipes from being mixed.

A recipe is a frozen tree of plain values. Its fingerprint is the SHA-256 of the whole tree as canonical JSON, so a new
field can never be forgotten. How something was computed is not *what* was computed: that is `Execution`, recorded and
hashed apart.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Self

from extract.store.core.recipes import UNKNOWN, is_unknown

_SAMPLE_BYTES = 1 << 20


def to_dict(recipe: Any) -> dict[str, Any]:
    """The recipe as a tree of JSON values."""
    plain: dict[str, Any] = json.loads(canonical_json(recipe))
    return plain


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no white space and exact floats; equal values give equal text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(recipe: Any) -> str:
    """SHA-256 (hex) of the whole recipe, a dataclass or its `to_dict`."""
    return hashlib.sha256(canonical_json(recipe).encode(errors="surrogatepass")).hexdigest()


def difference(one: Any, other: Any, prefix: str = "") -> list[str]:
    """The fields in which two recipes differ, as ``name: a → b`` with dotted names; empty when equal."""
    a, b = (value if isinstance(value, Mapping) else to_dict(value) for value in (one, other))
    lines = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key, "absent"), b.get(key, "absent")
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += difference(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {_shorten(left)} → {_shorten(right)}")
    return lines


def _shorten(value: Any) -> Any:
    """What people are shown of a value: of the hash in an unknown one its beginning."""
    return value[: len(UNKNOWN) + 8] if is_unknown(value) else value


@dataclass(frozen=True)
class SlideFingerprint:
    """Which file a slide was: its size, and a SHA-256 of its first, middle and last MiB.

    This is a *sample* of the file, not a hash of all of it: gigabytes are not read twice. A change elsewhere in a file
    of the same size goes unseen.

    Attributes:
        size_bytes: size of the file; of a slide of several files, of the most important one.
        sampled_sha256: SHA-256 (hex) of the sample.
        parts: ``size:sha256`` of the other files of the slide, sorted; empty for slides of one file.
        may_grow: whether further parts make no other slide of it, as smaller levels of a DICOM series.
    """

    size_bytes: int
    sampled_sha256: str
    parts: tuple[str, ...] = ()
    may_grow: bool = False

    def matches(self, then: Mapping[str, Any]) -> bool:
        """Whether these are the files of an earlier `to_record`.

        Of a slide that was noted before all of its files were (version 0.1), it is enough that one of them is the
        noted one.
        """
        noted, first = f"{then['size_bytes']}:{then['sampled_sha256']}", f"{self.size_bytes}:{self.sampled_sha256}"
        if "parts" not in then:
            return noted in (first, *self.parts)
        known, parts = set(then["parts"]), set(self.parts)
        return noted == first and (known <= parts if self.may_grow else known == parts)

    def to_record(self) -> dict[str, Any]:
        """Plain values for the record of a tiles unit; slides of one file have no ``parts``."""
        record: dict[str, Any] = {"size_bytes": self.size_bytes, "sampled_sha256": self.sampled_sha256}
        return record | ({"parts": list(self.parts)} if self.parts or self.may_grow else {})

    @classmethod
    def of(cls, path: Path) -> Self:
        """Fingerprint the file at ``path``."""
        size = os.path.getsize(path)
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            for start in sorted({0, max(size // 2 - _SAMPLE_BYTES // 2, 0), max(size - _SAMPLE_BYTES, 0)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
        return cls(size, digest.hexdigest())


def sha256_of(array: Any) -> str:
    """SHA-256 (hex) of an array's bytes in C order."""
    view = memoryview(array)
    # a view without a byte cannot be cast
    return hashlib.sha256(view.cast("B") if view.nbytes else b"").hexdigest()
