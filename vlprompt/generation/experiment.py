"""Running a configuration of personalised generation: every concept, every method; then table, files and report."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import DataError
from vlprompt.core.files import write_atomic, write_json, write_text
from vlprompt.data.images import EXTENSIONS, read_image
from vlprompt.data.scenes.concepts import SceneConcept, scene_concepts
from vlprompt.experiments.old_folder import environment, open_folder
from vlprompt.experiments.report import RunRecord, write_report
from vlprompt.generation.base import Personaliser
from vlprompt.generation.config import PersonaliseConfig
from vlprompt.generation.grid import grid_svg, sheet
from vlprompt.generation.hosts import Host, TinyHost
from vlprompt.generation.personalise import personalise
from vlprompt.generation.race import Race, summary_table

__all__ = ["PersonaliseOutcome", "create_host", "run_personalisation"]

log = logging.getLogger("vlprompt.personalise")


@dataclass(frozen=True)
class PersonaliseOutcome:
    """What a run produced.

    Attributes:
        folder: Holds ``concepts/*.safetensors``, ``metrics.json``, ``results.md``, ``samples.png`` and the report.
        metrics: The content of ``metrics.json``.
        table: Markdown.
    """

    folder: Path
    metrics: dict[str, Any]
    table: str


def create_host(config: PersonaliseConfig) -> Host:
    """Return the frozen model of a configuration.

    Raises:
        BackboneError: If its weights or a package can't be had; says what to do.
    """
    options = config.host
    if options.kind == "stable-diffusion":
        from vlprompt.generation.stable import StableHost

        assert options.pipeline is not None
        return StableHost(options.pipeline, options.revision, options.steps, options.guidance, options.device)
    from vlprompt.diffusion.tiny import TinyDiffusion

    return TinyHost(
        TinyDiffusion(
            steps=options.steps, guidance=options.guidance, weights=options.weights, device=options.device
        )
    )


def run_personalisation(
    config: PersonaliseConfig, resume: bool = False, command: str = ""
) -> PersonaliseOutcome:
    """Learn every concept in every way and write what was measured.

    Args:
        config: See :meth:`PersonaliseConfig.read`.
        resume: Keep concepts that were finished before.
        command: Shown in the report.

    Raises:
        VLPromptError: If anything the configuration names can't be had; finished concepts are kept.
    """
    folder = open_folder(config, resume)
    host, judge = create_host(config), create_backbone(config.judge.name, **config.judge.arguments())
    races, rows = [], {}
    for concept in _concepts(config):
        race, images = _run_concept(config, concept, host, judge, folder, resume)
        races.append(race)
        rows[concept.name] = [list(concept.images), *images]
    table, metrics = summary_table(races, config.baseline)
    metrics |= {
        "host": host.identity,
        "judge": judge.fingerprint["id"],
        "concepts": [race.record() for race in races],
        "threads": torch.get_num_threads(),
    }
    write_json(folder / "metrics.json", metrics)
    write_text(folder / "results.md", table)
    titles = ["learned from", *config.methods]
    write_atomic(folder / "samples.png", lambda path: sheet(rows).save(path, format="PNG"))
    curves = {f"{race.concept}: similarity by step": race.drawing() for race in races}
    record = RunRecord(
        title=f"Personalised generation with {config.host.pipeline or config.host.kind}",
        summary=f"{len(races)} concepts; similarity of image features by {judge.name}.",
        metrics={k: v for k, v in metrics.items() if isinstance(v, float)},
        drawings={"Samples": (" | ".join(titles), grid_svg(rows, titles)), **curves},
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        command=command,
        environment=environment(),
    )
    write_report(folder / "report.html", record)
    return PersonaliseOutcome(folder, metrics, table)


def _run_concept(
    config: PersonaliseConfig,
    concept: SceneConcept,
    host: Host,
    judge: Backbone,
    folder: Path,
    resume: bool,
) -> tuple[Race, list[list[Image.Image]]]:
    """Learn one concept in every way; return the measures and what each way draws in the end."""
    race, drawn = Race(concept.name), []
    measure = _Similarity(concept, host, judge, config.images, config.seed)
    for label, method in config.methods.items():
        place = folder / "concepts" / f"{_slug(concept.name)}-{label}"
        kept = place.with_suffix(".json")
        if not (resume and kept.is_file()):
            log.info("%s: %s", concept.name, label)
            result = personalise(
                host,
                concept.images,
                concept.word,
                method.name,
                train=config.train_options(label),
                options=method.options,
                watch=measure,
            )
            result.module.as_concepts([concept.name]).save(place.with_suffix(".safetensors"))
            for k, sample in enumerate(measure.last[: len(concept.images)]):
                write_atomic(
                    place / f"{k}.png",
                    lambda path, image=sample: image.save(path, format="PNG"),  # type: ignore[misc]
                )
            result.module.unfrozen.restore()
            write_json(kept, {"start": result.start, "seconds": result.seconds, "history": result.history})
        race.add(label, json.loads(kept.read_text(encoding="utf-8")))
        drawn.append([read_image(path) for path in sorted(place.glob("*.png"))])
    return race, drawn


class _Similarity:
    """Mean cosine of image features between images drawn of a concept and images of it that no search saw."""

    def __init__(self, concept: SceneConcept, host: Host, judge: Backbone, images: int, seed: int) -> None:
        self.host, self.judge, self.images, self.seed = host, judge, images, seed
        self.held = self._features(concept.held or concept.images)
        self.last: list[Image.Image] = []

    def __call__(self, module: Personaliser) -> Mapping[str, float]:
        self.last = self.host.draw(module.context(), self.images, self.seed)
        return {"similarity": float((self._features(self.last) @ self.held.T).mean())}

    def _features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return self.judge.encode_image(torch.stack([self.judge.preprocess(image) for image in images]))


def _concepts(config: PersonaliseConfig) -> list[SceneConcept]:
    section = config.concepts
    if not section.folders:
        return scene_concepts(section.scenes, section.split, section.images, section.held)
    found = []
    for name, own in section.folders.items():
        paths = sorted(p for p in Path(own.folder).glob("*") if p.suffix.lower() in EXTENSIONS)
        if len(paths) <= own.held:
            raise DataError(
                f"concepts.folders.{name}: {own.folder} has {len(paths)} images, {own.held} are held."
            )
        images = tuple(map(read_image, paths))
        cut = len(images) - own.held
        found.append(SceneConcept(name, own.word, images[:cut], images[cut:]))
    return found


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
