"""PromptAlign: TPT that also moves the statistics of image tokens towards those of the training data.

Paper: Hassan et al., "Align Your Prompts: Test-Time Prompting with Distribution Alignment for Zero-Shot
    Generalization", NeurIPS 2023, arXiv 2311.01459, section 3.

The paper's sentence and the published code differ. The code takes the tokens that enter a block, after the block's
prompts were put in; it aligns the first ``layers - 1`` blocks and divides by ``layers``. The other reading takes what
blocks put out, of all ``layers`` blocks, and divides by their number. ``variant`` decides; the code is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._prompts import PromptAdapter
from vlprompt.adaptation._tuning import Rate, Rule
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.classification.evaluate import ImageReader
from vlprompt.core.errors import CheckpointError, ConfigError, DataError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.core.options import check_counts
from vlprompt.core.paths import user_path
from vlprompt.data import ImageDataset
from vlprompt.learners import Learner

__all__ = ["PromptAlign", "SourceStatistics", "source_statistics"]


@dataclass(frozen=True)
class SourceStatistics:
    """Statistics of the tokens in the image tower on a learner's training data.

    Attributes:
        means: (2, L, T, W) means over images, per block, token and channel: of the tokens that enter a block, after the
            block's prompts were put in, and of those that leave it.
        variances: (2, L, T, W) variances over images.
        backbone: Id of the backbone's fingerprint.
    """

    means: Tensor
    variances: Tensor
    backbone: str

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {"means": self.means, "variances": self.variances}
        write_tensors(user_path(path), tensors, {"backbone": self.backbone})

    @classmethod
    def load(cls, path: str | Path) -> SourceStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is missing, damaged or another one.
        """
        tensors, metadata = read_tensors(user_path(path))
        if tensors.keys() != {"means", "variances"} or "backbone" not in metadata:
            raise CheckpointError(f"{path} holds no source statistics.")

        shape = tensors["means"].shape
        if len(shape) != 4 or shape[0] != 2 or tensors["variances"].shape != shape:
            raise CheckpointError(
                f"{path}: source statistics are two tensors (2, L, T, W), of what enters the blocks and what leaves "
                f"them; these are {tuple(shape)} and {tuple(tensors['variances'].shape)}. Measure them again."
            )
        return cls(tensors["means"], tensors["variances"], metadata["backbone"])


