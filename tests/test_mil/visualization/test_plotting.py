"""Figures: the numbers are where they belong, names stay text, the user's settings stay theirs."""

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mil.errors import MissingExtraError
from mil.visualization import curve_figures, plotting
from mil.visualization.plotting import ForestRow

ROWS = (
    ForestRow("Recall", 0.7, 0.6, 0.8, group="A"),
    ForestRow("F1", 0.5, None, None, reference=0.25, group="A"),
    ForestRow("AUROC", None, None, None, group="B"),
)


def texts(svg: str) -> list[str]:
    """Every piece of text of an SVG; fails where it is not well-formed."""
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]


def lines(figure: object) -> Iterator[tuple[list[float], list[float]]]:
    """x and y of every line of a figure's only axes."""
    for line in figure.axes[0].lines:
        yield list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))


def test_forest_draws_each_value_and_interval_in_its_line() -> None:
    figure = plotting.forest_plot(ROWS)
    drawn = list(lines(figure))
    assert ([0.6, 0.8], [1, 1]) in drawn, "the interval of the first row, below the heading of its group"
    assert ([0.7], [1]) in drawn
    assert ([0.5], [2]) in drawn
    assert [x for x, _ in drawn if len(x) == 1] == [[0.7], [0.5]], "an undefined value has no dot"
    hollow = [line.get_markerfacecolor() for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert hollow == [plotting.BLUE, "white"], "a value without an interval is hollow"
    found = texts(plotting.to_svg(figure))
    assert {"A", "B", "0.70 [0.60, 0.80]", "0.50", plotting.MISSING} <= set(found)


def test_confusion_shows_counts_and_row_percentages() -> None:
    counts = np.array([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
    figure = plotting.confusion_plot(counts, ["grade 1", "grade 2", "grade 3"])
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert cells[0, -0.1] == "8"
    assert cells[0, 0.2] == "80 %"
    assert cells[1, 1.2] == "75 %"
    assert cells[1, 2.2] == plotting.MISSING, "a class without slides has no shares"


def test_confusion_numbers_classes_whose_names_do_not_fit() -> None:
    names = [f"invasive carcinoma of no special type, grade {grade}" for grade in (1, 2)]
    found = texts(plotting.to_svg(plotting.confusion_plot(np.eye(2), names)))
    assert {"1", "2"} <= set(found)
    assert any(text.endswith("grade 2") for text in found), "the end of a name tells it from its neighbour"


def test_learning_curve_marks_the_best_epoch() -> None:
    epochs, train, validation = np.arange(1, 5), np.array([4.0, 3, 2, 1]), np.array([3.0, 2, np.nan, 4])
    drawn = list(lines(plotting.learning_curve(epochs, train, validation, 2, 5.0)))
    assert ([2.0], [2.0]) in drawn
    assert ([1, 2, 3, 4], [4, 3, 2, 1]) in drawn


def test_spread_leaves_gaps_and_draws_means() -> None:
    drawn = list(lines(plotting.spread_plot([[0.4, 0.6], [None, 0.9]], [0, 1])))
    assert any(np.allclose(y, [0.5, 0.5]) and np.allclose(x, [-0.36, 0.36]) for x, y in drawn)
    assert ([1.25], [0.9]) in drawn, "the second seed keeps its place when the first has no value"
    assert any(np.allclose(y, (0.4 + 0.6 + 0.9) / 3) and x == [0, 1] for x, y in drawn)


@pytest.mark.parametrize(
    ("losses", "limit"),
    [([np.nan], 1.0), ([], 1.0), ([0.0], 1.0), ([1.0, 2.0], 2.16), ([1.0] * 99 + [50.0], 1.08)],
    ids=["undefined", "none", "zero", "maximum", "outlier"],
)
def test_loss_limit(losses: list[float], limit: float) -> None:
    assert plotting.loss_limit(np.array(losses)) == pytest.approx(limit)


@given(st.text(max_size=90), st.integers(4, 40), st.integers(1, 3))
def test_wrapped_labels_fit(text: str, width: int, n_lines: int) -> None:
    wrapped = plotting.wrap_label(text, width, n_lines).split("\n")
    assert len(wrapped) <= n_lines
    assert max(map(len, wrapped)) <= width
    assert all(line.isprintable() for line in wrapped)


@pytest.mark.parametrize(
    "name", ["<script>x</script>", "a & b", "$x^2$", "$\\frac{", "\x00\x1b\u202e", "切片", '"', " "]
)
def test_class_names_stay_text(name: str) -> None:
    for figure in (
        plotting.confusion_plot(np.eye(2), [name, "other"]),
        plotting.forest_plot([ForestRow("F1", 0.5, 0.4, 0.6, group=name)]),
    ):
        svg = plotting.to_svg(figure, note=name)
        assert "<script" not in svg
        assert plotting.printable(name).strip() in "".join(texts(svg)), "shown as it is, not as a formula"


def test_same_figure_same_bytes_whatever_the_user_set() -> None:
    first = plotting.to_svg(plotting.forest_plot(ROWS))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path"}):
        mine = dict(matplotlib.rcParams)
        second = plotting.to_svg(plotting.forest_plot(ROWS))
        assert dict(matplotlib.rcParams) == mine
    assert first == second


def test_note_is_printed_below_the_figure() -> None:
    figure = plotting.forest_plot(ROWS)
    plain, noted = plotting.to_svg(figure), plotting.to_svg(figure, note="synthetic data")
    assert "synthetic data" in texts(noted)
    heights = [float(ElementTree.fromstring(svg).get("height").removesuffix("pt")) for svg in (plain, noted)]
    assert heights[1] - heights[0] == pytest.approx(plotting.NOTE_PX * plotting.POINTS_PER_PX, abs=0.01)


def test_png_is_the_same_picture_at_200_dots_per_inch_and_holds_no_date(tmp_path: Path) -> None:
    figure = plotting.forest_plot(ROWS)
    plain = plotting.to_png(figure)
    noted = plotting.to_png(figure, note="synthetic data")
    assert plotting.to_png(figure) == plain, "a note is not left behind"
    assert plotting.to_png(plotting.forest_plot(ROWS)) == plain
    sizes = [Image.open(io.BytesIO(content)).size for content in (plain, noted)]
    assert sizes[0] == pytest.approx([200 * side for side in figure.get_size_inches()], abs=1)
    assert sizes[1][1] - sizes[0][1] == pytest.approx(200 * plotting.NOTE_PX / 96, abs=1)
    assert set(Image.open(io.BytesIO(plain)).info) == {"dpi"}
    svg = plotting.write_figure(tmp_path, "forest", figure)
    assert (tmp_path / "forest.svg").read_bytes() == svg == plotting.to_svg(figure).encode()
    assert (tmp_path / "forest.png").read_bytes() == plain


def test_a_note_is_printed_once_in_every_format() -> None:
    figure = plotting.forest_plot(ROWS)
    plotting.to_png(figure, note="synthetic data")
    assert texts(plotting.to_svg(figure, note="synthetic data")).count("synthetic data") == 1
    assert "synthetic data" not in texts(plotting.to_svg(figure))


def test_several_curves_are_named_and_told_apart() -> None:
    steps = [{"coverage": 0.5, "accuracy": 1.0}, {"coverage": 1.0, "accuracy": 0.8}]
    alone = curve_figures.abstention_plot({"": steps})
    (curve, random) = alone.axes[0].lines
    assert curve.get_xdata().tolist() == [0.0, 0.5, 1.0]
    assert curve.get_ydata().tolist() == [1.0, 1.0, 0.8]
    assert list(random.get_ydata()) == [0.8, 0.8], "abstaining at random keeps the accuracy of all"
    names = [f"_{at} $x$" for at in range(9)]
    figure = curve_figures.abstention_plot(dict.fromkeys(names, steps))
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(styles) == len(figure.axes[0].lines) == 9
    assert set(names) <= {text.strip() for text in texts(plotting.to_svg(figure))}


def test_without_matplotlib_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'matplotlib → .* → .*pip install "tessera-mil\[report\]"'):
        plotting.forest_plot(ROWS)


def test_import_is_light_and_pyplot_is_never_loaded() -> None:
    code = (
        "import sys, mil.visualization.plotting as p\n"
        "assert 'matplotlib' not in sys.modules\n"
        "p.to_svg(p.forest_plot([p.ForestRow('F1', 0.5, 0.4, 0.6)]))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
