"""CONTRIBUTING.md is true: its learner works as a plug-in from outside, its card is a valid card."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlprompt.data.cards import load_card

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

USE = """
import torch
from vlprompt.backbones import create_backbone
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.learners import create_learner, list_learners

assert "task_residual" in list_learners()
backbone = create_backbone("tiny", pretrained="random")
names = ["circle", "square", "star"]
learner = create_learner("task_residual", backbone, names, alpha=1.0)
zero_shot = create_learner("zero_shot", backbone, names)
images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
assert torch.allclose(learner.eval()(images), zero_shot.eval()(images), atol=1e-4)  # starts there

learner.train()
batch = {"image": images, "label": torch.tensor([0, 1, 2, 0])}
optimizer = torch.optim.SGD([learner.residual], lr=1e-4)
before = learner.loss(batch)["cross_entropy"]
before.backward()
assert [n for n, p in learner.named_parameters() if p.grad is not None] == ["residual"]
optimizer.step()
assert learner.loss(batch)["cross_entropy"] < before
assert list(learner.trainable_state()) == ["residual"]
for wrong, error in ((lambda: create_learner("task_residual", backbone, names, alpha=-1.0), ConfigError),
                     (lambda: learner.with_classes(["ring", "cross"]), DataError)):
    try:
        wrong()
    except error:
        continue
    raise SystemExit(f"{error.__name__} expected")
"""


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
    return next(b for b in blocks if containing in b)


def test_the_learner_of_the_guide_plugs_in_and_learns(tmp_path: Path) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "task_residual.py").write_text(block("python", "class TaskResidual"))
    installed = tmp_path / "my_package-1.0.dist-info"  # what pip writes for the guide's entry point
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    point = re.search(r"^task_residual = \"(.*)\"$", block("toml", "vlprompt.learners"), flags=re.MULTILINE)
    (installed / "entry_points.txt").write_text(f"[vlprompt.learners]\ntask_residual = {point[1]}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_experiment_of_the_guide_runs_as_a_plug_in(tmp_path: Path) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "sentences.py").write_text(block("python", "class SentencesExperiment"))
    installed = tmp_path / "my_package-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    point = re.search(r"^sentences = \"(.*)\"$", block("toml", "vlprompt.tasks"), flags=re.MULTILINE)
    (installed / "entry_points.txt").write_text(f"[vlprompt.tasks]\nsentences = {point[1]}\n")
    methods = 'methods: {short: "{}.", long: "a photo of a {}."}'
    (tmp_path / "run.yaml").write_text(
        f"task: sentences\ndata: [scenes/kind]\n{methods}\noutput: {tmp_path}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-m", "vlprompt", "run", "run.yaml"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| short |" in done.stdout
    assert done.stdout.strip().splitlines()[-1].endswith(" %")


def test_the_card_of_the_guide_is_valid(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "from_the_guide.yaml").write_text(block("yaml", "title: EuroSAT"))
    monkeypatch.setenv("VLPROMPT_CARDS", str(tmp_path))
    card = load_card("from_the_guide")
    assert card.classnames == ("Annual Crop Land", "Forest", "River")
    assert card.splits.sizes["test"] == 8100


def test_every_make_target_of_the_guide_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):(?! *=)", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", GUIDE)) <= targets
