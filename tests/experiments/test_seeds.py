"""Seeds of a protocol, and choices that need data which a run doesn't have."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlprompt.core.errors import ConfigError
from vlprompt.experiments.tasks import read_experiment


@pytest.mark.parametrize("config", ["coop_tiny.yaml", "compare_scanners_tiny.yaml", "tunevlseg_tiny.yaml"])
def test_a_seed_counts_once(config: str) -> None:
    with pytest.raises(ConfigError, match=r"protocol\.seeds: .*1 is named twice"):
        read_experiment(config, ["protocol.seeds=[1,1]"])


def test_the_best_epoch_is_not_chosen_on_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.select: best chooses on validation data"):
        read_experiment("coop_tiny.yaml", ["train.select=best", "data.validate_on=none"])
