from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlprompt.core.errors import BackboneError, CheckpointError, ConfigError, DataError, UnknownNameError
from vlprompt.generation import PERSONALISERS, list_personalisers
from vlprompt.generation.base import NoisedBatches
from vlprompt.generation.hosts import split_template
from vlprompt.generation.personalise import concept_context, personalise
from vlprompt.training.options import TrainOptions

TRAIN = TrainOptions(
    epochs=2, batch_size=2, optimizer="adamw", lr=0.05, weight_decay=0, schedule="constant", warmup_epochs=0
)
WAYS = [
    ("cones", {"mode": "full"}),
    ("cones", {"mode": "slot", "length": 2}),
    ("textual-inversion", {"length": 2}),
]


@pytest.fixture(params=["tiny", "stable"])
def host(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_host")


def word_of(host: Any) -> tuple[str, str]:
    return ("star", "a photo of a *.") if host.width == 128 else ("b", "a * d")


def batch(host: Any, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    return NoisedBatches(host.latents(images), 2, seed=1, levels=host.levels).fetch(np.arange(2), 0)


@pytest.mark.parametrize(("method", "options"), WAYS)
def test_only_the_concept_learns(
    method: str, options: dict[str, Any], host: Any, images: list[Image.Image]
) -> None:
    word, template = word_of(host)
    module = PERSONALISERS.get(method).target(host, images, word, template=template, **options)
    data = batch(host, images)
    (loss,) = module.loss(data).values()
    loss.backward()
    learned = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert len(learned) == 1
    (parameter,) = learned.values()
    assert parameter.shape[-1] == (host.word("a", 1).shape[-1] if method != "cones" else host.width)
    assert float(parameter.grad.abs().max()) > 0
    assert all(p.grad is None for p in host.network.parameters())
    with torch.no_grad():
        before = float(loss)
        parameter -= 1e-3 * before / float(parameter.grad.square().sum()) * parameter.grad
        assert float(module.loss(data)["denoising"]) == pytest.approx(before * (1 - 1e-3), rel=3e-4)


def test_a_concept_search_runs_no_text_encoder(
    host: Any, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    word, template = word_of(host)
    target = PERSONALISERS.get("cones").target
    modules = [target(host, images, word, template=template, mode=m) for m in ("full", "slot")]
    data = batch(host, images)
    for name in ("read", "read_with", "slots", "word"):
        monkeypatch.setattr(host, name, lambda *_: pytest.fail("the text encoder was asked"))
    for module in modules:
        module.loss(data)["denoising"].backward()


def test_searches_start_from_the_class_word(host: Any, images: list[Image.Image]) -> None:
    word, template = word_of(host)
    sentence = host.read(template.replace("*", word))
    target = PERSONALISERS.get("cones").target
    full = target(host, images, word, template=template, mode="full")
    torch.testing.assert_close(full.context(), sentence, rtol=0, atol=0.2)
    slot = target(host, images, word, template=template, mode="slot")
    around, first = host.slots(template, word, 1)
    torch.testing.assert_close(slot.context(), around)
    assert slot.concepts().shape == (1, 1, host.width)
    with torch.no_grad():
        slot.concepts.offset += 1
    changed = (slot.context() - around).abs().sum(-1) > 0
    assert changed.nonzero().flatten().tolist() == [first]


def test_an_inverted_word_that_is_not_moved_reads_as_the_word(host: Any, images: list[Image.Image]) -> None:
    word, template = word_of(host)
    module = PERSONALISERS.get("textual-inversion").target(host, images, word, template=template)
    sentence = host.read(template.replace("*", word))
    torch.testing.assert_close(module.context()[: len(sentence)], sentence, rtol=0, atol=1e-5)


def test_stable_diffusion_reads_prompts_as_its_pipeline_does(stable_host: Any) -> None:
    embeds, _ = stable_host.pipe.encode_prompt("a b d", "cpu", 1, False)
    around, first = stable_host.slots("a * d", "b", 1)
    torch.testing.assert_close(around, embeds[0], rtol=0, atol=1e-6)
    assert first == 2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_hosts_own(kind: str, stable_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the forward process written out: z_t = sqrt(a) z + sqrt(1 - a) noise."""
    monkeypatch.setitem(stable_host.noise.config.__dict__, "prediction_type", kind)
    monkeypatch.setattr(type(stable_host.noise.config), "prediction_type", kind, raising=False)
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=rng)
    time, context = torch.tensor([10, 700]), torch.randn(2, 3, 16, generator=rng)
    share = stable_host.noise.alphas_cumprod[time].view(-1, 1, 1, 1)
    noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
    target = noise if kind == "epsilon" else share.sqrt() * noise - (1 - share).sqrt() * latents
    with torch.no_grad():
        predicted = stable_host.network(noisy, time, context).sample
        expected = (predicted - target).square().mean()
        torch.testing.assert_close(stable_host.loss(latents, noise, time, context), expected)


@pytest.mark.parametrize(("method", "options"), WAYS)
def test_a_concept_file_draws_what_was_learned(
    method: str, options: dict[str, Any], host: Any, images: list[Image.Image], tmp_path: Path
) -> None:
    word, template = word_of(host)
    result = personalise(
        host,
        images,
        word,
        method,
        train=TRAIN,
        options={"template": template, **options},
        watch=lambda m: {"sum": float(m.context().sum())},  # a norm may be 1 whatever is learned
        folder=tmp_path,
    )
    assert [r["step"] for r in result.history] == [0, 1, 2]
    assert result.history[0]["sum"] != result.history[2]["sum"]
    path = result.module.to_concepts(["my thing"]).save(tmp_path / "concept.safetensors")
    assert path.stat().st_size < 8192
    context = concept_context(path, host)
    torch.testing.assert_close(context[0], result.module.context().detach(), rtol=0, atol=1e-6)
    samples = [np.asarray(p) for p in host.draw(context[0], 2, seed=0)]
    assert not np.array_equal(*samples)
    alone = np.asarray(host.draw(context[0], 1, seed=0)[0]).astype(int)
    assert np.abs(alone - samples[0]).max() <= 2  # the last bits depend on company
    again = personalise(
        host, images, word, method, train=TRAIN, options={"template": template, **options}
    ).module
    assert all(torch.equal(t, again.trainable_state()[n]) for n, t in result.module.trainable_state().items())
    if options.get("mode") == "slot":
        other = "a drawing of a *" if host.width == 128 else "e * c"
        assert concept_context(path, host, other).shape[-1] == host.width
    else:
        with pytest.raises(DataError, match="whole context"):
            concept_context(path, host, "a * d")


def test_a_file_of_another_host_is_refused(
    tiny_host: Any, stable_host: Any, images: list[Image.Image], tmp_path: Path
) -> None:
    module = PERSONALISERS.get("cones").target(stable_host, images, "b", template="a *")
    path = module.to_concepts(["x"]).save(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="kind: saved 'stable-diffusion', given 'tiny-diffusion'"):
        concept_context(path, tiny_host)


def test_a_pipeline_draws_a_concept_in_one_line(
    stable_host: Any, images: list[Image.Image], tmp_path: Path
) -> None:
    module = PERSONALISERS.get("cones").target(stable_host, images, "b", template="a *", length=3)
    path = module.to_concepts(["x"]).save(tmp_path / "c.safetensors")
    pipe = stable_host.pipe
    (image,) = pipe(prompt_embeds=concept_context(path, stable_host), num_inference_steps=2).images
    assert image.size == (16, 16)


def test_where_images_are_contexts_a_search_can_start_from_them(
    tiny_host: Any, stable_host: Any, images: list[Image.Image]
) -> None:
    target = PERSONALISERS.get("cones").target
    module = target(tiny_host, images, "star", init="visual")
    backbone = tiny_host.backbone
    feature = backbone.encode_image(torch.stack([backbone.preprocess(p) for p in images])).mean(0)
    torch.testing.assert_close(module.context()[0], nn.functional.normalize(feature, dim=-1))
    with pytest.raises(DataError, match="init='visual'"):
        target(stable_host, images, "b", template="a *", init="visual")


def test_lengths_can_be_kept(tiny_host: Any, images: list[Image.Image]) -> None:
    module = PERSONALISERS.get("cones").target(tiny_host, images, "star", keep_norm=True, length=2)
    norms = module.context().norm(dim=-1)
    with torch.no_grad():
        module.concepts.offset += 3
    torch.testing.assert_close(module.context().norm(dim=-1), norms)
    torch.testing.assert_close(module.to_concepts(["x"]).vectors[0], module.context())


def test_the_second_stage_unfreezes_what_is_named(tiny_host: Any, images: list[Image.Image]) -> None:
    target = PERSONALISERS.get("cones").target
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"  # one vector: its key says nothing
    before = {n: p.clone() for n, p in tiny_host.network.named_parameters()}
    module = target(tiny_host, images, "star", unfreeze=(name,))
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    module.loss(batch(tiny_host, images))["denoising"].backward()
    optimiser.step()
    after = dict(tiny_host.network.named_parameters())
    assert [n for n in after if not torch.equal(after[n], before[n])] == [name]
    assert len(module.trainable_state()) == 2
    module.unfrozen.restore()
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in after.items())
    with pytest.raises(ConfigError, match=r"'unet\.mid_blok\.\*' matches no parameter; near it: unet"):
        target(tiny_host, images, "star", unfreeze=("unet.mid_blok.*",))


def test_mistakes_are_named(tiny_host: Any, images: list[Image.Image]) -> None:
    with pytest.raises(DataError, match="at least one image"):
        personalise(tiny_host, [], "star", train=TRAIN)
    with pytest.raises(UnknownNameError, match="textual-inversion"):
        personalise(tiny_host, images, "star", "textual-inversio", train=TRAIN)
    with pytest.raises(ConfigError, match="mode"):
        personalise(tiny_host, images, "star", options={"mode": "half"}, train=TRAIN)
    with pytest.raises(DataError, match=r"one '\*' where the concept stands; got 'a photo'"):
        split_template("a photo")
    from vlprompt.generation.stable import StableHost

    with pytest.raises(BackboneError, match=r"no/such/folder.*can't be loaded"):
        StableHost("./no/such/folder")
    assert list_personalisers() == ["cones", "textual-inversion"]


def test_noise_levels_are_stratified_and_repeatable(images: list[Image.Image]) -> None:
    batches = NoisedBatches(torch.arange(3.0).view(3, 1, 1, 1), 6, seed=2)
    first, again = batches.fetch(np.arange(6), 4), batches.fetch(np.arange(6), 4)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert torch.bincount(first["latent"].flatten().long()).tolist() == [2, 2, 2]
    assert all(k / 6 * 1000 - 1 <= t <= (k + 1) / 6 * 1000 for k, t in enumerate(first["time"].tolist()))
    part = batches.fetch(np.array([3]), 4)
    assert torch.equal(part["noise"][0], first["noise"][3])
