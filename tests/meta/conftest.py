"""A small store of captioned scenes and what is clustered from it, shared by all tests of meta-training."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vlprompt.backbones import Backbone
from vlprompt.data.captions.store import CaptionStore, build_store
from vlprompt.meta.clusters import Hierarchy, cluster_pairs
from vlprompt.meta.episodes import Episodes
from vlprompt.meta.options import ClusterOptions, EpisodeOptions

MakeEpisodes = Callable[..., Episodes]


@pytest.fixture(scope="session")
def store(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> CaptionStore:
    """160 captioned scenes under the small random backbone."""
    return build_store("scenes:160", backbone, tmp_path_factory.mktemp("pairs"), shard=64)


@pytest.fixture(scope="session")
def hierarchy(store: CaptionStore) -> Hierarchy:
    """Four domains of up to six pseudo-classes."""
    return cluster_pairs(store, ClusterOptions(domains=4, classes=6, drop_incoherent=0.0), members=3)


@pytest.fixture(scope="session")
def make_episodes(store: CaptionStore, hierarchy: Hierarchy, backbone: Backbone) -> MakeEpisodes:
    """Builder of episodes; ``pixels`` for learners that need them."""

    def make(pixels: bool = False, seed: int = 1, **options: object) -> Episodes:
        sizes = {"ways": 4, "support": 2, "query": 1, "held_out": 0.0, "per_epoch": 4, **options}
        preprocess = backbone.preprocess if pixels else None
        return Episodes(store, hierarchy, EpisodeOptions.model_validate(sizes), seed, preprocess)

    return make
