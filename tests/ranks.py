"""Work that tests run in one process and in several; ``-m tests.ranks FILE`` writes what process 0 got."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprompt import create_adapter, create_backbone, create_learner, load_dataset
from vlprompt.adaptation.stream import adapt_dataset
from vlprompt.backbones.vision import Images
from vlprompt.classification.evaluate import predict_logits
from vlprompt.classification.fit import fit
from vlprompt.core.errors import DataError, VLPromptError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.core.processes import process_state
from vlprompt.core.seeding import torch_rng
from vlprompt.core.shares import division, process_count, share_rows, shared_work
from vlprompt.data import FeatureCache
from vlprompt.learners import Learner
from vlprompt.training.batches import TensorBatches
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
Work = dict[str, Tensor]


def in_processes(count: int, folder: Path) -> Work:
    """Return what all functions of this module give in so many processes."""
    path = folder / "works.safetensors"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "-m", "tests.ranks", str(path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return read_tensors(path)[0]


def run_and_kill(rank: int, folder: Path) -> tuple[int, str]:
    """Kill one process of a training run behind its first checkpoint; return the run's status and messages."""
    config = folder / "run.yaml"
    config.write_text(_ENDLESS.format(output=folder))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "tools/train.py"), "--cfg", str(config)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 100
        while (
            not list(folder.glob("test/*/cells/*/checkpoint/*.safetensors")) and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        os.kill(_worker(running.pid, rank), signal.SIGKILL)
        _, errors = running.communicate(timeout=60)
    return running.returncode, errors


_ENDLESS = """
task: classification
name: test
output: {output}
backbone: {{name: tiny, pretrained: random}}
learner: {{name: coop, context_length: 2}}
data: {{name: digits, validate_on: none}}
train: {{epochs: 100000, lr: 0.05, batch_size: 16, checkpoint_seconds: 0}}
protocol: {{shots: [2], seeds: [1]}}
"""


def _worker(launcher: int, rank: int) -> int:
    """Return the process of a ``torchrun`` that has a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        facts = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in facts:
            return int(child)
    raise ProcessLookupError(f"no process of rank {rank} among {children}")


def rows() -> Work:
    """Rows of several types, of more and of fewer units than processes; and a mistake that one process makes."""
    found = {}
    for samples, unit in ((11, 2), (3, 4), (8, 4)):

        def work(part: range) -> list[Tensor]:
            numbers = torch.tensor(list(part))
            return [
                numbers.float().sqrt()[:, None] * torch.ones(3),
                numbers % 2 == 0,
                numbers.half()[:, None, None],
            ]

        with shared_work():
            tensors = share_rows(samples, unit, work)
        found |= {f"{samples}/{number}": tensor for number, tensor in enumerate(tensors)}

    def mistaken(part: range) -> list[Tensor]:
        if 7 in part:
            raise DataError("number 7 can't be read.")
        return [torch.tensor(list(part))]

    message = ""
    try:
        with shared_work():
            share_rows(8, 1, mistaken)
    except VLPromptError as error:
        message = str(error)
    return {**found, "message": torch.tensor(list(message.encode()))}


LEARNERS = {
    "coop": {"context_length": 4},
    "coop (class_specific)": {"context_length": 2, "class_specific": True},
    "kgcoop": {},
    "prograd": {},
    "maple": {},
}
CLASSES = 131  # at least 64 for each of two processes, and an odd number


def classes() -> Work:
    """What learners of text prompts learn in some steps, and how many sentences a process encoded in one."""
    backbone = create_backbone("tiny", "random")
    names = [f"{first} {second}" for first in ("red", "blue", "old") for second in _WORDS][:CLASSES]
    generator = torch_rng(0, "ranks")
    labels = torch.randint(CLASSES, (20,), generator=generator)
    images = torch.randn(20, 3, *backbone.image_size, generator=generator)
    found = {}

    for label, options in LEARNERS.items():
        learner = create_learner(label.split(" (")[0], backbone, names, **options)
        encoded: list[int] = []
        found |= {f"{label}/{name}": t for name, t in _trained(learner, images, labels, encoded).items()}
        found[f"encoded/{label}"] = torch.tensor(encoded)
    return found


_WORDS = [
    a + b
    for a in ("ba", "do", "ki", "mu", "re")
    for b in ("n", "lo", "sa", "tik", "r", "ve", "go", "p", "ma")
]


def _trained(learner: Learner, images: Tensor, labels: Tensor, encoded: list[int]) -> Work:
    run = learner.backbone.text.run

    def counted(layout, *arguments):  # type: ignore[no-untyped-def]
        if division() is not None and torch.is_grad_enabled():
            encoded.append(len(layout))
        return run(layout, *arguments)

    batch = {"image": images, "label": labels}
    if learner.static_images:
        batch = {"embedding": learner.embed_images(images), "label": labels}
    options = TrainOptions(
        epochs=3, batch_size=5, lr=0.01, accumulation=2, schedule="constant", warmup_epochs=0
    )
    batches = TensorBatches({name: [tensor] for name, tensor in batch.items()}, 5, 1)

    learner.backbone.text.run = counted  # type: ignore[method-assign]
    try:
        Trainer(learner, batches, options, callbacks=[]).run()
    finally:
        del learner.backbone.text.run
    return {name: tensor.clone() for name, tensor in learner.trainable_state().items()}


def scores() -> Work:
    """Logits of learners that leave the image tower alone and that do not, and how many images a process encoded."""
    backbone = create_backbone("tiny", "random")
    data = load_dataset("digits", "test").subset(range(23))
    seen: list[int] = []
    encode = backbone.vision.encode

    def watched(x: Images, *rest: Any) -> Tensor:
        rows = x if isinstance(x, Tensor) else x.tokens
        seen.append(len(rows.unique(dim=0)))  # a batch is filled up with images that are in it already
        return encode(x, *rest)

    backbone.vision.encode = watched  # type: ignore[method-assign]

    found = {}
    for name in ("zero_shot", "vpt"):
        seen.clear()
        learner = create_learner(name, backbone, data.classnames)
        with shared_work():
            cache = FeatureCache()
            found[name], found[f"{name}/labels"] = predict_logits(learner, data, batch_size=4, cache=cache)
            predict_logits(learner, data, batch_size=4, cache=cache)
        found[f"{name}/encoded"] = torch.tensor(sum(seen))
    return found


def adapted() -> Work:
    """Predictions of methods that take every image alone, and of one that learns from the stream."""
    backbone = create_backbone("tiny", "random")
    data = load_dataset("scenes/kind", "val").subset(range(10))
    found = {}
    for names in (("zero", "tpt"), ("tda",)):
        adapters = {n: create_adapter(n, backbone, data.classnames, views=4, share=0.5) for n in names}
        with shared_work():
            predictions = adapt_dataset(adapters, data, batch_size=3)
        for name in names:
            found |= {f"{name}/probs": predictions[name].probs, f"{name}/kept": predictions[name].kept}
    return found


def trained() -> Work:
    """A whole fit with validation, whose embeddings are shared."""
    backbone = create_backbone("tiny", "random")
    train = load_dataset("digits", "train", shots=2, seed=1)
    held = load_dataset("digits", "val", shots=2, seed=1)
    learner = create_learner("coop", backbone, train.classnames, context_length=2)
    with shared_work():
        result = fit(learner, train, held, epochs=3, batch_size=8, lr=0.05, select="best", callbacks=())
    figures = [value for key, value in sorted(result.metrics.items()) if key.startswith("val/")]
    return {"context": learner.trainable_state()["context"].clone(), "figures": torch.tensor(figures)}


def memories() -> Work:
    """What every process has learned with a memory of image tokens, one row for each."""
    backbone = create_backbone("tiny", "random")
    generator = torch_rng(0, "memories")
    images = torch.randn(10, 3, *backbone.image_size, generator=generator)
    names = [f"red {word}" for word in _WORDS[:4]]
    learner = create_learner("coop", backbone, names, context_length=2, plugins=["text_refiner"])
    learned = _trained(learner, images, torch.arange(10) % 4, [])
    with shared_work():
        rows = share_rows(process_count(), 1, lambda _: [tensor[None] for tensor in learned.values()])
    return dict(zip(learned, rows, strict=True))


WORKS: dict[str, Callable[[], Work]] = {
    work.__name__: work for work in (rows, classes, scores, adapted, trained, memories)
}


def main() -> None:
    """Do all work in a process of ``torchrun``."""
    torch.use_deterministic_algorithms(True)
    state = process_state()
    assert process_count() == state.num_processes == int(os.environ["WORLD_SIZE"])
    result = {f"{name}/{key}": tensor for name, work in WORKS.items() for key, tensor in work().items()}
    if state.is_main_process:
        write_tensors(Path(sys.argv[1]), {key: tensor.contiguous() for key, tensor in result.items()}, {})
    state.wait_for_everyone()


if __name__ == "__main__":
    main()
