"""ConES against CoOp by shots: accuracy, seconds of training, memory that training adds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import BENCHMARKS
from benchmarks.measure import measure
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.classification.config import ClassificationConfig, load_config
from vlprompt.classification.evaluate import evaluate, image_embeddings
from vlprompt.classification.fit import fit
from vlprompt.data import FeatureCache, ImageDataset, load_dataset
from vlprompt.experiments.statistics import summarise
from vlprompt.learners import Learner, create_learner

__all__ = ["bench_cones"]


@BENCHMARKS.register("cones", summary="ConES and CoOp by shots: accuracy, seconds, memory")
def bench_cones(
    *,
    data: str = "scenes/shape@sketch",
    shots: str = "1,2,4,8,16",
    seeds: str = "1,2,3",
    coop: str = "coop_tiny.yaml",
    cones: str = "cones_classify_tiny.yaml",
) -> dict[str, Any]:
    """Train both as their configurations say, on image features that are computed before the clock starts.

    Args:
        data: A classification task.
        shots: Numbers of images per class, with commas.
        seeds: Of the draws of shots, with commas.
        coop: Configuration of the one.
        cones: Configuration of the other; its backbone is both methods'.
    """
    configs = {"coop": load_config(coop), "cones": load_config(cones)}
    section = configs["cones"].backbone
    backbone = create_backbone(section.name, **section.arguments())
    test = load_dataset(data, "test")
    cache = FeatureCache()
    zero = create_learner("zero_shot", backbone, test.classnames, test.templates)
    result: dict[str, Any] = {
        "data": data,
        "backbone": backbone.name,
        "classes": len(test.classnames),
        "threads": torch.get_num_threads(),
        "zero_shot_accuracy": evaluate(zero, test, cache=cache)["accuracy"],
    }

    with tempfile.TemporaryDirectory() as folder:
        for k in _numbers(shots):
            draws = {s: load_dataset(data, "train", shots=k, seed=s) for s in _numbers(seeds)}
            for train in draws.values():
                image_embeddings(zero, train, cache=FeatureCache(folder))
            for name, config in configs.items():
                cells = [
                    _cell(config, backbone, train, seed, folder, lambda x: evaluate(x, test, cache=cache))
                    for seed, train in draws.items()
                ]
                result[f"{name}/shots{k}"] = _means(cells)

    return result


def _cell(
    config: ClassificationConfig,
    backbone: Backbone,
    train: ImageDataset,
    seed: int,
    folder: str,
    score: Callable[[Learner], dict[str, float]],
) -> dict[str, float]:
    options = {**config.train.options(), "seed": seed}
    trained: list[Learner] = []

    def work() -> None:
        learner = create_learner(
            config.learner_name, backbone, train.classnames, train.templates, **config.learner_options
        )
        fit(learner, train, cache_dir=folder, callbacks=[], **options)
        trained.append(learner)

    took = measure(work, repeats=1, warmup=0)
    learned = sum(p.numel() for p in trained[0].parameters() if p.requires_grad)
    return {
        "accuracy": score(trained[0])["accuracy"],
        "seconds": took.seconds,
        "cpu_seconds": took.cpu_seconds,
        "added_mib": 1024 * (took.added_gib or 0.0),
        "parameters": float(learned),
    }


def _means(cells: list[dict[str, float]]) -> dict[str, float]:
    summaries = {key: summarise([cell[key] for cell in cells]) for key in cells[0]}
    means = {key: value.mean for key, value in summaries.items()}
    half = summaries["accuracy"].ci95
    return means if half is None else {**means, "accuracy_ci95": half}


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
