"""A server that speaks OpenAI's chat protocol: the one place that sends anything over a network.

The client is OpenAI's own; vLLM, Ollama and llama.cpp serve the same protocol. The client repeats failed requests with
growing pauses. The key is read from an environment variable and is never written anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from vlprompt.core.errors import ConfigError, VLPromptError, first_line
from vlprompt.text_search.budget import Budget, BudgetSpentError, Usage
from vlprompt.text_search.transcript import Exchange

__all__ = ["ChatEndpoint", "Message"]

Message = dict[str, Any]
"""``role`` and ``content``, as the protocol has them."""

_NO_KEY = "none"  # local servers ask for no key, but the client sends one
_CHARACTERS = 2  # at least so many make a token of ordinary text
_MILLION = 1_000_000
_MOST_TOKENS = 10**12  # of one request; what a server counts beyond is no count


@dataclass(frozen=True)
class ChatEndpoint:
    """Where requests go, and how.

    Attributes:
        model: Its name on the server.
        base_url: Of the server; empty: OpenAI's.
        key_variable: Environment variable that holds the key; empty: the server asks for none.
        temperature: Of the sampling.
        max_output: Tokens of a reply.
        limit_name: What the server calls that limit: newer models of OpenAI take ``max_completion_tokens`` alone.
        timeout: Seconds until a request counts as failed.
        max_retries: How often a failed request is sent again, with growing pauses.
        prices: Of a million tokens that are read, and that are written.

    Raises:
        ConfigError: If the address is none, or holds a password or a query, in which keys may stand.
    """

    model: str
    base_url: str = ""
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 1.0
    max_output: int = 400
    limit_name: str = "max_tokens"
    timeout: float = 60.0
    max_retries: int = 5
    prices: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            is_address = not self.base_url or (
                parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            )
        except ValueError:  # a port or an address in brackets that can't be
            is_address = False
        if not is_address or re.search(r"\s", self.base_url):
            raise ConfigError(
                [
                    f"base_url: {self.base_url!r} is no address of a server, for example http://localhost:11434/v1."
                ],
                "endpoint",
            )
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                ["base_url: it holds a user or a query, which may be a key, and configurations are written. Put the "
                 "key into an environment variable and name that: key_variable."], "endpoint",
            )  # fmt: skip

    @property
    def identity(self) -> str:
        """What it is, without anything secret."""
        where = urlsplit(self.base_url).netloc or "api.openai.com"
        return f"{self.model} at {where}, temperature {self.temperature:g}"

    def ask(
        self,
        messages: Sequence[Message],
        text: str,
        *,
        step: int,
        seed: int,
        budget: Budget,
        keep: Callable[[Exchange], None],
    ) -> Exchange:
        """Send a request, count and record it, and return it with its reply.

        Args:
            messages: The conversation.
            text: The request as the transcript has it.
            step: That it belongs to.
            seed: Sent to the server, which may heed it.
            budget: Checked before, charged after.
            keep: Records the exchange.

        Raises:
            BudgetSpentError: If the request could exceed the budget.
            VLPromptError: If the server does not answer after all repetitions, or refuses; it is recorded.
        """
        reads = sum(len(str(message["content"])) for message in messages) // _CHARACTERS
        budget.admit(reads + self.max_output, self._price(reads, self.max_output))
        retries = self.max_retries
        if budget.requests_left is not None:
            retries = min(retries, budget.requests_left - 1)

        client = self._client()
        failure: Exception | None = None
        response: Any = None
        try:
            response = client.send(self, messages, seed, retries)
        except client.garbage:  # an answer, but no completion: it is for the proposer to ask again
            pass
        except client.errors as error:
            failure = error

        reply = "" if failure is not None else _content(response)
        reason = "" if failure is None else type(failure).__name__
        usage = self._usage(response, client.sent, reads, reply)
        exchange = Exchange(step, text, client.clean(reply), usage, reason)
        budget.spend(usage)
        keep(exchange)

        if failure is not None:
            out_of_requests = retries < self.max_retries and budget.requests_left == 0
            if out_of_requests and not client.is_refusal(failure):
                raise BudgetSpentError(f"{budget.max_requests} requests") from None
            raise VLPromptError(self._failure(client.clean(_reason(failure)), client.sent)) from None
        return exchange

    def _client(self) -> _Client:
        try:
            import openai
        except ImportError:
            raise VLPromptError(
                "asking a language model over a network needs the package openai: pip install 'vlprompt[llm]'."
            ) from None

        key = _NO_KEY
        if self.key_variable:
            key = os.environ.get(self.key_variable, "")
            if not key:
                raise VLPromptError(
                    f"the environment variable {self.key_variable} holds no key for {self.identity}. Set it, or write "
                    "key_variable='' for a server that asks for none."
                )
            if not re.fullmatch(r"[!-~]+", key):
                raise VLPromptError(
                    f"the environment variable {self.key_variable} holds no key: keys have no spaces, line breaks or "
                    "letters beyond ASCII."
                )
        return _Client(openai, key, self.base_url or None, self.timeout)

    def _usage(self, response: Any, sent: int, reads: int, reply: str) -> Usage:
        """Return what a request cost; estimated from characters where the server does not say."""
        if response is None:
            return Usage(requests=sent)

        counts = _counts(response)
        if counts is None:
            counts = (reads, len(reply) // _CHARACTERS)
            return Usage(sent, *counts, self._price(*counts), estimated=True)
        return Usage(sent, *counts, self._price(*counts))

    def _price(self, reads: int, writes: int) -> float:
        return (reads * self.prices[0] + writes * self.prices[1]) / _MILLION

    def _failure(self, reason: str, sent: int) -> str:
        return (
            f"{self.identity} did not answer in {sent} requests: {reason} Nothing is lost: what was asked and scored "
            "stands in the transcript, and the same command goes on from there. timeout, max_retries, base_url and "
            "key_variable are set in proposer_options."
        )


class _Client:
    """OpenAI's client for one request, with a count of what it really sends."""

    def __init__(self, openai: Any, key: str, base_url: str | None, timeout: float) -> None:
        self.sent = 0
        self.garbage: tuple[type[Exception], ...] = (
            ValueError,
            RecursionError,
            openai.APIResponseValidationError,
        )
        self.errors: tuple[type[Exception], ...] = (openai.OpenAIError,)
        self._key = key
        self._openai = openai

        def count(_: Any) -> None:
            self.sent += 1

        try:
            # A request that is sent elsewhere would be one more than was admitted.
            http = openai.DefaultHttpxClient(event_hooks={"request": [count]}, follow_redirects=False)
            http.send = _in_time(http.send, timeout)
            self._client = openai.OpenAI(api_key=key, base_url=base_url, timeout=timeout, http_client=http)
        except (
            ValueError,
            openai.OpenAIError,
        ) as error:  # for example a proxy in the environment that is none
            raise VLPromptError(f"no connection can be made: {first_line(error)}") from None

    def send(self, endpoint: ChatEndpoint, messages: Sequence[Message], seed: int, retries: int) -> Any:
        """Return the server's response."""
        limit: Mapping[str, Any] = {endpoint.limit_name: endpoint.max_output}
        with self._client.with_options(max_retries=retries) as client:
            return client.chat.completions.create(
                model=endpoint.model,
                messages=list(messages),
                temperature=endpoint.temperature,
                seed=seed % (1 << 31),
                **limit,
            )

    def is_refusal(self, error: Exception) -> bool:
        """Return whether the server answered that it will not, so that asking again is useless."""
        refusals = (
            self._openai.AuthenticationError,
            self._openai.BadRequestError,
            self._openai.NotFoundError,
            self._openai.PermissionDeniedError,
        )
        return isinstance(error, refusals)

    def clean(self, text: str) -> str:
        """Return text without the key, which a server may repeat."""
        return text if self._key == _NO_KEY else text.replace(self._key, "[key]")


