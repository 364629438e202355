"""The proposals of an earlier search, from its transcript: the exact rerun, without network."""

from __future__ import annotations

from pathlib import Path

from vlprompt.core.errors import CheckpointError
from vlprompt.core.paths import user_path
from vlprompt.text_search.proposers import PROPOSERS
from vlprompt.text_search.proposers.base import Proposal, Proposer, Request
from vlprompt.text_search.transcript import Step, read_transcript

__all__ = ["Replay"]


@PROPOSERS.register("replay", summary="the proposals of a transcript, again", needs=("transcript",))
class Replay(Proposer):
    """Repeats a search.

    The scorer must be the one of the transcript: same images, labels, class names and backbone, to the bit of the
    embeddings. Then recorded scores are taken as they are. Otherwise the search is refused, unless ``rescore``.

    Args:
        path: The transcript.
        rescore: Whether proposals are scored anew, by whatever scorer there is: on other data, another backbone, or
            another machine, whose embeddings differ in their last bits.

    Raises:
        CheckpointError: If there is no such file, it was changed, or its search did not end.
    """

    reads_notes = True

    def __init__(self, *, path: str, rescore: bool = False) -> None:
        self.path = user_path(path)
        self.rescore = rescore
        self.header, self.steps, self.result = read_transcript(Path(self.path))
        self.identity = f"replay of {self.header.get('proposer')}{' rescored' if rescore else ''}"

    def recorded(self, scorer: str) -> tuple[Step, ...]:
        """See :meth:`Proposer.recorded`.

        Raises:
            CheckpointError: If the transcript is another scorer's.
        """
        if self.rescore:
            return ()
        if self.header.get("scorer") != scorer:
            raise CheckpointError(
                f"{self.path} was scored by another scorer ({self.header.get('scorer')}) than this one ({scorer}): "
                "other images, labels, class names, backbone or machine. proposer_options.rescore=true scores its "
                "proposals anew."
            )
        return self.steps

    def propose(self, request: Request) -> Proposal:
        """See :meth:`Proposer.propose`."""
        step = next((step for step in self.steps if step.number == request.step), None)
        if step is None:
            return Proposal((), exhausted=True)
        is_last = request.step >= max(step.number for step in self.steps)
        texts = [*step.scores, *(text for text, _ in step.rejected)]
        return Proposal(texts, exhausted=is_last)
