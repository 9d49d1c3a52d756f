"""Looks at test folds, counted: whoever chooses by them has used them up."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mil.cohort.cohort import Cohort

LEDGER = "looks.jsonl"


@dataclass(frozen=True)
class Look:
    """One look at the test folds of a cohort, as a line of the ledger.

    The ledger lies beside the run folders. It counts the runs that were saved there, for the same slides, patients and
    labels; looks elsewhere are not seen.
    """

    ledger: Path
    cohort_hash: str
    line: str

    @classmethod
    def at(cls, folder: Path, cohort: Cohort, head: str, entry: str) -> "Look":
        """The look that the run in ``folder`` takes."""
        digest = cohort.digest()
        fields = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "cohort": digest,
            "target": cohort.target,
            "head": head,
            "entry": entry,
            "run": str(folder),
        }
        return cls(folder.parent / LEDGER, digest, json.dumps(fields, ensure_ascii=False))

    def count_earlier(self) -> int:
        """Looks at this cohort that were recorded before."""
        if not self.ledger.is_file():
            return 0
        # a line's beginning may be lost with a full disk; what counts is that the cohort was looked at
        return sum(self.cohort_hash in line for line in self.ledger.read_text(encoding="utf-8").splitlines())

    def append(self) -> None:
        """Write it down."""
        with open(self.ledger, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(self.line + "\n")
