"""Experiments of test-time adaptation: which cells there are, how one is run, and how results are laid out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from vlprompt.adaptation import ADAPTERS, Adapter, Predictions, create_adapter, page
from vlprompt.adaptation.attack import AttackedData, attack_dataset
from vlprompt.adaptation.config import AdaptationConfig, DiffusionOptions
from vlprompt.adaptation.draws import describe_stream, draw_stream, read_paths, reordered
from vlprompt.adaptation.measure import (
    add_costs,
    add_robust,
    add_scores,
    add_spread,
    make_record,
    scores,
    start_name,
)
from vlprompt.adaptation.mixing import intruders_of
from vlprompt.adaptation.promptalign import SourceStatistics, source_statistics
from vlprompt.adaptation.record import AdaptationRecord, check_settings, read_records, write_records
from vlprompt.adaptation.stored_views import classified_alike, count_missing, fill_store
from vlprompt.adaptation.stream import EncodedStream, adapt_dataset
from vlprompt.adaptation.summary import ROBUST, adaptation_tables, headline, sketch, summary
from vlprompt.backbones import Backbone
from vlprompt.core.errors import BackboneError, ConfigError, DataError
from vlprompt.core.files import path_fingerprint
from vlprompt.core.slugs import slug
from vlprompt.data import ImageDataset, load_dataset
from vlprompt.data.fingerprint import data_fingerprint, missing_data
from vlprompt.data.images import pixel_key
from vlprompt.diffusion import Generator, ViewSource, ViewStore, create_generator, missing_generator
from vlprompt.experiments.backbone import backbone_sources, build_backbone, missing_backbone
from vlprompt.experiments.cell import Cell, CellResult, Coordinate
from vlprompt.experiments.config import parse_overrides
from vlprompt.experiments.experiment import Experiment, FinishedRun, joint_methods
from vlprompt.experiments.layout import Layout
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Results
from vlprompt.experiments.tables import Table
from vlprompt.learners import Learner, create_learner
from vlprompt.saved.paths import find_prompts
from vlprompt.saved.prompts import load

__all__ = ["AdaptationExperiment", "build"]

log = logging.getLogger("vlprompt.run")

VIEWS, SOURCE = "views", "source"  # stages before the methods run
PREDICTIONS = "predictions"  # folder of a cell
_STATISTICS = "statistics.safetensors"
_BLUR = 0.8  # pixels of the backbone's input
_UNTIL_NEXT = ("corruption", "dataset")  # what a method forgets where a stream goes over to the next data set
_ATTACKED = "attacked"  # folders of a cell: attacked images, and predictions on them
_ROBUST = "robust_predictions"


def build(raw: Mapping[str, Any], overrides: Sequence[str], source: str) -> Experiment:
    """Return the experiment that a configuration of this task describes (see :class:`Build`)."""
    content = parse_overrides(overrides, AdaptationConfig)
    return AdaptationExperiment(AdaptationConfig.parse(raw, content, source))


class AdaptationExperiment(Experiment):
    """Several methods on the same images.

    A cell is one data set and one seed, and runs all methods on it, because methods with the same views share them, and
    views take most of the time: on ``tiny`` and one core, encoding 24 views of an image takes 0.3 s, ZERO and MTA after
    it 0.0003 s and 0.005 s. Even with 6 views, the timings of the six methods of tta_tiny.yaml sum to 0.26 s per image
    with sharing and to 0.51 s without.

    With one cell per method, sharing would need the encoded views of a whole stream in memory, 6.5 GB for 50,000 images
    of 64 views, in every process that runs one of the methods. One cell for all methods needs the views of one batch.
    """

    config: AdaptationConfig
    on_validation: ClassVar[tuple[str, ...]] = ("data.split=val",)

    def cells(self) -> list[Cell]:
        """See :meth:`Experiment.cells`."""
        cells = []
        needs = []

        if self._measures_statistics:
            source = self.config.source
            assert source is not None
            statistics = Cell.at(data=source.name, stage=SOURCE)
            cells.append(statistics)
            needs.append(statistics.name)

        for names, where in self._streams:
            for seed in self.config.protocol.seeds:
                cell_needs = list(needs)
                if self.config.fills_store:
                    views = [Cell.at(data=name, seed=seed, stage=VIEWS) for name in names]
                    cells += views
                    cell_needs += [cell.name for cell in views]
                cells.append(Cell.at(cell_needs, **where, seed=seed))

        return cells

    @property
    def _streams(self) -> list[tuple[list[str], dict[str, Coordinate]]]:
        """The data sets of every stream, and where its cells are."""
        names = self.config.data.names
        kind = self.config.protocol.stream.kind
        return (
            [(names, {"stream": kind})]
            if kind == "temporal"
            else [([name], {"data": name}) for name in names]
        )

    def run(self, cell: Cell, folder: Path) -> CellResult:
        """See :meth:`Experiment.run`."""
        if cell.get("stage") == SOURCE:
            return self._measure_statistics(folder)
        if cell.get("stage") == VIEWS:
            return self._generate_views(cell)
        return self._adapt(cell, folder)

    def sketch(self, cell: Cell) -> CellResult:
        """See :meth:`Experiment.sketch`."""
        return CellResult() if cell.get("stage") is not None else sketch(cell, self.config)

    def layout(self) -> Layout:
        """See :meth:`Experiment.layout`."""
        data = self.config.data
        seeds = ", ".join(map(str, self.config.protocol.seeds))
        images = f"{data.test_images} images of each data set" if data.test_images else "all images"
        note = f"Accuracy on {data.split}, {images}, seeds {seeds}; mean and 95 % interval over seeds."
        if self.config.protocol.stream.kind == "temporal":
            note += " One stream through the data sets, in their order."
        if data.intruders is not None:
            note += (
                f" Of the known images, among which come those of {data.intruders.name or 'other classes'}."
            )
        return Layout(headline(self.config), note=note)

    def sources(self) -> dict[str, str]:
        """See :meth:`Experiment.sources`."""
        config = self.config
        names = self._read_names
        fingerprints = {name: data_fingerprint(name, config.data.root) for name in names}

        fingerprints |= backbone_sources(config.backbone)
        for path in read_paths(self.config):
            fingerprints[path] = path_fingerprint(path)
        return {name: value for name, value in fingerprints.items() if value}

    def missing(self) -> list[str]:
        """See :meth:`Experiment.missing`."""
        config = self.config
        names = self._read_names
        sentences = [missing_data(name, config.data.root) for name in names]

        sentences += missing_backbone(config.backbone)
        for path in read_paths(self.config):
            if path_fingerprint(path) == "absent":
                sentences.append(f"{path} does not exist.")
        if config.diffusion is not None and config.generated:
            sentences.append(missing_generator(config.diffusion.generator, config.diffusion.options))
        return list(dict.fromkeys(sentence for sentence in sentences if sentence))

    def facts(self) -> dict[str, Any]:
        """See :meth:`Experiment.facts`."""
        config = self.config
        return {
            "protocol": "test-time-adaptation",
            "data": config.data.name,
            "split": config.data.split,
            "stream": config.protocol.stream.description(),
            "test_images": config.data.test_images,
            "seeds": config.protocol.seeds,
            "prompt": config.prompt,
            "attack": None if config.attack is None else config.attack.description(),
        }

    def summary(self, results: Results) -> dict[str, float]:
        """See :meth:`Experiment.summary`."""
        return summary(results, self.config)

    def tables(self, results: Results) -> list[Table]:
        """See :meth:`Experiment.tables`."""
        return adaptation_tables(results, self.config, self.layout())

    def common_tables(self, results: Results, runs: Sequence[FinishedRun]) -> list[Table]:
        """See :meth:`Experiment.common_tables`: the methods of all runs, if their records have the same settings."""
        records = [record for run in runs for record in read_records(run.folder, run.label)]
        for name in dict.fromkeys(record.data for record in records):
            check_settings([record for record in records if record.data == name])

        config = self.config.model_copy(update={"methods": joint_methods(runs)})
        return adaptation_tables(results, config, self.layout())

    def page(self, record: RunRecord, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.page`."""
        page.describe(record, self.config)
        for cell in self.cells():
            path = folder / "cells" / cell.name
            if cell.get("stage") is None and (path / "cell.json").is_file():
                name, data = next(self._parts(cell))
                page.add_predictions(record, data, self._folder(path, name), next(iter(self.config.methods)))
                return

    @property
    def _read_names(self) -> list[str]:
        """The data sets that are read."""
        config = self.config
        names = list(config.data.names)
        if config.data.intruders is not None and config.data.intruders.name is not None:
            names.append(config.data.intruders.name)
        if config.source is not None:
            names.append(config.source.name)
        return names

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone of all methods."""
        return build_backbone(self.config.backbone)

    @cached_property
    def start(self) -> Backbone | Learner:
        """What methods start from: the saved learner of ``prompt``, or the backbone."""
        if self.config.prompt is None:
            return self.backbone

        folders = find_prompts([self.config.prompt])
        if len(folders) > 1:
            problem = f"prompt: {self.config.prompt} holds {len(folders)} learners; name one of {', '.join(folders)}."
            raise ConfigError([problem], self.config.name)

        learner: Learner = load(folders[0], self.backbone)
        return learner.to(self.backbone.device)

    @cached_property
    def generator(self) -> Generator:
        """What generates views."""
        return create_generator(self._diffusion.generator, **self._diffusion.options)

    @property
    def _diffusion(self) -> DiffusionOptions:
        assert self.config.diffusion is not None
        return self.config.diffusion

    @property
    def _measures_statistics(self) -> bool:
        return any(self.config.needs_statistics(label) for label in self.config.methods)

    def _parts(self, cell: Cell) -> Iterator[tuple[str, ImageDataset]]:
        """Yield the data sets of a cell's stream in their order, by name."""
        names = [cell["data"]] if "data" in cell.where else self.config.data.names
        for name in names:
            yield name, draw_stream(self.config, name, cell["seed"])

    def _folder(self, folder: Path, name: str) -> Path:
        """Return where a cell's predictions on one of its data sets lie."""
        if self.config.protocol.stream.kind != "temporal":
            return folder / PREDICTIONS
        number = self.config.data.names.index(name)
        return folder / PREDICTIONS / f"{number:02d}-{slug(name)}"

    def _adapt(self, cell: Cell, folder: Path) -> CellResult:
        """Run all methods on one stream; batches that an interrupted attempt wrote are taken as they are."""
        config = self.config
        parts = dict(self._parts(cell))
        first = next(iter(parts.values()))
        for data in parts.values():
            if data.classnames != first.classnames:
                raise DataError(
                    f"{first.name} and {data.name} have different classes, so they can't be one stream. Name data "
                    "sets of the same classes, or leave out protocol.stream."
                )

        attacked = None if config.attack is None else self._attacked(cell, first, folder)
        if attacked is not None:
            parts = dict.fromkeys(parts, attacked.clean)  # one data set, see AdaptationConfig
            first = attacked.clean
        source = self._view_source() if config.generated else None
        adapters = self._adapters(cell, first, source, folder)
        learns_again = config.protocol.orders > 1 or config.protocol.stream.kind == "mixed"
        encoded = EncodedStream(adapters if learns_again else {})
        folders = {name: self._folder(folder, name) for name in parts}
        log.info(
            "%s, seed %d: %d images",
            ", ".join(parts),
            cell["seed"],
            sum(len(data) for data in parts.values()),
        )
        predicted = self._run_stream(adapters, parts, encoded, folders)

        result = CellResult()
        result.facts = {
            "backbone": self.backbone.name,
            "backbone_fingerprint": self.backbone.fingerprint,
            "generated_views": None if source is None else source.made_by,
        }
        for data in parts.values():
            result.facts[f"{data.name}/images"] = len(data)
            result.facts |= {f"{data.name}/{key}": value for key, value in data.fingerprint().items()}

        records = []
        for label, adapter in adapters.items():
            for name, data in parts.items():
                add_scores(result, label, adapter, predicted[name][label], data, name)
                records.append(self._record(cell, label, adapter, predicted[name][label], data, 0))
            add_costs(result, label, adapter, Predictions.cat([predicted[name][label] for name in parts]))
        if attacked is not None:
            self._add_attacked(result, records, adapters, dict.fromkeys(parts, attacked.attacked), folder)
        self._add_orders(result, records, cell, adapters, parts, encoded)
        if config.protocol.stream.kind == "mixed":
            self._add_alone(result, adapters, parts, encoded)

        write_records(folder, records)
        return result

    def _run_stream(
        self,
        adapters: Mapping[str, Adapter],
        parts: Mapping[str, ImageDataset],
        encoded: EncodedStream,
        folders: Mapping[str, Path | None],
    ) -> dict[str, dict[str, Predictions]]:
        """Run methods on the data sets of a stream, one after another; return predictions by data set and label."""
        predictions = {}
        for number, (name, data) in enumerate(parts.items()):
            if number:
                for adapter in adapters.values():
                    if adapter.reset_scope in _UNTIL_NEXT:
                        adapter.reset()

            predictions[name] = adapt_dataset(
                adapters,
                data,
                folder=folders[name],
                batch_size=self.config.data.batch_size,
                encoded=encoded,
                on_bad_image=self.config.data.on_bad_embedding,
                forget=number == 0,
            )
        return predictions

    def _attacked(self, cell: Cell, data: ImageDataset, folder: Path) -> AttackedData:
        """Attack a stream through the classifier that every method starts from."""
        options = self.config.attack
        assert options is not None
        if not isinstance(self.start, Learner):
            learner = create_learner("zero_shot", self.backbone, data.classnames, data.templates)
        elif self.start.classnames == data.classnames:
            learner = self.start
        else:
            learner = self.start.with_classes(data.classnames)

        store = folder / _ATTACKED if options.store is None else Path(options.store)
        log.info("%s: attacking %d images, %d steps each", data.name, len(data), options.steps)
        return attack_dataset(
            data, learner.eval(), options.attack(cell["seed"]), store, batch_size=options.batch_size
        )

    def _add_attacked(
        self,
        result: CellResult,
        records: Sequence[AdaptationRecord],
        adapters: Mapping[str, Adapter],
        stream: Mapping[str, ImageDataset],
        folder: Path,
    ) -> None:
        """Run all methods on the attacked stream, from the beginning, and add robust accuracies."""
        ((name, attacked),) = stream.items()
        predictions = adapt_dataset(
            adapters,
            attacked,
            folder=folder / _ROBUST,
            batch_size=self.config.data.batch_size,
            on_bad_image=self.config.data.on_bad_embedding,
        )
        for record, (label, adapter) in zip(records, adapters.items(), strict=True):
            robust = add_robust(result, label, adapter, predictions[label], attacked, name)
            record.metrics[ROBUST] = robust

    def _add_orders(
        self,
        result: CellResult,
        records: list[AdaptationRecord],
        cell: Cell,
        adapters: Mapping[str, Adapter],
        parts: Mapping[str, ImageDataset],
        encoded: EncodedStream,
    ) -> None:
        """Run what depends on the order again, in other orders of the same images, which are encoded already."""
        again = {label: adapter for label, adapter in adapters.items() if adapter.granularity != "image"}
        if self.config.protocol.orders == 1 or not again:
            return

        accuracies: dict[tuple[str, str], list[float]] = {}
        for record, (label, name) in zip(records, product(adapters, parts), strict=True):
            accuracies[label, name] = [record.metrics["accuracy"]]

        for number in range(1, self.config.protocol.orders):
            streams = {
                name: reordered(data, self.config.protocol.stream, cell["seed"], number)
                for name, data in parts.items()
            }
            predicted = self._run_stream(again, streams, encoded, dict.fromkeys(parts))
            for label, name in product(again, parts):
                record = self._record(
                    cell, label, again[label], predicted[name][label], streams[name], number
                )
                records.append(record)
                accuracies[label, name].append(record.metrics["accuracy"])

        for label, name in product(again, parts):
            add_spread(result, label, accuracies[label, name], adapters[label], name)

    def _add_alone(
        self,
        result: CellResult,
        adapters: Mapping[str, Adapter],
        parts: Mapping[str, ImageDataset],
        encoded: EncodedStream,
    ) -> None:
        """Add how methods do on the known images of a mixed stream alone, in the same order."""
        known = {
            name: data.subset((~intruders_of(data)).nonzero()[:, 0].tolist()) for name, data in parts.items()
        }
        predicted = self._run_stream(adapters, known, encoded, dict.fromkeys(parts))
        for label, name in product(adapters, parts):
            values = scores(predicted[name][label], known[name])
            alone = {"accuracy_alone": values["accuracy"]}
            result.add(alone, method=label, start=start_name(adapters[label]), data=name)

    def _record(
        self,
        cell: Cell,
        label: str,
        adapter: Adapter,
        predictions: Predictions,
        data: ImageDataset,
        number: int,
    ) -> AdaptationRecord:
        """Describe one row (see :class:`AdaptationRecord`)."""
        stream = describe_stream(self.config, data, cell["seed"], number)
        uses = [
            name
            for name in ADAPTERS.get(adapter.method).needs
            if name not in ("text gradients", "image gradients")
        ]
        return make_record(label, adapter, predictions, data, stream, self.config.tuning(label), uses)

    def _adapters(
        self, cell: Cell, data: ImageDataset, source: ViewSource | None, folder: Path
    ) -> dict[str, Adapter]:
        """Build every method for the classes of a data set."""
        adapters = {}
        for label in self.config.methods:
            name, row = self.config.method(label)
            fields = self.config.fields(label)
            options = {"seed": cell["seed"], **row} if "seed" in fields else dict(row)

            if self.config.needs_views(label):
                options["source"] = source
            if self.config.needs_statistics(label):
                options["statistics"] = self._statistics(cell, folder)
            adapters[label] = create_adapter(name, self.start, data.classnames, data.templates, **options)

        return adapters

    def _view_source(self) -> ViewSource:
        """Return where generated views come from."""
        options = self._diffusion
        store = None if options.store is None else ViewStore(options.store)
        generator = self.generator if options.on_the_fly else None
        return ViewSource(generator, store, options.seed)

    def _statistics(self, cell: Cell, folder: Path) -> SourceStatistics:
        """Read what the cell of the source statistics wrote."""
        return SourceStatistics.load(folder.parent / cell.needs[0] / _STATISTICS)

    def _measure_statistics(self, folder: Path) -> CellResult:
        """Measure what the image tower puts out on the training data of the learner."""
        source = self.config.source
        assert source is not None

        if not isinstance(self.start, Learner):
            raise ConfigError(["prompt: source statistics are those of a saved learner."], self.config.name)

        root = self.config.data.root
        data = load_dataset(source.name, source.split, source.shots, source.seed, root=root)
        source_statistics(self.start, data).save(folder / _STATISTICS)

        return CellResult(facts={"source_images": len(data)})

    def _generate_views(self, cell: Cell) -> CellResult:
        """Fill the store with the views of one stream, and measure how much they look like their images."""
        data = draw_stream(self.config, cell["data"], cell["seed"])
        count = self.config.generated
        store = ViewStore(str(self._diffusion.store))
        generator: Generator | None

        try:
            generator = self.generator
        except BackboneError:
            # The store may have been filled on another machine, one that has the pipeline.
            if count_missing(store, data, count):
                raise
            generator = None

        source = ViewSource(generator, store, self._diffusion.seed)
        fill_store(source, data, count)

        result = CellResult()

        checked = min(self._diffusion.checked_images, len(data))
        if checked:
            learner = create_learner("zero_shot", self.backbone, data.classnames, data.templates)
            images = [data[index][0] for index in range(checked)]
            views = [store.get(pixel_key(image), count) for image in images]
            result.add({
                "alike": classified_alike(learner, images, views),
                "alike_blurred": classified_alike(learner, images, views, _BLUR),
            })  # fmt: skip

        return result
