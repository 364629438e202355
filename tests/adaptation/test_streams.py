"""Streams of several data sets, and of known images among others: what is drawn, learned, forgotten and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adaptation.test_experiment import experiment, run
from vlprompt import create_adapter, create_backbone, load_dataset
from vlprompt.adaptation import Adapter
from vlprompt.adaptation.config import AdaptationConfig
from vlprompt.adaptation.draws import draw_stream, reordered
from vlprompt.adaptation.experiment import AdaptationExperiment
from vlprompt.adaptation.measure import scores
from vlprompt.adaptation.mixing import UNKNOWN, intruders_of, mix
from vlprompt.adaptation.stream import adapt_dataset, read_predictions
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.data import ImageDataset
from vlprompt.data.corruptions import COMMON
from vlprompt.experiments.runner import run_experiment
from vlprompt.metrics.outliers import auroc, false_positives_at_95

FOG, SNOW = "scenes/size-c:fog:4", "scenes/size-c:snow:4"
TEMPORAL: dict[str, Any] = {
    "data": {"name": [FOG, SNOW], "split": "val", "test_images": 6},
    "methods": {
        "zero": {"views": 2},
        "bca": {"prior_threshold": 0.0},
        "tent": {"batch": 4, "steps": 1, "lr": 0.01},
    },
    "protocol": {"seeds": [1], "stream": {"kind": "temporal"}},
}
MIXED: dict[str, Any] = {
    "data": {
        "name": "digits",
        "split": "val",
        "classes": "base",
        "intruders": {"classes": "new"},
        "test_images": 8,
    },
    "methods": {"zero": {"views": 2}, "bca": {"prior_threshold": 0.0}},
    "protocol": {"seeds": [1], "stream": {"kind": "mixed"}},
}


def adapters(data: ImageDataset, scope: str) -> dict[str, Adapter]:
    backbone = create_backbone("tiny", "random")
    start = (backbone, data.classnames, data.templates)
    return {
        "bca": create_adapter("bca", *start, prior_threshold=0.0, seed=1),
        "tent": create_adapter("tent", *start, batch=4, steps=1, lr=0.01, reset_scope=scope),
    }


@pytest.mark.parametrize("scope", ["never", pytest.param("corruption", marks=pytest.mark.slow)])
def test_a_stream_through_several_sets_goes_on_where_the_one_before_ended(tmp_path: Path, scope: str) -> None:
    methods = {**TEMPORAL["methods"], "tent": {**TEMPORAL["methods"]["tent"], "reset_scope": scope}}
    outcome = run(tmp_path, **{**TEMPORAL, "methods": methods})
    assert outcome.exit_code == 0
    config = AdaptationConfig.read(tmp_path / "t.yaml")
    parts = {name: draw_stream(config, name, 1) for name in (FOG, SNOW)}
    own = adapters(parts[FOG], scope)
    (cell,) = (outcome.folder / "cells").iterdir()
    for number, (name, data) in enumerate(parts.items()):
        if number and scope == "corruption":
            own["tent"].reset()
        images = [image for image, _ in data]
        (folder,) = cell.glob(f"predictions/{number:02d}-*")
        for label, adapter in own.items():
            expected = torch.cat([p.probs for p in (adapter.predict(images),)])
            got = read_predictions(folder, label, data.classnames).probs
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            right = (got.argmax(1) == torch.tensor(data.labels)).double().mean()
            figure = outcome.metrics[f"{label}/{name}/accuracy"]
            assert figure == pytest.approx(float(right), abs=1e-5)

    averages = [outcome.metrics[f"bca/{name}/accuracy"] for name in parts]
    assert outcome.metrics["bca/average/accuracy"] == pytest.approx(sum(averages) / 2)
    assert outcome.headline == "bca/average/accuracy"
    assert "One stream through the data sets, in their order" in outcome.text
    assert outcome.metrics["stream"] == {"kind": "temporal"}


@pytest.mark.slow
def test_a_killed_stream_of_several_sets_goes_on_in_the_second(tmp_path: Path) -> None:
    methods = {**TEMPORAL["methods"], "tent": {**TEMPORAL["methods"]["tent"], "reset_scope": "never"}}
    asked = experiment(tmp_path, "data.batch_size=3", **{**TEMPORAL, "methods": methods})
    (cell,) = asked.cells()
    whole = asked.run(cell, tmp_path / "whole")
    asked.run(cell, tmp_path / "killed")
    # It ended before the second set: another process knows what it learned from the files of the first alone.
    folders = sorted((tmp_path / "killed" / "predictions").iterdir())
    for path in folders[1].iterdir():
        path.unlink()
    again = asked.run(cell, tmp_path / "killed")
    assert [m.value for m in again.measurements] == [m.value for m in whole.measurements]


def test_several_orders_of_a_stream_of_sets(tmp_path: Path) -> None:
    outcome = run(tmp_path, "protocol.orders=3", "methods.tent=null", "data.test_images=4", **TEMPORAL)
    spread = outcome.results.select("accuracy_over_orders", method="bca")
    assert spread.coordinates("data") == [FOG, SNOW]
    assert len(outcome.results.select("accuracy_over_orders", method="zero")) == 0

    mean = sum(spread.values()) / 2
    assert outcome.metrics["bca/average/accuracy_over_orders"] == pytest.approx(mean)
    before = outcome.metrics["bca/average/before_accuracy"]
    assert outcome.metrics["bca/average/accuracy_over_orders_gain"] == pytest.approx(mean - before)
    assert "Mean accuracy over 3 orders of the stream" in outcome.text
    assert "Mean accuracy in the worst tenth of 3 orders" in outcome.text

    (records,) = (outcome.folder / "cells").glob("*/records.json")
    rows = [row for row in json.loads(records.read_text()) if row["method"] == "bca"]
    assert [(row["data"], row["stream"]["order"]) for row in rows] == [
        (name, order) for order in range(3) for name in (FOG, SNOW)
    ]
    assert len({row["stream"]["images"] for row in rows}) == 6


def test_corruptions_are_put_into_the_same_images_in_orders_of_their_own(tmp_path: Path) -> None:
    config = experiment(tmp_path, **TEMPORAL).config
    fog, snow, clean = (draw_stream(config, name, 1) for name in (FOG, SNOW, "scenes/size"))
    sources = [[str(sample.source) for sample in data.samples] for data in (fog, snow, clean)]
    assert sorted(sources[0]) == sorted(sources[1]) == sorted(sources[2])
    assert sources[0] != sources[1]


def test_the_fifteen_corruptions_by_one_name(tmp_path: Path) -> None:
    config = experiment(tmp_path, "data.name=digits-c:common:5").config
    assert config.data.names == [f"digits-c:{kind}:5" for kind in COMMON]
    cells = AdaptationExperiment(config).cells()
    assert len(cells) == 15 * 2
    assert len({cell.name for cell in cells}) == 30


def test_known_images_are_measured_and_others_told_apart(tmp_path: Path) -> None:
    outcome = run(tmp_path, **MIXED)
    assert outcome.exit_code == 0, outcome.failures
    config = AdaptationConfig.read(tmp_path / "t.yaml")
    data = draw_stream(config, "digits", 1)
    strange = intruders_of(data)
    assert (int(strange.sum()), len(data)) == (8, 16)
    assert [label == UNKNOWN for label in data.labels] == strange.tolist()

    (cell,) = (outcome.folder / "cells").iterdir()
    got = read_predictions(cell / "predictions", "bca", data.classnames)
    values = {name: float(v) for name, v in scores(got, data).items()}
    key = "bca/digits/{}"
    for score in ("msp", "mcm", "energy"):
        parts = (got.scores[score][~strange], got.scores[score][strange])
        assert outcome.metrics[key.format(f"ood_auroc_{score}")] == pytest.approx(auroc(*parts), abs=1e-5)
        fpr = outcome.metrics[key.format(f"ood_fpr95_{score}")]
        assert fpr == pytest.approx(false_positives_at_95(*parts), abs=1e-5)
    right = got.classes[~strange] == torch.tensor(data.labels)[~strange]
    assert outcome.metrics[key.format("accuracy")] == pytest.approx(float(right.float().mean()), abs=1e-5)
    assert {"before_ood_oscr_msp", "ood_aupr_mcm", "before_ood_auroc_variance"} <= values.keys()
    assert "intruders_accuracy" not in values

    # What takes images alone does not care who else comes.
    assert outcome.metrics["zero/digits/accuracy_alone"] == outcome.metrics["zero/digits/accuracy"]
    known = data.subset((~strange).nonzero()[:, 0].tolist())
    alone = adapters(data, "never")["bca"].predict([image for image, _ in known])
    figure = outcome.metrics[key.format("accuracy_alone")]
    assert figure == pytest.approx(scores(alone, known)["accuracy"], abs=1e-5)
    for title in ("AUROC of the highest probability", "where no others come among them"):
        assert title in outcome.text
    assert "Most confident mistakes" in (outcome.folder / "report.html").read_text()


def test_intruders_of_the_same_classes_keep_their_labels() -> None:
    clean = load_dataset("digits", "val", shots=1)
    noisy = load_dataset("digits-c:gaussian_noise:5", "val", shots=1)
    both = mix(clean, noisy)
    assert both.labels == [*clean.labels, *noisy.labels]
    assert both[10][0].size == noisy[0][0].size != both[0][0].size
    assert both.key(10) == noisy.key(0)
    adapter = create_adapter("zero", create_backbone("tiny", "random"), clean.classnames, views=1)
    values = scores(adapt_dataset({"a": adapter}, both)["a"], both)
    assert 0 <= values["intruders_accuracy"] <= 1
    assert values["before_intruders_accuracy"] == values["intruders_accuracy"]
    with pytest.raises(DataError, match=r"some classes in common.*zero"):
        mix(load_dataset("digits", "val", classes="base"), clean)


def test_a_share_of_the_stream_is_intruders(tmp_path: Path) -> None:
    config = experiment(tmp_path, "protocol.stream.share=0.2", "data.test_images=40", **MIXED).config
    data = draw_stream(config, "digits", 1)
    strange = intruders_of(data)
    assert (int(strange.sum()), int((~strange).sum())) == (10, 40)
    assert strange.tolist() != sorted(strange.tolist())
    other = reordered(data, config.protocol.stream, 1, 1)
    assert sorted(other.labels) == sorted(data.labels)
    assert other.labels != data.labels


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"protocol": {"stream": {"kind": "mixed"}}}, "data.intruders: a mixed stream needs images"),
        (
            {"protocol": {"stream": {"kind": "temporal"}}, "data": {"name": "digits"}},
            "several data sets one after",
        ),
        ({"data": {"name": "digits", "intruders": {"name": "dtd"}}}, "this stream is iid"),
        (
            {"data": {"name": "digits", "intruders": {}}, "protocol": {"stream": {"kind": "mixed"}}},
            "data.classes and data.intruders.classes are base and new",
        ),
        ({"data": {"name": "digits-c:fgo:5"}}, "unknown corruption 'fgo'"),
        (
            {"data": {"name": "digits", "intruders": {"name": "dtdd"}}},
            "data.intruders.name: unknown data set 'dtdd'",
        ),
    ],
)
def test_streams_that_lack_something_say_what(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        experiment(tmp_path, **sections)


def test_sets_of_different_classes_are_no_stream(tmp_path: Path) -> None:
    asked = experiment(tmp_path, **{**TEMPORAL, "data": {"name": ["digits", FOG], "test_images": 2}})
    with pytest.raises(DataError, match="digits and scenes/size-c:fog:4 have different classes"):
        asked.run(asked.cells()[0], tmp_path)


def test_the_shipped_methods_on_features_run_in_several_orders(tmp_path: Path) -> None:
    overrides = [
        f"output={tmp_path}",
        "data.test_images=3",
        "protocol.seeds=[1]",
        "protocol.orders=2",
        "backbone.pretrained=random",
        *(f"methods.{name}.views=2" for name in ("zero", "tps", "bca", "dmn", "dpe")),
    ]
    asked = AdaptationExperiment(AdaptationConfig.read("tta_online_tiny.yaml", overrides))
    result = asked.run(asked.cells()[0], tmp_path)
    measured = {(m.where["method"], m.metric) for m in result.measurements}
    for name in asked.config.methods:
        assert (name, "accuracy") in measured
        # What takes images alone has no order.
        assert ((name, "accuracy_over_orders") in measured) == (name not in ("zero", "tps"))


@pytest.mark.parametrize(
    "name", [pytest.param("tta_corruptions_tiny.yaml", marks=pytest.mark.slow), "tta_continual_tiny.yaml"]
)
def test_the_shipped_corruptions_run(name: str, tmp_path: Path) -> None:
    overrides = [
        f"output={tmp_path}", "data.test_images=2", "protocol.seeds=[1]", "backbone.pretrained=random",
        "methods.tent.batch=2", "methods.cliptta=null", "methods.bca=null", "methods.tda=null", "methods.stata=null",
        "methods.transclip=null",
    ]  # fmt: skip
    outcome = run_experiment(AdaptationExperiment(AdaptationConfig.read(name, overrides)))
    assert outcome.exit_code == 0, outcome.failures
    columns = [f"digits-c:{kind}:5" for kind in COMMON]
    figures = [outcome.metrics[f"tent/{column}/accuracy"] for column in columns]
    assert outcome.metrics["tent/average/accuracy"] == pytest.approx(sum(figures) / 15, abs=1e-6)
    assert "average" in outcome.text
