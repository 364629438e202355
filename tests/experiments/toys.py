"""A small experiment for the tests of the engine: it adds numbers, waits, fails and kills itself on demand."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from vlprompt.core.errors import DataError
from vlprompt.core.files import write_text
from vlprompt.core.seeding import torch_rng
from vlprompt.experiments.cell import Cell, CellResult
from vlprompt.experiments.config import ExperimentConfig, Seeds, parse_overrides
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.layout import Layout
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import summarise


class ToyConfig(ExperimentConfig):
    """Methods that are numbers."""

    expected_task: ClassVar[str] = "toy"

    methods: dict[str, float] = Field(default_factory=lambda: {"one": 0.1, "two": 0.2})
    data: list[str] = Field(default_factory=lambda: ["a", "b"])
    seeds: Seeds = Field(default_factory=lambda: [1, 2])
    fail: list[str] = Field(default_factory=list, description="cells that raise")
    fail_while: str = Field("", description="they raise only as long as this file exists; empty: always")
    kill: list[str] = Field(default_factory=list, description="cells whose process ends itself")
    kill_once: str = Field(
        "", description="a folder that remembers which of them have done so; empty: each time"
    )
    seconds: float = Field(0.0, description="that a cell takes")
    held: dict[str, str] = Field(default_factory=dict, description="cells that wait as long as a file exists")
    diary: str = Field("", description="a file that gets a line for every attempt")
    interrupt: list[str] = Field(default_factory=list, description="cells during which Ctrl-C is pressed")
    lacks: list[str] = Field(default_factory=list, description="what is missing before it can run")
    note: str = ""
    files: dict[str, str] = Field(default_factory=dict)


class Toy(Experiment):
    """A cell measures its method's number plus noise of its seed; every second data set needs the first."""

    config: ToyConfig

    def cells(self) -> list[Cell]:
        cells = []
        for method in self.config.methods:
            for seed in self.config.seeds:
                first = Cell.at(method=method, data=self.config.data[0], seed=seed)
                cells.append(first)
                for name in self.config.data[1:]:
                    cells.append(Cell.at([first.name], method=method, data=name, seed=seed))
        return cells

    def run(self, cell: Cell, folder: Path) -> CellResult:
        write_text(folder / "attempt.txt", "started")
        if self.config.diary:
            with os.fdopen(os.open(self.config.diary, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as file:
                file.write(f"{cell.name} {os.getpid()}\n")
        print(f"{cell.name} speaks", flush=True)
        time.sleep(self.config.seconds)
        while cell.name in self.config.held and Path(self.config.held[cell.name]).exists():
            time.sleep(0.05)
        broken = not self.config.fail_while or Path(self.config.fail_while).exists()
        if cell.name in self.config.fail and broken:
            raise DataError(f"{cell.name} can't be read.")
        if cell.name in self.config.kill and self._kills(cell):
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.name in self.config.interrupt:
            raise KeyboardInterrupt
        noise = torch.rand(1000, generator=torch_rng(cell["seed"], "toy", cell["data"])).mean()
        result = CellResult(facts={f"{cell['data']}/size": 1000})
        result.add({"accuracy": self.config.methods[cell["method"]] + 0.1 * float(noise)})
        result.add({"loss": 1.0}, part="train")
        result.timings["training"] = float(os.getpid())
        return result

    def _kills(self, cell: Cell) -> bool:
        if not self.config.kill_once:
            return True
        memory = Path(self.config.kill_once, cell.name)
        known = memory.exists()
        memory.touch()
        return not known

    def layout(self) -> Layout:
        baselines = {label: ("one",) for label in self.config.methods if label != "one"}
        return Layout("accuracy", baselines=baselines)

    def sources(self) -> dict[str, str]:
        return self.config.files

    def missing(self) -> list[str]:
        return self.config.lacks

    def summary(self, results: Results) -> dict[str, float]:
        return summarise(results.select("accuracy").values()).flat("accuracy")


def build(raw: Mapping[str, Any], overrides: Sequence[str], source: str) -> Experiment:
    """Build the toy from a file's content."""
    return Toy(ToyConfig.parse(raw, parse_overrides(overrides, ToyConfig), source))
