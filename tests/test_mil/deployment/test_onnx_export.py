"""Heads as ONNX: they say what torch says, or are not written at all."""

import importlib.util
import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from aggregators import Aggregator, BagOutput, create_aggregator, list_aggregators
from mil.deployment.onnx_export import compare, export_onnx, to_onnx
from mil.deployment.packing import pack
from mil.errors import MissingExtraError, RunError
from mil.experiments.crossval import train
from mil.runs.ensemble import make_ensemble
from tests.test_mil.small import make_cohort, make_store

COHORT = make_cohort()
HEAD = {"name": "abmil", "embed_dim": 8, "attention_dim": 4, "branches": 2, "input_norm": "standardize"}
SIZES = (1, 2, 3, 5, 16, 17, 64, 65, 500)
FOLLOWED = {
    "afs, official": ("dtfd", {"official": True}),
    "maxs": ("dtfd", {"distillation": "MaxS", "selected": 2}),
    "maxmins": ("dtfd", {"distillation": "MaxMinS", "selected": 3, "official": True}),
    "few landmarks": ("transmil", {"embed_dim": 16, "heads": 2, "landmarks": 8}),
    "normalised by bag": ("transmil", {"embed_dim": 16, "heads": 4, "norm": "instance", "input_norm": "standardize"}),
}
"""Heads that say what they do for one bag in another way than for many: both ways are compared."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(make_store(COHORT), COHORT, head=HEAD, folds=2, seeds=1, epochs=1, device="cpu").save(folder)
    return folder


@pytest.fixture
def packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


def test_absent_packages_are_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime.*tessera-mil\[onnx\]"):
        export_onnx(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("packages")
def test_every_replica_says_what_torch_says(run: Path, tmp_path: Path) -> None:
    import onnxruntime

    model = pack(run, tmp_path / "model")
    store = make_store(COHORT)
    found = export_onnx(model.folder, tmp_path / "out", store)
    written = json.loads((tmp_path / "out" / "onnx.json").read_text())
    assert written["class_names"] == list(COHORT.class_names)
    assert [each["temperature"] for each in written["files"]] == list(model.temperatures.values())
    for each in found:
        assert each.largest_difference <= 1e-4
        assert each.real_bags == 8
        assert each.outputs == ("logits", "attention")
        content = (tmp_path / "out" / each.file).read_bytes()
        assert sha256(content).hexdigest() == each.sha256
        session = onnxruntime.InferenceSession(content)
        bag = store.slides["slide 05"].astype(np.float32)
        logits, attention = session.run(None, {"instances": bag})
        assert logits.shape == (1, 2)
        np.testing.assert_allclose(attention.sum(axis=0), [1, 1], rtol=1e-5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "fold0-seed0.onnx",
        "fold1-seed0.onnx",
        "onnx.json",
    ]


@pytest.mark.usefixtures("packages")
def test_a_file_of_other_weights_is_refused() -> None:
    torch.manual_seed(0)
    one, other = (create_aggregator("mean", in_dim=6, n_classes=2).eval() for _ in range(2))
    content, outputs = to_onnx(one, "mean")
    assert outputs == ("logits",)
    bags = [np.ones((3, 6), np.float32)]
    assert compare(content, one, "mean", bags) <= 1e-4
    with pytest.raises(RunError, match="differs from torch"):
        compare(content, other, "mean", bags)


class _Spectral(Aggregator):
    """Does what ONNX has no word for."""

    def aggregate(self, instances, segments, coords, generator):
        values = torch.linalg.eigvalsh(instances.mT @ instances)[None, : self.n_classes]
        return BagOutput(values, values, None, None, {})


@pytest.mark.usefixtures("packages")
def test_a_head_that_cannot_be_exported_is_refused_with_the_reason() -> None:
    with pytest.raises(RunError, match=r"'spectral' to export.*eigvalsh|'spectral' to export.*linalg"):
        to_onnx(_Spectral(6, 2), "spectral")


@pytest.mark.slow
@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", list_aggregators())
def test_every_head_is_exported(name: str) -> None:
    torch.manual_seed(0)
    head = create_aggregator(name, in_dim=16, n_classes=3).eval()
    assert compare(to_onnx(head, name)[0], head, name, random_bags()) <= 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("kind", FOLLOWED)
def test_heads_whose_work_depends_on_the_size_of_a_bag_are_followed(kind: str) -> None:
    torch.manual_seed(0)
    name, keywords = FOLLOWED[kind]
    head = create_aggregator(name, in_dim=16, n_classes=3, **keywords).eval()
    assert compare(to_onnx(head, name)[0], head, name, random_bags()) <= 1e-4


@pytest.mark.usefixtures("packages")
def test_a_head_that_pads_as_a_published_code_is_refused() -> None:
    head = create_aggregator("transmil", in_dim=6, n_classes=2, embed_dim=8, heads=2, official=True).eval()
    with pytest.raises(RunError, match=r"'transmil' to export.*official '0\.0\.14'"):
        to_onnx(head, "transmil")


def random_bags() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    bags = [rng.standard_normal((n, 16), dtype=np.float32) for n in SIZES]
    # tiles of bare glass are all the same: equal ranks, of which the first are taken
    return [*bags, np.repeat(bags[-1][:7], 9, axis=0)]


@pytest.mark.usefixtures("packages")
def test_heads_that_read_positions_are_refused(tmp_path: Path) -> None:
    head = {"name": "transformer", "embed_dim": 8, "heads": 2, "depth": 1, "positions": "sincos"}
    train(make_store(COHORT), COHORT, head=head, folds=2, seeds=1, epochs=1, device="cpu").save(tmp_path / "run")
    with pytest.raises(RunError, match="reads where they lie"):
        export_onnx(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("packages")
def test_an_ensemble_names_the_members_to_export(run: Path, tmp_path: Path) -> None:
    other = train(make_store(COHORT), COHORT, head="mean", folds=2, seeds=1, epochs=1, device="cpu")
    folder = make_ensemble([run, other.save(tmp_path / "mean").folder]).save(tmp_path / "both")
    model = pack(folder, tmp_path / "model").folder
    for each, member in ((folder, "mean"), (model, "members/1-abmil")):
        with pytest.raises(RunError, match=f"one by one: .*{member}"):
            export_onnx(each, tmp_path / "out")
    assert not (tmp_path / "out").exists()
