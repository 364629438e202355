from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import default_root, list_datasets, load_dataset


def test_names_are_sorted_and_complete() -> None:
    names = list_datasets()
    assert names == sorted(set(names))
    assert {"digits", "dtd", "eurosat", "oxford_pets", "scenes/shape"} <= set(names)


def test_digits() -> None:
    splits = {s: load_dataset("digits", s) for s in ("train", "val", "test")}
    assert {s: len(d) for s, d in splits.items()} == {"train": 898, "val": 359, "test": 540}
    everything = [s.source for d in splits.values() for s in d.samples]
    assert sorted(everything) == list(range(1797))
    train = splits["train"]
    assert train.classnames[7] == "seven"
    assert min(np.bincount(train.labels)) >= 87
    image, label = train[0]
    assert (image.mode, image.size) == ("RGB", (64, 64))
    pixels = np.asarray(image)
    assert pixels[0, 0, 0] > 200  # paper at the corner, ink somewhere
    assert pixels.min() < 60
    chalk = load_dataset("digits", look="light_on_dark", size=32)
    assert chalk[0][0].size == (32, 32)
    assert np.asarray(chalk[0][0])[0, 0, 0] < 60
    assert label == chalk[0][1]


def test_digits_are_the_same_in_another_process() -> None:
    code = (
        "from vlprompt.data import load_dataset; d = load_dataset('digits', 'val', shots=2, seed=3);"
        "print([s.source for s in d.samples], d.key(0))"
    )
    env = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    here = load_dataset("digits", "val", shots=2, seed=3)
    assert run.stdout == f"{[s.source for s in here.samples]} {here.key(0)}\n"


def test_keys_tell_images_and_looks_apart() -> None:
    data, small = load_dataset("digits"), load_dataset("digits", size=32)
    assert len({data.key(i) for i in range(50)}) == 50
    assert data.key(0) != small.key(0)


def test_scenes_by_name_style_and_option() -> None:
    plain = load_dataset("scenes/shape", "test", shots=1)
    sketch = load_dataset("scenes/shape@sketch", "test", shots=1)
    same = load_dataset("scenes/shape", "test", shots=1, style="sketch")
    assert plain.classnames == sketch.classnames
    assert plain[0][0].size == (64, 64)
    assert sketch.key(0) == same.key(0) != plain.key(0)
    assert load_dataset("scenes/shape", size=48)[0][0].size == (48, 48)
    with pytest.raises(DataError, match="the name says style 'sketch', the option says 'night'"):
        load_dataset("scenes/shape@sketch", style="night")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("eurosta", "eurosat"),
        ("digit", "digits"),
        ("scenes/shpe", "scenes/shape"),
        ("scenes/shape@skech", "sketch"),
        ("Oxford_Pets", "oxford_pets"),
    ],
)
def test_unknown_names_say_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=f"Did you mean .*{nearest!r}"):
        load_dataset(name)


@pytest.mark.parametrize("name", ["fodler:x", "scenes", "scenes:shape", "digits:1", "torchvision:DTD"])
def test_grammar_is_refused_with_a_hint(name: str) -> None:
    with pytest.raises(UnknownNameError, match="folder:PATH"):
        load_dataset(name)


@pytest.mark.parametrize("name", ["", None, 3])
def test_no_name(name: object) -> None:
    with pytest.raises(DataError, match="named by a string"):
        load_dataset(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "unknown split of digits 'tset'. Did you mean 'test'"),
        ({"classes": "novel"}, "unknown classes 'novel'"),
        ({"sampling": "coop"}, "unknown sampling 'coop'"),
        ({"on_bad_image": "ignore"}, "unknown on_bad_image 'ignore'"),
        ({"look": "dark"}, "unknown look of digits 'dark'"),
    ],
)
def test_unknown_choices(options: dict[str, str], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        load_dataset("digits", **options)  # type: ignore[arg-type]


def test_unknown_options_all_at_once() -> None:
    with pytest.raises(
        DataError, match=r"'sise'. Did you mean 'size'\? .*'shot'. Did you mean 'shots'\?.*: size, look"
    ):
        load_dataset("digits", sise=64, shot=4)
    with pytest.raises(DataError, match="size must be 8 to 512"):
        load_dataset("digits", size=4)
    with pytest.raises(DataError, match="max_bad_share"):
        load_dataset("digits", max_bad_share=5)


def test_splits_have_their_usual_spellings() -> None:
    assert load_dataset("digits", "validation").split == "val"


def test_shots_above_what_exists() -> None:
    with pytest.raises(DataError, match="100 shots asked for, but 'zero' has 89"):
        load_dataset("digits", shots=100, strict_shots=True)
    with pytest.warns(UserWarning, match="All of these are taken"):
        assert len(load_dataset("digits", shots=100)) == 898


def test_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLPROMPT_DATA", str(tmp_path))
    assert default_root() == tmp_path
    with pytest.raises(DataError, match=f"not in {tmp_path}: looked for"):
        load_dataset("eurosat")
    monkeypatch.delenv("VLPROMPT_DATA")
    assert default_root() == Path.home() / ".cache" / "vlprompt" / "data"


def test_whole_numbers_of_numpy_draw_the_same() -> None:
    plain = load_dataset("scenes/shape", shots=2, seed=3)
    assert load_dataset("scenes/shape", shots=np.int64(2), seed=np.uint8(3)).samples == plain.samples
    with pytest.raises(DataError, match="shots must be a whole number"):
        load_dataset("scenes/shape", shots=True)
