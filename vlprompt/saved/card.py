"""What a saved prompt says of itself, and reading it; nothing is built from it here."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError
from vlprompt.core.files import read_tensors
from vlprompt.core.options import describe_problems
from vlprompt.core.precision import Precision
from vlprompt.core.version import package_version
from vlprompt.saved.paths import PROMPT_FILE, prompt_folder

__all__ = ["FORMAT", "Kind", "PromptCard", "check_backbone", "check_kind", "read", "tensors_digest"]

Kind = Literal["learner", "segmenter"]
"""What saved prompts belong to."""

log = logging.getLogger("vlprompt.saved")

FORMAT = 1
"""Of the files; a newer one is refused."""

_COMMANDS: dict[str, str] = {"learner": "vlprompt predict", "segmenter": "vlprompt segment predict"}
_ARGUMENTS = {
    "name",
    "backbone",
    "classnames",
    "templates",
}  # of create_learner, beside a method's own options


class CardDescriptions(BaseModel):
    """What a card holds of :class:`vlprompt.core.descriptions.Descriptions`, beside the templates."""

    model_config = ConfigDict(extra="forbid")

    sentences: dict[str, list[str]]
    with_templates: bool = False


class PromptCard(BaseModel):
    """What ``prompt.json`` holds: all that is needed to use the tensors again, and their checksum.

    Attributes:
        backbone: The fingerprint of the backbone, which says what it is.
        origin: How it was built (see :mod:`vlprompt.saved.rebuild`).
        precision: What it was learned in; it can be used in any.
        descriptions: Sentences of single classes beside the templates, if there are any.
        training: What it was trained on, as a run names it: data set, shots, seed.
    """

    model_config = ConfigDict(extra="forbid")

    format: int
    kind: Kind = "learner"
    method: str
    options: dict[str, Any]
    classnames: list[str]
    templates: list[str]
    descriptions: CardDescriptions | None = None
    backbone: dict[str, Any]
    origin: dict[str, Any] = Field(default_factory=dict)
    precision: Precision = "fp32"
    version: str
    training: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, float]
    tensors: str


def check_kind(path: str | Path, card: PromptCard, kind: Kind) -> None:
    """Refuse prompts of another kind.

    Raises:
        CheckpointError: Says what they are and which command takes them.
    """
    if card.kind != kind:
        raise CheckpointError(
            f"{path} holds a {card.kind} ({card.method}), not a {kind}; use it with {_COMMANDS[card.kind]}."
        )


def read(path: str | Path) -> tuple[PromptCard, dict[str, Tensor]]:
    """Return what :func:`save` wrote, without building anything from it.

    Args:
        path: See :func:`load`.

    Raises:
        CheckpointError: If a file is missing, damaged or hostile, or the path means more than one saved prompt.
    """
    folder = prompt_folder(path)
    tensors, metadata = read_tensors(folder / PROMPT_FILE)

    card = _parse(folder, metadata.get("card"))
    if tensors_digest(tensors) != card.tensors:
        raise CheckpointError(f"{folder / PROMPT_FILE} does not match its own checksum; it is damaged.")

    return card, tensors


def _parse(folder: Path, inner: Any) -> PromptCard:
    """Read ``prompt.json``, or the copy inside the tensors' file if the JSON is missing or older."""
    try:
        outer = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if inner is None:
            raise CheckpointError(f"no such file: {folder / 'prompt.json'}.") from None
        outer = inner
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'prompt.json'} is not readable JSON: {error}.") from error

    if isinstance(outer, dict) and isinstance(inner, dict) and outer.get("tensors") != inner.get("tensors"):
        outer = inner  # a save was killed between its two files

    try:
        card = PromptCard.model_validate(outer)
    except ValidationError as error:
        problems = " ".join(describe_problems(error, PromptCard)[:5])
        raise CheckpointError(f"{folder / 'prompt.json'} is not a prompt card of ours: {problems}") from error

    if card.format > FORMAT:
        raise CheckpointError(
            f"{folder} was written by a newer vlprompt ({card.version}); this one is {package_version()}."
        )
    if clash := sorted(_ARGUMENTS & card.options.keys()):
        raise CheckpointError(
            f"{folder / 'prompt.json'} is not a prompt card of ours: {clash[0]!r} is no option."
        )

    return card


def check_backbone(path: str | Path, card: PromptCard, backbone: Backbone) -> None:
    """Refuse prompts of another backbone, and say so if it runs in another precision.

    Raises:
        CheckpointError: Names every difference of the two fingerprints.
    """
    saved = card.backbone
    actual = backbone.fingerprint

    # The place weights were read from may differ; what they are may not.
    differs = [k for k in sorted({*saved, *actual} - {"id", "pretrained"}) if saved.get(k) != actual.get(k)]
    if differs:
        lines = "\n".join(f"  - {k}: saved {saved.get(k)!r}, given {actual.get(k)!r}" for k in differs)
        raise CheckpointError(f"{path} was trained on another backbone than the one given:\n{lines}")

    if card.precision != backbone.precision:
        log.warning(
            "%s was learned on a backbone in %s and is used in %s: figures may differ a little.",
            path,
            card.precision,
            backbone.precision,
        )


def tensors_digest(state: Mapping[str, Any]) -> str:
    """Return a checksum of tensors and their names."""
    return hashlib.sha256(tensors_to_bytes(dict(sorted(state.items())))).hexdigest()
