"""Stores at a URL: what every backend does on ``memory://``, and S3's own ways on a server in this process."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np
import pytest
import zarr

from extract.errors import StoreError, StoreUnreachableError, UnitCorruptError
from extract.store import Store, ZarrStore, convert_store, create_store, open_store
from extract.store.core.remote_path import RemotePath, local_path, store_path
from extract.store.formats import remote_store as module
from extract.store.formats.nodes import map_array
from extract.store.formats.remote_store import RemoteStore
from extract.store.upkeep.repair import find_garbage
from extract.store.upkeep.summary import summarise
from extract.store.upkeep.verify import verify_store
from tests.conftest import REPOSITORY
from tests.test_extract.object_server import forget_services, serve_objects
from tests.test_extract.small import EXECUTION, TILES, feature_recipe, matrix, tiles_unit, tree
from tests.test_extract.store_conformance import RECIPE, StoreConformance, add, take_away


def skipped(reason: str) -> Callable[..., None]:
    """A test of the suite that does not apply."""

    @pytest.mark.skip(reason=reason)
    def test(self: object) -> None: ...

    return test


class TestRemoteStore(StoreConformance):
    """A Zarr store at a URL."""

    format = "zarr"
    claims = False

    test_features_are_a_read_only_view_of_the_file = skipped("nothing is mapped at a URL: reading copies")
    test_a_draft_is_resumed_and_listed_by_nobody = skipped("there are no drafts at a URL")
    test_what_a_killed_run_left_beside_a_unit_is_cleared = skipped("there are no drafts at a URL")
    test_a_full_disk_at_any_step_leaves_the_store_as_it_was = skipped("an object store has no disk to fill")
    test_a_really_full_disk_says_how_much_is_needed_and_spoils_nothing = skipped("an object store has no disk to fill")
    test_a_disk_that_is_full_to_the_last_page_spoils_nothing = skipped("an object store has no disk to fill")
    test_a_store_can_be_made_once_there_is_space_again = skipped("an object store has no disk to fill")

    @pytest.fixture
    def tmp_path(self) -> Path:
        """A place of its own in memory, where the suite expects a folder."""
        return store_path(f"memory://{uuid.uuid4().hex}")

    def array_file(self, unit: Path, name: str) -> Path:
        """The single chunk."""
        chunks = {"features": "c/0/0", "coords": "coords/c/0/0", "tissue_fraction": "tissue_fraction/c/0"}
        return unit / chunks[name]

    def record_file(self, unit: Path) -> Path:
        """The node's metadata."""
        return unit / "zarr.json"

    def test_a_unit_is_seen_by_nobody_until_it_is_whole(self, store: Store, monkeypatch: pytest.MonkeyPatch):
        create, seen = RemotePath.create, []

        def look(file: RemotePath, data: bytes) -> None:
            other = open_store(store.path)
            seen.append((file.name, other.slide_ids(), other.slide_ids("tiny"), other.unit_paths("tiny")))
            create(file, data)

        monkeypatch.setattr(RemotePath, "create", look)
        store.write_tiles(tiles_unit("s"))
        assert len(seen) == 7
        assert all(each[1:] == ([], [], {}) for each in seen)
        store.write_features("tiny", "s", matrix(), [], EXECUTION)
        assert seen[7:] == [("0", ["s"], [], {}), ("zarr.json", ["s"], [], {})]
        assert store.slide_ids("tiny") == ["s"]

    def test_writers_racing_on_one_unit_end_in_one_commit(self, store: Store, monkeypatch: pytest.MonkeyPatch):
        create, barrier, outcomes = RemotePath.create, threading.Barrier(4), []

        def together(file: RemotePath, data: bytes) -> None:
            if file.name == "zarr.json" and file.parent.name == "s":
                barrier.wait(timeout=20)
                try:
                    create(file, data)
                except FileExistsError:
                    outcomes.append("second")
                    raise
                outcomes.append("first")
            else:
                create(file, data)

        monkeypatch.setattr(RemotePath, "create", together)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: store.write_tiles(tiles_unit("s")), range(4)))
            list(pool.map(lambda _: store.write_features("tiny", "s", matrix(), [], EXECUTION), range(4)))
        assert len(outcomes) == 8
        assert np.array_equal(store["s"].features("tiny"), matrix())
        store["s"].verify_tiles()

    def test_a_run_log_is_one_json_line_per_slide(self, store: Store):
        log = store.start_run()
        lines = [{"slide_id": 'é/\n"x"', "outcome": "failed"}, {"slide_id": "b"}, {"run": {"seconds": 1.5}}]
        for line in lines:
            log.append(line)
        # the first line says that a run is at work; the others come with the next minute, or the end
        assert len(log.path.read_text().splitlines()) == 1
        log.close()
        assert [json.loads(line) for line in log.path.read_text().splitlines()] == lines
        assert log.path.parent == store.path / "runs"

    def test_a_draft_holds_nothing_and_claims_nothing(self, store: Store):
        add(store, "s")
        before = tree(store.path)
        for _ in range(2):
            draft = store.draft("tiny", "s", EXECUTION)
            assert draft.features.shape == (0, 6)
            draft.save(matrix(), [], np.zeros(5, np.uint8))
            draft.touch()
            draft.release()
            assert not store.is_claimed("s", "tiny")
        draft.discard()
        store.clear_draft("s", "tiny")
        assert tree(store.path) == before


