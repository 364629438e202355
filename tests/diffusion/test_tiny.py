"""The embedded generator: its network against an oracle, its conditions, and what its shipped weights draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlprompt import create_backbone, create_learner, load_dataset
from vlprompt.adaptation.stored_views import classified_alike
from vlprompt.core.errors import BackboneError, CheckpointError, ConfigError, DataError
from vlprompt.core.files import write_tensors
from vlprompt.diffusion import create_generator
from vlprompt.diffusion.denoiser import Denoiser, from_patches, load_denoiser, to_patches
from vlprompt.diffusion.tiny import TinyDiffusion

pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(seed: int) -> dict[str, Tensor]:
    return {name: tensor.half() for name, tensor in Denoiser(seed).state_dict().items()}


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    write_tensors(path, packed(3))
    return path


@pytest.fixture(scope="module")
def generator(random_weights: Path) -> TinyDiffusion:
    made = create_generator("tiny-diffusion", weights=str(random_weights), steps=2, batch=3, device="cpu")
    assert isinstance(made, TinyDiffusion)
    return made


def test_patches_are_the_image_in_other_coordinates() -> None:
    images = torch.rand(2, 3, 64, 64)
    patches = to_patches(images)
    assert patches.shape == (2, 48, 16, 16)
    torch.testing.assert_close(from_patches(patches), images)
    assert float(patches.square().sum()) == pytest.approx(float((2 * images - 1).square().sum()), rel=1e-5)
    assert float(patches[0, 4 * 1 + 2, 5, 7]) == pytest.approx(2 * float(images[0, 0, 21, 30]) - 1)


class Oracle(Denoiser):
    """Knows the image, whatever the noise."""

    clean: Tensor

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.clean


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [("renoise", 1), ("renoise", 3), ("ddim", 1), ("ddim", 4), ("dpm", 3), ("dpm", 20)],
)
def test_sampling_ends_where_the_network_points(scheduler: str, steps: int) -> None:
    oracle = Oracle()
    oracle.clean = to_patches(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    condition, start = torch.zeros(2, 1, oracle.dim), noise(2, 3, 48, 16, 16)
    for guidance in (1.0, 3.0):
        made = oracle.sample(condition, start, steps, guidance, scheduler)
        torch.testing.assert_close(made, from_patches(oracle.clean), rtol=0, atol=2e-3)


def test_noise_takes_the_place_of_the_image() -> None:
    denoiser, clean, added = Denoiser(), noise(3, 48, 16, 16, seed=1), noise(3, 48, 16, 16)
    noisy = denoiser.noised(clean, added, torch.tensor([0, 500, 999]))
    torch.testing.assert_close(noisy[0], clean[0], rtol=0, atol=0.05)
    torch.testing.assert_close(noisy[2], added[2], rtol=0, atol=0.01)
    level = (
        torch.cos(torch.tensor((501 / 1000 + 0.008) / 1.008) * torch.pi / 2) ** 2
    )  # Nichol & Dhariwal, eq. 17
    level = level / torch.cos(torch.tensor(0.008 / 1.008) * torch.pi / 2) ** 2
    torch.testing.assert_close(
        noisy[1], level.sqrt() * clean[1] + (1 - level).sqrt() * added[1], rtol=0, atol=1e-4
    )


def test_a_condition_is_a_set_of_vectors(generator: TinyDiffusion) -> None:
    denoiser, noisy = generator.denoiser, noise(2, 48, 16, 16)
    time, condition = torch.tensor([700, 700]), torch.nn.functional.normalize(noise(2, 3, 128), dim=-1)
    with torch.no_grad():
        made = denoiser(noisy, time, condition)
        for same in (condition[:, [2, 0, 1]], condition.repeat(1, 2, 1)):
            torch.testing.assert_close(denoiser(noisy, time, same), made, rtol=0, atol=1e-4)
        assert float((denoiser(noisy, time, condition[:, :2]) - made).abs().max()) > 1e-3
    learned = condition.clone().requires_grad_()
    denoiser(noisy, time, learned).square().mean().backward()
    assert learned.grad is not None
    assert float(learned.grad.abs().min(dim=-1).values.max()) > 0  # every vector can be learned
    assert all(p.grad is None for p in denoiser.parameters())
    for wrong in (condition[0], condition[..., :64], condition[:1]):
        with pytest.raises(DataError, match=r"a condition is \(B, S, 128\) with B = 2"):
            denoiser(noisy, time, wrong)


def test_images_follow_seed_and_condition_alone(generator: TinyDiffusion) -> None:
    def same(a: Image.Image, b: Image.Image) -> bool:
        return bool(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1)

    texts = ["a red circle", "a blue star"]
    made = generator.from_text(texts, 2, seed=1)
    assert [len(row) for row in made] == [2, 2]
    assert made[0][0].size == (64, 64)
    alone = generator.from_text(texts[1:], 1, seed=1)[0][0]
    assert same(alone, made[1][0])
    assert not same(made[1][1], made[1][0])
    images = [made[0][0], made[1][0].resize((90, 70))]  # of any size
    variations = generator.generate(images, 2, seed=1)
    assert same(generator.generate(images[1:], 1, seed=1)[0][0], variations[1][0])
    told = generator.backbone.encode_text(texts[:1])[:, None]
    assert same(generator.from_condition(told, [5])[0], generator.from_condition(told, [5])[0])
    with pytest.raises(DataError, match="1 conditions, but 2 seeds"):
        generator.from_condition(told, [1, 2])


def test_an_identity_follows_weights_and_settings(
    generator: TinyDiffusion, random_weights: Path, tmp_path: Path
) -> None:
    options = {"weights": str(random_weights), "device": "cpu", "steps": 2}
    assert create_generator("tiny-diffusion", batch=7, **options).identity == generator.identity
    write_tensors(tmp_path / "other", packed(4))
    for other in ({"steps": 3}, {"guidance": 2.0, "scheduler": "ddim"}, {"weights": str(tmp_path / "other")}):
        assert create_generator("tiny-diffusion", **{**options, **other}).identity != generator.identity


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "other", {"conv_in.weight": torch.zeros(1)})
    with pytest.raises(BackboneError, match="does not fit tiny-diffusion"):
        load_denoiser(tmp_path / "other")
    with pytest.raises(CheckpointError, match="no such file"):
        create_generator("tiny-diffusion", weights=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"steps: .*\n.*guidence: unknown key; did you mean 'guidance'"):
        create_generator("tiny-diffusion", steps=0, guidence=2)


def test_the_shipped_weights_draw_what_tiny_sees() -> None:
    shipped = create_generator("tiny-diffusion", device="cpu")
    data = load_dataset("scenes/colour", "val")
    learner = create_learner("zero_shot", create_backbone("tiny"), data.classnames, data.templates)
    images = [data[i][0] for i in range(24)]
    made = shipped.generate(images, 1, seed=0)
    assert classified_alike(learner, images, made) >= 0.7
    assert classified_alike(learner, images, made, blur=0.8) >= 0.7  # no pattern that only deceives
    assert classified_alike(learner, images, made[1:] + made[:1]) < 0.4  # another image's are not like it
