"""References: the decoder is tuned, or everything."""

from __future__ import annotations

from typing import ClassVar, Literal

from vlprompt.segmentation.strategies import STRATEGIES
from vlprompt.segmentation.strategies.base import Strategy

__all__ = ["DecoderTuning", "EndToEnd"]


@STRATEGIES.register("decoder", summary="every weight of the decoder; the towers stay frozen")
class DecoderTuning(Strategy):
    """The decoder learns; batch statistics stay those of pretraining."""

    tunes: ClassVar[Literal["nothing", "prompts", "decoder", "all"]] = "decoder"


@STRATEGIES.register("end_to_end", summary="every weight of towers and decoder (on a copy of the backbone)")
class EndToEnd(Strategy):
    """Everything learns, on a copy of the backbone."""

    tunes: ClassVar[Literal["nothing", "prompts", "decoder", "all"]] = "all"
