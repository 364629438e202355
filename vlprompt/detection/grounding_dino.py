"""Grounding DINO of transformers: concepts stand where the text encoder's token states would.

Paper: Liu et al., "Grounding DINO", ECCV 2024, arXiv 2303.05499. A class is a group of L tokens; image and language are
fused at every layer, so nothing behind the image backbone can be kept between steps. The separators between classes
keep their grouping, but boxes don't look at them, and their states are zero, since their own would need the text
encoder. So a search that starts from class names is near what the names detect, not equal to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from vlprompt.core.errors import BackboneError, DataError
from vlprompt.core.paths import local_or_name
from vlprompt.core.pixels import to_rgb
from vlprompt.core.precision import Precision
from vlprompt.core.weights import weights_id
from vlprompt.detection import DETECTORS
from vlprompt.detection._transformers import build_model, run_in
from vlprompt.detection.base import Detections, Detector, Frozen
from vlprompt.detection.boxes import Target

__all__ = ["GroundingDino"]

_START, _END, _DOT, _WORD = 101, 102, 1012, 3899  # BERT's [CLS], [SEP], "." and any ordinary word
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class _ConceptEncoder(nn.Module):
    """Stands in the text encoder's place and returns concepts whatever it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.states: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return :attr:`states` as an encoder returns its own."""
        return SimpleNamespace(last_hidden_state=self.states)


@DETECTORS.register(
    "grounding-dino", summary="transformers' Grounding DINO, by name, folder or config", paper="2303.05499"
)
class GroundingDino(Detector):
    """Grounding DINO with token states of its text encoder replaced.

    Args:
        pretrained: A name on the Hugging Face Hub (``"IDEA-Research/grounding-dino-tiny"``) or a local folder; None:
            random weights.
        config: Of random weights, fields of transformers' configuration.
        size: Side of the square that images are squashed to, in pixels.
        seed: Of random weights.
        precision: What the convolutional or Swin tower is stored and run in; what fuses it with language stays
            float32.
        device: Where to run; None: a GPU if there is one.

    Raises:
        BackboneError: If transformers or the weights can't be had; says what to do.
    """

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        size: int = 800,
        seed: int = 0,
        precision: Precision = "fp32",
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.precision = precision
        model: Any = build_model("GroundingDinoForObjectDetection", pretrained, config, seed)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.text: nn.Module | None = model.model.text_backbone
        self.encoder = _ConceptEncoder()
        model.model.text_backbone = self.encoder
        self.model = model
        self.size = size
        self.source = None if pretrained is None else local_or_name(pretrained)
        self.width = int(model.config.text_config.hidden_size)
        self.most = int(model.config.max_text_len)
        self.identity = {"kind": "GroundingDino", "size": size, "weights": weights_id(model.state_dict())}
        run_in(model.model.backbone.conv_encoder, precision)
        self.tower = ("",)  # fused from the start: nothing stays the same once any parameter learns

    def preprocess(self, image: Image.Image) -> Tensor:
        """See :meth:`Detector.preprocess`."""
        pixels = tvf.to_dtype(tvf.to_image(to_rgb(image)), torch.float32, scale=True)
        resized = tvf.resize(pixels, [self.size, self.size], InterpolationMode.BILINEAR, antialias=True)
        return tvf.normalize(resized, list(_MEAN), list(_STD))

    def frozen(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`Detector.frozen`: the pixels themselves."""
        return {"pixels": images}

    def detect(self, frozen: Frozen, concepts: Tensor) -> Detections:
        """See :meth:`Detector.detect`; a class's logit is the mean over its tokens."""
        out, positions = self._run(frozen, concepts)
        return Detections(out.logits[..., positions].mean(-1), out.pred_boxes)

    def losses(self, frozen: Frozen, concepts: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
        """See :meth:`Detector.losses`: transformers' own, over tokens, with its weights."""
        labels = []
        for target in targets:
            boxes = target["boxes"].to(self.device)
            labels.append({"class_labels": target["labels"].to(self.device), "boxes": boxes})
        out, _ = self._run(frozen, concepts, labels)
        return {"detection": out.loss}

    @property
    def reads_text(self) -> bool:
        """See :attr:`Detector.reads_text`; random weights have no tokenizer."""
        return self.text is not None and self.source is not None

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """See :meth:`Detector.read`; the mean state of each text's own tokens, all read as one prompt each."""
        if self.text is None:
            raise BackboneError("the text encoder of this detector was dropped; use saved concepts.")

        tokenizer = self._tokenizer()
        rows = []

        for text in texts:
            words = list(tokenizer(text.strip().rstrip(".").lower(), add_special_tokens=False).input_ids)
            ids = torch.tensor([[_START, *words, _DOT, _END]], device=self.device)
            rows.append(self.text(ids).last_hidden_state[0, 1:-2].mean(0))

        return torch.stack(rows)

    def drop_text(self) -> None:
        """See :meth:`Detector.drop_text`."""
        self.text = None

    def _run(self, frozen: Frozen, concepts: Tensor, labels: Any = None) -> tuple[Any, Tensor]:
        """Return the model's output, and the (C, L) positions of the concepts' tokens.

        Args:
            frozen: See :meth:`frozen`.
            concepts: (C, L, d).
            labels: What transformers computes the loss with; None: it computes none.
        """
        classes, length, _ = concepts.shape
        ids = [_START, *([_WORD] * length + [_DOT]) * classes, _END]
        if len(ids) > self.most:
            raise DataError(
                f"{classes} concepts of {length} vectors make {len(ids)} tokens; this model reads {self.most}."
            )

        row = torch.tensor(ids, device=self.device)
        is_concept = row == _WORD
        positions = is_concept.nonzero()[:, 0]
        states = concepts.new_zeros(len(ids), self.width).index_put((positions,), concepts.flatten(0, 1))

        pixels = frozen["pixels"].to(self.device)
        count = len(pixels)
        self.encoder.states = states.expand(count, -1, -1)
        try:
            out = self.model(
                pixel_values=pixels,
                input_ids=row.expand(count, -1),
                attention_mask=is_concept.long().expand(count, -1),
                labels=labels,
            )
        finally:
            self.encoder.states = None
        return out, positions.view(classes, length)

    def _tokenizer(self) -> Any:
        import transformers

        if self.source is None:
            raise BackboneError(
                "random weights have no tokenizer, so class names can't be read: init='normal'."
            )
        try:
            return transformers.AutoTokenizer.from_pretrained(self.source)
        except Exception as error:  # the hub client and tokenizers each raise their own kinds
            raise BackboneError(f"the tokenizer of {self.source} can't be had: {error}.") from error
