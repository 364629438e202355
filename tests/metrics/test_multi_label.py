"""Metrics of several labels, against scikit-learn, brute force and cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

from vlprompt.core.errors import DataError
from vlprompt.metrics.classification import compute
from vlprompt.metrics.incremental import backward_transfer, forgetting
from vlprompt.metrics.multi_label import average_precision, best_cut, cf1, mean_average_precision, of1


@pytest.fixture
def scored() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-4, 5, (60, 6), generator=generator).double()  # many equal scores
    truth = (torch.rand(60, 6, generator=generator) < 0.3).long()
    return logits, truth


def test_average_precision_is_scikit_learns(scored: tuple[Tensor, Tensor]) -> None:
    logits, truth = scored
    for c in range(6):
        expected = average_precision_score(truth[:, c].numpy(), logits[:, c].numpy())
        assert average_precision(logits[:, c], truth[:, c]) == pytest.approx(expected, abs=1e-12)
    expected = average_precision_score(truth.numpy(), logits.numpy(), average="macro")
    assert compute(logits, truth, ["map"])["map"] == pytest.approx(expected, abs=1e-12)


def test_a_class_that_no_image_shows_is_left_out(scored: tuple[Tensor, Tensor]) -> None:
    logits, truth = scored
    truth[:, 2] = 0
    others = [0, 1, 3, 4, 5]
    assert mean_average_precision(logits, truth) == mean_average_precision(
        logits[:, others], truth[:, others]
    )
    with pytest.raises(DataError, match="map needs at least one positive"):
        compute(logits, torch.zeros_like(truth), ["map"])


def test_unknown_truth_is_counted_by_no_metric(scored: tuple[Tensor, Tensor]) -> None:
    logits, truth = scored
    truth[:20, 3] = -1
    known = average_precision_score(truth[20:, 3].numpy(), logits[20:, 3].numpy())
    assert mean_average_precision(logits[:, 3:4], truth[:, 3:4]) == pytest.approx(known)
    for metric in (cf1, of1):
        assert metric(logits[:, 3:4], truth[:, 3:4]) == metric(logits[20:, 3:4], truth[20:, 3:4])


def test_difficult_pairs_are_left_out_as_a_slow_loop_leaves_them_out(scored: tuple[Tensor, Tensor]) -> None:
    """Pair after pair, in every class: no unknown one is right, wrong or missed, and its score ranks nothing."""
    logits, truth = scored
    unknown = torch.rand(truth.shape, generator=torch.Generator().manual_seed(5)) < 0.25
    truth = truth.masked_fill(unknown, -1)

    precisions, recalls, areas = [], [], []
    right = predicted = present = 0
    for c in range(truth.shape[1]):
        pairs = [(s, t) for s, t in zip(logits[:, c].tolist(), truth[:, c].tolist(), strict=True) if t >= 0]
        hits = sum(1 for s, t in pairs if s > 0 and t == 1)
        said = sum(1 for s, _ in pairs if s > 0)
        shown = sum(1 for _, t in pairs if t == 1)
        right, predicted, present = right + hits, predicted + said, present + shown
        precisions.append(hits / said)
        recalls.append(hits / shown)
        above = [[t for s, t in pairs if s >= cut] for cut, true in pairs if true == 1]
        areas.append(sum(sum(part) / len(part) for part in above) / shown)

    precision, recall = np.mean(precisions), np.mean(recalls)
    figures = compute(logits, truth, ["map", "cf1", "of1"])
    assert figures["map"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert figures["cf1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert figures["of1"] == pytest.approx(2 * right / (predicted + present))

    # What is said of unknown pairs changes nothing, in any metric over several labels.
    others = logits.masked_fill(unknown, 99.0)
    names = ["map", "cf1", "of1", "map_11_point", "map_11_point_elevater"]
    assert compute(others, truth, names) == compute(logits, truth, names)
    cut = best_cut(logits, truth)
    assert best_cut(others, truth) == cut


def test_accuracy_counts_samples_that_have_a_class_and_a_known_answer() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 4)
    truth = torch.tensor([[1, 0, 0], [0, 1, 0], [-1, 1, 0], [0, 0, 0]])
    assert compute(logits, truth, ["accuracy"]) == {"accuracy": 0.5}
    with pytest.raises(DataError, match="accuracy needs at least one sample with a class"):
        compute(logits, torch.zeros_like(truth), ["accuracy"])


def test_f1_by_hand() -> None:
    """Five images, four classes; the last class is shown by none, the third is never predicted."""
    truth = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])
    probability = torch.tensor(
        [
            [0.9, 0.9, 0.1, 0.9],
            [0.9, 0.9, 0.1, 0.1],
            [0.9, 0.1, 0.1, 0.1],
            [0.1, 0.1, 0.7, 0.1],
            [0.1, 0.1, 0.1, 0.1],
        ]
    )
    logits = torch.logit(probability.double())
    # Class 0: 2 of 3 predictions right, 2 of 3 images found; class 1: 1 of 2 and 1 of 2; class 2: none.
    precision, recall = (2 / 3 + 1 / 2 + 0) / 3, (2 / 3 + 1 / 2 + 0) / 3
    assert cf1(logits, truth, 0.8) == pytest.approx(2 * precision * recall / (precision + recall))
    # In all: 3 of 6 predictions are right, 3 of 7 labels are found.
    assert of1(logits, truth, 0.8) == pytest.approx(2 * 3 / (6 + 7))
    # At 0.5 the third class has a prediction, which is right.
    assert of1(logits, truth, 0.5) == pytest.approx(2 * 4 / (7 + 7))


def test_overall_f1_is_scikit_learns(scored: tuple[Tensor, Tensor]) -> None:
    logits, truth = scored
    expected = f1_score(truth.numpy(), (logits > 0).numpy(), average="micro")
    assert of1(logits, truth) == pytest.approx(expected)
    with pytest.raises(DataError, match="between 0 and 1, got 1"):
        of1(logits, truth, 1.0)


def test_the_best_cut_is_the_best_of_all(scored: tuple[Tensor, Tensor]) -> None:
    logits, truth = scored
    cuts = torch.sigmoid(torch.arange(-5, 5).double() + 0.5)
    best = max(of1(logits, truth, float(cut)) for cut in cuts)
    assert of1(logits, truth, best_cut(logits, truth)) == pytest.approx(best)


def test_forgetting_and_transfer_by_hand() -> None:
    reached = [[0.8], [0.9, 0.6], [0.5, 0.7, 0.9]]
    assert forgetting(reached) == pytest.approx(np.mean([0.9 - 0.5, 0.6 - 0.7]))
    assert backward_transfer(reached) == pytest.approx(np.mean([0.5 - 0.8, 0.7 - 0.6]))
    assert forgetting([[0.4]]) == backward_transfer([[0.4]]) == 0.0
