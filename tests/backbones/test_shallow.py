"""Statistics of the first convolution against sums written out, on every kind of tower."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.shallow import embed_with_statistics, map_statistics, statistics_width


def by_hand(channel: Tensor) -> list[float]:
    """Seventeen numbers of one (h, w) channel, by loops."""
    rows, columns = channel.shape
    x = channel.double().tolist()
    flat = [v for row in x for v in row]
    mean = sum(flat) / len(flat)
    across = [abs(x[i][j + 1] - x[i][j]) for i in range(rows) for j in range(columns - 1)]
    down = [abs(x[i + 1][j] - x[i][j]) for i in range(rows - 1) for j in range(columns)]
    diagonal = [
        abs(x[i + 1][j + 1] - x[i + 1][j] - x[i][j + 1] + x[i][j])
        for i in range(rows - 1)
        for j in range(columns - 1)
    ]
    spread = (sum((v - mean) ** 2 for v in flat) / (len(flat) - 1)) ** 0.5
    means = [sum(d) / len(d) for d in (across, down, diagonal)]
    quantiles = [
        sorted(d)[round(q * (len(d) - 1))] for d in (across, down, diagonal) for q in (0.1, 0.5, 0.9)
    ]
    return [mean, max(flat), min(flat), spread, *means, max(diagonal), *quantiles]


def test_statistics_are_what_they_say() -> None:
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = map_statistics(features).unflatten(1, (17, 3))
    for b in range(2):
        for c in range(3):
            assert found[b, :, c].tolist() == pytest.approx(by_hand(features[b, c]), rel=1e-5, abs=1e-6)


def test_a_map_without_neighbours_has_no_steps() -> None:
    found = map_statistics(torch.randn(2, 3, 1, 1)).unflatten(1, (17, 3))
    assert torch.equal(found[:, 4:], torch.zeros(2, 13, 3))
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    "vision",
    [None, {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}],
    ids=["vit", "resnet"],
)
def test_one_pass_gives_the_embedding_and_the_statistics(
    vision: dict[str, object] | None, make_backbone: Callable[..., Backbone]
) -> None:
    backbone = (
        make_backbone(vision=vision)
        if vision is None
        else make_backbone(vision={**vision, "patch_size": None})
    )
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    first = next(m for m in backbone.vision.visual.modules() if isinstance(m, nn.Conv2d))
    rows = embed_with_statistics(backbone, images)
    torch.testing.assert_close(rows[:, : backbone.dim], backbone.image_embeddings(images))
    assert rows.shape[1] == backbone.dim + statistics_width(backbone)
    torch.testing.assert_close(rows[:, backbone.dim :], map_statistics(first(images)).detach())
    assert not first._forward_hooks, "nothing is left hanging on the tower"


def test_tiny_looks_at_its_stem() -> None:
    assert statistics_width(create_backbone("tiny")) == 17 * 32
