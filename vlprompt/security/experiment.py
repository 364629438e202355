"""Running a table of scanners: every data set, every seed, every scanner; then the end effect of cleaning.

A run lives in ``<output>/<name>/<id>/``, where the id is a hash of the configuration; ``resume`` keeps finished cells.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.files import write_json, write_text
from vlprompt.core.seeding import numpy_rng
from vlprompt.core.version import package_version
from vlprompt.data import FeatureCache, ImageDataset, load_dataset
from vlprompt.experiments.statistics import Summary, summarise
from vlprompt.experiments.tables import Row, to_markdown
from vlprompt.metrics.backdoor import detection_metrics, judgement_metrics
from vlprompt.security.compositions import composition_dataset
from vlprompt.security.config import DetectorsConfig
from vlprompt.security.effect import attack_success, pixels_of, train_victim
from vlprompt.security.poison import PoisonedDataset, PoisonPlan, poisoned
from vlprompt.security.scanners import Scanner, create_scanner

__all__ = ["DetectorsOutcome", "compare_detectors"]

log = logging.getLogger("vlprompt.security")

_PAIR_COLUMNS = {
    "AUROC seen": "auroc/seen", "AUROC unseen": "auroc/unseen", "FPR at 95 % TPR, seen": "fpr_at_95_tpr/seen",
    "TPR": "tpr", "FPR": "fpr", "trigger named": "trigger_accuracy", "object, clean": "object_accuracy_clean",
    "object, triggered": "object_accuracy_triggered", "HM": "best_hm", "AUC": "auc",
}  # fmt: skip
_SUSPECT_COLUMNS = {"AUROC": "suspect/auroc", "found": "suspect/tpr", "false alarms": "suspect/fpr"}


@dataclass(frozen=True)
class DetectorsOutcome:
    """What a run produced.

    Attributes:
        folder: Holds ``config.yaml``, ``metrics.json``, ``results.md`` and ``cells.json``.
        metrics: The content of ``metrics.json``.
        table: The tables, Markdown.
    """

    folder: Path
    metrics: dict[str, Any]
    table: str


def compare_detectors(config: DetectorsConfig, resume: bool = False) -> DetectorsOutcome:
    """Fit and test every scanner on every data set and seed, and write what was measured.

    Args:
        config: See :meth:`DetectorsConfig.read`.
        resume: Keep finished cells.

    Raises:
        VLPromptError: If anything the configuration names can't be had; finished cells are kept.
    """
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    folder = Path(config.output) / config.name / hashlib.sha256(text.encode()).hexdigest()[:8]
    if folder.exists() and not resume:
        shutil.rmtree(folder)
    write_text(folder / "config.yaml", f"# vlprompt {package_version()}\n{text}")
    backbone = create_backbone(config.backbone.name, **config.backbone.arguments())
    backbone = backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        cache = FeatureCache(config.cache_dir or scratch)  # on disk, so that trained scanners share it too
        for name in config.data:
            for seed in config.seeds:
                path = (
                    folder / "cells" / f"{''.join(c if c.isalnum() else '-' for c in name)}-seed{seed}.json"
                )
                if path.is_file():
                    found = json.loads(path.read_text(encoding="utf-8"))
                else:
                    log.info("%s, seed %d", name, seed)
                    found = {}
                    for each in (config, *map(config.varied, config.variants)):
                        found |= _Cell(each, backbone, name, seed, cache).run()
                    write_json(path, found)
                cells.append({"data": name, "seed": seed, "figures": found})
    metrics = {
        **_summary(config, cells),
        "protocol": "detection",
        "data": config.data,
        "split": config.split,
        "seeds": config.seeds,
        "triggers": config.pairs.triggers,
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "vlprompt": package_version(),
        "torch": torch.__version__,
    }
    table = _tables(config, cells)
    write_json(folder / "metrics.json", metrics)
    write_text(folder / "results.md", table)
    return DetectorsOutcome(folder, metrics, table)


@dataclass(frozen=True)
class _Verdicts:
    """What a scanner says of n suspects: (n,) whether each is poisoned, and (n,) the object it names, if it does."""

    suspected: Tensor
    named: Tensor | None


class _Cell:
    """One data set and one seed."""

    def __init__(
        self, config: DetectorsConfig, backbone: Backbone, name: str, seed: int, cache: FeatureCache
    ) -> None:
        self.config, self.backbone, self.name, self.seed, self.cache = config, backbone, name, seed, cache
        train = load_dataset(name, "train")
        self.own, self.rest = _cut(train, config.pairs.share, seed)
        options = config.pairs
        self.train, self.val, self.test = (
            composition_dataset(
                data,
                options.triggers,
                size=options.native_size,
                unseen=options.unseen,
                seed=seed,
                copies=copies,
            )
            for data, copies in (
                (self.own, options.copies),
                (load_dataset(name, "val"), 1),
                (load_dataset(name, config.split), 1),
            )
        )

    def run(self) -> dict[str, dict[str, float]]:
        """Return figures by scanner label, and of victims by the set they were trained on."""
        figures: dict[str, dict[str, float]] = {}
        suspects = self._suspects()
        verdicts: dict[str, _Verdicts] = {}
        for label in self.config.detectors:
            method, options = self.config.method(label)
            scanner = create_scanner(
                method, self.backbone, self.train.classnames, self.train.triggers, **options
            )
            scanner.fit(self.train, self.val, self.cache, self.seed)
            figures[label] = {} if scanner.whole else self._on_pairs(scanner)
            if suspects is not None:
                figures[label] |= self._on_suspects(scanner, suspects, verdicts, label)
        if suspects is not None:
            figures |= self._victims(suspects, verdicts)
        return figures

    def _on_pairs(self, scanner: Scanner) -> dict[str, float]:
        judged = scanner.judge(scanner.rows(self.test, self.cache))
        return judgement_metrics(judged, self.test, scanner.threshold)

    def _suspects(self) -> PoisonedDataset | None:
        options = self.config.suspect
        if options is None:
            return None
        plan = {
            "triggers": self.config.pairs.triggers[1:], "rate": options.rate, "mode": options.mode,
            "target": options.target, "size": self.config.pairs.native_size, "seed": self.seed,
        }  # fmt: skip
        self.plan = PoisonPlan.parse(plan, "suspect")
        return poisoned(self.rest, self.plan)

    def _on_suspects(
        self, scanner: Scanner, suspects: PoisonedDataset, verdicts: dict[str, _Verdicts], label: str
    ) -> dict[str, float]:
        rows = scanner.rows(suspects, self.cache)
        judged = scanner.judge_set(rows, torch.tensor(suspects.labels))
        score, named = judged.score, None if judged.object is None else judged.object.argmax(1)
        verdicts[label] = _Verdicts(score >= scanner.threshold, named)
        trigger = torch.tensor(suspects.targets["trigger"])
        if not bool((trigger > 0).any()):
            return {}
        found = detection_metrics(
            score, trigger, torch.ones(len(trigger), dtype=torch.bool), scanner.threshold
        )
        return {f"suspect/{k}": v for k, v in found.items() if "/" not in k}

    def _victims(
        self, suspects: PoisonedDataset, verdicts: Mapping[str, _Verdicts]
    ) -> dict[str, dict[str, float]]:
        """Train a victim on the set as it is, on each cleaned one, on what faultless cleaning leaves, on a clean one.

        A scanner that names objects also mends: what it suspects stays, labelled with the object that it names.
        A clean victim may well take a triggered image for the target too: ``attack_gain`` is what the attack adds.
        """
        options = self.config.suspect
        assert options is not None
        pixels, given = pixels_of(suspects), torch.tensor(suspects.labels)
        innocent = poisoned(self.rest, self.plan.model_copy(update={"rate": 0.0}))
        sets = {"victim of the poisoned set": (pixels, given)}
        for label in options.cleaners:
            suspected, named = verdicts[label].suspected, verdicts[label].named
            sets[f"victim of the set cleaned by {label}"] = (pixels[~suspected], given[~suspected])
            if named is not None:
                sets[f"victim of the set mended by {label}"] = (pixels, torch.where(suspected, named, given))
        spared = torch.tensor(suspects.targets["trigger"]) == 0
        sets["victim of a perfectly cleaned set"] = (pixels[spared], given[spared])
        sets["victim of a clean set"] = (pixels_of(innocent), torch.tensor(innocent.labels))
        test = load_dataset(self.name, self.config.split)
        figures = {}
        for what, (images, labels) in sets.items():
            victim = train_victim(images, labels, len(test.classnames), epochs=options.epochs, seed=self.seed)
            figures[what] = {**attack_success(victim, test, self.plan), "images": float(len(labels))}
        innocent_success = figures["victim of a clean set"]["attack_success"]
        return {k: {**f, "attack_gain": f["attack_success"] - innocent_success} for k, f in figures.items()}


def _cut(data: ImageDataset, share: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Cut a data set in two per class: what scanners learn from, and the rest."""
    labels = np.array(data.labels)
    first: list[int] = []
    for label in range(len(data.classnames)):
        rows = np.flatnonzero(labels == label)
        order = numpy_rng(seed, "detection", data.name, label).permutation(rows)
        first += order[: max(1, round(share * len(rows)))].tolist()
    rest = sorted(set(range(len(data))) - set(first))
    return data.subset(sorted(first)), data.subset(rest)


