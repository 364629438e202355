"""DBOM: which trigger and which object, told apart.

Paper: "Disentangled Backdoor-Object Modeling", arXiv 2508.01932. Its components are known (a repository of visual
    prompts that is looked up by similarity, learned prompt prefixes, a separation and a diversity loss, decomposition
    and fusion of the image feature); their exact forms, sizes and weights are not public. Everything beyond those names
    is a reconstruction, in the manner of CSP and Troika (soft prompts of pairs, three kinds of logits). One thing is
    ours by need: CLIP's image feature says what an image shows, so the trigger's side reads statistics of the pixels
    and of the tower's first convolution instead (see vlprompt.backbones.shallow); ``evidence=embedding`` is the variant
    without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.layout import slot
from vlprompt.backbones.shallow import READS, embed_with_statistics, statistics_width
from vlprompt.core.errors import CheckpointError, ConfigError, DataError
from vlprompt.core.seeding import seeded_modules
from vlprompt.learners import LEARNERS
from vlprompt.learners._calibration import best_mixing, threshold_at
from vlprompt.learners._context import initial_context
from vlprompt.learners._judgement import Judgement
from vlprompt.learners._repository import Bank, diversity, separation
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner

__all__ = ["DBOM", "DEFAULT_TRIGGERS"]

DEFAULT_TRIGGERS = ("clean", "badnets", "blended", "bpp", "ftrojan", "sig", "trojan", "wanet")
_SENTENCES = 1 << 12  # of prefixes that depend on the image, in one pass without gradient


@LEARNERS.register(
    "dbom",
    summary="trigger and object of an image, by soft prompts of their pairs",
    paper="2508.01932",
    needs=("text", "pairs"),
)
class DBOM(Learner):
    """Scores every (trigger, object) pair; as a classifier it names the object, whatever the trigger.

    Sentences: pair [v | w_t | object .], trigger [v' | w_t .], object [v'' | object .]; v are learned prefixes of M
    vectors, w_t one learned vector per trigger, the object's name is written out, so other objects can be named.
    Image side: p_t, p_o are looked up in the repository, f_t = D_t(e, p_t), f_o = f + D_o(f, P(t), e, p_o) with the
    evidence e, f_p = beta f + (1 - beta) F(f_t, f_o). A pair's score: tau (<f_p, pair> + a <f_t, trigger> +
    b <f_o, object>), a and b chosen on validation data. e is standardised by the training images' mean and spread.

    Args:
        backbone: See :class:`Learner`.
        classnames: The objects.
        templates: See :class:`Learner`; not used.
        triggers: Names of triggers, the first for none.
        evidence: What the trigger's side reads: statistics of the pixels and of the first convolution, or the image
            embedding (the paper's, as far as is known: then f_t = f + D_t(f, p_t)).
        object_reads: ``"both"`` shows the object's side the evidence beside the embedding, from which an overlay has
            taken some of what the object looks like (its colour, say); ``"embedding"`` doesn't.
        repository: A bank of prompts for triggers and one for objects, one for both, or none.
        prompts: M per bank; None for twice the number of triggers, and for 32 for objects (or both).
        prompt_length: Vectors per prompt.
        top: Prompts an image takes.
        prefix: ``"conditional"`` shifts the prefixes of triggers and objects by a small network of what was looked up.
        context_length: M, if ``init`` is empty.
        init: Phrase that starts the prefixes.
        hidden: Width of the decomposition's hidden layers.
        dropout: Inside the decomposition.
        primitive_weight: Of the cross entropies of triggers and of objects.
        separation_weight: Of the separation loss (split repository only).
        diversity_weight: Of the diversity loss.
        pull_weight: Of the pull of keys towards queries.
        false_alarms: Share of clean validation images that the verdict may suspect.
        seed: Of everything drawn.

    Raises:
        ConfigError: If ``triggers`` are fewer than two or repeat.
        BackboneError: If learned context can't enter the text tower, or there is no convolution to look at.
        VLPromptError: If an object's name is too long for the tower; names it.
    """

    reads = ""
    seen: Tensor  # (T, C), pairs that training shows
    calibration: Tensor
    evidence_mean: Tensor
    evidence_spread: Tensor

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        triggers: Sequence[str] = DEFAULT_TRIGGERS,
        evidence: Literal["shallow", "embedding"] = "shallow",
        object_reads: Literal["both", "embedding"] = "both",
        repository: Literal["split", "joint", "none"] = "split",
        prompts: Annotated[int | None, Field(ge=1)] = None,
        prompt_length: Annotated[int, Field(ge=1)] = 4,
        top: Annotated[int, Field(ge=1)] = 2,
        prefix: Literal["static", "conditional"] = "static",
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        init: str = "a photo of a",
        hidden: Annotated[int, Field(ge=1)] = 512,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3,
        primitive_weight: Annotated[float, Field(ge=0)] = 1.0,
        separation_weight: Annotated[float, Field(ge=0)] = 0.1,
        diversity_weight: Annotated[float, Field(ge=0)] = 0.1,
        pull_weight: Annotated[float, Field(ge=0)] = 0.1,
        false_alarms: Annotated[float, Field(gt=0, lt=1)] = 0.05,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.triggers = tuple(triggers)
        if len(self.triggers) < 2 or len(set(self.triggers)) < len(self.triggers):
            raise ConfigError([f"triggers: needs clean and others, each once, got {list(triggers)}."], "dbom")
        self.evidence, self.repository, self.prefix, self.seed = evidence, repository, prefix, seed
        self.object_reads = object_reads
        self.weights = {
            "trigger": primitive_weight, "object": primitive_weight, "separation": separation_weight,
            "diversity": diversity_weight, "pull": pull_weight,
        }  # fmt: skip
        self.false_alarms = false_alarms
        self._build_text(initial_context(backbone.text, context_length, init, seed))
        self._build_image(prompts, prompt_length, top, hidden, dropout)
        objects = len(self.classnames)
        self.register_buffer(
            "seen", torch.ones(len(self.triggers), objects, dtype=torch.bool), persistent=False
        )
        # Weights a and b of the two primitives' logits, and the verdict's threshold.
        self.register_buffer("calibration", torch.tensor([1.0, 1.0, 0.5]))
        width = self.evidence_width
        self.register_buffer("evidence_mean", torch.zeros(width))
        self.register_buffer("evidence_spread", torch.ones(width))

    def _build_text(self, start: Tensor) -> None:
        text = self.backbone.text
        self.context = nn.Parameter(start.repeat(3, 1))  # (3 M, Dt): of pairs, of triggers, of objects
        words = [
            text.require_tokenizer().encode(t.replace("_", " ").replace("+", " ")) for t in self.triggers
        ]
        self.trigger_words = nn.Parameter(
            torch.stack([text.embed_tokens(w).float().mean(0) for w in words]).cpu()
        )  # (T, Dt)
        m = len(start)
        v, v_trigger, v_object = ([slot(k) for k in range(i * m, (i + 1) * m)] for i in range(3))
        own = [slot(3 * m + t) for t in range(len(self.triggers))]
        pairs = [text.sentence(*v, w, f"{name}.") for w in own for name in self.classnames]
        self.pair_layout = text.layout(pairs, list(self.classnames) * len(own))
        self.trigger_layout = text.layout([text.sentence(*v_trigger, w, ".") for w in own], self.triggers)
        objects = [text.sentence(*v_object, f"{name}.") for name in self.classnames]
        self.object_layout = text.layout(objects, self.classnames)

    def _build_image(self, prompts: int | None, length: int, top: int, hidden: int, dropout: float) -> None:
        d = self.backbone.dim
        self.evidence_width = statistics_width(self.backbone) if self.evidence == "shallow" else d
        self.reads = READS if self.evidence == "shallow" else ""
        e, shape = self.evidence_width, {"length": length, "top": top, "seed": self.seed}
        if self.repository == "split":
            self.trigger_bank = Bank(prompts or 2 * len(self.triggers), e, d, purpose="trigger", **shape)
            self.object_bank = Bank(prompts or 32, d, d, purpose="object", **shape)
        elif self.repository == "joint":
            self.bank = Bank(prompts or 32, d + e, d, purpose="joint", **shape)
        looked_up = 0 if self.repository == "none" else d
        with seeded_modules(self.seed, "dbom"):
            self.trigger_part = _decomposition(e + looked_up, hidden, d, dropout)
            reads = d + len(self.triggers) + (e if self._object_sees_evidence else 0)
            self.object_part = _decomposition(reads + looked_up, hidden, d, dropout)
            self.fuse = nn.Linear(2 * d, d)
            if self.prefix == "conditional":
                narrow = max(1, d // 16)
                self.shift = nn.Sequential(
                    nn.Linear(d, narrow), nn.ReLU(), nn.Linear(narrow, self.backbone.text.width)
                )
        for last in (self.object_part[-1], *([self.shift[-1]] if self.prefix == "conditional" else [])):
            _start_at_zero(last)
        self.beta = nn.Parameter(torch.tensor(0.8))

    @property
    def _object_sees_evidence(self) -> bool:
        """Whether the object's side reads more than the embedding; there is nothing more if that is the evidence."""
        return self.object_reads == "both" and self.evidence == "shallow"

    def embed_images(self, images: Tensor) -> Tensor:
        """Return (B, d + S): image embeddings, then the evidence (nothing, if it is the embedding itself)."""
        if self.evidence == "embedding":
            return self.backbone.image_embeddings(images)
        return embed_with_statistics(self.backbone, images)

    def class_weights(self) -> Tensor:
        """Return (T C + T + C, d) unit-length features of pairs, triggers and objects, in this order."""
        words = torch.cat([self.context, self.trigger_words])
        layouts = (self.pair_layout, self.trigger_layout, self.object_layout)
        return torch.cat([F.normalize(self.backbone.text.encode(x, words), dim=-1) for x in layouts])

    def parts(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Return cosines and what losses need, for (B, d + S) rows of :meth:`embed_images`.

        Returns:
            ``pair`` (B, T, C), ``trigger`` (B, T) and ``object`` (B, C), tau times cosine; with a repository ``pull``,
            and with a split one ``separation``.
        """
        d, counts = self.backbone.dim, (len(self.triggers), len(self.classnames))
        f = F.normalize(embeddings[:, :d], dim=-1)
        raw = embeddings[:, d:] if self.evidence == "shallow" else f
        e = (raw - self.evidence_mean) / self.evidence_spread
        found = self._look_up(f, e)
        f_t = self.trigger_part(torch.cat([e, *found.get("p_t", ())], dim=1))
        f_t = F.normalize(f_t if self.evidence == "shallow" else f + f_t, dim=-1)
        tau, weights = self.backbone.logit_scale, self._weights()
        pair, trigger, thing = weights.split((counts[0] * counts[1], *counts))
        s_t = tau * f_t @ trigger.T
        # What the object's side must see through; without a gradient, so that it teaches the trigger's side nothing.
        belief = s_t.detach().softmax(-1)
        read = [f, belief, *([e] if self._object_sees_evidence else []), *found.get("p_o", ())]
        f_o = F.normalize(f + self.object_part(torch.cat(read, dim=1)), dim=-1)
        f_p = F.normalize(self.beta * f + (1 - self.beta) * self.fuse(torch.cat([f_t, f_o], dim=1)), dim=-1)
        result = {k: v for k, v in found.items() if k in ("pull", "separation")}
        result["pair"] = tau * (f_p @ pair.T).unflatten(1, counts)
        if self.prefix == "conditional":
            looked = torch.stack([*found["p_t"], *found["p_o"]]).mean(0) if "p_t" in found else f
            result["trigger"], result["object"] = self._conditional(looked, f_t, f_o)
        else:
            result["trigger"], result["object"] = s_t, tau * f_o @ thing.T
        return result

    def _look_up(self, f: Tensor, e: Tensor) -> dict[str, Any]:
        if self.repository == "none":
            return {}
        if self.repository == "joint":
            found, pull = self.bank(torch.cat([f, F.normalize(e, dim=-1)], dim=1))
            return {"p_t": [found], "p_o": [found], "pull": pull}
        (p_t, near_t), (p_o, near_o) = self.trigger_bank(e), self.object_bank(f)
        apart = separation(p_t, p_o, self.trigger_bank.means, self.object_bank.means)
        return {"p_t": [p_t], "p_o": [p_o], "pull": near_t + near_o, "separation": apart}

    def _conditional(self, looked_up: Tensor, f_t: Tensor, f_o: Tensor) -> tuple[Tensor, Tensor]:
        """Return trigger and object logits with prefixes that the image shifts."""
        tau, count = self.backbone.logit_scale, len(self.triggers) + len(self.classnames)
        step = len(f_t) if torch.is_grad_enabled() else max(1, _SENTENCES // count)
        logits: tuple[list[Tensor], list[Tensor]] = ([], [])
        for rows in torch.arange(len(f_t)).split(step):
            moved = self.context + self.shift(looked_up[rows])[:, None]
            words = torch.cat([moved, self.trigger_words.expand(len(rows), -1, -1)], dim=1)
            for out, layout, f in (
                (logits[0], self.trigger_layout, f_t),
                (logits[1], self.object_layout, f_o),
            ):
                texts = F.normalize(self.backbone.text.encode(layout, words), dim=-1)
                out.append(tau * (texts @ f[rows][..., None])[..., 0])
        return torch.cat(logits[0]), torch.cat(logits[1])

    def pair_scores(self, embeddings: Tensor) -> Tensor:
        """Return (B, T, C) mixed scores; their softmax over all pairs is the posterior."""
        return self._mix(self.parts(embeddings))

    def _mix(self, parts: Mapping[str, Tensor]) -> Tensor:
        a, b, _ = self.calibration
        return parts["pair"] + a * parts["trigger"][..., None] + b * parts["object"][:, None]

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of the object, summed over triggers."""
        return self.pair_scores(embeddings).logsumexp(1)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses; a batch without ``"trigger"`` is of clean images. Pairs compete among those seen."""
        embeddings = batch["embedding"] if "embedding" in batch else self.embed_images(batch["image"])
        label = batch["label"]
        trigger = batch.get("trigger", torch.zeros_like(label))
        parts = self.parts(embeddings)
        pair = parts["pair"].flatten(1).masked_fill(~self.seen.flatten(), -torch.inf)
        losses: dict[str, Tensor] = {
            "pair": F.cross_entropy(pair, trigger * len(self.classnames) + label),
            "trigger": F.cross_entropy(parts["trigger"], trigger),
            "object": F.cross_entropy(parts["object"], label),
            **{k: parts[k] for k in ("separation", "pull") if k in parts},
        }
        banks = [m for m in self.children() if isinstance(m, Bank)]
        if banks:
            losses["diversity"] = torch.stack([diversity(bank.means) for bank in banks]).sum()
        return {name: self.weights.get(name, 1.0) * value for name, value in losses.items()}

    @torch.no_grad()
    def judge(self, embeddings: Tensor) -> Judgement:
        """Return what this detector says of (n, d + S) rows; the score is 1 - P(clean) by the trigger's side."""
        found = []
        for rows in embeddings.split(4096):
            parts = self.parts(rows.to(self.backbone.device))
            pairs, trigger = self._mix(parts).float().cpu(), parts["trigger"].softmax(-1).float().cpu()
            score = trigger[:, 1:].sum(-1)
            found.append(Judgement(score, trigger, pairs.logsumexp(1).softmax(-1), pairs))
        return Judgement.cat(found)

    @property
    def threshold(self) -> float:
        """Score from which an image is called poisoned."""
        return float(self.calibration[2])

    def survey(self, source: Any) -> None:
        """Standardise the evidence, and learn which pairs training shows; called by ``fit``.

        Raises:
            DataError: If the training data don't say their triggers, or say others.
        """
        data = source.data
        held = getattr(data, "triggers", None)
        if held is None:
            raise DataError(
                f"dbom learns from images whose trigger is known, and {data.name} does not say. Use "
                f"triggered:{data.name}."
            )
        self._check_triggers(data)
        self.seen.copy_(torch.as_tensor(data.compositions.seen))
        if self.evidence == "shallow":
            rows = source.training_data()[0].flatten(0, 1)[:, self.backbone.dim :]
            self.evidence_mean.copy_(rows.mean(0))
            self.evidence_spread.copy_(rows.std(0).clamp(min=1e-4))

    @torch.no_grad()
    def calibrate_on(self, data: Any, embeddings: Tensor) -> dict[str, float]:
        """Choose a and b by the harmonic mean of seen and unseen pairs, and the threshold by false alarms."""
        if getattr(data, "triggers", None) is None:
            return {}
        self._check_triggers(data)
        targets = {k: torch.tensor(v) for k, v in data.targets.items()}
        parts = [self.parts(rows.to(self.backbone.device)) for rows in embeddings.split(4096)]
        joined = {k: torch.cat([p[k].float().cpu() for p in parts]) for k in ("pair", "trigger", "object")}
        a, b, score = best_mixing(joined, targets, torch.as_tensor(data.compositions.seen))
        clean = self.judge(embeddings).score[targets["trigger"] == 0]
        threshold = threshold_at(clean, self.false_alarms)
        self.calibration.copy_(torch.tensor([a, b, threshold]))
        return {"trigger_weight": a, "object_weight": b, "harmonic_mean": score, "threshold": threshold}

    def _check_triggers(self, data: Any) -> None:
        if tuple(data.triggers) != self.triggers:
            raise DataError(
                f"dbom was built for the triggers {', '.join(self.triggers)}; {data.name} has "
                f"{', '.join(data.triggers)}. "
                "Give both the same list (learner.triggers and data.options.triggers)."
            )

    def trainable_state(self) -> dict[str, Tensor]:
        """Return what is learned, and what was measured on training and validation data."""
        kept = ("calibration", "evidence_mean", "evidence_spread")
        return {**super().trainable_state(), **{name: getattr(self, name).detach() for name in kept}}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Learner.load_trainable_state`."""
        kept = ("calibration", "evidence_mean", "evidence_spread")
        problems = []
        for name in kept:
            own = getattr(self, name)
            if name not in state:
                problems.append(f"{name} is missing")
            elif state[name].shape != own.shape:
                problems.append(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own.shape)}")
            elif not bool(state[name].isfinite().all()):
                problems.append(f"{name} is not finite")
        if problems:
            raise CheckpointError(f"this state does not fit {self.method}: {'; '.join(problems)}.")
        super().load_trainable_state({k: v for k, v in state.items() if k not in kept})
        with torch.no_grad():
            for name in kept:
                getattr(self, name).copy_(state[name])


def _start_at_zero(layer: Any) -> None:
    """Let a linear layer add nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _decomposition(inputs: int, hidden: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.LayerNorm(hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, width),
    )
