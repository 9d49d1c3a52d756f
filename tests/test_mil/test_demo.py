"""The demo on a cohort small enough for a test."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from extract.pipeline.extraction import run_extraction
from extract.store import open_store
from extract.synthetic.cohort import make_cohort
from extract.synthetic.lesions import lesion_tiles, read_lesions
from mil import demo
from mil.errors import RunError

FAST = ["folds=3", "seeds=2", "epochs=2", "device=cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, demo.DemoResult]:
    """A folder with cohort, store and runs, and what the demo found there."""
    folder = tmp_path_factory.mktemp("demo")
    small = partial(make_cohort, patients_per_class=3, slides_per_patient=1, size_l0=(896, 896))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("extract.synthetic.cohort.make_cohort", small)
        slides = demo.draw_cohort(folder / "cohort", seed=3)
    run_extraction(slides, folder / "cohort.zarr", table=folder / "cohort" / "slides.csv", mpp=0.5)
    labels = folder / "cohort" / "labels.csv"
    runs = demo.train_heads(folder / "cohort.zarr", labels, folder, FAST, lambda head: lambda progress: None)
    return folder, demo.judge(folder / "cohort.zarr", folder / "cohort", runs)


def test_both_heads_share_recipe_and_budget(finished: tuple[Path, demo.DemoResult]) -> None:
    mean, abmil = (run.config.to_dict() for run in finished[1].runs)
    assert (mean.pop("head")["name"], abmil.pop("head")["name"]) == demo.HEADS
    assert mean == abmil


def test_everything_made_of_drawn_slides_says_so(finished: tuple[Path, demo.DemoResult]) -> None:
    folder, result = finished
    store = open_store(folder / "cohort.zarr")
    assert all(store[slide_id].record["synthetic"] for slide_id in store)
    assert all(run.metrics["synthetic"] for run in result.runs)


def test_one_slide_has_a_broken_tile_that_is_listed(finished: tuple[Path, demo.DemoResult]) -> None:
    store = open_store(finished[0] / "cohort.zarr")
    (entry,) = store.entries()
    assert sum(not store[slide_id].valid(entry).all() for slide_id in store) == 1


def test_a_finished_cohort_is_not_drawn_again(
    finished: tuple[Path, demo.DemoResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extract.synthetic.cohort.make_cohort", lambda *_, **__: pytest.fail("drawn again"))
    assert demo.draw_cohort(finished[0] / "cohort", seed=3) == finished[0] / "cohort" / "slides"
    with pytest.raises(RunError, match=r"seed 4 .* seed 3"):
        demo.draw_cohort(finished[0] / "cohort", seed=4)


def test_attention_comes_from_replicas_that_never_saw_the_slide(finished: tuple[Path, demo.DemoResult]) -> None:
    folder, result = finished
    run, store = result.runs[-1], open_store(folder / "cohort.zarr")
    attention = demo.out_of_fold_attention(run, store)
    assert set(attention) == set(run.cohort.slide_ids)
    slide_id = run.cohort.slide_ids[0]
    assert attention[slide_id].shape == (len(store[slide_id].coords(run.entry)),)
    assert attention[slide_id].sum() == pytest.approx(1, abs=1e-5)

    from mil.deployment.inference import predict

    fold = run.splits.test_fold[0]
    names = [f"fold{fold}-seed{seed}" for seed in run.config.seeds]
    expected = predict(run.folder, store, run.entry, [slide_id], replicas=names, attention=True).attention[slide_id]
    assert np.allclose(attention[slide_id], expected.mean(axis=1))


def test_lesion_auroc_is_one_for_the_truth_and_zero_for_its_opposite(
    finished: tuple[Path, demo.DemoResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = finished
    run, store = result.runs[-1], open_store(folder / "cohort.zarr")
    lesions = read_lesions(folder / "cohort" / "lesions.json")
    truth = {
        slide_id: lesion_tiles(lesions, slide_id, store[slide_id].coords(run.entry), store[slide_id].record["tile_l0"])
        for slide_id in store
    }
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        made_up = {slide_id: sign * covered for slide_id, covered in truth.items()}
        monkeypatch.setattr(demo, "out_of_fold_attention", lambda *_, made_up=made_up: made_up)
        areas = demo.lesion_aurocs(store, folder / "cohort", run)
        assert areas
        assert set(areas) == {expected}
