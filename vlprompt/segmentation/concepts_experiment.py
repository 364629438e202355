"""Running a search of concepts for a segmenter: its configuration, its table beside class names, its files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlprompt.backbones import create_backbone
from vlprompt.concepts.old_study import ConceptOutcome, Scores, search_all, write_outcome
from vlprompt.core.errors import DataError, VLPromptError
from vlprompt.core.files import write_json
from vlprompt.core.options import describe_problems
from vlprompt.data import load_segmentation
from vlprompt.data.names import check_name
from vlprompt.data.segmentation import MaskDataset
from vlprompt.experiments.old_config import BackboneOptions, ToolConfig
from vlprompt.experiments.old_folder import open_folder
from vlprompt.segmentation import SEGMENTERS, create_segmenter
from vlprompt.segmentation.concepts import named, score_concepts, search_masks
from vlprompt.segmentation.evaluate import evaluate_segmenter
from vlprompt.segmentation.losses import LossName
from vlprompt.training.options import TrainOptions

__all__ = ["ConceptMaskConfig", "run_mask_concepts"]

log = logging.getLogger("vlprompt.segment")
_STRICT = ConfigDict(extra="forbid", frozen=True)
_KEYS = ("dice", "iou")


class ConceptMaskData(BaseModel):
    """The ``data:`` section: names as ``load_segmentation`` takes them."""

    model_config = _STRICT

    train: str = "scenes/masks"
    test: dict[str, str] = Field(min_length=1, description="label to a data set of the same classes")
    images: list[Annotated[int, Field(ge=1)] | None] = Field(
        default=[None], min_length=1, description="training images drawn; null: all"
    )
    validate_on: Literal["val", "none"] = "none"
    root: str | None = None


class ConceptMaskStage(BaseModel):
    """The ``second_stage:`` section: the decoder's parameters that learn after the search, with the concepts."""

    model_config = _STRICT

    unfreeze: list[str] = Field(min_length=1, description="shell patterns: decoder.*")
    train: dict[str, Any] = Field(default_factory=dict, description="what differs from the train section")


class ConceptMaskConfig(ToolConfig):
    """A whole run; what ``tools/segment.py concepts --cfg`` reads."""

    name: str = Field("segment_concepts", pattern=r"^[\w.-]+$", description="folder under output")
    output: str = "runs"
    segmenter: str = "clipseg"
    backbone: BackboneOptions = Field(default_factory=BackboneOptions)
    data: ConceptMaskData
    init: Literal["text", "normal"] = "text"
    loss: LossName = "dice_bce"
    train: TrainOptions = Field(default_factory=TrainOptions)
    second_stage: ConceptMaskStage | None = None
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [1], min_length=1)

    def problems(self) -> list[str]:
        """Return what is wrong with the segmenter, the second stage and data, one sentence each."""
        problems = []
        try:
            self.second_train()
        except ValidationError as error:
            problems += describe_problems(error, TrainOptions, "second_stage.train")
        tests = {f"data.test.{k}": v for k, v in self.data.test.items()}
        check_mask_name = partial(check_name, task="segmentation")
        checks: list[tuple[str, Callable[[str], object], str]] = [
            ("segmenter", SEGMENTERS.get, self.segmenter),
            ("data.train", check_mask_name, self.data.train),
            *((key, check_mask_name, name) for key, name in tests.items()),
        ]
        for key, check, name in checks:
            try:
                check(name)
            except VLPromptError as error:
                problems.append(f"{key}: {error}")
        return problems

    def second_train(self) -> TrainOptions:
        """Return the second stage's training options."""
        own = self.second_stage.train if self.second_stage is not None else {}
        return TrainOptions.model_validate({**self.train.model_dump(), **own})


