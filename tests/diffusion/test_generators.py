"""Images from real diffusers pipelines of random weights: seeds, the store, resuming, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlprompt import create_adapter
from vlprompt.backbones import Backbone
from vlprompt.core.errors import BackboneError, CheckpointError, ConfigError, DataError, UnknownNameError
from vlprompt.data.images import pixel_key
from vlprompt.diffusion import Generator, ViewSource, ViewStore, create_generator, list_generators

STEPS = {"steps": 2, "device": "cpu"}


def make_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def same(a: Image.Image, b: Image.Image) -> bool:
    """Whether images agree but for rounding: the width of a batch may change a last bit."""
    return bool(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1)


@pytest.fixture(scope="module")
def variation(variation_folder: Path) -> Generator:
    return create_generator("image-variation", pipeline=str(variation_folder), batch=4, **STEPS)


def test_a_variation_follows_image_seed_and_number_alone(variation: Generator) -> None:
    images = [make_image(0), make_image(1)]
    made = variation.generate(images, 3, seed=1)
    assert [len(row) for row in made] == [3, 3]
    assert made[0][0].size == (16, 16)
    alone = variation.generate([images[1]], 2, seed=1)
    assert same(alone[0][0], made[1][0])
    assert same(alone[0][1], made[1][1])
    assert not same(made[0][0], made[0][1])
    assert not same(made[0][0], made[1][0])
    assert not same(variation.generate(images[:1], 1, seed=2)[0][0], made[0][0])


def test_image_to_image_stays_nearer_with_less_strength(img2img_folder: Path) -> None:
    far, near = (
        create_generator(
            "img2img", pipeline=str(img2img_folder), strength=s, guidance=1.0, **{**STEPS, "steps": 10}
        )
        for s in (1.0, 0.1)
    )
    smooth = Image.new("RGB", (30, 30), (200, 60, 60))
    spread = [float(np.asarray(g.generate([smooth], 1, 0)[0][0]).std()) for g in (far, near)]
    assert spread[1] < spread[0]
    assert far.identity["strength"] == 1.0
    assert far.identity != near.identity


def test_an_identity_follows_the_weights_and_settings(variation: Generator, variation_folder: Path) -> None:
    again = create_generator("image-variation", pipeline=str(variation_folder), batch=2, **STEPS)
    assert again.identity == variation.identity  # the batch is no part of it
    for option in ({"steps": 3}, {"guidance": 5.0}, {"scheduler": "dpm"}, {"scheduler": "unipc"}):
        other = create_generator("image-variation", pipeline=str(variation_folder), **{**STEPS, **option})
        assert other.identity != variation.identity
        assert other.generate([make_image(0)], 1, 0)[0][0].size == (16, 16)


def test_views_are_stored_once_and_more_can_be_added(variation: Generator, tmp_path: Path) -> None:
    drawn: list[int] = []

    class Counting(Generator):
        identity, batch = variation.identity, 4

        def draw(self, images: Any, seeds: Any) -> list[Image.Image]:
            drawn.append(len(images))
            return variation.draw(images, seeds)

    images = [make_image(0), make_image(1)]
    source = ViewSource(Counting(), ViewStore(tmp_path))
    first = source.views(images, 2)
    more = source.views([*images, make_image(2)], 3)
    assert sum(drawn) == 4 + 2 + 3
    direct = variation.generate(images, 3, 0)
    for stored, expected in zip(more, direct, strict=False):
        assert all(same(a, b) for a, b in zip(stored, expected, strict=True))
    assert [i.tobytes() for i in first[0]] == [i.tobytes() for i in more[0][:2]]
    offline = ViewSource(store=ViewStore(tmp_path))
    assert len(offline.views(images, 3)[1]) == 3
    with pytest.raises(DataError, match=r"4 of 10 generated views are not in .*diffusion\.on_the_fly=true"):
        offline.views(images, 5)


def test_an_interrupted_generation_continues(variation: Generator, tmp_path: Path) -> None:
    class Stopping(Generator):
        identity, batch = variation.identity, 2
        left = 2

        def draw(self, images: Any, seeds: Any) -> list[Image.Image]:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return variation.draw(images, seeds)

    images = [make_image(0), make_image(1)]
    with pytest.raises(KeyboardInterrupt):
        ViewSource(Stopping(), ViewStore(tmp_path)).views(images, 3)
    store = ViewStore(tmp_path)
    keys = [pixel_key(p) for p in images]
    assert [store.missing(k, 3) for k in keys] == [[], [1, 2]]
    assert not list(tmp_path.rglob(".*"))
    whole = ViewSource(variation, store).views(images, 3)
    for stored, expected in zip(whole, variation.generate(images, 3, 0), strict=True):
        assert all(same(a, b) for a, b in zip(stored, expected, strict=True))


def test_a_store_of_another_pipeline_or_seed_is_refused(variation: Generator, tmp_path: Path) -> None:
    ViewSource(variation, ViewStore(tmp_path), seed=1)

    class Other(Generator):
        identity, title = {**variation.identity, "guidance": 7.5}, "other"

    with pytest.raises(CheckpointError, match=r"another generator .*\n.*guidance: stored 3.0, asked for 7.5"):
        ViewSource(Other(), ViewStore(tmp_path), seed=1)
    with pytest.raises(CheckpointError, match="seed: stored 1, asked for 2"):
        ViewSource(variation, ViewStore(tmp_path), seed=2)
    ViewSource(variation, ViewStore(tmp_path), seed=1)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a view store's card"):
        ViewStore(tmp_path)


def test_a_missing_pipeline_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for kind in ("image-variation", "img2img"):
        with pytest.raises(BackboneError, match=r"can't be loaded: .*pipeline=PATH"):
            create_generator(kind, pipeline=str(tmp_path / "empty"))
    with pytest.raises(UnknownNameError, match="unknown generator 'stable-diffusion'"):
        create_generator("stable-diffusion")
    with pytest.raises(ConfigError, match=r"pipeline: required.*\n.*step: unknown key; did you mean 'steps'"):
        create_generator("image-variation", step=3)
    with pytest.raises(DataError, match="need a generator, a store"):
        ViewSource()
    assert {"image-variation", "img2img"} <= set(list_generators())


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("space", ["logits", "features", "probabilities"])
def test_difftpt_listens_to_generated_views(
    variant: Any, space: Any, variation: Generator, backbone: Backbone, tmp_path: Path
) -> None:
    names = ["dog", "red circle", "hummingbird"]
    source = ViewSource(variation, ViewStore(tmp_path))
    options: dict[str, Any] = {
        "views": 6,
        "generated": 4,
        "share": 0.5,
        "variant": variant,
        "filter_space": space,
    }
    adapter = create_adapter("difftpt", backbone, names, source=source, **options)
    images = [make_image(0), make_image(1)]
    predictions = adapter.predict(images)
    assert predictions.kept.shape == (2, 10)
    if variant == "code":  # floor(.8 * 9) = 7 near the image, and floor(.5 * 8) = 4 of these and the image
        assert predictions.views_kept.tolist() == [4, 4]
    else:  # floor(.5 * 6) standard ones, and generated ones that pass both filters
        assert predictions.kept[:, :6].sum(1).tolist() == [3, 3]
    assert float(predictions.seconds[0, 0]) > 0
    again = create_adapter(
        "difftpt", backbone, names, source=ViewSource(store=ViewStore(tmp_path)), **options
    )
    torch.testing.assert_close(again.predict(images[::-1]).probs.flip(0), predictions.probs)
    with pytest.raises(DataError, match="no image to generate variations of"):
        adapter.predict(torch.zeros(1, 2, 3, 32, 32))
