"""Isolation: whatever a file does to its decoder costs that tile or slide, and nothing else."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.channel import Channel, Message
from extract.errors import NoTissueError, ReaderError, SlideUnreadableError, TileDecodeError
from extract.geometry import ReadPlan
from extract.reading.answers import check_answer, rebuild_error
from extract.reading.isolation import ReaderLimits, ReaderProcess
from extract.reading.reader import describe, open_request
from extract.reading.readers import LocalReaders, Readers
from extract.reading.ring import INVALID, Ring, RingShape
from extract.slides.slide import Slide
from extract.store import QualityRecipe
from tests.test_extract.small import TILES, break_tile, write_slide

PLAN = ReadPlan(0, 1.0, 64, 64.0, 64.0, 0.5, 0.5, 0.5)
COORDS = np.array([(64 * i, 0) for i in range(6)], dtype=np.int32)


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring(RingShape(slots=4, batch_size=8, tile_px=64, threads=4))
    yield ring
    ring.close()


@pytest.fixture
def hostile(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ReaderProcess]]:
    """Starts reading processes in which the names of files say what they do."""
    monkeypatch.setattr(ReaderProcess, "module", "tests.test_extract.hostile_reader")
    started: list[ReaderProcess] = []

    def start(**limits: float) -> ReaderProcess:
        started.append(ReaderProcess(ring, ReaderLimits(**limits)))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for readers in started:
        readers.close()


def open_in(readers: Readers, key: int, path: Path, quality: QualityRecipe | None = None) -> None:
    readers.tell(open_request(key, path, path.stem, "openslide", PLAN, quality), [COORDS])


def read(readers: Readers, slot: int, *runs: tuple[int, int, int]) -> "Future[Message]":
    return readers.request({"do": "read", "slot": slot, "at": 0, "runs": [list(run) for run in runs]})


def errors(future: "Future[Message]") -> dict[str, Any]:
    return future.result(timeout=120)[0]["errors"]


def expected(path: Path) -> np.ndarray:
    with Slide(path, reader="openslide") as slide:
        return np.stack([slide.read_tile(int(x), int(y), PLAN) for x, y in COORDS])


@pytest.mark.parametrize("kind", [ReaderProcess, LocalReaders])
def test_tiles_arrive_in_their_places(ring: Ring, tmp_path: Path, kind: Callable[[Ring], Readers]):
    one, two = write_slide(tmp_path / "one.tif", seed=1), write_slide(tmp_path / "two.tif", seed=2)
    break_tile(two, 128, 0)
    readers = kind(ring)
    ring.flags[:] = 0xFF
    try:
        open_in(readers, 1, one)
        open_in(readers, 2, two, QualityRecipe())
        done = [read(readers, 3, (1, 0, 3), (2, 1, 4)), read(readers, 0, (1, 5, 6))]
        assert [errors(each) for each in done] == [{}, {}]
    finally:
        readers.close()
    assert np.array_equal(ring.pixels[3, :3], expected(one)[:3])
    assert ring.flags[3, :3].tolist() == [0, 0, 0]
    assert ring.flags[3, 4] == INVALID
    assert not ring.pixels[3, 4].any()
    with Slide(two, reader="openslide") as slide:
        assert np.array_equal(ring.pixels[3, 3], slide.read_tile(64, 0, PLAN))
    assert ring.flags[3, 3] & INVALID == 0
    assert np.array_equal(ring.pixels[0, 0], expected(one)[5])
    assert ring.flags[3, 6] == 0xFF


def test_a_tile_that_kills_its_reader_is_invalid_and_costs_no_other(
    hostile: Callable[..., ReaderProcess], ring: Ring, tmp_path: Path
):
    good, bad = write_slide(tmp_path / "good.tif"), write_slide(tmp_path / "segv-1-4.tif")
    readers = hostile()
    open_in(readers, 1, good)
    open_in(readers, 2, bad)
    done = [read(readers, 0, (1, 0, 6)), read(readers, 1, (2, 0, 6)), read(readers, 2, (1, 2, 4), (2, 2, 4))]
    assert [errors(each) for each in done] == [{}, {}, {}]
    assert ring.flags[1, :6].tolist() == [0, INVALID, 0, 0, INVALID, 0]
    assert np.array_equal(ring.pixels[0, :6], expected(good))
    assert np.array_equal(ring.pixels[1, [0, 2, 3, 5]], expected(bad)[[0, 2, 3, 5]])
    assert not ring.pixels[1, [1, 4]].any()
    assert ring.flags[0, :6].tolist() == [0] * 6
    # and it goes on afterwards
    assert errors(read(readers, 3, (1, 0, 6))) == {}


def test_a_slide_that_kills_three_times_is_given_up(hostile: Callable[..., ReaderProcess], ring: Ring, tmp_path: Path):
    good, bad = write_slide(tmp_path / "good.tif"), write_slide(tmp_path / "segv-0-1-2-3-4-5.tif")
    readers = hostile()
    open_in(readers, 1, good)
    open_in(readers, 2, bad)
    started = time.monotonic()
    failed = read(readers, 0, (2, 0, 6))
    fine = read(readers, 1, (1, 0, 6))
    found = errors(failed)
    assert set(found) == {"2"}
    assert "was killed by SIGSEGV" in found["2"]["message"]
    assert "segv-0-1-2-3-4-5" in found["2"]["message"]
    assert errors(fine) == {}
    # what is asked of it later is answered without another death
    pid = readers.pid
    assert set(errors(read(readers, 2, (2, 0, 6)))) == {"2"}
    assert readers.pid == pid
    assert time.monotonic() - started < 60


def test_a_tile_that_never_ends_is_invalid(hostile: Callable[..., ReaderProcess], ring: Ring, tmp_path: Path):
    good, bad = write_slide(tmp_path / "good.tif"), write_slide(tmp_path / "hang-2.tif")
    readers = hostile(read_s=1.0)
    open_in(readers, 1, good)
    open_in(readers, 2, bad)
    done = [read(readers, 0, (2, 0, 6)), *(read(readers, 1, (1, 0, 6)) for _ in range(3))]
    assert [errors(each) for each in done] == [{}] * 4
    assert ring.flags[0, :6].tolist() == [0, 0, INVALID, 0, 0, 0]
    assert np.array_equal(ring.pixels[1, :6], expected(good))


def test_a_tile_that_takes_all_memory_ends_its_slide_only(
    hostile: Callable[..., ReaderProcess], ring: Ring, tmp_path: Path
):
    good, bad = write_slide(tmp_path / "good.tif"), write_slide(tmp_path / "greedy-0.tif")
    readers = hostile(memory_bytes=2 << 30)
    open_in(readers, 1, good)
    open_in(readers, 2, bad)
    found = errors(read(readers, 0, (1, 0, 2), (2, 0, 2), (1, 2, 4)))
    assert set(found) == {"2"}
    assert isinstance(rebuild_error(found["2"], "greedy-0"), SlideUnreadableError)
    assert "--reader-memory" in str(rebuild_error(found["2"], "greedy-0"))
    assert np.array_equal(ring.pixels[0, [0, 1, 4, 5]], expected(good)[:4])


@pytest.mark.parametrize(
    ("name", "cause"), [("cut-segv", "was killed by SIGSEGV"), ("cut-hang", "stood still for 1 s")]
)
def test_a_slide_that_kills_its_reader_while_it_is_cut_fails(
    hostile: Callable[..., ReaderProcess], tmp_path: Path, name: str, cause: str
):
    good, bad = write_slide(tmp_path / "good.tif"), write_slide(tmp_path / f"{name}.tif")
    readers = hostile(cut_s=1.0) if name == "cut-hang" else hostile()

    def cut(path: Path) -> "Future[Message]":
        values = {"do": "cut", "path": str(path), "slide_id": path.stem, "reader": "auto", "recipe": asdict(TILES)}
        return readers.request(values | {"mpp": None, "default_mpp": None, "mask": None})

    failed, fine = cut(bad), [cut(good) for _ in range(3)]
    error = rebuild_error(failed.result(timeout=60)[0]["error"], name)
    assert isinstance(error, SlideUnreadableError)
    assert cause in str(error)
    for each in fine:
        answer, arrays = each.result(timeout=60)
        assert "error" not in answer
        assert arrays[0].shape[1] == 2


def test_a_reader_that_does_not_start_is_said_to_be_one(ring: Ring, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(ReaderProcess, "module", "extract.no_such_module")
    readers = ReaderProcess(ring)
    try:
        with pytest.raises(ReaderError, match=r"exit code 1 .* mil doctor"):
            read(readers, 0, (1, 0, 1)).result(timeout=60)
        with pytest.raises(ReaderError):
            readers.request({"do": "read"})
    finally:
        readers.close()


def test_the_reader_ends_with_its_run(ring: Ring, tmp_path: Path):
    readers = ReaderProcess(ring)
    pid = readers.pid
    open_in(readers, 1, write_slide(tmp_path / "a.tif"))
    assert errors(read(readers, 0, (1, 0, 1))) == {}
    readers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_killing_an_idle_reader_is_not_noticed(ring: Ring, tmp_path: Path):
    path = write_slide(tmp_path / "a.tif")
    readers = ReaderProcess(ring)
    try:
        open_in(readers, 1, path)
        assert errors(read(readers, 0, (1, 0, 1))) == {}
        os.kill(readers.pid, signal.SIGKILL)
        assert errors(read(readers, 1, (1, 0, 6))) == {}
        assert np.array_equal(ring.pixels[1, :6], expected(path))
    finally:
        readers.close()


@pytest.mark.parametrize("at_work", [False, True])
def test_a_reader_that_is_stopped_is_replaced_and_no_slide_is_blamed(
    hostile: Callable[..., ReaderProcess], tmp_path: Path, at_work: bool
):
    """As a debugger or a scheduler stops it, or a disk that is away; within the limit of a read, whatever it is at."""
    readers, path = hostile(read_s=2, cut_s=600), write_slide(tmp_path / "a.tif")
    slow = write_slide(tmp_path / "slow-cut.tif")
    open_in(readers, 1, path)
    assert errors(read(readers, 0, (1, 0, 1))) == {}
    values = {"do": "cut", "path": str(slow), "slide_id": "slow", "reader": "auto", "recipe": asdict(TILES)}
    cut = readers.request(values | {"mpp": None, "default_mpp": None, "mask": None}) if at_work else None
    while at_work and not (readers._ring.at_work[:, 0] != 0).any():
        time.sleep(0.01)
    pid, began = readers.pid, time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    # more than the pipe holds: whoever sends must not keep the standstill from being noticed
    for key in range(2, 12):
        readers.tell(open_request(key, path, path.stem, "openslide", PLAN, None), [np.zeros((20_000, 2), np.int32)])
    assert errors(read(readers, 1, (1, 0, 6))) == {}
    assert time.monotonic() - began < 20
    assert readers.pid != pid
    assert np.array_equal(readers._ring.pixels[1, :6], expected(path))
    if cut is not None:
        assert "error" not in cut.result(timeout=60)[0]


def test_a_death_from_outside_costs_no_slide_and_signals_of_the_group_are_ignored(
    hostile: Callable[..., ReaderProcess], tmp_path: Path
):
    """The slide takes its time to be cut; meanwhile its reader is told to end, and then is killed."""
    slow = write_slide(tmp_path / "slow-cut.tif")
    readers = hostile()
    values = {"do": "cut", "path": str(slow), "slide_id": "slow", "reader": "auto", "recipe": asdict(TILES)}
    future = readers.request(values | {"mpp": None, "default_mpp": None, "mask": None})
    while not (readers._ring.at_work[:, 0] != 0).any():
        time.sleep(0.01)
    pid = readers.pid
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    assert readers.pid == pid
    os.kill(pid, signal.SIGKILL)
    answer, arrays = future.result(timeout=60)
    assert "error" not in answer
    assert arrays
    assert readers.pid != pid


def test_a_run_that_was_suspended_blames_no_slide(hostile: Callable[..., ReaderProcess], tmp_path: Path):
    slow = write_slide(tmp_path / "slow-cut.tif")
    readers = hostile(cut_s=3)
    values = {"do": "cut", "path": str(slow), "slide_id": "slow", "reader": "auto", "recipe": asdict(TILES)}
    future = readers.request(values | {"mpp": None, "default_mpp": None, "mask": None})
    while not (readers._ring.at_work[:, 0] != 0).any():
        time.sleep(0.01)
    # the task began long ago by the clock, but this process has not looked at it since
    readers._ring.at_work[:, 1] -= int(100e9)
    readers._awake_since = time.monotonic()
    assert "error" not in future.result(timeout=60)[0]


@pytest.mark.parametrize(
    "nonsense",
    [b"", b"short", (1).to_bytes(8, "little") + b"5", (9).to_bytes(8, "little") + b'{"task":1', b"\xff" * 40],
)
def test_a_reader_that_talks_nonsense_is_replaced(ring: Ring, tmp_path: Path, nonsense: bytes):
    path = write_slide(tmp_path / "a.tif")
    readers = ReaderProcess(ring)
    try:
        open_in(readers, 1, path)
        assert errors(read(readers, 0, (1, 0, 1))) == {}
        pid, loopback = readers.pid, _Loopback()
        loopback.send_bytes(nonsense)
        receive = readers._channel.receive
        readers._channel.poll = lambda timeout_s: True  # type: ignore[method-assign]
        readers._channel.receive = Channel(loopback).receive  # type: ignore[arg-type,method-assign]
        assert errors(read(readers, 1, (1, 0, 6))) == {}
        assert readers.pid != pid
        assert receive is not None
        assert np.array_equal(ring.pixels[1, :6], expected(path))
    finally:
        readers.close()


@pytest.mark.parametrize(
    "values",
    [{}, {"errors": {"7": {}}}, {"errors": {"1": "x"}}, {"errors": {}, "cpu_s": "x"}, {"errors": {}, "opened": 3}],
)
def test_an_answer_of_another_shape_is_refused(values: dict[str, Any]):
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        check_answer(values, {"do": "read", "runs": [[1, 0, 4]]})


def test_an_error_of_a_whole_task_is_one_of_each_of_its_slides():
    error = {"kind": "OSError", "message": "m", "trace": ""}
    checked = check_answer({"error": error}, {"do": "read", "runs": [[1, 0, 4], [2, 0, 1]]})
    assert checked["errors"] == {"1": error, "2": error}


def test_the_ring_cannot_be_shortened(ring: Ring):
    with pytest.raises(PermissionError):
        os.ftruncate(ring.descriptor, 0)


def test_errors_cross_as_plain_values():
    error = rebuild_error(describe(NoTissueError("got no tissue")), "a")
    assert type(error) is NoTissueError
    assert str(error) == "got no tissue"
    assert isinstance(rebuild_error(describe(TileDecodeError("t")), "a"), TileDecodeError)
    assert isinstance(rebuild_error(describe(OSError(5, "I/O error")), "a"), SlideUnreadableError)
    try:
        raise ZeroDivisionError("by nothing")
    except ZeroDivisionError as raised:
        odd = rebuild_error(describe(raised), "a")
    assert isinstance(odd, ReaderError)
    assert "by nothing" in str(odd)
    assert "test_isolation" in odd.trace
    # what the process says is data: a name from elsewhere makes no object of that kind
    assert isinstance(rebuild_error({"kind": "Path", "message": "m", "trace": ""}, "a"), SlideUnreadableError)


class _Loopback:
    """A connection to itself."""

    def __init__(self) -> None:
        self.content = b""

    def send_bytes(self, content: bytes) -> None:
        self.content = content

    def recv_bytes(self, maximum: int) -> bytes:
        return self.content


def test_messages_are_json_and_plain_arrays():
    channel = Channel(_Loopback())  # type: ignore[arg-type]
    arrays = [COORDS, np.arange(6, dtype=np.float32).reshape(2, 3), np.empty((0, 2), dtype=np.int32)]
    channel.send({"id": "a/\udcff é", "x": [1, None]}, arrays)
    values, received = channel.receive()
    assert values == {"id": "a/\udcff é", "x": [1, None]}
    for sent, got in zip(arrays, received, strict=True):
        assert (sent.dtype, sent.shape) == (got.dtype, got.shape)
        assert np.array_equal(sent, got)
    text = json.dumps({"arrays": [["|O", [1]]]}).encode()
    loopback = _Loopback()
    loopback.send_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match="numbers"):
        Channel(loopback).receive()  # type: ignore[arg-type]
