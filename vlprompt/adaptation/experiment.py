"""Running a configuration of test-time adaptation: every data set, every seed, every method; then the figures.

A run lives in ``<output>/<name>/<id>/``, where the id is a hash of the configuration; ``resume`` continues behind
the last batch that was written.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from vlprompt.adaptation import ADAPTERS, Adapter, Predictions, create_adapter
from vlprompt.adaptation.config import AdaptConfig
from vlprompt.adaptation.promptalign import source_statistics
from vlprompt.adaptation.stream import adapt_dataset
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import ConfigError
from vlprompt.core.files import write_json, write_text
from vlprompt.core.options import options_model
from vlprompt.core.seeding import numpy_rng
from vlprompt.core.version import package_version
from vlprompt.data import ImageDataset, load_dataset
from vlprompt.diffusion import ViewSource, ViewStore, create_generator
from vlprompt.experiments.statistics import Summary, paired_difference, summarise
from vlprompt.experiments.tables import Row, to_markdown
from vlprompt.learners import Learner
from vlprompt.metrics.classification import compute
from vlprompt.saved.prompts import load

__all__ = ["AdaptOutcome", "draw_stream", "run_adaptation", "view_source"]

log = logging.getLogger("vlprompt.adapt")

_METRICS = ("accuracy", "mean_per_class", "ece")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AdaptOutcome:
    """What a run produced.

    Attributes:
        folder: Holds ``config.yaml``, ``metrics.json``, ``results.md`` and the predictions.
        metrics: The content of ``metrics.json``.
        table: Accuracy by method and data set, Markdown.
    """

    folder: Path
    metrics: dict[str, Any]
    table: str


def run_adaptation(
    config: AdaptConfig, resume: bool = False, progress: Progress | None = None
) -> AdaptOutcome:
    """Run every seed of every data set and write what was measured.

    Args:
        config: See :meth:`AdaptConfig.read`.
        resume: Keep what was done before.
        progress: Called with (what, done, n).

    Raises:
        VLPromptError: If anything the configuration names can't be had; finished batches are kept.
    """
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    folder = Path(config.output) / config.name / hashlib.sha256(text.encode()).hexdigest()[:8]
    if folder.exists() and not resume:
        shutil.rmtree(folder)
    write_text(folder / "config.yaml", f"# vlprompt {package_version()}\n{text}")
    session = _Session(config)
    cells: list[dict[str, Any]] = []
    for name in config.data.names:
        for seed in config.seeds:
            data = draw_stream(config, name, seed)
            log.info("%s, seed %d: %d images", name, seed, len(data))
            adapters = session.adapters(data, seed)
            place = folder / "predictions" / f"{_slug(name)}-seed{seed}"
            step = None if progress is None else _named(progress, f"{name}, seed {seed}")
            found = adapt_dataset(adapters, data, folder=place, batch_size=config.batch_size, progress=step)
            for label, predictions in found.items():
                cells.append(_cell(label, adapters[label], predictions, data, seed))
            write_json(folder / "cells.json", cells)
    metrics = {**_summary(config, cells), **session.record(config), "cells": cells}
    write_json(folder / "metrics.json", metrics)
    table = _table(config, cells)
    write_text(folder / "results.md", table)
    return AdaptOutcome(folder, metrics, table)


def draw_stream(config: AdaptConfig, name: str, seed: int) -> ImageDataset:
    """Return the images of one data set that one seed draws, in the order of the stream."""
    options = config.data
    data = load_dataset(
        name,
        options.split,
        root=options.root,
        on_bad_image=options.on_bad_image,
        classnames=options.classnames,
        templates=options.templates,
    )
    order = numpy_rng(seed, "stream", name, options.split).permutation(len(data))
    return data.subset(order[: options.subset].tolist(), stream_seed=seed, subset=options.subset)


def view_source(config: AdaptConfig, generate: bool) -> ViewSource:
    """Return where a configuration's generated views come from.

    Args:
        config: With a ``diffusion`` section.
        generate: Make what is missing; else the store must hold it.

    Raises:
        BackboneError: If the pipeline can't be had.
        CheckpointError: If the store is another generator's.
    """
    options = config.diffusion
    assert options is not None
    generator = create_generator(options.generator, **options.options) if generate else None
    store = None if options.store is None else ViewStore(options.store)
    return ViewSource(generator, store, options.seed)


class _Session:
    """What a run builds once: the backbone or learner, the source of generated views, source statistics."""

    def __init__(self, config: AdaptConfig) -> None:
        self.config = config
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backbone: Backbone = create_backbone(config.backbone.name, **_without_name(config)).to(device)
        self.start: Backbone | Learner = backbone
        if config.prompt is not None:
            self.start = load(config.prompt, backbone).to(device)
        self.backbone = backbone
        self.source = view_source(config, config.diffusion.on_the_fly) if config.diffusion else None
        self.statistics: Any = None

    def adapters(self, data: ImageDataset, seed: int) -> dict[str, Adapter]:
        """Build every method for a data set's classes; a seed that isn't given is the run's."""
        built = {}
        for label in self.config.adapters:
            name, given = self.config.method(label)
            fields = options_model(ADAPTERS.get(name).target).model_fields
            options = {"seed": seed, **given}
            if "source" in fields:
                options["source"] = self.source
            if "statistics" in fields and "statistics" not in given:
                options["statistics"] = self._source_statistics()
            built[label] = create_adapter(name, self.start, data.classnames, data.templates, **options)
        return built

    def _source_statistics(self) -> Any:
        source = self.config.source
        if source is None or not isinstance(self.start, Learner):
            raise ConfigError(
                ["prompt: promptalign starts from a learner with visual prompts."], self.config.name
            )
        if self.statistics is None:
            data = load_dataset(
                source.name, source.split, source.shots, source.seed, root=self.config.data.root
            )
            self.statistics = source_statistics(self.start, data)
        return self.statistics

    def record(self, config: AdaptConfig) -> dict[str, Any]:
        """Return what the figures were measured under."""
        return {
            "protocol": "test-time-adaptation",
            "data": config.data.names,
            "split": config.data.split,
            "subset": config.data.subset,
            "seeds": config.seeds,
            "prompt": config.prompt,
            "generated_views": None if self.source is None else self.source.made_by,
            "backbone": self.backbone.name,
            "backbone_fingerprint": self.backbone.fingerprint,
            "vlprompt": package_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


def _cell(label: str, adapter: Adapter, found: Predictions, data: ImageDataset, seed: int) -> dict[str, Any]:
    """Return one method's figures on one data set and seed, with all they depend on."""
    labels = torch.tensor(data.labels)
    after = compute(found.probs.log(), labels, _METRICS)
    before = compute(found.before.log(), labels, _METRICS)
    generation, encoding, adaptation = found.seconds.mean(0).tolist()
    return {
        "label": label,
        "method": adapter.method,
        "start": adapter.learner.method,
        "data": data.name,
        "seed": seed,
        "images": len(data),
        **{k: round(v, 6) for k, v in after.items()},
        **{f"before_{k}": round(v, 6) for k, v in before.items()},
        "options": _plain(adapter),
        "optimizer": adapter.optimizer or None,
        "views": found.kept.shape[1],
        "views_kept": float(found.views_kept.float().mean()),
        "episodic": adapter.episodic,
        "stream_seed": seed,
        **data.fingerprint(),
        "seconds_per_image": {"generation": generation, "encoding": encoding, "adaptation": adaptation},
    }


def _plain(adapter: Adapter) -> dict[str, Any]:
    """Return the options an adapter runs with, defaults included, where JSON can hold them."""
    fields = options_model(type(adapter)).model_fields
    defaults = {name: field.default for name, field in fields.items()}
    held = {**defaults, **adapter.options}
    return {n: v for n, v in held.items() if isinstance(v, (str, int, float, bool, list, tuple, type(None)))}


def _summary(config: AdaptConfig, cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return flat figures: per method and data set the mean over seeds, paired gains over its start, averages."""
    flat: dict[str, float] = {}
    for label in config.adapters:
        for name in [*config.data.names, *(["average"] if len(config.data.names) > 1 else [])]:
            for metric in _METRICS:
                after, before = (_by_seed(config, cells, label, name, p + metric) for p in ("", "before_"))
                flat |= summarise(after).flat(f"{label}/{name}/{metric}")
                flat |= summarise(before).flat(f"{label}/{name}/before_{metric}")
                flat |= paired_difference(after, before).flat(f"{label}/{name}/{metric}_gain")
    return flat


def _by_seed(
    config: AdaptConfig, cells: Sequence[Mapping[str, Any]], label: str, name: str, key: str
) -> list[float]:
    """Return a figure's value of every seed; the mean over data sets where ``name`` is ``"average"``."""
    return [
        float(np.mean([
            c[key] for c in cells if c["label"] == label and c["seed"] == seed and name in (c["data"], "average")
        ]))
        for seed in config.seeds
    ]  # fmt: skip


def _table(config: AdaptConfig, cells: Sequence[Mapping[str, Any]]) -> str:
    names = [*config.data.names, *(["average"] if len(config.data.names) > 1 else [])]
    rows = []
    starts: list[str] = []
    for label in config.adapters:
        start = next(c["start"] for c in cells if c["label"] == label)
        if start not in starts:
            starts.append(start)
            values = {n: summarise(_by_seed(config, cells, label, n, "before_accuracy")) for n in names}
            rows.append(Row(f"without adaptation ({start})", dict(values)))
    for label in config.adapters:
        rows.append(Row(label, {n: summarise(_by_seed(config, cells, label, n, "accuracy")) for n in names}))
    gains = [Row(label, _gains(config, cells, label, names)) for label in config.adapters]
    subset = "all images" if config.data.subset is None else f"{config.data.subset} images of each data set"
    return (
        f"Accuracy on {config.data.split}, {subset}, seeds {', '.join(map(str, config.seeds))}; mean and 95 % interval "
        f"over seeds.\n\n{to_markdown(rows)}\nGain over the same classifier without adaptation, in points, paired over "
        f"seeds:\n\n{to_markdown(gains, best=False)}"
    )


def _gains(
    config: AdaptConfig, cells: Sequence[Mapping[str, Any]], label: str, names: Sequence[str]
) -> dict[str, float | Summary]:
    return {
        n: paired_difference(
            _by_seed(config, cells, label, n, "accuracy"),
            _by_seed(config, cells, label, n, "before_accuracy"),
        )
        for n in names
    }


def _without_name(config: AdaptConfig) -> dict[str, Any]:
    return {k: v for k, v in config.backbone.arguments().items() if k != "name"}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
