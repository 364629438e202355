"""Where tokens go: each is placed once, sees its own sentence so far and nothing else, and little room is lost."""

from __future__ import annotations

import random

import pytest
import torch

from vlprompt.backbones.layout import PromptLayout, Slots, insert_rows, is_slot, slot, slot_number
from vlprompt.core.errors import VLPromptError

LIMIT = 77


def random_sentences(seed: int) -> list[list[int]]:
    """Sentences with a shared or no beginning, of one to many classes, short or up to the limit, with repeats."""
    draw = random.Random(seed)
    shared = [1, *(slot(k) for k in range(draw.choice([0, 4, 16])))] if seed % 3 else []
    longest = draw.choice([2, 6, 30, LIMIT - len(shared)])
    count = draw.choice([1, 2, 5, 60])
    own = [[draw.randint(5, 9) for _ in range(draw.randint(1, longest))] for _ in range(count)]
    return [shared + draw.choice([words, own[0]]) for words in own]


@pytest.mark.parametrize("seed", range(12))
def test_every_token_is_placed_once_and_sees_only_its_own_past(seed: int) -> None:
    sentences = random_sentences(seed)
    layout = PromptLayout(sentences, LIMIT)
    tiles, shared = layout.tiles, layout.shared
    rows, size = tiles.sources.shape
    assert layout.prefix.tolist() == sentences[0][:shared]
    taken = torch.zeros(rows * size, dtype=torch.int)
    for sentence, end in zip(sentences, tiles.ends.tolist(), strict=True):
        row, last = divmod(end, size)
        own = tiles.mask[row, 0, last, shared:].nonzero().flatten()
        assert tiles.sources[row, own].tolist() == sentence[shared:]
        assert tiles.positions[row, own].tolist() == list(range(shared, len(sentence)))
        taken[row * size + own] += 1
        for past, token in enumerate(own.tolist()):
            visible = tiles.mask[row, 0, token]
            assert bool(visible[:shared].all())
            assert visible[shared:].nonzero().flatten().tolist() == own[: past + 1].tolist()
    assert int(taken.max()) == 1
    assert int(taken.sum()) == sum(len(s) - shared for s in sentences)


@pytest.mark.parametrize("seed", range(12))
def test_sentence_ends_are_found_in_both_forms(seed: int) -> None:
    tiles = PromptLayout(random_sentences(seed), LIMIT).tiles
    rows, size = tiles.sources.shape
    flat = tiles.end_rows + size * torch.arange(rows)[:, None]
    assert torch.equal(flat.flatten()[tiles.end_slots], tiles.ends)


@pytest.mark.parametrize("seed", range(12))
def test_no_two_tiles_could_be_one(seed: int) -> None:
    layout = PromptLayout(random_sentences(seed), LIMIT)
    size = layout.tiles.sources.shape[1]
    used = torch.bincount(layout.tiles.ends // size, torch.tensor(layout.lengths) - layout.shared)
    if len(used) > 1:
        assert float(used.sort().values[:2].sum()) > size


def test_names_of_ordinary_length_waste_less_than_two_percent() -> None:
    draw = random.Random(0)
    prefix = [1, *(slot(k) for k in range(16))]
    sentences = [prefix + [draw.randint(5, 9) for _ in range(draw.randint(3, 9))] for _ in range(1000)]
    layout = PromptLayout(sentences, LIMIT)
    assert layout.tiles.sources.numel() < 1.02 * sum(n - layout.shared for n in layout.lengths)


def test_the_shared_beginning_is_the_longest_that_leaves_every_sentence_a_token() -> None:
    assert PromptLayout([[1, 2, 3, 4], [1, 2, 5]], LIMIT).shared == 2
    assert PromptLayout([[1, 2, 3], [1, 2]], LIMIT).shared == 1
    assert PromptLayout([[1, 2, 3]], LIMIT).shared == 2
    assert PromptLayout([[1, slot(0), 3], [1, slot(1), 3]], LIMIT).shared == 1
    assert PromptLayout([[1, 2, 3], [1, 2, 3]], LIMIT, share_prefix=False).shared == 0


def test_slots_are_numbers_apart_from_token_ids() -> None:
    assert [slot_number(slot(k)) for k in (0, 1, 76)] == [0, 1, 76]
    assert all(is_slot(slot(k)) for k in (0, 1, 76))
    assert not is_slot(0)
    assert PromptLayout([[1, slot(0), 2], [1, slot(6), 2]], LIMIT).slots == 7
    assert PromptLayout([[1, 2]], LIMIT).slots == 0


def test_learned_rows_replace_only_their_places() -> None:
    x, rows = torch.zeros(1, 4, 2), torch.tensor([[[1.0, 1.0], [2.0, 2.0]], [[3.0, 3.0], [4.0, 4.0]]])
    out = insert_rows(x, Slots.of([7, slot(1), 7, slot(0)]), rows)
    assert out[:, :, 0].tolist() == [[0, 2, 0, 1], [0, 4, 0, 3]]
    assert insert_rows(x, Slots.of([7, 7, 7, 7]), rows) is x


def test_no_sentence_and_a_too_long_one_are_refused_by_name() -> None:
    with pytest.raises(VLPromptError, match="at least one class"):
        PromptLayout([], LIMIT)
    with pytest.raises(VLPromptError, match=r"class 'tower' has 78 tokens, the text tower reads 77"):
        PromptLayout([[1, 2], [1] * 78], LIMIT, names=["house", "tower"])
    assert len(PromptLayout([[1] * 77], LIMIT).tiles.ends) == 1
