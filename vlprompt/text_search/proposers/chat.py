"""Proposals of a language model behind OpenAI's chat protocol: IPO.

Paper: Du et al., "IPO: Interpretable Prompt Optimization for Vision-Language Models", NeurIPS 2024, arXiv 2410.15397.

Where this differs from the paper: one request brings all templates of a step, validation samples choose (the paper
takes the most accurate on the training samples), and a reply without a template is asked for again. The published code
carries no licence; nothing is taken from it.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

from pydantic import Field

from vlprompt.text_search.conversation import conversation, parse_reply, request_text
from vlprompt.text_search.endpoint import ChatEndpoint
from vlprompt.text_search.proposers import PROPOSERS
from vlprompt.text_search.proposers.base import Proposal, Proposer, Request

__all__ = ["Chat"]

_LONGEST_PAUSE = 8.0  # seconds


@PROPOSERS.register(
    "chat", summary="a language model behind OpenAI's chat protocol (IPO)", paper="2410.15397", needs=("llm",)
)
class Chat(Proposer):
    """Asks a chat model for better templates, showing it the best so far.

    Failed requests are sent again by the client, with growing pauses; a reply without a template is asked for again by
    ``attempts``, with pauses of ``pause`` seconds that double. Everything is in the transcript before anything else
    happens.

    Args:
        model: Its name on the server.
        base_url: Of the server, for example ``http://localhost:11434/v1``; empty: OpenAI's.
        key_variable: Environment variable that holds the key; empty: the server asks for none.
        temperature: Of the sampling.
        max_output: Tokens of a reply.
        limit_name: What the server calls that limit.
        timeout: Seconds until a request counts as failed.
        max_retries: How often a failed request is sent again.
        attempts: How often a step asks until a reply holds a template.
        pause: Seconds before it asks a second time.
        history: How many of the best templates the model is shown.
        prices: Of a million tokens that are read, and that are written, in any currency.
    """

    reads_notes = True

    def __init__(
        self,
        *,
        model: str,
        base_url: str = "",
        key_variable: str = "OPENAI_API_KEY",
        temperature: Annotated[float, Field(ge=0, le=2)] = 1.0,
        max_output: Annotated[int, Field(ge=1)] = 400,
        limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        timeout: Annotated[float, Field(gt=0)] = 60.0,
        max_retries: Annotated[int, Field(ge=0)] = 5,
        attempts: Annotated[int, Field(ge=1)] = 3,
        pause: Annotated[float, Field(ge=0)] = 1.0,
        history: Annotated[int, Field(ge=0)] = 20,
        prices: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 0.0),
    ) -> None:
        self.endpoint = ChatEndpoint(
            model,
            base_url,
            key_variable,
            temperature,
            max_output,
            limit_name,
            timeout,
            max_retries,
            (prices[0], prices[1]),
        )
        self.attempts = attempts
        self.pause = pause
        self.history = history
        self.identity = f"chat {self.endpoint.identity}, {history} of history"

    def propose(self, request: Request) -> Proposal:
        """See :meth:`Proposer.propose`."""
        answered = [exchange for exchange in request.past if not exchange.error]
        for exchange in answered:
            if texts := parse_reply(exchange.reply):
                return Proposal(texts[: request.count])

        messages = conversation(request, self.history)
        text = request_text(messages)
        for attempt in range(len(answered), self.attempts):
            if attempt:
                time.sleep(min(self.pause * 2 ** (attempt - 1), _LONGEST_PAUSE))

            exchange = self.endpoint.ask(
                messages,
                text,
                step=request.step,
                seed=int(request.rng.integers(1 << 31)),
                budget=request.budget,
                keep=request.keep,
            )
            if texts := parse_reply(exchange.reply):
                return Proposal(texts[: request.count])
        return Proposal(())
