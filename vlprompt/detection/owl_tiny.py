"""`owl-tiny`: a small head of OWL-ViT's kind on the embedded `tiny`, trained on drawn scenes; offline.

Differs from OWL-ViT (Minderer et al., arXiv 2205.06230) in that the towers are frozen in training too, so the head
reads two depths of tokens and mixes them with one transformer block of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlprompt.backbones import create_backbone
from vlprompt.backbones.image_only import without_text
from vlprompt.backbones.taps import first_state, run_taps
from vlprompt.core.errors import BackboneError
from vlprompt.core.files import read_tensors
from vlprompt.core.paths import user_path
from vlprompt.core.pixels import to_rgb
from vlprompt.core.precision import Precision
from vlprompt.core.seeding import seeded_modules
from vlprompt.core.weights import weights_id
from vlprompt.detection import DETECTORS
from vlprompt.detection.base import Detections, Detector, Frozen

__all__ = ["WEIGHTS", "OwlHead", "OwlTiny"]

#: Where the packed weights lie inside the package.
WEIGHTS = Path(str(files("vlprompt.detection"))) / "weights" / "owl_tiny.safetensors"

_TAPS = (2, 4)  # of tiny's five blocks


class OwlHead(nn.Module):
    """Boxes and scaled cosines from patch tokens.

    Args:
        width: W, of the tower's tokens.
        dim: d, of the text's space.
        grid: Patches along a side.
    """

    bias: Tensor

    def __init__(self, width: int, dim: int, grid: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(len(_TAPS) * width), nn.Linear(len(_TAPS) * width, width))
        self.block = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.leave = nn.LayerNorm(width)
        self.embed = nn.Linear(width, dim)
        self.shift = nn.Linear(width, 1)
        self.scale = nn.Linear(width, 1)
        self.box = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)
        )

        # At first no object is seen anywhere, and every box is its patch.
        with torch.no_grad():
            self.shift.bias.fill_(-0.8)
            self.scale.bias.fill_(10.0)
            self.box[-1].weight.mul_(0.1)  # type: ignore[operator]
            self.box[-1].bias.zero_()  # type: ignore[operator]

        centres = (torch.arange(grid) + 0.5) / grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        side = torch.full_like(x, 2 / grid)
        patches = torch.stack([x, y, side, side], -1).flatten(0, 1)
        self.register_buffer("bias", patches.logit(), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what each of N patches shows.

        Args:
            tokens: (B, N, 2 W), those of two depths side by side.

        Returns:
            Unit vectors (B, N, d), shifts and scales of cosines (B, N, 1) each, and boxes (B, N, 4).
        """
        x = self.leave(self.block(self.enter(tokens)))
        vectors = F.normalize(self.embed(x), dim=-1)
        scale = F.elu(self.scale(x)) + 1  # above 0
        boxes = (self.box(x) + self.bias).sigmoid()
        return vectors, self.shift(x), scale, boxes


@DETECTORS.register(
    "owl-tiny", summary="a head of OWL-ViT's kind on `tiny`, trained on scenes; embedded", paper="2205.06230"
)
class OwlTiny(Detector):
    """The embedded detector: 64 boxes in 64 x 64 pixels.

    Args:
        weights: The head's: None for those in the package, ``"random"``, or a packed file.
        seed: Of random weights.
        precision: What the towers of ``tiny`` are stored and run in; the head stays float32.

    Raises:
        BackboneError: If the file does not fit.
        CheckpointError: If it is missing or damaged.
    """

    def __init__(self, *, weights: str | None = None, seed: int = 0, precision: Precision = "fp32") -> None:
        super().__init__()
        self.precision = precision
        self.backbone = create_backbone("tiny", precision=precision)
        self.width = self.backbone.dim
        grid = self.backbone.image_size[0] // 8

        with seeded_modules(seed, "owl-tiny"):
            self.head = OwlHead(self.backbone.vision.width, self.width, grid)
        if weights != "random":
            self._load(user_path(weights) if weights else WEIGHTS)

        self.tower = ("backbone.",)
        self._has_text = True
        self.identity = {
            "kind": "owl-tiny",
            "weights": weights_id(self.head.state_dict()),
            "backbone": self.backbone.fingerprint["id"],
        }

    def preprocess(self, image: Image.Image) -> Tensor:
        """See :meth:`Detector.preprocess`."""
        side = self.backbone.image_size[0]
        return self.backbone.preprocess(to_rgb(image).resize((side, side), Image.Resampling.BICUBIC))

    @torch.no_grad()
    def frozen(self, images: Tensor) -> dict[str, Tensor]:
        """See :meth:`Detector.frozen`: the tokens of two depths of the tower, without the class token."""
        tower = self.backbone.vision
        taps = run_taps(tower, first_state(tower, images.to(self.device)), _TAPS)
        return {"features": torch.cat([state[:, 1:] for state in taps.states], -1)}

    def detect(self, frozen: Frozen, concepts: Tensor) -> Detections:
        """See :meth:`Detector.detect`."""
        vectors, shift, scale, boxes = self.head(frozen["features"].to(self.device).float())
        cosines = vectors @ F.normalize(concepts.flatten(0, 1), dim=-1).T  # (B, N, C L)
        logits = (cosines.unflatten(-1, concepts.shape[:2]).mean(-1) + shift) * scale
        return Detections(logits, boxes)

    def embeds(self, frozen: Frozen) -> Tensor:
        """See :meth:`Detector.embeds`."""
        return self.head(frozen["features"].to(self.device).float())[0]

    @property
    def reads_text(self) -> bool:
        """See :attr:`Detector.reads_text`."""
        return self._has_text

    def read(self, texts: Sequence[str]) -> Tensor:
        """See :meth:`Detector.read`; of unit length."""
        if not self._has_text:
            raise BackboneError("the text encoder of this detector was dropped; use saved concepts.")
        return self.backbone.encode_text(texts)

    def drop_text(self) -> None:
        """See :meth:`Detector.drop_text`."""
        self.backbone = without_text(self.backbone)
        self._has_text = False

    def _load(self, path: Path) -> None:
        packed, _ = read_tensors(path)  # float16, to be small
        try:
            self.head.load_state_dict({name: tensor.float() for name, tensor in packed.items()}, strict=True)
        except RuntimeError as error:
            raise BackboneError(f"{path} does not fit owl-tiny: {error}") from error
