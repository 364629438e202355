"""OWL-ViT and OWLv2 of transformers: query embeddings are what a class is.

Papers: Minderer et al., "Simple Open-Vocabulary Object Detection with Vision Transformers", ECCV 2022, arXiv
2205.06230; "Scaling Open-Vocabulary Object Detection", NeurIPS 2023, arXiv 2306.09683.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from vlprompt.backbones.tokenizer import wrap_tokenizer
from vlprompt.core.errors import BackboneError
from vlprompt.core.pixels import to_rgb
from vlprompt.core.precision import Precision
from vlprompt.core.weights import weights_id
from vlprompt.detection import DETECTORS
from vlprompt.detection._transformers import build_model, run_in
from vlprompt.detection.base import Detections, Detector, Frozen

__all__ = ["OwlV2", "OwlViT"]

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@DETECTORS.register("owlvit", summary="transformers' OWL-ViT, by name, folder or config", paper="2205.06230")
class OwlViT(Detector):
    """Patch tokens are boxes; their class logits are scaled cosines with query embeddings.

    Args:
        pretrained: A name on the Hugging Face Hub (``"google/owlvit-base-patch32"``) or a local folder; None: random
            weights.
        config: Of random weights, fields of transformers' configuration.
        seed: Of random weights.
        precision: What the encoders of images and texts are stored and run in; the heads stay float32.
        device: Where to run; None: a GPU if there is one.

    Raises:
        BackboneError: If transformers or the weights can't be had; says what to do.
    """

    kind: ClassVar[str] = "OwlViT"
    part: ClassVar[str] = "owlvit"

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        seed: int = 0,
        precision: Precision = "fp32",
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.precision = precision
        self.model = build_model(f"{self.kind}ForObjectDetection", pretrained, config, seed)
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

        settings = self.model.config
        self.width = int(settings.projection_dim)
        self.size = int(settings.vision_config.image_size)
        self.tokens = int(settings.text_config.max_position_embeddings)

        self.tower = (f"model.{self.part}.vision_model.", "model.layer_norm.")
        text = (f"{self.part}.text_model.", f"{self.part}.text_projection.")
        weights = {n: t for n, t in self.model.state_dict().items() if not n.startswith(text)}
        self.identity = {"kind": self.kind, "weights": weights_id(weights)}
        for encoder in (self._owl.vision_model, self._owl.text_model):
            run_in(encoder.encoder, precision)

    def preprocess(self, image: Image.Image) -> Tensor:
        """See :meth:`Detector.preprocess`."""
        pixels = tvf.to_dtype(tvf.to_image(to_rgb(image)), torch.float32, scale=True)
        resized = tvf.resize(pixels, [self.size, self.size], InterpolationMode.BICUBIC, antialias=True)
        return tvf.normalize(resized.clamp(0, 1), list(_MEAN), list(_STD))

    def frozen(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`Detector.frozen`."""
        return {"features": self.model.image_embedder(images.to(self.device))[0]}

    def detect(self, frozen: Frozen, concepts: Tensor) -> Detections:
        """See :meth:`Detector.detect`."""
        grid = frozen["features"].to(self.device)  # (B, rows, columns, W)
        features = grid.flatten(1, 2)
        queries = concepts.flatten(0, 1).expand(len(grid), -1, -1)
        logits, _ = self.model.class_predictor(features, queries)
        boxes = self.model.box_predictor(features, grid)
        return Detections(logits.unflatten(-1, concepts.shape[:2]).mean(-1), boxes)

    def embeds(self, frozen: Frozen) -> Tensor:
        """See :meth:`Detector.embeds`."""
        features = frozen["features"].to(self.device).flatten(1, 2)
        return self.model.class_predictor(features)[1]

    @property
    def reads_text(self) -> bool:
        """See :attr:`Detector.reads_text`."""
        return self._owl.text_model is not None

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """See :meth:`Detector.read`; of unit length."""
        if not self.reads_text:
            raise BackboneError("the text encoder of this detector was dropped; use saved concepts.")
        ids = wrap_tokenizer(open_clip.SimpleTokenizer()).rows(list(texts), self.tokens).to(self.device)
        # The end token is pooled and attention is causal, so the padding behind it changes nothing.
        pooled = self._owl.text_projection(self._owl.text_model(input_ids=ids).pooler_output)
        return F.normalize(pooled, dim=-1)

    def drop_text(self) -> None:
        """See :meth:`Detector.drop_text`."""
        self._owl.text_model = None
        self._owl.text_projection = None

    @property
    def _owl(self) -> Any:
        return getattr(self.model, self.part)  # transformers calls it by the model's kind


@DETECTORS.register("owlv2", summary="transformers' OWLv2, by name, folder or config", paper="2306.09683")
class OwlV2(OwlViT):
    """As OWL-ViT (``"google/owlv2-base-patch16-ensemble"``); objectness is not used.

    Images are squashed to a square, as OWL-ViT's are; OWLv2's own processor pads them instead.
    """

    kind = "Owlv2"
    part = "owlv2"
