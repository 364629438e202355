"""The one training loop: everything that learns here, learns through it.

A module says what its losses are (:class:`vlprompt.core.trainable.Trainable`); when parameters are updated, on which
samples, over how many processes, and how a run survives a kill is decided here and nowhere else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from vlprompt.backbones.vision import TokenStates
from vlprompt.core.errors import CheckpointError, NonFiniteError, VLPromptError
from vlprompt.core.paths import user_path
from vlprompt.core.processes import accelerator as default_accelerator
from vlprompt.core.seeding import derive_seed
from vlprompt.core.shares import Division, divided_classes
from vlprompt.core.trainable import Batch, ParameterGroup, Trainable
from vlprompt.data.loading import Loader
from vlprompt.training.batches import Batches, batch_loader
from vlprompt.training.callbacks import Callback
from vlprompt.training.compiled import CompiledLoss
from vlprompt.training.options import TrainOptions
from vlprompt.training.phases import span_at, spans_of
from vlprompt.training.schedule import learning_rate, stops
from vlprompt.training.state import Progress, load_checkpoint, save_checkpoint

__all__ = ["Trainer"]


class Trainer:
    """Trains a module on batches.

    Gradients are averaged over processes by hand after the backward pass instead of through
    ``DistributedDataParallel``: what is learned here is small, and a learner may run several backward passes.

    Args:
        module: What learns.
        batches: Where its batches come from.
        options: See :class:`TrainOptions`.
        folder: Where ``checkpoint/`` is written; None writes nothing.
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
        if options.steps_per_shot is not None:
            raise VLPromptError(
                "steps_per_shot counts the training images of a class, which only training on labelled images knows. "
                "Use train.steps or train.epochs."
            )
        self.epoch_steps = len(batches.plan(0))
        options = options.for_epochs_of(self.epoch_steps)

        self.module = module
        self.batches = batches
        self.options = options
        self.validate = validate
        self.folder = user_path(folder) / "checkpoint" if folder is not None else None
        self.accelerator = accelerator or default_accelerator()
        self.callbacks = list(callbacks) if self.accelerator.is_main_process else []
        self.identity = {"options": options.model_dump(mode="json"), **(identity or {})}

        self.parameters = module.learned_parameters()
        if not self.parameters:
            raise VLPromptError(
                f"{type(module).__name__} has no learnable parameter: there is nothing to train."
            )
        if validate is None and (options.schedule == "plateau" or options.stop_patience is not None):
            raise VLPromptError(
                "schedule plateau and stop_patience watch validation data, and this run has none. Give it some, or "
                "use schedule cosine and no stop_patience."
            )
        if validate is None and options.select == "best":
            raise VLPromptError(
                "select best chooses the epoch on validation data, and this run has none. Give it some, or write "
                "train.select=last."
            )

        self.spans = spans_of(module.phases(), options.steps or options.epochs * self.epoch_steps)
        self._entered: int | None = None  # the phase that the module was told of last
        self.loss = CompiledLoss(module) if options.compile else module.loss
        self.optimizer = _build_optimizer(self._optimizer_groups(), options)
        self.device = next(iter(self.parameters.values())).device
        # Small gradients would vanish on their way through frozen layers in float16, whose smallest number is 6e-8.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=module.precision == "fp16")
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

        with contextlib.ExitStack() as ends:
            for callback in self.callbacks:
                ends.callback(callback.on_end, self)
                callback.on_start(self)
            self._agree_on_stop()
            with self._make_loader() as self._loader:
                while not self._finished():
                    self._run_epoch()

        self.module.after_training()
        if self.best_state is not None:
            self.module.load_trainable_state(self.best_state)

        return self.progress

    def stop(self) -> None:
        """End the training after this epoch (see :meth:`TrainingView.stop`)."""
        self.progress.stopped = True

    # --- epochs

    def _make_loader(self) -> Loader[tuple[np.ndarray, int], Batch]:
        """Return what loads the batches of all epochs that are left."""
        epochs = self.options.epochs - self.progress.epoch
        steps = len(self._plan(self.progress.epoch)) if epochs else 0
        return batch_loader(
            self.batches,
            expected=epochs * steps * self.options.accumulation,
            pin=self.accelerator.device.type == "cuda",
        )

    def _finished(self) -> bool:
        """Return whether the last epoch is done, or the run stops early."""
        progress = self.progress
        if progress.epoch >= self.options.epochs:
            return True
        return progress.step == 0 and (progress.stopped or stops(self.options, progress.history))

    def _run_epoch(self) -> None:
        """Train the rest of the present epoch, with checkpoints on the way."""
        progress = self.progress
        epoch = progress.epoch
        started = time.monotonic()
        plan = self._plan(epoch)
        self.module.train(True)

        remaining = plan[progress.step :]
        parts = [(part, epoch) for batch in remaining for part, _ in self._process_parts(batch)]
        stream = self._loader.stream(parts)

        lr = 0.0
        for step in range(progress.step, len(plan)):
            lr = self._enter(epoch, step)
            losses = self._step(stream, plan[step], epoch, step, lr)
            progress.step = step + 1
            _add(progress.sums, losses, len(plan[step]))

            for callback in self.callbacks:
                callback.on_step(self, losses)

            if step + 1 < len(plan) and self._checkpoint_is_due():
                started = self._count_time(started)
                self._save()

        self._count_time(started)
        self._finish_epoch(lr)

    def _plan(self, epoch: int) -> Sequence[np.ndarray]:
        """Return the batches of an epoch; the last one ends where ``options.steps`` do."""
        plan = self.batches.plan(epoch)
        if self.options.steps is None:
            return plan
        return plan[: self.options.steps - epoch * self.epoch_steps]

    def _enter(self, epoch: int, step: int) -> float:
        """Tell the module of a phase that begins with this step; return the step's rate."""
        position = epoch * self.epoch_steps + step
        span = span_at(self.spans, position)
        if span.number != self._entered:
            self.module.enter_phase(span.number, position == span.start)
            self._entered = span.number

        history = self.progress.history
        if len(self.spans) == 1:
            return learning_rate(self.options, epoch, step, self.epoch_steps, history)

        of_phase = self.options.model_copy(update={"steps": span.length}).for_epochs_of(self.epoch_steps)
        place = divmod(position - span.start, self.epoch_steps)
        return learning_rate(of_phase, *place, self.epoch_steps, history)

    def _finish_epoch(self, lr: float) -> None:
        """Validate, write the epoch into the history and move on to the next."""
        progress = self.progress
        epoch = progress.epoch
        samples = progress.sums.pop("samples", 0.0) or 1.0
        means = {name: value / samples for name, value in progress.sums.items()}
        record: dict[str, Any] = {"epoch": epoch, "lr": lr, **means}
        self._check_learned(epoch, lr)

        # Before validation, which then sees what the hook has changed.
        self.module.after_epoch(epoch, self.options.epochs)

        is_last = epoch + 1 == self.options.epochs
        if self.validate is not None and (is_last or (epoch + 1) % self.options.eval_every == 0):
            self.module.train(False)
            with torch.no_grad():
                metrics = self.validate()
            record |= {f"val/{name}": value for name, value in metrics.items()}
            self._check_watched(record)
            self._remember_best(record)

        progress.history.append(record)
        progress.epoch = epoch + 1
        progress.step = 0
        progress.sums = {}

        for callback in self.callbacks:
            callback.on_epoch(self, record)
        self._agree_on_stop()
        if self._finished() or self._checkpoint_is_due():
            self._save()

    def _agree_on_stop(self) -> None:
        """Tell the other processes whether a callback, which the main one alone calls, has ended the training."""
        if self.accelerator.num_processes > 1:
            stopped = torch.tensor(float(self.progress.stopped), device=self.accelerator.device)
            self.progress.stopped = bool(self.accelerator.reduce(stopped, reduction="sum"))

    # --- one step

    def _step(
        self, stream: Iterator[Batch], samples: np.ndarray, epoch: int, step: int, lr: float
    ) -> dict[str, float]:
        """Take one optimiser step on a global batch and return its losses."""
        # Seeded by position, so that dropout after a resume is what it would have been without the kill.
        torch.manual_seed(derive_seed(self.options.seed, "step", epoch, step, self.accelerator.process_index))

        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)
        self.optimizer.zero_grad(set_to_none=True)

        totals: dict[str, Tensor] = {}
        separate: dict[str, list[Tensor]] = {}
        for _, share in self._process_parts(samples):
            batch = _to_device(next(stream), self.device)
            with self._division(samples) as division:
                losses = {name: value * share for name, value in self.loss(batch).items()}
            if division is not None:
                losses = division.anchor(losses)

            total = torch.stack(list(losses.values())).sum()
            self._backward(losses, total, separate)
            for name, value in {**losses, "loss": total}.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()

        self._reduce(totals, separate)
        if separate:
            self._combine(separate)
        self._still_the_others()

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

    def _process_parts(self, samples: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """Cut a global batch into ``accumulation`` parts per process and return this process's with their shares.

        Shares are by samples: unequal parts would otherwise change the mean that one process would compute. A
        process that gets no sample of a small batch still takes part, with a share of zero, since all must
        meet to add up.
        """
        world = self.accelerator.num_processes
        rank = self.accelerator.process_index
        parts = np.array_split(samples, world * self.options.accumulation)[rank::world]

        shares = [(part, len(part) / len(samples)) for part in parts if len(part)]
        return shares or [(samples[:1], 0.0)]

    def _backward(self, losses: dict[str, Tensor], total: Tensor, separate: dict[str, list[Tensor]]) -> None:
        """Add a part's gradients to the parameters, or to one list per loss if the module combines them."""
        if not self.module.combines_gradients:
            self.scaler.scale(total).backward()
            return

        parameters = list(self.parameters.values())
        last = len(losses) - 1
        for number, (name, value) in enumerate(losses.items()):
            # A loss that nothing learnable enters (a weight of zero, a frozen term) has no graph at all.
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if value.requires_grad:
                gradients = torch.autograd.grad(
                    self.scaler.scale(value), parameters, retain_graph=number < last, allow_unused=True
                )

            dense = [
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(parameters, gradients, strict=True)
            ]
            earlier = separate.get(name)
            if earlier is not None:
                dense = [a + b for a, b in zip(earlier, dense, strict=True)]
            separate[name] = dense

    def _combine(self, separate: dict[str, list[Tensor]]) -> None:
        """Let the module make one gradient of several; whole-batch gradients, whatever the parts and processes."""
        # Under float16 the scaler has scaled the gradients: the module sees true ones, the optimiser scaled ones.
        scale = self.scaler.get_scale()  # 1 unless float16
        if scale != 1:
            separate = {name: [g / scale for g in gradients] for name, gradients in separate.items()}

        combined = self.module.combine_gradients(separate)
        for parameter, gradient in zip(self.parameters.values(), combined, strict=True):
            parameter.grad = gradient * scale if scale != 1 else gradient

    def _still_the_others(self) -> None:
        """Take the gradients from parameters of other phases: no optimiser moves them, or decays them."""
        moving = self.spans[self._entered or 0].names
        for name, parameter in self.parameters.items():
            if moving and name not in moving:
                parameter.grad = None

    def _transform(self) -> None:
        """Let the module change what the optimiser is about to read."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for name, gradient in self.module.transform_gradients(gradients).items():
            self.parameters[name].grad = gradient

    def _reduce(self, totals: dict[str, Tensor], separate: dict[str, list[Tensor]]) -> None:
        """Sum gradients and losses over processes; the parts' shares already add up to one."""
        if self.accelerator.num_processes == 1:
            return

        for name in sorted(separate):
            separate[name] = [self.accelerator.reduce(g, reduction="sum") for g in separate[name]]
        if not separate:
            for parameter in self.parameters.values():
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = self.accelerator.reduce(gradient, reduction="sum")
        for name in sorted(totals):
            totals[name] = self.accelerator.reduce(totals[name], reduction="sum")

    def _division(self, samples: np.ndarray) -> contextlib.AbstractContextManager[Division | None]:
        """Return the context in which processes divide a step's classes, if all of them take part equally often."""
        world = self.accelerator.num_processes
        if world == 1 or not self.module.divides_classes:
            return contextlib.nullcontext()

        parts = np.array_split(samples, world * self.options.accumulation)
        counts = {max(1, sum(len(part) > 0 for part in parts[rank::world])) for rank in range(world)}
        return divided_classes() if len(counts) == 1 else contextlib.nullcontext()

    def _optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups, with parameters in the place of their names."""
        everything: ParameterGroup = {"names": list(self.parameters)}

        groups = []
        for group in self.module.parameter_groups() or [everything]:
            settings = {key: value for key, value in group.items() if key != "names"}
            groups.append({"params": [self.parameters[name] for name in group["names"]], **settings})
        return groups

    # --- checks

    def _check_finite(self, losses: Mapping[str, float], epoch: int, step: int) -> None:
        """Refuse to go on with a loss or gradient that is NaN or infinite."""
        where = f"at epoch {epoch}, step {step}"

        bad = [name for name, value in losses.items() if not np.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"loss {bad[0]!r} is {losses[bad[0]]} {where} (lr {self.optimizer.param_groups[0]['lr']:.3g}). "
                "The last checkpoint is kept. A lower train.lr or train.grad_clip usually helps."
            )
        if self.scaler.is_enabled():  # float16 overflows are the scaler's to skip
            return

        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values()))) if gradients else torch.zeros(1)
        if not bool(torch.isfinite(norms).all()):
            name = list(gradients)[int((~torch.isfinite(norms)).nonzero()[0])]
            raise NonFiniteError(
                f"the gradient of {name!r} is not finite {where}. The last checkpoint is kept."
            )

    def _check_learned(self, epoch: int, lr: float) -> None:
        """Refuse a parameter that is NaN or infinite: after the last step, no loss comes that would show it."""
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in self.parameters.values()])
        if not bool(finite.all()):
            name = list(self.parameters)[int((~finite).nonzero()[0])]
            raise NonFiniteError(
                f"what {name!r} has learned by the end of epoch {epoch} is not finite (lr {lr:.3g}). The last "
                "checkpoint is kept. A lower train.lr or train.grad_clip usually helps."
            )

    def _check_watched(self, record: Mapping[str, Any]) -> None:
        """Refuse options that name a metric which validation doesn't return."""
        options = self.options
        watched = {}
        if options.select == "best":
            watched["select_metric"] = options.select_metric
        if options.schedule == "plateau" or options.stop_patience is not None:
            watched["monitor"] = options.monitor

        validated = sorted(key.removeprefix("val/") for key in record if key.startswith("val/"))
        for option, name in watched.items():
            if name not in validated:
                raise VLPromptError(f"{option} {name!r} is not validated; known: {validated}.")

    # --- what survives

    def _remember_best(self, record: Mapping[str, Any]) -> None:
        """Copy the weights if this epoch validates better than all before."""
        if self.options.select != "best":
            return

        score = record[f"val/{self.options.select_metric}"]
        if self.progress.best is None or score > self.progress.best:
            self.progress.best = float(score)
            self.progress.best_epoch = self.progress.epoch
            state = self.module.trainable_state()
            self.best_state = {name: tensor.detach().clone() for name, tensor in state.items()}

    def _checkpoint_is_due(self) -> bool:
        return time.monotonic() - self._saved_at > self.options.checkpoint_seconds

    def _save(self) -> None:
        """Write a checkpoint, if there is a folder for it."""
        self._saved_at = time.monotonic()
        if self.folder is None or not self.accelerator.is_main_process:
            return

        states = {
            "weights": self.module.trainable_state(),
            "best": self.best_state or {},
            "running": self.module.running_state(),
        }
        scaler = self.scaler.state_dict()
        save_checkpoint(self.folder, self.progress, states, self.optimizer, self.identity, scaler)

    def _restore(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if self.folder is None:
            return
        loaded = load_checkpoint(self.folder, self.optimizer, self.identity)
        if loaded is None:
            return

        progress, states, scaler = loaded
        if progress.epoch > self.options.epochs:
            raise CheckpointError(
                f"{self.folder} is damaged: epoch is {progress.epoch}, the run has {self.options.epochs}."
            )
        self.progress = progress
        self.module.load_trainable_state(states["weights"])
        self.best_state = states["best"] or None
        self.module.load_running_state(states["running"])
        if scaler:
            self.scaler.load_state_dict(scaler)

    def _count_time(self, started: float) -> float:
        """Add the time since ``started`` to the run's and return the present moment."""
        now = time.monotonic()
        self.progress.seconds += now - started
        return now


def _build_optimizer(groups: list[dict[str, Any]], options: TrainOptions) -> torch.optim.Optimizer:
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
    kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
    return kind(
        groups, lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )


def _to_device(batch: Batch, device: torch.device) -> Batch:
    moved = {}
    for name, value in batch.items():
        is_movable = isinstance(value, Tensor | TokenStates)
        moved[name] = value.to(device, non_blocking=True) if is_movable else value
    return moved


def _add(sums: dict[str, float], losses: Mapping[str, float], samples: int) -> None:
    """Add a step's losses, weighted by its samples."""
    for name, value in losses.items():
        sums[name] = sums.get(name, 0.0) + value * samples
    sums["samples"] = sums.get("samples", 0.0) + samples
