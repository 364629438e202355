"""Running a configuration: every cell of its protocol, then the figures, the artefacts and the report.

A run lives in ``<output>/<name>/<id>/``, where the id is a hash of the resolved configuration, so
``--resume`` finds what the same command left behind: finished cells are kept, an unfinished one continues
from its checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlprompt.backbones import Backbone, create_backbone
from vlprompt.classification import page as pages
from vlprompt.classification.config import RunConfig
from vlprompt.classification.evaluate import evaluate
from vlprompt.classification.fit import RunResult, fit
from vlprompt.classification.gram import read_start
from vlprompt.classification.meta import meta_train, run_meta
from vlprompt.classification.multitask import (
    TaskData,
    common_templates,
    fit_multitask,
    mean_over_tasks,
    union_of_classes,
)
from vlprompt.classification.protocols import (
    Cell,
    ProtocolResult,
    across,
    base_to_new,
    coop_fewshot,
    elevater,
)
from vlprompt.classification.stages import run_from_scratch_too, run_multitask, run_transfer
from vlprompt.classification.tables import protocol_table
from vlprompt.classification.transfer import find_prompts, start_from
from vlprompt.classification.transfer_matrix import TransferMatrix
from vlprompt.core.errors import DataError
from vlprompt.core.files import write_json
from vlprompt.data import FeatureCache, ImageDataset, load_dataset
from vlprompt.experiments.folder import failures, open_folder, write_history
from vlprompt.experiments.report import RunRecord, write_report
from vlprompt.learners import Learner, create_learner
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.saved.prompts import load, save
from vlprompt.saved.weight_masks import fold, read_masks
from vlprompt.training.processes import process_state

__all__ = ["Outcome", "run"]

_ANY_CLASSES = ("one", "another")  # meta-training names the classes of every episode anew

log = logging.getLogger("vlprompt.run")


@dataclass(frozen=True)
class Outcome:
    """What a run produced.

    Attributes:
        folder: The run's folder.
        metrics: The content of ``metrics.json``.
        headline: Key of the number to print first.
        failures: One sentence per reason for which cells failed.
    """

    folder: Path
    metrics: dict[str, Any]
    headline: str
    failures: list[str]


def run(config: RunConfig, resume: bool = False, command: str = "") -> Outcome:
    """Carry a configuration out.

    Args:
        config: See :func:`vlprompt.classification.config.load_config`.
        resume: Keep finished cells and continue an unfinished one; otherwise the folder is emptied first.
        command: Shown in the report.

    Raises:
        VLPromptError: If the backbone or (with a single cell) the cell itself can't be run.
    """
    folder = open_folder(config, resume)
    backbone = create_backbone(config.backbone.name, **config.backbone.arguments())
    if config.backbone.masks is not None:
        backbone = fold(backbone, read_masks(config.backbone.masks, backbone))
    log.info("backbone %s (%s), run folder %s", backbone.name, backbone.fingerprint["id"], folder)
    session = _Session(config, backbone, folder, resume)
    result = session.run_protocol()
    if result.failures and not result.cells and len(result.failures) == 1:
        raise result.failures[0].error
    metrics = pages.metrics(config, backbone, result, session.facts)
    if process_state().is_main_process:
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "cells.json", result.record())
        if session.matrix is not None:
            session.matrix.write(folder)
        elif result.cells and result.protocol not in ("multitask", "meta"):
            protocol_table([metrics]).write(folder)
        write_report(folder / "report.html", session.page(result, metrics, command))
    return Outcome(folder, metrics, result.headline, failures(result))


class _Session:
    """The cells of one run, sharing a backbone and the features of the test sets."""

    def __init__(self, config: RunConfig, backbone: Backbone, folder: Path, resume: bool) -> None:
        self.config, self.backbone, self.folder, self.resume = config, backbone, folder, resume
        # Only whole test sets share a cache: rows of a few-shot draw would depend, in their last bits, on
        # which other draws were encoded before, and a resumed run must not differ from an uninterrupted one.
        self.test_cache = FeatureCache(config.data.cache_dir)
        self.shown: pages.Shown | None = None
        self.matrix: TransferMatrix | None = None
        self.history: list[dict[str, Any]] = []
        self.origin = find_prompts(config.target.patterns)
        self.facts: dict[str, Any] = {"init_from": self.origin} if self.origin else {}
        if config.train.init:
            start = read_start(config.train.init)
            self.facts |= {"init": str(start.folder), "init_checksum": start.checksum}

    def run_protocol(self) -> ProtocolResult:
        """Run every cell of the configured protocol."""
        protocol, names = self.config.protocol, self.config.data.names
        if protocol.name == "multitask":
            return run_multitask(self)
        if protocol.name == "transfer":
            return run_transfer(self)
        if protocol.name == "meta":
            return run_meta(self)
        if protocol.name in ("cross-dataset", "domain-generalisation"):
            most = max(protocol.shots)
            return across(protocol.name, names, protocol.targets, self.run_cell, most, protocol.seeds)
        if protocol.name == "base-to-new":
            most, seeds = max(protocol.shots), protocol.seeds
            return run_from_scratch_too(
                self, lambda run: base_to_new(names, self._count_classes, run, most, seeds)
            )
        few_shot = elevater if protocol.name == "elevater" else coop_fewshot
        return run_from_scratch_too(self, lambda run: few_shot(names, run, protocol.shots, protocol.seeds))

    def run_cell(self, cell: Cell, start: Sequence[str] | None = None) -> Mapping[str, float]:
        """Train and score one cell, or return what a finished one left behind.

        Args:
            cell: What to train.
            start: Saved prompts to start from; none for from scratch. None: what ``target.init_from`` means.
        """
        folder = self.prompt_folder(cell).parent
        if (folder / "cell.json").is_file():
            return json.loads((folder / "cell.json").read_text())
        if cell.target is not None:
            return self._run_target(cell, folder)
        train, val = self._part(cell, "train"), self._validation(cell)
        learner = self._learner(train.classnames, train.templates, cell.seed)
        self._start(learner, folder, self.origin if start is None else start)
        log.info(
            "%s: %s on %d samples of %d classes", cell.name, learner.method, len(train), len(train.classnames)
        )
        result = fit(learner, train, val, **self._fit_options(cell, folder))
        return self._keep(folder, learner, result, self._score(cell, learner, result))

    def _run_target(self, cell: Cell, folder: Path) -> Mapping[str, float]:
        """Score what the cell's source run learned on another data set."""
        source = replace(cell, target=None)
        process_state().wait_for_everyone()  # the source's files are written by one process
        if not (self.prompt_folder(source).parent / "cell.json").is_file():
            raise DataError(f"{source.name} did not finish, so there is nothing to score on {cell.target}.")
        learner = load(self.prompt_folder(source), self.backbone)
        numbers = self._scores(learner, self._load(str(cell.target), "test"))
        if process_state().is_main_process:
            write_json(folder / "cell.json", numbers)
        return numbers

    def run_group(self, cell: Cell, names: Sequence[str]) -> Mapping[str, float]:
        """Train several data sets together and score each on its own classes; otherwise as :meth:`run_cell`."""
        folder = self.prompt_folder(cell).parent
        if (folder / "cell.json").is_file():
            return json.loads((folder / "cell.json").read_text())
        cells = {name: replace(cell, dataset=name) for name in names}
        tasks = {n: TaskData(self._part(c, "train"), self._validation(c)) for n, c in cells.items()}
        classes, _ = union_of_classes([task.train.classnames for task in tasks.values()])
        templates = common_templates([task.train.templates for task in tasks.values()])
        learner = self._learner(classes, templates, cell.seed)
        self._start(learner, folder, self.origin)
        log.info("%s: %s on %d tasks of %d classes", cell.name, learner.method, len(tasks), len(classes))
        options = self._fit_options(cell, folder)
        result, together = fit_multitask(learner, tasks, self.config.multitask, **options)
        scores = {n: self._score(c, together.tasks[n], result) for n, c in cells.items()}
        own = {n: {k: v for k, v in s.items() if not k.startswith("train/")} for n, s in scores.items()}
        numbers = {f"train/{k}": v for k, v in result.metrics.items()} | mean_over_tasks(own)
        numbers |= {f"{name}/{k}": v for name, s in own.items() for k, v in s.items()}
        return self._keep(folder, learner, result, numbers)

    def run_meta_cell(self, cell: Cell) -> Mapping[str, float]:
        """Meta-train once, for the cell's seed; otherwise as :meth:`run_cell`."""
        folder = self.prompt_folder(cell).parent
        if (folder / "cell.json").is_file():
            return json.loads((folder / "cell.json").read_text())
        learner = self._learner(_ANY_CLASSES, DEFAULT_TEMPLATES, cell.seed)
        self._start(learner, folder, self.origin)
        numbers, history = meta_train(self.config, self.backbone, learner, folder, cell.seed, self.resume)
        self.history = history
        if process_state().is_main_process:
            write_history(folder / "history.jsonl", history)
            write_json(folder / "cell.json", numbers)
        return numbers

    def prompt_folder(self, cell: Cell) -> Path:
        """Return where a cell's prompts are saved."""
        folder = self.folder if self._single else self.folder / "cells" / cell.name
        return folder / "prompt"

    def _start(self, learner: Learner, folder: Path, prompts: Sequence[str]) -> None:
        """Put saved prompts into a learner and note it beside the cell and in the run's facts."""
        if not prompts:
            return
        origin = start_from(learner, prompts)
        if prompts is self.origin:
            self.facts |= origin
        if process_state().is_main_process:
            write_json(folder / "start.json", origin)

    def _fit_options(self, cell: Cell, folder: Path) -> dict[str, Any]:
        data = self.config.data
        return {
            **self.config.train.model_dump(),
            "seed": cell.seed,
            "folder": folder,
            "resume": self.resume,
            "augmentation": data.augmentation,
            "views": data.views,
            "cache_dir": data.cache_dir,
        }

    def _keep(
        self, folder: Path, learner: Learner, result: RunResult, numbers: dict[str, float]
    ) -> dict[str, float]:
        """Write what a finished cell leaves behind; ``cell.json`` comes last and says that it is finished."""
        if process_state().is_main_process:
            write_history(folder / "history.jsonl", result.history)
            save(learner, folder / "prompt", {k: v for k, v in numbers.items() if isinstance(v, float)})
            write_json(folder / "cell.json", numbers)
        return numbers

    def _score(self, cell: Cell, learner: Learner, result: RunResult) -> dict[str, float]:
        """Test metrics of the learner and of zero-shot, by part ("", "base/", "new/", "<also_test>/")."""
        numbers: dict[str, float] = {f"train/{k}": v for k, v in result.metrics.items()}
        for prefix, test in self._tests(cell).items():
            fitting = learner
            if test.classnames != learner.classnames:
                fitting = learner.with_classes(test.classnames)
            numbers |= {f"{prefix}{k}": v for k, v in self._scores(fitting, test).items()}
            if prefix in ("", "base/"):
                self.shown = (fitting, test, result)
        return numbers

    def _scores(self, learner: Learner, test: ImageDataset) -> dict[str, float]:
        """Test metrics of a learner on any classes, and what zero-shot reaches on them."""
        if test.classnames != learner.classnames:
            learner = learner.with_classes(test.classnames, test.templates)
        zero = create_learner("zero_shot", self.backbone, test.classnames, test.templates)
        baseline = evaluate(zero, test, cache=self.test_cache)
        self.facts |= {f"{test.name}/{k}": v for k, v in test.fingerprint().items()}
        self.facts[f"{test.name}/metric"] = test.info.get("metric", "accuracy")
        zero_shot = {f"zero_shot_{k}": baseline[k] for k in ("accuracy", "score")}
        return {**evaluate(learner, test, cache=self.test_cache), **zero_shot}

    def _count_classes(self, name: str) -> int:
        return len(self._load(name, "test").classnames)

    def _tests(self, cell: Cell) -> dict[str, ImageDataset]:
        if cell.base is not None and cell.new is not None:
            test = self._load(cell.dataset, "test")
            return {"base/": test.keep_classes(cell.base), "new/": test.keep_classes(cell.new)}
        also = {f"{label}/": self._load(name, "test") for label, name in self.config.data.also_test.items()}
        return {"": self._load(cell.dataset, "test"), **also}

    def _part(self, cell: Cell, split: str) -> ImageDataset:
        data = self._load(cell.dataset, split, shots=cell.shots, seed=cell.seed)
        return data if cell.base is None else data.keep_classes(cell.base)

    def _validation(self, cell: Cell) -> ImageDataset | None:
        return self._part(cell, "val") if self.config.data.validate_on == "val" else None

    def _load(self, name: str, split: str, **draw: Any) -> ImageDataset:
        arguments = self.config.data.arguments()
        if self.config.protocol.name == "elevater":
            arguments["sampling"] = "elevater"
        return load_dataset(name, split, **draw, **arguments)

    def _learner(self, classnames: Sequence[str], templates: Sequence[str], seed: int) -> Learner:
        options = dict(self.config.learner_options)
        if "seed" not in options and _takes_seed(self.config.learner_name):
            options["seed"] = seed
        return create_learner(self.config.learner_name, self.backbone, classnames, templates, **options)

    @property
    def _single(self) -> bool:
        protocol = self.config.protocol
        if (
            protocol.name in ("multitask", "transfer")
            or protocol.targets
            or self.config.target.compare_scratch
        ):
            return False
        shots = 1 if protocol.name == "base-to-new" else len(protocol.shots)
        return len(self.config.data.names) * shots * len(protocol.seeds) == 1

    def page(self, result: ProtocolResult, metrics: Mapping[str, Any], command: str) -> RunRecord:
        """Gather what the page shows; images come from the last cell that was trained in this session."""
        page = pages.record(self.config, self.backbone, result, metrics, command, self.matrix)
        page.history = self.history
        if self.shown is not None:
            pages.show(page, self.shown, self.test_cache)
        return page


def _takes_seed(learner: str) -> bool:
    from vlprompt.core.options import options_model
    from vlprompt.learners import LEARNERS

    return "seed" in options_model(LEARNERS.get(learner).target).model_fields
