"""Scores of classification: cached image embeddings against text features. The image tower is never called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import whole_words
from vlprompt.core.errors import DataError
from vlprompt.core.names import clean_classname
from vlprompt.core.seeding import torch_rng
from vlprompt.text_search.scorer import Objective, Score, Scorer
from vlprompt.text_search.templates import Rules

__all__ = ["EmbeddingScorer"]

_SENTENCES = 8192  # in one pass over the text tower
_LOGITS = 1 << 25  # numbers held at once
_CONFUSIONS = 5


class EmbeddingScorer(Scorer):
    """Zero-shot classification of labelled embeddings: logits tau <f, w_c>, w_c the class's sentence.

    K templates for C classes are K C sentences in one pass over the packed text tower.

    Args:
        backbone: Its text tower and logit scale.
        classnames: C names.
        embeddings: (n, d) image embeddings of any length.
        labels: (n,) class numbers.
        memo: Folder where scores are kept between runs, by :attr:`identity` and template; None keeps none.
        race_classes: With more classes than this, templates first race on so many of them, and the better half is
            scored on all.

    Raises:
        DataError: If there are no samples.
    """

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        embeddings: Tensor,
        labels: Tensor,
        *,
        memo: Path | None = None,
        race_classes: int = 100,
    ) -> None:
        if not len(labels):
            raise DataError("a template is scored on labelled images, and there are none.")

        self.backbone = backbone
        self.classnames = [clean_classname(name) for name in classnames]
        self.rules = Rules(backbone, classnames)
        self.samples = F.normalize(embeddings.to(backbone.device).float(), dim=-1)
        self.labels = labels.to(self.samples.device).long()
        self.race_classes = race_classes
        self.identity = self._identity()
        self.scored = 0
        self._memo = _Memo(None if memo is None else memo / f"{self.identity}.jsonl")

    def score(self, templates: Sequence[str]) -> list[Score]:
        """See :meth:`Scorer.score`."""
        new = [template for template in dict.fromkeys(templates) if template not in self._memo.scores]
        for template, weights in self._class_features(new):
            self._memo.add(template, self._score(weights, self.rules.tokens(template)))
            self.scored += 1
        return [self._memo.scores[template] for template in templates]

    def remember(self, scores: Mapping[str, Score]) -> None:
        """See :meth:`Scorer.remember`."""
        self._memo.scores |= scores

    def score_together(self, templates: Sequence[str]) -> Score:
        """Return the score of several templates as one: the mean of their unit-length features."""
        weights = self.backbone.class_weights(self.classnames, list(templates))
        return self._score(weights, sum(map(self.rules.tokens, templates)))

    def shortlist(self, templates: Sequence[str], objective: Objective) -> list[str]:
        """See :meth:`Scorer.shortlist`: where there are many classes, the better half on some of them."""
        count = len(self.classnames)
        if count <= self.race_classes or len(templates) < 2:
            return list(templates)

        generator = torch_rng(0, "classes of a race", self.identity)
        chosen = torch.randperm(count, generator=generator)[: self.race_classes].sort().values
        place = torch.full((count,), -1)
        place[chosen] = torch.arange(len(chosen))
        places = place.to(self.labels.device)[self.labels]
        rows = (places >= 0).nonzero()[:, 0]
        if not len(rows):
            return list(templates)

        names = [self.classnames[int(i)] for i in chosen]
        heat = EmbeddingScorer(
            self.backbone, names, self.samples[rows], places[rows], race_classes=self.race_classes
        )
        scores = dict(zip(templates, heat.score(templates), strict=True))
        ranked = sorted(templates, key=lambda template: (*scores[template].rank(objective), template))
        kept = set(ranked[: (len(ranked) + 1) // 2])
        return [template for template in templates if template in kept]

    def vocabulary(self) -> list[str]:
        """Return the words that the tower's tokenizer reads as one token, the most frequent first."""
        return whole_words(self.rules.tokenizer)

    def features(self, texts: Sequence[str]) -> Tensor:
        """See :meth:`Scorer.features`."""
        return self.backbone.encode_text(list(texts))

    def probabilities(self, templates: Sequence[str]) -> Tensor:
        """See :meth:`Scorer.probabilities`."""
        parts = [self._logits(weights).softmax(-1) for _, weights in self._class_features(templates)]
        return torch.stack(parts)

    def _class_features(self, templates: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield each template and the (C, d) unit-length features of its sentences."""
        count = len(self.classnames)
        size = max(1, _SENTENCES // count)
        for start in range(0, len(templates), size):
            part = templates[start : start + size]
            sentences = [template.format(name) for template in part for name in self.classnames]
            features = self.backbone.encode_text(sentences).unflatten(0, (len(part), count))
            yield from zip(part, features, strict=True)

    def _logits(self, weights: Tensor) -> Tensor:
        """Return (n, C) logits."""
        return self.backbone.logit_scale * self.samples @ weights.T

    def _score(self, weights: Tensor, tokens: int) -> Score:
        """Return the score of (C, d) class weights; samples go in chunks where n C numbers are many."""
        count = len(self.classnames)
        size = max(1, _LOGITS // count)
        answers = []
        entropy = torch.zeros((), dtype=torch.float64)
        gap = torch.zeros((), dtype=torch.float64)

        for rows, labels in zip(self.samples.split(size), self.labels.split(size), strict=True):
            logits = self.backbone.logit_scale * rows @ weights.T
            log_probabilities = logits.log_softmax(-1)
            true = log_probabilities.gather(1, labels[:, None])[:, 0]
            others = log_probabilities.scatter(1, labels[:, None], -torch.inf).amax(-1)
            entropy -= true.sum().double().cpu()
            gap += (true.exp() - others.exp()).sum().double().cpu()
            answers.append(logits.argmax(-1))

        table = torch.bincount(self.labels * count + torch.cat(answers), minlength=count * count)
        total = len(self.labels)
        confusion = table.reshape(count, count).cpu()
        return Score(
            accuracy=int(confusion.diagonal().sum()) / total,
            cross_entropy=float(entropy) / total,
            gap=float(gap) / total,
            tokens=tokens,
            recalls=_recalls(confusion),
            confusions=_worst(confusion),
        )

    def _identity(self) -> str:
        """Return 16 hex digits of everything that a score depends on."""
        state = hashlib.sha256()
        state.update(f"{self.backbone.features_id}\x1f{self.backbone.logit_scale!r}\x1f".encode())
        state.update("\x1f".join(self.classnames).encode("utf-8", "surrogatepass"))
        state.update(self.labels.cpu().numpy().tobytes())
        state.update(self.samples.cpu().numpy().tobytes())
        return state.hexdigest()[:16]


class _Memo:
    """Scores by template, in memory and in a file of JSON lines.

    A line that a kill cut short is left out; its template is scored again.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.scores: dict[str, Score] = {}
        if path is None or not path.is_file():
            return

        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                self.scores[record["template"]] = Score.from_record(record["score"])
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, template: str, score: Score) -> None:
        """Remember a score."""
        self.scores[template] = score
        if self.path is None:
            return

        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"template": template, "score": score.record()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")


def _recalls(confusion: Tensor) -> tuple[float, ...]:
    """Return the recall of each class of a (C, C) table of true classes by answers; -1 without samples."""
    sizes = confusion.sum(1)
    right = confusion.diagonal()
    return tuple(int(hits) / int(size) if size else -1.0 for hits, size in zip(right, sizes, strict=True))


def _worst(confusion: Tensor) -> tuple[tuple[int, int, float], ...]:
    """Return the most frequent confusions, by share of the true class."""
    wrong = confusion.clone()
    wrong.fill_diagonal_(0)
    shares = wrong / confusion.sum(1, keepdim=True).clamp(min=1)
    values, places = shares.flatten().sort(descending=True, stable=True)
    return tuple(
        (int(place) // len(confusion), int(place) % len(confusion), round(float(value), 4))
        for value, place in zip(values[:_CONFUSIONS], places[:_CONFUSIONS], strict=True)
        if value > 0
    )
