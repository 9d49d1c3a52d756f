"""Scores of trials, kept line by line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mil.files import tell_full_disk

LEDGER = "scores.jsonl"


@dataclass(frozen=True)
class SeedScore:
    """How one replica did on its validation part.

    Attributes:
        metrics: by name, those of `mil.evaluation.headlines.selection_metrics` and `tie_breaker`; None where undefined.
        seconds: of its training.
        reason: why there is no score, or empty.
    """

    metrics: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""


class ScoreLedger:
    """Scores of finished replicas, a line of JSON each, so that a sweep that was stopped goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scores: dict[tuple[str, int, int], SeedScore] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines:
            try:
                fields = json.loads(line)
                key = (fields.pop("key"), fields.pop("fold"), fields.pop("seed"))
                self._scores[key] = SeedScore(**fields)
            except (ValueError, KeyError, TypeError):
                # the last line of a run that was killed while it wrote; that replica is scored again
                continue

    def get(self, key: str, fold: int, seed: int) -> SeedScore | None:
        """The score of a replica, if there is one."""
        return self._scores.get((key, fold, seed))

    def add(self, key: str, fold: int, seed: int, score: SeedScore) -> None:
        """Write one down."""
        self._scores[key, fold, seed] = score
        content = {"key": key, "fold": fold, "seed": seed, **vars(score)}
        with tell_full_disk(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                # a line of its own even after one that was cut short
                file.write("\n" + json.dumps(content, allow_nan=False) + "\n")
