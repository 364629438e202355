"""Where prompts start from: saved prompts of other tasks, put into a learner of new classes, strictly.

Paper: Shen et al., "Multitask Vision-Language Prompt Tuning", arXiv 2211.11720, section 3.3. Differs from the
authors' code in that what does not fit is refused instead of ignored, and that what a learner started from is part
of the result: one of their scripts forgets to pass the source prompts and tunes from scratch in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprompt.core.errors import CheckpointError
from vlprompt.core.options import options_model
from vlprompt.core.trainable import misfits
from vlprompt.learners import LEARNERS, Learner
from vlprompt.saved.prompts import check_backbone, read

__all__ = ["start_from"]


def start_from(learner: Learner, prompts: Sequence[str | Path]) -> dict[str, Any]:
    """Put saved prompts, or the element-wise mean of several, into a learner of other classes.

    Args:
        learner: Changed in place; what belongs to its classes stays its own.
        prompts: Folders, see :func:`vlprompt.save`.

    Returns:
        What to record: the folders, the checksums of their tensors, and how many were averaged.

    Raises:
        CheckpointError: If a method, an option, the backbone, a tensor's name or its shape differs; each is named.
            If there are several and they hold bits or numbers of classes.
    """
    states: list[dict[str, Tensor]] = []
    checksums = []

    for path in prompts:
        card, state = read(path)
        check_backbone(path, card, learner.backbone)

        problems = _differences(learner, card.method, card.options)
        problems = problems or misfits(learner.trainable_state(), state)
        if problems:
            raise CheckpointError(f"{path} can't start {learner.method}: {'; '.join(problems)}.")

        states.append(state)
        checksums.append(card.tensors[:12])

    learner.load_trainable_state({name: _mean(name, [state[name] for state in states]) for name in states[0]})
    return {
        "init_from": [str(path) for path in prompts],
        "init_checksums": checksums,
        "init_mean_of": len(states),
    }


def _mean(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Return the element-wise mean; a single tensor as it is."""
    if len(tensors) == 1:
        return tensors[0]

    if not tensors[0].is_floating_point():
        raise CheckpointError(f"{name} holds {tensors[0].dtype}, which has no mean: start from one folder.")
    return torch.stack(list(tensors)).mean(0)


def _differences(learner: Learner, method: str, options: Mapping[str, Any]) -> list[str]:
    """Compare the method and all options that decide what the tensors mean.

    A seed doesn't, nor do the classes of a head that is no set of parameters per class.
    """
    if method != learner.method:
        return [f"it holds prompts of {method}"]

    kind = LEARNERS.get(method).target if method in LEARNERS else type(learner)
    defaults = {name: field.default for name, field in options_model(kind).model_fields.items()}
    meaningless = {"seed"} if learner.head_bound else {"seed", "head_classes"}
    theirs = {**defaults, **_comparable(options, meaningless)}
    ours = {**defaults, **_comparable(learner.options, meaningless)}

    differences = []
    for name in sorted({*theirs, *ours} - meaningless):
        if str(theirs.get(name)) != str(ours.get(name)):
            differences.append(f"option {name} is {theirs.get(name)!r} there and {ours.get(name)!r} here")
    return differences


def _comparable(options: Mapping[str, Any], meaningless: set[str]) -> dict[str, Any]:
    """Return options with those of plug-ins stripped of what does not decide what tensors mean."""
    plugins = [
        {name: value for name, value in row.items() if name not in meaningless}
        for row in options.get("plugins", ())
        if isinstance(row, Mapping)
    ]
    return {**options, "plugins": plugins} if plugins else dict(options)
