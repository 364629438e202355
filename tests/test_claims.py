"""Every figure of the README has its line in docs/results.md, and every line its command, seeds and expectation."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from vlprompt.experiments.config import list_configs
from vlprompt.experiments.tasks import read_experiment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
FIGURE = re.compile(r"\d+\.\d+(?: ± \d+\.\d+)?")
IN_TABLE_ONLY = "table"  # in place of a key: a run writes the figure into its table, not into metrics.json


@dataclass(frozen=True)
class Line:
    """A line of the first table of docs/results.md."""

    question: str
    row: str
    figure: str
    key: str
    command: str
    seeds: str


def table(text: str, first: str) -> list[list[str]]:
    """Return the cells of the table whose first column is called ``first``."""
    rows = text[text.index(f"| {first} |") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in rows]


def lines() -> list[Line]:
    found = []
    for question, row, figure, key, command, seeds in table(PAGE, "Question"):
        found.append(Line(question, row, figure.strip("*"), key.strip("`"), command.strip("`"), seeds))
    return found


@pytest.mark.parametrize("row", table(README, "Question"), ids=lambda row: str(row[0]))
def test_every_figure_of_the_readme_has_its_line(row: list[str]) -> None:
    question, best, beside, _ = row
    figures = {line.figure for line in lines() if line.question == question}
    said = FIGURE.findall(f"{best} {beside}")
    assert said
    assert [figure for figure in said if figure not in figures] == []


def test_the_readme_gives_figures_in_percent_nowhere_else() -> None:
    before, _, rest = README.partition("| Question |")
    elsewhere = before + rest.partition("\n\n")[2]
    assert re.findall(r"\d\.\d ?%|\d ± \d", elsewhere) == []


@pytest.mark.parametrize("line", lines(), ids=lambda line: f"{line.question}, {line.row}")
def test_a_line_is_what_its_configuration_runs_and_expects(line: Line) -> None:
    program, verb, cfg, *overrides = shlex.split(line.command)
    assert (program, verb) == ("vlprompt", "run")
    assert cfg in list_configs()

    overrides = [override for override in overrides if not override.endswith("=FOLDER")]
    config = read_experiment(cfg, overrides).config
    assert line.seeds == ", ".join(map(str, config.model_dump()["protocol"]["seeds"]))
    if line.key == IN_TABLE_ONLY:
        return

    expected = [e.figures[line.key].value for e in config.expect if line.key in e.figures]
    assert line.figure.split(" ± ")[0] in {f"{100 * value:.1f}" for value in expected}


def test_what_the_readme_promises_has_a_test_that_exists() -> None:
    words = " ".join(README.split())
    promises = table(PAGE, "The README says")
    assert promises
    for sentence, tests in promises:
        assert sentence in words, sentence
        for path in re.findall(r"`([^`]+)`", tests):
            assert (ROOT / path).exists(), path
