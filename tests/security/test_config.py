"""Configurations of security: every mistake is named, and every key has an effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.folders import fill
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.data import ImageDataset, load_dataset
from vlprompt.experiments.config import configs_dir
from vlprompt.experiments.tasks import read_experiment
from vlprompt.security.config import SecurityConfig


@pytest.mark.parametrize("path", sorted(configs_dir().glob("security/*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_valid_and_names_its_command(path: Path) -> None:
    assert f"vlprompt run {path.name}" in path.read_text(encoding="utf-8")
    experiment = read_experiment(path.name)
    assert experiment.cells()
    assert experiment.missing() == []
    assert experiment.sources() == {}


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "task: security\nbackbone: {name: tny}\ndata: {name: [scenes/shpe], split: train}\n"
        "methods: {dbom: {lerner: {}, train: {seed: 3}}, spectrl: {}, deep: {name: dbom, "
        "learner: {hiden: 3, triggers: [clean, sig]}, train: {epochz: 3, seed: 4}}}\n"
        "compositions: {triggers: [badnets]}\nsuspect: {mode: some}\ntrain: {seed: 1}\n"
        "variants: {few: {copies: 0, size: 8}, odd: {triggers: [badnets]}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        SecurityConfig.read(path)
    expected = (
        "train: unknown key",
        "train.seed: seeds belong to the protocol; write protocol.seeds=[1]",
        "backbone.name: unknown backbone 'tny'. Did you mean 'tiny'",
        "data.name: unknown data set 'scenes/shpe'",
        "data.split: input should be 'val' or 'test'",
        "methods.dbom.lerner: unknown key; did you mean 'learner'?",
        "methods.spectrl: unknown scanner 'spectrl'",
        "methods.deep.learner.hiden: unknown key; did you mean 'hidden'?",
        "methods.deep.learner.triggers: the experiment decides it",
        "methods.deep.train.epochz: unknown key; did you mean 'epochs'?",
        "methods.deep.train.seed: use protocol.seeds=[4]",
        "compositions.triggers: a list of triggers begins with 'clean'",
        "suspect.mode: input should be 'all_to_one' or 'all_to_all'",
        "variants.few.copies: ",
        "variants.few.size: unknown key",
        "variants.odd.triggers: a list of triggers begins with 'clean'",
    )
    for text in expected:
        assert any(problem.startswith(text) for problem in caught.value.problems), text
    assert len(caught.value.problems) == len(expected)


def test_labels_must_be_methods_that_can_do_what_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "task: security\nmethods: {spectral: {}, zero_shot: {}}\nsuspect: {cleaners: [zero_shoot]}\n"
        "protocol: {baseline: linear_probe}\nvariants: {one copy: {copies: 1}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        SecurityConfig.read(path)
    assert len(caught.value.problems) == 3
    for text in (
        "suspect.cleaners: unknown method 'zero_shoot'. Did you mean 'zero_shot'",
        "protocol.baseline: unknown method 'linear_probe'",
        "variants: spectral, the first method, scans whole labelled sets only",
    ):
        assert text in str(caught.value)
    with pytest.raises(
        ConfigError, match="spectral scans whole labelled sets only, and suspect=null leaves none"
    ):
        SecurityConfig.read(path, ["suspect=null", "protocol.baseline=null", "variants.one copy=null"])


def test_a_file_of_another_task_says_which(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("task: detection\n")
    with pytest.raises(ConfigError, match="this file is of the task 'detection', not of 'security'"):
        SecurityConfig.read(path)


def test_a_variant_changes_its_compositions_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(
        "task: security\nmethods: {zero_shot: {}, spectral: {}, dbom: null}\n"
        "compositions: {triggers: [clean, blended, sig]}\nsuspect: {cleaners: [zero_shot]}\n"
        "variants: {few: {copies: 1, native_size: 64}, none: {}}\n"
    )
    config = SecurityConfig.read(path)
    few = config.varied("few")
    assert (few.copies, few.native_size) == (1, 64)
    assert few.triggers == config.compositions.triggers
    assert config.varied("none") == config.varied(None) == config.compositions
    assert list(config.methods) == ["zero_shot", "spectral"], "null leaves a method out"
    assert config.first_method == "zero_shot"


def test_a_path_on_the_command_line_is_taken_as_written(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: security\n")
    overrides = ["data.root=/data/1e3", "data.cache_dir=null", "data.name=[digits,scenes/size]"]
    config = SecurityConfig.read(path, overrides)
    assert config.data.root == "/data/1e3"
    assert config.data.cache_dir is None
    assert config.data.names == ["digits", "scenes/size"]


def test_unreadable_images_are_skipped_as_the_data_section_says(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / name, 8)
    (tmp_path / "cat" / "bad.jpg").write_bytes(b"no image")

    def train(**options: object) -> ImageDataset:
        content = {"task": "security", "data": {"name": f"folder:{tmp_path}", **options}}
        config = SecurityConfig.parse(content, {}, "test")
        return load_dataset(config.data.names[0], "all", **config.data.image_arguments())

    with pytest.warns(UserWarning, match=r"1 of 17 images can't be read"):
        assert len(train()) == 16
    with pytest.raises(DataError, match="max_bad_images"):
        train(max_bad_images=0, max_bad_share=0.01)
    with pytest.raises(DataError, match="on_bad_image"):
        train(on_bad_image="error")
