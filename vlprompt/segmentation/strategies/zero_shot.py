"""Nothing is tuned: the model as it was pretrained."""

from __future__ import annotations

from typing import ClassVar, Literal

from vlprompt.segmentation.strategies import STRATEGIES
from vlprompt.segmentation.strategies.base import Strategy

__all__ = ["ZeroShot"]


@STRATEGIES.register("zero_shot", summary="nothing: the model as it was pretrained")
class ZeroShot(Strategy):
    """Learns nothing."""

    tunes: ClassVar[Literal["nothing", "prompts", "decoder", "all"]] = "nothing"
