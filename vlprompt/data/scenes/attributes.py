"""The closed vocabulary of scenes, and what of it pretraining never sees."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from vlprompt.core.errors import UnknownNameError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.scenes.shapes import GLYPHS, SHAPES

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "COUNT_WORDS",
    "HELD_OUT_MASKS",
    "HELD_OUT_STYLES",
    "PATTERNS",
    "POSITIONS",
    "SIZES",
    "STYLES",
    "TONES",
    "check",
    "held_out_pairs",
    "is_held_out",
    "list_styles",
]

#: Colour name -> RGB in [0, 1].
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.97, 0.53, 0.08),
    "yellow": (0.96, 0.88, 0.12),
    "green": (0.12, 0.62, 0.20),
    "blue": (0.12, 0.27, 0.86),
    "purple": (0.50, 0.16, 0.68),
    "pink": (0.98, 0.50, 0.74),
    "brown": (0.46, 0.27, 0.10),
    "turquoise": (0.10, 0.80, 0.78),
    "gray": (0.52, 0.52, 0.52),
    "black": (0.05, 0.05, 0.05),
    "white": (0.97, 0.97, 0.97),
}

PATTERNS: tuple[str, ...] = ("solid", "striped", "dotted", "checkered", "gradient", "outlined", "split")

BACKGROUNDS: tuple[str, ...] = ("plain", "gradient", "grainy", "grid", "diagonal", "spotted")

#: Ground tone -> RGB; the first five are called light, the rest dark.
TONES: dict[str, tuple[float, float, float]] = {
    "paper": (0.93, 0.92, 0.89),
    "sky": (0.78, 0.87, 0.95),
    "mint": (0.80, 0.92, 0.82),
    "sand": (0.90, 0.83, 0.68),
    "rose": (0.94, 0.82, 0.84),
    "slate": (0.25, 0.28, 0.33),
    "navy": (0.10, 0.12, 0.30),
    "forest": (0.09, 0.24, 0.16),
    "wine": (0.28, 0.09, 0.15),
    "night": (0.07, 0.07, 0.08),
}
LIGHT_TONES: frozenset[str] = frozenset(list(TONES)[:5])

#: Size name -> range of the radius, as a fraction of the image's side.
SIZES: dict[str, tuple[float, float]] = {"small": (0.11, 0.15), "medium": (0.19, 0.24), "large": (0.31, 0.38)}

#: Position name -> centre (x, y), fractions of the side, y downwards.
POSITIONS: dict[str, tuple[float, float]] = {
    f"{row} {column}".strip() or "center": (x, y)
    for row, y in (("top", 0.22), ("", 0.5), ("bottom", 0.78))
    for column, x in (("left", 0.22), ("", 0.5), ("right", 0.78))
}

COUNT_WORDS: tuple[str, ...] = ("one", "two", "three", "four", "five")

STYLES: tuple[str, ...] = ("plain", "sketch", "inverted", "noisy", "blurred", "night", "pixelated")

#: Styles that pretraining never sees.
HELD_OUT_STYLES: frozenset[str] = frozenset({"sketch", "inverted"})

#: Objects whose masks the embedded segmenters never learned; ``tiny`` itself knows their names.
HELD_OUT_MASKS: frozenset[str] = frozenset({"heart", "arrow", "flower", "lightning", "four", "eight"})

_HOLD_OUT_SEED = 7
_HOLD_OUT_SHARE = 5  # one combination in five


def list_styles() -> list[str]:
    """Return the sorted names of the render styles (the domains of domain-shift protocols)."""
    return sorted(STYLES)


@lru_cache(maxsize=4)
def held_out_pairs(kind: str) -> frozenset[tuple[str, str]]:
    """Return the combinations that pretraining never shows or names: a fifth of all, spread over the shapes.

    Args:
        kind: ``"shape_colour"`` or ``"shape_pattern"``.

    Returns:
        Pairs (shape, colour) or (shape, pattern).

    Raises:
        UnknownNameError: For any other kind.
    """
    kinds = {"shape_colour": tuple(COLOURS), "shape_pattern": PATTERNS}
    check("combination", kind, kinds)
    pairs = [(shape, other) for shape in (*SHAPES, *GLYPHS) for other in kinds[kind]]
    count = len(pairs) // _HOLD_OUT_SHARE
    # Ranking a random value inside each shape first keeps every shape about equally deprived.
    rng = numpy_rng(_HOLD_OUT_SEED, "scenes", "held-out", kind)
    per_shape = len(kinds[kind])
    ranks = [r for _ in range(len(pairs) // per_shape) for r in rng.permutation(per_shape)]
    order = sorted(range(len(pairs)), key=lambda i: (ranks[i], rng.random()))

    return frozenset(pairs[i] for i in order[:count])


def is_held_out(shape: str, colour: str, pattern: str) -> bool:
    """Say whether an object combines what pretraining must never see together."""
    return (shape, colour) in held_out_pairs("shape_colour") or (shape, pattern) in held_out_pairs(
        "shape_pattern"
    )


def check(kind: str, name: str, allowed: Iterable[str]) -> None:
    """Refuse a name outside the vocabulary.

    Raises:
        UnknownNameError: With the nearest valid names.
    """
    names = list(allowed)
    if name not in names:
        raise UnknownNameError(f"scene {kind}", name, names)
