"""Losses through torch.compile, where there is a compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from vlprompt.core.errors import first_line
from vlprompt.core.trainable import Batch, Trainable

__all__ = ["CompiledLoss"]

log = logging.getLogger("vlprompt.training")

Loss = Callable[[Batch], dict[str, Tensor]]


class CompiledLoss:
    """What a module's ``loss`` returns, computed by compiled code from the second call on.

    The first call is the module's own: what it computes once for a whole run (a teacher's class weights, say) belongs
    to no graph. Dropout draws what it draws without compiling. Where there is no compiler, one line says so, and all
    calls are the module's own.

    Args:
        module: What learns.
    """

    def __init__(self, module: Trainable) -> None:
        self.module = module
        self.is_first = True
        self.compiled: Loss | None = torch.compile(module.loss, options={"fallback_random": True})

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """See :meth:`Trainable.loss`."""
        if self.is_first or self.compiled is None:
            self.is_first = False
            return self.module.loss(batch)

        try:
            # The gradients of single losses need one graph several times, so its buffers can't be given away.
            with torch._functorch.config.patch(donated_buffer=not self.module.combines_gradients):
                return self.compiled(batch)
        except TorchDynamoException as error:
            log.warning("train.compile has no effect here, the run goes on without it: %s", first_line(error))
            self.compiled = None
            return self.module.loss(batch)