# ---------------------------------------------------------------- half-built and contested units


@pytest.fixture
def store() -> RemoteStore:
    """An empty store in memory with one entry."""
    store = create_store(f"memory://{uuid.uuid4().hex}/cohort.zarr", RECIPE)
    store.create_entry("tiny", feature_recipe())
    assert isinstance(store, RemoteStore)
    return store


class _Killed(BaseException):
    """The end of a writer."""


def test_a_writer_that_dies_at_any_object_leaves_no_unit_and_the_next_one_ends_the_same(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
):
    add(store, "whole")
    expected = {name.replace("whole", "s"): len(data) for name, data in tree(store.path).items() if "whole" in name}
    create = RemotePath.create
    for last in range(1, 8):
        left = iter(range(last))

        def die(file: RemotePath, data: bytes, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise _Killed
            create(file, data)

        with monkeypatch.context() as patch:
            patch.setattr(RemotePath, "create", die)
            with pytest.raises(_Killed):
                add(store, "s")
        complete = last >= 7
        fresh = open_store(store.path)
        assert fresh.slide_ids() == ["s", "whole"][not complete :]
        assert fresh.slide_ids("tiny") == ["whole"]
        assert fresh.leftovers() == ([] if complete else [store.tiles_path("s")])
        assert verify_store(fresh) == []
    features = add(store, "s")
    assert np.array_equal(open_store(store.path)["s"].features("tiny"), features)
    assert {name: len(data) for name, data in tree(store.path).items() if "/s/" in name}.keys() == expected.keys()
    assert verify_store(open_store(store.path)) == []


def test_objects_of_a_dead_writer_that_differ_are_replaced(store: RemoteStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_UPLOAD_S", 0.05)
    store.write_tiles(tiles_unit("s"))
    unit = store.feature_path("s", "tiny")
    (unit / "c/0/0").write_bytes(b"half")
    (unit / "c/0/1").write_bytes(b"of another shape")
    store.write_features("tiny", "s", matrix(), [], EXECUTION)
    assert np.array_equal(store["s"].features("tiny"), matrix())
    assert sorted(unit.files()) == ["c/0/0", "zarr.json"]


def test_a_slower_writer_of_other_bytes_leaves_the_unit_to_the_faster_one(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
):
    store.write_tiles(tiles_unit("s"))
    create, first_is_half_way = RemotePath.create, threading.Event()

    def slowly(file: RemotePath, data: bytes) -> None:
        create(file, data)
        if file.name == "0":
            first_is_half_way.set()
            time.sleep(0.3)

    monkeypatch.setattr(RemotePath, "create", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store.write_features, "tiny", "s", matrix(seed=1), [], EXECUTION)
        first_is_half_way.wait(10)
        second = pool.submit(store.write_features, "tiny", "s", matrix(seed=2), [], EXECUTION)
        first.result()
        second.result()
    store["s"].verify_features("tiny")
    assert np.array_equal(store["s"].features("tiny"), matrix(seed=1))


def test_what_cannot_be_read_back_is_not_committed(store: RemoteStore, monkeypatch: pytest.MonkeyPatch):
    create = RemotePath.create
    monkeypatch.setattr(RemotePath, "create", lambda file, data: create(file, data[:-1] if file.name == "0" else data))
    monkeypatch.setattr(RemotePath, "write_bytes", lambda file, data: len(data))
    monkeypatch.setattr(module, "_UPLOAD_S", 0.05)
    with pytest.raises(StoreUnreachableError, match=r"other bytes back .* than were written"):
        store.write_tiles(tiles_unit("s"))
    assert open_store(store.path).slide_ids() == []


def test_a_service_without_conditional_writes_is_written_too(store: RemoteStore, monkeypatch: pytest.MonkeyPatch):
    memory = type(fsspec.filesystem("memory"))
    pipe = memory.pipe_file

    def refuse(self: object, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
        if mode == "create":
            raise OSError(38, "A header you provided implies functionality that is not implemented")
        pipe(self, path, value, **options)

    monkeypatch.setattr(memory, "pipe_file", refuse)
    features = add(store, "s")
    assert np.array_equal(store["s"].features("tiny"), features)
    with pytest.raises(FileExistsError):
        (store.tiles_path("s") / "zarr.json").create(b"{}")


# ---------------------------------------------------------------- the objects are those of a folder


def test_a_folder_and_a_url_hold_the_same_bytes(store: RemoteStore, tmp_path: Path):
    local = create_store(tmp_path / "s", RECIPE)
    local.create_entry("tiny", feature_recipe())
    for each in (store, local):
        add(each, "site A/slide 1", 7, invalid=[2])
        add(each, "none", 0)
    assert tree(store.path) == tree(local.path)


def test_a_store_is_copied_there_and_back_by_any_tool(store: RemoteStore, tmp_path: Path):
    features = add(store, "a/b c", 7)
    store.write_index()
    service, key = store.path._open()
    service.get(key, str(tmp_path / "down"), recursive=True)
    down = open_store(tmp_path / "down")
    assert type(down) is ZarrStore
    assert np.array_equal(down["a/b c"].features("tiny"), features)
    assert verify_store(down) == []
    service.put(str(tmp_path / "down"), f"{key}-again", recursive=True)
    again = open_store(store.path.with_name("cohort.zarr-again"))
    assert again.slide_ids("tiny") == ["a/b c"]
    assert verify_store(again) == []


def test_a_store_is_converted_from_a_folder_to_a_url_and_back(tmp_path: Path):
    local, url = create_store(tmp_path / "s", RECIPE, "h5"), f"memory://{uuid.uuid4().hex}/s.zarr"
    local.create_entry("tiny", feature_recipe())
    add(local, "a", 5, invalid=[1])
    local.start_run().append({"slide_id": "a"})
    assert convert_store(local.path, url, "zarr").copied == 2
    assert convert_store(Path(url), tmp_path / "back", "h5").copied == 2
    assert (tmp_path / "back" / "runs").is_dir()
    assert open_store(tmp_path / "back")["a"].feature_record("tiny") == local["a"].feature_record("tiny")
    with pytest.raises(StoreError, match="both"):
        convert_store(url, Path(url), "zarr")
    with pytest.raises(StoreError, match=r"'h5'.*only Zarr"):
        create_store(f"memory://{uuid.uuid4().hex}", RECIPE, "h5")


def test_zarr_python_reads_it_through_fsspec(store: RemoteStore):
    features = add(store, "a/b c", 11)
    group = zarr.open_group(zarr.storage.FsspecStore.from_url(str(store.path)), mode="r")
    array = group["features/tiny/a%2Fb%20c"]
    assert array[:].tobytes() == features.tobytes()
    assert array.chunks == array.shape
    assert group["tiles/a%2Fb%20c/thumbnail"][:].tobytes() == tiles_unit("a/b c", 11).thumbnail.tobytes()
    assert group.attrs["tessera"]["format"] == 1


def test_an_array_that_zarr_python_rewrote_is_still_read(store: RemoteStore):
    features = add(store, "s", 9)
    node = store.feature_path("s", "tiny")
    attributes = json.loads((node / "zarr.json").read_text())["attributes"]
    take_away(node)
    array = zarr.create_array(str(node), shape=(9, 6), dtype="float16", chunks=(4, 6), attributes=attributes)
    array[:] = features
    fresh = open_store(store.path)
    assert np.array_equal(fresh["s"].features("tiny"), features)
    assert np.array_equal(fresh["s"].features("tiny", rows=[8, 0, 8]), features[[8, 0, 8]])
    assert verify_store(fresh) == []


# ---------------------------------------------------------------- what is asked of the service


class Requests:
    """Counts what is asked of the memory service, and the bytes that it sends."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.sent = 0
        memory = type(fsspec.filesystem("memory"))
        for name in ("info", "find", "ls", "cat_file", "pipe_file"):
            patch.setattr(memory, name, self._counting(name, getattr(memory, name)))

    def _counting(self, name: str, method: Callable[..., object]) -> Callable[..., object]:
        depth = threading.local()

        def counted(*args: object, **options: object) -> object:
            inside = getattr(depth, "inside", False)
            depth.inside = True
            try:
                answer = method(*args, **options)
            finally:
                depth.inside = inside
            if not inside:
                self.calls[name] += 1
                self.sent += len(answer) if isinstance(answer, bytes) else 0
            return answer

        return counted


def fill(store: Store, n: int) -> None:
    """Complete units of ``n`` slides, records only: all that listing looks at."""
    add(store, "0")
    records = {
        path: (path / "zarr.json").read_text() for path in (store.tiles_path("0"), store.feature_path("0", "tiny"))
    }
    for i in range(1, n):
        for path, text in records.items():
            (path.with_name(str(i)) / "zarr.json").write_text(text)


def test_a_store_is_listed_by_its_index_and_a_few_lists(store: RemoteStore, monkeypatch: pytest.MonkeyPatch):
    fill(store, 200)
    store.write_index()
    requests = Requests(monkeypatch)
    fresh = open_store(store.path)
    ids = fresh.slide_ids("tiny")
    assert len(ids) == len(fresh.slide_ids()) == 200
    assert {fresh.n_tiles(slide_id, "tiny") for slide_id in ids} == {5}
    assert "7" in fresh
    assert sum(requests.calls.values()) < 20, requests.calls
    # no list of all objects is asked for again and again
    assert requests.calls["find"] == 3


def test_lines_of_an_index_count_only_for_the_same_objects(store: RemoteStore):
    add(store, "a", 5)
    add(store, "b", 5)
    store.write_index()
    take_away(store.tiles_path("a"))
    take_away(store.feature_path("a", "tiny"))
    again = create_store(store.path, RECIPE)
    add(again, "a", 8)
    fresh = open_store(store.path)
    assert {slide_id: fresh.n_tiles(slide_id, "tiny") for slide_id in fresh.slide_ids("tiny")} == {"a": 8, "b": 5}


def test_a_slice_of_rows_is_all_that_is_sent(store: RemoteStore, monkeypatch: pytest.MonkeyPatch):
    features = add(store, "s", 5000)
    slide = open_store(store.path)["s"]
    slide.features("tiny", rows=slice(2))
    requests = Requests(monkeypatch)
    for rows, most in ((slice(1000, 1010), 120), ([1500, 1400, 1500], 101 * 12), (slice(None, None, -2500), 2501 * 12)):
        requests.sent = 0
        index = rows if isinstance(rows, slice) else np.array(rows)
        assert np.array_equal(slide.features("tiny", rows=rows), features[index])
        records = sum(
            len((path / "zarr.json").read_bytes()) for path in (store.tiles_path("s"), store.feature_path("s", "tiny"))
        )
        assert requests.sent <= 4 * records + most
        assert requests.sent < features.nbytes


def test_a_matrix_that_was_verified_is_not_sent_again(store: RemoteStore, monkeypatch: pytest.MonkeyPatch):
    features = add(store, "s", 2000)
    requests, slide = Requests(monkeypatch), open_store(store.path)["s"]
    slide.verify_features("tiny")
    view = slide.features("tiny")
    assert np.array_equal(view, features)
    assert not view.flags.writeable
    assert features.nbytes <= requests.sent < 1.9 * features.nbytes
    chunk = store.feature_path("s", "tiny") / "c/0/0"
    chunk.write_bytes(features[::-1].tobytes())
    with pytest.raises(UnitCorruptError, match="checksum"):
        slide.verify_features("tiny")


# ---------------------------------------------------------------- paths


def test_paths_of_urls_are_told_from_paths_of_disks():
    for text in ("s3://bucket/a/c.zarr", "gs://bucket/c.zarr", "memory://x"):
        path = store_path(text)
        assert isinstance(path, RemotePath)
        # what a command line or a configuration makes of it
        assert str(path) == str(store_path(Path(text))) == text
        assert path == store_path(text)
        assert copy.deepcopy(path) == path
        assert str(path / "tiles" / "a") == f"{text}/tiles/a"
        assert (path / "tiles" / "a").relative_to(path) == PurePosixPath("tiles/a")
        assert pickle.loads(pickle.dumps(path)) == path  # noqa: S301
        assert hash(path) == hash(store_path(text))
        assert sorted([path / "b", path / "a"]) == [path / "a", path / "b"]
    for text in ("cohort.zarr", "/data/c.zarr", "C:/data", "a:b", "s3"):
        assert type(store_path(text)) is type(Path())
        assert str(store_path(text)) == text
    assert (
        store_path("file:///data/my%20c.zarr")
        == store_path(Path("file:///data/my%20c.zarr"))
        == Path("/data/my c.zarr")
    )


def test_a_file_url_is_a_folder(tmp_path: Path):
    store = create_store(f"file://{tmp_path}/s", RECIPE)
    assert type(store) is ZarrStore
    assert (tmp_path / "s" / "zarr.json").is_file()


def test_a_url_is_never_taken_for_a_file_of_this_machine(store: RemoteStore, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (os.stat, open, os.listdir, os.makedirs, os.fspath, Path, shutil.rmtree):
        with pytest.raises(TypeError, match="RemotePath"):
            use(store.path)
    assert not isinstance(store.path, Path | os.PathLike)
    assert not hasattr(store.path, "rename")
    assert not hasattr(store.path, "stat")
    add(store, "s")
    for need in (local_path, lambda path: map_array(path / "tiles/s/coords")):
        with pytest.raises(StoreError, match=r"got memory://.* where a file of this machine .* mil store convert"):
            need(store.path)
    assert list(tmp_path.iterdir()) == []


def test_what_needs_renames_is_refused(store: RemoteStore):
    with pytest.raises(StoreError, match=r"nothing can be moved .* → .*mil store verify"):
        find_garbage(store, 0)


def test_a_summary_counts_objects(store: RemoteStore):
    add(store, "a")
    store.write_tiles(tiles_unit("b"))
    (store.feature_path("b", "tiny") / "c/0/0").write_bytes(b"half")
    summary = summarise(open_store(store.path))
    assert (summary.entries[0].complete, summary.entries[0].without, summary.n_leftovers) == (1, 1, 1)
    assert summary.leftover_bytes == 4
    assert summary.n_bytes == sum(len(data) for data in tree(store.path, but=()).values())
    assert sum(slide.n_bytes for slide in summary.slides) < summary.n_bytes


def test_damage_is_found_at_a_url_too(store: RemoteStore):
    features = add(store, "a")
    add(store, "b")
    chunk = store.feature_path("a", "tiny") / "c/0/0"
    chunk.write_bytes(bytes(features.nbytes))
    (store.tiles_path("b") / "coords/c/0/0").unlink()
    found = {(each.slide_id, each.entry) for each in verify_store(open_store(store.path))}
    assert found == {("a", "tiny"), ("b", None)}


# ---------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket."""
    with pytest.MonkeyPatch.context() as patch, serve_objects(patch) as url:
        yield url


def test_a_store_lives_in_a_bucket(bucket: str):
    url = f"{bucket}/first/cohort.zarr"
    store = create_store(url, TILES)
    store.create_entry("tiny", feature_recipe())
    features = add(store, "site A/slide 1", 700, invalid=[3])
    add(store, "none", 0)
    store.write_index()
    opened = open_store(url)
    assert opened.slide_ids("tiny") == ["none", "site A/slide 1"]
    assert np.array_equal(opened["site A/slide 1"].features("tiny"), np.delete(features, 3, axis=0))
    assert np.array_equal(opened["site A/slide 1"].features("tiny", rows=slice(10, 20)), features[11:21])
    assert np.array_equal(opened["site A/slide 1"].thumbnail, tiles_unit("site A/slide 1", 700).thumbnail)
    assert verify_store(opened) == []
    group = zarr.open_group(zarr.storage.FsspecStore.from_url(url), mode="r")
    assert group["features/tiny/site%20A%2Fslide%201"][:].tobytes() == features.tobytes()


def test_the_second_of_two_records_is_refused_by_the_service(bucket: str):
    file = store_path(f"{bucket}/second/zarr.json")
    file.create(b"first")
    with pytest.raises(FileExistsError):
        file.create(b"second")
    assert file.read_bytes() == b"first"
    age = file.age()
    listed = store_path(f"{bucket}/second").files()["zarr.json"]
    assert module.age_of(listed) == age
    file.write_bytes(b"third")
    assert file.age() != age


WRITER = """
import sys, numpy as np
from extract.store import Execution, TilesUnit, open_store
store = open_store(sys.argv[1], "r+")
for i in range(4):
    rng = np.random.default_rng(i)
    coords, fraction = rng.integers(0, 999, (50, 2), dtype=np.int32), np.ones(50, np.float32)
    store.write_tiles(TilesUnit(f"slide {i}", coords, fraction, np.zeros((4, 4, 3), np.uint8), {}))
    features = rng.normal(size=(50, 6)).astype(np.float16)
    store.write_features("tiny", f"slide {i}", features, [], Execution("fp32", "torch", "cpu", 4, {}))
"""


def test_two_processes_that_write_the_same_slides_end_in_a_whole_store(bucket: str):
    url = f"{bucket}/race/cohort.zarr"
    create_store(url, TILES).create_entry("tiny", feature_recipe())
    workers = [subprocess.Popen([sys.executable, "-c", WRITER, url], cwd=REPOSITORY) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    store = open_store(url)
    assert len(store.slide_ids("tiny")) == 4
    assert verify_store(store) == []


def test_an_absent_store_and_an_absent_bucket_are_told(bucket: str):
    with pytest.raises(StoreError, match=r"s3://bucket/none .*no zarr\.json.*mil extract"):
        open_store(f"{bucket}/none")
    with pytest.raises(StoreUnreachableError, match=r"s3://nobody/c\.zarr.*no such bucket.*make it first"):
        create_store("s3://nobody/c.zarr", TILES)


@pytest.mark.parametrize("trouble", ["nobody listens", "no login"])
def test_a_service_that_does_not_answer_is_told_within_seconds(trouble: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    if trouble == "nobody listens":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    forget_services()
    try:
        started = time.monotonic()
        with pytest.raises(StoreUnreachableError, match=r"got s3://bucket/c\.zarr.* → .* → expected .* → ") as caught:
            open_store("s3://bucket/c.zarr")
        assert time.monotonic() - started < 10
        assert ("credentials" if trouble == "no login" else "network") in str(caught.value).rpartition("expected")[2]
    finally:
        forget_services()


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    forget_services()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # what was imported before is remembered
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(StoreError, match=r's3:// is not installed.*pip install "tessera-mil\[remote\]"'):
        open_store("s3://bucket/c.zarr")
    with pytest.raises(StoreError, match="nobody knows sthree://"):
        open_store("sthree://bucket/c.zarr")
    forget_services()


def test_the_doctor_looks_at_the_service(bucket: str):
    from extract.planning.machine import check_service

    checked = check_service(store_path(f"{bucket}/new.zarr"))
    assert checked.status == "ok"
    assert not store_path(f"{bucket}/new.zarr").exists()
    refused = check_service(store_path("s3://nobody/new.zarr"))
    assert refused.status == "error"
    assert "no such bucket" in refused.detail
