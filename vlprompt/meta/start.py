"""What meta-training leaves behind: prompts and a regulator, written to a folder and read back.

``train.init=gram:PATH`` starts a run from it, ``vlprompt.fit(learner, ..., init="gram:PATH")`` a learner. This is the
model-agnostic use of "Gradient-Regulated Meta-Prompt Learning" (ICCV 2023, arXiv 2303.06571).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprompt.core.errors import CheckpointError, DataError, UnknownNameError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.core.options import options_model
from vlprompt.learners import LEARNERS, Learner
from vlprompt.meta.regulators import Regulator, Situation, create_regulator
from vlprompt.saved.paths import find_prompts
from vlprompt.saved.prompts import PromptCard, check_backbone, read, save

__all__ = ["GramStart", "read_start", "save_start", "start_learner"]

_PREFIX = "gram:"
_FILE = "regulator.safetensors"
_MEANING = ("position", "insertion")  # options that decide where a prompt stands, and so what it means


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
            CheckpointError: If the backbone differs, or the learner has no fitting tensor for a prompt that the
                regulator is for; says why.
        """
        check_backbone(self.folder, self.card, learner.backbone)

        state = learner.trainable_state()
        problems = self._problems(state) + self._different_meaning(learner)
        if problems:
            raise CheckpointError(
                f"{self.folder} ({self.card.method}, meta-learned) can't start {learner.method or 'this learner'}: "
                f"{'; '.join(problems)}. The learner's options must fit those the prompts were meta-learned with."
            )

        device = learner.backbone.device
        fitting = {}
        for name, tensor in self.prompts.items():
            if name in state and state[name].shape == tensor.shape:
                fitting[name] = tensor.to(device)
        learner.load_trainable_state(state | fitting)
        return sorted(fitting)

    def _problems(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return which regulated prompts a learner's state has no tensor for, and why."""
        problems = []

        for name, tensor in self.prompts.items():
            if name not in self.regulator.shapes:
                continue
            if name not in state:
                problems.append(f"it has no {name}")
            elif state[name].shape != tensor.shape:
                problems.append(
                    f"its {name} has shape {tuple(state[name].shape)}, the meta-learned one {tuple(tensor.shape)}"
                )

        return problems

    def _different_meaning(self, learner: Learner) -> list[str]:
        """Return the options of a learner that put its prompts elsewhere than they stood in meta-training."""
        now = _positions(learner.method, learner.options)
        then = _positions(self.card.method, self.card.options)

        problems = []
        for name in _MEANING:
            if name in now and name in then and now[name] != then[name]:
                problems.append(f"its {name} is {now[name]!r}, in meta-training it was {then[name]!r}")
        return problems

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

        regulate_rows = torch.func.vmap(lambda gradients: self.regulator(gradients, Situation()))

        def regulate(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
            return regulate_rows({name: gradient.float() for name, gradient in gradients.items()})

        return regulate


def _positions(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that decide where a method's prompts stand, defaults included."""
    fields = options_model(LEARNERS.get(method).target).model_fields if method in LEARNERS else {}
    defaults = {name: fields[name].default for name in _MEANING if name in fields}
    return {name: value for name, value in {**defaults, **options}.items() if name in _MEANING}


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

    matches = find_prompts([init.removeprefix(_PREFIX)])
    if len(matches) != 1:
        raise CheckpointError(f"{init} means {len(matches)} saved prompts ({', '.join(matches)}); name one.")

    folder = Path(matches[0])
    card, prompts = read(folder)
    if not (folder / _FILE).is_file():
        raise CheckpointError(
            f"{folder} holds prompts without {_FILE}: they were not meta-learned. Use target.init_from for them."
        )

    tensors, metadata = read_tensors(folder / _FILE)
    try:
        about = metadata["regulator"]
        shapes = {name: torch.Size(shape) for name, shape in about["shapes"].items()}
        regulator = create_regulator(about["name"], shapes, int(about["dim"]), **about["options"])
        regulator.load_state_dict(tensors)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / _FILE} is damaged: {error}.") from error
    if about.get("prompts") != card.tensors:
        raise CheckpointError(f"{folder / _FILE} belongs to other prompts than those beside it.")

    return GramStart(folder, card, prompts, regulator.requires_grad_(False).eval(), metadata.get("facts", {}))


def start_learner(learner: Learner, init: str) -> GramStart | None:
    """Start a learner from what ``train.init`` means; None if it is empty."""
    if not init:
        return None

    start = read_start(init)
    start.put_into(learner)
    return start
