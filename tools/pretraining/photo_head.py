"""The wide end of ``photo``'s text tower, taught after the tower itself.

The tower is narrower than the joint space, so a linear projection would confine everything it says to a few of the
space's dimensions. A hidden layer between its last norm and the projection lifts that. It is trained on the tower's
states of many sentences, which are computed once, with the tower's own losses.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretraining.photo_sentences import SentenceBatches, said
from vlprompt.backbones.photo_weights import widened
from vlprompt.core.seeding import numpy_rng, seeded_modules
from vlprompt.core.trainable import Trainable
from vlprompt.training.batches import Batch, TensorBatches

__all__ = ["HeadModule", "landing_losses", "state_batches"]

_SCALE = 20.0  # on cosines, before the softmax over rows
_COSINE = 5.0  # weight of the cosine loss beside the cross entropy


def landing_losses(text: Tensor, members: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Return the losses of texts that should land on the rows of the classes they stand for.

    Args:
        text: (B, d) unit features.
        members: (B, C) shares of classes, each row adding up to 1.
        rows: (C, d) unit rows.
    """
    target = F.normalize(members @ rows, dim=-1)
    return {
        "cosine": _COSINE * (1 - (text * target).sum(-1)).mean(),
        "rows": F.cross_entropy(_SCALE * text @ rows.T, members),
    }


class HeadModule(nn.Module, Trainable):
    """The end of the text tower alone.

    Args:
        norm: The tower's last norm as it was trained.
        rows: (C, d) unit rows.
        members: (P, C) shares of classes by phrase.
        seed: Seeds the initial weights.
    """

    def __init__(self, norm: nn.LayerNorm, rows: Tensor, members: Tensor, seed: int) -> None:
        super().__init__()
        with seeded_modules(seed, "photo", "head"):
            self.norm, self.projection = widened(norm, rows.shape[1])
        self.frozen = [rows, members]  # in a list: no part of what is trained and saved

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return both losses of states (B, W) of phrases (B,)."""
        rows, members = self.frozen
        return landing_losses(self(batch["state"]).float(), members[batch["phrase"]], rows)

    def forward(self, states: Tensor) -> Tensor:
        """Return (B, d) unit features of (B, W) states."""
        return F.normalize(self.norm(states) @ self.projection, dim=-1)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return every parameter by name."""
        return {n: t.detach() for n, t in self.state_dict().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put parameters back, strictly."""
        self.load_state_dict(dict(state), strict=True)


@torch.no_grad()
def state_batches(
    tower: nn.Module, sentences: SentenceBatches, batch_size: int, seed: int, views: int
) -> TensorBatches:
    """Return batches of a tower's states of what training says, a sentence per phrase and view.

    Args:
        tower: Has ``states(text, last)``.
        sentences: What is said.
        batch_size: States per batch.
        seed: Draws the sentences.
        views: Sentences per phrase.
    """
    words = sentences.vocabulary
    rows = torch.from_numpy(np.unique(sentences.rows))
    states_by_view = []

    for view in range(views):
        rng = numpy_rng(seed, "sentences of the head", view)
        texts = [said(words.phrases[i], words.above[i], sentences.adjectives, rng) for i in rows]
        parts = [sentences.tokens(texts[i : i + 256]) for i in range(0, len(texts), 256)]
        torch.manual_seed(int(rng.integers(2**31)))  # for embeddings that nobody taught
        states_by_view.append(torch.cat([tower.states(p["text"], p["last"]) for p in parts]))  # type: ignore[operator]

    return TensorBatches({"state": states_by_view, "phrase": [rows]}, batch_size, seed)
