"""Clustering finds what was planted; names, quotas and what is left out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score

from vlprompt.classification.cluster_sheet import write_sheet
from vlprompt.core.errors import DataError
from vlprompt.data.captions.store import CaptionStore, Rows
from vlprompt.meta.clusters import Hierarchy, cluster_pairs, quotas, spherical_kmeans
from vlprompt.meta.names import pseudo_name, shared_phrase
from vlprompt.meta.options import ClusterOptions


class _Captions:
    """A source that only has words."""

    def __init__(self, captions: list[str]) -> None:
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def caption(self, index: int) -> str:
        return self.captions[index]


def _planted(
    domains: int = 3, classes: int = 4, each: int = 12
) -> tuple[CaptionStore, np.ndarray, np.ndarray]:
    """Images say the domain, captions the class; the two modalities lie far apart, as CLIP's do."""
    rng = torch.Generator().manual_seed(0)
    domain = np.repeat(np.arange(domains), classes * each)
    label = np.tile(np.repeat(np.arange(classes), each), domains)
    noise = torch.randn(2, len(domain), 24, generator=rng)
    gap = 3 * F.normalize(torch.randn(2, 24, generator=rng), dim=-1)
    looks, words = torch.randn(domains, 24, generator=rng), torch.randn(classes, 24, generator=rng)
    image = F.normalize(gap[0] + looks[domain] + 0.15 * noise[0], dim=-1)
    text = F.normalize(gap[1] + words[label] + 0.15 * noise[1], dim=-1)
    source = _Captions([f"a photo of thing{c} number{i}." for i, c in enumerate(label)])
    rows = [Rows([image.half()]), Rows([text.half()])]
    return CaptionStore(Path(), source, torch.arange(len(domain)), *rows, {}), domain, label  # type: ignore[arg-type]


def test_spherical_kmeans_finds_planted_clusters_and_unit_centres() -> None:
    rng = torch.Generator().manual_seed(1)
    centres = F.normalize(torch.randn(5, 16, generator=rng), dim=-1)
    truth = torch.arange(200) % 5
    points = F.normalize(centres[truth] + 0.15 * torch.randn(200, 16, generator=rng), dim=-1)
    label, found = spherical_kmeans(points, 5, seed=3)
    assert adjusted_rand_score(truth.numpy(), label) == 1.0
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5))
    assert ((points @ found.T).argmax(1).numpy() == label).all()
    again, _ = spherical_kmeans(points, 5, seed=3)
    assert (again == label).all()


def test_no_cluster_runs_empty() -> None:
    points = F.normalize(torch.ones(6, 4) + 1e-3 * torch.eye(6)[:, :4], dim=-1)
    label, found = spherical_kmeans(points, 4, seed=0)
    assert found.isfinite().all()
    assert len(spherical_kmeans(points[:2], 9, seed=0)[1]) == 2
    assert set(label) <= set(range(4))


def test_images_make_domains_and_captions_classes() -> None:
    store, domain, label = _planted()
    found = cluster_pairs(store, ClusterOptions(domains=3, classes=4, drop_incoherent=0.0), members=4)
    assert adjusted_rand_score(domain, found.domain) == 1.0
    assert len(found.classes) == 12
    for own in found.classes:
        assert len(set(label[own.rows])) == 1
        assert own.name == f"thing{label[own.rows[0]]}"
        assert own.coherence == pytest.approx(
            float((store.image.all()[own.rows] * store.text.all()[own.rows]).sum(1).mean()), abs=1e-6
        )
    torch.testing.assert_close(found.centroids.norm(dim=-1), torch.ones(3))
    assert (
        found.digest
        == cluster_pairs(store, ClusterOptions(domains=3, classes=4, drop_incoherent=0.0), members=4).digest
    )


