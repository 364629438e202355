"""What several processes compute together is what one computes alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ranks import CLASSES, LEARNERS, WORKS, Work, in_processes, run_and_kill
from vlprompt.core.shares import part_sizes, share_rows, shared_work


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Work]:
    """What a piece of work gives in two processes."""
    found = in_processes(2, tmp_path_factory.mktemp("ranks"))
    return lambda name: {k.removeprefix(f"{name}/"): t for k, t in found.items() if k.startswith(f"{name}/")}


def test_parts_are_nearly_equal_and_complete() -> None:
    assert part_sizes(10, 3) == [4, 3, 3]
    assert part_sizes(1, 3) == [1, 0, 0]


def test_alone_all_work_is_ones_own() -> None:
    with shared_work():
        (rows,) = share_rows(5, 2, lambda part: [torch.tensor(list(part))])
    assert rows.tolist() == [0, 1, 2, 3, 4]


def test_rows_are_gathered_to_the_bit_and_a_mistake_reaches_all(both: Callable[[str], Work]) -> None:
    one, two = WORKS["rows"](), both("rows")
    assert bytes(two["message"].tolist()) == b"number 7 can't be read."
    for name, tensor in one.items():
        assert two[name].dtype == tensor.dtype
        assert torch.equal(two[name], tensor), name


def test_divided_classes_learn_what_one_process_learns(both: Callable[[str], Work]) -> None:
    one, two = WORKS["classes"](), both("classes")
    for label in LEARNERS:
        assert set(two[f"encoded/{label}"].tolist()) == {(CLASSES + 1) // 2}, label
        assert not one[f"encoded/{label}"].numel()
    for name, tensor in one.items():
        if not name.startswith("encoded/"):
            torch.testing.assert_close(
                two[name], tensor, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_evaluation_is_shared(both: Callable[[str], Work]) -> None:
    one, two = WORKS["scores"](), both("scores")
    assert (int(one["zero_shot/encoded"]), int(two["zero_shot/encoded"])) == (23, 12)
    assert (int(one["vpt/encoded"]), int(two["vpt/encoded"])) == (2 * 23, 2 * 12)
    for name in ("zero_shot", "vpt"):
        assert torch.equal(two[f"{name}/labels"], one[f"{name}/labels"])
        torch.testing.assert_close(
            two[name], one[name], rtol=0, atol=1e-6 * 100
        )  # logits are 100 times cosines


def test_adaptation_of_independent_images_is_shared(both: Callable[[str], Work]) -> None:
    one, two = WORKS["adapted"](), both("adapted")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_whole_fit_is_shared(both: Callable[[str], Work]) -> None:
    one, two = WORKS["trained"](), both("trained")
    torch.testing.assert_close(two["context"], one["context"], rtol=0, atol=1e-6)
    torch.testing.assert_close(two["figures"], one["figures"], rtol=0, atol=1e-6)


def test_all_processes_have_one_memory(both: Callable[[str], Work]) -> None:
    """Batch norm sees each part alone, so it is not what one process learns; but every process has the same."""
    learned = both("memories")
    assert len(learned["memory"]) == 2
    for name, tensor in learned.items():
        assert torch.equal(tensor[0], tensor[1]), name


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_a_killed_process_ends_the_run_with_a_sentence(gone: int, tmp_path: Path) -> None:
    code, errors = run_and_kill(gone, tmp_path)
    assert code != 0
    assert "another process of this run ended before its work was done." in errors
    assert "Traceback" not in errors.partition("ChildFailedError")[0].partition("torch/distributed")[0]
