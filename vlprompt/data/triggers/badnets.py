"""BadNets: a small patch in a corner.

Paper: Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", arXiv 1708.06733,
    section 4.1.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlprompt.data.triggers import TRIGGERS, Trigger
from vlprompt.data.triggers.base import NATIVE_SIZE, Pixels

__all__ = ["BadNets"]


@TRIGGERS.register("badnets", summary="a small square in the bottom right corner", paper="1708.06733")
class BadNets(Trigger):
    """Replaces ``patch`` x ``patch`` pixels in the bottom right corner, whatever their value (black works too).

    Args:
        size: See :class:`Trigger`.
        seed: See :class:`Trigger`; nothing is drawn.
        patch: Side of the square in pixels.
        value: Its grey level.
    """

    words = "white patch"

    def __init__(
        self,
        *,
        size: int | None = NATIVE_SIZE,
        seed: int = 1,
        patch: Annotated[int, Field(ge=1, le=8)] = 3,
        value: Annotated[int, Field(ge=0, le=255)] = 255,
    ) -> None:
        super().__init__(size=size, seed=seed)
        self.patch = patch
        self.value = value

    def apply(self, pixels: Pixels) -> Pixels:
        """See :meth:`Trigger.apply`."""
        changed = pixels.copy()
        changed[-self.patch :, -self.patch :] = self.value
        return changed
