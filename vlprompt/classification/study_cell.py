"""One cell of a classification experiment: how a learner is trained and scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlprompt.backbones import Backbone
from vlprompt.classification.config import ClassificationConfig
from vlprompt.classification.distil import TRANSDUCTIVE, without_labels
from vlprompt.classification.evaluate import evaluate
from vlprompt.classification.fit import RunResult, fit
from vlprompt.classification.label_space import check_fitting, fitting
from vlprompt.classification.learner_section import learner_arguments
from vlprompt.classification.meta import meta_train
from vlprompt.classification.multitask import (
    TaskData,
    common_templates,
    fit_multitask,
    mean_over_tasks,
    union_of_classes,
)
from vlprompt.classification.page import TEMPLATES
from vlprompt.classification.protocols.base import SCRATCH
from vlprompt.classification.protocols.base_to_new import split_base_new
from vlprompt.classification.protocols.multitask import SOURCE, TARGET, groups_of
from vlprompt.classification.transfer import start_from
from vlprompt.core.files import write_json, write_jsonl
from vlprompt.core.processes import meet, process_state
from vlprompt.core.template_files import write_templates
from vlprompt.data import FeatureCache, ImageDataset, load_dataset
from vlprompt.experiments.cell import Cell, CellResult
from vlprompt.experiments.statistics import harmonic_mean
from vlprompt.learners import LEARNERS, Learner, create_learner
from vlprompt.learners._scanning import ImageScanner
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.meta.start import read_start
from vlprompt.metrics.backdoor import COMPOSITION_FIGURES, OBJECT_FIGURES, SCORE_FIGURES
from vlprompt.saved.paths import find_prompts
from vlprompt.saved.prompts import load, save

__all__ = ["StudyCell", "sketch"]

log = logging.getLogger("vlprompt.run")

_SCORES = ("accuracy", "mean_per_class", "nll", "score", "zero_shot_accuracy", "zero_shot_score")
_META_SCORES = ("accuracy", "plain_accuracy", "unadapted_accuracy", "zero_shot_accuracy", "loss")
_INCREMENTAL_SCORES = (
    "last",
    "average",
    "forgetting",
    "backward_transfer",
    "zero_shot_last",
    "zero_shot_average",
)
_ANY_CLASSES = ("one", "another")  # meta-training names the classes of every episode anew


@dataclass
class StudyCell:
    """One cell of a study: trains and scores, or loads what was trained.

    Args:
        config: The study's configuration.
        cell: Its coordinates.
        folder: Where its files lie.
        backbone: What the learner stands on.
        init: ``train.init``, with the label of a stage that ran before replaced by its folder.
        teacher: ``distil.teacher`` alike; empty: none.
        fact_prefix: Put before facts of the learner, so that those of several learners keep apart.
        test_cache: Returns the cache of (data set, part of its test set).
    """

    config: ClassificationConfig
    cell: Cell
    folder: Path
    backbone: Backbone
    init: str
    teacher: str
    fact_prefix: str
    test_cache: Callable[[str, str], FeatureCache]
    result: CellResult = field(default_factory=CellResult)

    @property
    def is_single_task(self) -> bool:
        """Whether it trains on one data set, and its learner can be loaded and shown."""
        return self.config.protocol.name != "meta" and self.cell.get("stage") != SOURCE

    def run(self) -> CellResult:
        """Train and score."""
        self.result.facts |= {
            f"{self.fact_prefix}backbone": self.backbone.name,
            f"{self.fact_prefix}backbone_fingerprint": self.backbone.fingerprint,
        }

        if self.config.protocol.name == "meta":
            self._run_meta()
        elif self.cell.get("stage") == SOURCE:
            self._run_group()
        elif self.cell.get("target") is not None:
            self._score_target()
        else:
            self._run_task()

        return self.result

    def trained(self) -> tuple[Learner, ImageDataset, FeatureCache]:
        """Return the saved learner of a finished cell, the first part that it was tested on, and its cache."""
        learner = load(self.folder / "prompt", self.backbone)
        part, test = next(iter(self._tests(self.cell["data"]).items()))
        return learner, test, self._cache(test, part)

    def _run_task(self) -> None:
        """Train on one data set and score what was learned."""
        name = self.cell["data"]
        train = self._unlabelled(name) if self.teacher else self._part(name, "train")
        val = None if self.teacher else self._validation(name)
        tests = self._tests(name)  # damaged or missing test data are found before training, not after it
        _say_cut(train)
        learner = self._learner(train.classnames, train.templates)
        for test in [*tests.values(), *self._targets(learner)]:
            check_fitting(learner, test)
        self._start(learner)
        if self.teacher:
            learner.learn_from(self._teacher())
        log.info("%s on %d samples of %d classes", learner.method, len(train), len(train.classnames))

        trained = fit(learner, train, val, **self._fit_options())
        self._keep(trained)
        self._save(learner)  # what was learned stays, whatever scoring meets
        self._add_training(trained)
        self._score(learner, name)
        self._save(learner)

    def _run_group(self) -> None:
        """Train several data sets together and score each on its own classes."""
        names = groups_of(self.config)[self.cell["group"]]
        tasks = {name: TaskData(self._part(name, "train"), self._validation(name)) for name in names}
        for name, task in tasks.items():
            self._tests(name)
            _say_cut(task.train)

        classes, _ = union_of_classes([task.train.classnames for task in tasks.values()])
        templates = common_templates([task.train.templates for task in tasks.values()])
        learner = self._learner(classes, templates)
        self._start(learner)
        log.info("%s on %d tasks of %d classes", learner.method, len(tasks), len(classes))

        options = self._fit_options()
        options.pop("recipe")  # of one task; the configuration refuses one here
        options.pop("several_labels")  # tasks mix samples of one label each
        trained, together = fit_multitask(learner, tasks, self.config.multitask, **options)
        self._keep(trained)
        self._save(learner)
        self._add_training(trained)
        scores: dict[str, dict[str, float]] = {}

        for name in names:
            scores[name] = self._score(together.tasks[name], name, data=name)

        self.result.add(mean_over_tasks(scores))
        self._save(learner)

    def _run_meta(self) -> None:
        """Meta-train the learner's prompts and a regulator."""
        learner = self._learner(_ANY_CLASSES, DEFAULT_TEMPLATES)
        self._start(learner)
        numbers, history = meta_train(self.config, self.backbone, learner, self.folder, self.cell["seed"])

        if process_state().is_main_process:
            write_jsonl(self.folder / "history.jsonl", history)

        seconds = numbers.pop("train/seconds")
        self.result.timings["training"] = seconds
        self.result.add(numbers)

    def _score_target(self) -> None:
        """Score on another data set what the source cell learned."""
        meet()  # the source's files are written by one process
        source = self.cell.sibling(target=None)
        learner = load(self.folder.parent / source.name / "prompt", self.backbone)
        test = self._scored(self.cell["target"])
        self._add_scores(self._scores(learner, test, ""), test, {})

    def _start(self, learner: Learner) -> None:
        """Put saved prompts into the learner, and note it beside the cell and in the run's facts."""
        stage = self.cell.get("stage")
        prompts: list[str] = []

        if stage in (TARGET, "from"):
            prompts = [str(self.folder.parent / name / "prompt") for name in self.cell.needs]
        elif stage != SCRATCH:
            prompts = find_prompts(self.config.target.patterns)

        if prompts:
            origin = start_from(learner, prompts)
            if process_state().is_main_process:
                write_json(self.folder / "start.json", origin)
            if stage not in (TARGET, "from"):
                self.result.facts |= {f"{self.fact_prefix}{key}": value for key, value in origin.items()}

        if self.init:
            start = read_start(self.init)
            self.result.facts |= {
                f"{self.fact_prefix}init": start.folder.name,
                f"{self.fact_prefix}init_checksum": start.checksum,
            }

    def _fit_options(self) -> dict[str, Any]:
        data = self.config.data
        train = self.config.train.options() | {"init": self.init}

        return {
            **train,
            "seed": self.cell["seed"],
            "folder": self.folder,
            "resume": True,
            "augmentation": data.augmentation,
            "views": data.views,
            "several_labels": data.several_labels,
            "cache_dir": data.cache_dir,
            "prefix_gib": data.prefix_gib,
        }

    def _keep(self, trained: RunResult) -> None:
        """Write the history and the templates that were found, which the report shows."""
        templates = trained.learner.found_templates()
        if templates:
            self.result.facts[f"{self.cell.name}/templates"] = list(templates)

        if process_state().is_main_process:
            write_jsonl(self.folder / "history.jsonl", trained.history)
            if templates:
                write_templates(self.folder / TEMPLATES, templates, [f"found by {trained.learner.method}"])

    def _save(self, learner: Learner) -> None:
        """Save the prompt with the figures that it reached so far."""
        if process_state().is_main_process:
            numbers = {}
            for measurement in self.result.measurements:
                if "data" in measurement.where:  # of one of several tasks
                    continue
                part = measurement.where.get("part")
                name = f"{part}/{measurement.metric}" if part else measurement.metric
                numbers[name] = measurement.value
            save(learner, self.folder / "prompt", numbers, self.cell.where)

    def _add_training(self, trained: RunResult) -> None:
        numbers = dict(trained.metrics)
        self.result.timings["training"] = numbers.pop("seconds")
        self.result.add({**numbers, "trainable": trained.learner.num_trainable()}, part="train")

    def _score(self, learner: Learner, name: str, **where: str) -> dict[str, float]:
        """Add test metrics of the learner and of zero-shot, by part; return them with the parts in their names."""
        numbers: dict[str, float] = {}
        for part, test in self._tests(name).items():
            scores = self._scores(learner, test, part)
            coordinates = {**where, "part": part} if part else where
            self._add_scores(scores, test, coordinates)
            numbers |= {f"{part}/{key}" if part else key: value for key, value in scores.items()}

        if self.config.protocol.name == "base-to-new":
            mean = harmonic_mean(numbers["base/accuracy"], numbers["new/accuracy"])
            self.result.add({"harmonic_mean": mean}, **where)

        return numbers

    def _add_scores(
        self, scores: Mapping[str, float], test: ImageDataset, coordinates: Mapping[str, str]
    ) -> None:
        """Add scores; those by another measure than accuracy say by which."""
        measure = str(test.info.get("metric", "accuracy"))
        by_measure = {key: value for key, value in scores.items() if key.endswith("score")}
        rest = {key: value for key, value in scores.items() if key not in by_measure}
        self.result.add(rest, **coordinates)
        self.result.add(
            by_measure, **(coordinates if measure == "accuracy" else {**coordinates, "measure": measure})
        )

    def _scores(self, learner: Learner, test: ImageDataset, part: str) -> dict[str, float]:
        """Return test metrics of a learner on any classes, and what zero-shot reaches on them."""
        templates = test.templates if self.cell.get("target") is not None else None
        learner, test = fitting(learner, test, templates)

        cache = self._cache(test, part)
        zero_shot = create_learner("zero_shot", learner.backbone, test.classnames, test.templates)
        baseline = evaluate(zero_shot, test, cache=cache)
        self.result.facts |= {f"{test.name}/{key}": value for key, value in test.fingerprint().items()}
        self.result.facts[f"{test.name}/metric"] = test.info.get("metric", "accuracy")
        scores = evaluate(learner, test, cache=cache)

        return {**scores, **{f"zero_shot_{key}": baseline[key] for key in ("accuracy", "score")}}

    def _tests(self, name: str) -> dict[str, ImageDataset]:
        """Return the test sets by part: the whole ("") and further data sets, or the base and the new classes."""
        test = self._scored(name)
        if self.config.protocol.name == "base-to-new":
            base, new = split_base_new(len(test.classnames))
            return {"base": test.keep_classes(base), "new": test.keep_classes(new)}

        tests = {"": test}
        for label, other in self.config.data.also_test.items():
            tests[label] = self._scored(other)
        return tests

    def _targets(self, learner: Learner) -> list[ImageDataset]:
        """Return the other data sets that later cells score this learner on, if it may not fit them."""
        if not learner.class_bound:
            return []
        return [self._scored(name) for name in self.config.protocol.targets]

    def _part(self, name: str, split: str) -> ImageDataset:
        """Return the samples of one split that the cell draws."""
        data = self._load(name, split, shots=self.cell["shots"], seed=self.cell["seed"])
        if self.config.protocol.name == "base-to-new":
            base, _ = split_base_new(len(self._scored(name).classnames))
            return data.keep_classes(base)
        return data

    def _validation(self, name: str) -> ImageDataset | None:
        return self._part(name, "val") if self.config.data.validate_on == "val" else None

    def _unlabelled(self, name: str) -> ImageDataset:
        """Return all training images that a student sees, of base and new classes, without their labels."""
        data = without_labels(self._load(self.config.distil.data or name, "train"))
        self.result.facts |= {f"{self.fact_prefix}{TRANSDUCTIVE}": f"{len(data)} unlabelled images"}
        return data

    def _teacher(self) -> Learner:
        """Return the teacher, on the backbone that its file records."""
        path = find_prompts([self.teacher])[0]
        teacher = load(path, self.config.distil.backbone or None)
        self.result.facts |= {
            f"{self.fact_prefix}teacher": teacher.title(),
            f"{self.fact_prefix}teacher_backbone": teacher.backbone.name,
        }
        return teacher

    def _scored(self, name: str) -> ImageDataset:
        """Return the split of a data set that figures are of: all of its images, whatever is trained on."""
        return self._load(name, self.config.data.split)

    def _load(self, name: str, split: str, **draw: Any) -> ImageDataset:
        arguments = self.config.data.arguments()
        arguments["validation"] = "val" in (self.config.data.validate_on, self.config.data.split)
        if self.config.protocol.name == "elevater":
            arguments["sampling"] = "elevater"
        return load_dataset(name, split, **draw, **arguments)

    def _cache(self, test: ImageDataset, part: str) -> FeatureCache:
        return self.test_cache(test.name, part)

    def _learner(self, classnames: Sequence[str], templates: Sequence[str]) -> Learner:
        options = learner_arguments(self.config.learner, self.cell["seed"])
        return create_learner(self.config.learner_name, self.backbone, classnames, templates, **options)


