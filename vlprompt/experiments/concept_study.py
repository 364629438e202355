"""Experiments that search concepts: what detection and segmentation share.

Concepts are searched with every number of training images and every seed, and scored beside baselines that learn
nothing, such as the class names' own text features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from vlprompt.concepts.search import SearchResult
from vlprompt.core.files import read_jsonl, write_json, write_jsonl, write_text
from vlprompt.core.options import describe_problems
from vlprompt.experiments.cell import Cell, CellResult
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.config import STRICT, ExperimentConfig, Seeds
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.layout import Layout, tabulate
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Line, Results
from vlprompt.experiments.statistics import summarise
from vlprompt.experiments.tables import Table
from vlprompt.training.options import TrainOptions, TrainSection

__all__ = [
    "CLASS_NAMES",
    "CONCEPTS",
    "ConceptConfig",
    "ConceptData",
    "ConceptExperiment",
    "ConceptProtocol",
    "Scores",
    "StageOptions",
]

CONCEPTS = "concepts"
"""The method that searches."""

CLASS_NAMES = "class names"
"""The baseline: text features of the class names, nothing is learned."""

SECOND = "second"
"""The stage in which parameters of the host learn too."""

Scores = Mapping[str, Mapping[str, float]]
"""Label of a test set to metric to value."""


class ConceptData(BaseModel):
    """The ``data:`` section: what to search on and what to test on."""

    model_config = STRICT

    name: str
    also_test: dict[str, str] = Field(
        default_factory=dict,
        description="label to a data set with the same classes, beside the scored split of name",
    )
    split: Literal["val", "test"] = Field(
        "test", description="what is scored; val while anything is being chosen"
    )
    validate_on: Literal["val", "none"] = Field("none", description="split for curves and select=best")


class ConceptProtocol(BaseModel):
    """The ``protocol:`` section: which searches make up the result."""

    model_config = STRICT

    name: Literal["concepts"] = "concepts"
    images: list[Annotated[int, Field(ge=1)] | None] = Field(
        default=[None], min_length=1, description="training images drawn in all; null: all there are"
    )
    seeds: Seeds = Field(default_factory=lambda: [1])


class StageOptions(BaseModel):
    """The ``second_stage:`` section: parameters of the host that learn after the search, together with concepts."""

    model_config = STRICT

    unfreeze: list[str] = Field(min_length=1, description="shell patterns of parameter names")
    train: dict[str, Any] = Field(default_factory=dict, description="what differs from the train section")


class ConceptConfig(ExperimentConfig):
    """Base of configurations that search concepts."""

    data: ConceptData
    protocol: ConceptProtocol = Field(default_factory=ConceptProtocol)
    train: TrainSection = Field(default_factory=TrainSection)
    second_stage: StageOptions | None = None

    def first_options(self, seed: int) -> TrainOptions:
        """Return the training options of the search."""
        return TrainOptions(**self.train.model_dump(), seed=seed)

    def second_options(self, seed: int) -> TrainOptions:
        """Return the training options of the second stage."""
        return TrainOptions(**self._second_section().model_dump(), seed=seed)

    def problems(self) -> list[str]:
        """See :meth:`ExperimentConfig.problems`: labels of test sets, the second stage, validation."""
        problems = super().problems()
        if self.data.split in self.data.also_test:
            problems.append(
                f"data.also_test: {self.data.split!r} is the label of that split of data.name; choose another."
            )
        if self.train.init:
            problems.append("train.init: a search of concepts starts where concepts.init says; leave it out.")

        section = self.train
        try:
            section = self._second_section()
        except ValidationError as error:
            problems += describe_problems(error, TrainSection, "second_stage.train")
        if "best" in (self.train.select, section.select) and self.data.validate_on == "none":
            problems.append(
                "data.validate_on: train.select=best chooses on validation data; write validate_on: val."
            )
        return problems

    def _second_section(self) -> TrainSection:
        changes = {} if self.second_stage is None else self.second_stage.train
        return TrainSection.model_validate({**self.train.model_dump(), **changes})


class ConceptExperiment(Experiment):
    """A cell for each baseline, and one for each number of training images and seed.

    A cell of the method ``"concepts"`` leaves ``concepts.safetensors`` and ``history.jsonl`` in its folder. Its
    measurements have the further coordinates ``part`` (the test set) and, after the second stage, ``stage``.

    Attributes:
        baselines: Methods that are scored without training.
        metrics: What is measured on each test set; the first stands first in tables.
        headline_metric: The one that is said first.
    """

    config: ConceptConfig
    on_validation: ClassVar[tuple[str, ...]] = ("data.split=val",)
    baselines: ClassVar[tuple[str, ...]] = (CLASS_NAMES,)
    metrics: ClassVar[tuple[str, ...]]
    headline_metric: ClassVar[str]

    @property
    @abstractmethod
    def host_name(self) -> str:
        """The frozen model's name, for titles."""

    @abstractmethod
    def host_facts(self) -> dict[str, Any]:
        """Return what identifies the frozen model; it is built for it."""

    @abstractmethod
    def test_names(self) -> dict[str, str]:
        """Return label to name of every set that is scored, in order; nothing is read for it.

        The scored split of the data set that concepts are searched on has that split's name.
        """

    @abstractmethod
    def score_baseline(self, method: str) -> Scores:
        """Return the scores of one of :attr:`baselines`; empty if this host can't have it."""

    @abstractmethod
    def search(
        self,
        images: int | None,
        options: TrainOptions,
        folder: Path,
        unfreeze: Sequence[str] = (),
        start: Tensor | None = None,
    ) -> SearchResult[Any]:
        """Search concepts on the training images that ``options.seed`` draws.

        Args:
            images: How many are drawn; None for all.
            options: Of the trainer.
            folder: Where the checkpoint lies; a search that was interrupted goes on from it.
            unfreeze: Patterns of the host's parameters that learn too. The caller puts their values back.
            start: (C, L, d) concepts to start from; None for what the configuration says.
        """

    @abstractmethod
    def score(self, module: Any) -> Scores:
        """Return the scores, on every test set, of what :meth:`search` left in its module."""

    @abstractmethod
    def classnames(self) -> tuple[str, ...]:
        """Return the C names of the classes that concepts are searched for."""

    def cells(self) -> list[Cell]:
        """See :meth:`Experiment.cells`."""
        protocol = self.config.protocol
        cells = [Cell.at(method=method) for method in self.baselines]
        for images in protocol.images:
            for seed in protocol.seeds:
                cells.append(Cell.at(method=CONCEPTS, images=images, seed=seed))
        return cells

    def run(self, cell: Cell, folder: Path) -> CellResult:
        """See :meth:`Experiment.run`."""
        result = CellResult(facts=self.host_facts())
        if cell["method"] == CONCEPTS:
            self._search_and_score(cell, folder, result)
        else:
            self._add(result, self.score_baseline(cell["method"]))
        return result

    def sketch(self, cell: Cell) -> CellResult:
        """See :meth:`Experiment.sketch`."""
        result = CellResult()
        for part in self.test_names():
            result.sketch(self.metrics, part=part)
            if cell["method"] == CONCEPTS and self.config.second_stage is not None:
                result.sketch(self.metrics, part=part, stage=SECOND)
        return result

    def layout(self) -> Layout:
        """See :meth:`Experiment.layout`."""
        last = _row_label(CONCEPTS, self.config.protocol.images[-1], None)
        first_test = next(iter(self.test_names()))
        return Layout(
            headline=f"{last}/{first_test}/{self.headline_metric}",
            metric="value",
            rows=("row",),
            columns=("column",),
            average="",
        )

    def facts(self) -> dict[str, Any]:
        """See :meth:`Experiment.facts`."""
        config = self.config
        return {
            "protocol": config.protocol.name,
            "data": config.data.name,
            "split": config.data.split,
            "images": config.protocol.images,
            "seeds": config.protocol.seeds,
        }

    def summary(self, results: Results) -> dict[str, float]:
        """See :meth:`Experiment.summary`: means over seeds, as ``<row>/<test set>/<metric>``."""
        figures: dict[str, float] = {}
        for (method, images, stage, part), lines in results.by("method", "images", "stage", "part").items():
            row = _row_label(str(method), images, stage)
            for metric in lines.metrics():
                values = lines.select(metric).values()
                figures |= summarise(values).flat(f"{row}/{part}/{metric}")
        return figures

    def tables(self, results: Results) -> list[Table]:
        """See :meth:`Experiment.tables`: methods with their images by test sets and metrics."""
        lines = []
        for line in results.lines:
            where = line.where
            row = _row_label(str(where["method"]), where.get("images"), where.get("stage"))
            column = f"{where['part']} {line.metric}"
            lines.append(Line({"row": row, "column": column, "seed": where.get("seed")}, "value", line.value))

        names = dict.fromkeys(str(line.where["row"]) for line in lines)
        baselines = {row: self.baselines for row in names if row.startswith(CONCEPTS)}
        return tabulate(Results(lines), replace(self.layout(), baselines=baselines))

    def page(self, record: RunRecord, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.page`."""
        config = self.config
        first_test = next(iter(self.test_names()))
        seeds = len(config.protocol.seeds)
        record.title = f"Concepts for {self.host_name} on {config.data.name}"
        record.summary = f"{self.headline_metric} on {first_test}; {seeds} seed{'s' if seeds > 1 else ''}."

        headline: dict[str, float] = {}
        measured = results.select(self.headline_metric, part=first_test)
        for (method, images, stage), lines in measured.by("method", "images", "stage").items():
            headline[_row_label(str(method), images, stage)] = summarise(lines.values()).mean
        record.headline = headline

        histories = [read_jsonl(folder / "cells" / cell.name / "history.jsonl") for cell in self.cells()]
        searched = [history for history in histories if history]
        if searched:
            record.history = searched[-1]

    def write_files(self, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.write_files`: ``timings.json`` with the seconds of each search, and their means."""
        seconds: dict[str, list[float]] = {}
        for cell in self.cells():
            for stage, value in CellFolder.of(folder, cell).timings().items():
                row = _row_label(cell["method"], cell.get("images"), SECOND if stage == SECOND else None)
                seconds.setdefault(row, []).append(value)
        if not seconds:
            return

        write_json(folder / "timings.json", seconds)
        lines = ["| search, encoding of the images included | seconds |", "|---|---:|"]
        lines += [f"| {row} | {summarise(values).mean:.1f} |" for row, values in seconds.items()]
        write_text(folder / "timings.md", "\n".join(lines) + "\n")

    def _search_and_score(self, cell: Cell, folder: Path, result: CellResult) -> None:
        """Search, then tune what the second stage names, and score after each."""
        config = self.config
        images = cell.get("images")
        seed = cell["seed"]

        first = self.search(images, config.first_options(seed), folder)
        vectors = first.module.concepts().detach()
        first.module.to_concepts(self.classnames()).save(folder / "concepts.safetensors")
        write_jsonl(folder / "history.jsonl", first.history)
        self._add(result, self.score(first.module))
        result.timings["first"] = first.seconds
        if config.second_stage is None:
            return

        unfreeze = config.second_stage.unfreeze
        second = self.search(images, config.second_options(seed), folder / SECOND, unfreeze, vectors)
        try:
            self._add(result, self.score(second.module), stage=SECOND)
        finally:
            # Other cells share the host: they must find it as it was.
            second.module.unfrozen.restore()
        write_jsonl(folder / SECOND / "history.jsonl", second.history)
        result.timings[SECOND] = second.seconds

    def _add(self, result: CellResult, scores: Scores, stage: str | None = None) -> None:
        further = {} if stage is None else {"stage": stage}
        for part, numbers in scores.items():
            result.add({metric: numbers[metric] for metric in self.metrics}, part=part, **further)


def _row_label(method: str, images: Any, stage: Any) -> str:
    """Return the name of a row, for example ``"concepts, 32 images, second stage"``."""
    if not method.startswith(CONCEPTS):  # one of several runs carries the run's name behind it
        return method
    row = f"{method}, {images or 'all'} image{'' if images == 1 else 's'}"
    return row if stage is None else f"{row}, {stage} stage"
