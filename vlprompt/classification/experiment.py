"""Experiments of classification: which cells there are, how one is trained and scored, and what the report shows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from vlprompt.backbones import Backbone
from vlprompt.classification import page, training
from vlprompt.classification.config import BEFORE, ClassificationConfig, Study
from vlprompt.classification.incremental import IncrementalCell
from vlprompt.classification.protocols import protocol_of
from vlprompt.classification.protocols.transfer import matrix_of
from vlprompt.classification.study_cell import StudyCell, sketch
from vlprompt.classification.tables import protocol_tables
from vlprompt.core.errors import ConfigError
from vlprompt.core.files import path_fingerprint
from vlprompt.data import FeatureCache
from vlprompt.data.fingerprint import captions_fingerprint, data_fingerprint, missing_captions, missing_data
from vlprompt.experiments.backbone import backbone_sources, build_backbone, missing_backbone
from vlprompt.experiments.cell import Cell, CellResult
from vlprompt.experiments.config import parse_overrides
from vlprompt.experiments.experiment import Experiment, FinishedRun
from vlprompt.experiments.layout import Layout
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Results
from vlprompt.experiments.tables import Table

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
    on_validation: ClassVar[tuple[str, ...]] = ("data.split=val",)

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
                needed = [*cell.needs]
                for stage in (study.config.train.init.removeprefix(_GRAM), study.config.distil.teacher):
                    start = self._stage_cell(study, cell, stage)
                    needed += [] if start is None else [start.name]
                cells.append(Cell(cell.coordinates, tuple(needed)))

        return cells

    def run(self, cell: Cell, folder: Path) -> CellResult:
        """See :meth:`Experiment.run`."""
        return self._study_cell(cell, folder).run()

    def sketch(self, cell: Cell) -> CellResult:
        """See :meth:`Experiment.sketch`."""
        return sketch(self._study(cell).config, cell)

    def layout(self) -> Layout:
        """See :meth:`Experiment.layout`."""
        study = self._shown_studies[0]
        protocol = protocol_of(study.config.protocol.name)
        headline = protocol.headline
        if len(self.studies) > 1:
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
            fingerprints |= backbone_sources(study.config.backbone)
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

            sentences += missing_backbone(config.backbone)

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
        return _tables(results, self._shown_studies, self.config.baselines())

    def kind(self) -> str:
        """See :meth:`Experiment.kind`."""
        return ", ".join(dict.fromkeys(study.config.protocol.name for study in self._shown_studies))

    def common_tables(self, results: Results, runs: Sequence[FinishedRun]) -> list[Table]:
        """See :meth:`Experiment.common_tables`: those of the learners of all runs."""
        studies: list[Study] = []
        baselines: dict[str, tuple[str, ...]] = {}

        for run in runs:
            experiment = run.experiment
            assert isinstance(experiment, ClassificationExperiment)
            studies += [replace(study, method=run.label(study.method)) for study in experiment._shown_studies]
            for method, others in experiment.config.baselines().items():
                names = tuple(run.label(other) for other in others)
                label = run.label(method)
                baselines[label] = tuple(dict.fromkeys((*baselines.get(label, ()), *names)))

        return _tables(results, studies, baselines)

    def page(self, record: RunRecord, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.page`."""
        finished = [cell for cell in self.cells() if (folder / "cells" / cell.name / "cell.json").is_file()]
        page.describe(record, self.config, self.studies, results)

        if len(self.studies) == 1:
            page.add_curves(record, self.studies[0], results)

        page.add_templates(record, [cell for cell in finished if cell.get("target") is None], results, folder)
        trained = [cell for cell in finished if (folder / "cells" / cell.name / "history.jsonl").is_file()]
        if trained:
            last = trained[-1]
            page.add_history(record, folder / "cells" / last.name)

            cell = self._study_cell(last, folder / "cells" / last.name)
            if cell.is_single_task:
                learner, test, cache = cell.trained()
                page.add_predictions(record, learner, test, cache)

    def write_files(self, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.write_files`: what training took, and the matrix of a transfer study."""
        training.write(results, self.cells(), folder)
        for study in self.studies:
            if study.config.protocol.name == "transfer":
                matrix_of(_lines_of(results, study), study.config).write(folder)

    def backbone(self, config: ClassificationConfig) -> Backbone:
        """Return the backbone of a study, built once."""
        section = config.backbone
        key = section.model_dump_json()
        if key not in self._backbones:
            self._backbones[key] = build_backbone(section)
        return self._backbones[key]

    def _study_cell(self, cell: Cell, folder: Path) -> StudyCell:
        """Return a cell with what it needs of the experiment."""
        study = self._study(cell)
        config = study.config
        start = self._stage_cell(study, cell, config.train.init.removeprefix(_GRAM))
        lesson = self._stage_cell(study, cell, config.distil.teacher)

        kind = IncrementalCell if config.protocol.name == "class-incremental" else StudyCell
        return kind(
            config,
            cell,
            folder,
            backbone=self.backbone(config),
            init=config.train.init if start is None else f"{_GRAM}{folder.parent / start.name}",
            teacher=config.distil.teacher if lesson is None else str(folder.parent / lesson.name / "prompt"),
            fact_prefix=f"{_label(study)}/" if len(self.studies) > 1 else "",
            test_cache=lambda data, part: self._test_cache(config, data, part),
        )

    def _study(self, cell: Cell) -> Study:
        """Return the study that a cell is part of."""
        where = (cell.get("setting"), cell["method"])
        return next(study for study in self.studies if (study.setting, study.method) == where)

    def _test_cache(self, config: ClassificationConfig, data: str, part: str) -> FeatureCache:
        """Return the cache of one part of a test set; it keeps prefixes only where it keeps them in files."""
        prefix_gib = config.data.prefix_gib if config.data.cache_dir else 0
        cache = FeatureCache(config.data.cache_dir, prefix_gib=prefix_gib)
        return self._test_caches.setdefault((data, part), cache)

    def _stage_cell(self, study: Study, cell: Cell, label: str) -> Cell | None:
        """Return the cell of ``before`` with a label that a study's cell needs: of its data and its seed."""
        if study.setting == BEFORE or label not in self.config.before:
            return None

        stage = next(s for s in self.studies if (s.setting, s.method) == (BEFORE, label))
        starts = protocol_of(stage.config.protocol.name).cells(stage)

        if any(start.get("data") == cell.get("data") for start in starts):
            starts = [start for start in starts if start.get("data") == cell.get("data")]
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
        """Return the saved prompts that a study starts from, and its file of descriptions."""
        paths = [*config.target.patterns, *config.data.described()]

        init = config.train.init.removeprefix(_GRAM)
        if init and init not in self.config.before:
            paths.append(init)
        if config.distil.teacher and config.distil.teacher not in self.config.before:
            paths.append(config.distil.teacher)
        return paths


def _tables(
    results: Results, studies: Sequence[Study], baselines: Mapping[str, tuple[str, ...]]
) -> list[Table]:
    """Return the tables of every setting."""
    tables: list[Table] = []
    for setting in dict.fromkeys(study.setting for study in studies):
        own = [study for study in studies if study.setting == setting]
        tables += protocol_tables(results.select(setting=setting), own, setting or "", baselines)
    return tables


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
        *([config.distil.data] if config.distil.data else []),
    ]
    return list(dict.fromkeys(names))
