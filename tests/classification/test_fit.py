"""Arguments of ``vlprompt.fit`` that are no training options, and what is no data set."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

import vlprompt
from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError, DataError

PAIRS = [(Image.new("RGB", (8, 8), colour), label) for label, colour in enumerate(("red", "blue"))]


@pytest.mark.parametrize(
    ("argument", "value"),
    [("recipe", "papre"), ("several_labels", "both"), ("views", -1), ("prefix_gib", -1)],
)
def test_an_argument_without_a_meaning_is_refused(backbone: Backbone, argument: str, value: Any) -> None:
    learner = vlprompt.create_learner("zero_shot", backbone, ["red", "blue"])
    with pytest.raises(ConfigError, match=argument):
        vlprompt.fit(learner, PAIRS, epochs=1, **{argument: value})


def test_a_name_or_a_set_of_splits_is_no_data_set(backbone: Backbone) -> None:
    learner = vlprompt.create_learner("zero_shot", backbone, ["red", "blue"])
    with pytest.raises(DataError, match=r"vlprompt\.load_dataset"):
        vlprompt.evaluate(learner, "folder:photos")
    with pytest.raises(DataError, match=r"'train', 'test'.*data\['train'\]"):
        vlprompt.fit(learner, {"train": PAIRS, "test": PAIRS})


def test_a_segmentation_model_is_no_learner(backbone: Backbone) -> None:
    segmenter = vlprompt.create_segmenter("dense", backbone, strategy="decoder")
    for function in (vlprompt.fit, vlprompt.evaluate):
        with pytest.raises(DataError, match=r"got .*vlprompt\.fit_segmenter"):
            function(segmenter, PAIRS)  # type: ignore[arg-type]