@torch.no_grad()
def source_statistics(learner: Learner, data: ImageDataset, batch_size: int = 32) -> SourceStatistics:
    """Return the statistics of a learner's image tower, with its prompts, over a data set.

    Args:
        learner: One whose prompts enter the image tower.
        data: Its training data.
        batch_size: Images per pass.

    Raises:
        DataError: If there is no image, or the tower has no blocks.
    """
    check_counts(batch_size=batch_size)
    backbone = learner.eval().backbone
    if not len(data) or not backbone.vision.layers:
        raise DataError("source statistics need at least one image and an image tower with blocks.")

    # In float64: a variance is a difference of two sums that are much larger.
    total = torch.zeros((), dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for pixels in ImageReader(data, backbone.preprocess).batches(batch_size):
        with _recorded_tokens(backbone.vision.blocks) as tokens:
            learner.embed_images(pixels.to(backbone.device))
        states = torch.stack([torch.stack(tokens.entering), torch.stack(tokens.leaving)])  # (2, L, B, T, W)
        states = states.double().cpu()
        total = total + states.sum(2)
        squares = squares + states.square().sum(2)

    mean = total / len(data)
    # Rounding may push a variance of 0 below it.
    variance = (squares / len(data) - mean.square()).clamp(min=0)
    return SourceStatistics(mean.float(), variance.float(), backbone.features_id)


@ADAPTERS.register(
    "promptalign",
    summary="TPT of visual prompts that also aligns token statistics with the training data's",
    paper="2311.01459",
    needs=("text gradients", "image gradients", "source statistics"),
)
class PromptAlign(PromptAdapter):
    """Minimise marginal entropy + weight * distance of the kept views' token statistics from the source statistics.

    The distance of a block is half the mean absolute difference of the means plus half that of the variances, per token
    and channel, over the kept views. Those of the blocks are added up and divided by ``layers``.

    Args:
        learner: One whose prompts enter the image tower (MaPLe in the paper, trained on ImageNet).
        statistics: Of that learner's training data, or the file they were saved in.
        layers: What the sum is divided by; ``code`` aligns one block fewer.
        variant: ``"code"`` aligns the tokens that enter the first ``layers - 1`` blocks; ``"paper"`` those that leave
            the first ``layers`` blocks.
        weight: Of the alignment.
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that are used, the most confident ones.
        steps: Updates per image.
        lr: Learning rate of AdamW (the paper: 0.04 under shift, 0.0005 on fine-grained data sets).
        weight_decay: Of AdamW.

    Raises:
        ConfigError: If ``code`` is left without a block to align.
        DataError: If the learner's prompts do not enter the image tower.
        CheckpointError: If the statistics belong to another backbone or other prompts.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        statistics: SourceStatistics | str,
        layers: Annotated[int, Field(ge=1)] = 3,
        variant: Literal["code", "paper"] = "code",
        weight: Annotated[float, Field(ge=0)] = 100.0,
        views: Annotated[int, Field(ge=1)] = 64,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Annotated[float, Field(gt=0, le=1)] = 0.1,
        steps: Annotated[int, Field(ge=0)] = 1,
        lr: Rate = 4e-2,
        weight_decay: Rate = 0.01,
    ) -> None:
        rule = Rule(steps, lr, weight_decay=weight_decay)
        super().__init__(learner, ViewPlan(views, augment, seed), rule, share, together=1)

        if learner.static_images:
            raise DataError(
                f"promptalign moves prompts of the image tower; {learner.method} has none. Start from maple, ivlp, "
                "vpt, upt or promptsrc."
            )

        if isinstance(statistics, str):
            statistics = SourceStatistics.load(statistics)
        # Another backbone has other channels, even where the shapes agree.
        if statistics.backbone != self.backbone.features_id:
            raise CheckpointError("the source statistics were measured on another backbone.")

        if variant == "code" and layers == 1:
            problem = "layers: variant=code aligns the first layers - 1 blocks, so it is at least 2; or variant=paper."
            raise ConfigError([problem], "adapter 'promptalign'")

        self.weight = weight
        self.layers = min(layers, self.backbone.vision.layers)
        self.variant = variant
        side = 0 if variant == "code" else 1
        self.aligned_blocks = self.layers - 1 if variant == "code" else self.layers
        device = self.backbone.device
        self.means = statistics.means[side, : self.aligned_blocks].to(device)
        self.variances = statistics.variances[side, : self.aligned_blocks].to(device)

    def tune_pixels(self, pixels: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """See :meth:`PromptAdapter.tune_pixels`."""
        return self.tuner.tune_through_images(pixels, mask, self.aligned).logits

    def aligned(self, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Run the image tower and return its features and the weighted distance from the source statistics."""
        with _recorded_tokens(self.backbone.vision.blocks[: self.aligned_blocks]) as tokens:
            features = run()

        recorded = tokens.entering if self.variant == "code" else tokens.leaving
        states = torch.stack(recorded).float()  # (L, V, T, W)
        if states.shape[2] != self.means.shape[1]:
            raise CheckpointError(
                f"the source statistics have {self.means.shape[1]} tokens, the learner's image tower has "
                f"{states.shape[2]}: they were measured with other prompts."
            )

        # Statistics of one image are those over its views, per layer, token and channel.
        mean = states.mean(1)
        variance = (states - mean[:, None]).square().mean(1)
        distances = 0.5 * (mean - self.means).abs() + 0.5 * (variance - self.variances).abs()
        distance = distances.mean((1, 2)).sum() / self.layers

        return features, self.weight * distance


@dataclass(frozen=True)
class _Tokens:
    """The tokens before and after each block, (B, T, W) each."""

    entering: list[Tensor]
    leaving: list[Tensor]


@contextmanager
def _recorded_tokens(blocks: Sequence[Any]) -> Iterator[_Tokens]:
    """Collect what enters and what leaves blocks while the context is open."""
    tokens = _Tokens([], [])

    def record(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tokens.entering.append(inputs[0])
        tokens.leaving.append(output)

    handles = [block.register_forward_hook(record) for block in blocks]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()
