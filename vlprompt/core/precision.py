"""The names of precisions and devices, as users write them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

__all__ = ["Device", "Precision"]

Precision = Literal["fp32", "bf16", "fp16"]
"""What frozen weights are stored and computed in. The default is ``fp32`` on every device: the same configuration is
then the same run on a laptop, a login node and any card."""

Device = Annotated[str, AfterValidator(lambda name: _check_name(name))]
"""``cpu``, ``mps``, ``cuda``, or one of several cards: ``cuda:1``."""


def _check_name(name: str) -> str:
    if re.fullmatch(r"cpu|mps|cuda(:\d+)?", name) is None:
        raise ValueError(f"{name!r} is no device. Known: cpu, cuda, cuda:N (one of several cards), mps")
    return name
