"""Model cards say what a reader must know, whatever the names in them."""

import re
from pathlib import Path
from typing import Any

import pytest

from mil.deployment.model_card import NOT_A_DEVICE, write_card
from mil.deployment.packing import pack
from mil.experiments.crossval import train
from tests.test_mil.small import make_cohort, make_store

COHORT = make_cohort()


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("card")
    run = train(make_store(COHORT), COHORT, head="mean", folds=2, seeds=1, epochs=1, device="cpu").save(folder / "run")
    return dict(pack(run.folder, folder / "model", abstain_below=0.6).record) | {"folder": folder}


def test_the_card_in_the_folder_is_the_one_of_the_record(record: dict[str, Any]) -> None:
    text = (Path(record["folder"]) / "model" / "README.md").read_text(encoding="utf-8")
    assert text == write_card(record)


def test_it_says_what_matters(record: dict[str, Any]) -> None:
    text = write_card(record)
    found = record["out_of_fold"]["macro_f1"]
    for part in (
        NOT_A_DEVICE,
        "24 slides of 12 patients: ",
        "`Luminal A`",
        "224 px at 0.5 µm per pixel",
        record["backbone"]["weights_sha256"],
        f"| macro-F1 | {found['value']:.3f} | {found['low']:.3f} to {found['high']:.3f} |",
        "looked at once",
        "temperature scaling",
        "below **0.600**",
        *record["warnings"],
    ):
        assert part in text, part
    assert "SYNTHETIC" not in text


def test_synthetic_data_is_in_its_head(record: dict[str, Any]) -> None:
    assert "SYNTHETIC DATA" in write_card(record | {"synthetic": True}).split("\n## ")[0]


def test_no_number_and_no_table_is_invented(record: dict[str, Any]) -> None:
    missing = {"value": None, "low": None, "high": None}
    changed = record | {
        "abstention": None,
        "intended_scale": {"mpp": None, "tile_px": 256},
        "out_of_fold": record["out_of_fold"] | {"auroc": missing},
    }
    text = write_card(changed)
    assert "| AUROC | – | – |" in text
    assert "the slide's own scale" in text
    assert "every slide gets an answer" in text
    assert "None" not in text.replace("None: every", "")


def test_names_stay_in_their_cells(record: dict[str, Any]) -> None:
    wild = "a|b\n<script>"
    counts = {wild: {"slides": 1, "patients": 1}}
    text = write_card(record | {"data": record["data"] | {"classes": counts}, "target": wild})
    assert "<script>" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_a_chosen_threshold_has_one_of_every_fold_for_its_figures(record: dict[str, Any]) -> None:
    assert "of its own" not in write_card(record)
    folder = Path(record["folder"])
    chosen = dict(pack(folder / "run", folder / "chosen", coverage=0.8).record)
    thresholds = chosen["abstention"]["out_of_fold"]["below_by_fold"]
    assert len(thresholds) == 2
    assert f"it tests: {min(thresholds):.3f} to {max(thresholds):.3f}." in write_card(chosen)
