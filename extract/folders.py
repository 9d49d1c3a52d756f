"""What lies in a folder that was given: every file is taken, belongs to one that is, or is counted with its reason."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

HIDDEN, KIND, BESIDE, PATTERN, AGAIN = (
    "hidden",
    "no kind of slide",
    "plain images beside slides: name them, or use --images",
    "not named like --images",
    "a folder that is there under another name too",
)


class NotTaken:
    """Files of given folders that are not taken, by reason and ending.

    Attributes:
        counts: (reason, ending) → how many; endings in small letters, "" for files without one.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        return sum(self.counts.values())

    def add(self, path: Path, reason: str) -> None:
        """Count one file, or one folder, as not taken."""
        self.counts[reason, "folder" if reason == AGAIN else path.suffix.lower()] += 1

    def lines(self) -> list[str]:
        """One line for people, or none where everything was taken."""
        if not self.counts:
            return []
        parts = []
        for reason in dict.fromkeys(reason for reason, _ in self.counts):
            kinds = sorted(((n, kind) for (why, kind), n in self.counts.items() if why == reason), reverse=True)
            named = ", ".join(f"{n} {kind or 'without ending'}" for n, kind in kinds)
            parts.append(f"{named} ({reason})")
        n = len(self)
        return [f"{n} {'file' if n == 1 else 'files'} not taken: {'; '.join(parts)}"]


def files_below(
    folder: Path,
    not_taken: NotTaken | None = None,
    hidden: tuple[str, ...] = (".",),
    is_one: Callable[[Path], bool] = lambda path: False,
) -> Iterator[Path]:
    """Every file below a folder that is not hidden, in order of their names; links to folders are followed.

    A folder that is reached twice, as by a link to one of its parents, is gone through once.

    Args:
        folder: where to begin.
        not_taken: counts what is hidden or reached again.
        hidden: what the names of hidden files and folders begin with.
        is_one: whether a folder counts as a file, such as a Zarr group; it is not entered.
    """
    seen: set[tuple[int, int]] = set()
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        here = os.stat(parent)
        if (here.st_dev, here.st_ino) in seen:
            subfolders.clear()
            if not_taken is not None:
                not_taken.add(Path(parent), AGAIN)
            continue
        seen.add((here.st_dev, here.st_ino))
        shown = sorted(name for name in subfolders if not name.startswith(hidden))
        whole = [name for name in shown if is_one(Path(parent, name))]
        subfolders[:] = [name for name in shown if name not in whole]
        yield from (Path(parent, name) for name in whole)
        for name in sorted(files):
            if not name.startswith(hidden):
                yield Path(parent, name)
            elif not_taken is not None:
                not_taken.add(Path(name), HIDDEN)
