"""Runs side by side, over the shipped configurations of all tasks: no row is lost, and none is made up."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import Command
from vlprompt.core.files import write_text
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.results import Line, Results
from vlprompt.experiments.side_by_side import tables_of_runs
from vlprompt.experiments.tables import Table
from vlprompt.experiments.tasks import read_experiment

CONFIGS = Path(__file__).parents[2] / "configs"
SEVERAL = {
    "classification": [
        "compare_heads_tiny.yaml",
        "compare_plugins_tiny.yaml",
        "compare_incremental_tiny.yaml",
    ],
    "adaptation": ["tta_mixed_tiny.yaml", "rtpt_tiny.yaml"],
    "segmentation": ["tunevlseg_tiny.yaml"],
    "security": ["scan_signs.yaml"],
    "generation": ["cones_generate_tiny.yaml"],
}
FILES = [(task, name) for task, names in SEVERAL.items() for name in names]


def write_run(folder: Path, experiment: Experiment) -> Path:
    """Write what a finished run of an experiment leaves, with made-up values that differ from cell to cell."""
    lines = []
    for cell in experiment.cells():
        for measurement in experiment.sketch(cell).measurements:
            where = {**cell.where, **measurement.where}
            if experiment.config.task == "adaptation":
                where["start"] = "zero_shot"  # known once the classifier is built
            lines.append(Line(where, measurement.metric, value_at(where, measurement.metric)))

    write_text(folder / "config.yaml", yaml.safe_dump(experiment.config.model_dump(mode="json")))
    write_text(folder / "results.jsonl", Results(lines).text())
    return folder


def value_at(where: dict[str, Any], metric: str) -> float:
    """Return a value in (0, 1) that depends on the place alone; without a method's say where none should have any."""
    if metric.startswith(("zero_shot", "before_", "all_foreground")):
        where = {key: value for key, value in where.items() if key not in ("method", "seed")}
    place = json.dumps([where, metric], sort_keys=True, default=str)
    return (zlib.crc32(place.encode()) % 1000 + 1) / 1002


def with_methods(experiment: Experiment, labels: list[str]) -> Experiment:
    """Return the experiment with some of its methods."""
    methods = experiment.config.model_dump()["methods"]
    chosen = {label: methods[label] for label in labels}
    return type(experiment)(experiment.config.model_copy(update={"methods": chosen}))


def content(tables: list[Table]) -> dict[str, dict[str, dict[str, object]]]:
    """Return title to row to values of all tables."""
    return {table.title: {row.method: dict(row.values) for row in table.rows} for table in tables}


@pytest.mark.parametrize(("task", "name"), FILES, ids=[name for _, name in FILES])
def test_two_halves_side_by_side_are_the_whole(task: str, name: str, tmp_path: Path) -> None:
    whole = read_experiment(CONFIGS / task / name)
    labels = list(whole.config.model_dump()["methods"])
    protocol = whole.config.model_dump()["protocol"]
    baseline = protocol.get("baseline") if protocol.get("baseline") in labels else labels[0]
    others = [label for label in labels if label != baseline]
    half = (len(others) + 1) // 2
    # What gains are over stands in both.
    parts = [with_methods(whole, [baseline, *others[:half]]), with_methods(whole, [baseline, *others[half:]])]

    folders = [write_run(tmp_path / str(number), part) for number, part in enumerate(parts)]
    together = content(tables_of_runs(folders))
    expected = content(tables_of_runs([write_run(tmp_path / "whole", whole)]))
    assert together == expected
    assert sum(len(rows) for rows in expected.values()) >= len(labels)


@pytest.mark.parametrize(
    ("name", "learner"),
    [
        ("coop_tiny.yaml", "kgcoop"),
        ("multi_lane_tiny.yaml", "l2p"),
        ("protocol_cross_dataset_tiny.yaml", "kgcoop"),
        ("protocol_elevater_tiny.yaml", "linear_probe"),
    ],
)
def test_runs_of_one_learner_each_share_the_table_of_their_protocol(
    name: str, learner: str, tmp_path: Path
) -> None:
    first = read_experiment(CONFIGS / "classification" / name)
    section = {"learner": {"name": learner}, "name": learner}
    second = type(first)(first.config.model_copy(update=section))
    alone = [write_run(tmp_path / part.config.name, part) for part in (first, second)]

    rows = content(tables_of_runs(alone))[""]
    expected = content(tables_of_runs(alone[:1]))[""] | content(tables_of_runs(alone[1:]))[""]
    assert rows == expected
    assert len(rows) >= 3  # zero-shot once, and both learners


def test_runs_of_other_data_share_rows_without_an_average(tmp_path: Path) -> None:
    """Averages over different data sets do not compare."""
    one = read_experiment(
        CONFIGS / "classification" / "compare_heads_tiny.yaml", ["data.name=[digits, scenes/shape]"]
    )
    other = read_experiment(
        CONFIGS / "classification" / "compare_heads_tiny.yaml", ["data.name=[scenes/count]"]
    )
    first, *_ = tables_of_runs([write_run(tmp_path / "one", one), write_run(tmp_path / "other", other)])
    assert first.columns == ["digits", "scenes/shape", "scenes/count"]
    assert all(set(first.columns) <= row.values.keys() for row in first.rows)


def test_adaptation_under_other_settings_is_refused(command: Command, tmp_path: Path) -> None:
    """Through the command, with records as a run writes them."""
    folders: list[Path] = []
    for views in (2, 3):
        method = {"zero": {"views": views}}
        data = {"name": "scenes/shape@sketch", "test_images": 4}
        config = {"task": "adaptation", "name": f"views{views}", "data": data, "methods": method}
        file = tmp_path / f"views{views}.yaml"
        write_text(file, yaml.safe_dump({**config, "protocol": {"seeds": [1]}, "output": str(tmp_path)}))
        answer = command("run", file)
        assert answer.status == 0, answer.err
        folders += (tmp_path / f"views{views}").glob("[!.]*")

    answer = command("report", *folders)
    assert answer.status == 2
    assert "different settings" in answer.err
    assert "'count': 2" in answer.err
    assert "'count': 3" in answer.err


def test_lines_of_no_method_that_differ_keep_runs_apart(tmp_path: Path) -> None:
    """A victim of the poisoned set belongs to no scanner."""
    scan = read_experiment(CONFIGS / "security" / "compare_scanners_tiny.yaml")
    folders = [write_run(tmp_path / name, scan) for name in ("one", "other")]
    lines = Results.read(folders[1] / "results.jsonl").lines
    changed = [line if line.where.get("method") else replace(line, value=line.value / 2) for line in lines]
    assert changed != lines
    write_text(folders[1] / "results.jsonl", Results(changed).text())
    assert len(tables_of_runs(folders)) == 2 * len(tables_of_runs(folders[:1]))
