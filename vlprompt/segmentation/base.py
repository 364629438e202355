"""The base of every segmentation model: frozen towers, a decoder, and a strategy that says what is tuned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.inputs import check_images
from vlprompt.core.errors import BackboneError, DataError
from vlprompt.core.precision import Precision
from vlprompt.saved.prompts import Kind, Prompted
from vlprompt.segmentation._conditions import Conditions
from vlprompt.segmentation._pixels import Sized, Squash
from vlprompt.segmentation.strategies.base import Rows, Strategy

__all__ = ["Frozen", "LastLayer", "Segmenter", "Texts"]

#: States of images that training never changes; the first axis of every tensor is the image.
Frozen: TypeAlias = dict[str, Tensor]
#: B phrases, or (B, d) features instead of them.
Texts: TypeAlias = Sequence[str] | Tensor
LastLayer: TypeAlias = Literal["frozen", "new", "tuned"]


class Segmenter(nn.Module, Prompted):
    """Base of all models: ``segmenter(images, texts)`` gives one logit per pixel for "this pixel is what is named".

    A model builds ``decoder``, calls :meth:`settle`, and defines :meth:`frozen` and :meth:`decode`. Keyword-only
    constructor arguments are its options.

    Args:
        backbone: The towers.
        strategy: What learns.
        words: Whether the decoder reads every word's state beside the phrase's feature.

    Attributes:
        kind: What cards of saved prompts call it.
        method: Its registry name.
        options: The strategy's name and all options it was built with.
        decoder: What turns tower states and a phrase into logits.
        words: Phrases that its decoder was trained on, where its weights say so.
        pixels: Side of the square that whole images are resized to; None: the backbone's own size.
    """

    kind: Kind = "segmenter"
    method: str = ""
    options: dict[str, Any]
    decoder: nn.Module
    words: tuple[str, ...] = ()
    pixels: int | None = None

    def __init__(self, backbone: Backbone, strategy: Strategy, words: bool = False) -> None:
        super().__init__()
        self.options = {}
        self.backbone = copy.deepcopy(backbone) if strategy.tunes == "all" else backbone
        self.strategy = strategy
        self.conditions = Conditions(self.backbone.text, words)

    def settle(self) -> None:
        """Freeze what the strategy doesn't tune. A model calls it when all its parts are built."""
        tunes = self.strategy.tunes
        self.decoder.requires_grad_(self.decoder_learns)
        if tunes == "all":
            if self.precision != "fp32":
                raise BackboneError(
                    f"this strategy trains the whole backbone, which needs precision fp32; it is in {self.precision}."
                )
            self.backbone.model.requires_grad_(True)

        for parameter in self.tuned_besides():
            parameter.requires_grad_(tunes != "nothing")
        for parameter in self.untouched():
            parameter.requires_grad_(False)

    @property
    def precision(self) -> Precision:
        """What the frozen towers compute in."""
        return self.backbone.precision

    def tuned_besides(self) -> list[nn.Parameter]:
        """Return the decoder's parameters that learn beside prompts (a last layer)."""
        return []

    def untouched(self) -> list[nn.Parameter]:
        """Return the parameters that logits don't depend on: end-to-end tuning leaves them out."""
        unused = ("logit_scale", "logit_bias")
        return [p for name, p in self.backbone.model.named_parameters() if name in unused]

    def forward(self, images: Tensor, texts: Texts) -> Tensor:
        """Return (B, 1, H, W) logits of B phrases.

        Args:
            images: (B, 3, H, W) preprocessed pixels of any size.
            texts: B phrases, or (B, d) features instead of them.

        Raises:
            DataError: If there isn't one phrase per image, or the images were not preprocessed.
            VLPromptError: If a phrase is longer than the text tower reads; names it.
        """
        check_images(images)
        images = images.to(self.backbone.device)
        size = (int(images.shape[-2]), int(images.shape[-1]))
        return self.decode(self.frozen(images), texts, size)

    def frozen(self, images: Tensor) -> Frozen:
        """Return states of (B, 3, H, W) images that training never changes; they may be cached per image."""
        raise NotImplementedError

    def decode(self, frozen: Frozen, texts: Texts, size: tuple[int, int]) -> Tensor:
        """Return (B, 1, H, W) logits from :meth:`frozen` of images of ``size`` (H, W) pixels."""
        raise NotImplementedError

    @cached_property
    def preprocess(self) -> Callable[[Image.Image], Tensor]:
        """PIL image -> (3, h, w) tensor of :attr:`image_size` in the backbone's normalisation; the whole image."""
        if self.image_size != self.backbone.image_size:
            return Sized(self.image_size, self.backbone.fingerprint["preprocess"])
        return Squash(self.backbone.preprocess)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of preprocessed images: :attr:`pixels`, else the backbone's own."""
        return (self.pixels, self.pixels) if self.pixels else self.backbone.image_size

    @property
    def static_images(self) -> bool:
        """Whether nothing that learns enters the image tower, so that all its states are frozen."""
        return not self.strategy.prompts_vision and self.strategy.tunes != "all"

    @property
    def decoder_learns(self) -> bool:
        """Whether all of the decoder is tuned."""
        return self.strategy.tunes in ("decoder", "all")

    def rows(self, frozen: Frozen) -> Rows:
        """Return the strategy's prompts for these images."""
        return self.strategy(frozen.get("pooled"))

    def condition(self, texts: Texts, rows: Rows, count: int) -> tuple[Tensor, Tensor | None]:
        """Return (B, d) features of the phrases and, if the model reads them, (B, T, Dt) states of their words.

        Raises:
            DataError: If there isn't one phrase per image.
        """
        if isinstance(texts, str) or len(texts) != count:
            got = repr(texts) if isinstance(texts, str) else f"{len(texts)} phrases"
            raise DataError(f"segmentation takes one phrase per image: got {got} for {count} images.")

        if isinstance(texts, Tensor):
            if texts.shape[1:] != (self.backbone.dim,):
                raise DataError(
                    f"features of phrases have shape {tuple(texts.shape)}, expected (B, {self.backbone.dim})."
                )
            return texts.to(self.backbone.device), None

        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(
                    f"phrase number {number} is no text; got {type(text).__name__} {str(text)[:60]!r}."
                )
            if not text.strip():
                raise DataError(f"phrase number {number} is empty; say what to segment.")
        return self.conditions(texts, rows.text, remember=self._static_texts(rows))

    def _static_texts(self, rows: Rows) -> bool:
        """Return whether features of phrases stay the same until something is trained or loaded."""
        if self.strategy.tunes != "all" and rows.text is None:
            return True
        return not self.training and not torch.is_grad_enabled()

    def train(self, mode: bool = True) -> Segmenter:
        """Set the mode of what learns; frozen parts and batch statistics stay in evaluation mode."""
        super().train(mode)
        self.decoder.train(mode and self.decoder_learns)

        for module in self.decoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

        self._forget()
        return self

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Trainable.load_trainable_state`."""
        super().load_trainable_state(state)
        self._forget()

    def unread_words(self, phrase: str) -> list[str]:
        """Return words of a phrase that are known to mean nothing here: to the text tower, and to the decoder."""
        learned = {word for known in self.words for word in known.split()}
        return [word for word in self.backbone.unplaced_words([phrase]) if word.lower() not in learned]

    def title(self) -> str:
        """Return its registry name, or that of its class if it was not built by name."""
        return self.method or type(self).__name__

    def _forget(self) -> None:
        """Drop cached features of phrases, if what learns changes them."""
        if self.strategy.tunes == "all" or self.strategy.prompts_text:
            self.conditions.clear()
