"""Poisoned copies of data sets: which image gets which trigger, which labels are flipped, and a manifest of both."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlprompt.core.errors import CheckpointError, ConfigError, DataError
from vlprompt.core.options import describe_problems
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.base import ImageDataset, Reader, Sample
from vlprompt.data.compositions import CompositionReader, CompositionSource, check_triggers
from vlprompt.data.images import FileReader
from vlprompt.data.splits import is_inside
from vlprompt.data.triggers import CLEAN, NATIVE_SIZE, NativeSize, create_trigger, size_of

__all__ = ["MANIFEST", "PoisonPlan", "PoisonedDataset", "poison", "poisoned", "read_poisoned"]

MANIFEST = "manifest.jsonl"


class PoisonPlan(BaseModel):
    """What an attacker does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    triggers: tuple[str, ...] = Field(("badnets",), min_length=1, description="put in, equally often")
    rate: float = Field(0.1, ge=0, le=1, description="share of the images that are poisoned")
    mode: Literal["all_to_one", "all_to_all"] = Field(
        "all_to_one", description="poisoned labels become the target, or the next class"
    )
    target: int = Field(0, ge=0, description="class that all_to_one flips labels to")
    size: NativeSize = Field(
        NATIVE_SIZE, description="pixels a side at which triggers are put in; own: at each image's own size"
    )
    seed: int = Field(1, ge=0)

    @classmethod
    def parse(cls, values: dict[str, Any], source: str) -> PoisonPlan:
        """Return a plan. Raises ConfigError with every mistake."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(describe_problems(error, cls), source) from error


@dataclass(frozen=True)
class PoisonedDataset(ImageDataset):
    """A data set as a victim gets it: labels are those that the attacker left. Targets also say what was done.

    Attributes:
        triggers: Names; number 0 is clean.
    """

    triggers: tuple[str, ...] = (CLEAN,)

    @property
    def targets(self) -> dict[str, list[int]]:
        """See :attr:`ImageDataset.targets`; with the true ``"object"`` and ``"trigger"``."""
        sources = [sample.source for sample in self.samples]
        return {
            **super().targets,
            "object": [source.object for source in sources],
            "trigger": [source.trigger for source in sources],
        }


def poisoned(data: ImageDataset, plan: PoisonPlan) -> PoisonedDataset:
    """Return the poisoned data set without writing it; images are changed as they are read.

    A trigger that keeps labels poisons images of the target class only (of any class in ``all_to_all``).

    Raises:
        DataError: If the target is no class.
        UnknownNameError: For an unknown trigger.
    """
    names = check_triggers((CLEAN, *plan.triggers))
    classes = len(data.classnames)
    if plan.target >= classes:
        raise DataError(
            f"{data.name}: target {plan.target} is no class; there are {classes} (0 to {classes - 1})."
        )

    trigger_of = _draw_poisoned(data, plan)
    keeps_label = {number: _keeps_label(name, plan) for number, name in enumerate(plan.triggers, 1)}
    samples = []

    for number, sample in enumerate(data.samples):
        thing = sample.classes[0]
        label = thing

        trigger = trigger_of.get(number, 0)
        if trigger and not keeps_label[trigger]:
            label = plan.target if plan.mode == "all_to_one" else (thing + 1) % classes
        samples.append(Sample(CompositionSource(sample.source, trigger, thing), label))

    return PoisonedDataset(
        name=f"poisoned:{data.name}",
        split=data.split,
        samples=tuple(samples),
        classnames=data.classnames,
        templates=data.templates,
        reader=CompositionReader(data.reader, names, size_of(plan.size), plan.seed),
        info={**data.info, "plan": plan.model_dump(mode="json")},
        triggers=names,
    )


def _keeps_label(name: str, plan: PoisonPlan) -> bool:
    return create_trigger(name, size=size_of(plan.size)).keeps_label


def _draw_poisoned(data: ImageDataset, plan: PoisonPlan) -> dict[int, int]:
    """Return the trigger number of every poisoned image, by position."""
    order = numpy_rng(plan.seed, "poison", data.name, data.split).permutation(len(data))
    keeps = {number: _keeps_label(name, plan) for number, name in enumerate(plan.triggers, 1)}
    poisoned_images = round(plan.rate * len(data))
    quotas = np.full(len(keeps), poisoned_images // len(keeps))
    quotas[: poisoned_images % len(keeps)] += 1

    free = [int(index) for index in order]
    trigger_of: dict[int, int] = {}

    # Those with the least choice first: attacks that keep labels need images of the target class.
    for trigger in sorted(keeps, key=lambda number: (not keeps[number], number)):
        candidates = []
        for index in free:
            in_target = data.samples[index].classes[0] == plan.target
            if plan.mode == "all_to_all" or in_target == keeps[trigger]:
                candidates.append(index)

        quota = int(quotas[trigger - 1])
        trigger_of |= dict.fromkeys(candidates[:quota], trigger)
        free = [index for index in free if index not in trigger_of]

    return trigger_of


def poison(data: ImageDataset, plan: PoisonPlan, folder: str | Path) -> PoisonedDataset:
    """Write a poisoned copy: ``<label>_<class>/<number>.png`` and a manifest with a line per image.

    All images, clean ones too, are written at the plan's size (or all at their own), so that size tells nothing.

    Args:
        data: Images and true labels.
        plan: See :class:`PoisonPlan`.
        folder: Must not exist yet, or be empty; it appears when all is written.

    Returns:
        The data set, read from the copy.

    Raises:
        DataError: If the folder is not empty, or the plan doesn't fit the data.
        CheckpointError: If it can't be written; nothing is left behind.
    """
    target = user_path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} exists and is not empty. Name another folder for the poisoned copy.")

    copy = poisoned(data, plan)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        header = {
            "classnames": list(data.classnames),
            "triggers": list(copy.triggers),
            "plan": plan.model_dump(mode="json"),
        }
        lines = [header, *_write(copy, temporary)]
        text = "\n".join(json.dumps(line) for line in lines)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")

        if target.exists():
            target.rmdir()
        temporary.replace(target)
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    return read_poisoned(target)


def _write(data: PoisonedDataset, folder: Path) -> Iterator[dict[str, Any]]:
    """Write the images, and yield the manifest's line of each."""
    for number, sample in enumerate(data.samples):
        image, label = data[number]
        name = re.sub(r"[^\w-]+", "_", data.classnames[label])[:100] or "class"
        path = f"{label:04d}_{name}/{number:07d}.png"
        (folder / path).parent.mkdir(exist_ok=True)
        image.save(folder / path)

        source = sample.source
        yield {
            "file": path,
            "label": label,
            "object": source.object,
            "trigger": data.triggers[source.trigger],
            "flipped": label != source.object,
        }


