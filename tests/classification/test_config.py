from __future__ import annotations

from pathlib import Path

import pytest

from vlprompt.classification.config import load_config
from vlprompt.core.errors import ConfigError, UnknownNameError
from vlprompt.experiments.config import config_path


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_every_mistake_is_reported_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "bad.yaml",
        "backbone: {name: ViT-B-61}\nlearner: {name: coop, positon: end, context_length: 0}\n"
        "data: {name: scenes/shpe}\ntrain: {epoch: 3, lr: fast}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert len(caught.value.problems) == 6
    for expected in (
        "train.epoch: unknown key; did you mean 'epochs'?",
        "train.lr: input should be a valid number",
        "got 'fast'",
        "learner.positon: unknown key; did you mean 'position'?",
        "learner.context_length: input should be greater than or equal to 1, got 0.",
        "Did you mean 'ViT-B-16'",
        "'scenes/shape'",
        "bad.yaml: 6 problems",
    ):
        assert expected in text


def test_unknown_learner_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown learner 'cop'\. Did you mean 'coop'"):
        load_config(_write(tmp_path, "c.yaml", "learner: {name: cop}"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpt_tiny.yaml", r"this file is of the task 'adaptation', not of 'classification'"),
        ("pretrain_tiny.yaml", r"this file is of the task 'pretraining', not of 'classification'"),
    ],
)
def test_a_file_of_another_task_says_which(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(name)


def test_bases_compose_in_order_and_the_file_wins(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", "train: {epochs: 1, lr: 0.1}\nname: a")
    _write(tmp_path, "b.yaml", "_base_: a.yaml\ntrain: {epochs: 2}")
    config = load_config(_write(tmp_path, "c.yaml", "_base_: [a.yaml, b.yaml]\ntrain: {batch_size: 4}"))
    assert (config.name, config.train.epochs, config.train.lr, config.train.batch_size) == ("a", 2, 0.1, 4)


def test_bases_in_a_circle_are_named(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", "_base_: b.yaml")
    with pytest.raises(ConfigError, match=r"circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load_config(_write(tmp_path, "b.yaml", "_base_: a.yaml") and tmp_path / "a.yaml")


def test_another_learner_drops_the_base_options(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", "learner: {name: coop, context_length: 4}")
    config = load_config(_write(tmp_path, "b.yaml", "_base_: a.yaml\nlearner: {name: linear_probe}"))
    assert config.learner == {"name": "linear_probe"}
    same = load_config(_write(tmp_path, "c.yaml", "_base_: a.yaml\nlearner: {position: front}"))
    assert same.learner == {"name": "coop", "context_length": 4, "position": "front"}


def test_an_override_of_the_learner_drops_the_file_options(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.yaml", "learner: {name: coop, context_length: 4}")
    assert load_config(path, ["learner.name=zero_shot"]).learner == {"name": "zero_shot"}
    assert load_config(path, ["learner.position=front"]).learner["context_length"] == 4


def test_overrides_are_typed(tmp_path: Path) -> None:
    path = _write(tmp_path, "c.yaml", "learner: {name: coop}")
    overrides = ["train.lr=1e-3", "protocol.seeds=[1,2,3]", "data.name=digits", "learner.class_specific=true"]
    config = load_config(path, overrides)
    assert config.train.lr == 1e-3
    assert config.protocol.seeds == [1, 2, 3]
    assert config.learner_options == {"class_specific": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1, 2", "c.yaml"),
        ("- 1\n- 2", "must be keys and values"),
        ("name: a/b", "name: 'a/b' is not a name of a folder"),
        (
            "protocol: {split: B10-C0}",
            "protocol.split: 'B10-C0' is not a split: joint, or Bb-Ck (b 0 or at least 2, k at least 2)",
        ),
        ("train: 3", "train: input should be a valid dictionary"),
        ("learner: 3", "learner: input should be a valid dictionary"),
        ("protocol: {seeds: []}", "protocol.seeds: list should have at least 1 item"),
    ],
)
def test_malformed_files_are_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_write(tmp_path, "c.yaml", text))
    assert message in str(caught.value)


def test_an_override_without_value_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'train.lr': an override looks like dotted\.key=value"):
        load_config(_write(tmp_path, "c.yaml", "name: c"), ["train.lr"])


def test_missing_file_names_the_nearest() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown configuration 'coop_tny\.yaml'\. Did you mean 'coop_tiny\.yaml'"
    ):
        config_path("coop_tny.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.root=2024-01-01", "2024-01-01"),
        ("data.root=0123", "0123"),
        ("data.root=a: b", "a: b"),
        ("data.root=${HOME}/x", "${HOME}/x"),
        ("data.root=null", None),
        ("data.root=[a]", "[a]"),
    ],
)
def test_paths_on_the_command_line_are_taken_as_written(
    tmp_path: Path, override: str, expected: str | None
) -> None:
    config = load_config(_write(tmp_path, "c.yaml", "learner: {name: coop}"), [override])
    assert config.data.root == expected


def test_a_name_or_a_list_of_names(tmp_path: Path) -> None:
    path = _write(tmp_path, "c.yaml", "learner: {name: coop}")
    assert load_config(path, ["data.name=folder:a: b"]).data.names == ["folder:a: b"]
    assert load_config(path, ["data.name=[digits, scenes/kind]"]).data.names == ["digits", "scenes/kind"]


def test_a_seed_of_training_is_refused_with_what_to_write(tmp_path: Path) -> None:
    path = _write(tmp_path, "c.yaml", "learner: {name: coop}")
    with pytest.raises(ConfigError, match=r"train\.seed: .*protocol\.seeds=\[7\]") as caught:
        load_config(path, ["train.seed=7"])
    assert len(caught.value.problems) == 1


def test_options_of_a_kind_of_data_set_reach_it_and_clash_with_nothing(tmp_path: Path) -> None:
    path = _write(tmp_path, "c.yaml", "data: {name: scenes/shape, options: {size: 32}}")
    assert load_config(path).data.arguments()["size"] == 32
    with pytest.raises(ConfigError, match=r"data\.options: 'seed' is no option of one kind of data set"):
        load_config(path, ["data.options.seed=2"])


@pytest.mark.parametrize("text", ["0", "true", "- a", "text", "x: \x00"])
def test_a_file_that_is_no_configuration_says_what_one_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load_config(tmp_path / "x.yaml")


def test_a_label_with_a_star_stands_for_every_learner_that_has_no_row_of_its_own(tmp_path: Path) -> None:
    rows = 'methods: {zero_shot: {}, "tip*": {alpha_max: 5}, tip_adapter_f: {alpha_max: 6}}\n'
    config = load_config(_write(tmp_path, "c.yaml", rows), ["methods.tip_adapter.beta_max=4"])
    options = {study.method: study.config.learner_options for study in config.studies()}
    assert options == {
        "zero_shot": {},
        "tip_adapter": {"alpha_max": 5, "beta_max": 4},
        "tip_adapter_f": {"alpha_max": 6},
    }

    with pytest.raises(ConfigError, match=r"unknown learner 'tap\*'"):
        load_config(_write(tmp_path, "d.yaml", 'methods: {"tap*": {}}\n'))


def test_a_method_is_trained_as_its_file_or_row_says_and_by_its_recipe_where_nobody_says(
    tmp_path: Path,
) -> None:
    _write(tmp_path, "own.yaml", "learner: {name: taskres}\ntrain: {epochs: 7}\n")
    rows = f"methods: {{own: {{cfg: {tmp_path}/own.yaml}}, coop: {{train: {{lr: 0.3}}}}, gda: {{}}}}\n"
    config = load_config(_write(tmp_path, "c.yaml", rows))
    options = {study.method: study.config.train.options() for study in config.studies()}
    assert (options["own"]["recipe"], options["own"]["epochs"], options["own"]["lr"]) == ("none", 7, 0.002)
    assert (options["coop"]["recipe"], options["coop"]["lr"]) == ("none", 0.3)
    assert options["gda"] == {"recipe": "auto"}

    for study in load_config(tmp_path / "c.yaml", ["train.epochs=3"]).studies():
        changed = study.config.train.options()
        assert (changed["recipe"], changed["epochs"]) == ("none", 3)


@pytest.mark.parametrize(
    ("name", "searched"),
    [
        # The methods' own files search there.
        ("compare_base_to_new_tiny.yaml", {"dept", "mma", "mmrl", "two_stage"}),
        ("compare_heads_tiny.yaml", set()),
        ("compare_masks_tiny.yaml", set()),
    ],
)
def test_no_rate_that_a_file_states_is_searched_in_a_comparison(name: str, searched: set[str]) -> None:
    studies = load_config(name).studies()
    assert {s.method for s in studies if s.config.train.options()["recipe"] != "none"} == searched
