"""One vocabulary: every key is described, means the same in every task, and stands in the documents."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from vlprompt.experiments.check import unknown_figures
from vlprompt.experiments.config import configs_dir, list_configs
from vlprompt.experiments.tasks import list_tasks, read_experiment

ROOT = Path(__file__).parent.parent
SYNONYMS = {  # the word of one task for what all call otherwise
    "names": "name", "datasets": "name", "adapters": "methods", "strategies": "methods", "detectors": "methods",
    "runs": "methods", "pictures": "images", "subset": "test_images", "judge": "scorer", "pairs_of": "compositions",
    "seed": "protocol.seeds",
}  # fmt: skip


# Seeds of something else than the protocol's repetitions, the data sets of a second stage, what names clusters.
OTHER_MEANINGS = ("diffusion.seed", "search.seed", "source.seed", "target.names", "meta.clusters.names")


def _keys_module():
    spec = importlib.util.spec_from_file_location("keys", ROOT / "docs" / "keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KEYS = _keys_module()
MODELS = [(task, model) for task, models in KEYS.configurations().items() for model in models]


def test_the_page_of_keys_is_up_to_date() -> None:
    assert KEYS.PAGE.read_text(encoding="utf-8") == KEYS.page(), "python docs/keys.py"


@pytest.mark.parametrize(("task", "model"), MODELS, ids=lambda value: getattr(value, "__name__", value))
def test_no_task_has_a_word_of_its_own_for_what_all_have(task: str, model: type) -> None:
    for key, _ in KEYS.keys(model):
        last = key.rpartition(".")[2]
        assert last not in SYNONYMS or key in OTHER_MEANINGS, key
    top = set(model.model_fields)
    assert {"task", "name", "output", "data", "protocol"} <= top
    assert "seeds" not in top


def test_shipped_files_lie_with_their_task_and_have_names_of_their_own() -> None:
    files = sorted(configs_dir().rglob("*.yaml"))
    assert [path for path in files if path.parent.parent != configs_dir()] == []
    assert len({path.name for path in files}) == len(files)
    assert {path.parent.name for path in files} == {*list_tasks(), "pretraining"}


@pytest.mark.parametrize(
    "name", [n for n, path in list_configs().items() if path.parent.name != "pretraining"]
)
def test_every_shipped_file_is_valid_opens_with_its_command_and_expects_figures_that_its_runs_have(
    name: str,
) -> None:
    path = list_configs()[name]
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#")
    assert f"vlprompt run {name}" in text.partition("\ntask:")[0]
    experiment = read_experiment(name)
    assert experiment.config.task == path.parent.name
    assert experiment.config.name == path.stem
    assert experiment.config.expect
    assert experiment.cells()
    assert experiment.layout().headline in experiment.figures()
    assert unknown_figures(name) == []