def sketch(config: ClassificationConfig, cell: Cell) -> CellResult:
    """Return the metrics of a cell on data that are scored by accuracy (see :meth:`Experiment.sketch`)."""
    result = CellResult()

    if config.protocol.name == "class-incremental":
        result.sketch(_INCREMENTAL_SCORES)
    elif config.protocol.name == "meta":
        result.sketch(_META_SCORES)
    elif cell.get("stage") == SOURCE:
        result.sketch(_SCORES)
        for name in groups_of(config)[cell["group"]]:
            result.sketch(_SCORES, data=name)
    elif config.protocol.name == "base-to-new":
        result.sketch(_SCORES, part="base")
        result.sketch(_SCORES, part="new")
        result.sketch(("harmonic_mean",))
    else:
        result.sketch(_SCORES)
        for label in config.data.also_test if cell.get("target") is None else ():
            result.sketch(_SCORES, part=label)
        if _scans(config, cell):
            result.sketch((*SCORE_FIGURES, *OBJECT_FIGURES, *COMPOSITION_FIGURES))

    return result


def _scans(config: ClassificationConfig, cell: Cell) -> bool:
    """Return whether a cell scores a scanner on composed images, which have further figures."""
    is_scanner = issubclass(LEARNERS.get(config.learner_name).target, ImageScanner)
    return is_scanner and str(cell.get("target", cell["data"])).startswith("triggered:")


def _say_cut(train: ImageDataset) -> None:
    """Say how many training images were kept for validation, where the data have no validation part."""
    if cut := train.info.get("cut_for_validation"):
        log.info(
            "%s has no validation part: %d of its %d training images are kept for it; "
            "data.validate_on=none trains on all",
            train.name,
            *cut,
        )
