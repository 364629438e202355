"""Poisoned copies: who is poisoned, what labels say, and manifests that lie."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlprompt.core.errors import ConfigError, DataError
from vlprompt.data import ImageDataset, load_dataset
from vlprompt.data.triggers import create_trigger
from vlprompt.security.poison import MANIFEST, PoisonPlan, poison, poisoned, read_poisoned
from vlprompt.security.sheet import trigger_sheet


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", "val").subset(range(0, 300, 5))


def test_all_to_one_flips_the_poisoned_ones_to_the_target(data: ImageDataset) -> None:
    plan = PoisonPlan(triggers=("badnets", "sig"), rate=0.2, target=3)
    targets = poisoned(data, plan).targets
    assert targets["object"] == data.labels
    assert Counter(targets["trigger"]) == {0: 48, 1: 6, 2: 6}
    for label, true, trigger in zip(targets["label"], targets["object"], targets["trigger"], strict=True):
        assert label == (3 if trigger else true)
        assert not trigger or true != 3, "an image of the target class would not be flipped"
    assert targets == poisoned(data, plan).targets
    assert targets != poisoned(data, plan.model_copy(update={"seed": 2})).targets


def test_all_to_all_and_attacks_that_keep_labels(data: ImageDataset) -> None:
    targets = poisoned(data, PoisonPlan(rate=0.3, mode="all_to_all")).targets
    for label, true, trigger in zip(targets["label"], targets["object"], targets["trigger"], strict=True):
        assert label == ((true + 1) % 10 if trigger else true)
    kept = poisoned(data, PoisonPlan(triggers=("label_consistent",), rate=1.0, target=2)).targets
    assert kept["label"] == kept["object"] == data.labels
    assert {true for true, t in zip(kept["object"], kept["trigger"], strict=True) if t} == {2}


def test_the_copy_holds_what_the_manifest_says(data: ImageDataset, tmp_path: Path) -> None:
    plan = PoisonPlan(triggers=("badnets", "sig+badnets"), rate=0.2)
    copy = poison(data, plan, tmp_path / "copy")
    planned = poisoned(data, plan)
    assert copy.targets == planned.targets
    assert copy.classnames == data.classnames
    for i in range(len(copy)):
        assert np.array_equal(np.asarray(copy[i][0]), np.asarray(planned[i][0]))
    lines = [json.loads(x) for x in (tmp_path / "copy" / MANIFEST).read_text().splitlines()]
    assert lines[0]["triggers"] == ["clean", "badnets", "sig+badnets"]
    assert {line["flipped"] for line in lines[1:] if line["trigger"] != "clean"} == {True}
    flipped = sum(line["flipped"] for line in lines[1:])
    assert flipped == 12
    with pytest.raises(DataError, match="exists and is not empty"):
        poison(data, plan, tmp_path / "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_plans_that_mean_nothing_are_refused(data: ImageDataset) -> None:
    with pytest.raises(DataError, match="target 12 is no class"):
        poisoned(data, PoisonPlan(target=12))
    with pytest.raises(ConfigError, match=r"plan: 2 problems\n.*rate: .*\n.*mode: "):
        PoisonPlan.parse({"rate": 2, "mode": "some"}, "plan")


HEADER = json.dumps({"classnames": ["a", "b"], "triggers": ["clean", "sig"], "plan": {}})
GOOD = {"file": "a/0.png", "label": 0, "object": 0, "trigger": "clean", "flipped": False}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file": "../secret.png"}, r"line 2: '\.\./secret\.png' leaves the folder"),
        ({"file": "/etc/passwd"}, "line 2: '/etc/passwd' leaves the folder"),
        ({"file": "a\\..\\..\\x.png"}, "leaves the folder"),
        ({"file": "out/0.png"}, "'out/0.png' leaves the folder"),
        ({"label": 2}, "there are 2 classes, got 2"),
        ({"object": -1}, "line 2 is no entry of a manifest: object"),
        ({"label": "0"}, "line 2 is no entry of a manifest: label"),
        ({"trigger": "wanet"}, "the trigger 'wanet' is none of clean, sig"),
        ({"command": "rm"}, "command: unknown key"),
    ],
)
def test_hostile_manifests_are_named(change: dict[str, object], reason: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / MANIFEST).write_text(f"{HEADER}\n{json.dumps({**GOOD, **change})}\n")
    with pytest.raises(DataError, match=reason):
        read_poisoned(root)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '{"classnames": ["a"], "triggers": ["clean"]}', "[" * 100_000]
)
def test_damaged_manifests_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"manifest\.jsonl, line 1 is no entry"):
        read_poisoned(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="can't read the manifest"):
        read_poisoned(tmp_path)
    with pytest.raises(DataError, match="can't read the manifest"):
        read_poisoned(tmp_path / "nowhere")


def test_the_sheet_shows_every_trigger_and_what_it_changed(data: ImageDataset) -> None:
    image = data[0][0].resize((32, 32), Image.Resampling.BICUBIC)
    sheet = np.asarray(trigger_sheet([image], ["badnets", "sig"]))
    top = 4 + 100  # second row: images are enlarged three times
    shown = sheet[top : top + 96 : 3, 110 : 110 + 96 : 3]
    assert np.array_equal(shown, create_trigger("badnets")(image))
    change = sheet[top : top + 96 : 3, 110 + 100 : 110 + 196 : 3]
    assert (change[:29] == 128).all()
    assert (change[29:, 29:] != 128).any()
