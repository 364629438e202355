"""Several methods in one table: what it says, what a failing method costs, and which setting takes precedence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.classification.studies import run
from vlprompt.classification.config import load_config
from vlprompt.core.errors import ConfigError

METHOD = """
task: classification
backbone: {name: tiny, pretrained: random}
learner: {name: coop, context_length: 2}
train: {epochs: 1, lr: 0.05, batch_size: 8}
"""
WHOLE = """
task: classification
name: all
output: {folder}/runs
data: {{name: [scenes/kind, scenes/arrangement], validate_on: none}}
protocol: {{name: coop-fewshot, shots: [2], seeds: [1, 2]{baseline}}}
{more}
methods:
{methods}
"""


def _write(folder: Path, methods: str, more: str = "", baseline: str = "") -> Path:
    (folder / "one.yaml").write_text(METHOD)
    text = WHOLE.format(folder=folder, methods=methods.format(folder=folder), more=more, baseline=baseline)
    (folder / "all.yaml").write_text(text)
    return folder / "all.yaml"


def test_a_table_holds_every_method_and_its_paired_gains(tmp_path: Path) -> None:
    methods = (
        "  words: {{cfg: {folder}/one.yaml}}\n  frozen: {{cfg: {folder}/one.yaml, train: {{epochs: 0}}}}\n"
    )
    outcome = run(_write(tmp_path, methods, baseline=", baseline: frozen"))
    assert outcome.failures == []
    for text in ("words 2-shot", "frozen 2-shot", "scenes/kind", "average", "Gain over frozen"):
        assert text in outcome.text
    gain = outcome.metrics["words/shots2/accuracy"] - outcome.metrics["frozen/shots2/accuracy"]
    assert f"{100 * gain:.1f} ±" in outcome.text.split("Gain over")[1].replace("-0.0", "0.0")
    assert len(outcome.metrics["words"]["seeds"]) == 2
    frame = outcome.frame()
    assert set(frame["method"]) == {"words", "frozen"}
    assert len(frame[(frame.metric == "accuracy") & (frame.method == "words")]) == 4


def test_a_method_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    methods = (
        "  good: {{cfg: {folder}/one.yaml}}\n  bad: {{name: coop, backbone: {{masks: {folder}/nowhere}}}}\n"
    )
    outcome = run(_write(tmp_path, methods, more="backbone: {name: tiny, pretrained: random}"))
    assert "good 2-shot" in outcome.text
    assert outcome.exit_code == 1
    (failure,) = outcome.failures
    assert failure.startswith("bad_")
    assert "nowhere" in failure
    assert "and 3 more" in failure  # two data sets, two seeds, one reason


def test_mistakes_of_all_methods_are_reported_before_the_first_one_starts(tmp_path: Path) -> None:
    methods = (
        "  a: {{cfg: {folder}/one.yaml, contxt: 3}}\n  b: {{cfg: {folder}/one.yaml, train: {{epoch: 2}}}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(_write(tmp_path, methods))
    assert len(caught.value.problems) == 2
    assert "a: learner.contxt: unknown key" in caught.value.problems[0]
    assert "b: train.epoch: unknown key; did you mean 'epochs'?" in caught.value.problems[1]
    assert not (tmp_path / "runs").exists()


def test_an_unknown_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"protocol\.baseline: unknown method 'b'.*Known: a"):
        load_config(_write(tmp_path, "  a: {{cfg: {folder}/one.yaml}}\n", baseline=", baseline: b"))


def test_one_learner_and_several_methods_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, "  a: {{cfg: {folder}/one.yaml}}\n", more="learner: {name: coop}")
    with pytest.raises(ConfigError, match="one learner or several methods, not both"):
        load_config(path)


@pytest.mark.parametrize(
    ("whole", "own", "typed", "rate"),
    [
        ("", "", [], 0.05),
        ("train: {lr: 0.1}", "", [], 0.1),
        ("train: {lr: 0.1}", ", train: {{lr: 0.2}}", [], 0.2),
        ("train: {lr: 0.1}", ", train: {{lr: 0.2}}", ["train.lr=0.3"], 0.3),
        ("", "", ["train.lr=0.3"], 0.3),
        ("", ", train: {{lr: 0.2}}", ["methods.a.train.lr=0.4"], 0.4),
    ],
)
def test_command_line_over_own_keys_over_the_whole_over_the_methods_file(
    tmp_path: Path, whole: str, own: str, typed: list[str], rate: float
) -> None:
    path = _write(tmp_path, f"  a: {{{{cfg: {{folder}}/one.yaml{own}}}}}\n", more=whole)
    (study,) = load_config(path, typed).studies()
    assert study.config.train.lr == rate
    assert study.config.train.batch_size == 8
    assert study.config.learner == {"name": "coop", "context_length": 2}


def test_another_learner_takes_no_option_of_the_files_learner(tmp_path: Path) -> None:
    path = _write(tmp_path, "  probe: {{cfg: {folder}/one.yaml, name: linear_probe}}\n")
    (study,) = load_config(path).studies()
    assert study.config.learner == {"name": "linear_probe"}


def test_the_configuration_in_the_run_folder_is_the_same_run(tmp_path: Path) -> None:
    methods = "  a: {{cfg: {folder}/one.yaml}}\n  zero_shot: {{}}\n"
    more = "backbone: {name: tiny, pretrained: random}\nsettings: {one shot: {protocol: {shots: [1]}}}"
    outcome = run(_write(tmp_path, methods, more), ["protocol.seeds=[1]"])
    again = run(outcome.folder / "config.yaml")
    assert again.finished_before
    assert again.folder == outcome.folder
