"""A saved prompt is named by its folder, its cell's or its run's; where a name means several, all are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError
from vlprompt.learners import create_learner
from vlprompt.saved.paths import find_prompts, prompt_folder
from vlprompt.saved.prompts import load, save


def make(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompt.safetensors").touch()


def test_a_run_with_one_prompt_means_it(tmp_path: Path) -> None:
    prompt = tmp_path / "run" / "cells" / "coop_seed1" / "prompt"
    make(prompt)
    for path in (prompt, prompt.parent, tmp_path / "run", str(tmp_path / "run")):
        assert prompt_folder(path) == prompt
        assert find_prompts([path]) == [str(prompt)]


def test_several_are_an_error_that_names_them_where_one_is_needed(tmp_path: Path) -> None:
    prompts = [tmp_path / "cells" / f"seed{seed}" / "prompt" for seed in (1, 2)]
    make(*prompts)
    with pytest.raises(CheckpointError, match=r"holds 2 saved prompts; name one of them:") as caught:
        prompt_folder(tmp_path)
    for prompt in prompts:
        assert str(prompt) in str(caught.value)
    assert find_prompts([tmp_path]) == [str(prompt) for prompt in prompts]


def test_a_long_list_of_prompts_is_cut(tmp_path: Path) -> None:
    make(*(tmp_path / "cells" / f"seed{seed}" / "prompt" for seed in range(30)))
    with pytest.raises(CheckpointError, match="and 20 more"):
        prompt_folder(tmp_path)


def test_the_nearest_prompt_is_meant(tmp_path: Path) -> None:
    """A cell may train in stages whose prompts lie below it."""
    make(tmp_path, tmp_path / "prompt", tmp_path / "cells" / "a" / "prompt")
    assert prompt_folder(tmp_path) == tmp_path


def test_no_prompt_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"the folder of a prompt, of a cell or of a run \(no such file: "
    ):
        prompt_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"no saved prompt at .*expected a folder with prompt"):
        find_prompts([tmp_path / "*"])


def test_load_takes_the_folder_of_a_run(backbone: Backbone, tmp_path: Path) -> None:
    learner = create_learner("coop", backbone, ["cat", "dog"])
    save(learner, tmp_path / "cells" / "coop_seed1" / "prompt")
    assert load(tmp_path, backbone).method == "coop"
    save(learner, tmp_path / "cells" / "coop_seed2" / "prompt")
    with pytest.raises(CheckpointError, match="holds 2 saved prompts"):
        load(tmp_path, backbone)
