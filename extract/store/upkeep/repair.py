"""Mending a store: damaged units are moved aside, and what dead writers left is removed.

Nothing is deleted by a repair: a unit goes to ``quarantine/<time>/`` under the path that it had, in one rename, and the
next extraction makes it again.
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from extract.errors import SlideClaimedError, SlideNotFoundError, StoreError
from extract.store.core.draft import LEASE_S, is_claimed
from extract.store.core.files import disk_bytes, remove, sync
from extract.store.core.remote_path import RemotePath, StorePath, local_path
from extract.store.core.store import Store
from extract.store.upkeep.summary import QUARANTINE
from extract.store.upkeep.verify import Finding

YOUNGEST_S = 5 * LEASE_S
"""What was touched more recently is never removed: someone may be at work on it, on another machine."""


@dataclass(frozen=True)
class Move:
    """A unit, or a whole entry, that goes into quarantine.

    Attributes:
        path: where it is.
        findings: why.
        n_bytes: its size on disk.
        identity: tells it from a unit that a writer puts there later.
    """

    path: Path
    findings: tuple[Finding, ...]
    n_bytes: int
    identity: tuple[int, int]


@dataclass(frozen=True)
class RepairPlan:
    """What a repair does.

    Attributes:
        moves: what goes into quarantine.
        left: findings that moving a unit does not mend; each has its fix.
    """

    moves: tuple[Move, ...]
    left: tuple[Finding, ...]

    @property
    def n_bytes(self) -> int:
        """Size of everything that is moved."""
        return sum(move.n_bytes for move in self.moves)


@dataclass(frozen=True)
class Garbage:
    """Something that can be removed.

    Attributes:
        path: a file or a folder.
        kind: ``half-built unit``, ``draft``, ``saved rows`` or ``quarantine``.
        n_bytes: its size on disk.
        age_s: seconds since the last change in it.
    """

    path: Path
    kind: str
    n_bytes: int
    age_s: float


def plan_repair(findings: Iterable[Finding]) -> RepairPlan:
    """Which units are to be moved aside.

    The features of a slide whose tiles are moved stay: extraction cuts the slide again, takes them if they are of these
    tiles, and makes them again if not.

    Args:
        findings: of `extract.store.upkeep.verify.verify_store`.
    """
    by_path: dict[Path, list[Finding]] = {}
    left = []
    for finding in findings:
        if finding.movable:
            by_path.setdefault(local_path(finding.path), []).append(finding)
        else:
            left.append(finding)
    moves = [
        Move(path, tuple(found), disk_bytes(path), identity)
        for path, found in sorted(by_path.items())
        if (identity := _identity(path)) is not None
    ]
    return RepairPlan(tuple(moves), tuple(left))


def plan_removal(store: Store, slide_ids: Iterable[str], tiles: bool = True) -> RepairPlan:
    """Which units are to be moved aside so that slides are no longer in a store.

    Args:
        store: an open store.
        slide_ids: slides that are in it.
        tiles: also where they were cut; without, embeddings alone.

    Raises:
        SlideNotFoundError: one of them is not in the store.
        SlideClaimedError: another process is at work on one of them.
        StoreError: the store lies at a URL.
    """
    check_on_disk(store.path)
    there = store.unit_paths() | {key: path for name in store.entries() for key, path in store.unit_paths(name).items()}
    paths: list[Path] = []
    for slide_id in dict.fromkeys(slide_ids):
        if slide_id not in there:
            raise SlideNotFoundError(
                f"got slide {slide_id!r} → it is not in {store.path} → mil store ls {store.path} --slides lists what is"
            )
        units = [local_path(store.feature_path(slide_id, entry)) for entry in store.entries()]
        if any(is_claimed(unit) for unit in units):
            raise SlideClaimedError(
                f"got slide {slide_id!r} → another process is at work on it → let it finish, or stop it first"
            )
        # embeddings first: no reader sees embeddings without tiles
        paths += units + ([local_path(store.tiles_path(slide_id))] if tiles else [])
    moves = [Move(path, (), disk_bytes(path), found) for path in paths if (found := _identity(path)) is not None]
    return RepairPlan(tuple(moves), ())


def set_aside(store: Store, slide_ids: Iterable[str], tiles: bool = True) -> list[Path]:
    """Move slides out of a store, into ``quarantine/``; see `plan_removal`.

    Returns:
        Where their units are now.
    """
    return repair_store(store, plan_removal(store, slide_ids, tiles))


def check_on_disk(path: StorePath) -> Path:
    """Refuse to mend a store at a URL: nothing can be moved there, and nobody is seen at work.

    Raises:
        StoreError: the store lies at a URL.
    """
    if isinstance(path, RemotePath):
        raise StoreError(
            f"got {path} to mend → at a URL nothing can be moved aside → find what is damaged with mil store verify "
            f"{path}, remove these units with the tool of the service (aws s3 rm --recursive UNIT), and run mil "
            f"extract again"
        )
    return path


def repair_store(store: Store, plan: RepairPlan) -> list[Path]:
    """Move bad units aside.

    Args:
        store: the store that the plan is for.
        plan: of `plan_repair`; what is gone or was written anew meanwhile is passed over.

    Returns:
        Where the units are now.

    Raises:
        OSError: a unit cannot be moved; those before it are.
        StoreError: the store lies at a URL.
    """
    root = check_on_disk(store.path)
    moved: list[Path] = []
    folder: Path | None = None
    for move in plan.moves:
        if _identity(move.path) != move.identity:
            continue
        folder = folder or _new_quarantine(root)
        target = folder / move.path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(move.path, target)
        except FileNotFoundError:
            # a writer that replaced it was faster
            continue
        for changed in (target.parent, move.path.parent):
            sync(changed)
        moved.append(target)
    return moved


def find_garbage(store: Store, older_than_s: float, quarantine: bool = False) -> list[Garbage]:
    """What can be removed from a store: half-built units and drafts that nobody works on.

    A draft keeps the rows that a stopped run has computed: once it is removed, its slide starts from its first tile.

    Args:
        store: an open store.
        older_than_s: only what was last changed at least so many seconds ago, and never less than `YOUNGEST_S`; what
            is in quarantine may be younger.
        quarantine: also what repairs moved aside that long ago.
    """
    root = check_on_disk(store.path)
    found = [
        Garbage(path, _kind(path), disk_bytes(path), _age_s(path))
        for path in map(local_path, store.leftovers())
        if not _is_at_work(path)
    ]
    found = [garbage for garbage in found if garbage.age_s >= max(older_than_s, YOUNGEST_S)]
    if quarantine and (root / QUARANTINE).is_dir():
        # the folder of a repair is as old as the repair; what is in it is as old as it was
        aside = [
            Garbage(path, "quarantine", disk_bytes(path), time.time() - path.stat().st_mtime)
            for path in sorted((root / QUARANTINE).iterdir())
        ]
        found += [garbage for garbage in aside if garbage.age_s >= older_than_s]
    return found


def gc_store(garbage: Sequence[Garbage]) -> int:
    """Remove garbage.

    Args:
        garbage: of `find_garbage`. What someone took up meanwhile stays.

    Returns:
        Bytes freed.
    """
    freed = 0
    for piece in garbage:
        if piece.kind != "quarantine" and _is_at_work(piece.path):
            continue
        remove(piece.path)
        freed += piece.n_bytes - disk_bytes(piece.path)
    return freed


def _new_quarantine(store: Path) -> Path:
    """A folder of this repair's own."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    for attempt in range(1000):
        folder = store / QUARANTINE / (f"{stamp}-{attempt}" if attempt else stamp)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        sync(store)
        return folder
    raise FileExistsError(f"{store / QUARANTINE / stamp}: no free name")


def _identity(path: Path) -> tuple[int, int] | None:
    """What changes when another file or folder takes this place; None where there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _kind(leftover: Path) -> str:
    kinds = {".draft": "draft", ".left": "draft", ".rows": "saved rows"}
    return kinds.get(leftover.suffix, "half-built unit")


def _is_at_work(leftover: Path) -> bool:
    """Whether a live worker holds the draft that a leftover belongs to."""
    if leftover.suffix not in (".draft", ".left", ".rows"):
        return False
    name = leftover.name.removeprefix("~").removesuffix(leftover.suffix)
    # the name of rows ends in the token of their worker
    unit = name.rpartition(".")[0] if leftover.suffix == ".rows" else name
    return is_claimed(leftover.with_name(unit))


def _age_s(path: Path) -> float:
    """Seconds since the last change of a file, or of anything in a folder; 0 if it cannot be told."""
    try:
        times = [path.lstat().st_mtime]
        for folder, _, names in os.walk(path):
            times += [os.lstat(os.path.join(folder, name)).st_mtime for name in ("", *names)]
    except OSError:
        return 0.0
    return time.time() - max(times)
