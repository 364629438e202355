"""Proposals of a language model in a folder, run by transformers: IPO without a server."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field

from vlprompt.core.errors import ConfigError, VLPromptError, first_line
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import derive_seed
from vlprompt.text_search.budget import Usage
from vlprompt.text_search.conversation import conversation, parse_reply, request_text
from vlprompt.text_search.proposers import PROPOSERS
from vlprompt.text_search.proposers.base import Proposal, Proposer, Request
from vlprompt.text_search.transcript import Exchange

__all__ = ["Local"]


@PROPOSERS.register(
    "local",
    summary="a language model in a folder, by transformers (IPO)",
    paper="2410.15397",
    needs=("transformers",),
)
class Local(Proposer):
    """Asks a causal language model of transformers, with its chat template where it has one.

    No code of the folder is run, and nothing is downloaded. Sampling is seeded by step and attempt, so that the same
    search draws the same replies on the same machine.

    Args:
        path: Folder of model and tokenizer, as transformers writes them.
        temperature: Of the sampling; 0 takes the likeliest token.
        max_output: Tokens of a reply.
        attempts: How often a step asks until a reply holds a template.
        history: How many of the best templates the model is shown.

    Raises:
        ConfigError: If there is no such folder.
    """

    reads_notes = True

    def __init__(
        self,
        *,
        path: str,
        temperature: Annotated[float, Field(ge=0, le=2)] = 1.0,
        max_output: Annotated[int, Field(ge=1)] = 400,
        attempts: Annotated[int, Field(ge=1)] = 2,
        history: Annotated[int, Field(ge=0)] = 20,
    ) -> None:
        self.folder = user_path(path)
        if not self.folder.is_dir():
            raise ConfigError([f"path: there is no folder {str(self.folder)!r}."], "proposer 'local'")

        self.temperature = temperature
        self.max_output = max_output
        self.attempts = attempts
        self.history = history
        self.identity = f"local {self.folder.name}, temperature {temperature:g}, {history} of history"

    def propose(self, request: Request) -> Proposal:
        """See :meth:`Proposer.propose`."""
        for exchange in request.past:
            if texts := parse_reply(exchange.reply):
                return Proposal(texts[: request.count])

        messages = conversation(request, self.history)
        text = request_text(messages)
        seed = int(request.rng.integers(1 << 31))
        for attempt in range(len(request.past), self.attempts):
            request.budget.admit(len(text) // 2 + self.max_output)
            reply, usage = self._reply(messages, derive_seed(seed, "reply", attempt))
            request.budget.spend(usage)
            request.keep(Exchange(request.step, text, reply, usage))
            if texts := parse_reply(reply):
                return Proposal(texts[: request.count])
        return Proposal(())

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        """Tokenizer and model."""
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise VLPromptError(
                "a language model in a folder needs the package transformers: pip install 'vlprompt[segmentation]'."
            ) from None

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                str(self.folder), local_files_only=True, use_safetensors=True
            )
        except Exception as error:  # transformers raises many kinds
            raise VLPromptError(
                f"{self.folder} holds no language model that transformers can read (model.safetensors and a "
                f"tokenizer): {first_line(error)}"
            ) from error
        return tokenizer, model.eval()

    def _reply(self, messages: list[dict[str, str]], seed: int) -> tuple[str, Usage]:
        tokenizer, model = self._model
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            prompt = "\n\n".join(message["content"] for message in messages) + "\n\n"

        ids = tokenizer(prompt, return_tensors="pt").input_ids
        room = int(model.config.max_position_embeddings) - self.max_output
        if room < 1:
            raise VLPromptError(
                f"{self.folder} reads {model.config.max_position_embeddings} tokens, and max_output={self.max_output} "
                "leaves none for the question."
            )
        ids = ids[:, -room:]  # the wish stands at the end

        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_output,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                **sampling,
            )

        written = output[0, ids.shape[1] :]
        usage = Usage(requests=1, input_tokens=ids.shape[1], output_tokens=len(written))
        return tokenizer.decode(written, skip_special_tokens=True), usage
