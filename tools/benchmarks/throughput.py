"""Images per second of every part of a run, from the file to the optimiser's step: the first table on a new machine."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import BENCHMARKS
from benchmarks._photographs import OF_A_PHONE, WIDTH_HEIGHT, photographs, threaded
from benchmarks.measure import in_turns, measure
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.data import Augmentation, ImageDataset
from vlprompt.data.loading import Loader
from vlprompt.learners import Learner, create_learner

__all__ = ["bench_throughput"]


class _Reader:
    """Decodes and augments batches of images."""

    def __init__(self, data: ImageDataset, preprocess: Any, augmentation: str) -> None:
        self.data = data
        self.preprocess = preprocess
        self.augmentation = Augmentation(augmentation)

    def __call__(self, rows: range) -> Tensor:
        return torch.stack([self.view(i) for i in rows])

    def view(self, index: int) -> Tensor:
        image, _ = self.data[index]
        return self.augmentation.augment(image, self.preprocess, 1, str(index), 0)

    def decoded(self) -> None:
        for index in range(len(self.data)):
            self.data[index]


@BENCHMARKS.register(
    "throughput", summary="images per second of decoding, augmenting, transfer, encoding, a step"
)
def bench_throughput(
    *,
    backbone: str = "ViT-B-16",
    images: int = 256,
    batch: int = 16,
    device: str = "cpu",
    workers: str = "1,2",
    precisions: str = "fp32,bf16",
    repeats: int = 3,
) -> dict[str, Any]:
    """Print images per second of each part alone, and what loading gains.

    ``loading/thread`` is the way before: one thread that cuts and resizes by Pillow. ``loading_ratio/N`` is what N
    workers are against it, the median over pairs of runs that take turns. Workers live as long as a run, so they are
    there when the clock starts; ``start/N`` is how many seconds the first images take, with their start.
    ``phone/whole`` and ``phone/jpeg_side`` decode JPEGs of 4000 x 3000, whole and at the smallest fraction that keeps
    twice the tower's side.

    Args:
        backbone: Any open_clip architecture, or tiny.
        images: JPEGs of 500 x 375 pixels, drawn for the benchmark.
        batch: Images per batch.
        device: cpu, cuda or mps: of transfer, encoding and the step.
        workers: Numbers of loading processes, with commas.
        precisions: Of the towers, with commas: fp32, bf16, fp16.
        repeats: Counted runs of each.
    """
    tower = create_backbone(backbone).to(device)
    with tempfile.TemporaryDirectory() as folder:
        data = photographs(Path(folder), images)
        figures = _loading(data, tower.preprocess, batch, [int(n) for n in workers.split(",")], repeats)
        pixels = _Reader(data, tower.preprocess, "crop_flip")(range(batch))
    figures |= _phone(2 * min(tower.image_size), repeats)

    target = torch.device(device)
    figures |= _per_second("transfer", lambda: pixels.to(target), batch, target, repeats)
    placed = pixels.to(target)
    labels = torch.arange(batch, device=target) % 2

    for precision in precisions.split(","):
        choice: Any = precision  # checked there
        narrow = create_backbone(backbone, precision=choice, device=device)
        learner = create_learner("vpt", narrow, ["a cat", "a dog"]).to(target)
        optimizer = torch.optim.SGD(list(learner.learned_parameters().values()), lr=0.01)

        def encode(narrow: Backbone = narrow) -> None:
            narrow.image_embeddings(placed)

        def step(learner: Learner = learner, optimizer: torch.optim.Optimizer = optimizer) -> None:
            losses = learner.loss({"image": placed, "label": labels})
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()

        figures |= _per_second(f"encode/{precision}", encode, batch, target, repeats)
        figures |= _per_second(f"step/{precision}", step, batch, target, repeats)

    settings = {
        "backbone": tower.name,
        "device": torch.cuda.get_device_name() if target.type == "cuda" else device,
        "files": f"{images} JPEGs of {WIDTH_HEIGHT[0]} x {WIDTH_HEIGHT[1]}",
        "batch": batch,
        "threads": torch.get_num_threads(),
    }
    return {**settings, **figures}


def _loading(
    data: ImageDataset, preprocess: Any, batch: int, workers: list[int], repeats: int
) -> dict[str, float]:
    """Return images per second of decoding and of loading, and the ratios to one thread."""
    items = [range(len(data))[start : start + batch] for start in range(0, len(data), batch)]
    now = _Reader(data, preprocess, "crop_flip")
    before = _Reader(data, preprocess, "crop_flip_pil")

    with ExitStack() as stack:
        loaders = {count: stack.enter_context(Loader(now, workers=count)) for count in (0, *workers)}
        starts = {count: _first_seconds(loader, items) for count, loader in loaders.items()}

        works: dict[str, Any] = {
            "decode": now.decoded,
            "loading/thread": lambda: list(map(len, threaded(before, items))),
        }
        for count, loader in loaders.items():
            works[f"loading/{count}"] = lambda loader=loader: list(map(len, loader.stream(items)))
        turns = in_turns(works, repeats)

    figures = {name: len(data) / turns[name].seconds for name in works}
    for count in starts:
        figures[f"start/{count}"] = starts[count]
        figures[f"loading_ratio/{count}"] = turns.ratio("loading/thread", f"loading/{count}")
    return figures


def _phone(side: int, repeats: int) -> dict[str, float]:
    """Return images per second of decoding photographs of a phone, whole and at a fraction, and the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        whole = photographs(Path(folder), 4, OF_A_PHONE)
        reader = whole.reader.with_jpeg_side(side)
        works: dict[str, Any] = {
            "phone/whole": lambda: [whole.reader.read(s.source) for s in whole.samples],
            "phone/jpeg_side": lambda: [reader.read(s.source) for s in whole.samples],
        }
        turns = in_turns(works, repeats)

    figures = {name: len(whole) / turns[name].seconds for name in works}
    return {**figures, "phone_ratio": turns.ratio("phone/whole", "phone/jpeg_side")}


def _first_seconds(loader: Loader[range, Tensor], items: list[range]) -> float:
    """Return the seconds of the first three batches."""
    started = time.perf_counter()
    for _ in loader.stream(items[:3]):
        pass
    return time.perf_counter() - started


def _per_second(name: str, work: Any, images: int, device: torch.device, repeats: int) -> dict[str, float]:
    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return {name: images / measure(run, repeats).seconds}
