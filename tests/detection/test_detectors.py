from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detection.conftest import build
from vlprompt.core.errors import BackboneError, CheckpointError, ConfigError, DataError, UnknownNameError
from vlprompt.detection import DETECTORS, create_detector, list_detectors
from vlprompt.detection.data import DetectionData

ALL = ("owl-tiny", "owlvit", "owlv2", "grounding-dino")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_names() -> None:
    assert list_detectors() == sorted(ALL)
    with pytest.raises(UnknownNameError, match="owlvit"):
        create_detector("owlvitt")
    with pytest.raises(ConfigError, match="did you mean 'pretrained'"):
        create_detector("owlvit", pretraned="x")
    for entry in DETECTORS:
        assert entry.paper


@pytest.mark.parametrize("name", ALL)
def test_shapes_and_company(name: str, detectors: dict[str, Any], images: dict[str, Tensor]) -> None:
    detector, pixels = detectors[name], images[name]
    with torch.no_grad():
        detections = detector(pixels, noise(3, 2, detector.width))
        assert detections.logits.shape[::2] == (4, 3)
        assert detections.boxes.shape == (4, detections.logits.shape[1], 4)
        assert 0 <= float(detections.boxes.min()) <= float(detections.boxes.max()) <= 1
        alone = detector(pixels[2:3], noise(3, 2, detector.width))
    torch.testing.assert_close(alone.logits, detections.logits[2:3], rtol=0, atol=1e-4)
    torch.testing.assert_close(alone.boxes, detections.boxes[2:3], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_only_concepts_get_a_gradient(
    name: str, detectors: dict[str, Any], images: dict[str, Tensor], data: DetectionData
) -> None:
    detector = detectors[name]
    concepts = noise(3, 2, detector.width).requires_grad_(True)
    rows = detector.frozen(images[name])
    losses = detector.losses(rows, concepts, [o.target() for o in data.objects])
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert bool(concepts.grad.isfinite().all())
    assert float(concepts.grad.abs().max()) > 0
    assert all(p.grad is None for p in detector.parameters())
    # the step that the gradient promises; matching is discrete, so a small one
    slope = float(concepts.grad.square().sum())
    with torch.no_grad():
        moved = concepts - 1e-3 * total / slope * concepts.grad
        after = sum(detector.losses(rows, moved, [o.target() for o in data.objects]).values())
    fall = float(total.detach()) - float(after)
    assert fall == pytest.approx(1e-3 * float(total.detach()), rel=0.2)


@pytest.mark.parametrize("name", ["owlvit", "owlv2"])
def test_class_names_detect_as_in_transformers(
    name: str, detectors: dict[str, Any], images: dict[str, Tensor]
) -> None:
    detector = detectors[name]
    texts = ["a photo of a dog", "red circle"]
    ids = torch.zeros(2, detector.tokens, dtype=torch.long)
    tokens = open_clip.SimpleTokenizer()
    for row, text in zip(ids, texts, strict=True):
        sentence = [49406, *tokens.encode(text), 49407]
        row[: len(sentence)] = torch.tensor(sentence)
    pixels = images[name][:1]
    with torch.no_grad():
        expected = detector.model(input_ids=ids, pixel_values=pixels, attention_mask=(ids > 0).long())
        detections = detector(pixels, detector.read(texts)[:, None])
    torch.testing.assert_close(detections.logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(detections.boxes, expected.pred_boxes, rtol=0, atol=1e-5)


def test_grounding_dino_reads_states_as_its_own(detectors: dict[str, Any], images: dict[str, Tensor]) -> None:
    """Against the model itself, its encoder's own states, and zeros in the places of separators."""
    pytest.importorskip("transformers")
    from transformers.models.grounding_dino import modeling_grounding_dino as theirs

    detector = copy.deepcopy(detectors["grounding-dino"])
    ids = torch.tensor([[101, 3899, 3899, 1012, 3899, 3899, 1012, 102]])
    pixels = images["grounding-dino"][:1]
    special = torch.tensor([101, 102, 1012, 1029])
    make = theirs.generate_masks_with_special_tokens_and_transfer_map
    takes_special = (
        len(inspect.signature(make).parameters) == 2
    )  # later versions ask which tokens are special
    masks, positions = make(ids, special) if takes_special else make(ids)
    with torch.no_grad():
        states = detector.text(ids, masks[:, None], torch.zeros_like(ids), positions).last_hidden_state
        is_concept = ids[0] == 3899
        detector.encoder.states = states.masked_fill(~is_concept[:, None], 0)
        whole = detector.model(pixel_values=pixels, input_ids=ids, attention_mask=is_concept.long()[None])
        detections = detector(pixels, states[0, is_concept].view(2, 2, -1))
    expected = whole.logits[..., [1, 2, 4, 5]].unflatten(-1, (2, 2)).mean(-1)
    torch.testing.assert_close(detections.logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(detections.boxes, whole.pred_boxes, rtol=0, atol=1e-5)


def test_grounding_dino_takes_transformers_loss(
    detectors: dict[str, Any], images: dict[str, Tensor], data: DetectionData
) -> None:
    from transformers.loss.loss_grounding_dino import GroundingDinoForObjectDetectionLoss

    detector = detectors["grounding-dino"]
    concepts, targets = noise(3, 1, detector.width), [o.target() for o in data.objects]
    rows = detector.frozen(images["grounding-dino"])
    with torch.no_grad():
        out, positions = detector._run(rows, concepts)
        maps = torch.zeros(3, detector.most, dtype=torch.long)
        maps[torch.arange(3), positions[:, 0]] = 1
        mask = torch.zeros_like(out.logits, dtype=torch.bool)
        mask[..., positions.flatten()] = True
        labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
        encoder = {"encoder_logits": out.encoder_logits, "encoder_pred_boxes": out.encoder_pred_boxes}
        config = detector.model.config
        expected, _, _ = GroundingDinoForObjectDetectionLoss(
            out.logits, labels, "cpu", out.pred_boxes, config, (maps,) * 4, mask, **encoder
        )
        (loss,) = detector.losses(rows, concepts, targets).values()
    assert math.isfinite(float(loss))
    torch.testing.assert_close(loss, expected)


def test_too_many_tokens_are_refused(detectors: dict[str, Any], images: dict[str, Tensor]) -> None:
    detector = detectors["grounding-dino"]
    with pytest.raises(DataError, match="7 concepts of 4 vectors make 37 tokens; this model reads 24"):
        detector(images["grounding-dino"], noise(7, 4, detector.width))


@pytest.mark.parametrize("name", ["owl-tiny", "owlvit", "grounding-dino"])
def test_the_text_encoder_can_be_dropped(
    name: str, detectors: dict[str, Any], images: dict[str, Tensor]
) -> None:
    detector = copy.deepcopy(detectors[name])
    identity, concepts = detector.identity, noise(2, 1, detector.width)
    before = sum(p.numel() for p in detector.parameters())
    with torch.no_grad():
        expected = detector(images[name], concepts)
        detector.drop_text()
        detections = detector(images[name], concepts)
    assert torch.equal(detections.logits, expected.logits)
    assert sum(p.numel() for p in detector.parameters()) < before
    assert detector.identity == identity
    with pytest.raises(BackboneError, match="dropped"):
        detector.read(["a dog"])


def test_owl_tiny_by_hand(detectors: dict[str, Any], images: dict[str, Tensor]) -> None:
    detector = detectors["owl-tiny"]
    concepts = noise(3, 2, detector.width)
    rows = detector.frozen(images["owl-tiny"])
    units, shift, scale, boxes = detector.head(rows["features"])
    with torch.no_grad():
        detections = detector.detect(rows, concepts)
        cosine = [F.cosine_similarity(units[1, 5], c, dim=-1).mean() for c in concepts]
        expected = torch.stack([(c + shift[1, 5, 0]) * scale[1, 5, 0] for c in cosine])
    torch.testing.assert_close(detections.logits[1, 5], expected, rtol=0, atol=1e-4)
    centre = torch.tensor([(5 + 0.5) / 8, 0.5 / 8])  # place 5 of the first row of 8
    assert float((boxes[1, 5, :2] - centre).abs().max()) < 0.2


def test_weights_that_cannot_be_had_say_what_to_do(tmp_path: Any) -> None:
    with pytest.raises(BackboneError, match="name the folder"):
        create_detector("owlvit", pretrained=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="no such file"):
        create_detector("owl-tiny", weights=str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_finds_nearly_the_same(
    name: str, precision: str, detectors: dict[str, Any], images: dict[str, Tensor], data: DetectionData
) -> None:
    half = build(name, precision=precision)
    assert half.identity == detectors[name].identity  # concepts that were found in one fit the other
    found = []
    for detector in (detectors[name], half):
        concepts = noise(3, 2, detector.width).requires_grad_(True)
        detections = detector(images[name], concepts)
        rows = detector.frozen(images[name])
        losses = detector.losses(rows, concepts, [o.target() for o in data.objects])
        torch.stack(list(losses.values())).sum().backward()
        assert detections.logits.dtype == detections.boxes.dtype == concepts.grad.dtype == torch.float32
        assert bool(concepts.grad.isfinite().all())
        found.append((detections.logits.detach(), detections.boxes.detach()))

    (logits, boxes), (rough_logits, rough_boxes) = found
    assert float((rough_boxes - boxes).abs().median()) < 0.02
    assert float((rough_logits - logits).abs().median()) < 0.1 * float(logits.std()) + 1e-3
