"""APE and APE-T: training images vote on the channels that tell classes apart, and more where text doubts them.

Paper: Zhu et al., "Not All Features Matter: Enhancing Few-shot CLIP with Adaptive Prior Refinement", ICCV 2023,
    arXiv 2304.01195, sections 3.1 (channels), 3.2 (APE), 3.3 (APE-T).

Where this differs from the published code: the number of channels and the weights of their two criteria are constants
per data set there, here shares with one default. The mean similarity between classes is a closed form instead of four
loops, and classes may have any number of samples. Texts are hand-written templates; the code adds sentences of a
language model. The code's APE-T can't run as it was released (its call is commented out and reads a key that no file
has); its criterion may come from a file that APE wrote for other inputs, here it reads the texts alone, as its function
does. All is chosen on validation data; the code chooses on test data for ImageNet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.learners import LEARNERS
from vlprompt.learners._cache import SampleCache, best_blend, grid, search_grid
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.hooks import ValidationSamples
from vlprompt.learners.recipe import Recipe

__all__ = ["AdaptivePriors", "TrainedPriors", "interclass_similarity"]

log = logging.getLogger(__name__)

_SMALL = 1e-6  # keeps the surprise finite, as in the published code


class _ChosenChannels(SampleCache):
    """What APE and APE-T share: Q of d channels, and a vote whose weight and sharpness validation chooses.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Averaged into the zero-shot weights w.
        share: Q / d.
        similarity_weight: a, see :meth:`criterion`.
        variance_weight: b, see :meth:`criterion`.
        start: Values of the numbers that validation chooses, by name.
    """

    channels: Tensor
    alpha: Tensor
    beta: Tensor
    reads_images: bool  # whether the keys enter the criterion

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str],
        share: float,
        similarity_weight: float,
        variance_weight: float,
        start: dict[str, float],
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.share_weights = (similarity_weight, variance_weight)
        self.start = start
        for name, value in start.items():
            self.register_buffer(name, torch.tensor(value))

        count = max(1, round(share * backbone.dim))
        self.register_buffer("channels", self.criterion().topk(count).indices.sort().values)

    def criterion(self) -> Tensor:
        """Return (d,) how well each channel tells classes apart: -a similarity + b variance.

        The similarity is that between different classes, see :func:`interclass_similarity`; the variance that of the
        zero-shot weights over classes.
        """
        texts = self.get_buffer("zero_shot")
        labels = torch.arange(len(texts), device=texts.device)
        members = texts
        if self.reads_images:
            members = torch.cat([texts, self.keys.detach()])
            labels = torch.cat([labels, self.values])

        a, b = self.share_weights
        return b * texts.var(0) - a * interclass_similarity(members, labels, len(texts))

    def prepare(self, views: Tensor, labels: Tensor) -> None:
        """See :meth:`SampleCache.prepare`; also chooses the channels, and forgets what validation chose."""
        super().prepare(views, labels)
        self.channels.copy_(self.criterion().topk(len(self.channels)).indices.sort().values)
        for name, value in self.start.items():
            self.get_buffer(name).fill_(value)

        log.debug("%s: %d of %d channels are kept.", self.title(), len(self.channels), self.backbone.dim)

    # --- state

    def cache_tensors(self) -> dict[str, Tensor]:
        """See :meth:`SampleCache.cache_tensors`; beside the samples ``channels`` (Q,) and what validation chose."""
        chosen = {name: self.get_buffer(name) for name in self.start}
        return {**super().cache_tensors(), "channels": self.channels, **chosen}

    def cache_shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """See :meth:`SampleCache.cache_shapes`."""
        chosen = dict.fromkeys(self.start, ())
        return {**super().cache_shapes(count), "channels": (len(self.channels),), **chosen}

    def index_limits(self) -> dict[str, tuple[str, int]]:
        """See :meth:`SampleCache.index_limits`."""
        return {**super().index_limits(), "channels": ("channels", self.backbone.dim)}


@LEARNERS.register(
    "ape", summary="training images vote on the channels that matter; no training", paper="2304.01195"
)
class AdaptivePriors(_ChosenChannels):
    """APE: logits tau <f, w> + alpha sum_n exp(-beta (1 - <f', k'_n>)) exp(gamma D_n) v_n.

    Primes are features on the Q chosen channels, of unit length again; keys k_n, values v_n and the rest are those of
    Tip-Adapter. D_n = log2((1 + 1e-6) / (p_n + 1e-6)) is how much the texts are surprised by the label of sample n: p_n
    is the probability of its class by softmax over <k'_n, w'_c>, without a temperature. With all channels and gamma = 0
    this is Tip-Adapter. An empty cache has no vote: before :meth:`prepare` this is zero-shot classification.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Averaged into the zero-shot weights w.
        share: Q / d (the code: 0.4 to 0.8, most often 0.7).
        similarity_weight: Weight of the similarity between classes, which makes a channel worse (the code: 0.1 to 0.9).
        variance_weight: Weight of the variance over texts, which makes it better (the code: the rest to 1).
        alpha: Weight of the vote where validation data do not choose it.
        beta: Sharpness of similarity, likewise.
        gamma: Weight of surprise, likewise.
        alpha_max: Upper end of the search, which starts at 0.1.
        beta_max: Upper end of the search, which starts at 0.1.
        gamma_max: Upper end of the search, which starts at 0.
        alpha_steps: Values of alpha tried; 0 keeps alpha, beta and gamma.
        beta_steps: Values of beta tried; 0 keeps all three.
        gamma_steps: Values of gamma tried; 0 keeps all three.
    """

    recipe = Recipe(factors=(1.0,))

    gamma: Tensor
    reads_images = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        share: Annotated[float, Field(gt=0, le=1)] = 0.7,
        similarity_weight: Annotated[float, Field(ge=0)] = 0.5,
        variance_weight: Annotated[float, Field(ge=0)] = 0.5,
        alpha: Annotated[float, Field(gt=0)] = 1.0,
        beta: Annotated[float, Field(gt=0)] = 1.0,
        gamma: Annotated[float, Field(ge=0)] = 0.1,
        alpha_max: Annotated[float, Field(gt=0.1)] = 7.0,
        beta_max: Annotated[float, Field(gt=0.1)] = 7.0,
        gamma_max: Annotated[float, Field(gt=0)] = 1.0,
        alpha_steps: Annotated[int, Field(ge=0)] = 20,
        beta_steps: Annotated[int, Field(ge=0)] = 200,
        gamma_steps: Annotated[int, Field(ge=0)] = 20,
    ) -> None:
        start = {"alpha": alpha, "beta": beta, "gamma": gamma}
        super().__init__(backbone, classnames, templates, share, similarity_weight, variance_weight, start)
        self.alphas = search_grid(alpha_max, alpha_steps)
        self.betas = search_grid(beta_max, beta_steps)
        self.gammas = grid(0.0, gamma_max, gamma_steps)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, d) image embeddings."""
        distances = 1 - self._similarities(embeddings)
        affinities = (-self.beta * distances + self.gamma * self.surprise()).exp()
        return super().logits(embeddings) + self.alpha * self.votes(affinities)

    def surprise(self) -> Tensor:
        """Return (N,) D, in bits."""
        texts = F.normalize(self.get_buffer("zero_shot")[:, self.channels], dim=-1)
        probabilities = (self._chosen_keys() @ texts.T).softmax(-1)
        own = probabilities.gather(1, self.values[:, None])[:, 0]
        return ((1 + _SMALL) / (own + _SMALL)).log2()

    @property
    def chooses(self) -> tuple[str, ...]:
        """See :attr:`LearnerHooks.chooses`."""
        return tuple(self.start) if self.alphas and self.betas and self.gammas else ()

    @torch.no_grad()
    def calibrate(self, sources: Sequence[ValidationSamples]) -> dict[str, float]:
        """Choose alpha, beta and gamma on the validation samples of the one task.

        Returns:
            The three and their accuracy; of equally good ones the smallest beta, then alpha, then gamma.
        """
        if not self.chooses:
            return {}

        (source,) = sources  # a cache belongs to its classes, so there is one task
        embeddings, labels = source.validation_data()
        embeddings = embeddings.to(self.keys)
        gammas = torch.tensor(self.gammas).to(self.keys)

        (b, a, g), accuracy = best_blend(
            super().logits(embeddings),
            self._similarities(embeddings),
            labels.to(self.values),
            self.values,
            (self.surprise()[:, None] * gammas).exp(),
            self.alphas,
            self.betas,
        )
        chosen = {"alpha": self.alphas[a], "beta": self.betas[b], "gamma": self.gammas[g]}
        for name, value in chosen.items():
            self.get_buffer(name).fill_(value)
        return {**chosen, "val_accuracy": accuracy}

    def _chosen_keys(self) -> Tensor:
        """Return (N, Q) unit-length keys on the chosen channels."""
        return F.normalize(self.keys[:, self.channels], dim=-1)

    def _similarities(self, embeddings: Tensor) -> Tensor:
        """Return (B, N) cosines on the chosen channels."""
        return F.normalize(embeddings[:, self.channels], dim=-1) @ self._chosen_keys().T


