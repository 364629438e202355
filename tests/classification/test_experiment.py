"""Whole runs through the command line, as a user starts, kills and repeats them."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vlprompt.core.files import read_tensors

ROOT = Path(__file__).parents[2]
BASE = """
task: classification
name: test
output: {output}
backbone: {{name: tiny, pretrained: random}}
learner: {{name: coop, context_length: 2}}
data: {{name: digits}}
train: {{epochs: 4, lr: 0.05, batch_size: 16, checkpoint_seconds: 0}}
protocol: {{shots: [2], seeds: [1]}}
"""


def _config(folder: Path, text: str = "") -> Path:
    path = folder / "run.yaml"
    path.write_text(BASE.format(output=folder / "runs") + text)
    return path


def _environment(threads: int) -> dict[str, str]:
    # Sums depend, in their last bits, on the number of threads: a comparison of bits must use the same.
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}


class Tool:
    """Runs tools/<name>.py in this process (a new one would spend its time on imports)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, name: str, *arguments: object, code: int = 0) -> tuple[str, str]:
        """Return standard output and standard error."""
        self.monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        out, err = self.capsys.readouterr()
        assert ended.value.code == code, err[-3000:]
        assert "Traceback" not in err
        return out, err


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(monkeypatch, capsys)


def _folder(folder: Path) -> Path:
    (run_folder,) = (folder / "runs" / "test").glob("[!.]*")
    return run_folder


def _cell(folder: Path) -> Path:
    (cell,) = (_folder(folder) / "cells").iterdir()
    return cell


def test_a_run_leaves_everything_the_contract_names(tool: Tool, tmp_path: Path) -> None:
    out, _ = tool("train", "--cfg", _config(tmp_path))
    folder = _folder(tmp_path)
    last = out.strip().splitlines()[-1]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert last == f"{folder / 'metrics.json'}: accuracy {100 * metrics['accuracy']:.1f} %"
    for name in ("config.yaml", "results.jsonl", "table.md", "report.html", "environment.json"):
        assert (folder / name).is_file()
    cell = _cell(tmp_path)
    assert cell.name == "coop_digits_2shots_seed1"
    for name in ("cell.json", "history.jsonl", "checkpoint/trainer.safetensors", "prompt/prompt.safetensors"):
        assert (cell / name).is_file()
    assert len((cell / "history.jsonl").read_text().splitlines()) == 4
    for key in (
        "protocol",
        "seeds",
        "shots",
        "backbone_fingerprint",
        "digits/classnames_hash",
        "digits/templates_hash",
    ):
        assert key in metrics

    scores = json.loads(tool("evaluate", folder, "--data", "digits")[0])
    assert scores["accuracy"] == pytest.approx(metrics["accuracy"])


def test_mistakes_exit_with_two_and_no_stack(tool: Tool, tmp_path: Path) -> None:
    _, err = tool("train", "--cfg", _config(tmp_path), "train.epoch=3", "data.name=digit", code=2)
    assert "did you mean 'epochs'" in err
    assert "Did you mean 'digits'" in err
    assert "'coop_tiny.yaml'" in tool("train", "--cfg", "coop_tny", code=2)[1]
    assert "no saved prompt at" in tool("evaluate", tmp_path, "--data", "digits", code=2)[1]


def test_more_shots_than_exist_is_refused_when_strict(tool: Tool, tmp_path: Path) -> None:
    arguments = ("protocol.shots=[5000]", "data.strict_shots=true")
    assert "5000" in tool("train", "--cfg", _config(tmp_path), *arguments, code=2)[1]


def test_one_failing_cell_does_not_lose_the_others(tool: Tool, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    options = (f"data.name=[digits,'folder:{missing}']", "train.epochs=1")
    _, err = tool("train", "--cfg", _config(tmp_path), *options, code=1)
    metrics = json.loads((_folder(tmp_path) / "metrics.json").read_text())
    assert 0 < metrics["digits/shots2/accuracy"] <= 1
    assert metrics["runs_failed"] == 1
    assert str(missing) in err


def _prompt(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(_cell(folder) / "prompt" / "prompt.safetensors")[0]


def _kill_after_a_checkpoint(config: Path, moment: float, *options: str) -> None:
    """Start the run in a process of its own and kill it some seconds after it wrote a checkpoint."""
    pattern = "runs/test/*/cells/*/checkpoint/trainer.safetensors"
    before = {path: path.stat().st_mtime_ns for path in config.parent.glob(pattern)}
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "tools/train.py"), "--cfg", str(config), *options],
        env=_environment(torch.get_num_threads()),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    written: list[Path] = []
    deadline = time.monotonic() + 120
    while not written and time.monotonic() < deadline:
        found = list(config.parent.glob(pattern))
        written = [path for path in found if before.get(path) != path.stat().st_mtime_ns]
        time.sleep(0.002)
    time.sleep(moment)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert written


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tool: Tool, tmp_path: Path) -> None:
    """Killed twice, once while it may be writing its first checkpoint and once later, then finished."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["data.name=scenes/kind", "train.epochs=60", "train.select=best", "train.optimizer=adamw"]
    for folder in (whole, killed):
        folder.mkdir()
    tool("train", "--cfg", _config(whole), *options)

    config = _config(killed)
    reached = []
    for moment in (0.0, 0.2):
        _kill_after_a_checkpoint(config, moment, *options)
        checkpoint = _cell(killed) / "checkpoint" / "trainer.safetensors"
        reached.append(read_tensors(checkpoint)[1]["progress"]["epoch"])
    assert reached[0] < reached[1] < 60

    tool("train", "--cfg", config, *options)
    for name, tensor in _prompt(whole).items():
        assert torch.equal(tensor, _prompt(killed)[name])
    histories = [(_cell(folder) / "history.jsonl").read_text() for folder in (whole, killed)]
    assert histories[0] == histories[1]
    for name in ("metrics.json", "results.jsonl", "report.html", "table.md"):
        # The report names the file that it repeats, and this test's two files lie in different folders.
        contents = [(_folder(path) / name).read_text().replace(str(path), "") for path in (whole, killed)]
        assert contents[0] == contents[1], name


@pytest.mark.campaign
def test_two_processes_equal_one(tool: Tool, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    tool("train", "--cfg", _config(one))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*command, str(ROOT / "tools/train.py"), "--cfg", str(_config(two))],
        env=_environment(1),
        check=True,
        capture_output=True,
    )
    for name, tensor in _prompt(one).items():
        torch.testing.assert_close(_prompt(two)[name], tensor, rtol=1e-4, atol=1e-6)
    results = [json.loads((_folder(f) / "metrics.json").read_text()) for f in (one, two)]
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=0.01)


def test_base_to_new_scores_unseen_classes_and_refuses_a_bound_learner_by_name(
    tool: Tool, tmp_path: Path
) -> None:
    path = _config(tmp_path)
    tool("train", "--cfg", path, "protocol.name=base-to-new", "train.epochs=1")
    metrics = json.loads((_folder(tmp_path) / "metrics.json").read_text())
    assert {"base/accuracy", "new/accuracy", "harmonic_mean", "new/zero_shot_accuracy"} <= set(metrics)
    bound = ("protocol.name=base-to-new", "learner={name: linear_probe}")
    assert "can't be scored after this training" in tool("train", "--cfg", path, *bound, code=2)[1]
