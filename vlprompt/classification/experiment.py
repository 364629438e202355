"""Experiments of classification: which cells there are, how one is trained and scored, and what the report shows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vlprompt.backbones import Backbone, create_backbone, missing_weights
from vlprompt.classification import page
from vlprompt.classification.config import BEFORE, ClassificationConfig, Study
from vlprompt.classification.evaluate import evaluate
from vlprompt.classification.fit import RunResult, fit
from vlprompt.classification.meta import meta_train
from vlprompt.classification.multitask import (
    TaskData,
    common_templates,
    fit_multitask,
    mean_over_tasks,
    union_of_classes,
)
from vlprompt.classification.protocols import protocol_of
from vlprompt.classification.protocols.base import SCRATCH
from vlprompt.classification.protocols.base_to_new import split_base_new
from vlprompt.classification.protocols.multitask import SOURCE, TARGET, groups_of
from vlprompt.classification.protocols.transfer import matrix_of
from vlprompt.classification.tables import protocol_tables
from vlprompt.classification.transfer import start_from
from vlprompt.core.errors import ConfigError
from vlprompt.core.files import path_fingerprint, write_json, write_jsonl
from vlprompt.core.options import options_model
from vlprompt.core.paths import user_path
from vlprompt.core.processes import process_state
from vlprompt.data import FeatureCache, ImageDataset, load_dataset
from vlprompt.data.fingerprint import captions_fingerprint, data_fingerprint, missing_captions, missing_data
from vlprompt.experiments.cell import Cell, CellResult
from vlprompt.experiments.config import parse_overrides
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.layout import Layout
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import harmonic_mean
from vlprompt.experiments.tables import Table
from vlprompt.learners import LEARNERS, Learner, create_learner
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.meta.start import read_start
from vlprompt.saved.paths import find_prompts
from vlprompt.saved.prompts import load, save
from vlprompt.saved.weight_masks import fold, read_masks

__all__ = ["ClassificationExperiment", "build"]

log = logging.getLogger("vlprompt.run")

_ANY_CLASSES = ("one", "another")  # meta-training names the classes of every episode anew
_GRAM = "gram:"


def build(raw: Mapping[str, Any], overrides: Sequence[str], source: str) -> Experiment:
    """Return the experiment that a configuration of this task describes (see :class:`Build`)."""
    content = parse_overrides(overrides, ClassificationConfig)
    return ClassificationExperiment(ClassificationConfig.parse(raw, content, source))


class ClassificationExperiment(Experiment):
    """One learner or several, on the same data under the same protocol."""

    config: ClassificationConfig

    def __init__(self, config: ClassificationConfig) -> None:
        super().__init__(config)
        self._backbones: dict[str, Backbone] = {}
        # Only whole parts of test sets share a cache: rows of a few-shot draw would depend, in their last bits, on
        # which other draws were encoded before, and a cell must not depend on which cells ran before it.
        self._test_caches: dict[tuple[str, str], FeatureCache] = {}

    @cached_property
    def studies(self) -> list[Study]:
        """Every learner under every protocol."""
        return self.config.studies()

    def cells(self) -> list[Cell]:
        """See :meth:`Experiment.cells`."""
        cells = []
        for study in self.studies:
            for cell in protocol_of(study.config.protocol.name).planned(study):
                start = self._start_cell(study, cell)
                needs = cell.needs if start is None else (*cell.needs, start.name)
                cells.append(Cell(cell.coordinates, needs))

        return cells

    def run(self, cell: Cell, folder: Path) -> CellResult:
        """See :meth:`Experiment.run`."""
        study = next(
            s for s in self.studies if (s.setting, s.method) == (cell.get("setting"), cell["method"])
        )
        return _StudyCell(self, study, cell, folder).run()

    def layout(self) -> Layout:
        """See :meth:`Experiment.layout`."""
        study = self._shown_studies[0]
        protocol = protocol_of(study.config.protocol.name)
        headline = protocol.headline
        if len(self._shown_studies) > 1:
            headline = f"{_label(self._shown_studies[-1])}/{headline}"
        return Layout(headline, protocol.metric)

    def sources(self) -> dict[str, str]:
        """See :meth:`Experiment.sources`."""
        fingerprints: dict[str, str] = {}
        for study in self.studies:
            for name in _data_names(study.config):
                fingerprints[name] = data_fingerprint(name, study.config.data.root)
            if study.config.protocol.name == "meta":
                pairs = study.config.meta.pairs
                fingerprints[f"meta.pairs {pairs}"] = captions_fingerprint(pairs)
            for path in self._paths(study.config):
                fingerprints[path] = path_fingerprint(path)

        return {name: value for name, value in fingerprints.items() if value}

    def missing(self) -> list[str]:
        """See :meth:`Experiment.missing`."""
        sentences: list[str | None] = []
        for study in self.studies:
            config = study.config
            sentences += [missing_data(name, config.data.root) for name in _data_names(config)]

            if config.protocol.name == "meta":
                sentences.append(missing_captions(config.meta.pairs))

            sentences.append(missing_weights(config.backbone.name, config.backbone.pretrained))

            for path in self._paths(config):
                if path_fingerprint(path) == "absent":
                    sentences.append(f"{path} does not exist.")

        return list(dict.fromkeys(sentence for sentence in sentences if sentence))

    def facts(self) -> dict[str, Any]:
        """See :meth:`Experiment.facts`."""
        if len(self.studies) == 1:
            return page.study_facts(self.studies[0].config)
        return {_label(study): page.study_facts(study.config) for study in self.studies}

    def summary(self, results: Results) -> dict[str, float]:
        """See :meth:`Experiment.summary`; of several studies, each has its figures below its name."""
        figures: dict[str, float] = {}
        for study in self.studies:
            lines = _lines_of(results, study)
            if len(lines):
                prefix = f"{_label(study)}/" if len(self.studies) > 1 else ""
                numbers = protocol_of(study.config.protocol.name).summary(lines, study)
                figures |= {f"{prefix}{key}": value for key, value in numbers.items()}

        return figures

    def tables(self, results: Results) -> list[Table]:
        """See :meth:`Experiment.tables`: one for each setting, as papers print it, then paired gains."""
        tables: list[Table] = []
        for setting in dict.fromkeys(study.setting for study in self._shown_studies):
            studies = [study for study in self._shown_studies if study.setting == setting]
            lines = results.select(setting=setting)
            tables += protocol_tables(lines, studies, setting or "", self.config.baselines())
        return tables

    def page(self, record: RunRecord, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.page`."""
        finished = [cell for cell in self.cells() if (folder / "cells" / cell.name / "cell.json").is_file()]
        page.describe(record, self.config, self.studies, results)

        if len(self.studies) == 1:
            page.add_curves(record, self.studies[0], results)

        trained = [cell for cell in finished if (folder / "cells" / cell.name / "history.jsonl").is_file()]
        if trained:
            last = trained[-1]
            page.add_history(record, folder / "cells" / last.name)
            study = next(
                s for s in self.studies if (s.setting, s.method) == (last.get("setting"), last["method"])
            )

            cell = _StudyCell(self, study, last, folder / "cells" / last.name)
            if cell.is_single_task:
                learner, test, cache = cell.trained()
                page.add_predictions(record, learner, test, cache)

    def write_files(self, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.write_files`: the matrix of a transfer study."""
        for study in self.studies:
            if study.config.protocol.name == "transfer":
                matrix_of(_lines_of(results, study), study.config).write(folder)

    def backbone(self, config: ClassificationConfig) -> Backbone:
        """Return the backbone of a study, built once."""
        section = config.backbone
        key = section.model_dump_json()
        if key not in self._backbones:
            backbone = create_backbone(section.name, **section.arguments())
            if section.masks is not None:
                backbone = fold(backbone, read_masks(section.masks, backbone))
            self._backbones[key] = backbone

        return self._backbones[key]

    def test_cache(self, config: ClassificationConfig, data: str, part: str) -> FeatureCache:
        """Return the cache of one part of a test set."""
        return self._test_caches.setdefault((data, part), FeatureCache(config.data.cache_dir))

    def init(self, study: Study, cell: Cell, folder: Path) -> str:
        """Return ``train.init`` with the label of a stage that ran before replaced by its folder."""
        start = self._start_cell(study, cell)
        return study.config.train.init if start is None else f"{_GRAM}{folder.parent / start.name}"

    def fact_prefix(self, study: Study) -> str:
        """Return what is put before facts of a learner, so that those of several learners keep apart."""
        return f"{_label(study)}/" if len(self.studies) > 1 else ""

    def _start_cell(self, study: Study, cell: Cell) -> Cell | None:
        """Return the cell of ``before`` that a study's learner starts from, if it starts from one."""
        label = study.config.train.init.removeprefix(_GRAM)
        if study.setting == BEFORE or label not in self.config.before:
            return None

        stage = next(s for s in self.studies if (s.setting, s.method) == (BEFORE, label))
        starts = protocol_of(stage.config.protocol.name).cells(stage)

        same_seed = [start for start in starts if start["seed"] == cell["seed"]]
        if len(starts) == 1 or same_seed:
            return starts[0] if len(starts) == 1 else same_seed[0]
        raise ConfigError(
            [f"before.{label}: it has {len(starts)} seeds, none of which is {cell['seed']}; give it one seed, or those "
             "of the protocol."], self.config.name,
        )  # fmt: skip

    @property
    def _shown_studies(self) -> list[Study]:
        """Those that tables show: not what only comes before."""
        return [study for study in self.studies if study.setting != BEFORE] or self.studies

    def _paths(self, config: ClassificationConfig) -> list[str]:
        """Return the files and folders that a study starts from."""
        paths = [*config.target.patterns]
        paths += [
            path
            for path in (config.backbone.masks, config.backbone.pretrained)
            if path and user_path(path).exists()
        ]

        init = config.train.init.removeprefix(_GRAM)
        if init and init not in self.config.before:
            paths.append(init)
        return paths


class _StudyCell:
    """One cell of a study, with what it needs of the experiment."""

    def __init__(self, experiment: ClassificationExperiment, study: Study, cell: Cell, folder: Path) -> None:
        self.experiment = experiment
        self.study = study
        self.config = study.config
        self.cell = cell
        self.folder = folder
        self.result = CellResult()

    @property
    def is_single_task(self) -> bool:
        """Whether it trains on one data set, and its learner can be loaded and shown."""
        return self.config.protocol.name != "meta" and self.cell.get("stage") != SOURCE

    def run(self) -> CellResult:
        """Train and score."""
        backbone = self.experiment.backbone(self.config)
        prefix = self.experiment.fact_prefix(self.study)
        self.result.facts |= {
            f"{prefix}backbone": backbone.name,
            f"{prefix}backbone_fingerprint": backbone.fingerprint,
        }

        if self.config.protocol.name == "meta":
            self._run_meta(backbone)
        elif self.cell.get("stage") == SOURCE:
            self._run_group(backbone)
        elif self.cell.get("target") is not None:
            self._score_target(backbone)
        else:
            self._run_task(backbone)

        return self.result

    def trained(self) -> tuple[Learner, ImageDataset, FeatureCache]:
        """Return the saved learner of a finished cell, the first part that it was tested on, and its cache."""
        backbone = self.experiment.backbone(self.config)
        learner = load(self.folder / "prompt", backbone)
        part, test = next(iter(self._tests(self.cell["data"]).items()))
        return learner, test, self._cache(test, part)

    def _run_task(self, backbone: Backbone) -> None:
        """Train on one data set and score what was learned."""
        name = self.cell["data"]
        train = self._part(name, "train")
        val = self._validation(name)
        learner = self._learner(backbone, train.classnames, train.templates)
        self._start(learner)
        log.info("%s on %d samples of %d classes", learner.method, len(train), len(train.classnames))

        trained = fit(learner, train, val, **self._fit_options())
        self._keep(trained)
        self._add_training(trained)
        self._score(learner, name)
        self._save_metrics(learner)

    def _run_group(self, backbone: Backbone) -> None:
        """Train several data sets together and score each on its own classes."""
        names = groups_of(self.config)[self.cell["group"]]
        tasks = {name: TaskData(self._part(name, "train"), self._validation(name)) for name in names}
        classes, _ = union_of_classes([task.train.classnames for task in tasks.values()])
        templates = common_templates([task.train.templates for task in tasks.values()])
        learner = self._learner(backbone, classes, templates)
        self._start(learner)
        log.info("%s on %d tasks of %d classes", learner.method, len(tasks), len(classes))

        trained, together = fit_multitask(learner, tasks, self.config.multitask, **self._fit_options())
        self._keep(trained)
        self._add_training(trained)
        scores: dict[str, dict[str, float]] = {}

        for name in names:
            scores[name] = self._score(together.tasks[name], name, data=name)

        self.result.add(mean_over_tasks(scores))
        self._save_metrics(learner)

    def _run_meta(self, backbone: Backbone) -> None:
        """Meta-train the learner's prompts and a regulator."""
        learner = self._learner(backbone, _ANY_CLASSES, DEFAULT_TEMPLATES)
        self._start(learner)
        numbers, history = meta_train(self.config, backbone, learner, self.folder, self.cell["seed"])

        if process_state().is_main_process:
            write_jsonl(self.folder / "history.jsonl", history)

        seconds = numbers.pop("train/seconds")
        self.result.timings["training"] = seconds
        self.result.add(numbers)

    def _score_target(self, backbone: Backbone) -> None:
        """Score on another data set what the source cell learned."""
        process_state().wait_for_everyone()  # the source's files are written by one process
        source = self.cell.sibling(target=None)
        learner = load(self.folder.parent / source.name / "prompt", backbone)
        test = self._load(self.cell["target"], "test")
        self._add_scores(self._scores(learner, test, ""), test, {})

    def _start(self, learner: Learner) -> None:
        """Put saved prompts into the learner, and note it beside the cell and in the run's facts."""
        stage = self.cell.get("stage")
        prompts: list[str] = []

        if stage in (TARGET, "from"):
            prompts = [str(self.folder.parent / name / "prompt") for name in self.cell.needs]
        elif stage != SCRATCH:
            prompts = find_prompts(self.config.target.patterns)

        prefix = self.experiment.fact_prefix(self.study)

        if prompts:
            origin = start_from(learner, prompts)
            if process_state().is_main_process:
                write_json(self.folder / "start.json", origin)
            if stage not in (TARGET, "from"):
                self.result.facts |= {f"{prefix}{key}": value for key, value in origin.items()}

        init = self.experiment.init(self.study, self.cell, self.folder)
        if init:
            start = read_start(init)
            self.result.facts |= {
                f"{prefix}init": start.folder.name,
                f"{prefix}init_checksum": start.checksum,
            }

    def _fit_options(self) -> dict[str, Any]:
        data = self.config.data
        train = self.config.train.model_dump()
        train["init"] = self.experiment.init(self.study, self.cell, self.folder)

        return {
            **train,
            "seed": self.cell["seed"],
            "folder": self.folder,
            "resume": True,
            "augmentation": data.augmentation,
            "views": data.views,
            "cache_dir": data.cache_dir,
        }

    def _keep(self, trained: RunResult) -> None:
        """Write the history, which the report shows."""
        if process_state().is_main_process:
            write_jsonl(self.folder / "history.jsonl", trained.history)

    def _save_metrics(self, learner: Learner) -> None:
        """Save the prompt with the figures that it reached."""
        if process_state().is_main_process:
            numbers = {}
            for measurement in self.result.measurements:
                if "data" in measurement.where:  # of one of several tasks
                    continue
                part = measurement.where.get("part")
                name = f"{part}/{measurement.metric}" if part else measurement.metric
                numbers[name] = measurement.value
            save(learner, self.folder / "prompt", numbers)

    def _add_training(self, trained: RunResult) -> None:
        numbers = dict(trained.metrics)
        self.result.timings["training"] = numbers.pop("seconds")
        self.result.add(numbers, part="train")

    def _score(self, learner: Learner, name: str, **where: str) -> dict[str, float]:
        """Add test metrics of the learner and of zero-shot, by part; return them with the parts in their names."""
        numbers: dict[str, float] = {}
        for part, test in self._tests(name).items():
            fitting = learner
            if test.classnames != learner.classnames:
                fitting = learner.with_classes(test.classnames)

            scores = self._scores(fitting, test, part)
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
        if test.classnames != learner.classnames:
            learner = learner.with_classes(test.classnames, test.templates)

        cache = self._cache(test, part)
        zero_shot = create_learner("zero_shot", learner.backbone, test.classnames, test.templates)
        baseline = evaluate(zero_shot, test, cache=cache)
        self.result.facts |= {f"{test.name}/{key}": value for key, value in test.fingerprint().items()}
        self.result.facts[f"{test.name}/metric"] = test.info.get("metric", "accuracy")
        scores = evaluate(learner, test, cache=cache)

        return {**scores, **{f"zero_shot_{key}": baseline[key] for key in ("accuracy", "score")}}

    def _tests(self, name: str) -> dict[str, ImageDataset]:
        """Return the test sets by part: the whole ("") and further data sets, or the base and the new classes."""
        test = self._load(name, "test")
        if self.config.protocol.name == "base-to-new":
            base, new = split_base_new(len(test.classnames))
            return {"base": test.keep_classes(base), "new": test.keep_classes(new)}

        tests = {"": test}
        for label, other in self.config.data.also_test.items():
            tests[label] = self._load(other, "test")
        return tests

    def _part(self, name: str, split: str) -> ImageDataset:
        """Return the samples of one split that the cell draws."""
        data = self._load(name, split, shots=self.cell["shots"], seed=self.cell["seed"])
        if self.config.protocol.name == "base-to-new":
            base, _ = split_base_new(len(self._load(name, "test").classnames))
            return data.keep_classes(base)
        return data

    def _validation(self, name: str) -> ImageDataset | None:
        return self._part(name, "val") if self.config.data.validate_on == "val" else None

    def _load(self, name: str, split: str, **draw: Any) -> ImageDataset:
        arguments = self.config.data.arguments()
        if self.config.protocol.name == "elevater":
            arguments["sampling"] = "elevater"
        return load_dataset(name, split, **draw, **arguments)

    def _cache(self, test: ImageDataset, part: str) -> FeatureCache:
        return self.experiment.test_cache(self.config, test.name, part)

    def _learner(self, backbone: Backbone, classnames: Sequence[str], templates: Sequence[str]) -> Learner:
        options = dict(self.config.learner_options)
        fields = options_model(LEARNERS.get(self.config.learner_name).target).model_fields
        if "seed" in fields and "seed" not in options:
            options["seed"] = self.cell["seed"]
        return create_learner(self.config.learner_name, backbone, classnames, templates, **options)


def _label(study: Study) -> str:
    return f"{study.setting}/{study.method}" if study.setting else study.method


def _lines_of(results: Results, study: Study) -> Results:
    return results.select(setting=study.setting, method=study.method)


def _data_names(config: ClassificationConfig) -> list[str]:
    """Return every data set that a study reads."""
    if config.protocol.name == "meta":
        return []

    names = [
        *config.data.names,
        *config.data.also_test.values(),
        *config.target.names,
        *config.protocol.targets,
    ]
    return list(dict.fromkeys(names))
