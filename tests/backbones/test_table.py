"""The table of docs/backbones.md: made by its command, no crash, and no family shut out of the basic learners."""

from __future__ import annotations

import pytest

from tests.families import FAMILIES, family_backbone, load_page_maker
from vlprompt.learners import LEARNERS

MAKER = load_page_maker()
LEARNED = tuple(entry.name for entry in LEARNERS)
BASIC = ("coop", "vpt", "clip_adapter", "tip_adapter", "linear_probe", "zero_shot")
SAMPLE = ("CLIP ResNet", "CoCa", "EVA-02", "NaFlex ViT", "ConvNeXt", "Swin", "mT5 text", "NLLB text")


def cells() -> dict[str, dict[str, str]]:
    """Family to learner to the entry of the page."""
    lines = MAKER.PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    groups = rows[0][2:]
    table: dict[str, dict[str, str]] = {}
    for row in rows[1 : 1 + len(FAMILIES)]:
        by_group = zip(groups, row[2:], strict=True)
        table[row[0]] = {name.strip("` "): cell for group, cell in by_group for name in group.split(",")}
    return table


TABLE = cells()


def test_every_family_and_learner_is_in_the_table() -> None:
    assert tuple(TABLE) == FAMILIES
    for row in TABLE.values():
        assert sorted(row) == sorted(LEARNED)


@pytest.mark.parametrize("learner", BASIC)
def test_no_family_is_shut_out_of_the_basic_learners(learner: str) -> None:
    allowed = {"works", "works as pixels"} if learner == "vpt" else {"works"}
    assert {row[learner] for row in TABLE.values()} <= allowed


@pytest.mark.parametrize("learner", ["coop", "vpt", "maple", "clip_lora", "tip_adapter_f", "ramt"])
@pytest.mark.parametrize("family", SAMPLE)
def test_the_table_is_true(family: str, learner: str) -> None:
    answer = MAKER.answer(family_backbone(family), learner)
    expected = {"works": "works", "pixels": "works as pixels"}.get(answer, "refused")
    assert TABLE[family][learner].startswith(expected), answer


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    """Every learner trains one step on every family, or is refused with a reason that says what works."""
    assert MAKER.PAGE.read_text(encoding="utf-8") == MAKER.page(), "python docs/families.py"


def test_refusals_say_what_does_work() -> None:
    text = MAKER.PAGE.read_text(encoding="utf-8")
    reasons = text.partition("Refused because:")[2].partition("##")[0].strip().splitlines()
    assert len(reasons) >= 5
    for reason in reasons:
        assert any(word in reason for word in ("What works here", "encoder=", "evidence=", "mmt masks")), (
            reason
        )
