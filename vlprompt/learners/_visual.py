"""Learned visual prompts: where they start from, how deep they go, and the learners that put them into images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlprompt.backbones.vision import Images, Insertion, Prompts, VisionTower
from vlprompt.core.seeding import torch_rng
from vlprompt.learners.base import Learner

__all__ = ["ComputedOnce", "PromptedImages", "initial_visual_prompts", "possible_depth", "upper_blocks"]

log = logging.getLogger("vlprompt.learners")

T = TypeVar("T")


def possible_depth(asked: int | None, *layers: int) -> int:
    """Return how many layers can be prompted.

    Args:
        asked: The option's value; None is all. More than there are is cut, with a line in the log.
        layers: Layers of the towers that are prompted; the shallowest decides.
    """
    most = min(layers)
    if asked is None:
        return most

    if asked > most:
        log.info("prompts for %d layers were asked for, this backbone has %d: using %d.", asked, most, most)
    return min(asked, most)


def upper_blocks(asked: int | None, share: float, *layers: int) -> int:
    """Return how many of the last blocks of several towers something enters.

    Args:
        asked: The option's value; None is the share of the shallowest tower. More than that has is cut.
        share: In (0, 1].
        layers: Blocks of the towers.
    """
    most = min(layers)
    return max(1, round(share * most)) if asked is None else min(asked, most)


def initial_visual_prompts(
    tower: VisionTower, depth: int, length: int, insertion: Insertion = "after_cls", seed: int = 1
) -> Tensor:
    """Return (J, M, W) float32 start values of visual prompts.

    ``after_cls`` starts as VPT does (Jia et al. 2022, section 4.1): uniform in +-sqrt(6 / (fan-in of the patch
    embedding + W)); ``append`` as MaPLe and PromptSRC do: N(0, 0.02^2). Row i is the same whatever the depth.

    Args:
        tower: The image tower they enter.
        depth: J, number of prompted layers; 1 is shallow.
        length: M, prompt tokens per layer.
        insertion: Their place, see :class:`VisualPrompts`.
        seed: Of the draw.

    Raises:
        BackboneError: If visual prompts can't enter this tower.
    """
    tower.require_prompts()
    assert tower.stream is not None  # it takes tokens
    generator = torch_rng(seed, "visual prompts")
    shape = (depth, length, tower.width)

    if insertion == "append":
        return 0.02 * torch.randn(shape, generator=generator)

    bound = math.sqrt(6 / (3 * math.prod(tower.stream.patch) + tower.width))  # a patch's numbers, and W
    return bound * (2 * torch.rand(shape, generator=generator) - 1)


class ComputedOnce(Learner):
    """Base of learners that make something of their parameters alone, which is computed once per evaluation."""

    _constants: dict[str, Any]

    def train(self, mode: bool = True) -> ComputedOnce:
        """See :meth:`Learner.train`."""
        self._constants = {}
        super().train(mode)
        return self

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Learner.load_trainable_state`."""
        super().load_trainable_state(state)
        self._constants = {}

    def _once(self, name: str, compute: Callable[[], T]) -> T:
        """Compute something; in evaluation without gradients only the first time."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()

        constants: dict[str, Any] = self.__dict__.setdefault("_constants", {})
        if name not in constants:
            constants[name] = compute()
        return constants[name]


class PromptedImages(ComputedOnce):
    """Base of learners whose prompts enter the image tower.

    A method defines :meth:`visual_prompts`. What depends on parameters alone is computed once per step while
    training and once per evaluation otherwise.

    Attributes:
        visual_dropout: Share of prompt values that are dropped in training, drawn per image and layer.
    """

    static_images: bool = False
    visual_dropout: float = 0.0

    def visual_prompts(self) -> Prompts:
        """Return the prompts of the image tower: (J, M, W) tokens, or pixels."""
        raise NotImplementedError

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: tokens enter after the stem."""
        return 1

    def embed_images(self, images: Images) -> Tensor:
        """See :meth:`Learner.embed_images`."""
        prompts = self._once("visual", self.visual_prompts)

        if self.training and self.visual_dropout > 0:
            prompts = prompts.dropped(self.visual_dropout, len(images))

        return self.backbone.image_embeddings(images, prompts)
