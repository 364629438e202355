"""scenes:COUNT or scenes:COUNT@SEED: captioned scenes, drawn when they are read."""

from __future__ import annotations

import re

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data.captions import CAPTION_SOURCES
from vlprompt.data.scenes.pairs import CaptionPairs
from vlprompt.data.scenes.render import render
from vlprompt.data.scenes.tasks import GENERATOR

__all__ = ["SceneCaptions"]

_SEED = 1303  # other scenes than the embedded backbone was pretrained on


@CAPTION_SOURCES.register(
    "scenes", summary="captioned scenes, drawn on the fly", grammar="scenes:COUNT[@SEED]", embedded=True
)
class SceneCaptions:
    """Captioned scenes without what pretraining never saw: no held-out style, combination or wording.

    Args:
        argument: ``COUNT`` or ``COUNT@SEED``.

    Raises:
        DataError: If it is no number.
    """

    def __init__(self, argument: str) -> None:
        match = re.fullmatch(r"(\d+)(?:@(\d+))?", argument)
        if match is None or int(match[1]) < 1:
            raise DataError(f"scenes:{argument}: write scenes:COUNT or scenes:COUNT@SEED, COUNT at least 1.")
        self.pairs = CaptionPairs(int(match[1]), int(match[2] or _SEED), holdout=True, balanced=True)

    def __len__(self) -> int:
        return len(self.pairs)

    def caption(self, index: int) -> str:
        """See :meth:`CaptionSource.caption`."""
        return self.pairs.captions(index)[0].text

    def image(self, index: int) -> Image.Image:
        """See :meth:`CaptionSource.image`."""
        return Image.fromarray(render(self.pairs.spec(index), self.pairs.size).image)

    def identity(self) -> str:
        """See :meth:`CaptionSource.identity`; a longer sequence begins like a shorter one."""
        return f"{GENERATOR}/pairs/{self.pairs.seed}/{self.pairs.count}"

    def stamp(self, index: int) -> str:
        """See :meth:`CaptionSource.stamp`; a drawn image never changes."""
        return ""
