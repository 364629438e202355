"""A frozen CLIP-family model behind one interface: two towers, a scale, a preprocessing and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlprompt.backbones.edits import Adapter
from vlprompt.backbones.inputs import check_images
from vlprompt.backbones.lexicon import Lexicon
from vlprompt.backbones.text_towers import build_text_tower
from vlprompt.backbones.tokenizer import TextTokenizer, irregularity
from vlprompt.backbones.vision import Images, Prompts, TokenStates, VisionTower
from vlprompt.core.descriptions import class_texts
from vlprompt.core.devices import DTYPES, precision_of
from vlprompt.core.errors import DataError
from vlprompt.core.names import clean_classname
from vlprompt.core.precision import Precision
from vlprompt.core.weights import weights_id

__all__ = ["Backbone", "content_id"]

# Beginnings of the names of a model's tensors that its image side has.
_IMAGE_SIDE = ("visual.", "logit_scale", "logit_bias")


class Backbone(nn.Module):
    """A frozen dual encoder.

    Args:
        model: An open_clip model with ``visual`` and a text side.
        preprocess: PIL image -> (3, H, W) tensor.
        tokenizer: See :class:`TextTower`.
        fingerprint: Facts that identify it: architecture, tag, weights hash, activation, preprocessing.
        missing_tokenizer: Why ``tokenizer`` is None.

    Attributes:
        text: The text tower, through which learned context enters.
        vision: The image tower, through which visual prompts enter.
        dim: d, dimension of the joint space.
        image_size: (H, W) of the input in pixels.
        about: What its weights were trained on and where they are weak; empty where nobody has written it down.
        origin: Arguments of :func:`vlprompt.create_backbone` (and ``masks``) that build it again; empty if none do.
            Precision and device are not among them: what was learned can be used in any.
        asked_device: Where it is to compute; None if nobody said so.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Image.Image], Tensor],
        tokenizer: TextTokenizer | None,
        fingerprint: dict[str, Any],
        missing_tokenizer: str = "",
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        visual: Any = self.model.visual
        self.preprocess = preprocess
        self.fingerprint = fingerprint
        self.text = build_text_tower(self.model, tokenizer, missing_tokenizer)
        self.vision = VisionTower(visual)
        self.image_size: tuple[int, int] = _pair(visual.image_size)
        self.dim = int(fingerprint["dim"])
        self._known_scale = (float("nan"), float("nan"))  # the parameter's value and its exponential
        _ = self.logit_scale
        self.about = ""
        self.lexicon: Lexicon | None = None
        self.origin: dict[str, Any] = {}
        self.asked_device: torch.device | None = None
        self.image_weights: str | None = None  # the hash of the image side's weights before they were rounded

        # A sentence that is not start, words, end and padding has no place for learned context; strings are
        # encoded in the tokenizer's own rows.
        if self.text.refusal is None and (reason := irregularity(tokenizer)):
            self.text.refusal = f"{reason} Learners that leave the text tower alone work."

    def describe(self) -> str:
        """Return what it is, what its weights were trained on, and where they are weak, for people."""
        size = sum(p.numel() for p in self.model.parameters())
        kind = (
            f"{self.vision.layers} blocks of width {self.vision.width}" if self.vision.layers else "no tokens"
        )
        facts = (
            f"{self.name} ({self.fingerprint['id']}): {size / 1e6:.1f} million parameters, {self.image_size[1]} x "
            f"{self.image_size[0]} pixels, joint dimension {self.dim}, image tower with {kind}, text tower with "
            f"{self.text.layers} blocks of width {self.text.width}, logit scale {self.logit_scale:.1f}, "
            f"{self.precision} on {self.device}."
        )
        return f"{facts}\n{self.about}".strip()

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: a frozen tower's dropout and batch statistics must not move."""
        return super().train(False)

    @property
    def name(self) -> str:
        """Architecture and weights tag, for example ``"ViT-B-16/openai"``."""
        return "/".join(
            str(self.fingerprint[k]) for k in ("architecture", "pretrained") if self.fingerprint.get(k)
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def precision(self) -> Precision:
        """What the towers are stored and run in."""
        return precision_of(self.vision.dtype)

    def device_or(self, default: torch.device) -> torch.device:
        """Return the device that was asked for when it was built, or else a default: where it is to be trained."""
        return default if self.asked_device is None else self.asked_device

    def set_precision(self, precision: Precision) -> Backbone:
        """Store and run both towers in another precision, in place; scale and bias of the logits stay float32.

        Half precision rounds weights, and going back does not bring the lost digits back.
        """
        if precision != "fp32" and self.image_weights is None:
            weights = self.model.state_dict()
            self.image_weights = weights_id({n: t for n, t in weights.items() if n.startswith(_IMAGE_SIDE)})

        kept = {
            name: parameter.detach().float()
            for name, parameter in self.model.named_parameters()
            if name in ("logit_scale", "logit_bias")
        }
        self.model.to(DTYPES[precision])
        for name, value in kept.items():
            self.model.get_parameter(name).data = value
        return self

    @property
    def features_id(self) -> str:
        """What features depend on: the fingerprint's id, and the precision if it isn't fp32. The key of caches."""
        identity = str(self.fingerprint["id"])
        return identity if self.precision == "fp32" else f"{identity}-{self.precision}"

    @property
    def logit_scale(self) -> float:
        """The factor tau on cosine similarities (100 for OpenAI's CLIP).

        A number, so it is a constant of a traced graph. It is the one that was loaded, also where the backbone was cast
        to half precision since, which would round 100 to 99.
        """
        value, scale = self._known_scale
        if torch.compiler.is_compiling():
            return scale

        parameter = self.model.logit_scale.detach()
        if float(parameter) != float(torch.tensor(value, dtype=parameter.dtype)):
            scale = float(parameter.float().exp())
            self._known_scale = (float(parameter), scale)
        return scale

    @property
    def logit_bias(self) -> float:
        """SigLIP's additive bias; 0 elsewhere. It shifts all classes alike, so a softmax never sees it."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias)

    def encode_image(self, images: Images, prompts: Prompts | None = None) -> Tensor:
        """Return (B, d) unit-length float32 features of (B, 3, H, W) preprocessed images.

        Raises:
            DataError: If the images are no such tensor.
        """
        return F.normalize(self.image_embeddings(images, prompts), dim=-1)

    def image_embeddings(
        self,
        images: Images,
        prompts: Prompts | None = None,
        adapters: Sequence[Adapter | None] | None = None,
    ) -> Tensor:
        """Return :meth:`encode_image` before normalisation; without prompts and adapters, without a graph.

        Raises:
            DataError: If the images are no such tensor.
        """
        if not isinstance(images, TokenStates):
            check_images(images, self.image_size if self.vision.kind == "vit" else None)
        images = images.to(self.device)
        if prompts is None and adapters is None:
            with torch.no_grad():
                return self.vision.encode(images)
        return self.vision.encode(images, prompts, adapters)

    def image_embeddings_and_tokens(
        self, images: Images, adapters: Sequence[Adapter | None]
    ) -> tuple[Tensor, Tensor]:
        """Return :meth:`image_embeddings`, and (B, K, W) states of tokens that entered between blocks.

        See :meth:`VisionTower.encode_entered`.
        """
        return self.vision.encode_entered(images.to(self.device), adapters)

    @torch.no_grad()
    def image_states(self, images: Tensor, blocks: int = 0) -> TokenStates:
        """Return what the frozen tower's first ``blocks`` blocks make of (B, 3, H, W) images, without a graph.

        :meth:`image_embeddings` goes on from it. See :meth:`VisionTower.states`.
        """
        return self.vision.states(images.to(self.device), blocks)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return (N, d) unit-length float32 features of plain strings, without a graph.

        Raises:
            BackboneError: If the tokenizer could not be fetched.
            DataError: If there is no text, or something else than text.
        """
        sentences = [texts] if isinstance(texts, str) else list(texts)
        if not sentences:
            raise DataError("no texts to encode.")
        for text in sentences:
            if not isinstance(text, str):
                raise DataError(
                    f"a text to encode is a string; got {type(text).__name__} {str(text)[:60]!r}."
                )
        return F.normalize(self.text.encode_strings(sentences), dim=-1)

    def unplaced_words(self, classnames: Sequence[str]) -> list[str]:
        """Return words of class names that are known to mean nothing to the text tower; most towers know of none."""
        if self.lexicon is None:
            return []
        words = [word for name in classnames for word in self.lexicon.read(clean_classname(name))[1]]
        return list(dict.fromkeys(words))

    def class_weights(self, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return (C, d) unit-length zero-shot weights: per class, the normalised mean over its sentences.

        Each sentence's feature is normalised, then averaged, then normalised again (Radford et al. 2021,
        section 3.1.4). Names are read as learners read them: underscores are spaces.

        Args:
            classnames: C names.
            templates: Filled for every class; or :class:`vlprompt.core.descriptions.Descriptions`, which have sentences
                of each.

        Raises:
            DataError: If a class has no description.
        """
        texts = [class_texts(name, templates) for name in classnames]
        features = self.encode_text([text for of_class in texts for text in of_class])
        return F.normalize(means_of(features, [len(of_class) for of_class in texts]), dim=-1)


def means_of(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return (C, d) means of (n, d) consecutive rows, so many for each class.

    Args:
        rows: Of class 0, then of class 1, and so on.
        counts: C numbers, at least 1; n in all.
    """
    if len(set(counts)) == 1:
        return rows.unflatten(0, (len(counts), -1)).mean(1)
    return torch.stack([part.mean(0) for part in rows.split(list(counts))])


def content_id(fingerprint: Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits that stand for a fingerprint.

    The place weights were read from is no part of what they are: a moved file keeps caches and artefacts valid.
    """
    facts = {key: value for key, value in fingerprint.items() if key not in ("pretrained", "id")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
