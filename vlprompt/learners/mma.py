"""MMA: bottleneck adapters beside the upper blocks of both towers, with a middle layer that both share.

Paper: Yang et al., "MMA: Multi-Modal Adapter for Vision-Language Models", CVPR 2024, section 3.3.

The authors' code multiplies the gradients of its adapters by 1 / s through functions of its own. With plain SGD that is
the rate lr / s with the weight decay s wd, exactly, so the recipe has these and the gradients are the true ones. Their
code keeps the class features of its first evaluation; here an evaluation during training sees the present ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.edits import BlockEdit
from vlprompt.backbones.vision import Images
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import LEARNERS
from vlprompt.learners._visual import upper_blocks
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.recipe import Recipe

__all__ = ["MMA", "Bottleneck"]

_SHARE = 8 / 12  # of the blocks: 5 to 12 of 12, counted from 1


class Bottleneck(nn.Module):
    """One tower's part of an adapter: s U relu(S relu(D x)), where S belongs to both towers.

    Args:
        width: W of the tower.
        inner: Width of the bottleneck.
        scale: s.
        generator: Draws D and U (Kaiming normal by what goes out); offsets start at zero.
    """

    def __init__(self, width: int, inner: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.down = _linear(width, inner, generator)  # D: W -> R
        self.up = _linear(inner, width, generator)  # U: R -> W
        self.scale = scale

    def forward(self, x: Tensor, shared: nn.Module) -> Tensor:
        """Return what is added to the output of the block whose normed input is (..., W); ``shared`` is S."""
        inner = F.relu(self.down(x.to(self.down.weight.dtype)))  # what is learned is float32
        return self.scale * self.up(F.relu(shared(inner)))


@LEARNERS.register(
    "mma",
    summary="bottlenecks beside upper blocks of both towers, with a shared layer",
    paper="Yang et al., CVPR 2024",
    needs=("text", "vision"),
)
class MMA(Learner):
    """The last J blocks of each tower get a bottleneck beside them; those of equal rank from the top share a layer.

    It starts near zero-shot classification: its logits differ by what s lets through.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: The first makes the sentences; the published code has "a photo of a {}." for every data set.
        depth: J, blocks of each tower, at most all the shallower one has; None: 8 of 12.
        width: Of the bottleneck.
        scale: s.
        seed: Of all random starts.

    Raises:
        BackboneError: If a tower has no blocks that begin with a LayerNorm and can be run by hand.
        VLPromptError: If a sentence is too long for the text tower; names its class.
    """

    recipe = Recipe(
        {
            "lr": 1.5,  # the paper's 0.0015 / s
            "batch_size": 16,
            "epochs": 5,
            "weight_decay": 5e-7,  # the paper's 0.0005 s
            "warmup_epochs": 0.0,
        },
        factors=(0.1, 1.0, 10.0),
        steps=100,
        trial_steps=30,
    )

    static_images = False
    learns_texts = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        depth: Annotated[int | None, Field(ge=1)] = None,
        width: Annotated[int, Field(ge=1)] = 32,
        scale: Annotated[float, Field(gt=0)] = 0.001,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        text = backbone.text
        vision = backbone.vision
        text.require_edits()
        vision.require_edits()
        count = upper_blocks(depth, _SHARE, text.layers, vision.layers)

        def bottlenecks(tower: str, size: int) -> nn.ModuleList:
            generator = torch_rng(seed, "mma", tower)
            return nn.ModuleList(Bottleneck(size, width, scale, generator) for _ in range(count))

        # By rank: the last of each list belongs to the last block.
        self.text = bottlenecks("text", text.width)
        self.vision = bottlenecks("vision", vision.width)
        generator = torch_rng(seed, "mma", "shared")
        self.shared = nn.ModuleList(_linear(width, width, generator) for _ in range(count))  # S

        sentences = [text.sentence(self.templates[0].format(name)) for name in self.classnames]
        self.layout = text.layout(sentences, self.classnames)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        tower = self.backbone.text
        return tower.encode(self.layout, adapters=self._edits(self.text, tower.layers))

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: the stem, and the blocks below the first bottleneck."""
        return 1 + self.backbone.vision.layers - len(self.vision)

    def embed_images(self, images: Images) -> Tensor:
        """See :meth:`Learner.embed_images`."""
        edits = self._edits(self.vision, self.backbone.vision.layers)
        return self.backbone.image_embeddings(images, adapters=edits)

    def _edits(self, bottlenecks: nn.ModuleList, layers: int) -> list[BlockEdit | None]:
        """Return one entry per block of a tower."""
        edits: list[BlockEdit | None] = [None] * (layers - len(bottlenecks))
        for own, shared in zip(bottlenecks, self.shared, strict=True):
            edits.append(BlockEdit(parallel=_Beside(own, shared)))
        return edits


class _Beside:
    """A tower's part of an adapter together with the shared one: a function of the block's normed input."""

    def __init__(self, own: nn.Module, shared: nn.Module) -> None:
        self.own = own
        self.shared = shared

    def __call__(self, x: Tensor) -> Tensor:
        return self.own(x, self.shared)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with Kaiming's normal start by what goes out of it, and zero offsets."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.normal_(std=(2 / outputs) ** 0.5, generator=generator)
        layer.bias.zero_()
    return layer
