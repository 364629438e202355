"""What a configuration of adaptation reads: the images of its streams, as a seed draws them, and files beside them."""

from __future__ import annotations

from typing import Any

from vlprompt.adaptation.config import AdaptationConfig
from vlprompt.adaptation.mixing import intruders_of, mix
from vlprompt.adaptation.plans import StreamPlan, order_hash
from vlprompt.core.errors import CheckpointError
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import derive_seed, numpy_rng
from vlprompt.data import ImageDataset, load_dataset
from vlprompt.data.corruptions import parse_corruption
from vlprompt.saved.paths import find_prompts

__all__ = ["describe_stream", "draw_stream", "read_paths", "reordered"]

_DRAWN = ("iid", "temporal")  # streams whose data sets come as they were drawn


def draw_stream(config: AdaptationConfig, name: str, seed: int) -> ImageDataset:
    """Return the images of one data set that one seed draws, in the order of the stream, with its intruders.

    Raises:
        DataError: If it can't be told whether intruders show known classes (see :func:`mix`).
    """
    options = config.data
    data = load_dataset(
        name,
        options.split,
        classes=options.classes,
        **options.image_arguments(),
        classnames=options.classnames,
        templates=options.templates,
    ).with_label()  # an answer is right or wrong: an image without a class has neither
    corruption = parse_corruption(name)
    base = name if corruption is None else corruption.base
    order = numpy_rng(seed, "stream", base, options.split).permutation(len(data))
    drawn = order[: options.test_images].tolist()
    if corruption is not None:
        # Every corruption is put into the same images, which come in an order of its own.
        drawn = numpy_rng(seed, "stream", name, options.split).permutation(drawn).tolist()

    subset = data.subset(drawn, stream_seed=seed, subset=options.test_images)
    if options.intruders is not None:
        intruders = load_dataset(
            options.intruders.name or name,
            options.split,
            classes=options.intruders.classes,
            **{**options.image_arguments(), "descriptions": None},  # they are of the known classes
        )
        subset = mix(subset, intruders)

    plan = config.protocol.stream
    # The draw has shuffled them already.
    return subset if plan.kind in _DRAWN else reordered(subset, plan, seed, 0)


def reordered(data: ImageDataset, plan: StreamPlan, seed: int, number: int) -> ImageDataset:
    """Return another order of a stream; of one data set, where the plan has several one after another."""
    if plan.kind == "temporal":
        plan = StreamPlan("iid")
    order = plan.order(data.labels, derive_seed(seed, "order", number), intruders=intruders_of(data).tolist())
    return data.subset(order, order=number)


def describe_stream(config: AdaptationConfig, data: ImageDataset, seed: int, number: int) -> dict[str, Any]:
    """Return what a record says of one order of a stream."""
    stream = config.protocol.stream.description()
    stream |= {"seed": seed, "order": number, "count": len(data)}
    if "intruders" in data.info:
        stream["intruders"] = data.info["intruders"]
    stream["images"] = order_hash([str(sample.source) for sample in data.samples])
    if config.attack is not None:
        stream["attack"] = config.attack.description()
    return stream


def read_paths(config: AdaptationConfig) -> list[str]:
    """Return the files and folders beside data and backbone that figures depend on."""
    paths = config.data.described()
    if config.prompt is not None:
        try:
            paths += find_prompts([config.prompt])
        except CheckpointError:
            paths.append(config.prompt)

    for label in config.methods:
        _, options = config.method(label)
        if options.get("statistics"):
            paths.append(str(options["statistics"]))

    if config.diffusion is not None and config.generated:
        options = config.diffusion.options
        local = [options.get("pipeline"), options.get("weights")]
        paths += [str(path) for path in local if path and user_path(path).exists()]

    return paths
