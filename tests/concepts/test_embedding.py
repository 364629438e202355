from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlprompt.concepts.embedding import ConceptEmbedding, Concepts, repeated
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.files import write_tensors


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_offsets_and_absolute_vectors_are_one_search() -> None:
    """The same steps of the same optimiser reach the same vectors; with weight decay they don't."""
    start, target = noise(3, 2, 5), noise(3, 2, 5, seed=1)
    for decay, same in ((0.0, True), (0.1, False)):
        ends = []
        for absolute in (False, True):
            concepts = ConceptEmbedding(3, 2, 5, absolute=absolute)
            concepts.begin(start)
            optimiser = torch.optim.AdamW(concepts.parameters(), lr=0.05, weight_decay=decay)
            for _ in range(20):
                optimiser.zero_grad()
                (concepts() - target).square().sum().backward()
                optimiser.step()
            ends.append(concepts().detach())
        assert torch.allclose(*ends, atol=1e-5) == same


def test_a_shared_offset_moves_all_alike() -> None:
    concepts = ConceptEmbedding(3, 2, 5, share="global")
    concepts.begin(noise(3, 2, 5))
    with torch.no_grad():
        concepts.offset += noise(1, 2, 5, seed=1)
    torch.testing.assert_close(concepts(), noise(3, 2, 5) + noise(1, 2, 5, seed=1))
    with pytest.raises(DataError, match="can't be shared"):
        ConceptEmbedding(3, 2, 5, share="global", absolute=True)


def test_starts_that_do_not_fit_are_refused() -> None:
    concepts = ConceptEmbedding(3, 2, 5)
    with pytest.raises(DataError, match="no start yet"):
        concepts()
    with pytest.raises(DataError, match=r"\(3, 2, 5\) can't start from \(3, 5\)"):
        concepts.begin(noise(3, 5))
    with pytest.raises(DataError, match="not finite"):
        concepts.begin(torch.full((3, 2, 5), torch.inf))


def test_repeated_starts_lie_as_far_apart_as_asked() -> None:
    start = noise(4, 256)
    vectors = repeated(start, 3, jitter=0.1)
    away = (vectors - start[:, None]).norm(dim=-1) / start.norm(dim=-1)[:, None]
    assert float(away.min()) > 0.08
    assert float(away.max()) < 0.12
    assert torch.equal(repeated(start, 3)[:, 2], start)


def test_a_file_says_what_it_holds_and_refuses_what_it_does_not(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    concepts = Concepts("detector", noise(2, 3, 4), ("cat", "dog"), {"model": "owl"}, {"pool": "mean"})
    concepts.save(path)
    again = Concepts.load(path, "detector")
    assert torch.equal(again.vectors, concepts.vectors)
    assert (again.names, again.host, again.facts) == (concepts.names, concepts.host, concepts.facts)
    with pytest.raises(CheckpointError, match="holds concepts of a detector; a generator can't"):
        Concepts.load(path, "generator")
    with pytest.raises(CheckpointError, match="model: saved 'owl', given 'other'"):
        again.check_host({"model": "other"}, path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        Concepts.load(path, "detector")
    write_tensors(path, {"vectors": noise(2, 3, 4)})
    with pytest.raises(CheckpointError, match="no concept file"):
        Concepts.load(path, "detector")
