"""The commands on a store in a bucket, from slides to a trained head."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from extract.errors import StoreError
from extract.pipeline.fleet import check_claims
from extract.planning.plan import plan_extraction
from extract.store import Execution, TileRecipe, create_store, from_dict, open_store
from extract.store.core.remote_path import store_path
from mil.config.compose import compose_config
from tests.test_extract.object_server import serve_objects
from tests.test_extract.small import write_slide
from tests.test_mil.cli.test_main import FAST, TILING, Mil, mil, write_labels

__all__ = ["mil"]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket."""
    with pytest.MonkeyPatch.context() as patch, serve_objects(patch) as url:
        yield url


def share_among(url: str, ids: list[str], entry: str) -> None:
    """Give the units of two slides to further ones, so that there is something to train on."""
    store = open_store(url, "r+")
    for i, slide_id in enumerate(ids):
        slide = store[f"00{i % 2}"]
        arrays = {name: slide.array(name) for name in slide.record["sha256"]}
        store.commit_tiles({**slide.record, "slide_id": slide_id}, arrays)
        execution = slide.feature_record(entry)["execution"]
        store.write_features(entry, slide_id, slide.matrix(entry), [], from_dict(Execution, execution))


@pytest.mark.slow
def test_from_slides_to_a_head_in_a_bucket(
    mil: Mil, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extract.planning.plan.plan_extraction", partial(plan_extraction, measure_s=0.2))
    url = f"{bucket}/cohort.zarr"
    for i in range(2):
        write_slide(tmp_path / "slides" / f"00{i}.tif", 260, 200, seed=i)
    planned = mil("plan", tmp_path / "slides", "--store", url, *TILING)
    assert planned.code == 0, planned.err
    assert not planned.says("free")
    first = mil("extract", tmp_path / "slides", "--store", url, *TILING)
    assert first.code == 0, first.err
    assert first.says("2 embedded", f"store {url}", f"log {url}/runs/")
    again = mil("extract", tmp_path / "slides", "--store", url, *TILING)
    assert again.code == 0
    assert again.says("2 complete")
    store = open_store(url)
    (entry,) = store.entries()
    log = next(iter((store.path / "runs").iterdir())).read_text().splitlines()
    assert {json.loads(line).get("outcome") for line in log} >= {"embedded"}
    share_among(url, [f"00{i}" for i in range(2, 8)], entry)

    listed = mil("store", "ls", url)
    assert listed.says(url, "8 slides", "8 complete")
    verified = mil("store", "verify", url, "--slides", tmp_path / "slides")
    assert verified.code == 0
    assert verified.says(f"{url}: 16 units", "nothing is wrong")
    assert mil("sheet", url, "--out", tmp_path / "sheet.html").code == 0

    labels = write_labels(tmp_path / "labels.csv", [(f"00{i}", f"p{i}", "ab"[i % 2]) for i in range(8)])
    settings = ("--store", url, "--labels", labels, "--target", "subtype", "--out", tmp_path / "run")
    trained = mil("train", *settings, *FAST)
    assert trained.code == 0, trained.err
    assert f"store: {url}" in (tmp_path / "run" / "config.yaml").read_text()
    predicted = mil("predict", "--run", tmp_path / "run", "--store", url, "--out", tmp_path / "p.csv")
    assert predicted.code == 0, predicted.err
    assert len((tmp_path / "p.csv").read_text().splitlines()) >= 9

    copied = mil("store", "convert", url, tmp_path / "down.zarr", "--format", "zarr")
    assert copied.says("16 units copied")
    assert open_store(tmp_path / "down.zarr").slide_ids(entry) == store.slide_ids(entry)


@pytest.mark.parametrize("command", [("repair",), ("gc", "--yes")], ids=lambda command: command[0])
def test_what_needs_renames_is_refused(mil: Mil, bucket: str, command: tuple[str, ...]) -> None:
    url = f"{bucket}/mend.zarr"
    create_store(url, TileRecipe())
    name, *flags = command
    result = mil("store", name, url, *flags)
    assert result.code == 2
    assert result.says("error:", f"got {url} to mend", "mil store verify")


def test_an_absent_bucket_is_told_without_a_traceback(mil: Mil, bucket: str, tmp_path: Path) -> None:
    write_slide(tmp_path / "slides" / "a.tif", 260, 200)
    result = mil("extract", tmp_path / "slides", "--store", "s3://nobody/c.zarr", *TILING)
    assert result.code == 2
    assert result.says("error:", "no such bucket", "make it first")


def test_a_configuration_keeps_a_url() -> None:
    config = compose_config(values={"store": "s3://bucket/cohort.zarr"})
    assert str(config.store) == "s3://bucket/cohort.zarr"
    assert config.store == store_path(Path("s3://bucket/cohort.zarr"))
    assert compose_config(["store='s3://bucket/cohort.zarr'"]).store == config.store
    assert "store: s3://bucket/cohort.zarr" in config.to_yaml()


def test_several_devices_need_a_folder() -> None:
    check_claims(Path("cohort.zarr"))
    with pytest.raises(StoreError, match=r"several devices for s3://b/c .*mil store convert"):
        check_claims(store_path("s3://b/c"))
