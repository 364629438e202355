"""TextRefiner: class embeddings are refined by what a memory of local image tokens says about them.

Paper: Xie et al., "TextRefiner: Internal Visual Feature as Efficient Refiner for Vision-Language Models Prompt
Tuning", AAAI 2025, arXiv 2412.08176.

Unlike the authors' code: the refined embedding and the local tokens have length 1 where they are compared
(``lengths: published`` for theirs, of any length); the memory is a part of what is learned, and is written once per
optimiser step, with the tokens of all parts and processes of a batch; the width is the backbone's, not 512; around a
learner whose prompts enter the image tower, local tokens are those of the frozen tower. In a tower that pools the mean
of its patches no class token looks at any: those nearest to the mean are classified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones.local import LocalTokens, local_tokens, require_local_tokens
from vlprompt.core.errors import DataError
from vlprompt.core.seeding import seeded_modules, torch_rng
from vlprompt.core.shares import process_count, share_rows, shared_work
from vlprompt.learners.base import Learner
from vlprompt.learners.hooks import TrainingSamples
from vlprompt.learners.plugins import PLUGINS
from vlprompt.learners.plugins._texts import require_texts
from vlprompt.learners.plugins.base import Plugin

__all__ = ["TextRefiner", "written"]

_LOCAL = "refiner_local"
_PULL = "refiner_pull"
_MEMORY = "memory"


def written(memory: Tensor, tokens: Tensor, momentum: float) -> Tensor:
    """Return a memory in which every token has joined its nearest item.

    Item i becomes m i + (1 - m) times the sum of its tokens, each weighted by exp(<token, i> - the largest of all
    tokens); an item without a token stays. Then all have length 1 again.

    Args:
        memory: (M, d), unit-length.
        tokens: (n, d), of any length.
        momentum: m.
    """
    tokens = F.normalize(tokens, dim=-1)
    scores = tokens @ memory.T  # (n, M)
    nearest = F.one_hot(scores.argmax(1), len(memory)).bool()
    weights = (scores - scores.max(0).values).exp() * nearest

    moved = momentum * memory + (1 - momentum) * weights.T @ tokens
    return F.normalize(torch.where(nearest.any(0)[:, None], moved, memory), dim=-1)


@PLUGINS.register(
    "text_refiner",
    summary="class embeddings refined by a memory of local image tokens",
    paper="2412.08176",
)
class TextRefiner(Plugin):
    """Class embeddings w become w + alpha E [w; q], where q = softmax(w A') A is read from a memory A of M items.

    In training the last block's tokens go through a projector, Linear, BatchNorm, ReLU, Linear. These local tokens z
    are written into the memory (see :func:`written`), and the image's own feature, the patches that matter most to it
    (see :class:`vlprompt.backbones.local.LocalTokens`) and the mean of all are classified by the class embeddings
    before refinement. A third loss pulls the refined embeddings to
    those before. Afterwards neither patches nor projector are used: an image costs what it costs the learner inside.

    Args:
        inner: A learner whose text tower gives one vector per class.
        items: M.
        alpha: Of what is added to a class embedding of length 1; 0 is the learner inside.
        momentum: Of the memory.
        local_weight: Of the local tokens' cross entropy.
        pull_weight: Of the mean distance of each number of a refined embedding from the one before.
        attended: Patches of each image that are classified; all, where it has fewer.
        lengths: ``unit``: refined embeddings and local tokens are compared by their cosine; ``published``: by their
            product with the other side, whatever their length. That is possible around learners alone whose loss is
            the cross entropy of cosines.
        seed: Of the memory's, the projector's and E's start.

    Raises:
        DataError: If it can't stand on that learner; says why.
        BackboneError: If the image tower's local tokens can't be read.
    """

    plugin = "text_refiner"
    rank = 1

    memory: Tensor

    def __init__(
        self,
        inner: Learner,
        *,
        items: Annotated[int, Field(ge=1)] = 25,
        alpha: Annotated[float, Field(ge=0)] = 0.2,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.8,
        local_weight: Annotated[float, Field(ge=0)] = 0.02,
        pull_weight: Annotated[float, Field(ge=0)] = 20.0,
        attended: Annotated[int, Field(ge=1)] = 5,
        lengths: Literal["unit", "published"] = "unit",
        seed: int = 1,
    ) -> None:
        super().__init__(inner)
        require_texts(self)
        require_local_tokens(self.backbone.vision)
        is_plain = type(inner).loss is Learner.loss and type(inner).logits is Learner.logits
        if lengths == "published" and not is_plain:
            self.refuse("its loss is more than the cross entropy of cosines. Use lengths=unit.")
        if inner.recipe.train.get("optimizer", "sgd") == "sgd":
            train = {**inner.recipe.train, "lr": 0.002, "batch_size": 32, "epochs": 10}
            self.recipe = replace(inner.recipe, train=train, epochs_by_shots=())

        self.alpha = alpha
        self.momentum = momentum
        self.local_weight = local_weight
        self.pull_weight = pull_weight
        self.attended = attended
        self.lengths = lengths
        self.static_images = False  # patches are read in training

        width = self.backbone.dim
        start = torch.rand(items, width, generator=torch_rng(seed, "text_refiner memory"))
        self.register_buffer(_MEMORY, F.normalize(start, dim=-1), persistent=False)
        with seeded_modules(seed, "text_refiner"):
            self.extractor = nn.Linear(2 * width, width, bias=False)  # E
            self.projector = nn.Sequential(
                nn.Linear(width, width),
                nn.BatchNorm1d(width, track_running_stats=False),  # used in training alone
                nn.ReLU(),
                nn.Linear(width, width),
            )

        self._texts: tuple[Tensor, Tensor] | None = None  # class embeddings before and after
        self._unwritten: list[Tensor] = []  # local tokens of a step's parts
        self.refiners.append(self._refine)

    # --- the classifier

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: at most the stem and all blocks but the last, which is read."""
        layers = self.backbone.vision.layers
        return layers if self.inner.static_images else min(layers, self.inner.frozen_stages())

    def class_weights(self) -> Tensor:
        """See :meth:`Learner.class_weights`; not of unit length with ``lengths: published``."""
        if self.lengths == "unit":
            return super().class_weights()
        embeddings = self.inner.class_embeddings()
        return self.inner.refined(embeddings) / embeddings.norm(dim=-1, keepdim=True)

    def logits(self, embeddings: Tensor) -> Tensor:
        """See :meth:`Learner.logits`."""
        return self.inner.logits(embeddings) if self.lengths == "unit" else Learner.logits(self, embeddings)

    def _refine(self, embeddings: Tensor) -> Tensor:
        """Return refined (C, d) embeddings, of about the length of those that are given."""
        length = embeddings.norm(dim=-1, keepdim=True)
        unit = embeddings / length
        read = (unit @ self.memory.T).softmax(-1) @ self.memory
        refined = embeddings + self.alpha * length * self.extractor(torch.cat([unit, read], dim=-1))

        if self.training and torch.is_grad_enabled():
            self._texts = (embeddings, refined)  # one text pass serves all losses
        return refined

    # --- training

    def survey(self, sources: Sequence[TrainingSamples]) -> None:
        """See :meth:`LearnerHooks.survey`.

        Raises:
            DataError: In multitask training.
        """
        self.inner.survey(sources)
        # A task of multitask training has a twin of its own, whose tokens would not come here.
        if len(sources) > 1 or all(part is not self for part in sources[0].learner.modules()):
            raise DataError(
                f"{self.title()} keeps the local tokens of one task, so it can't learn several together."
            )

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses inside, the local tokens' cross entropy, and the distance of the refined embeddings."""
        local = local_tokens(self.backbone.vision, batch["image"].to(self.backbone.device))
        if self.inner.static_images and "embedding" not in batch:
            batch = {**batch, "embedding": self.inner.embed_images(local.states)}  # type: ignore[arg-type]

        self._texts = None
        if self.lengths == "unit":
            losses = self.inner.loss(batch)
        else:
            losses = self.classification_loss(self.batch_logits(batch), batch)
        if self._texts is None:
            self._refine_again()
        assert self._texts is not None
        before, after = (F.normalize(texts, dim=-1) for texts in self._texts)
        self._texts = None

        tokens = self._projected(local)
        if self.training and torch.is_grad_enabled():
            self._unwritten.append(tokens.detach().flatten(0, 1))
        return {
            **losses,
            _LOCAL: self.local_weight * self._local_loss(tokens, local.salience, before, batch["label"]),
            _PULL: self.pull_weight * F.l1_loss(after, before),
        }

    def train(self, mode: bool = True) -> TextRefiner:
        """See :meth:`Learner.train`; tokens of a step that was not finished are forgotten."""
        self._unwritten = []
        super().train(mode)
        return self

    def new_losses(self) -> frozenset[str]:
        """See :meth:`Plugin.new_losses`."""
        return frozenset({_LOCAL, _PULL})

    def transform_gradients(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See :meth:`Hooks.transform_gradients`: gradients stay; the memory takes the step's local tokens."""
        if self._unwritten:
            tokens = torch.cat(self._unwritten)
            self._unwritten = []
            if process_count() > 1:
                with shared_work():
                    tokens = share_rows(process_count(), 1, lambda _: [tokens])[0].to(self.memory.device)
            # A new tensor: what a graph has saved of the old one stays.
            self.memory = written(self.memory, tokens, self.momentum)
        return super().transform_gradients(gradients)

    def _refine_again(self) -> None:
        """Refine the class embeddings for a loss inside that did not read them, or without a graph."""
        embeddings = self.inner.class_embeddings()
        self._texts = (embeddings, self._refine(embeddings))

    def _projected(self, local: LocalTokens) -> Tensor:
        """Return (B, 1 + N, d) local tokens z."""
        features = local.features
        return self.projector(features.flatten(0, 1)).unflatten(0, features.shape[:2])

    def _local_loss(self, tokens: Tensor, salience: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of the image's own token, the patches that matter most and the mean of all.

        Args:
            tokens: (B, 1 + N, d).
            salience: (B, N).
            texts: (C, d) class embeddings before refinement, unit-length.
            labels: (B,).
        """
        count = min(self.attended, salience.shape[1])
        places = salience.topk(count, dim=-1).indices + 1  # behind the image's own
        patches = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
        chosen = torch.cat([tokens[:, :1], patches, tokens.mean(1, keepdim=True)], dim=1)
        if self.lengths == "unit":
            chosen = F.normalize(chosen, dim=-1)

        logits = self.backbone.logit_scale * chosen.flatten(0, 1) @ texts.T
        return F.cross_entropy(logits, labels.repeat_interleave(chosen.shape[1]))

    # --- what is learned

    def new_state(self) -> dict[str, Tensor]:
        """See :meth:`Plugin.new_state`: with the memory."""
        return {**super().new_state(), _MEMORY: self.memory}
