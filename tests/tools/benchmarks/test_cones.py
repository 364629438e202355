"""The comparison of ConES with CoOp measures what it says it measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import BENCHMARKS


@pytest.mark.slow
def test_both_are_trained_and_measured(tmp_path: Path) -> None:
    for name in ("coop", "cones"):
        text = f"learner: {{name: {name}}}\ntrain: {{epochs: 2, batch_size: 8, warmup_epochs: 0, lr: 0.01}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    paths = {name: str(tmp_path / f"{name}.yaml") for name in ("coop", "cones")}
    result = BENCHMARKS.get("cones").target(data="scenes/kind", shots="1,2", seeds="1,2", **paths)
    assert 0 < result["zero_shot_accuracy"] <= 1
    for shots in (1, 2):
        for name, learned in (("coop", 16 * 128), ("cones", 2 * 128)):
            row = result[f"{name}/shots{shots}"]
            assert row["parameters"] == learned
            assert 0 < row["accuracy"] <= 1
            assert row["seconds"] > 0
            assert row["added_mib"] >= 0
