"""The benchmark of starting runs every program, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import BENCHMARKS
from benchmarks.start import PREDICTION

HEAVY = ("torch", "open_clip", "transformers", "sklearn", "pandas", "pydantic")


@pytest.mark.slow
def test_every_program_runs() -> None:
    found = BENCHMARKS.get("start").target(repeats=1)
    for name in ("nothing", "help", "import", "libraries", "prediction"):
        assert found[name]["cpu_seconds"] > 0
    assert found["prediction"]["cpu_seconds"] > found["import"]["cpu_seconds"]


@pytest.mark.parametrize(
    "code",
    ["import vlprompt", "from vlprompt.cli.app import main\ntry: main(['--help'])\nexcept SystemExit: pass"],
)
def test_the_door_is_light(code: str) -> None:
    check = f"{code}\nimport sys\nprint('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip().splitlines()[-1].strip() == "loaded:"


def test_learners_are_listed_and_predict_without_scikit_learn() -> None:
    asks = "import sys\nprint('sklearn' in sys.modules)"
    libraries = f"import open_clip, torchmetrics, transformers.generation\n{asks}"
    alone = subprocess.run([sys.executable, "-c", libraries], capture_output=True, text=True, check=True)
    if alone.stdout.strip() == "True":
        pytest.skip("this version of a library that we need imports scikit-learn itself")

    check = f"import vlprompt\nvlprompt.list_learners()\n{PREDICTION}\n{asks}"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