def run_mask_concepts(config: ConceptMaskConfig, resume: bool = False, command: str = "") -> ConceptOutcome:
    """Search with every number of images and seed, and score beside the class names and the full phrases.

    Args:
        config: See :meth:`ConceptMaskConfig.read`.
        resume: Keep cells that were finished before, continue an unfinished one.
        command: Shown in the report.

    Raises:
        VLPromptError: If anything the configuration names can't be had; finished cells are kept.
    """
    folder = open_folder(config, resume)
    session = _Session(config, folder, resume)
    rows = session.score_texts()
    history = search_all(rows, config.data.images, config.seeds, session.run_cell)
    first = next(iter(config.data.test))
    return write_outcome(
        folder,
        rows,
        {"seeds": list(config.seeds)},
        title=f"Concepts for {config.segmenter} on {config.data.train}",
        headline=(f"{first}/dice", f"Dice on {first}"),
        history=history,
        command=command,
    )


class _Session:
    """The cells of one run, sharing the segmenter."""

    def __init__(self, config: ConceptMaskConfig, folder: Path, resume: bool) -> None:
        self.config, self.folder, self.resume = config, folder, resume
        backbone = create_backbone(config.backbone.name, **config.backbone.arguments())
        # The strategy says which states are kept; what learns is for the search to say.
        strategy = "zero_shot" if config.second_stage is None else "decoder"
        self.segmenter = create_segmenter(config.segmenter, backbone, strategy)
        self.segmenter.requires_grad_(False)
        root = config.data.root
        self.tests = {k: load_segmentation(name, "test", root=root) for k, name in config.data.test.items()}
        names = self._train(None, 1).classnames
        for label, test in self.tests.items():
            if test.classnames != names:
                raise DataError(f"data.test.{label}: {test.name} has other classes than {config.data.train}.")

    def score_texts(self) -> Scores:
        """Return the scores of class names and of the data set's own phrases."""
        rows: Scores = {"class names": {}, "phrases": {}}
        for label, test in self.tests.items():
            for row, data in (("class names", named(test)), ("phrases", test)):
                scores = evaluate_segmenter(self.segmenter, data, boundary=False).metrics
                rows[row] |= {f"{label}/{key}": [scores[key]] for key in _KEYS}
        return rows

    def run_cell(self, images: int | None, seed: int) -> dict[str, Any]:
        """Search and score, or return what a finished cell left behind."""
        place = self.folder / f"images{images or 'all'}-seed{seed}"
        if self.resume and (place / "cell.json").is_file():
            return json.loads((place / "cell.json").read_text(encoding="utf-8"))
        config, train = self.config, self._train(images, seed)
        val = None
        if config.data.validate_on == "val":
            val = load_segmentation(config.data.train, "val", root=config.data.root)
        options = config.train.model_copy(update={"seed": seed})
        shared: dict[str, Any] = {"loss": config.loss, "resume": self.resume}
        first = search_masks(
            self.segmenter, train, val, options=options, init=config.init, folder=place, **shared
        )
        vectors = first.module.concepts().detach()
        first.module.as_concepts(train.classnames).save(place / "concepts.safetensors")
        scores = {"first": {**self._score(vectors), "seconds": first.seconds}}
        if (second := config.second_stage) is not None:
            options = config.second_train().model_copy(update={"seed": seed})
            shared |= {"unfreeze": second.unfreeze, "start": vectors, "folder": place / "second"}
            found = search_masks(self.segmenter, train, val, options=options, **shared)
            scores["second"] = {**self._score(found.module.concepts().detach()), "seconds": found.seconds}
            found.module.unfrozen.restore()
        cell = {"images": images, "seed": seed, "scores": scores, "history": first.history}
        write_json(place / "cell.json", cell)
        return cell

    def _score(self, concepts: torch.Tensor) -> dict[str, float]:
        found: dict[str, float] = {}
        for label, test in self.tests.items():
            scores = score_concepts(self.segmenter, concepts, test)
            found |= {f"{label}/{key}": scores[key] for key in _KEYS}
        return found

    def _train(self, images: int | None, seed: int) -> MaskDataset:
        return load_segmentation(
            self.config.data.train, "train", images=images, seed=seed, root=self.config.data.root
        )