def _values(cells: Sequence[Mapping[str, Any]], name: str, label: str, key: str) -> list[float]:
    found = [c["figures"].get(label, {}) for c in cells if c["data"] == name]
    return [f[key] for f in found if key in f]


def _summary(config: DetectorsConfig, cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return flat figures, the mean over seeds with its spread."""
    flat: dict[str, float] = {}
    for name in config.data:
        labels = dict.fromkeys(label for c in cells if c["data"] == name for label in c["figures"])
        for label in labels:
            keys = dict.fromkeys(k for c in cells if c["data"] == name for k in c["figures"].get(label, {}))
            for key in keys:
                flat |= summarise(_values(cells, name, label, key)).flat(f"{name}/{label}/{key}")
    return flat


def _tables(config: DetectorsConfig, cells: Sequence[Mapping[str, Any]]) -> str:
    seeds = ", ".join(map(str, config.seeds))
    text = [f"Percent, {config.split} split, seeds {seeds}; mean and 95 % interval over seeds.\n"]
    for name in config.data:
        triggers = {f"AUROC {t}": f"auroc/{t}" for t in config.pairs.triggers[1:]}
        objects = {f"object {t}": f"object_accuracy/{t}" for t in config.pairs.triggers[1:]}
        columns = {
            "on images it never saw, some of pairs it never saw": _PAIR_COLUMNS,
            "one trigger at a time": {**triggers, **objects},
        }
        if config.suspect is not None:
            columns["on the suspected set"] = _SUSPECT_COLUMNS
        for what, keys in columns.items():
            rows = [_row(cells, name, label, keys) for label in config.labels()]
            text.append(f"{name}, {what}:\n\n{to_markdown([r for r in rows if r.values], best=False)}")
        victims = [v for v in cells[-1]["figures"] if v not in config.labels()]
        if victims:
            shown = [
                "accuracy",
                "attack_success",
                "attack_gain",
                *(f"attack_success/{t}" for t in config.pairs.triggers[1:]),
            ]
            keys = {
                k.replace("attack_success", "attack").replace("/", " ").replace("_", " "): k for k in shown
            }
            text.append(
                f"{name}, the end effect:\n\n"
                + to_markdown([_row(cells, name, v, keys) for v in victims], best=False)
            )
    return "\n".join(text)


def _row(cells: Sequence[Mapping[str, Any]], name: str, label: str, keys: Mapping[str, str]) -> Row:
    values: dict[str, float | Summary] = {}
    for column, key in keys.items():
        if found := _values(cells, name, label, key):
            values[column] = summarise(found)
    return Row(label, values)
