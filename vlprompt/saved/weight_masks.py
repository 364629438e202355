"""Learned masks as things of their own: read, count, compare, fold into the weights, and switch between tasks.

Masks come from the learners of :mod:`vlprompt.learners.mask_tuning`, saved by :func:`vlprompt.save`: one bit per
weight (numpy's ``packbits``: row-major, first weight in the highest bit), beside the backbone they belong to.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.backbones.base import content_id
from vlprompt.backbones.origin import complete
from vlprompt.backbones.reweighted import ReweightedBackbone
from vlprompt.backbones.weight_masks import maskable, pack, unpack
from vlprompt.core.errors import CheckpointError, UnknownNameError
from vlprompt.saved.card import check_backbone, read
from vlprompt.saved.paths import prompt_folder

__all__ = ["MaskDifference", "Masks", "TaskMasks", "fold", "read_masks"]


@dataclass(frozen=True)
class MaskDifference:
    """How two masks of one weight tensor differ, in numbers of weights.

    Attributes:
        both_off: Switched off by both.
        only_first: Switched off by the first alone.
        only_second: Switched off by the second alone.
        count: Weights in the tensor.
    """

    both_off: int
    only_first: int
    only_second: int
    count: int

    @property
    def overlap(self) -> float:
        """Switched off by both, of what any switches off (intersection over union); 1 if neither switches any."""
        union = self.both_off + self.only_first + self.only_second
        return self.both_off / union if union else 1.0


class Masks(Mapping[str, Tensor]):
    """Boolean masks by the name of the weight in the image tower; False is switched off. Kept 8 weights to a byte.

    Args:
        masks: Name to mask.
        source: The saved prompt they were read from, if they were.
    """

    def __init__(self, masks: Mapping[str, Tensor], source: str | None = None) -> None:
        self.source = source
        self.bits = {name: pack(mask) for name, mask in masks.items()}
        self.shapes = {name: tuple(mask.shape) for name, mask in masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        return unpack(self.bits[name], self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)

    @property
    def digest(self) -> str:
        """A checksum of names and bits."""
        hasher = hashlib.sha256()
        for name in sorted(self.bits):
            hasher.update(name.encode() + b"\0" + self.bits[name].numpy().tobytes())
        return hasher.hexdigest()[:12]

    def sparsity(self) -> dict[str, float]:
        """Return the share of weights that are switched off, by name."""
        return {name: off / size for name, (off, size) in self._counts().items()}

    @property
    def masked_share(self) -> float:
        """The share of all these weights that are switched off."""
        counts = self._counts().values()
        return sum(off for off, _ in counts) / max(1, sum(size for _, size in counts))

    def diff(self, other: Masks) -> dict[str, MaskDifference]:
        """Compare with another task's masks; a weight that one of them doesn't cover is on there.

        Raises:
            CheckpointError: If they are masks of different towers.
        """
        differences = {}
        for name in dict.fromkeys([*self, *other]):
            shape = self.shapes.get(name, other.shapes.get(name, ()))
            if other.shapes.get(name, shape) != shape:
                raise CheckpointError(
                    f"these masks belong to different towers: {name} is {shape} and {other.shapes[name]}."
                )

            first, second = (
                ~m[name] if name in m else torch.zeros(shape, dtype=torch.bool) for m in (self, other)
            )
            both = int((first & second).sum())
            differences[name] = MaskDifference(
                both, int(first.sum()) - both, int(second.sum()) - both, first.numel()
            )

        return differences

    def _counts(self) -> dict[str, tuple[int, int]]:
        counts = {}
        for name, bits in self.bits.items():
            size = int(np.prod(self.shapes[name], dtype=np.int64))
            counts[name] = (size - int(np.unpackbits(bits.numpy()).sum()), size)
        return counts


def read_masks(path: str | Path, backbone: Backbone) -> Masks:
    """Read the masks of a saved learner.

    Args:
        path: The folder; see :func:`vlprompt.save`.
        backbone: The backbone they were learned on.

    Raises:
        CheckpointError: If a file is missing, damaged or hostile, holds no masks, or is another backbone's.
    """
    card, tensors = read(path)
    check_backbone(path, card, backbone)

    packed = {
        n.removeprefix("scores.").replace("/", "."): t for n, t in tensors.items() if n.startswith("scores.")
    }
    if not packed:
        raise CheckpointError(f"{path} holds what {card.method} learned, and no masks.")

    kinds = maskable(backbone.vision.visual)
    masks = {}

    for name, bits in packed.items():
        shape = backbone.vision.visual.get_parameter(name).shape if name in kinds else None
        if shape is None or bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-shape.numel() // 8),):
            raise CheckpointError(
                f"{path}: {name} is no mask of this backbone ({bits.dtype}, {tuple(bits.shape)})."
            )
        masks[name] = unpack(bits, shape)

    return Masks(masks, complete(str(prompt_folder(path))))


def fold(backbone: Backbone, masks: Mapping[str, Tensor]) -> Backbone:
    """Return a copy of the backbone with masked weights: an ordinary one, on which every learner works.

    Its fingerprint says which masks it holds, so cached features and saved prompts of the two are kept apart.
    """
    masks = masks if isinstance(masks, Masks) else Masks(masks)
    folded = copy.deepcopy(backbone)

    with torch.no_grad():
        for name, mask in masks.items():
            weight = folded.vision.visual.get_parameter(name)
            weight.mul_(mask.to(weight.device))

    folded.fingerprint = _fingerprint(backbone, masks)
    folded.origin = {**backbone.origin, "masks": masks.source} if backbone.origin and masks.source else {}
    return folded


class TaskMasks:
    """Masks of several tasks on one frozen backbone, of which one is in use.

    Switching rewrites only weights that the old or the new task switches off, in one copy of the masked tensors; the
    backbone itself never changes. So it takes time and memory in proportion to what is switched off.

    Args:
        backbone: Frozen.
        tasks: Task to masks, see :func:`read_masks`.

    Attributes:
        backbone: A view that runs with the masks in use, none at first. Build learners on it, one per task.
        task: The task in use, None for the backbone as it is.
    """

    def __init__(self, backbone: Backbone, tasks: Mapping[str, Masks]) -> None:
        self.task: str | None = None
        self._plain = backbone
        self._masks = dict(tasks)
        names = dict.fromkeys(name for masks in tasks.values() for name in masks)
        self._frozen = {n: backbone.vision.visual.get_parameter(n).detach().view(-1) for n in names}
        self._used = {n: weight.clone() for n, weight in self._frozen.items()}
        self._off = {
            task: {n: (~masks[n]).view(-1).nonzero().squeeze(1).to(backbone.device) for n in masks}
            for task, masks in tasks.items()
        }
        self.backbone = ReweightedBackbone(backbone, {n: self._replacement(n) for n in names})

    def use(self, task: str | None) -> None:
        """Switch to a task's masks; None: to none.

        Raises:
            UnknownNameError: If there is no such task.
        """
        if task is not None and task not in self._off:
            raise UnknownNameError("task", task, self._off)
        for name, off in self._off[self.task].items() if self.task is not None else ():
            self._used[name].index_copy_(0, off, self._frozen[name].index_select(0, off))
        for name, off in self._off[task].items() if task is not None else ():
            self._used[name].index_fill_(0, off, 0.0)

        self.task = task
        plain = self._plain.fingerprint
        self.backbone.fingerprint = plain if task is None else _fingerprint(self._plain, self._masks[task])

    def _replacement(self, name: str) -> Any:
        return lambda weight: self._used[name].view(weight.shape)


def _fingerprint(backbone: Backbone, masks: Masks) -> dict[str, Any]:
    facts = {**backbone.fingerprint, "masks": masks.digest}
    return {**facts, "id": content_id(facts)}
