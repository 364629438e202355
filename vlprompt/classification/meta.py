"""Meta-training: from images with captions to prompts and a regulator.

Store, clusters and episodes are built first and are functions of the configuration, so a killed run goes on with
the same command: finished shards are kept, clustering repeats, training continues from its checkpoint.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from vlprompt.backbones import Backbone
from vlprompt.classification.cluster_sheet import write_sheet
from vlprompt.classification.config import ClassificationConfig
from vlprompt.classification.fit import describe
from vlprompt.core.files import write_json
from vlprompt.core.paths import user_path
from vlprompt.core.processes import accelerator
from vlprompt.core.slugs import slug
from vlprompt.data.captions.store import CaptionStore, build_store
from vlprompt.learners import Learner
from vlprompt.meta.clusters import Hierarchy, cluster_pairs
from vlprompt.meta.episodes import EpisodeBatches, Episodes
from vlprompt.meta.learning import MetaPrompts
from vlprompt.meta.start import save_start
from vlprompt.training.callback_lists import default_callbacks
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["meta_train"]

log = logging.getLogger("vlprompt.meta")


def meta_train(
    config: ClassificationConfig, backbone: Backbone, learner: Learner, folder: Path, seed: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Meta-train one learner's prompts and a regulator, and write what fine-tuning starts from.

    Args:
        config: Its sections ``meta`` and ``train`` are read.
        backbone: Encodes the pairs.
        learner: Its prompts are the start; changed in place.
        folder: ``prompt/`` (see :func:`save_start`), ``clusters.html`` and the checkpoint go here.
        seed: Of clustering, episodes and training.

    Returns:
        Figures on held-out domains, and the history.

    Raises:
        VLPromptError: See :func:`build_store`, :func:`cluster_pairs`, :class:`Episodes`, :class:`MetaPrompts`.
    """
    started = time.monotonic()
    processes = accelerator()
    meta = config.meta
    options = TrainOptions(**config.train.model_dump(exclude={"recipe"}), seed=seed)
    learner.to(learner.backbone.device_or(processes.device))
    module = MetaPrompts(learner, meta)

    store, hierarchy = _clustered(config, backbone, seed)
    episodes = _episodes(config, backbone, learner, store, hierarchy, seed)
    if processes.is_main_process:
        write_sheet(folder / "clusters.html", store, hierarchy, episodes.held_out)

    watched = episodes.validation()
    trainer = Trainer(
        module,
        EpisodeBatches(episodes, options.batch_size),
        options,
        folder,
        validate=lambda: module.evaluate(watched),
        callbacks=default_callbacks("meta", folder),
        identity=_run_identity(config, learner, store, hierarchy),
        accelerator=processes,
    )
    history = trainer.run(resume=True).history

    learner.eval()
    numbers = {
        **module.evaluate(watched),
        **describe(learner),
        "train/seconds": time.monotonic() - started,
    }

    facts = {
        "pairs": meta.pairs,
        "store": store.digest,
        "clusters": hierarchy.digest,
        "seed": seed,
        **numbers,
    }
    if processes.is_main_process:
        save_start(learner, module.regulator, folder / "prompt", facts)
        write_json(folder / "clusters.json", _summary(hierarchy, episodes))

    return numbers, history


def _clustered(config: ClassificationConfig, backbone: Backbone, seed: int) -> tuple[CaptionStore, Hierarchy]:
    """Encode the captioned images, unless that is done, and cluster them."""
    started = time.monotonic()
    meta = config.meta
    store_folder = user_path(meta.store) if meta.store else _default_store(config, backbone)
    with accelerator().main_process_first():
        store = build_store(meta.pairs, backbone, store_folder, shard=meta.shard)
    built = time.monotonic()

    # Where every pair is a class, a class has one pair; otherwise it needs enough for both sides of an episode.
    members = 1 if meta.clusters.names == "pair" else meta.episodes.support + meta.episodes.query
    hierarchy = cluster_pairs(store, meta.clusters, members, seed)

    log.info("%d pairs in %.0f s", len(store), built - started)
    log.info(
        "%d pseudo-classes (%d left out) in %.0f s",
        *(len(hierarchy.classes), hierarchy.dropped, time.monotonic() - built),
    )
    return store, hierarchy


def _episodes(
    config: ClassificationConfig,
    backbone: Backbone,
    learner: Learner,
    store: CaptionStore,
    hierarchy: Hierarchy,
    seed: int,
) -> Episodes:
    pixels = None if learner.static_images else backbone.preprocess
    every_pair = config.meta.clusters.names == "pair"
    return Episodes(store, hierarchy, config.meta.episodes, seed, pixels, every_pair)


def _default_store(config: ClassificationConfig, backbone: Backbone) -> Path:
    """One store per source and backbone, shared by the runs of an output folder."""
    return user_path(config.output) / "pairs" / f"{slug(config.meta.pairs)}_{backbone.features_id}"


def _run_identity(
    config: ClassificationConfig, learner: Learner, store: CaptionStore, hierarchy: Hierarchy
) -> dict[str, Any]:
    """Return facts that a run and its continuation must share."""
    return {
        "learner": learner.method,
        "learner_options": {k: str(v) for k, v in learner.options.items()},
        "meta": config.meta.model_dump(mode="json", exclude={"store"}),
        "precision": learner.backbone.precision,
        "store": store.digest,
        "clusters": hierarchy.digest,
    }


def _summary(hierarchy: Hierarchy, episodes: Episodes) -> dict[str, Any]:
    """Return what ``clusters.json`` holds: names and sizes by domain, and which domains are held out."""
    domains = {}
    for domain, classes in episodes.classes.items():
        domains[str(domain)] = [
            {"name": c.name, "pairs": len(c.rows), "coherence": c.coherence} for c in classes
        ]

    return {
        "digest": hierarchy.digest,
        "left_out": hierarchy.dropped,
        "held_out_domains": list(episodes.held_out),
        "domains": domains,
    }