def test_the_modalities_can_change_places_or_go_together() -> None:
    store, domain, label = _planted()
    other = ClusterOptions(
        domains=4, classes=3, first="text", second="image", drop_incoherent=0.0, names="caption"
    )
    assert adjusted_rand_score(label, cluster_pairs(store, other, members=4).domain) == 1.0
    both = ClusterOptions(domains=12, classes=2, first="joint", drop_incoherent=0.0, names="caption")
    together = cluster_pairs(store, both, members=1).domain
    assert adjusted_rand_score(domain * 4 + label, together) > 0.9  # uncentred, the gap alone would decide


def test_small_and_incoherent_classes_are_left_out() -> None:
    store, _, _ = _planted()
    options = ClusterOptions(domains=3, classes=4, drop_incoherent=0.25)
    everything = cluster_pairs(store, options.model_copy(update={"drop_incoherent": 0.0}), members=4)
    kept = cluster_pairs(store, options, members=4)
    left = sorted(everything.classes, key=lambda c: c.coherence)[3:]
    domains = [c.domain for c in left]
    left = [c for c in left if domains.count(c.domain) > 1]  # a single class makes no task
    assert {(c.domain, c.name) for c in kept.classes} == {(c.domain, c.name) for c in left}
    assert kept.dropped == 12 - len(left)
    with pytest.raises(DataError, match="tasks need two such domains"):
        cluster_pairs(store, options, members=13)


def test_domains_that_vary_more_get_more_classes() -> None:
    assert quotas(np.array([1.0, 3.0]), 12) == [4, 8]
    assert quotas(np.array([0.0, 0.0]), 4) == [2, 2]
    assert sum(quotas(np.array([1.0, 1.0, 1.0]), 20)) == 20
    store, domain, label = _planted()
    text = store.text.all()
    text[domain == 0] = text[0].clone()  # one domain says a single thing
    calm = CaptionStore(Path(), store.source, store.index, store.image, Rows([text.half()]), {})
    options = ClusterOptions(domains=3, classes=4, complexity_aware=True, drop_incoherent=0.0)
    found = cluster_pairs(calm, options, members=1)
    own = int(found.domain[domain == 0][0])
    most = max(len(found.of(d)) for d in range(3))
    assert len(found.of(own)) <= 2 < most
    assert len(label) == len(found.domain)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (
            ["a photo of a red circle.", "the red circle", "a blue circle", "red circle at night"],
            "red circle",
        ),
        (["a red object.", "something red", "this is green"], "red"),
        (["Side by side boxes", "two boxes side by side"], "side by side"),
        (["a cat", "a dog", "a bird", "a fish"], None),
        (["a photo of an object", "the picture of a thing"], None),
    ],
)
def test_phrases_that_captions_share(captions: list[str], expected: str | None) -> None:
    assert shared_phrase(captions, shared=0.5) == expected


def test_a_phrase_stands_out_from_the_rest_of_its_domain() -> None:
    inside = ["big red box", "red big ball"]
    assert shared_phrase(inside, 0.9, ["big tree", "big cat", "big hat"]) == "red"
    assert shared_phrase(inside, 0.9, ["red tree", "red cat", "red hat"]) == "big"


def test_without_a_phrase_the_medoid_s_caption_is_the_name() -> None:
    words = " ".join(f"w{i}" for i in range(20))
    assert pseudo_name([f"{words}.", "b"], "phrase", 0.9) == " ".join(f"w{i}" for i in range(12))
    assert pseudo_name(["a red cat.", "a red cat."], "caption") == "a red cat"


def test_the_sheet_shows_images_names_and_what_is_held_out(
    store: CaptionStore, hierarchy: Hierarchy, tmp_path: Path
) -> None:
    held = hierarchy.classes[0].domain
    write_sheet(tmp_path / "clusters.html", store, hierarchy, [held], domains=2, classes=3, images=2)
    page = (tmp_path / "clusters.html").read_text()
    assert page.count("<section>") == 2
    assert page.count("data:image/png;base64,") <= 2 * 3 * 2
    assert f"{len(store)} pairs" in page
    shown = {c.name for c in hierarchy.classes if c.name in page}
    assert len(shown) >= 2
