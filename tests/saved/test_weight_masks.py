"""Masks as artefacts: bytes, folding, differences, images, and switching between tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

import vlprompt
from tests.commands import Command
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.weight_masks import pack, unpack
from vlprompt.core.errors import CheckpointError, UnknownNameError
from vlprompt.core.files import write_tensors
from vlprompt.experiments.figures import shares_by_layer
from vlprompt.learners import Learner
from vlprompt.saved.prompts import read
from vlprompt.saved.weight_masks import Masks, TaskMasks, fold, read_masks

NAMES = ["dog", "red circle", "hummingbird"]


def scattered(backbone: Backbone, seed: int = 1, form: str = "ramt", share: float = 0.1) -> Learner:
    learner = create_learner(form, backbone, NAMES)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for score in learner.scores.values():
            score[torch.rand(score.shape, generator=generator) < share] = 0.001
    return learner.eval()


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (16, 4, 3, 3), (0,)])
def test_packing_round_trips(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    bits = pack(mask)
    assert (bits.dtype, tuple(bits.shape)) == (torch.uint8, (-(-mask.numel() // 8),))
    assert torch.equal(unpack(bits, shape), mask)


def test_packing_is_row_major_with_the_first_weight_in_the_highest_bit() -> None:
    mask = torch.tensor([[True, False, False], [False, False, True], [True, True, False]])
    assert pack(mask).tolist() == [0b10000111, 0b00000000]
    assert pack(~mask).tolist() == [0b01111000, 0b10000000]


def test_a_saved_learner_takes_a_bit_per_weight(
    make_backbone: Callable[..., Backbone], images: Tensor, tmp_path: Path
) -> None:
    wide = make_backbone(vision={"width": 512, "layers": 4, "head_width": 64})
    learner = scattered(wide)
    folder = vlprompt.save(learner, tmp_path / "saved")
    weights = sum(score.numel() for score in learner.scores.values())
    assert sum(file.stat().st_size for file in folder.iterdir()) - weights / 8 < 20_000
    assert (folder / "prompt.safetensors").stat().st_size < 1.05 * weights / 8
    loaded = vlprompt.load(folder, wide)
    with torch.no_grad():
        assert torch.equal(loaded(images), learner(images))
    masks = read_masks(folder, wide)
    assert all(torch.equal(masks[name], mask) for name, mask in learner.masks().items())
    assert list(masks) == list(learner.masks())


def test_bytes_of_a_whole_vision_transformer() -> None:
    """Published sizes for ViT-B/16: one bit per weight, and headers below one percent."""
    width, blocks = 768, 12
    attention = blocks * 4 * width * width
    assert attention / 8 == 3_538_944
    packed = {
        f"{i}/{n}": torch.zeros(n * width * width // 8, dtype=torch.uint8)
        for i in range(blocks)
        for n in (3, 1)
    }
    assert sum(bits.numel() for bits in packed.values()) == 3_538_944
    header = sum(len(f"scores.transformer/resblocks/{key}/attn/in_proj_weight") + 100 for key in packed)
    assert header < 0.01 * attention / 8


@pytest.mark.parametrize("form", ["amt", "mmt", "pmt"])
def test_folding_equals_the_masked_tower(form: str, backbone: Backbone, images: Tensor) -> None:
    learner = scattered(backbone, form=form)
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    folded = fold(backbone, learner.masks())
    with torch.no_grad():
        plain = create_learner("zero_shot", folded, NAMES)(images)
        assert torch.equal(plain, learner(images))
    assert all(torch.equal(backbone.state_dict()[n], t) for n, t in before.items())
    assert folded.fingerprint["masks"] == Masks(learner.masks()).digest
    assert folded.fingerprint["id"] != backbone.fingerprint["id"]
    assert not any(p.requires_grad for p in folded.parameters())


def test_other_learners_work_on_a_folded_backbone(backbone: Backbone, images: Tensor, tmp_path: Path) -> None:
    """How Tip-Adapter, or anything with a training of its own, is combined with masks."""
    folded = fold(backbone, scattered(backbone).masks())
    tip = create_learner("tip_adapter", folded, NAMES)
    tip.prepare(folded.image_embeddings(images)[None], torch.tensor([0, 1, 2, 0, 1, 2]))
    lora = create_learner("clip_lora", folded, NAMES)
    assert tip(images).shape == lora(images).shape == (6, 3)
    saved = vlprompt.save(tip, tmp_path)
    assert torch.equal(vlprompt.load(saved, folded)(images), tip(images))
    with pytest.raises(CheckpointError, match=r"another backbone.*\n.*masks: saved '\w+', given None"):
        vlprompt.load(saved, backbone)


def test_sparsity_and_difference(backbone: Backbone) -> None:
    first, second = (scattered(backbone, seed, share=0.2) for seed in (1, 2))
    one, two = Masks(first.masks()), Masks(second.masks())
    assert one.masked_share == pytest.approx(first.figures()["masked_share"])
    for name, share in one.sparsity().items():
        assert share == pytest.approx(1 - float(first.masks()[name].float().mean()))
    for name, found in one.diff(two).items():
        a, b = ~first.masks()[name], ~second.masks()[name]
        assert found.both_off == int((a & b).sum())
        assert found.only_first == int((a & ~b).sum())
        assert found.only_second == int((b & ~a).sum())
        assert found.count == a.numel()
        assert found.overlap == pytest.approx(int((a & b).sum()) / int((a | b).sum()))
    assert all(d.overlap == 1 and not d.only_first for d in one.diff(one).values())
    wider = Masks(scattered(backbone, form="pmt").masks())
    assert set(one.diff(wider)) == set(wider)
    assert one.diff(wider)["conv1.weight"].only_first == 0


def test_the_image_shows_every_layer_and_task(backbone: Backbone) -> None:
    first, second = (Masks(scattered(backbone, seed, share=0.2 * seed).masks()) for seed in (1, 2))
    drawn = shares_by_layer({"pets": first.sparsity(), "flowers": second.sparsity()})
    text = " ".join(ElementTree.fromstring(drawn).itertext())
    assert "pets" in text
    assert "flowers" in text
    assert all(name in text for name in first)


def test_switching_tasks_equals_each_alone(backbone: Backbone, images: Tensor) -> None:
    tasks = {"a": scattered(backbone, 1), "b": scattered(backbone, 2), "c": scattered(backbone, 3, "mmt")}
    switched = TaskMasks(backbone, {task: Masks(learner.masks()) for task, learner in tasks.items()})
    identities = set()
    with torch.no_grad():
        plain = backbone.image_embeddings(images)
        for task in ("a", "b", "a", None, "c", "b", None):
            switched.use(task)
            expected = plain if task is None else tasks[task].embed_images(images)
            assert torch.equal(switched.backbone.image_embeddings(images), expected)
            assert torch.equal(backbone.image_embeddings(images), plain)
            identities.add((task, switched.backbone.fingerprint["id"]))
    assert len(identities) == 4  # features of one task are never taken for another's
    with pytest.raises(UnknownNameError, match="unknown task 'd'"):
        switched.use("d")


def test_the_command_line_prints_shares_and_draws(tmp_path: Path, command: Command) -> None:
    tiny = vlprompt.create_backbone("tiny", "random")
    first, second = (scattered(tiny, seed, share=0.2) for seed in (1, 2))
    folders = [str(vlprompt.save(learner, tmp_path / str(n))) for n, learner in enumerate((first, second))]
    lines = command("masks", *folders, "--svg", tmp_path / "masks.svg").out.splitlines()
    assert len(lines) == len(first.masks()) + 1
    name, *shares = lines[0].split()
    a, b = (~learner.masks()[name] for learner in (first, second))
    assert [float(s) for s in shares] == [round(100 * float(m.float().mean()), 2) for m in (a, b, a & b)]
    assert (tmp_path / "masks.svg").read_text().startswith("<svg")
    assert len(command("masks", folders[0]).out.splitlines()[0].split()) == 2


def test_what_is_no_mask_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    vlprompt.save(create_learner("coop", backbone, NAMES), tmp_path / "coop")
    with pytest.raises(CheckpointError, match="holds what coop learned, and no masks"):
        read_masks(tmp_path / "coop", backbone)
    folder = vlprompt.save(scattered(backbone), tmp_path / "masks")
    card, tensors = read(folder)
    name = next(iter(tensors))
    for foreign in ({name: tensors[name][:-1]}, {"scores.ln_post/weight": tensors[name]}):
        hostile = tmp_path / f"hostile{len(foreign)}{next(iter(foreign))[-3:]}"
        digest = hashlib.sha256(tensors_to_bytes(foreign)).hexdigest()
        text = card.model_copy(update={"tensors": digest}).model_dump()
        write_tensors(hostile / "prompt.safetensors", foreign, {"card": text})
        with pytest.raises(CheckpointError, match="is no mask of this backbone"):
            read_masks(hostile, backbone)