def _in_time(send: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Return what sends a request and gives it up after some seconds, also where a byte comes now and then.

    The client's own limit is for the wait until the next byte: a server that sends one in each second holds it for
    ever. What was given up ends with the client, which closes its connections.
    """
    import httpx  # of openai's package

    def send_in_time(request: Any, **options: Any) -> Any:
        answers: Queue[Any] = Queue()

        def work() -> None:
            try:
                answers.put(send(request, **options))
            except Exception as error:  # goes on in the thread that waits
                answers.put(error)

        Thread(target=work, daemon=True).start()
        try:
            answer = answers.get(timeout=seconds)
        except Empty:
            raise httpx.ReadTimeout(f"no whole answer in {seconds:g} s", request=request) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    return send_in_time


def _reason(error: Exception) -> str:
    """Return why a request failed; a client's own sentence may say no more than that it did."""
    text = first_line(error)
    if error.__cause__ is None:
        return text
    cause = first_line(error.__cause__) if isinstance(error.__cause__, Exception) else ""
    return f"{text.rstrip('.')} ({cause})." if cause else text


def _content(response: Any) -> str:
    """Return the text of a reply; empty if what came back is no chat completion."""
    try:
        content = response.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        return ""
    if not isinstance(content, str):
        return ""
    return content.encode("utf-8", "replace").decode(
        "utf-8"
    )  # JSON may hold half a character, which no file takes


def _counts(response: Any) -> tuple[int, int] | None:
    """Return the tokens that were read and written; None if the server does not say."""
    try:
        counts = (response.usage.prompt_tokens, response.usage.completion_tokens)
    except AttributeError:
        return None
    return counts if all(type(count) is int and 0 <= count < _MOST_TOKENS for count in counts) else None
