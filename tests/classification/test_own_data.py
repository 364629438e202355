"""Runs on a user's own images: what is checked before training, what is saved before scoring, what is said."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

import vlprompt
from tests.commands import Command
from tests.data.folders import fill, tree
from vlprompt.classification.config import load_config
from vlprompt.core.errors import ConfigError

FAST = ("data.sampling=private", "protocol.shots=[2]", "protocol.seeds=[1]", "train.epochs=1")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    tree(
        tmp_path / "photos", *(f"{s}/{c}" for s in ("train", "test") for c in ("cat", "dog", "owl")), count=5
    )
    return tmp_path / "photos"


def run(command: Command, photos: Path, *words: str) -> tuple[int, str, Path]:
    answer = command("run", "coop_tiny.yaml", f"data.name=folder:{photos}", *FAST, *words)
    cells = sorted(Path("runs").glob("*/*/cells/*"))
    return answer.status, answer.out + answer.err, cells[0] if cells else Path("none")


def samples_of(text: str) -> int:
    return int(text.partition(" samples of 3 classes")[0].rpartition(" ")[2])


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vlprompt")


def test_damaged_test_data_are_found_before_training(command: Command, photos: Path) -> None:
    for name in ("cat", "dog", "owl"):
        for number in range(3):
            (photos / "test" / name / f"{number:03d}.png").write_bytes(b"damaged")
    status, text, cell = run(command, photos)
    assert status != 0
    assert "9 of 15 images can't be read" in text
    assert "max_bad_share" in text
    assert not (cell / "history.jsonl").exists()
    status, _, cell = run(command, photos, "data.max_bad_share=0.7", "data.on_bad_image=skip")
    assert status == 0


def test_missing_test_data_are_found_before_training(command: Command, photos: Path) -> None:
    (photos / "test").rename(photos.parent / "elsewhere")
    status, text, cell = run(command, photos)
    assert status != 0
    assert "there is no folder for the split 'test'" in text
    assert not (cell / "history.jsonl").exists()


def test_other_classes_are_found_before_training(command: Command, photos: Path) -> None:
    """Contexts that belong to classes can't be scored on others."""
    tree(photos.parent / "other", "test/elk", "test/emu")
    words = ("learner.class_specific=true", f"data.also_test.other=folder:{photos.parent / 'other'}")
    status, text, cell = run(command, photos, *words)
    assert status != 0
    assert "its 2 classes are not the 3 of the training data" in text
    assert "does not know elk, emu" not in text
    assert not (cell / "history.jsonl").exists()


def test_targets_of_other_classes_are_found_before_training(command: Command, photos: Path) -> None:
    tree(photos.parent / "other", "test/elk", "test/emu")
    other = f"protocol.targets=[folder:{photos.parent / 'other'}]"
    words = ("learner.class_specific=true", "protocol.name=cross-dataset", other)
    status, text, cell = run(command, photos, *words)
    assert status != 0
    assert "its 2 classes are not the 3 of the training data" in text
    assert not list(cell.parent.glob("*/history.jsonl"))


def test_what_was_learned_survives_a_failing_score(command: Command, photos: Path) -> None:
    """The test images vanish while it trains."""
    handler = _Vanishing(photos / "test")
    logging.getLogger("vlprompt.run").addHandler(handler)
    try:
        status, _, cell = run(command, photos)
    finally:
        logging.getLogger("vlprompt.run").removeHandler(handler)
    assert status != 0
    card = json.loads((cell / "prompt" / "prompt.json").read_text())
    assert (card["classnames"], card["metrics"]) == (["cat", "dog", "owl"], {})
    assert vlprompt.load(cell).classnames == ("cat", "dog", "owl")


class _Vanishing(logging.Handler):
    """Takes a folder away when training begins."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.INFO)
        self.folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        if "samples of" in record.getMessage():
            shutil.rmtree(self.folder, ignore_errors=True)


def test_validation_is_cut_only_where_something_validates(
    command: Command, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = ("protocol.shots=[5]",)
    assert run(command, photos, *few)[0] == 0
    assert "3 of its 15 training images are kept for it; data.validate_on=none trains on all" in caplog.text
    assert samples_of(caplog.text) == 12
    caplog.clear()
    assert run(command, photos, *few, "data.validate_on=none")[0] == 0
    assert "are kept for it" not in caplog.text
    assert samples_of(caplog.text) == 15


def test_one_image_a_class_trains_without_validation(command: Command, tmp_path: Path) -> None:
    tree(
        tmp_path / "photos", *(f"{s}/{c}" for s in ("train", "test") for c in ("cat", "dog", "owl")), count=1
    )
    assert run(command, tmp_path / "photos", "protocol.shots=[1]", "data.validate_on=none")[0] == 0


def test_a_bound_learner_is_scored_on_the_same_classes_in_capitals(command: Command, photos: Path) -> None:
    for name in ("OWL", "Cat", "dog"):
        fill(photos.parent / "other" / "test" / name, 3)
    words = ("learner.class_specific=true", f"data.also_test.other=folder:{photos.parent / 'other'}")
    status, text, _ = run(command, photos, *words)
    assert status == 0, text


@pytest.mark.parametrize(
    "folder", ["my #1 photos", "a: b", "${home}", " blanks ", "a=b", "[x]", "{y}", "50%"]
)
def test_paths_are_taken_as_written(folder: str) -> None:
    path = f"folder:/data/{folder}"
    assert load_config("coop_tiny.yaml", [f"data.name={path}"]).data.name == path
    assert load_config("coop_tiny.yaml", [f"data.also_test.other={path}"]).data.also_test == {"other": path}
    assert load_config("coop_tiny.yaml", [f"data.root=/data/{folder}"]).data.root == f"/data/{folder}"
    quoted = load_config("coop_tiny.yaml", [f'data.name=["{path}", digits]'])
    assert quoted.data.name == [path, "digits"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.name=[folder:/a #1,folder:/b]", "' #' begins a comment"),
        ("data.options.layout=a #1", "' #' begins a comment"),
        ("data.options.layout=a: b", "': ' as a mapping"),
        ("data.classnames=[yes, no]", "True, a truth value"),
        ("data.classnames=[1, 2]", "1, a number"),
        ("data.classnames=cat", "class names are a list"),
        ("data.classnames={cat: off}", "False, a truth value"),
        ("data.name=[]", "at least one data set"),
        ("name=..", "is no name of a folder"),
        ("protocol.seeds=[1,1]", "1 is named twice"),
        ("data.max_bad_images=-1", "greater than or equal to 0"),
        ("train.lr=.inf", "finite number"),
        ("train.warmup_epochs=.nan", "finite number"),
    ],
)
def test_what_yaml_reads_as_something_else_is_said(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("coop_tiny.yaml", [override])
