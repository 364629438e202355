"""Statistics of pixels and of the first convolution against sums written out, on every kind of tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.shallow import embed_with_statistics, map_statistics, statistics_width


def by_hand(channel: Tensor, ranks: Sequence[float], bends: bool) -> list[float]:
    """All numbers of one (h, w) channel, by loops."""
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
    ranked = [across, down, diagonal]
    if bends:
        ranked.append([abs(r[j + 2] - 2 * r[j + 1] + r[j]) for r in x for j in range(columns - 2)])
        ranked.append(
            [abs(x[i + 2][j] - 2 * x[i + 1][j] + x[i][j]) for i in range(rows - 2) for j in range(columns)]
        )
    quantiles = [sorted(d)[round(q * (len(d) - 1))] for d in ranked for q in ranks]
    return [mean, max(flat), min(flat), spread, *means, max(diagonal), *quantiles]


@pytest.mark.parametrize(("ranks", "bends"), [((0.1, 0.5, 0.9), False), ((0.0, 0.25, 0.6, 1.0), True)])
def test_statistics_are_what_they_say(ranks: tuple[float, ...], bends: bool) -> None:
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    count = 8 + (5 if bends else 3) * len(ranks)
    found = map_statistics(features, ranks, bends=bends).unflatten(1, (count, 3))
    for b in range(2):
        for c in range(3):
            expected = by_hand(features[b, c], ranks, bends)
            assert found[b, :, c].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("bends", [False, True])
def test_a_map_without_neighbours_has_no_steps(bends: bool) -> None:
    count = 23 if bends else 17
    found = map_statistics(torch.randn(2, 3, 1, 1), bends=bends).unflatten(1, (count, 3))
    assert torch.equal(found[:, 4:], torch.zeros(2, count - 4, 3))
    assert bool(found.isfinite().all())


def test_quantiles_of_a_large_map_are_of_rows_all_over_it() -> None:
    rng = torch.Generator().manual_seed(0)
    large = torch.randn(1, 1, 300, 40, generator=rng) * torch.linspace(0.1, 2, 300)[:, None]
    found = map_statistics(large)[0, 8:]
    exact = torch.cat([map_statistics(large[:, :, i::4])[0, 8:11] for i in range(4)]).view(4, 3).mean(0)
    torch.testing.assert_close(found[:3], exact, rtol=0.1, atol=0.0)


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
    pixels = map_statistics(images, (0.1, 0.25, 0.5, 0.75, 0.9, 0.97), bends=True)
    expected = torch.cat([map_statistics(first(images)).detach(), pixels], dim=1)
    torch.testing.assert_close(rows[:, backbone.dim :], expected)
    assert not first._forward_hooks, "nothing is left hanging on the tower"


def test_tiny_looks_at_its_stem() -> None:
    assert statistics_width(create_backbone("tiny")) == 17 * 32 + 38 * 3
