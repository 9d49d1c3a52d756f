"""Full disks, folders that may not be written or read: an error that says so, and a store that is as it was."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from extract.errors import StoreError, StoreFullError
from extract.store import Store, find_format, open_store
from tests.conftest import REPOSITORY
from tests.test_extract.crash_store import write
from tests.test_extract.seeded import (
    ENTRY,
    EXECUTION,
    FORMATS,
    RECIPE,
    SLIDES,
    files_of,
    left_in,
    make_store,
    tiles_of,
    wrong_units,
)

NOBODY = 65534


@pytest.fixture(scope="module", params=FORMATS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return request.param


@pytest.fixture(scope="module")
def whole(backend: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a store that was written without trouble."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder / "s", backend)
    return files_of(folder / "s")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system; `remount` changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(disk: Path, options: str) -> None:
    """Give the file system another size, or another right."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def accepted(folder: Path) -> list[str]:
    """Slides with tiles in a store that may not be there yet; all that is accepted must be right."""
    if find_format(folder) is None:
        return []
    assert wrong_units(open_store(folder)) == []
    return open_store(folder).slide_ids()


# ---------------------------------------------------------------- no space


@pytest.mark.parametrize("resource", ["size=0,nr_inodes={}", "nr_inodes=0,size={}k"], ids=["files", "bytes"])
def test_a_disk_that_is_full_at_any_moment_spoils_nothing(
    disk: Path, backend: str, whole: dict[str, bytes], resource: str
):
    failures, had = 0, []
    for amount in range(4, 2000, 2):
        remount(disk, resource.format(amount))
        try:
            write(disk / "s", backend)
            break
        except StoreFullError:
            failures += 1
        # what was complete stays, and nothing that is half built is left in the way
        had, before = accepted(disk / "s"), had
        assert set(before) <= set(had)
        assert not [name for name in left_in(disk) if ".partial" in name]
    assert failures > 5
    assert files_of(disk / "s") == whole
    assert left_in(disk) == []


LIMITED = """
import json, resource, sys
from pathlib import Path
import h5py, zarr
from extract.errors import StoreFullError
from tests.test_extract.crash_store import write
met = []
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write(Path(sys.argv[1]), sys.argv[2])
        met.append("written")
    except StoreFullError:
        met.append("full")
print(json.dumps(met))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_files_that_may_not_grow_any_further_spoil_nothing(tmp_path: Path, backend: str, whole: dict[str, bytes]):
    limits = [0, 1, 100, 400, 700, 1000, 1500, 2000, 4000]
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "s"), backend, *map(str, limits)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    met = json.loads(done.stdout)
    assert met[:3] == ["full"] * 3
    accepted(tmp_path / "s")
    assert not [name for name in left_in(tmp_path) if ".partial" in name]
    write(tmp_path / "s", backend)
    assert files_of(tmp_path / "s") == whole


# ---------------------------------------------------------------- no permission

WRITING: dict[str, Callable[[Store], object]] = {
    "tiles": lambda store: store.write_tiles(tiles_of("new")),
    "entry": lambda store: store.create_entry("new", RECIPE),
    "draft": lambda store: store.draft(ENTRY, SLIDES[1], EXECUTION),
    "run": lambda store: store.start_run(),
    "store": lambda store: make_store(store.path.with_name("new"), store.format),
}


def half_written(folder: Path, backend: str) -> None:
    """A store in which one slide is complete and one is cut."""
    write(folder, backend, SLIDES[:1])
    make_store(folder, backend).write_tiles(tiles_of(SLIDES[1]))


@pytest.mark.parametrize("what", WRITING)
def test_a_disk_that_may_only_be_read_is_read_and_writing_says_so(disk: Path, backend: str, what: str):
    remount(disk, "size=8m")
    half_written(disk / "s", backend)
    before = files_of(disk / "s")
    remount(disk, "ro")
    assert len(accepted(disk / "s")) == 2
    with pytest.raises(StoreError, match=r"got .*Read-only file system.* → .*--store"):
        WRITING[what](open_store(disk / "s", "r+"))
    remount(disk, "rw")
    assert files_of(disk / "s") == before
    assert left_in(disk) == []


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that another user may enter, which pytest's own are not."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(work: Callable[[], None]) -> str:
    """What a child under another user's id meets: the type and the message of its error, or nothing."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
        except BaseException as error:
            os.write(sender, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(sender)
    with open(receiver, encoding="utf-8") as file:
        met = file.read()
    os.waitpid(child, 0)
    return met


@pytest.mark.parametrize("what", WRITING)
def test_a_store_of_another_user_is_read_and_writing_says_so(public: Path, backend: str, what: str):
    half_written(public / "s", backend)
    before = files_of(public)
    assert as_nobody(lambda: accepted(public / "s")) == ""
    met = as_nobody(lambda: WRITING[what](open_store(public / "s", "r+")))
    assert met.startswith("StoreError: got ")
    assert "Permission denied" in met
    assert "--store" in met
    assert files_of(public) == before
    assert left_in(public) == []


def test_a_unit_that_may_not_be_read_costs_only_itself(public: Path, backend: str):
    write(public / "s", backend, SLIDES[:2])
    store = open_store(public / "s")
    closed = store.feature_path(SLIDES[0], ENTRY)
    for path in (closed, *closed.rglob("*")):
        if path.is_file():
            path.chmod(0)
    assert as_nobody(lambda: open_store(public / "s")[SLIDES[1]].verify_features(ENTRY)) == ""
    met = as_nobody(lambda: open_store(public / "s")[SLIDES[0]].verify_features(ENTRY))
    # it is named, and never left out without a word
    for text in (met, as_nobody(lambda: open_store(public / "s").slide_ids(ENTRY))):
        assert "Permission denied" in text
        assert str(closed) in text
