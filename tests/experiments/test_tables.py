"""Tables: percent, marks, escapes."""

from __future__ import annotations

import csv
import io

from vlprompt.experiments.statistics import summarise
from vlprompt.experiments.tables import Row, percent, to_csv, to_latex, to_markdown

ROWS = [
    Row("zero-shot", {"digits": 0.5, "scenes/shape": 0.25}),
    Row("CoOp | end", {"digits": summarise([0.7, 0.8, 0.9]), "scenes/shape": 0.2}),
    Row("CoOp_paper", {"digits": 0.99}, source="published", citation="Zhou & others 2022"),
]


def test_markdown() -> None:
    assert to_markdown(ROWS).splitlines() == [
        "| method (%) | digits | scenes/shape |",
        "|---|---:|---:|",
        "| zero-shot | 50.0 | **25.0** |",
        "| CoOp \\| end | **80.0 ± 24.8** | 20.0 |",
        "| CoOp_paper † | 99.0 |  |",
        "",
        "† published (Zhou & others 2022); all other rows are measured with this code.",
    ]


def test_csv_keeps_precision_and_source() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(ROWS))))
    assert [r["source"] for r in rows] == ["measured", "measured", "published"]
    assert float(rows[1]["digits"]) == 80.0
    assert abs(float(rows[1]["digits_ci95"]) - 24.841377) < 1e-6
    assert rows[2]["scenes/shape"] == ""


def test_latex_escapes_and_marks() -> None:
    text = to_latex(ROWS)
    assert r"CoOp\_paper$^\dagger$ & 99.0 &  \\" in text
    assert r"\textbf{80.0 $\pm$ 24.8}" in text
    assert r"(Zhou \& others 2022)" in text
    assert text.count(r"\begin{tabular}{lrr}") == text.count(r"\end{tabular}") == 1


def test_columns_can_be_chosen_and_nothing_marked() -> None:
    text = to_markdown(ROWS[:2], columns=["scenes/shape"], best=False)
    assert "digits" not in text
    assert "**" not in text
    assert "†" not in text


def test_nothing_has_no_sign() -> None:
    assert percent(-0.0004) == "0.0"
    assert percent(summarise([-0.0002, -0.0006])).startswith("0.0 ±")
    assert percent(-0.0006) == "-0.1"


def test_the_least_forgetting_is_the_best() -> None:
    rows = [Row("a", {"x forgetting": 0.2, "x last": 0.5}), Row("b", {"x forgetting": 0.1, "x last": 0.4})]
    assert to_markdown(rows).splitlines()[2:] == ["| a | 20.0 | **50.0** |", "| b | **10.0** | 40.0 |"]
