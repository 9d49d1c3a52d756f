"""Intervals cover what they claim, rest on patients, and are not given where nothing supports them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from mil.errors import EvaluationError
from mil.statistics import metrics
from mil.statistics.bootstrap import Resampling, patient_bootstrap, percentile_interval
from mil.statistics.checks import few_patients
from mil.statistics.classification import evaluate
from mil.statistics.paired_tests import paired_difference, paired_t_interval


def predictions(seed: int, n: int = 120, n_classes: int = 3, signal: float = 1.5):
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(n_classes), rng.integers(0, n_classes, n - n_classes)]
    logits = rng.normal(size=(n, n_classes)) + signal * np.eye(n_classes)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_values_are_those_of_scikit_learn():
    labels, probabilities = predictions(0)
    result = evaluate(labels, probabilities, [f"p{at}" for at in range(120)], ["a", "b", "c"], Resampling(50))
    predicted = probabilities.argmax(axis=1)
    assert result["macro_f1"]["value"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert result["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert result["accuracy"]["value"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert result["auroc"]["value"] == pytest.approx(sk.roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert result["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
    table = sk.multilabel_confusion_matrix(labels, predicted)
    for index, name in enumerate("abc"):
        entry = result["classes"][name]
        assert [entry[key]["value"] for key in ("tn", "fp", "fn", "tp")] == table[index].ravel().tolist()
        assert entry["support"] == (labels == index).sum()
        assert entry["recall"]["low"] < entry["recall"]["value"] < entry["recall"]["high"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "auroc"])
def test_single_slide_patients_agree_with_scipy(metric):
    labels, probabilities = predictions(1, n_classes=2)
    score = {
        "accuracy": lambda y, p: sk.accuracy_score(y, p.argmax(1)),
        "balanced_accuracy": lambda y, p: sk.balanced_accuracy_score(y, p.argmax(1)),
        "auroc": lambda y, p: sk.roc_auc_score(y, p[:, 1]),
    }[metric]
    reference = stats.bootstrap(
        (np.arange(120),),
        lambda drawn: score(labels[drawn], probabilities[drawn]),
        vectorized=False,
        method="percentile",
        n_resamples=1000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    ours = evaluate(labels, probabilities, [f"p{at}" for at in range(120)], ["a", "b"], Resampling(4000))[metric]
    # The standard error of a 2.5 % quantile from 1,000 draws is about 0.09 standard deviations of the metric.
    tolerance = 0.25 * (reference.high - reference.low) / 3.92
    assert ours["low"] == pytest.approx(reference.low, abs=tolerance)
    assert ours["high"] == pytest.approx(reference.high, abs=tolerance)


def test_intervals_cover_clustered_truth_and_slides_alone_do_not():
    rng = np.random.default_rng(5)
    covered = np.zeros((2, 200), dtype=bool)
    for run in range(200):
        skill = rng.beta(4, 1, size=40)  # one patient's slides are right or wrong together: mean 0.8
        right = (rng.random((40, 5)) < skill[:, None]).ravel()
        patients = np.repeat([f"p{at}" for at in range(40)], 5)
        for at, ids in enumerate((patients, [str(slide) for slide in range(200)])):
            drawn = patient_bootstrap(lambda w, r=right: {"x": (w @ r) / w.sum(axis=1)}, ids, 400, seed=run)
            low, high = percentile_interval(drawn["x"])
            covered[at, run] = low <= 0.8 <= high
    by_patient, by_slide = covered.mean(axis=1)
    assert 0.89 <= by_patient <= 0.99
    assert by_slide < by_patient - 0.04


def test_slides_of_a_patient_are_drawn_together():
    weights = patient_bootstrap(lambda w: {"w": w}, ["b", "a", "b", "c"], replicates=500)["w"]
    assert weights.shape == (500, 4)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, [0, 1, 3]].sum(axis=1), 3)
    assert weights[:, 1].mean() == pytest.approx(1, abs=0.15)
    assert weights[:, 1].var() == pytest.approx(2 / 3, abs=0.15)


def test_results_do_not_depend_on_the_order_of_slides_or_on_memory(monkeypatch):
    labels, probabilities = predictions(2)
    patients = [f"p{at // 3}" for at in range(120)]
    names = ["a", "b", "c"]
    result = evaluate(labels, probabilities, patients, names, Resampling(300))
    order = np.random.default_rng(0).permutation(120)
    shuffled = evaluate(labels[order], probabilities[order], [patients[at] for at in order], names, Resampling(300))
    assert result["macro_f1"] == pytest.approx(shuffled["macro_f1"])
    assert result["classes"]["b"]["auroc"] == pytest.approx(shuffled["classes"]["b"]["auroc"])
    assert evaluate(labels, probabilities, patients, names, Resampling(300, seed=1)) != result
    monkeypatch.setattr("mil.statistics.bootstrap.WEIGHTS_AT_ONCE", 120 * 7)
    assert evaluate(labels, probabilities, patients, names, Resampling(300)) == result


def test_wider_confidence_is_wider():
    labels, probabilities = predictions(3)
    patients = [f"p{at}" for at in range(120)]
    widths = []
    for confidence in (0.5, 0.9, 0.99):
        each = evaluate(labels, probabilities, patients, ["a", "b", "c"], Resampling(500, confidence=confidence))[
            "auroc"
        ]
        widths.append(each["high"] - each["low"])
    assert widths[0] < widths[1] < widths[2]


def test_replicates_without_a_class_are_dropped_and_counted():
    labels = np.array([0] * 8 + [1, 1])
    probabilities = np.eye(2)[labels] * 0.8 + 0.1
    result = evaluate(labels, probabilities, list("abcdefghij"), ["many", "rare"], Resampling(2000))
    missed = 0.8**10 + 0.2**10
    assert result["dropped"]["macro_f1"] == pytest.approx(2000 * missed, abs=90)
    assert result["dropped"]["accuracy"] == 0
    assert result["balanced_accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}  # never below for want of a class
    assert result["classes"]["rare"]["recall"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert result["classes"]["rare"]["tp"]["low"] == 0
    assert any("'rare' has 2 patients" in text for text in result["warnings"])
    assert any(f"{result['dropped']['macro_f1']} of 2000" in text for text in result["warnings"])
    assert not any("'many'" in text for text in result["warnings"])


def test_replicates_without_a_class_do_not_count_as_its_failure():
    labels = np.array([1, 1] + [0] * 8)
    probabilities = np.eye(2)[[1, 1, 1, *[0] * 7]]  # one slide of "many" is taken for "rare"
    rare = evaluate(labels, probabilities, list("abcdefghij"), ["many", "rare"])["classes"]["rare"]
    assert rare["f1"]["low"] > 0
    assert rare["precision"]["low"] > 0


def test_no_interval_on_a_single_patient():
    labels, probabilities = predictions(4, n=30)
    patients = ["only" if label == 2 else f"p{at}" for at, label in enumerate(labels)]
    result = evaluate(labels, probabilities, patients, ["a", "b", "c"], Resampling(200))
    for entry in (result["macro_f1"], result["auroc"], *(result["classes"]["c"][k] for k in ("tp", "f1", "auroc"))):
        assert entry["value"] is not None
        assert (entry["low"], entry["high"]) == (None, None)
    assert result["accuracy"]["low"] < result["accuracy"]["high"]
    assert result["classes"]["a"]["f1"]["low"] is not None
    assert any("'c' has 1 patient:" in text for text in result["warnings"])
    alone = evaluate(labels, probabilities, ["x"] * 30, ["a", "b", "c"], Resampling(200))
    assert alone["accuracy"]["low"] is None
    assert any("all slides are of 1 patient" in text for text in alone["warnings"])


def test_a_class_without_slides_is_undefined_not_zero():
    labels, probabilities = predictions(6, n=40, n_classes=2)
    probabilities = np.c_[probabilities, np.zeros(40)]
    result = evaluate(labels, probabilities, [f"p{at}" for at in range(40)], ["a", "b", "absent"], Resampling(100))
    absent = result["classes"]["absent"]
    assert absent["recall"] == absent["f1"] == absent["auroc"] == {"value": None, "low": None, "high": None}
    assert result["macro_f1"]["low"] is not None
    assert result["macro_f1"]["value"] == pytest.approx(
        sk.f1_score(labels, probabilities.argmax(axis=1), average="macro")
    )
    json.dumps(result, allow_nan=False)


def test_paired_difference_uses_the_same_resamples():
    labels, a = predictions(7, n=200, signal=2.0)
    b = predictions(7, n=200, signal=1.0)[1]  # the same noise with less signal
    patients = [f"p{at // 2}" for at in range(200)]
    pair = paired_difference(labels, a, b, patients, "balanced_accuracy", Resampling(1000))
    one, other = (evaluate(labels, p, patients, "abc", Resampling(1000))["balanced_accuracy"] for p in (a, b))
    assert pair.difference == pytest.approx(one["value"] - other["value"])
    assert 0 < pair.low < pair.difference < pair.high
    assert pair.high - pair.low < 0.8 * np.hypot(one["high"] - one["low"], other["high"] - other["low"])
    assert paired_difference(labels, a, a, patients) == (0.0, 0.0, 0.0)
    reverse = paired_difference(labels, b, a, patients, "balanced_accuracy", Resampling(1000))
    assert (reverse.low, reverse.high) == pytest.approx((-pair.high, -pair.low))


def test_paired_t_interval_agrees_with_scipy():
    differences = [0.12, 0.2, 0.08, 0.15, 0.11]
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.9)
    mean, low, high = paired_t_interval(differences, confidence=0.9)
    assert (mean, low, high) == pytest.approx((np.mean(differences), expected.low, expected.high))
    assert paired_t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    for bad in ([0.1], [], [0.1, float("nan")]):
        with pytest.raises(EvaluationError, match="two or more finite"):
            paired_t_interval(bad)


def test_bad_arguments_are_refused():
    labels, probabilities = predictions(8, n=10)
    patients, names = [f"p{at}" for at in range(10)], ["a", "b", "c"]
    spoiled = probabilities.copy()
    spoiled[4, 1] = np.nan
    refused = [
        ((labels, probabilities, patients, names[:2]), "2 classes"),
        ((labels, probabilities, patients[:9], names), "9 patient ids"),
        ((labels[:0], probabilities[:0], [], names), "n > 0"),
        ((labels + 1, probabilities, patients, names), "from 0 to 2"),
        ((labels - 1, probabilities, patients, names), "from 0 to 2"),
        ((np.array(["a"] * 10), probabilities, patients, names), "index the class names"),
        ((labels.astype(float), probabilities, patients, names), "index the class names"),
        ((labels, spoiled, patients, names), "in row 4"),
    ]
    for arguments, message in refused:
        with pytest.raises(EvaluationError, match=message):
            evaluate(*arguments, Resampling(10))
    for keywords, message in (({"confidence": 95}, "pass 0.95"), ({"replicates": 0}, "replicates=0")):
        with pytest.raises(EvaluationError, match=message):
            evaluate(labels, probabilities, patients, names, Resampling(**keywords))
    with pytest.raises(EvaluationError, match="did you mean 'macro_f1'"):
        paired_difference(labels, probabilities, probabilities, patients, "macrof1")


def test_the_defaults_give_the_numbers_they_always_gave():
    labels = np.arange(30) % 3
    scores = np.eye(3)[(labels + (np.arange(30) % 7 == 0)) % 3] * 0.6 + (np.arange(90).reshape(30, 3) * 37 % 11) / 100
    result = evaluate(labels, scores, [f"p{at // 2}" for at in range(30)], "abc", Resampling(500, seed=3))
    assert result["macro_f1"] == {"value": 0.8330827067669172, "low": 0.6999405822935234, "high": 0.9400106837606836}
    assert result["auroc"] == {"value": 0.8766666666666666, "low": 0.7632298385642136, "high": 0.9796193119912805}
    assert result["classes"]["b"]["precision"] == {"value": 0.8, "low": 0.5770833333333335, "high": 1.0}
    assert "interval" not in result


@pytest.mark.parametrize("metric", ["macro_f1", "auroc"])
def test_bca_is_scipys_where_patients_are_slides(metric):
    labels, probabilities = predictions(9, n=60)
    patients = [f"p{at:02d}" for at in range(60)]
    score = {
        "macro_f1": lambda drawn: sk.f1_score(labels[drawn], probabilities[drawn].argmax(1), average="macro"),
        "auroc": lambda drawn: sk.roc_auc_score(labels[drawn], probabilities[drawn], multi_class="ovr"),
    }[metric]
    ours = {
        "macro_f1": lambda w: metrics.macro_f1(metrics.confusion(labels, probabilities.argmax(1), 3, w)),
        "auroc": lambda w: metrics.auroc(labels, probabilities, w),
    }[metric]
    resampled = patient_bootstrap(lambda w: {"x": ours(w)}, patients, 800)["x"]
    reference = stats.bootstrap(
        (np.arange(60),),
        score,
        vectorized=False,
        method="BCa",
        n_resamples=0,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=resampled),
    ).confidence_interval
    found = evaluate(labels, probabilities, patients, "abc", Resampling(800, interval="bca"))[metric]
    assert (found["low"], found["high"]) == pytest.approx((reference.low, reference.high), rel=1e-9)


def test_options_change_intervals_and_nothing_else():
    labels, probabilities = predictions(10, n=60)
    patients = [f"p{at // 2}" for at in range(60)]
    plain = evaluate(labels, probabilities, patients, "abc", Resampling(500))
    for options in ({"interval": "bca"}, {"stratified": True}, {"interval": "bca", "stratified": True}):
        other = evaluate(labels, probabilities, patients, "abc", Resampling(500, **options))
        assert {"interval": other["interval"], "stratified": other["stratified"]} == (
            {"interval": "percentile", "stratified": False} | options
        )
        assert other["confusion"] == plain["confusion"]
        for key in ("macro_f1", "auroc"):
            assert other[key]["value"] == plain[key]["value"]
            assert other[key]["low"] != plain[key]["low"]
            assert other[key]["low"] < other[key]["value"] < other[key]["high"]
        json.dumps(other, allow_nan=False)
    with pytest.raises(EvaluationError, match="did you mean 'percentile'"):
        evaluate(labels, probabilities, patients, "abc", Resampling(interval="percentil"))


def test_by_strata_no_replicate_lacks_a_class():
    labels = np.array([0] * 8 + [1, 1, 2])
    probabilities = np.eye(3)[labels] * 0.8 + 0.1 / 3
    result = evaluate(
        labels,
        probabilities,
        list("abcdefghijj"),
        ["many", "rare", "rest"],
        Resampling(500, stratified=True),
    )
    assert set(result["dropped"].values()) == {0}
    assert result["classes"]["many"]["tp"] == {"value": 8, "low": 8.0, "high": 8.0}
    # j alone has slides of both "rare" and "rest", i alone of just "rare"
    alone = [text for text in result["warnings"] if "1 patient alone" in text]
    assert len(alone) == 2
    assert any("'rare', 'rest'" in text for text in alone)
    assert not any("bootstrap replicates lack" in text for text in result["warnings"])


def test_paired_differences_take_the_same_options():
    labels, a = predictions(11, n=80, signal=2.0)
    b = predictions(11, n=80, signal=1.0)[1]
    patients = [f"p{at // 2}" for at in range(80)]
    plain = paired_difference(labels, a, b, patients)
    for options in ({"interval": "bca"}, {"stratified": True}):
        other = paired_difference(labels, a, b, patients, resampling=Resampling(**options))
        assert other.difference == plain.difference
        assert other.low != plain.low
        assert other.low < other.difference < other.high


def test_too_few_patients_are_told():
    labels = np.array([0, 0, 0, 1, 1, 2])
    told = few_patients(["a", "b", "c", "d"], labels, ["p", "q", "r", "p", "q", "q"])
    assert [text.partition(":")[0] for text in told] == [
        "class 'a' has 3 patients",
        "class 'b' has 2 patients",
        "class 'c' has 1 patient",
        "class 'd' has no slides here",
    ]
