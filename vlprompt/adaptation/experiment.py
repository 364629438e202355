"""Experiments of test-time adaptation: which cells there are, how one is run, and how results are laid out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vlprompt.adaptation import ADAPTERS, Adapter, Predictions, create_adapter, page
from vlprompt.adaptation.config import AdaptationConfig, DiffusionOptions
from vlprompt.adaptation.measure import add_scores, add_spread, make_record, result_accuracy
from vlprompt.adaptation.plans import StreamPlan, order_hash
from vlprompt.adaptation.promptalign import SourceStatistics, source_statistics
from vlprompt.adaptation.record import AdaptationRecord
from vlprompt.adaptation.stored_views import classified_alike, count_missing, fill_store
from vlprompt.adaptation.stream import EncodedStream, adapt_dataset
from vlprompt.adaptation.summary import METRICS, adaptation_tables, headline, summary
from vlprompt.backbones import Backbone
from vlprompt.core.errors import BackboneError, CheckpointError, ConfigError
from vlprompt.core.files import path_fingerprint, write_text
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import derive_seed, numpy_rng
from vlprompt.data import ImageDataset, load_dataset
from vlprompt.data.fingerprint import data_fingerprint, missing_data
from vlprompt.data.images import pixel_key
from vlprompt.diffusion import Generator, ViewSource, ViewStore, create_generator, missing_generator
from vlprompt.experiments.backbone import backbone_sources, build_backbone, missing_backbone
from vlprompt.experiments.cell import Cell, CellResult
from vlprompt.experiments.config import parse_overrides
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.layout import Layout
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Results
from vlprompt.experiments.tables import Table
from vlprompt.learners import Learner, create_learner
from vlprompt.saved.paths import find_prompts
from vlprompt.saved.prompts import load

__all__ = ["AdaptationExperiment", "build", "draw_stream", "reordered"]

log = logging.getLogger("vlprompt.run")

VIEWS, SOURCE = "views", "source"  # stages before the methods run
PREDICTIONS = "predictions"  # folder of a cell
_STATISTICS = "statistics.safetensors"
_BLUR = 0.8  # pixels of the backbone's input
_RECORDS = "records.json"


def build(raw: Mapping[str, Any], overrides: Sequence[str], source: str) -> Experiment:
    """Return the experiment that a configuration of this task describes (see :class:`Build`)."""
    content = parse_overrides(overrides, AdaptationConfig)
    return AdaptationExperiment(AdaptationConfig.parse(raw, content, source))


def draw_stream(config: AdaptationConfig, name: str, seed: int) -> ImageDataset:
    """Return the images of one data set that one seed draws, in the order of the stream."""
    options = config.data
    data = load_dataset(
        name,
        options.split,
        **options.image_arguments(),
        classnames=options.classnames,
        templates=options.templates,
    )
    order = numpy_rng(seed, "stream", name, options.split).permutation(len(data))
    drawn = order[: options.test_images].tolist()

    subset = data.subset(drawn, stream_seed=seed, subset=options.test_images)
    plan = config.protocol.stream
    # The draw has shuffled them already.
    return subset if plan.kind == "iid" else reordered(subset, plan, seed, 0)


def reordered(data: ImageDataset, plan: StreamPlan, seed: int, number: int) -> ImageDataset:
    """Return another order of a stream."""
    order = plan.order(data.labels, derive_seed(seed, "order", number))
    return data.subset(order, order=number)


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

        for name in self.config.data.names:
            for seed in self.config.protocol.seeds:
                cell_needs = list(needs)
                if self.config.fills_store:
                    views = Cell.at(data=name, seed=seed, stage=VIEWS)
                    cells.append(views)
                    cell_needs.append(views.name)
                cells.append(Cell.at(cell_needs, data=name, seed=seed))

        return cells

    def run(self, cell: Cell, folder: Path) -> CellResult:
        """See :meth:`Experiment.run`."""
        if cell.get("stage") == SOURCE:
            return self._measure_statistics(folder)
        if cell.get("stage") == VIEWS:
            return self._generate_views(cell)
        return self._adapt(cell, folder)

    def sketch(self, cell: Cell) -> CellResult:
        """See :meth:`Experiment.sketch`."""
        result = CellResult()
        if cell.get("stage") is None:
            for label in self.config.methods:
                result.sketch(METRICS, method=label)
                result.sketch([f"before_{metric}" for metric in METRICS], method=label)
        return result

    def layout(self) -> Layout:
        """See :meth:`Experiment.layout`."""
        data = self.config.data
        seeds = ", ".join(map(str, self.config.protocol.seeds))
        images = f"{data.test_images} images of each data set" if data.test_images else "all images"
        note = f"Accuracy on {data.split}, {images}, seeds {seeds}; mean and 95 % interval over seeds."
        return Layout(headline(self.config), note=note)

    def sources(self) -> dict[str, str]:
        """See :meth:`Experiment.sources`."""
        config = self.config
        names = list(config.data.names)
        if config.source is not None:
            names.append(config.source.name)
        fingerprints = {name: data_fingerprint(name, config.data.root) for name in names}

        fingerprints |= backbone_sources(config.backbone)
        for path in self._paths():
            fingerprints[path] = path_fingerprint(path)
        return {name: value for name, value in fingerprints.items() if value}

    def missing(self) -> list[str]:
        """See :meth:`Experiment.missing`."""
        config = self.config
        names = list(config.data.names)
        if config.source is not None:
            names.append(config.source.name)
        sentences = [missing_data(name, config.data.root) for name in names]

        sentences += missing_backbone(config.backbone)
        for path in self._paths():
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
            "test_images": config.data.test_images,
            "seeds": config.protocol.seeds,
            "prompt": config.prompt,
        }

    def summary(self, results: Results) -> dict[str, float]:
        """See :meth:`Experiment.summary`."""
        return summary(results, self.config)

    def tables(self, results: Results) -> list[Table]:
        """See :meth:`Experiment.tables`."""
        return adaptation_tables(results, self.config, self.layout())

    def page(self, record: RunRecord, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.page`."""
        page.describe(record, self.config)
        for cell in self.cells():
            path = folder / "cells" / cell.name
            if cell.get("stage") is None and (path / "cell.json").is_file():
                data = draw_stream(self.config, cell["data"], cell["seed"])
                page.add_predictions(record, data, path / PREDICTIONS, next(iter(self.config.methods)))
                return

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

    def _adapt(self, cell: Cell, folder: Path) -> CellResult:
        """Run all methods on one stream; batches that an interrupted attempt wrote are taken as they are."""
        config = self.config
        data = draw_stream(config, cell["data"], cell["seed"])
        source = self._view_source(data) if config.generated else None
        adapters = self._adapters(cell, data, source, folder)
        log.info("%s, seed %d: %d images", data.name, cell["seed"], len(data))
        encoded = EncodedStream(adapters if config.protocol.orders > 1 else {})
        predictions = adapt_dataset(
            adapters,
            data,
            folder=folder / PREDICTIONS,
            batch_size=config.data.batch_size,
            encoded=encoded,
            on_bad_image=config.data.on_bad_embedding,
        )

        result = CellResult()
        result.facts = {
            "backbone": self.backbone.name,
            "backbone_fingerprint": self.backbone.fingerprint,
            "generated_views": None if source is None else source.made_by,
            f"{data.name}/images": len(data),
            **{f"{data.name}/{key}": value for key, value in data.fingerprint().items()},
        }

        records = []
        for label, adapter in adapters.items():
            add_scores(result, label, adapter, predictions[label], data)
            records.append(self._record(cell, label, adapter, predictions[label], data, 0))
        self._add_orders(result, records, cell, adapters, data, encoded)

        write_text(
            folder / _RECORDS,
            json.dumps([record.json() for record in records], indent=1, sort_keys=True) + "\n",
        )
        return result

    def _add_orders(
        self,
        result: CellResult,
        records: list[AdaptationRecord],
        cell: Cell,
        adapters: Mapping[str, Adapter],
        data: ImageDataset,
        encoded: EncodedStream,
    ) -> None:
        """Run what depends on the order again, in other orders of the same images, which are encoded already."""
        again = {label: adapter for label, adapter in adapters.items() if adapter.granularity != "image"}
        if self.config.protocol.orders == 1 or not again:
            return

        accuracies = {label: [result_accuracy(result, label)] for label in again}
        for number in range(1, self.config.protocol.orders):
            stream = reordered(data, self.config.protocol.stream, cell["seed"], number)
            predictions = adapt_dataset(
                again, stream, batch_size=self.config.data.batch_size, encoded=encoded
            )
            for label, adapter in again.items():
                record = self._record(cell, label, adapter, predictions[label], stream, number)
                records.append(record)
                accuracies[label].append(record.metrics["accuracy"])

        for label, values in accuracies.items():
            add_spread(result, label, values, adapters[label])

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
        stream = self.config.protocol.stream.description()
        stream |= {"seed": cell["seed"], "order": number, "count": len(data)}
        stream["images"] = order_hash([str(sample.source) for sample in data.samples])
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
            options = {"seed": cell["seed"], **row}

            if self.config.needs_views(label):
                options["source"] = source
            if self.config.needs_statistics(label):
                options["statistics"] = self._statistics(cell, folder)
            adapters[label] = create_adapter(name, self.start, data.classnames, data.templates, **options)

        return adapters

    def _view_source(self, data: ImageDataset) -> ViewSource:
        """Return where the generated views of a stream come from."""
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

    def _paths(self) -> list[str]:
        """Return the files and folders beside data and backbone that figures depend on."""
        paths = []
        if self.config.prompt is not None:
            try:
                paths += find_prompts([self.config.prompt])
            except CheckpointError:
                paths.append(self.config.prompt)

        for label in self.config.methods:
            _, options = self.config.method(label)
            if options.get("statistics"):
                paths.append(str(options["statistics"]))

        if self.config.diffusion is not None and self.config.generated:
            options = self.config.diffusion.options
            local = [options.get("pipeline"), options.get("weights")]
            paths += [str(path) for path in local if path and user_path(path).exists()]

        return paths
