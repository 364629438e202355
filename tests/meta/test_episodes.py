"""Episodes: disjoint domains, distinct names, nothing in both halves, the same draw for the same number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.meta.conftest import MakeEpisodes
from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.data.captions.store import CaptionStore
from vlprompt.meta.clusters import Hierarchy
from vlprompt.meta.episodes import EpisodeBatches, Episodes
from vlprompt.meta.options import EpisodeOptions


def test_support_and_query_are_of_different_domains(
    make_episodes: MakeEpisodes, hierarchy: Hierarchy
) -> None:
    episodes = make_episodes()
    for number in range(20):
        episode = episodes.draw(number)
        first, second = episode.domains
        assert first != second
        for side, domain, shots in ((episode.support, first, 2), (episode.query, second, 1)):
            assert set(hierarchy.domain[side.rows]) == {domain}
            assert len({n.casefold() for n in side.names}) == len(side.names) <= 4
            assert torch.bincount(side.batch["label"]).tolist() == [shots] * len(side.names)
        expected = float(hierarchy.centroids[first] @ hierarchy.centroids[second])
        assert episode.similarity == pytest.approx(expected)


def test_within_one_domain_no_pair_is_in_both_halves(make_episodes: MakeEpisodes) -> None:
    episodes = make_episodes(cross_domain=0.0)
    for number in range(20):
        episode = episodes.draw(number)
        assert episode.domains[0] == episode.domains[1]
        assert not set(episode.support.rows) & set(episode.query.rows)


def test_shared_classes_come_again_in_other_pairs(make_episodes: MakeEpisodes, hierarchy: Hierarchy) -> None:
    episodes = make_episodes(shared_classes=1.0)
    for number in range(20):
        episode = episodes.draw(number)
        assert episode.domains[0] == episode.domains[1]
        assert set(episode.query.names) == set(episode.support.names)
        assert not set(episode.support.rows) & set(episode.query.rows)

    some = make_episodes(shared_classes=0.5)
    shared = [episode.domains[0] == episode.domains[1] for episode in map(some.draw, range(60))]
    assert 15 < sum(shared) < 45


def test_an_episode_is_a_function_of_seed_and_number(make_episodes: MakeEpisodes) -> None:
    first, again, other = make_episodes(), make_episodes(), make_episodes(seed=2)
    first.draw(0)
    assert first.draw(7).support.names == again.draw(7).support.names
    assert np.array_equal(first.draw(7).query.rows, again.draw(7).query.rows)
    assert any(not np.array_equal(first.draw(i).support.rows, other.draw(i).support.rows) for i in range(3))


def test_what_a_side_holds_is_of_its_pairs(
    make_episodes: MakeEpisodes, store: CaptionStore, backbone: Backbone
) -> None:
    side = make_episodes().draw(4).support
    assert torch.equal(side.batch["embedding"], store.image.take(side.rows))
    assert float(side.features.norm()) == pytest.approx(1.0, abs=1e-5)
    pixels = make_episodes(pixels=True).draw(4).support
    assert torch.equal(pixels.batch["image"][1], store.pixels(int(side.rows[1]), backbone.preprocess))


def test_domains_are_held_out(make_episodes: MakeEpisodes) -> None:
    episodes = make_episodes(held_out=0.5, validation=6)
    assert not set(episodes.held_out) & set(episodes.training)
    assert {d for e in episodes.validation() for d in e.domains} <= set(episodes.held_out)
    assert {d for i in range(20) for d in episodes.draw(i).domains} <= set(episodes.training)
    with pytest.raises(DataError, match="fewer than two are left"):
        make_episodes(held_out=0.9)


@pytest.mark.parametrize("hardness", [0.0, 1.0])
def test_hardness_picks_the_nearest_or_the_farthest_domain(
    make_episodes: MakeEpisodes, hierarchy: Hierarchy, hardness: float
) -> None:
    episode = make_episodes(hardness=hardness).draw(0)
    first, second = episode.domains
    others = [d for d in range(len(hierarchy.centroids)) if d != first and hierarchy.of(d)]
    near = [float(hierarchy.centroids[first] @ hierarchy.centroids[d]) for d in others]
    wanted = min(near) if hardness else max(near)
    assert near[others.index(second)] == pytest.approx(wanted)


def test_every_pair_can_be_a_class(store: CaptionStore, hierarchy: Hierarchy) -> None:
    options = EpisodeOptions(ways=4, support=3, query=3, held_out=0.0)
    side = Episodes(store, hierarchy, options, 1, every_pair=True).draw(0).support
    assert side.names == tuple(store.caption(int(r)).rstrip(" .") for r in side.rows)
    assert side.batch["label"].tolist() == [0, 1, 2, 3]


def test_an_epoch_never_repeats_an_episode(make_episodes: MakeEpisodes) -> None:
    batches = EpisodeBatches(make_episodes(per_epoch=5), 2)
    numbers = [int(i) for epoch in range(2) for part in batches.plan(epoch) for i in part]
    assert numbers == list(range(10))
    fetched = batches.fetch(batches.plan(1)[0], 1)["episodes"]
    assert np.array_equal(fetched[0].support.rows, batches.episodes.draw(5).support.rows)
