"""Starting from GRAM: meta-learned prompts put into any learner, and the frozen regulator on its gradients.

``train.init=gram:PATH`` does both for a run, ``vlprompt.fit(learner, ..., init="gram:PATH")`` for a learner. The
trainer applies the regulator to whole-batch float32 gradients, unscaled and clipped, right before the optimiser. Of
"Gradient-Regulated Meta-Prompt Learning" (ICCV 2023, arXiv 2303.06571) this is the model-agnostic use; the place of
the hook is ours.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.core.errors import CheckpointError, DataError, UnknownNameError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.core.options import options_model
from vlprompt.learners import LEARNERS, Learner
from vlprompt.meta.regulators import Regulator, Situation, create_regulator
from vlprompt.saved.paths import find_prompts
from vlprompt.saved.prompts import PromptCard, check_backbone, read, save
from vlprompt.training.batches import Batch
from vlprompt.training.trainer import Trainable

__all__ = ["GramStart", "Regulated", "read_start", "regulated", "save_start", "start_learner"]

log = logging.getLogger("vlprompt.gram")

_PREFIX = "gram:"
_FILE = "regulator.safetensors"
_MEANING = ("position", "insertion")  # options that say what a prompt's place is
_HOOKS = ("combine_gradients", "after_epoch", "after_training", "running_state", "load_running_state")


def save_start(learner: Learner, regulator: Regulator, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write meta-learned prompts as a saved learner, and the regulator beside them.

    Args:
        learner: Holds the prompts.
        regulator: Belongs to them.
        folder: As of :func:`vlprompt.save`; the prompts alone can be loaded like any others.
        facts: What to record: pairs, clustering, figures.

    Raises:
        CheckpointError: If it can't be written.
    """
    save(learner, folder)
    about = {
        "name": regulator.method,
        "options": regulator.options,
        "shapes": {n: list(s) for n, s in regulator.shapes.items()},
        "dim": regulator.dim,
        "prompts": read(folder)[0].tensors,
    }
    write_tensors(folder / _FILE, dict(regulator.state_dict()), {"regulator": about, "facts": dict(facts)})


@dataclass(frozen=True)
class GramStart:
    """What meta-training left behind.

    Attributes:
        folder: Where it was read from.
        card: Of the learner the prompts were learned with.
        prompts: Its tensors by name.
        regulator: Frozen.
        facts: What was recorded with it.
    """

    folder: Path
    card: PromptCard
    prompts: dict[str, Tensor]
    regulator: Regulator
    facts: dict[str, Any]

    @staticmethod
    def identity(start: GramStart | None) -> dict[str, str]:
        """Return what a run and its continuation must share of its start."""
        return {} if start is None else {"start": start.checksum}

    @property
    def checksum(self) -> str:
        """12 hex digits of prompts and regulator."""
        state = hashlib.sha256(self.card.tensors.encode())
        for name, tensor in sorted(self.regulator.state_dict().items()):
            state.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return state.hexdigest()[:12]

    def put_into(self, learner: Learner) -> list[str]:
        """Start a learner from the prompts: every learned tensor of the same name and shape; others stay as they are.

        Methods that share a kind of prompt share starts: CoOp's context also starts KgCoOp, CoCoOp or ProGrad.

        Returns:
            The names that were set.

        Raises:
            CheckpointError: If the backbone differs, or not every prompt the regulator is for has its place; says why.
        """
        check_backbone(self.folder, self.card, learner.backbone)
        own = learner.trainable_state()
        wanted = {n: t for n, t in self.prompts.items() if n in self.regulator.shapes}
        problems = [f"it has no {n}" for n in wanted if n not in own]
        problems += [
            f"its {n} has shape {tuple(own[n].shape)}, the meta-learned one {tuple(t.shape)}"
            for n, t in wanted.items()
            if n in own and own[n].shape != t.shape
        ]
        ours, theirs = _places(learner.method, learner.options), _places(self.card.method, self.card.options)
        problems += [
            f"its {n} is {ours[n]!r}, in meta-training it was {theirs[n]!r}"
            for n in _MEANING
            if n in ours and n in theirs and ours[n] != theirs[n]
        ]
        if problems:
            raise CheckpointError(
                f"{self.folder} ({self.card.method}, meta-learned) can't start {learner.method or 'this learner'}: "
                f"{'; '.join(problems)}. The learner's options must fit those the prompts were meta-learned with."
            )
        fitting = {n: t for n, t in self.prompts.items() if n in own and own[n].shape == t.shape}
        device = learner.backbone.device
        learner.load_trainable_state(own | {n: t.to(device) for n, t in fitting.items()})
        return sorted(fitting)

    def transform(self) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the regulator for test-time adaptation (``transform`` of ``tpt``): gradients with a row per image.

        Raises:
            DataError: If the regulator must know more than gradients.
        """
        if self.regulator.needs_features or self.regulator.needs_general:
            raise DataError(
                f"the regulator {self.regulator.method!r} reads more than a gradient and can't be used at test time; "
                "identity, diagonal and low_rank can."
            )
        one = torch.func.vmap(lambda gradients: self.regulator(gradients, Situation()))

        def regulate(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
            return one({n: g.float() for n, g in gradients.items()})

        return regulate


def _places(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that say where a method's prompts stand, defaults included."""
    fields = options_model(LEARNERS.get(method).target).model_fields if method in LEARNERS else {}
    default = {n: fields[n].default for n in _MEANING if n in fields}
    return {n: v for n, v in {**default, **options}.items() if n in _MEANING}


