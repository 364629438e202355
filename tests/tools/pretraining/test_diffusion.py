"""Pretraining of the embedded diffusion model: its conditions and losses, and that a run can be resumed and shipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from pretraining.denoising import (
    ConditionedBatches,
    DenoisingModule,
    SketchBatches,
    SketchModule,
)
from pretraining.diffusion import DiffusionOptions, pretrain_diffusion
from vlprompt import create_backbone
from vlprompt.backbones import Backbone
from vlprompt.core.files import read_tensors
from vlprompt.diffusion.denoiser import Denoiser, from_patches, to_patches
from vlprompt.training.options import TrainOptions

pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")


def batches(drop: float = 0.25, worded: float = 0.3, focus: float = 1.0) -> ConditionedBatches:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 64, 64, 3), dtype=np.uint8)
    seen, told = (
        F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(1)), dim=-1)
        for shape in ((400, 128), (400, 3, 128))
    )
    return ConditionedBatches(images, seen, told, 200, 1, drop, worded, focus)


def test_conditions_are_images_captions_both_or_nothing() -> None:
    source = batches()
    rows = np.arange(200)
    batch = source.fetch(rows, 0)
    found = []
    for i, condition in enumerate(batch["condition"]):
        seen, told = source.image_embeddings[i], source.text_embeddings[i]
        names = {"nothing": torch.zeros(128), "seen": seen, **{f"told {k}": t for k, t in enumerate(told)}}
        found.append([n for row in condition for n, t in names.items() if torch.equal(row, t)])
    kinds = [sorted({n.split()[0] for n in names}) for names in found]
    share = {str(k): kinds.count(k) / 200 for k in (["nothing"], ["told"], ["seen", "told"], ["seen"])}
    assert sum(share.values()) == 1
    assert share["['nothing']"] == pytest.approx(0.25, abs=0.1)
    assert share["['told']"] == pytest.approx(0.75 * 0.3, abs=0.1)
    assert 0 < share["['seen', 'told']"] < share["['told']"]
    assert all(a != b for (a, b), kind in zip(found, kinds, strict=True) if kind == ["told"])  # two captions
    assert torch.equal(batch["image"][7].permute(1, 2, 0), torch.from_numpy(source.images[7]))
    again, other = source.fetch(rows, 0), source.fetch(rows, 1)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(other["noise"], batch["noise"])
    assert sorted(i for part in source.plan(0) for i in part) == list(range(400))


def test_times_are_mostly_those_with_hardly_anything_but_noise() -> None:
    rows = np.arange(200)
    times = {focus: batches(focus=focus).fetch(rows, 0)["time"].double() for focus in (1.0, 3.0)}
    for focus, found in times.items():
        assert 0 <= found.min() <= found.max() < 1000
        late = 0.2 ** (1 / focus)  # P(1 - u^focus > 0.8)
        assert float((found >= 800).double().mean()) == pytest.approx(late, abs=0.11)


def seen_through(backbone: Backbone, image: Tensor, grain: Tensor, view: Tensor) -> Tensor:
    """The embedding of one (3, 64, 64) image, cropped, blurred and grained, written out."""
    left, top, side = (int(v) for v in view[:3])
    crop = image[:, top : top + side, left : left + side]
    crop = F.interpolate(crop[None], (64, 64), mode="bilinear", antialias=True, align_corners=False)
    bell = torch.exp(-0.5 * (torch.arange(-2, 3) / view[3]) ** 2)
    kernel = torch.outer(bell, bell) / bell.sum() ** 2
    blurred = F.conv2d(F.pad(crop, (2, 2, 2, 2), mode="reflect"), kernel.expand(3, 1, 5, 5), groups=3)[0]
    facts = backbone.fingerprint["preprocess"]
    mean, std = (torch.tensor(facts[k]).view(3, 1, 1) for k in ("mean", "std"))
    return backbone.encode_image(((blurred + 0.03 * grain - mean) / std)[None])[0]


def test_the_loss_is_a_weighted_error_and_what_tiny_sees() -> None:
    backbone = create_backbone("tiny")
    questions = [backbone.encode_text(c) for c in (["left", "right"], ["one", "two", "three"])]
    module = DenoisingModule(
        backbone, 1, perception=0.5, naming=0.3, watched=0.5, asking=0.7, questions=questions
    ).eval()
    batch = {k: v[:6] for k, v in batches(drop=0.3).fetch(np.arange(200), 0).items()}
    batch["time"] = torch.tensor([3, 250, 500, 700, 900, 999])
    batch["view"] = torch.tensor([3.0, 9.0, 50.0, 0.8])
    assert bool((batch["condition"][:3].abs().sum((1, 2)) == 0).any())
    with torch.no_grad():
        losses = module.loss(batch)
        clean = to_patches(batch["image"].float() / 255)
        noisy = module.denoiser.noised(clean, batch["noise"], batch["time"])
        guess = module.denoiser(noisy, batch["time"], batch["condition"])
    total, away, apart, answers = 0.0, [], [], []
    captions = batch["told"].reshape(18, 128)
    for i in range(6):
        level = float(module.denoiser.alphas[batch["time"][i]])
        weight = min(max(level / (1 - level), 1.0), 5.0)
        total += weight * float((guess[i] - clean[i]).square().mean()) / 6
        if i < 3 and bool(batch["condition"][i].any()):
            grain = F.pixel_shuffle(batch["noise"][3 + i], 4)
            made = ((F.pixel_shuffle(guess[i], 4) + 1) / 2).clamp(0, 1)
            found, true = (
                seen_through(backbone, image, grain, batch["view"])
                for image in (made, batch["image"][i].float() / 255)
            )
            away.append(1 - float(found @ true))
            for texts, into in ((captions, apart), *((q, answers) for q in questions)):
                p, q = ((backbone.logit_scale * texts @ e).softmax(0) for e in (true, found))
                into.append(float((p * (p / q).log()).sum()))
    assert float(losses["pixels"]) == pytest.approx(total, rel=1e-4)
    assert float(losses["embeddings"]) == pytest.approx(0.5 * sum(away) / len(away), rel=1e-3)
    assert float(losses["names"]) == pytest.approx(0.3 * sum(apart) / len(apart), rel=1e-3)
    assert float(losses["answers"]) == pytest.approx(0.7 * sum(answers) / len(answers), rel=1e-3)
    assert set(DenoisingModule(backbone, 1, perception=0, naming=0).loss(batch)) == {"pixels"}


def test_a_canvas_learns_the_sketch_that_the_network_adds_to() -> None:
    source = batches(drop=0)
    sketches = SketchBatches(source.images, source.image_embeddings, source.text_embeddings, 4, 1, 0.0, 0.3)
    batch = sketches.fetch(np.arange(4), 0)
    small = np.stack([i.reshape(32, 2, 32, 2, 3).mean((1, 3)).astype(np.uint8) for i in source.images[:4]])
    assert torch.equal(batch["small"].permute(0, 2, 3, 1), torch.from_numpy(small))
    denoiser = Denoiser(1)
    before = {n: t.clone() for n, t in denoiser.unet.state_dict().items()}
    module = SketchModule(denoiser)
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)
    losses = []
    for _ in range(60):
        loss = module.loss(batch)["sketch"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(t, before[n]) for n, t in denoiser.unet.state_dict().items())
    for parameter in denoiser.unet.conv_out.parameters():  # without detail, the guess is the sketch
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        guess = denoiser(torch.randn(4, 48, 16, 16), torch.tensor([999] * 4), batch["condition"])
        sketch = denoiser.sketch(batch["condition"])
    enlarged = F.interpolate(sketch, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(from_patches(guess) * 2 - 1, enlarged)
    assert float(F.mse_loss(sketch, batch["small"].float() / 127.5 - 1)) == pytest.approx(losses[-1], rel=0.2)


def test_only_the_denoiser_learns_and_the_average_follows() -> None:
    backbone = create_backbone("tiny")
    module = DenoisingModule(backbone, 1, decay=0.9)
    batch = {k: v[:4] for k, v in batches(drop=0).fetch(np.arange(200), 0).items()}
    sum(module.loss(batch).values()).backward()  # type: ignore[union-attr]
    assert all(n.startswith("denoiser.") for n, _ in module.named_parameters())
    assert all(p.grad is None for p in backbone.parameters())
    start = module.denoiser.unet.conv_in.bias.detach().clone()
    expected = start.clone()
    for step in range(1, 4):
        with torch.no_grad():
            module.denoiser.unet.conv_in.bias.add_(1)
        module.update_average()
        keep = min(0.9, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * (start + step)
    torch.testing.assert_close(module.average["unet.conv_in.bias"], expected)
    other = DenoisingModule(backbone, 2)
    other.load_running_state(module.running_state())
    assert other.steps == 3
    assert torch.equal(other.average["unet.conv_in.bias"], module.average["unet.conv_in.bias"])


@pytest.mark.slow
def test_pretraining_runs_resumes_and_packs(tmp_path: Path) -> None:
    train = TrainOptions(
        epochs=2, batch_size=8, optimizer="adamw", lr=1e-3, schedule="cosine", warmup_epochs=0
    )
    sketch = train.model_copy(update={"epochs": 1})
    options = DiffusionOptions(images=8, easy=4, captions=2, watch=1, steps=1, sketch=sketch, train=train)
    path = pretrain_diffusion(options, tmp_path)
    whole = read_tensors(path)[0]
    again = read_tensors(pretrain_diffusion(options, tmp_path, resume=True))[0]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert path.stat().st_size <= 12_000_000
    further = train.model_copy(update={"epochs": 1})
    later = options.model_copy(update={"start": path, "train": further})
    mixed = {}
    for keep in (0.0, 0.5, 1.0):
        onward = pretrain_diffusion(later.model_copy(update={"keep": keep}), tmp_path / f"keep {keep}")
        assert not (tmp_path / f"keep {keep}" / "sketch").exists()
        mixed[keep] = {name: tensor.float() for name, tensor in read_tensors(onward)[0].items()}
    assert all(torch.equal(tensor, whole[name].float()) for name, tensor in mixed[1.0].items())
    assert any(not torch.equal(tensor, mixed[0.0][name]) for name, tensor in mixed[1.0].items())
    for name, tensor in mixed[0.5].items():
        torch.testing.assert_close(tensor, (mixed[0.0][name] + whole[name].float()) / 2, atol=1e-5, rtol=2e-3)
    assert (tmp_path / "samples.png").is_file()
    held = next(tmp_path.glob("embeddings-*.safetensors"))
    tensors = read_tensors(held)[0]
    assert (tensors["seen"].shape, tensors["told"].shape) == ((8, 128), (8, 2, 128))
    torch.testing.assert_close(tensors["told"].norm(dim=-1), torch.ones(8, 2))


def test_nothing_can_be_kept_of_no_start() -> None:
    with pytest.raises(
        ValidationError, match="keeps a share of the weights that start names; there is no start"
    ):
        DiffusionOptions(keep=0.5)
