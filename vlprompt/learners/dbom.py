"""DBOM: which trigger an image holds, and which object it shows.

Paper: "Disentangled Backdoor-Object Modeling", arXiv 2508.01932. Its components are known (a repository of visual
    prompts that is looked up by similarity, learned prompt prefixes, a separation and a diversity loss, decomposition
    and fusion of the image feature); their exact forms, sizes and weights are not public. Everything beyond those
    names is a reconstruction, in the manner of CSP and Troika (soft prompts of compositions, three kinds of logits).
    One part is an addition: CLIP's image feature says what an image shows and little of how its pixels were changed. So
    the trigger's side reads statistics of the pixels and of the tower's first convolution instead (see
    vlprompt.backbones.shallow), or of the pixels at their own size, before anything enlarges them
    (vlprompt.data.forensics); ``evidence=embedding`` is the variant without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.layout import slot
from vlprompt.backbones.shallow import embed_with_statistics
from vlprompt.core.errors import CheckpointError, ConfigError
from vlprompt.core.seeding import seeded_modules
from vlprompt.core.trainable import misfits
from vlprompt.data.compositions import CompositionDataset
from vlprompt.data.transforms import Preprocess
from vlprompt.data.triggers import DEFAULT_TRIGGERS
from vlprompt.learners import LEARNERS
from vlprompt.learners._calibration import MixingTask, best_mixing, threshold_at
from vlprompt.learners._context import initial_context
from vlprompt.learners._evidence import Background, evidence_read, most_suspicious, paired_cosines
from vlprompt.learners._repository import Bank, Lookup, decomposition, diversity, separation, start_at_zero
from vlprompt.learners._scanning import (
    ImageScanner,
    composed_data,
    digest_of,
    embed_examined,
    examining,
    native_size_of,
    prepared,
    seen_compositions,
)
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.hooks import TrainingSamples, ValidationSamples
from vlprompt.learners.recipe import Recipe
from vlprompt.metrics.verdicts import Verdicts

__all__ = ["DBOM"]

_SENTENCES = 1 << 12  # of prefixes that depend on the image, in one pass without gradient
_ROWS = 4096  # in one pass without gradient
_LARGEST_NATIVE = 4096  # pixels a side
_FARTHEST = 6.0  # spreads that native evidence may lie from the mean


@LEARNERS.register(
    "dbom",
    summary="trigger and object of an image, by soft prompts of their compositions",
    paper="2508.01932",
    needs=("text", "compositions"),
)
class DBOM(Learner, ImageScanner):
    """Scores every composition of a trigger and an object; as a classifier it names the object, whatever the trigger.

    Sentences: composition [v | w_t | object .], trigger [v' | w_t .], object [v'' | object .]; v are learned prefixes
    of M vectors, w_t is one learned vector per trigger, and the object's name is written out, so that other objects can
    be named. Image side: p_t, p_o are looked up in the repository, f_t = D_t(e, p_t), f_o = f + D_o(f, P(t), e, p_o)
    with the evidence e, f_p = beta f + (1 - beta) F(f_t, f_o). The score of a composition: tau (<f_p, composition> +
    a <f_t, trigger> + b <f_o, object>), a and b chosen on validation data. e is standardised by the training images'
    mean and spread.

    Args:
        backbone: See :class:`Learner`.
        classnames: The objects.
        templates: See :class:`Learner`; not used.
        triggers: Names of triggers, the first for none.
        evidence: What the trigger's side reads. ``"shallow"``: statistics of the tower's input and of its first
            convolution. ``"native"``: statistics of the pixels at the native size, before the tower's preparation
            mixes them; of an image with several views the most suspicious one (learned as multiple instances are: an
            image is clean if all of its views are). ``"embedding"``: the image embedding (the paper's, as far as is
            known: then f_t = f + D_t(f, p_t)).
        background: With native evidence, clean images of other kinds (:mod:`vlprompt.data.backgrounds`) that the
            trigger's side also learns from, each also with two triggers; a fifth is kept for the threshold. 0: none.
        background_weight: Of the cross entropy on them.
        object_reads: ``"both"`` shows the object's side the evidence beside the embedding, from which an overlay has
            taken some of what the object looks like (its colour, say); ``"embedding"`` doesn't.
        repository: A bank of prompts for triggers and one for objects, one for both, or none.
        prompts: prompts per bank; None for twice the number of triggers, and for 32 for objects (or both).
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

    recipe = Recipe(
        {
            "lr": 0.003,
            "batch_size": 256,
            "epochs": 40,
            "optimizer": "adamw",
            "weight_decay": 0.5,
            "schedule": "cosine",
        },
        factors=(1.0,),
    )

    reads = ""
    seen: Tensor  # (T, C), compositions that training shows
    calibration: Tensor
    evidence_mean: Tensor
    evidence_spread: Tensor
    native: Tensor  # (1,), pixels a side; 0 before training, and where images keep their own size

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        triggers: Sequence[str] = DEFAULT_TRIGGERS,
        evidence: Literal["shallow", "native", "embedding"] = "shallow",
        background: Annotated[int, Field(ge=0)] = 200,
        background_weight: Annotated[float, Field(ge=0)] = 0.25,
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
        self.evidence = evidence
        self.background = background if evidence == "native" else 0
        self.object_reads = object_reads
        self.repository = repository
        self.prefix = prefix
        self.seed = seed
        self.false_alarms = false_alarms
        self.weights = {
            "trigger": primitive_weight, "object": primitive_weight, "separation": separation_weight,
            "diversity": diversity_weight, "pull": pull_weight,
            "background": background_weight,
        }  # fmt: skip
        self._build_text(initial_context(backbone.text, context_length, init, seed))
        self._build_image(prompts, prompt_length, top, hidden, dropout)

        seen = torch.ones(len(self.triggers), len(self.classnames), dtype=torch.bool)
        self.register_buffer("seen", seen, persistent=False)
        # Weights a and b of the two primitives' logits, and the verdict's threshold.
        self.register_buffer("calibration", torch.tensor([1.0, 1.0, 0.5]))
        width = self.evidence_width
        self.register_buffer("evidence_mean", torch.zeros(width))
        self.register_buffer("evidence_spread", torch.ones(width))
        self.register_buffer("native", torch.zeros(1))
        self._background: Background | None = None

    def _build_text(self, start: Tensor) -> None:
        """Make the learned prefixes and trigger words, and lay out the sentences.

        Args:
            start: (M, Dt), what every prefix starts as.
        """
        text = self.backbone.text
        tokenizer = text.require_tokenizer()
        self.context = nn.Parameter(start.repeat(3, 1))  # (3 M, Dt): of compositions, of triggers, of objects
        starts = []
        for trigger in self.triggers:
            tokens = tokenizer.encode(trigger.replace("_", " ").replace("+", " "))
            starts.append(text.embed_tokens(tokens).float().mean(0))
        self.trigger_words = nn.Parameter(torch.stack(starts).cpu())  # (T, Dt)

        m = len(start)
        v = [slot(k) for k in range(m)]
        v_trigger = [slot(k) for k in range(m, 2 * m)]
        v_object = [slot(k) for k in range(2 * m, 3 * m)]
        words = [slot(3 * m + t) for t in range(len(self.triggers))]
        compositions = [text.sentence(*v, w, f"{name}.") for w in words for name in self.classnames]
        triggers = [text.sentence(*v_trigger, w, ".") for w in words]
        objects = [text.sentence(*v_object, f"{name}.") for name in self.classnames]
        self.composition_layout = text.layout(compositions, list(self.classnames) * len(words))
        self.trigger_layout = text.layout(triggers, self.triggers)
        self.object_layout = text.layout(objects, self.classnames)

    def _build_image(self, prompts: int | None, length: int, top: int, hidden: int, dropout: float) -> None:
        """Make the repository, the decomposition and the fusion; arguments as of the class."""
        d = self.backbone.dim
        self.evidence_width, self.reads = evidence_read(self.backbone, self.evidence)
        e = self.evidence_width
        shape = {"length": length, "top": top, "seed": self.seed}
        if self.repository == "split":
            self.trigger_bank = Bank(prompts or 2 * len(self.triggers), e, d, purpose="trigger", **shape)
            self.object_bank = Bank(prompts or 32, d, d, purpose="object", **shape)
        elif self.repository == "joint":
            self.bank = Bank(prompts or 32, d + e, d, purpose="joint", **shape)

        looked_up = 0 if self.repository == "none" else d
        object_width = d + len(self.triggers) + (e if self._object_sees_evidence else 0)
        with seeded_modules(self.seed, "dbom"):
            self.trigger_part = decomposition(e + looked_up, hidden, d, dropout)
            self.object_part = decomposition(object_width + looked_up, hidden, d, dropout)
            self.fuse = nn.Linear(2 * d, d)
            if self.prefix == "conditional":
                narrow = max(1, d // 16)
                width = self.backbone.text.width
                self.shift = nn.Sequential(nn.Linear(d, narrow), nn.ReLU(), nn.Linear(narrow, width))

        # At first the object is what the image feature says, and prefixes are the same for all images.
        start_at_zero(self.object_part[-1])
        if self.prefix == "conditional":
            start_at_zero(self.shift[-1])
        self.beta = nn.Parameter(torch.tensor(0.8))

    @property
    def _object_sees_evidence(self) -> bool:
        """Whether the object's side reads more than the embedding; there is nothing more if that is the evidence."""
        return self.object_reads == "both" and self.evidence != "embedding"

    @property
    def preprocess(self) -> Preprocess:
        """See :attr:`ImageScanner.preprocess`: an image that is named takes the way of those that are scanned."""
        prepare = examining if self.evidence == "native" else prepared
        return prepare(self.native_size, self.backbone.preprocess)

    @property
    def preparation(self) -> str:
        """See :meth:`Learner.preparation`."""
        return "" if self.native_size is None else f";native={self.native_size}"

    def embed_images(self, images: Tensor) -> Tensor:
        """Return (B, d + S): image embeddings, then the evidence (nothing, if it is the embedding itself).

        Args:
            images: (B, 3, H, W); with native evidence what :attr:`preprocess` makes of images, (B, 3 H W + V (1 + E)).

        Raises:
            DataError: If native evidence is missing.
        """
        if self.evidence == "embedding":
            return self.backbone.image_embeddings(images)
        if self.evidence == "shallow":
            return embed_with_statistics(self.backbone, images)

        return embed_examined(self.backbone, images, self.method)

    def class_weights(self) -> Tensor:
        """Return (T C + T + C, d) unit-length features of compositions, triggers and objects, in this order."""
        words = torch.cat([self.context, self.trigger_words])
        layouts = (self.composition_layout, self.trigger_layout, self.object_layout)
        return torch.cat([F.normalize(self.backbone.text.encode(x, words), dim=-1) for x in layouts])

    def parts(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Return cosines and what losses need, for (B, d + S) rows of :meth:`embed_images`.

        Returns:
            ``composition`` (B, T, C), ``trigger`` (B, T) and ``object`` (B, C), tau times cosine; with a repository
            ``pull``, and with a split one ``separation``.
        """
        d = self.backbone.dim
        counts = (len(self.triggers), len(self.classnames))
        tau = self.backbone.logit_scale
        text_c, text_t, text_o = self._weights().split((counts[0] * counts[1], *counts))

        f = F.normalize(embeddings[:, :d], dim=-1)
        e = self._evidence_of(f, embeddings, text_t)
        lookup, f_t, s_t = self._trigger_side(f, e, text_t)

        # The object's side. It is shown what it must see through, without a gradient, so that it teaches the
        # trigger's side nothing.
        belief = s_t.detach().softmax(-1)
        inputs = [f, belief, *([e] if self._object_sees_evidence else []), *lookup.object]
        f_o = F.normalize(f + self.object_part(torch.cat(inputs, dim=1)), dim=-1)

        fused = self.fuse(torch.cat([f_t, f_o], dim=1))
        f_p = F.normalize(self.beta * f + (1 - self.beta) * fused, dim=-1)
        result = dict(lookup.losses)
        result["composition"] = tau * (f_p @ text_c.T).unflatten(1, counts)
        if self.prefix == "conditional":
            condition = torch.stack([*lookup.trigger, *lookup.object]).mean(0) if lookup.trigger else f
            result["trigger"], result["object"] = self._conditional(condition, f_t, f_o)
        else:
            result["trigger"] = s_t
            result["object"] = tau * f_o @ text_o.T
        return result

    def _evidence_of(self, f: Tensor, rows: Tensor, text_t: Tensor) -> Tensor:
        """Return the (B, E) standardised evidence in rows of :meth:`embed_images`."""
        if self.evidence == "native":
            views = rows[:, self.backbone.dim :].unflatten(1, (-1, 1 + self.evidence_width))

            def logits(image: Tensor, e: Tensor) -> Tensor:
                return self._trigger_side(f[image], e, text_t)[2]

            return most_suspicious(self._standardised(views[..., 1:]), views[..., 0] > 0, logits)
        return self._standardised(rows[:, self.backbone.dim :] if self.evidence == "shallow" else f)

    def _standardised(self, raw: Tensor) -> Tensor:
        e = (raw - self.evidence_mean) / self.evidence_spread
        # Pixels of foreign images may lie far from all that was trained on.
        return e.clamp(-_FARTHEST, _FARTHEST) if self.evidence == "native" else e

    def _trigger_side(self, f: Tensor, e: Tensor, text_t: Tensor) -> tuple[Lookup, Tensor, Tensor]:
        """Return what was looked up, (B, d) features of the trigger's side, and (B, T) logits of triggers."""
        lookup = self._look_up(f, e)
        f_t = self.trigger_part(torch.cat([e, *lookup.trigger], dim=1))
        f_t = F.normalize(f + f_t if self.evidence == "embedding" else f_t, dim=-1)
        return lookup, f_t, self.backbone.logit_scale * f_t @ text_t.T

    def _look_up(self, f: Tensor, e: Tensor) -> Lookup:
        """Look prompts up in the repository.

        Args:
            f: (B, d), unit-length image features.
            e: (B, evidence width), standardised evidence.
        """
        if self.repository == "none":
            return Lookup()
        if self.repository == "joint":
            prompt, pull = self.bank(torch.cat([f, F.normalize(e, dim=-1)], dim=1))
            return Lookup([prompt], [prompt], {"pull": pull})

        p_t, pull_t = self.trigger_bank(e)
        p_o, pull_o = self.object_bank(f)
        apart = separation(p_t, p_o, self.trigger_bank.means, self.object_bank.means)
        return Lookup([p_t], [p_o], {"pull": pull_t + pull_o, "separation": apart})

    def _conditional(self, condition: Tensor, f_t: Tensor, f_o: Tensor) -> tuple[Tensor, Tensor]:
        """Return trigger (B, T) and object (B, C) logits with prefixes that each image shifts.

        Args:
            condition: (B, d), what the shift is computed from.
            f_t: (B, d), the trigger's side.
            f_o: (B, d), the object's side.
        """
        sentences = len(self.triggers) + len(self.classnames)
        # Every image has sentences of its own; without a gradient few images at a time keep memory small.
        step = len(f_t) if torch.is_grad_enabled() else max(1, _SENTENCES // sentences)
        trigger_logits = []
        object_logits = []
        for rows in torch.arange(len(f_t)).split(step):
            context = self.context + self.shift(condition[rows])[:, None]
            words = torch.cat([context, self.trigger_words.expand(len(rows), -1, -1)], dim=1)
            trigger_logits.append(paired_cosines(self.backbone.text, self.trigger_layout, words, f_t[rows]))
            object_logits.append(paired_cosines(self.backbone.text, self.object_layout, words, f_o[rows]))
        tau = self.backbone.logit_scale
        return tau * torch.cat(trigger_logits), tau * torch.cat(object_logits)

    def composition_scores(self, embeddings: Tensor) -> Tensor:
        """Return (B, T, C) mixed scores; their softmax over all compositions is the posterior."""
        return self._mix(self.parts(embeddings))

    def _mix(self, parts: Mapping[str, Tensor]) -> Tensor:
        a, b, _ = self.calibration
        return parts["composition"] + a * parts["trigger"][..., None] + b * parts["object"][:, None]

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of the object, summed over triggers."""
        return self.composition_scores(embeddings).logsumexp(1)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses; a batch without ``"trigger"`` is of clean images. Only seen compositions compete."""
        embeddings = self.batch_embeddings(batch)
        label = batch["label"]
        trigger = batch.get("trigger", torch.zeros_like(label))
        parts = self.parts(embeddings)

        composition = parts["composition"].flatten(1).masked_fill(~self.seen.flatten(), -torch.inf)
        losses: dict[str, Tensor] = {
            "composition": F.cross_entropy(composition, trigger * len(self.classnames) + label),
            "trigger": F.cross_entropy(parts["trigger"], trigger),
            "object": F.cross_entropy(parts["object"], label),
            **{name: parts[name] for name in ("separation", "pull") if name in parts},
        }
        if self._background is not None:
            losses["background"] = self._background_loss(len(embeddings) // 4 + 1)
        banks = [module for module in self.children() if isinstance(module, Bank)]
        if banks:
            losses["diversity"] = torch.stack([diversity(bank.means) for bank in banks]).sum()
        return {name: self.weights.get(name, 1.0) * value for name, value in losses.items()}

    def _background_loss(self, count: int) -> Tensor:
        """Return the cross entropy of the trigger's side on some of the background that is learned from."""
        assert self._background is not None
        rows, triggers = (part.to(self.backbone.device) for part in self._background.sample(count))
        f = F.normalize(rows[:, : self.backbone.dim], dim=-1)
        text_t = self._weights()[len(self.triggers) * len(self.classnames) :][: len(self.triggers)]
        _, _, s_t = self._trigger_side(f, self._evidence_of(f, rows, text_t), text_t)
        return F.cross_entropy(s_t, triggers)

    @torch.no_grad()
    def judge(self, rows: Tensor) -> Verdicts:
        """See :meth:`ImageScanner.judge`; the score is 1 - P(clean) by the trigger's side."""
        if self.training:  # dropout is for learning; switching also forgets cached text features
            self.eval()
        verdicts = []
        for batch in rows.split(_ROWS):
            parts = self.parts(batch.to(self.backbone.device))
            composition = self._mix(parts).float().cpu()
            trigger = parts["trigger"].softmax(-1).float().cpu()
            thing = composition.logsumexp(1).softmax(-1)
            verdicts.append(Verdicts(trigger[:, 1:].sum(-1), trigger, thing, composition))
        return Verdicts.cat(verdicts)

    @property
    def threshold(self) -> float:
        """See :meth:`ImageScanner.threshold`; chosen on validation data."""
        return float(self.calibration[2])

    @property
    def native_size(self) -> int | None:
        """See :meth:`ImageScanner.native_size`; measured on the training data."""
        return int(self.native[0]) or None

    @property
    def digest(self) -> str:
        """See :meth:`ImageScanner.digest`."""
        return digest_of(self.trainable_state())

    @property
    def needs_survey(self) -> bool:
        """Whether training must not begin before :meth:`survey`: always."""
        return True

    def survey(self, sources: Sequence[TrainingSamples]) -> None:
        """Standardise the evidence over all tasks, and learn which compositions training shows in each.

        Raises:
            DataError: If the training data don't say their triggers, or say others.
        """
        data = [composed_data(source.data, self.triggers, self.method) for source in sources]
        self.native.fill_(native_size_of({one.native_size for one in data}) or 0)
        for source in sources:
            source.learner.seen.zero_()

        for source, shown_data in zip(
            sources, data, strict=True
        ):  # one of several tasks appears several times
            shown = seen_compositions(shown_data).to(source.learner.seen)
            source.learner.seen[:, source.positions] |= shown

        if self.evidence != "embedding":
            d = self.backbone.dim
            rows = torch.cat([source.training_data()[0].flatten(0, 1)[:, d:] for source in sources])
            if self.evidence == "native":
                views = rows.unflatten(1, (-1, 1 + self.evidence_width)).flatten(0, 1)
                rows = views[views[:, 0] > 0, 1:]
            if self.background:
                seed = int(data[0].info["compositions_seed"])
                self._background = Background.of(self, self.background, seed)
            self.evidence_mean.copy_(rows.mean(0))
            self.evidence_spread.copy_(rows.std(0).clamp(min=1e-4))

    @property
    def chooses(self) -> tuple[str, ...]:
        """See :attr:`LearnerHooks.chooses`."""
        return ("trigger_weight", "object_weight", "threshold")

    @torch.no_grad()
    def calibrate(self, sources: Sequence[ValidationSamples]) -> dict[str, float]:
        """Choose a and b by the harmonic mean of seen and unseen compositions, and the threshold by false alarms.

        Several tasks share the choice: a and b by their mean score, the threshold by all clean images together.
        """
        tasks = []
        clean = []
        for source in sources:
            data = source.data
            if not isinstance(data, CompositionDataset):
                continue
            seen = seen_compositions(composed_data(data, self.triggers, self.method))
            embeddings = source.validation_data()[0]
            targets = {name: torch.tensor(values) for name, values in data.targets.items()}
            batches = [source.learner.parts(r.to(self.backbone.device)) for r in embeddings.split(_ROWS)]
            logits = {}
            for name in ("composition", "trigger", "object"):
                logits[name] = torch.cat([parts[name].float().cpu() for parts in batches])
            tasks.append(MixingTask(logits, targets, seen))
            clean.append(source.learner.judge(embeddings).score[targets["trigger"] == 0])

        if not tasks:
            return {}

        a, b, score = best_mixing(tasks)
        threshold = threshold_at(torch.cat(clean), self.false_alarms)
        if self._background is not None:  # what is clean of another kind must not be suspected more often
            of_others = threshold_at(self.judge(self._background.clean).score, self.false_alarms)
            threshold = max(threshold, min(of_others, 1.0))
        self.calibration.copy_(torch.tensor([a, b, threshold]))
        return {"trigger_weight": a, "object_weight": b, "harmonic_mean": score, "threshold": threshold}

    def _measured(self) -> dict[str, Tensor]:
        """Return what is measured on training and validation data instead of learned."""
        return {
            "calibration": self.calibration,
            "evidence_mean": self.evidence_mean,
            "evidence_spread": self.evidence_spread,
            "native": self.native,
        }

    def trainable_state(self) -> dict[str, Tensor]:
        """Return what is learned, and what was measured on training and validation data."""
        measured = {name: tensor.detach() for name, tensor in self._measured().items()}
        return {**super().trainable_state(), **measured}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Learner.load_trainable_state`."""
        measured = self._measured()

        problems = misfits(measured, {name: state[name] for name in measured if name in state})
        if problems:
            raise CheckpointError(f"this state does not fit {self.method}: {'; '.join(problems)}.")
        if not 0 <= float(state["native"][0]) <= _LARGEST_NATIVE:
            raise CheckpointError(
                f"this state does not fit {self.method}: native is {float(state['native'][0])}, expected pixels a side."
            )

        super().load_trainable_state({name: t for name, t in state.items() if name not in measured})
        with torch.no_grad():
            for name, tensor in measured.items():
                tensor.copy_(state[name])