@LEARNERS.register("ape_t", summary="APE with a learned residual on its channels", paper="2304.01195")
class TrainedPriors(_ChosenChannels):
    """APE-T: logits tau <f, w + R> + alpha sum_n exp(-beta (1 - <f, k_n + R_{y_n}>)) u_n v_n.

    Learned are R (C, Q), zero at first and added to a class's text weight and to all its keys on the Q chosen channels,
    and a factor u_n per sample, one at first. Nothing is normalised after the addition. Training keeps alpha and beta;
    validation chooses the epoch (``select: best``), then alpha and beta.

    Published recipe: AdamW, lr 0.001 (1e-4 on four of eleven data sets), eps 0.001, decay 0.1, 20 to 200 epochs, most
    often 30, cosine per step, batch 256, 10 views.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Averaged into the zero-shot weights w.
        share: Q / d (the code: 0.5 to 0.9, most often 0.8).
        similarity_weight: Weight of the similarity between texts, which makes a channel worse.
        variance_weight: Weight of the variance over texts, which makes it better.
        alpha: Weight of the vote in training, and after it where validation data do not choose it.
        beta: Sharpness of similarity, likewise.
        alpha_max: Upper end of the search, which starts at 0.1.
        beta_max: Upper end of the search, which starts at 0.1.
        alpha_steps: Values of alpha tried for each beta; 0 keeps alpha and beta.
        beta_steps: Values of beta tried; 0 keeps alpha and beta.
    """

    recipe = Recipe(
        {
            "lr": 1e-4,
            "batch_size": 256,
            "epochs": 30,
            "optimizer": "adamw",
            "eps": 1e-3,
            "weight_decay": 0.1,
            "schedule": "cosine",
            "warmup_epochs": 0.0,
            "drop_last": False,
        }
    )

    factors: nn.Parameter
    reads_images = False

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        share: Annotated[float, Field(gt=0, le=1)] = 0.8,
        similarity_weight: Annotated[float, Field(ge=0)] = 0.2,
        variance_weight: Annotated[float, Field(ge=0)] = 0.8,
        alpha: Annotated[float, Field(gt=0)] = 1.0,
        beta: Annotated[float, Field(gt=0)] = 1.0,
        alpha_max: Annotated[float, Field(gt=0.1)] = 7.0,
        beta_max: Annotated[float, Field(gt=0.1)] = 7.0,
        alpha_steps: Annotated[int, Field(ge=0)] = 20,
        beta_steps: Annotated[int, Field(ge=0)] = 200,
    ) -> None:
        start = {"alpha": alpha, "beta": beta}
        super().__init__(backbone, classnames, templates, share, similarity_weight, variance_weight, start)
        self.alphas = search_grid(alpha_max, alpha_steps)
        self.betas = search_grid(beta_max, beta_steps)
        self.residual = nn.Parameter(torch.zeros(len(self.classnames), len(self.channels)))
        self.factors = nn.Parameter(torch.ones(0))

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`; w + R, whose length counts in the logits."""
        return self.get_buffer("zero_shot") + self._spread()

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, d) image embeddings."""
        features = F.normalize(embeddings, dim=-1)
        affinities = (-self.beta * (1 - self._similarities(features))).exp() * self.factors
        return self._text_logits(features) + self.alpha * self.votes(affinities)

    def prepare(self, views: Tensor, labels: Tensor) -> None:
        """See :meth:`SampleCache.prepare`; also chooses the channels and puts what is learned back to its start."""
        super().prepare(views, labels)
        with torch.no_grad():
            self.residual.zero_()
            self.factors.fill_(1.0)

    def resize(self, count: int) -> None:
        """See :meth:`SampleCache.resize`."""
        super().resize(count)
        self.factors = nn.Parameter(torch.ones(count, device=self.backbone.device))

    @property
    def chooses(self) -> tuple[str, ...]:
        """See :attr:`LearnerHooks.chooses`."""
        return tuple(self.start) if self.alphas and self.betas else ()

    def calibrate(self, sources: Sequence[ValidationSamples]) -> dict[str, float]:
        """See :meth:`SampleCache.choose_alpha_and_beta`."""
        factors = self.factors[:, None]
        return self.choose_alpha_and_beta(sources, self._text_logits, self._similarities, factors)

    def cache_tensors(self) -> dict[str, Tensor]:
        """See :meth:`SampleCache.cache_tensors`; also ``residual`` (C, Q) and ``factors`` (N,)."""
        return {**super().cache_tensors(), "residual": self.residual, "factors": self.factors}

    def cache_shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """See :meth:`SampleCache.cache_shapes`."""
        learned = {"residual": tuple(self.residual.shape), "factors": (count,)}
        return {**super().cache_shapes(count), **learned}

    def _spread(self) -> Tensor:
        """Return (C, d) the residual on all channels, zero on those that were not chosen."""
        empty = torch.zeros_like(self.get_buffer("zero_shot"))
        return empty.index_copy(1, self.channels, self.residual)

    def _text_logits(self, features: Tensor) -> Tensor:
        return self.backbone.logit_scale * features @ self.class_embeddings().T

    def _similarities(self, features: Tensor) -> Tensor:
        """Return (B, N) products of (B, d) unit-length features and the moved keys."""
        return features @ (self.keys + self._spread()[self.values]).T


def interclass_similarity(members: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return (d,) the mean, over pairs of members of different classes, of the product of their values per channel.

    With s_c the sum over the members of class c and m_c their number it is ((sum s_c)^2 - sum s_c^2) / ((sum m_c)^2 -
    sum m_c^2).

    Args:
        members: (m, d).
        labels: (m,) class numbers.
        classes: C.
    """
    sums = members.new_zeros(classes, members.shape[1]).index_add(0, labels, members)
    counts = torch.bincount(labels, minlength=classes)

    products = sums.sum(0).square() - sums.square().sum(0)
    pairs = counts.sum() ** 2 - counts.square().sum()
    return products / pairs