def read_start(init: str) -> GramStart:
    """Read what ``gram:PATH`` means: the folder of a meta-training run, its ``prompt`` folder, or a pattern of one.

    Raises:
        CheckpointError: If there is none or more than one, or a file is damaged or belongs to other prompts.
        UnknownNameError: If it doesn't begin with ``gram:``.
    """
    if not init.startswith(_PREFIX):
        raise UnknownNameError(
            "start", init, ["gram:PATH"], "Saved prompts alone start a run by target.init_from."
        )
    found = find_prompts([init.removeprefix(_PREFIX)])
    if len(found) != 1:
        raise CheckpointError(f"{init} means {len(found)} saved prompts ({', '.join(found)}); name one.")
    folder = Path(found[0])
    card, prompts = read(folder)
    if not (folder / _FILE).is_file():
        raise CheckpointError(
            f"{folder} holds prompts without {_FILE}: they were not meta-learned. Use target.init_from for them."
        )
    tensors, metadata = read_tensors(folder / _FILE)
    try:
        about = metadata["regulator"]
        shapes = {n: torch.Size(s) for n, s in about["shapes"].items()}
        regulator = create_regulator(about["name"], shapes, int(about["dim"]), **about["options"])
        regulator.load_state_dict(tensors)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / _FILE} is damaged: {error}.") from error
    if about.get("prompts") != card.tensors:
        raise CheckpointError(f"{folder / _FILE} belongs to other prompts than those beside it.")
    return GramStart(folder, card, prompts, regulator.requires_grad_(False).eval(), metadata.get("facts", {}))


class Regulated:
    """A learner, or several tasks' one, whose gradients pass a frozen regulator; what the trainer trains.

    Args:
        learner: Already started, see :meth:`GramStart.put_into`.
        regulator: Frozen.
        features: (d,) mean unit-length image feature of the training samples, if the regulator reads it.
        module: What the trainer would train without a regulator, if it is not the learner itself.

    Raises:
        DataError: If the regulator needs a second gradient and what is trained can't give it.
    """

    def __init__(
        self,
        learner: Learner,
        regulator: Regulator,
        features: Tensor | None = None,
        module: Trainable | None = None,
    ) -> None:
        self.module: Any = module or learner
        if regulator.needs_general and (module is not None or hasattr(learner, "combine_gradients")):
            what = (
                "several tasks together"
                if module is not None
                else f"{learner.method}, which combines gradients,"
            )
            raise DataError(
                f"the regulator {regulator.method!r} needs two gradients of one learner; {what} can't give them. Use "
                "another regulator (diagonal, low_rank, gated)."
            )
        device = learner.backbone.device
        self.learner, self.regulator = learner, regulator.to(device)
        self.features = None if features is None else features.to(device)
        self._general: dict[str, Tensor] = {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the learner's losses; with a two-gradient regulator also the distance to the frozen model."""
        losses = self.module.loss(batch)
        if self.regulator.needs_general:
            losses = {**losses, "distance": self.regulator.distance(self.learner, batch)}
        return losses

    def _set_aside(self, gradients: Mapping[str, list[Tensor]]) -> list[Tensor]:
        """Keep the second gradient for :meth:`transform_gradients`, add the others up."""
        names = [n for n, p in self.learner.named_parameters() if p.requires_grad]
        self._general = dict(zip(names, gradients["distance"], strict=True))
        parts = [g for name, g in gradients.items() if name != "distance"]
        return [torch.stack(list(own)).sum(0) for own in zip(*parts, strict=True)]

    def transform_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Regulate what the optimiser is about to read."""
        with torch.no_grad():
            return self.regulator(gradients, Situation(self.features, self._general or None))

    def trainable_state(self) -> dict[str, Tensor]:
        """See :meth:`Learner.trainable_state`."""
        return self.module.trainable_state()

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Learner.load_trainable_state`."""
        self.module.load_trainable_state(state)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Return the learner's parameters; the regulator's don't learn."""
        return self.module.named_parameters()

    def train(self, mode: bool = True) -> Regulated:
        """See :meth:`Learner.train`."""
        self.module.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        # What the trainer asks a learner for by its absence or presence (see Learner).
        if name == "combine_gradients" and self.regulator.needs_general:
            return self._set_aside
        if name in _HOOKS:
            return getattr(self.module, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def start_learner(learner: Learner, init: str) -> GramStart | None:
    """Start a learner from what ``train.init`` means; None if it means nothing."""
    if not init:
        return None
    start = read_start(init)
    start.put_into(learner)
    return start


def regulated(
    learner: Learner,
    start: GramStart | None,
    features: Callable[[], Tensor],
    optimizer: str,
    module: Trainable | None = None,
) -> Trainable:
    """Return what to train: the learner with the start's regulator on its gradients.

    Args:
        learner: Already started.
        start: Whose regulator; None leaves everything as it is.
        features: Returns (n, d) image features of the training samples; only called if the regulator reads them.
        optimizer: Name of the rule behind the regulator; Adam's takes positive factors back, which is warned of.
        module: See :class:`Regulated`.
    """
    if start is None:
        return module or learner
    regulator = start.regulator
    if optimizer == "adamw" and regulator.only_scales:
        warnings.warn(
            f"AdamW divides every number by its own size, so the factors of the regulator {regulator.method!r} cancel "
            "but for their sign: use train.optimizer=sgd with it.",
            stacklevel=3,
        )
    seen = F.normalize(F.normalize(features(), dim=-1).mean(0), dim=-1) if regulator.needs_features else None
    return Regulated(learner, regulator, seen, module)
