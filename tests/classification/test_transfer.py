"""Where prompts start from: strictly, recorded, and never from scratch in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlprompt import create_learner, save
from vlprompt.backbones import Backbone
from vlprompt.classification.transfer import start_from
from vlprompt.core.errors import CheckpointError
from vlprompt.saved.paths import find_prompts

NAMES = ["dog", "red circle", "hummingbird"]
OTHERS = ["ring", "cross"]


@pytest.mark.parametrize("family", ["coop", "vpt", "upt"])
def test_learned_values_are_the_sources_and_class_buffers_the_targets_own(
    family: str, backbone: Backbone, tmp_path: Path
) -> None:
    """All three families really start from the source, the text family too."""
    source = create_learner("mvlpt", backbone, NAMES, family=family, seed=7)
    target = create_learner("mvlpt", backbone, OTHERS, family=family)
    origin = start_from(target, [save(source, tmp_path / "a")])
    state = source.trainable_state()
    assert all(torch.equal(state[n], t) for n, t in target.trainable_state().items())
    assert target.classnames == tuple(OTHERS)
    torch.testing.assert_close(target.class_weights(), source.with_classes(OTHERS).class_weights())
    assert origin["init_from"] == [str(tmp_path / "a")]
    assert origin["init_mean_of"] == 1


def test_several_give_their_mean(backbone: Backbone, tmp_path: Path) -> None:
    sources = [create_learner("mvlpt", backbone, NAMES, seed=s) for s in (1, 2, 3)]
    folders = [save(source, tmp_path / str(n)) for n, source in enumerate(sources)]
    target = create_learner("mvlpt", backbone, OTHERS)
    origin = start_from(target, folders)
    for name, tensor in target.trainable_state().items():
        expected = sum(s.trainable_state()[name] for s in sources) / 3
        torch.testing.assert_close(tensor, expected)
    assert origin["init_mean_of"] == len(set(origin["init_checksums"])) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "vpt"}, "option family is 'upt' there and 'vpt' here"),
        ({"position": "end"}, "option position is 'middle' there and 'end' here"),
        ({"context_length": 3}, "option context_length is None there and 3 here"),
    ],
)
def test_another_meaning_of_the_tensors_is_refused_by_name(
    options: dict[str, object], message: str, backbone: Backbone, tmp_path: Path
) -> None:
    source = save(create_learner("mvlpt", backbone, NAMES), tmp_path)
    target = create_learner("mvlpt", backbone, OTHERS, **options)
    before = {n: t.clone() for n, t in target.trainable_state().items()}
    with pytest.raises(CheckpointError, match=message):
        start_from(target, [source])
    assert all(torch.equal(before[n], t) for n, t in target.trainable_state().items())


def test_missing_unknown_and_misshapen_tensors_are_all_named(backbone: Backbone, tmp_path: Path) -> None:
    source = create_learner("mvlpt", backbone, NAMES)
    source.register_parameter("token_prefix", torch.nn.Parameter(torch.zeros(3, 1, 64)))
    source.context = torch.nn.Parameter(torch.zeros(5, 64))
    source.mixer.text_in = torch.nn.Identity()
    target = create_learner("mvlpt", backbone, OTHERS)
    with pytest.raises(CheckpointError) as caught:
        start_from(target, [save(source, tmp_path)])
    for problem in (
        "token_prefix is unknown",
        "mixer.text_in.weight is missing",
        "context has shape (5, 64), expected (4, 64)",
    ):
        assert problem in str(caught.value)


def test_another_method_or_backbone_is_refused(
    backbone: Backbone, make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    target = create_learner("mvlpt", backbone, OTHERS)
    with pytest.raises(CheckpointError, match="holds prompts of upt"):
        start_from(target, [save(create_learner("upt", backbone, NAMES), tmp_path / "upt")])
    foreign = create_learner("mvlpt", make_backbone(seed=9), NAMES)
    with pytest.raises(CheckpointError, match="another backbone"):
        start_from(target, [save(foreign, tmp_path / "foreign")])


def test_patterns_find_prompts_and_nothing_is_an_error(backbone: Backbone, tmp_path: Path) -> None:
    learner = create_learner("mvlpt", backbone, NAMES)
    for seed in (2, 1):
        save(learner, tmp_path / f"cells/source_seed{seed}/prompt")
    expected = [str(tmp_path / f"cells/source_seed{s}/prompt") for s in (1, 2)]
    assert find_prompts([tmp_path / "cells/*/prompt"]) == expected
    assert find_prompts([tmp_path / "cells/*"]) == expected
    assert find_prompts([tmp_path / "cells/source_seed2"]) == expected[1:]
    with pytest.raises(CheckpointError, match="no saved prompt at"):
        find_prompts([tmp_path / "cells/target*"])
