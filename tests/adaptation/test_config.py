"""Configurations of test-time adaptation: what is accepted has an effect, and all mistakes are named at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vlprompt.adaptation.config import AdaptationConfig
from vlprompt.core.errors import ConfigError
from vlprompt.experiments.config import configs_dir

SHIPPED = sorted(configs_dir().glob("adaptation/*.yaml"))


def read(tmp_path: Path, *overrides: str, **sections: Any) -> AdaptationConfig:
    raw = {
        "task": "adaptation",
        "data": {"name": "scenes/size@sketch"},
        "methods": {"mta": {"views": 3}, "voting": {"name": "zero", "views": 3}},
        **sections,
    }
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(raw))
    return AdaptationConfig.read(path, overrides)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    config = AdaptationConfig.read(path)
    assert config.name == path.stem
    header = path.read_text().partition("\ntask:")[0]
    assert f"\n#   vlprompt run {path.name}" in header, "a configuration opens with its command"


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(
            tmp_path,
            data={"name": ["scenes/siz"], "batch_size": 0},
            methods={
                "tpt": {"steps": -1, "lrr": 1},
                "x": {"name": "ttp"},
                "difftpt": {"source": "here"},
            },
            backbone={"name": "tinny"},
            source={"name": "digit"},
            diffusion={"generator": "image-variatio", "on_the_fly": True},
            seeds=[1],
        )
    for expected in (
        "methods.tpt.steps: input should be greater than or equal to 0, got -1.",
        "methods.tpt.lrr: unknown key; did you mean 'lr'?",
        "methods.x: unknown adapter 'ttp'",
        "methods.difftpt.source: generated views come from the section diffusion",
        "data.name: unknown data set 'scenes/siz'",
        "data.batch_size: input should be greater than or equal to 1",
        "source.name: unknown data set 'digit'",
        "diffusion.generator: unknown generator 'image-variatio'",
        "backbone.name: unknown backbone 'tinny'",
        "seeds: unknown key",
    ):
        assert expected in str(caught.value)


def test_methods_name_what_they_need_of_other_sections(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="diffusion: 63 generated views per image are wanted"):
        read(tmp_path, methods={"difftpt": {}})
    with pytest.raises(ConfigError, match=r"diffusion\.store: required, unless"):
        read(tmp_path, methods={"difftpt": {}}, diffusion={"options": {"pipeline": "x"}})
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, methods={"promptalign": {}})
    assert "source: methods.promptalign needs the learner's training data" in str(caught.value)
    assert "prompt: methods.promptalign starts from a learner with visual prompts" in str(caught.value)


def test_an_empty_list_of_data_sets_or_methods_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.name: it needs at least one data set"):
        read(tmp_path, "data.name=[]")
    with pytest.raises(ConfigError, match="methods:"):
        read(tmp_path, "methods.mta=null", "methods.voting=null")


def test_a_method_is_left_out_on_the_command_line(tmp_path: Path) -> None:
    assert list(read(tmp_path, "methods.mta=null").methods) == ["voting"]


def test_seeds_of_training_belong_to_the_protocol(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"protocol\.seeds=\[7\]"):
        read(tmp_path, "train.seed=7")


def test_a_file_of_another_task_says_which() -> None:
    with pytest.raises(ConfigError, match="of the task 'classification', not of 'adaptation'"):
        AdaptationConfig.read("coop_tiny.yaml")


def test_paths_on_the_command_line_are_taken_as_written(tmp_path: Path) -> None:
    config = read(tmp_path, "prompt=2024-01-01", "data.root=0123", "data.name=folder:a: b")
    assert (config.prompt, config.data.root, config.data.names) == ("2024-01-01", "0123", ["folder:a: b"])
