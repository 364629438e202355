"""The devices of this machine, and the types of numbers that precisions stand for."""

from __future__ import annotations

import torch

from vlprompt.core.errors import BackboneError
from vlprompt.core.precision import Precision

__all__ = ["DTYPES", "available_devices", "check_device", "precision_of"]

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def available_devices() -> list[str]:
    """Return the names of the devices of this machine, the processor first."""
    cards = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])]


def check_device(name: str, precision: Precision = "fp32") -> torch.device:
    """Return a device by its name.

    Args:
        name: See :data:`vlprompt.core.precision.Device`.
        precision: What is to be computed on it.

    Raises:
        BackboneError: If there is no such device here, naming those there are, or it can't compute in the precision.
    """
    there = available_devices()
    if name not in there and not (name == "cuda" and "cuda:0" in there):
        raise BackboneError(f"there is no device {name!r} here. There is: {', '.join(there)}.")

    device = torch.device(name)
    if device.type == "cuda" and precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        card = torch.cuda.get_device_name(device)
        raise BackboneError(f"the card {card} has no unit for bf16. Take precision fp16 or fp32.")
    return device


def precision_of(dtype: torch.dtype) -> Precision:
    """Return the name of what a model computes in.

    Raises:
        BackboneError: If frozen models don't run in it.
    """
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise BackboneError(
        f"a model in {dtype} can't be used here. Known: {', '.join(map(str, DTYPES.values()))}."
    )