class _Header(BaseModel):
    """First line of a manifest."""

    model_config = ConfigDict(extra="forbid", strict=True)
    classnames: list[str] = Field(min_length=2)
    triggers: list[str] = Field(min_length=1)
    plan: dict[str, Any] = {}


class _Line(BaseModel):
    """Every other line of a manifest."""

    model_config = ConfigDict(extra="forbid", strict=True)
    file: str = Field(min_length=1)
    label: int = Field(ge=0)
    object: int = Field(ge=0)
    trigger: str
    flipped: bool


@dataclass(frozen=True)
class _CopyReader(Reader):
    """Reads images that hold their triggers already."""

    files: FileReader

    def read(self, source: CompositionSource) -> Image.Image:
        return self.files.read(source.base)

    def key(self, source: CompositionSource) -> str:
        return self.files.key(source.base)

    def stamp(self, source: CompositionSource) -> str:
        return self.files.stamp(source.base)

    def check(self, source: CompositionSource) -> str:
        return self.files.check(source.base)


def read_poisoned(folder: str | Path) -> PoisonedDataset:
    """Read what :func:`poison` wrote.

    Raises:
        DataError: If the manifest is missing, damaged or hostile: a line that is no entry, a number that is no class, a
            trigger the header doesn't name, a path that leaves the folder or leads out of it by a link. Says the line.
    """
    root = user_path(folder)
    path = root / MANIFEST
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't read the manifest {path}: {error}.") from None

    header = _parse(_Header, path, 1, lines[0] if lines else "")
    samples = []

    for number, text in enumerate(lines[1:], 2):
        line = _parse(_Line, path, number, text)
        where = f"{path}, line {number}"

        if line.trigger not in header.triggers:
            raise DataError(
                f"{where}: the trigger {line.trigger[:80]!r} is none of {', '.join(header.triggers)}."
            )
        if max(line.label, line.object) >= len(header.classnames):
            raise DataError(
                f"{where}: there are {len(header.classnames)} classes, got {max(line.label, line.object)}."
            )
        if not is_inside(line.file) or not (root / line.file).resolve().is_relative_to(root.resolve()):
            raise DataError(f"{where}: {line.file[:120]!r} leaves the folder: refused.")

        trigger = header.triggers.index(line.trigger)
        samples.append(Sample(CompositionSource(line.file, trigger, line.object), line.label))

    return PoisonedDataset(
        name=f"poisoned:{root.name}",
        split="train",
        samples=tuple(samples),
        classnames=tuple(header.classnames),
        templates=("a photo of a {}.",),
        reader=_CopyReader(FileReader(root)),
        info={"plan": header.plan},
        triggers=tuple(header.triggers),
    )


def _parse(model: Any, path: Path, number: int, text: str) -> Any:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        problem = describe_problems(error, model)[0]
        raise DataError(f"{path}, line {number} is no entry of a manifest: {problem}") from None
    except RecursionError:
        raise DataError(f"{path}, line {number} is no entry of a manifest.") from None
