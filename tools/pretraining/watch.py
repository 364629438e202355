"""Zero-shot accuracy while a pretraining runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pretraining.corpus import encode
from pretraining.objective import ContrastiveModule
from vlprompt.data.scenes.tasks import build

__all__ = ["ZeroShot"]


class ZeroShot:
    """Zero-shot accuracy on a few tasks' validation splits, to watch a pretraining run.

    Args:
        module: What is trained.
        names: Data sets as (task, style).
        images: At most so many images per data set, spread over its classes.
    """

    def __init__(self, module: ContrastiveModule, names: Sequence[tuple[str, str]], count: int = 200) -> None:
        self.module = module
        self.sets = {}
        position = {token: number for number, token in enumerate(module.seen_ids)}

        for task, style in names:
            data = build(task, "val", style)
            chosen = range(min(count, len(data)))
            images = np.stack([np.asarray(data[i][0]) for i in chosen])
            rows = [encode(t.format(c)) for t in data.templates for c in data.classnames]
            rows_known = [
                [position[token] for token in row if token in position] for row in rows
            ]  # unread words say nothing
            self.sets[data.name] = (torch.from_numpy(images).permute(0, 3, 1, 2), data, rows_known)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return the accuracy, in [0, 1], by data set, and their mean as ``"accuracy"``."""
        scores = {}
        for name, (images, data, rows) in self.sets.items():
            last = torch.tensor([len(row) - 1 for row in rows])
            text = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
            heads = (
                self.module.encode_text(text, last).view(len(data.templates), len(data.classnames), -1).sum(0)
            )
            guess = (self.module.encode_image(images) @ heads.T).argmax(1)
            scores[name] = float((guess == torch.tensor(data.labels[: len(images)])).float().mean())

        return {"accuracy": sum(scores.values()) / len(scores), **scores}
