"""Writes the tables of classic_mil and mnist_bags into docs/benchmarks.md, beside the papers' own figures.

python -m benchmarks.published_tables
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from benchmarks.classic_mil import BEST_EPOCH, CONTENDERS, HONEST, HONEST_AUROC, HONEST_HALF, LAST_EPOCH, SETS
from benchmarks.mnist_bags import HEADS

# Ilse, Tomczak, Welling, ICML 2018, Table 1, mean ± as printed there
ILSE_2018 = {
    ("musk1", "abmil"): "0.892 ± 0.040",
    ("musk2", "abmil"): "0.858 ± 0.048",
    ("fox", "abmil"): "0.615 ± 0.043",
    ("elephant", "abmil"): "0.868 ± 0.022",
    ("musk1", "gated abmil"): "0.900 ± 0.050",
    ("musk2", "gated abmil"): "0.863 ± 0.042",
    ("fox", "gated abmil"): "0.603 ± 0.029",
}
NOT_RUN = "not yet run"

Figures = Mapping[tuple[str, str], Mapping[str, str]]


def read_figures(path: Path) -> Figures:
    """Rows of a result file by subject and metric; none if there is no such file."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {(row["subject"], row["metric"]): row for row in csv.DictReader(file)}


def classic_table(figures: Figures) -> str:
    """One row per set and head."""
    lines = _head("set", "head", "honest", "honest, cut at ½", "honest AUROC", "last epoch", "best test epoch", "paper")
    for name, title in product(SETS, CONTENDERS):
        subject = f"{name}, {title}"
        cells = [
            _cell(figures, subject, f"{HONEST}; interval over bags"),
            _cell(figures, subject, HONEST_HALF, ends=False),
            _cell(figures, subject, HONEST_AUROC, ends=False),
            _cell(figures, subject, LAST_EPOCH, ends=False),
            _cell(figures, subject, BEST_EPOCH, ends=False),
        ]
        lines.append(_line(name, title, *cells, ILSE_2018.get((name, title), "")))
    return "\n".join(lines)


def mnist_table(figures: Figures) -> str:
    """One row per head."""
    subjects = [f"{count} bags of {size}" for size, count in product((10, 50), (50, 200))]
    lines = _head("head", *subjects)
    lines += [_line(title, *(_cell(figures, each, f"AUROC, {title}") for each in subjects)) for title in HEADS]
    return "\n".join(lines)


def renew(page: str, tables: Mapping[str, str]) -> str:
    """Put each table between its two marks, ``<!-- name -->`` and ``<!-- /name -->``."""
    for name, table in tables.items():
        before, rest = page.split(f"<!-- {name} -->\n", 1)
        after = rest.split(f"<!-- /{name} -->", 1)[1]
        page = f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->{after}"
    return page


def renewed(page: Path, results: Path) -> str:
    """The text of the page with tables made from the result files."""
    tables = {
        "classic_mil": classic_table(read_figures(results / "classic_mil.csv")),
        "mnist_bags": mnist_table(read_figures(results / "mnist_bags.csv")),
    }
    return renew(page.read_text(encoding="utf-8"), tables)


def _head(*titles: str) -> list[str]:
    return [_line(*titles), "|" + "---|" * len(titles)]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(figures: Figures, subject: str, metric: str, ends: bool = True) -> str:
    row = figures.get((subject, metric))
    if row is None:
        return NOT_RUN
    middle, low, high = (f"{float(row[name]):.3f}" for name in ("median", "low", "high"))
    return f"{middle} [{low}, {high}]" if ends else middle


def main(arguments: Sequence[str] | None = None) -> None:
    """Renew the tables of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    options.page.write_text(renewed(options.page, options.results), encoding="utf-8")


if __name__ == "__main__":
    main()
