"""The one training loop: everything that learns here, learns through it.

A learner says what its losses are; when parameters are updated, on which samples, in which precision, over
how many processes, and how a run survives a kill is decided here and nowhere else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from vlprompt.core.errors import NonFiniteError, VLPromptError
from vlprompt.core.processes import accelerator as default_accelerator
from vlprompt.core.seeding import derive_seed
from vlprompt.training.batches import Batch, Batches, prefetch
from vlprompt.training.callbacks import Callback
from vlprompt.training.options import TrainOptions
from vlprompt.training.schedule import learning_rate, stops
from vlprompt.training.state import Progress, load_checkpoint, save_checkpoint

__all__ = ["Trainable", "Trainer"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainable(Protocol):
    """What the trainer asks of a module (every learner fulfils it)."""

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return named scalar losses; their sum is minimised. Each is a mean over the batch's samples."""

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the learnable tensors by name."""

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put learnable tensors back, strictly."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """As :meth:`torch.nn.Module.named_parameters`."""

    def train(self, mode: bool = True) -> Any:
        """As :meth:`torch.nn.Module.train`."""

    # A module may also define any of these (see Learner, which documents them):
    #   combine_gradients(gradients), after_epoch(epoch, epochs), after_training(),
    #   running_state(), load_running_state(state)
    # and, which no learner needs but what wraps one may (see vlprompt.classification.gram and vlprompt.meta):
    #   transform_gradients(gradients): once per step, from what the optimiser would read (by name; of the whole
    #       batch, unscaled, clipped) to what it reads.
    #   parameter_groups() -> list of {"names": [...], "rate": a multiple of the learning rate, and options of
    #       torch's optimiser}; all names together are all that is learned.


class Trainer:
    """Trains a module on batches.

    Gradients are averaged over processes by hand after the backward pass instead of through
    ``DistributedDataParallel``: what is learned here is small, and a learner may run several backward passes.

    Args:
        module: What learns.
        batches: Where its batches come from.
        options: See :class:`TrainOptions`.
        folder: Where ``checkpoint/`` is kept; None keeps nothing.
        validate: Called every ``options.eval_every`` epochs; returns metrics on validation data, never on
            test data.
        callbacks: See :class:`Callback`.
        identity: Facts that a resumed run must share (data, backbone, learner), beside the options.
        accelerator: Processes and device; a default one if None.

    Raises:
        VLPromptError: If nothing in the module learns, or the options watch a validation that isn't there.
    """

    def __init__(
        self,
        module: Trainable,
        batches: Batches,
        options: TrainOptions,
        folder: Path | None = None,
        validate: Callable[[], Mapping[str, float]] | None = None,
        callbacks: Sequence[Callback] = (),
        identity: Mapping[str, Any] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.module, self.batches, self.options, self.validate = module, batches, options, validate
        self.folder = Path(folder) / "checkpoint" if folder is not None else None
        self.accelerator = accelerator or default_accelerator()
        self.callbacks = list(callbacks) if self.accelerator.is_main_process else []
        self.identity = {"options": options.model_dump(mode="json"), **(identity or {})}
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise VLPromptError(
                f"{type(module).__name__} has no learnable parameter: there is nothing to train."
            )
        if validate is None and (options.schedule == "plateau" or options.stop_patience is not None):
            raise VLPromptError(
                "schedule plateau and stop_patience watch validation data, and this run has none. Give it some, or "
                "use schedule cosine and no stop_patience."
            )
        self.optimizer = _build_optimizer(self._groups(), options)
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=options.precision == "fp16")
        self.progress = Progress()
        self.best_state: dict[str, Tensor] | None = None

    def run(self, resume: bool = False) -> Progress:
        """Train to the last epoch and leave the selected weights in the module.

        Args:
            resume: Continue from the checkpoint in the folder if there is one.

        Raises:
            NonFiniteError: A loss or gradient is NaN or infinite; the last checkpoint stays as it was.
            CheckpointError: The checkpoint is damaged or belongs to another run.
        """
        if resume:
            self._restore()
        self._saved_at = time.monotonic()
        self._notify("on_start")
        try:
            while not self._finished():
                self._run_epoch()
        finally:
            self._notify("on_end")
        self._hook("after_training")
        if self.best_state is not None:
            self.module.load_trainable_state(self.best_state)
        return self.progress

    def _finished(self) -> bool:
        done = self.progress
        return done.epoch >= self.options.epochs or (done.step == 0 and stops(self.options, done.history))

    def _run_epoch(self) -> None:
        epoch, started = self.progress.epoch, time.monotonic()
        plan = self.batches.plan(epoch)
        self.module.train(True)
        parts = [part for batch in plan[self.progress.step :] for part, _ in self._my_parts(batch)]
        fetched = prefetch(self.batches, parts, epoch)
        lr = 0.0
        for step in range(self.progress.step, len(plan)):
            lr = learning_rate(self.options, epoch, step, len(plan), self.progress.history)
            losses = self._step(fetched, plan[step], epoch, step, lr)
            self.progress.step = step + 1
            _add(self.progress.sums, losses, len(plan[step]))
            self._notify("on_step", losses)
            if step + 1 < len(plan) and time.monotonic() - self._saved_at > self.options.checkpoint_seconds:
                started = self._count_time(started)
                self._save()
        self._count_time(started)
        self._finish_epoch(lr)

    def _finish_epoch(self, lr: float) -> None:
        done, sums = self.progress, self.progress.sums
        samples = sums.pop("samples", 0.0) or 1.0
        record: dict[str, Any] = {"epoch": done.epoch, "lr": lr, **{k: v / samples for k, v in sums.items()}}
        last = done.epoch + 1 == self.options.epochs
        self._hook("after_epoch", done.epoch, self.options.epochs)
        if self.validate is not None and (last or (done.epoch + 1) % self.options.eval_every == 0):
            self.module.train(False)
            with torch.no_grad():
                record |= {f"val/{k}": v for k, v in self.validate().items()}
            self._check_watched(record)
            self._keep_best(record)
        done.history.append(record)
        done.epoch, done.step, done.sums = done.epoch + 1, 0, {}
        self._notify("on_epoch", record)
        if self._finished() or time.monotonic() - self._saved_at > self.options.checkpoint_seconds:
            self._save()

    def _step(
        self, fetched: Iterator[Batch], samples: np.ndarray, epoch: int, step: int, lr: float
    ) -> dict[str, float]:
        # Seeded by position, so that dropout after a resume is what it would have been without the kill.
        torch.manual_seed(derive_seed(self.options.seed, "step", epoch, step, self.accelerator.process_index))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        separate: dict[str, list[Tensor]] = {}
        for _, share in self._my_parts(samples):
            batch = _to_device(next(fetched), self.accelerator.device)
            with self._autocast():
                losses = {name: value * share for name, value in self.module.loss(batch).items()}
            total = torch.stack(list(losses.values())).sum()
            self._backward(losses, total, separate)
            for name, value in {**losses, "loss": total}.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()
        self._reduce(totals, separate)
        if separate:
            self._combine(separate)
        values = {name: float(value) for name, value in totals.items()}
        self._check_finite(values, epoch, step)
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        if self.options.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.options.grad_clip)
        self._transform()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values

    def _my_parts(self, samples: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """Cut a global batch into ``accumulation`` parts per process and return this process's with their shares.

        Shares are by samples: unequal parts would otherwise change the mean that one process would compute. A
        process that gets no sample of a small batch still takes part, with a share of zero, since all must
        meet to add up.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        parts = np.array_split(samples, world * self.options.accumulation)[rank::world]
        return [(p, len(p) / len(samples)) for p in parts if len(p)] or [(samples[:1], 0.0)]

    def _backward(self, losses: dict[str, Tensor], total: Tensor, separate: dict[str, list[Tensor]]) -> None:
        """Add this part's gradients to the parameters, or to one list per loss if the module combines them itself."""
        if not hasattr(self.module, "combine_gradients"):
            self.scaler.scale(total).backward()
            return
        parameters = list(self.parameters.values())
        for left, (name, value) in zip(range(len(losses))[::-1], losses.items(), strict=True):
            # A loss that nothing learnable enters (a weight of zero, a frozen term) has no graph at all.
            found: Sequence[Tensor | None] = [None] * len(parameters)
            if value.requires_grad:
                scaled = self.scaler.scale(value)
                found = torch.autograd.grad(scaled, parameters, retain_graph=left > 0, allow_unused=True)
            gradients = [
                torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)
            ]
            held = separate.get(name)
            separate[name] = (
                gradients if held is None else [a + b for a, b in zip(held, gradients, strict=True)]
            )

    def _combine(self, separate: dict[str, list[Tensor]]) -> None:
        """Let the module make one gradient of several; whole-batch gradients, whatever the parts and processes."""
        scale = (
            self.scaler.get_scale()
        )  # 1 unless float16: the module sees true gradients, the scaler scaled ones
        if scale != 1:
            separate = {name: [g / scale for g in gradients] for name, gradients in separate.items()}
        combined = self.module.combine_gradients(separate)  # type: ignore[attr-defined]
        for parameter, gradient in zip(self.parameters.values(), combined, strict=True):
            parameter.grad = gradient * scale if scale != 1 else gradient

    def _transform(self) -> None:
        """Let the module change what the optimiser is about to read."""
        if hasattr(self.module, "transform_gradients"):
            found = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
            for name, gradient in self.module.transform_gradients(found).items():
                self.parameters[name].grad = gradient

    def _groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups: one, unless the module makes them."""
        groups = self._hook("parameter_groups") or [{"names": list(self.parameters)}]
        return [
            {
                "params": [self.parameters[n] for n in group["names"]],
                **{k: v for k, v in group.items() if k != "names"},
            }
            for group in groups
        ]

    def _reduce(self, totals: dict[str, Tensor], separate: dict[str, list[Tensor]]) -> None:
        """Sum gradients and losses over processes; the parts' weights already add up to one."""
        if self.accelerator.num_processes == 1:
            return
        for name in sorted(separate):
            separate[name] = [self.accelerator.reduce(g, reduction="sum") for g in separate[name]]
        for parameter in self.parameters.values() if not separate else ():
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(gradient, reduction="sum")
        for name in sorted(totals):
            totals[name] = self.accelerator.reduce(totals[name], reduction="sum")

    def _check_finite(self, losses: Mapping[str, float], epoch: int, step: int) -> None:
        where = f"at epoch {epoch}, step {step}"
        if bad := [name for name, value in losses.items() if not np.isfinite(value)]:
            raise NonFiniteError(
                f"loss {bad[0]!r} is {losses[bad[0]]} {where} (lr {self.optimizer.param_groups[0]['lr']:.3g}). "
                "The last checkpoint is kept. A lower train.lr or train.grad_clip usually helps."
            )
        if self.scaler.is_enabled():  # float16 overflows are the scaler's to skip
            return
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values()))) if gradients else torch.zeros(1)
        if not bool(torch.isfinite(norms).all()):
            name = list(gradients)[int((~torch.isfinite(norms)).nonzero()[0])]
            raise NonFiniteError(
                f"the gradient of {name!r} is not finite {where}. The last checkpoint is kept."
            )

    def _check_watched(self, record: Mapping[str, Any]) -> None:
        """Refuse options that name a figure which validation doesn't give."""
        watched = {"select_metric": self.options.select == "best"}
        watched["monitor"] = self.options.schedule == "plateau" or self.options.stop_patience is not None
        known = sorted(k.removeprefix("val/") for k in record if k.startswith("val/"))
        for option, used in watched.items():
            name = getattr(self.options, option)
            if used and name not in known:
                raise VLPromptError(f"{option} {name!r} is not validated; known: {known}.")

    def _keep_best(self, record: Mapping[str, Any]) -> None:
        if self.options.select != "best":
            return
        key = f"val/{self.options.select_metric}"
        if self.progress.best is None or record[key] > self.progress.best:
            self.progress.best, self.progress.best_epoch = float(record[key]), self.progress.epoch
            self.best_state = {n: t.detach().clone() for n, t in self.module.trainable_state().items()}

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self.folder is not None and self.accelerator.is_main_process:
            states = {
                "weights": self.module.trainable_state(),
                "best": self.best_state or {},
                "running": self._hook("running_state") or {},
            }
            scaler = self.scaler.state_dict()
            save_checkpoint(self.folder, self.progress, states, self.optimizer, self.identity, scaler)

    def _restore(self) -> None:
        loaded = (
            load_checkpoint(self.folder, self.optimizer, self.identity) if self.folder is not None else None
        )
        if loaded is None:
            return
        self.progress, states, scaler = loaded
        self.module.load_trainable_state(states["weights"])
        self.best_state = states["best"] or None
        self._hook("load_running_state", states["running"])
        if scaler:
            self.scaler.load_state_dict(scaler)

    def _count_time(self, started: float) -> float:
        now = time.monotonic()
        self.progress.seconds += now - started
        return now

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _DTYPES.get(self.options.precision)
        return torch.autocast(self.accelerator.device.type, dtype) if dtype else contextlib.nullcontext()

    def _hook(self, name: str, *arguments: Any) -> Any:
        """Call an optional method of the module."""
        method = getattr(self.module, name, None)
        return None if method is None else method(*arguments)

    def _notify(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)


def _build_optimizer(parameters: list[dict[str, Any]], options: TrainOptions) -> torch.optim.Optimizer:
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
    return torch.optim.AdamW(
        parameters, lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _add(sums: dict[str, float], losses: Mapping[str, float], samples: int) -> None:
    for name, value in losses.items():
        sums[name] = sums.get(name, 0.0) + value * samples
    sums["samples"] = sums.get("samples", 0.0) + samples
