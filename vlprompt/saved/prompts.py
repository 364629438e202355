"""Saving and loading what was learned: two small files that say everything needed to use it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from vlprompt.backbones import BACKBONES, Backbone, create_backbone
from vlprompt.core.errors import CheckpointError
from vlprompt.core.files import read_tensors, write_json, write_tensors
from vlprompt.core.options import describe_problems
from vlprompt.core.paths import user_path
from vlprompt.core.version import package_version
from vlprompt.learners import Learner, create_learner
from vlprompt.saved.paths import PROMPT_FILE, prompt_folder

__all__ = [
    "Kind",
    "PromptCard",
    "Prompted",
    "backbone_of",
    "build_learner",
    "check_backbone",
    "check_kind",
    "load",
    "read",
    "save",
]

Kind = Literal["learner", "segmenter"]
"""What saved prompts belong to."""

_FORMAT = 1
_COMMANDS: dict[str, str] = {"learner": "vlprompt predict", "segmenter": "vlprompt segment predict"}
_ARGUMENTS = {
    "name",
    "backbone",
    "classnames",
    "templates",
}  # of create_learner, beside a method's own options


class PromptCard(BaseModel):
    """What ``prompt.json`` holds: all that is needed to use the tensors again, and their checksum."""

    model_config = ConfigDict(extra="forbid")

    format: int
    kind: Kind = "learner"
    method: str
    options: dict[str, Any]
    classnames: list[str]
    templates: list[str]
    backbone: dict[str, Any]
    version: str
    metrics: dict[str, float]
    tensors: str


class Prompted(Protocol):
    """What can be saved beside a learner: a model with learned prompts that says of which kind it is.

    Attributes:
        kind: What the card calls it.
        method: Its registry name.
        options: What it was built with.
        backbone: What the prompts were trained on.
    """

    kind: Kind
    method: str
    options: dict[str, Any]
    backbone: Backbone

    def trainable_state(self) -> dict[str, Tensor]:
        """Return what was learned, by name."""


def save(learner: Learner | Prompted, path: str | Path, metrics: Mapping[str, float] | None = None) -> Path:
    """Write what was learned as ``prompt.safetensors`` and ``prompt.json`` into a folder, replacing what is there.

    Args:
        learner: What was trained: a learner, or a segmentation model.
        path: Folder, made if missing.
        metrics: Figures to keep with it.

    Returns:
        The folder.

    Raises:
        CheckpointError: If it can't be written; an older artefact in the folder stays usable.
    """
    folder = user_path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in learner.trainable_state().items()}
    is_learner = isinstance(learner, Learner)
    content = PromptCard(
        format=_FORMAT,
        kind="learner" if isinstance(learner, Learner) else learner.kind,
        method=learner.method,
        options=learner.options,
        classnames=list(learner.classnames) if isinstance(learner, Learner) else [],
        templates=list(learner.templates) if isinstance(learner, Learner) else [],
        backbone=learner.backbone.fingerprint,
        version=package_version(),
        metrics=dict(metrics or {}),
        tensors=_digest(state),
    )
    # Older versions know no kinds; without the key they still read learners.
    card = content.model_dump(exclude={"kind"} if is_learner else None)

    # The tensors carry the card too: if a crash falls between the two renames, the pair is still told apart.
    write_tensors(folder / PROMPT_FILE, state, {"card": card})
    write_json(folder / "prompt.json", card)

    return folder


def load(path: str | Path, backbone: Backbone | None = None) -> Learner:
    """Read a learner that :func:`save` wrote. No code in the files can run.

    Args:
        path: The folder, or that of the cell or run which saved it, if it saved no other.
        backbone: The backbone it was trained on; None builds it from the name in the file.

    Raises:
        CheckpointError: If a file is missing, damaged or hostile, of another kind, or the backbone is another
            one; names the difference.
        BackboneError: If the backbone's weights can't be fetched.
    """
    card, tensors = read(path)
    return build_learner(path, card, tensors, backbone)


def build_learner(
    path: str | Path, card: PromptCard, tensors: Mapping[str, Tensor], backbone: Backbone | None = None
) -> Learner:
    """Return the learner that :func:`read` found the parts of; arguments and errors as :func:`load`."""
    check_kind(path, card, "learner")
    backbone = backbone_of(path, card, backbone)
    learner = create_learner(card.method, backbone, card.classnames, card.templates, **card.options)
    learner.load_trainable_state(tensors)
    return learner.eval()


def check_kind(path: str | Path, card: PromptCard, kind: Kind) -> None:
    """Refuse prompts of another kind.

    Raises:
        CheckpointError: Says what they are and which command takes them.
    """
    if card.kind != kind:
        raise CheckpointError(
            f"{path} holds a {card.kind} ({card.method}), not a {kind}; use it with {_COMMANDS[card.kind]}."
        )


def backbone_of(path: str | Path, card: PromptCard, backbone: Backbone | None) -> Backbone:
    """Return the backbone that saved prompts belong to.

    Args:
        path: Where the prompts lie, for messages.
        card: What they are.
        backbone: One that was built already, to be checked; None builds it from the name in the card.

    Raises:
        CheckpointError: If it is another one, or the card names none that can be built.
        BackboneError: If its weights can't be fetched.
    """
    if backbone is None:
        backbone = _rebuild(path, card.backbone)
    check_backbone(path, card, backbone)
    return backbone


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
    if _digest(tensors) != card.tensors:
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

    if card.format > _FORMAT:
        raise CheckpointError(
            f"{folder} was written by a newer vlprompt ({card.version}); this one is {package_version()}."
        )
    if clash := sorted(_ARGUMENTS & card.options.keys()):
        raise CheckpointError(
            f"{folder / 'prompt.json'} is not a prompt card of ours: {clash[0]!r} is no option."
        )

    return card


def _rebuild(path: str | Path, saved: Mapping[str, Any]) -> Backbone:
    name, tag, activation = (saved.get(key) for key in ("architecture", "pretrained", "activation"))
    if not isinstance(name, str) or not isinstance(tag, str | None):
        raise CheckpointError(
            f"{path} names no backbone that can be built (architecture {name!r}, pretrained {tag!r}). Pass backbone=..."
        )
    if name in BACKBONES or activation not in ("gelu", "quickgelu"):
        return create_backbone(name, tag)
    return create_backbone(
        name, tag, quick_gelu=activation == "quickgelu"
    )  # a file doesn't tell its activation


def check_backbone(path: str | Path, card: PromptCard, backbone: Backbone) -> None:
    """Refuse prompts of another backbone.

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


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(tensors_to_bytes(dict(sorted(state.items())))).hexdigest()
