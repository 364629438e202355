"""Experiments of personalised generation: every method learns every concept, and is scored on images of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image

from vlprompt.backbones import Backbone, missing_weights
from vlprompt.core.errors import DataError
from vlprompt.core.files import path_fingerprint, write_atomic, write_json, write_jsonl, write_text
from vlprompt.core.options import options_model
from vlprompt.core.paths import user_path
from vlprompt.data.decoding import read_image
from vlprompt.data.listing import list_images
from vlprompt.data.scenes.concepts import SceneConcept, scene_concepts
from vlprompt.diffusion.tiny import TinyDiffusion
from vlprompt.experiments.backbone import build_backbone
from vlprompt.experiments.cell import Cell, CellResult
from vlprompt.experiments.config import parse_overrides
from vlprompt.experiments.experiment import Experiment, FinishedRun, joint_methods
from vlprompt.experiments.figures import curves
from vlprompt.experiments.layout import Layout, tabulate
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Line, Results
from vlprompt.experiments.statistics import summarise
from vlprompt.experiments.tables import Table
from vlprompt.generation import PERSONALISERS
from vlprompt.generation.base import Personaliser
from vlprompt.generation.config import FolderConcept, GenerationConfig, HostOptions, Method
from vlprompt.generation.grid import grid_svg, sheet
from vlprompt.generation.hosts import Host, TinyHost
from vlprompt.generation.personalise import personalise
from vlprompt.generation.race import Clock, Race, arrivals, races_of, timing_figures, timing_table
from vlprompt.generation.stable import StableHost

__all__ = ["GenerationExperiment", "build", "create_host"]


def build(raw: Mapping[str, Any], overrides: Sequence[str], source: str) -> Experiment:
    """Return the experiment that a configuration of this task describes (see :class:`Build`)."""
    content = parse_overrides(overrides, GenerationConfig)
    return GenerationExperiment(GenerationConfig.parse(raw, content, source))


def create_host(options: HostOptions) -> Host:
    """Return the frozen model of a configuration.

    Raises:
        BackboneError: If its weights or a package can't be had; says what to do.
    """
    if options.kind == "stable-diffusion":
        assert options.pipeline is not None
        return StableHost(options.pipeline, options.revision, options.steps, options.guidance, options.device)

    generator = TinyDiffusion(
        steps=options.steps, guidance=options.guidance, weights=options.weights, device=options.device
    )
    return TinyHost(generator)


class GenerationExperiment(Experiment):
    """A cell for each concept, seed and method.

    A cell leaves ``concept.safetensors``, ``history.jsonl``, ``seconds.json`` and ``samples/*.png`` in its folder. Its
    measurements are similarities, with the step they were measured at as a further coordinate.
    """

    config: GenerationConfig
    on_validation: ClassVar[tuple[str, ...]] = ("data.split=val",)

    @cached_property
    def host(self) -> Host:
        """The frozen model that all cells share."""
        return create_host(self.config.host)

    @cached_property
    def scorer(self) -> Backbone:
        """The backbone that similarity is measured in."""
        return build_backbone(self.config.scorer)

    @cached_property
    def concepts(self) -> dict[str, SceneConcept]:
        """Name to images.

        Raises:
            DataError: If a folder has too few.
        """
        data = self.config.data
        if not data.folders:
            drawn = scene_concepts(data.concepts, data.split, data.images, data.held_out)
            return {concept.name: concept for concept in drawn}
        return {name: read_concept(name, folder) for name, folder in data.folders.items()}

    def cells(self) -> list[Cell]:
        """See :meth:`Experiment.cells`."""
        cells = []
        for concept in self.config.data.names():
            for seed in self.config.protocol.seeds:
                for method in self.config.methods:
                    cells.append(Cell.at(method=method, concept=concept, seed=seed))
        return cells

    def run(self, cell: Cell, folder: Path) -> CellResult:
        """See :meth:`Experiment.run`."""
        concept = self.concepts[cell["concept"]]
        method = self.config.method(cell["method"])
        seed = cell["seed"]
        similarity = _Similarity(concept, self.host, self.scorer, self.config.samples, seed)

        learned = personalise(
            self.host,
            concept.images,
            concept.word,
            method.name,
            train=self.config.train_options(method.label, seed),
            options=_seeded_options(method, seed),
            watch=similarity,
            folder=folder,
            resume=True,
        )
        try:
            learned.module.to_concepts([concept.name]).save(folder / "concept.safetensors")
            samples = similarity.draw(learned.module)
        finally:
            # Other cells share the host: they must find it as it was.
            learned.module.unfrozen.restore()

        write_jsonl(folder / "history.jsonl", learned.history)
        for number, sample in enumerate(samples[: len(concept.images)]):
            _write_png(folder / "samples" / f"{number}.png", sample)

        result = CellResult(facts={"host": self.host.identity, "scorer": self.scorer.fingerprint["id"]})
        for record in learned.history:
            result.add({"similarity": record["similarity"]}, step=int(record["step"]))
        result.timings = {"start": learned.start, "training": learned.seconds}
        return result

    def sketch(self, cell: Cell) -> CellResult:
        """See :meth:`Experiment.sketch`."""
        result = CellResult()
        result.sketch(("similarity",), step=0)
        return result

    def layout(self) -> Layout:
        """See :meth:`Experiment.layout`."""
        methods = list(self.config.methods)
        baseline = self.config.baseline
        return Layout(
            headline=f"{methods[-1]}/best",
            metric="similarity",
            columns=("measure",),
            over="repetition",
            average="",
            baselines={method: (baseline,) for method in methods if method != baseline},
        )

    def sources(self) -> dict[str, str]:
        """See :meth:`Experiment.sources`."""
        return {path: path_fingerprint(path) for path in self.config.paths()}

    def missing(self) -> list[str]:
        """See :meth:`Experiment.missing`."""
        config = self.config
        sentences = [f"{path} does not exist." for path in config.paths() if not user_path(path).exists()]

        pipeline = config.host.pipeline
        if pipeline is not None and not user_path(pipeline).exists():
            cached = try_to_load_from_cache(pipeline, "model_index.json", revision=config.host.revision)
            if not isinstance(cached, str):
                sentences.append(
                    f"the pipeline {pipeline!r} is not on this machine; the first run fetches it."
                )

        weights = missing_weights(config.scorer.name, config.scorer.pretrained, config.scorer.cache_dir)
        return sentences if weights is None else [*sentences, weights]

    def facts(self) -> dict[str, Any]:
        """See :meth:`Experiment.facts`."""
        config = self.config
        return {
            "protocol": config.protocol.name,
            "concepts": config.data.names(),
            "baseline": config.baseline,
            "seeds": config.protocol.seeds,
        }

    def figures(self) -> list[str]:
        """See :meth:`Experiment.figures`; whether a method ever gets where the baseline was can't be foretold."""
        return [key for key in super().figures() if not key.endswith("/steps")]

    def summary(self, results: Results) -> dict[str, float]:
        """See :meth:`Experiment.summary`.

        ``<method>/first``, ``/best`` and ``/last``: similarities before the first step, at the best one and in the
        end; means over concepts, with intervals over seeds. ``/arrived``: in how many races the method reaches the
        baseline's best similarity; ``/steps``: after how many steps, on average over these.
        """
        races = self._races(results)
        figures: dict[str, float] = {}

        for method in self.config.methods if races else ():
            for measure in ("first", "best", "last"):
                by_seed = [
                    summarise([_measure(race, measure, method) for race in races if race.seed == seed]).mean
                    for seed in dict.fromkeys(race.seed for race in races)
                ]
                figures |= summarise(by_seed).flat(f"{method}/{measure}")

            both = arrivals(races, method, self.config.baseline)
            figures[f"{method}/arrived"] = float(len(both))

            if both:
                figures[f"{method}/steps"] = summarise([step for _, step, _ in both]).mean

        return figures

    def tables(self, results: Results) -> list[Table]:
        """See :meth:`Experiment.tables`: similarities, with intervals and paired gains over concepts and seeds."""
        lines = []
        columns = {"first": "at the start", "best": "best", "last": "at the end"}

        for race in self._races(results):
            repetition = f"{race.concept}, seed {race.seed}"
            for method in self.config.methods:
                for measure, column in columns.items():
                    where = {"method": method, "measure": column, "repetition": repetition}
                    lines.append(Line(where, "similarity", _measure(race, measure, method)))

        tables = tabulate(Results(lines), self.layout())
        if tables:
            first = tables[0]
            tables[0] = Table(first.rows, first.columns, "Similarity", self._note(results))

        return tables

    def kind(self) -> str:
        """See :meth:`Experiment.kind`: the concepts and seeds, since a method races against others on the same ones."""
        return f"{super().kind()}: {', '.join(self.config.data.names())}, seeds {self.config.protocol.seeds}"

    def common_tables(self, results: Results, runs: Sequence[FinishedRun]) -> list[Table]:
        """See :meth:`Experiment.common_tables`: the methods of all runs."""
        protocol = self.config.protocol.model_copy(update={"baseline": runs[0].label(self.config.baseline)})
        config = self.config.model_copy(update={"methods": joint_methods(runs), "protocol": protocol})
        return GenerationExperiment(config).tables(results)

    def page(self, record: RunRecord, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.page`."""
        races = self._races(results)
        host = self.config.host
        record.title = f"Personalised generation with {host.pipeline or host.kind}"
        concepts = len(self.config.data.names())
        record.summary = f"{concepts} concepts; similarity of image features by {self.config.scorer.name}."

        if races:
            record.headline = {
                method: summarise([race.best(method) for race in races]).mean
                for method in self.config.methods
            }

        titles = ["learned from", *self.config.methods]
        drawings = {"Samples": (" | ".join(titles), grid_svg(self._samples(folder), titles))}
        text = "Similarity of drawn images to images of the concept that no search saw."

        for race in races:
            several = f", seed {race.seed}" if len(self.config.protocol.seeds) > 1 else ""
            drawings[f"{race.concept}{several}: similarity by step"] = (
                text,
                curves(race.curves, "step", "similarity"),
            )

        record.drawings = drawings

    def write_files(self, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.write_files`: ``samples.png``, ``timings.json`` and ``timings.md``."""
        page = sheet(self._samples(folder))
        _write_png(folder / "samples.png", page)

        races = self._races(results)
        if races:
            methods = list(self.config.methods)
            figures = timing_figures(races, methods, self.config.baseline, self._clocks(races, folder))
            write_json(folder / "timings.json", figures)
            write_text(folder / "timings.md", timing_table(figures, self.config.baseline))

    def _races(self, results: Results) -> list[Race]:
        return races_of(results, list(self.config.methods))

    def _note(self, results: Results) -> str:
        """Say what is compared, and after how many steps each method reaches the baseline's best."""
        races = self._races(results)
        baseline = self.config.baseline
        parts = []

        for method in self.config.methods:
            both = arrivals(races, method, baseline)
            steps = f"{summarise([step for _, step, _ in both]).mean:.0f} steps" if both else "never"
            count = "" if len(both) == len(races) else f" ({len(both)} of {len(races)})"
            parts.append(f"{method} {steps}{count}")

        return (
            f"Means over {len(races)} concepts and seeds (± 95 % interval). To the best similarity of {baseline}: "
            f"{', '.join(parts)}."
        )

    def _clocks(self, races: Sequence[Race], folder: Path) -> dict[tuple[str, str, int], Clock]:
        """Return the clock of every cell of the races."""
        clocks: dict[tuple[str, str, int], Clock] = {}
        for race in races:
            for method in self.config.methods:
                cell = Cell.at(method=method, concept=race.concept, seed=race.seed)
                path = folder / "cells" / cell.name / "seconds.json"
                seconds = json.loads(path.read_text(encoding="utf-8"))
                clocks[method, race.concept, race.seed] = {
                    int(step): value for step, value in seconds.items()
                }

        return clocks

    def _samples(self, folder: Path) -> dict[str, list[list[Image.Image]]]:
        """Return, for each concept, the images it is learned from and those that each method draws (first seed)."""
        rows: dict[str, list[list[Image.Image]]] = {}
        for name, concept in self.concepts.items():
            rows[name] = [list(concept.images)]
            for method in self.config.methods:
                cell = Cell.at(method=method, concept=name, seed=self.config.protocol.seeds[0])
                paths = (folder / "cells" / cell.name / "samples").glob("*.png")
                rows[name].append([read_image(path) for path in sorted(paths)])

        return rows


class _Similarity:
    """Mean cosine of image features between samples of a concept and images of it that no search saw.

    Args:
        concept: Its held-out images are compared with; those it is learned from if there are none.
        host: Draws the samples.
        scorer: Encodes all images.
        samples: How many are drawn.
        seed: Of the samples.
    """

    def __init__(self, concept: SceneConcept, host: Host, scorer: Backbone, samples: int, seed: int) -> None:
        self.host = host
        self.scorer = scorer
        self.samples = samples
        self.seed = seed
        self.true_features = self._features(concept.held_out or concept.images)

    def __call__(self, module: Personaliser) -> Mapping[str, float]:
        """Return ``similarity``."""
        features = self._features(self.draw(module))
        return {"similarity": float((features @ self.true_features.T).mean())}

    def draw(self, module: Personaliser) -> list[Image.Image]:
        """Return the samples."""
        with torch.no_grad():
            return self.host.draw(module.context(), self.samples, self.seed)

    def _features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the (n, d) unit features of n images."""
        return self.scorer.encode_image(torch.stack([self.scorer.preprocess(image) for image in images]))


def read_concept(name: str, section: FolderConcept) -> SceneConcept:
    """Read a concept from its folder: the last images by name are held out.

    Args:
        name: Of the concept.
        section: Folder, word, and how many are held out.

    Raises:
        DataError: If no image would be left to learn from.
    """
    folder = user_path(section.folder)
    if not folder.is_dir():
        raise DataError(f"data.folders.{name}: there is no folder {str(folder)!r}.")
    paths = [folder / image for image in list_images(folder, folder) if "/" not in image]
    if len(paths) <= section.held_out:
        raise DataError(
            f"data.folders.{name}: {section.folder} has {len(paths)} images, and {section.held_out} are held out."
        )

    images = tuple(map(read_image, paths))
    cut = len(images) - section.held_out
    return SceneConcept(name, section.word, images[:cut], images[cut:])


def _seeded_options(method: Method, seed: int) -> dict[str, Any]:
    """Return a method's options, with the cell's seed where it takes one and the configuration sets none."""
    fields = options_model(PERSONALISERS.get(method.name).target).model_fields
    if "seed" in fields and "seed" not in method.options:
        return {**method.options, "seed": seed}
    return method.options


def _measure(race: Race, measure: str, method: str) -> float:
    measures = {"first": race.first, "best": race.best, "last": race.last}
    return measures[measure](method)


def _write_png(path: Path, image: Image.Image) -> None:
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG"))
