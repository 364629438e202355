"""Saving and loading what was learned: two small files that say everything needed to use it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.descriptions import Descriptions
from vlprompt.core.files import write_json, write_tensors
from vlprompt.core.options import check_type
from vlprompt.core.paths import user_path
from vlprompt.core.trainable import Trainable
from vlprompt.core.version import package_version
from vlprompt.learners import Learner, create_learner
from vlprompt.saved.card import (
    FORMAT,
    CardDescriptions,
    Kind,
    PromptCard,
    check_backbone,
    check_kind,
    read,
    tensors_digest,
)
from vlprompt.saved.paths import PROMPT_FILE
from vlprompt.saved.rebuild import rebuild, written_origin

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


class Prompted(Trainable):
    """Base of what can be saved beside a learner: a model with learned prompts that says of which kind it is.

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


def save(
    learner: Learner | Prompted,
    path: str | Path,
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write what was learned as ``prompt.safetensors`` and ``prompt.json`` into a folder, replacing what is there.

    Args:
        learner: What was trained: a learner, or a segmentation model.
        path: Folder, made if missing.
        metrics: Figures to keep with it.
        training: What it was trained on, such as ``{"data": "digits", "shots": 16}``; plain values.

    Returns:
        The folder.

    Raises:
        CheckpointError: If it can't be written; an older artefact in the folder stays usable.
        DataError: If it is neither a learner nor a segmentation model.
    """
    made_by = "vlprompt.create_learner(...) or vlprompt.create_segmenter(...)"
    check_type(learner, (Learner, Prompted), "a learner or a segmentation model", made_by)
    folder = user_path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in learner.trainable_state().items()}
    content = PromptCard(
        format=FORMAT,
        kind="learner" if isinstance(learner, Learner) else learner.kind,
        method=learner.method,
        options=learner.options,
        classnames=list(learner.classnames) if isinstance(learner, Learner) else [],
        templates=list(learner.templates) if isinstance(learner, Learner) else [],
        descriptions=_card_descriptions(learner.templates) if isinstance(learner, Learner) else None,
        backbone=learner.backbone.fingerprint,
        origin=written_origin(learner.backbone.origin, folder),
        precision=learner.backbone.precision,
        version=package_version(),
        training=dict(training or {}),
        metrics=dict(metrics or {}),
        tensors=tensors_digest(state),
    )
    card = content.model_dump()
    if content.descriptions is None:  # a key that older versions don't know
        del card["descriptions"]

    # The tensors carry the card too: if a crash falls between the two renames, the pair is still told apart.
    write_tensors(folder / PROMPT_FILE, state, {"card": card})
    write_json(folder / "prompt.json", card)

    return folder


def load(path: str | Path, backbone: Backbone | Mapping[str, Any] | None = None) -> Learner:
    """Read a learner that :func:`save` wrote. No code in the files can run.

    Args:
        path: The folder, or that of the cell or run which saved it, if it saved no other; ``"user/name"`` or
            ``"user/name@revision"`` fetches what was pushed to the Hub.
        backbone: The backbone it was trained on; None builds what the file says. A mapping builds that with other
            arguments of :func:`vlprompt.create_backbone`, such as ``{"pretrained": PATH}`` where weights have moved.

    Raises:
        CheckpointError: If a file is missing, damaged or hostile, of another kind, or the backbone is another
            one; names the difference.
        BackboneError: If the backbone's weights can't be fetched.
    """
    card, tensors = read(path)
    return build_learner(path, card, tensors, backbone)


def build_learner(
    path: str | Path,
    card: PromptCard,
    tensors: Mapping[str, Tensor],
    backbone: Backbone | Mapping[str, Any] | None = None,
) -> Learner:
    """Return the learner that :func:`read` found the parts of; arguments and errors as :func:`load`."""
    check_kind(path, card, "learner")
    backbone = backbone_of(path, card, backbone)
    templates: Sequence[str] = card.templates
    if card.descriptions is not None:
        templates = Descriptions(
            card.templates, card.descriptions.sentences, card.descriptions.with_templates
        )
    learner = create_learner(card.method, backbone, card.classnames, templates, **card.options)
    learner.load_trainable_state(tensors)
    return learner.eval()


def backbone_of(
    path: str | Path, card: PromptCard, backbone: Backbone | Mapping[str, Any] | None
) -> Backbone:
    """Return the backbone that saved prompts belong to.

    Args:
        path: Where the prompts lie.
        card: What they are.
        backbone: One that was built already, to be checked; or what is to be built in another way than the card
            says (``{"pretrained": PATH}``); None builds what the card says.

    Raises:
        CheckpointError: If it is another one, or the card names none that can be built.
        BackboneError: If its weights can't be fetched.
    """
    if not isinstance(backbone, Backbone):
        backbone = rebuild(path, card, backbone or {})
    check_backbone(path, card, backbone)
    return backbone


def _card_descriptions(templates: Sequence[str]) -> CardDescriptions | None:
    """Return what a card holds of a learner's descriptions; None if it has none."""
    if not isinstance(templates, Descriptions):
        return None
    sentences = {name: list(texts) for name, texts in templates.sentences.items()}
    return CardDescriptions(sentences=sentences, with_templates=templates.with_templates)
