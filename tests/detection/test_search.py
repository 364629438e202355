from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlprompt.core.errors import BackboneError, ConfigError, DataError
from vlprompt.detection.base import Detections
from vlprompt.detection.data import DetectionData
from vlprompt.detection.evaluate import average_precision, best_boxes, features
from vlprompt.detection.search import class_vectors, search_concepts
from vlprompt.training.options import TrainOptions

TRAIN = TrainOptions(
    epochs=15, batch_size=4, optimizer="adamw", lr=0.05, weight_decay=0, schedule="constant", warmup_epochs=0
)


class Oracle:
    """Detects what it was built with."""

    def __init__(self, logits: Tensor, boxes: Tensor) -> None:
        self.detections = Detections(logits, boxes)

    def detect(self, frozen: dict[str, Tensor], concepts: Tensor) -> Detections:
        return self.detections


def test_average_precision_by_hand(data: DetectionData) -> None:
    """Two of three classes: one object found first, one found behind a false box, one never; a crowd is no mistake."""
    pytest.importorskip("pycocotools")
    boxes = torch.full((4, 3, 4), 0.01)
    logits = torch.full((4, 3, 3), -20.0)
    boxes[0, 0] = torch.tensor([15 / 60, 17.5 / 40, 20 / 60, 25 / 40])  # the dog, exactly
    logits[0, 0, 0] = 3
    boxes[3, 2] = torch.tensor([0.5, 0.25, 1.0, 0.5])  # the crowd of dogs
    logits[3, 2, 0] = 5
    boxes[2, 0] = torch.tensor([0.5, 0.5, 1.0, 1.0])  # the circle, exactly, but behind a box of nothing
    logits[2, 0, 1] = 1
    boxes[1, 1] = torch.tensor([0.5, 0.5, 0.2, 0.2])
    logits[1, 1, 1] = 2
    rows = {"x": torch.zeros(4, 1)}
    scores = average_precision(Oracle(logits, boxes), torch.zeros(3, 1, 1), data, rows)  # type: ignore[arg-type]
    assert scores["AP/dog"] == pytest.approx(1.0, abs=1e-6)
    assert scores["AP/red circle"] == pytest.approx(0.5, abs=1e-6)
    assert scores["AP/cat"] == pytest.approx(0.0, abs=1e-6)
    assert scores["AP"] == scores["AP50"] == pytest.approx(0.5, abs=1e-6)


def test_boxes_are_ranked_over_classes_and_in_pixels() -> None:
    detections = Detections(
        torch.tensor([[[1.0, 3.0], [2.0, -1.0]]]), torch.tensor([[[0.5, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.2]]])
    )
    (best,) = best_boxes(detections, [(40, 20)])
    assert best["labels"].tolist() == [1, 0, 0, 1]
    assert best["boxes"][:2].tolist() == [[0, 0, 40, 20], [10, 8, 30, 12]]
    torch.testing.assert_close(best["scores"], torch.tensor([3.0, 2.0, 1.0, -1.0]).sigmoid())


@pytest.mark.parametrize(
    ("name", "init"),
    [("owl-tiny", "text"), ("owlvit", "visual"), ("owlv2", "normal"), ("grounding-dino", "normal")],
)
def test_a_search_lowers_the_hosts_loss(
    name: str, init: Any, detectors: dict[str, Any], data: DetectionData
) -> None:
    detector = detectors[name]
    before = {n: p.clone() for n, p in detector.named_parameters()}
    options = TRAIN.model_copy(update={"epochs": 4 if name == "grounding-dino" else 15})
    result = search_concepts(detector, data, options=options, init=init, length=2)
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[n]) for n, p in detector.named_parameters())
    again = search_concepts(detector, data, options=options, init=init, length=2)
    assert torch.equal(again.module.concepts(), result.module.concepts())


def test_a_search_starts_where_it_says(detectors: dict[str, Any], data: DetectionData) -> None:
    detector = detectors["owl-tiny"]
    none = TRAIN.model_copy(update={"epochs": 1, "lr": 1e-12})
    text_start = search_concepts(detector, data, options=none).module.concepts()
    torch.testing.assert_close(text_start, class_vectors(detector, data), rtol=0, atol=1e-6)
    visual_start = search_concepts(detector, data, options=none, init="visual").module.concepts()
    torch.testing.assert_close(visual_start.norm(dim=-1), torch.ones(3, 1), rtol=0, atol=1e-5)
    rows = features(detector, data)
    row = {"features": rows["features"][2:3].float()}
    vectors = detector.embeds(row)[0]
    cosines = torch.nn.functional.cosine_similarity(vectors, visual_start[1], dim=-1)
    assert float(cosines.detach().max()) == pytest.approx(1, abs=1e-5)  # the one circle's box
    with pytest.raises(DataError, match="have no vectors in the text's space"):
        search_concepts(detectors["grounding-dino"], data, options=none, init="visual")
    with pytest.raises(BackboneError, match="no tokenizer"):
        search_concepts(detectors["grounding-dino"], data, options=none, init="text")


def test_the_second_stage_changes_what_is_named_and_puts_it_back(
    detectors: dict[str, Any], data: DetectionData
) -> None:
    detector = detectors["owl-tiny"]
    before = {n: p.clone() for n, p in detector.named_parameters()}
    patterns = ["head.embed.*", "backbone.model.visual.conv1.*"]
    tuned = search_concepts(detector, data, options=TRAIN, unfreeze=patterns[:1])
    assert tuned.module.static
    changed = {n for n, p in detector.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"head.embed.weight", "head.embed.bias"}
    tuned.module.unfrozen.restore()
    assert all(torch.equal(p, before[n]) for n, p in detector.named_parameters())
    with pytest.raises(ConfigError, match=r"'head\.embd\.\*' matches no parameter; near it"):
        search_concepts(detector, data, options=TRAIN, unfreeze=["head.embd.*"])
