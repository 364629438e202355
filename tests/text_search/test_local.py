"""A language model in a folder, and templates out of captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.text_search.conftest import CLASSES, ToyScorer
from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError, VLPromptError
from vlprompt.text_search.budget import Budget
from vlprompt.text_search.embeddings import EmbeddingScorer
from vlprompt.text_search.loop import Outcome, Settings, search
from vlprompt.text_search.proposers import create_proposer
from vlprompt.text_search.proposers.retrieval import mined_templates
from vlprompt.text_search.templates import Rules
from vlprompt.text_search.transcript import read_transcript


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers that learned to answer any question with one of two lists, and a tokenizer of few words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = ["<unk>", "<end>", '["a', "sketch", "photo", "of", "<CLASS>", 'now"]']
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )
    config = transformers.GPT2Config(
        vocab_size=len(words), n_positions=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    path = tmp_path_factory.mktemp("gpt2") / "tiny-gpt2"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        _teach(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _teach(model: Any) -> None:
    """Teach a model what follows 32 tokens, whatever they are."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    answers = torch.tensor([[2, 3, 5, 6, 7, 1], [2, 4, 5, 6, 7, 1]]).repeat(8, 1)
    for _ in range(60):
        questions = torch.randint(0, 8, (16, 32))
        logits = model(torch.cat([questions, answers], 1)).logits[:, 31:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _run(
    backbone: Backbone, folder: Path, transcript: Path, seed: int = 1, budget: Budget | None = None
) -> Outcome:
    proposer = create_proposer("local", {"path": str(folder), "max_output": 8, "attempts": 4})
    settings = Settings(steps=6, proposals=4, patience=9, seed=seed)
    rules = Rules(backbone, CLASSES)
    outcome, _ = search(
        ToyScorer({"sketch": 1.0}), proposer, rules, ["a {}."], settings, transcript=transcript, budget=budget
    )
    return outcome


def test_a_model_in_a_folder_is_asked_with_a_seed(backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    outcome = _run(backbone, folder, tmp_path / "a")
    assert outcome.candidates[0].template == "a sketch of {} now."
    assert "a photo of {} now." in [candidate.template for candidate in outcome.candidates]
    assert outcome.usage.requests >= 6
    assert outcome.usage.input_tokens == 32 * outcome.usage.requests  # the end of the question fits

    _run(backbone, folder, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_local_model_heeds_the_budget(backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    budget = Budget(max_requests=2)
    outcome = _run(backbone, folder, tmp_path / "t", budget=budget)
    assert budget.spent.requests == 2
    assert outcome.stopped == "the budget of 2 requests is spent"


def test_folders_without_a_model_are_refused(tmp_path: Path, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        create_proposer("local", {"path": str(tmp_path / "none")})
    pytest.importorskip("transformers")
    with pytest.raises(VLPromptError, match="holds no language model that transformers can read"):
        _run(backbone, tmp_path, tmp_path / "t")


def test_captions_become_templates() -> None:
    captions = [
        "A photo of a dog on paper.",
        "a photo of a Dog on paper",
        "something blue above a table, seen",
        "a dog and a dog",
        "a hummingbird left of a dog",
    ]
    templates = mined_templates(captions, CLASSES)
    assert set(templates) == {
        "A photo of a {} on paper.",
        "a photo of a {} on paper.",
        "a photo of a {} above a table.",
    }


def test_retrieval_proposes_captions_like_the_notes(
    scorer: EmbeddingScorer, backbone: Backbone, tmp_path: Path
) -> None:
    settings = Settings(steps=2, proposals=5, patience=9)

    def first(notes: list[str]) -> list[str]:
        proposer = create_proposer("retrieval", {"captions": "scenes:60"})
        path = tmp_path / f"{len(notes)}.jsonl"
        describe = (lambda past, keep, budget: notes) if notes else None
        _, transcript = search(
            scorer,
            proposer,
            Rules(backbone, CLASSES),
            ["a {}."],
            settings,
            describe=describe,
            transcript=path,
        )
        transcript.result({})
        return [*read_transcript(path)[1][1].scores]

    assert len(first([])) == 5
    notes = ["a photo of an object with a grainy background."]
    wanted = scorer.features(notes)[0]
    ordered = first(notes)
    likeness = [float(scorer.features([t.format("object")])[0] @ wanted) for t in ordered]
    assert likeness == sorted(likeness, reverse=True)
    assert ordered != first([])
