"""TextRefiner against the authors' code and against loops, the learner inside at alpha 0, and where its memory goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.trajectories import check_start, check_trajectory, golden_images
from tests.golden.weights import filled
from tests.learners.masking import TOWERS
from vlprompt import create_learner, export, load, load_dataset, save
from vlprompt.backbones import Backbone
from vlprompt.backbones.local import local_tokens
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.classification.fit import fit
from vlprompt.classification.multitask import TaskData, fit_multitask
from vlprompt.core.errors import BackboneError, DataError
from vlprompt.learners import Learner
from vlprompt.learners.plugins.text_refiner import TextRefiner, written
from vlprompt.meta.regulated import Regulated
from vlprompt.meta.regulators import create_regulator
from vlprompt.saved.exported import ExportedClassifier
from vlprompt.training.batches import TensorBatches
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

GOLDEN = read_golden("plugin_text_refiner_small")
NAMES = ("dog", "red circle", "hummingbird")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "resnet": (TOWERS["resnet"], "not a sequence of tokens"),
    "timm": (TOWERS["timm"], "nobody sees where the class token looks"),
    "coca": ({"vision": {"attentional_pool": True}}, "pooled by attention"),
}


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.fixture
def batch(images: Tensor) -> dict[str, Tensor]:
    return {"image": images, "label": torch.arange(6) % 3}


def refiner(backbone: Backbone, inner: str = "coop", **options: object) -> TextRefiner:
    learner = create_learner(inner, backbone, NAMES, plugins=[{"name": "text_refiner", **options}])
    assert isinstance(learner, TextRefiner)
    return learner.train()


def golden_learner(backbone: Backbone, lengths: str) -> TextRefiner:
    options = {"context_length": 4, "plugins": [{"name": "text_refiner", "lengths": lengths}]}
    learner = create_learner("coop", backbone, GOLDEN["classnames"], **options)
    assert isinstance(learner, TextRefiner)
    state = learner.trainable_state()
    for name, std in GOLDEN["spread"].items():
        mean = 1.0 if name == "projector.1.weight" else 0.0
        state[name] = filled(name, state[name].shape, std, mean)
    state["memory"] = F.normalize(filled("memory", (25, 48), 0.3, 0.5), dim=-1)
    learner.load_trainable_state(state)
    return learner


@pytest.mark.parametrize("case", ["published", "unit"])
def test_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    expected = GOLDEN["cases"][case]
    learner = golden_learner(golden_backbone, case)
    images = golden_images(learner)
    close(filled("images", (4,), 1.0), GOLDEN["first_image_values"])
    batch = {"image": images, "label": torch.tensor(GOLDEN["labels"])}

    losses = check_start(expected, learner, batch)
    names = ("cross_entropy", "refiner_local", "refiner_pull")
    close(torch.stack([losses[name] for name in names]), expected["losses"])
    check_trajectory(expected["trajectory"], learner, batch, lr=0.002)

    again = golden_learner(golden_backbone, case).train()
    again.loss(batch)
    again.transform_gradients({})
    close(again.memory.flatten()[:: expected["memory"]["every"]], expected["memory"]["values"])


def test_alpha_0_is_the_learner_inside(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    for name in ("coop", "promptsrc", "mmrl"):
        inside = create_learner(name, backbone, NAMES).train()
        around = refiner(backbone, name, alpha=0.0)
        expected = inside.loss(batch)
        losses = around.loss(batch)
        assert float(losses.pop("refiner_pull").detach()) == 0
        del losses["refiner_local"]
        assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in expected.items()}
        assert torch.equal(around.eval()(batch["image"]), inside.eval()(batch["image"]))


def test_losses_are_the_equations_written_out(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    """Image by image, class by class: what is read from the memory, and which places are classified."""
    options = {"items": 3, "alpha": 0.5, "local_weight": 0.1, "pull_weight": 2.0, "attended": 2}
    learner = refiner(backbone, **options)
    inside = create_learner("coop", backbone, NAMES)
    state = learner.trainable_state()
    scale = backbone.logit_scale
    local = local_tokens(backbone.vision, batch["image"])

    refined, pull = [], 0.0
    texts = F.normalize(inside.class_embeddings().detach(), dim=-1)
    for text in texts:
        shares = torch.stack([item @ text for item in state["memory"]]).softmax(0)
        read = sum(share * item for share, item in zip(shares, state["memory"], strict=True))
        row = text + 0.5 * state["extractor.weight"] @ torch.cat([text, read])  # type: ignore[list-item]
        refined.append(F.normalize(row, dim=0))
        pull += float((refined[-1] - text).abs().mean()) / len(texts)

    with torch.no_grad():
        rows = learner.projector(local.features.flatten(0, 1)).view_as(local.features)
    main, near = 0.0, 0.0
    for image, label in enumerate(batch["label"].tolist()):
        feature = F.normalize(local.features[image, 0], dim=0)
        main -= float((scale * torch.stack(refined) @ feature).log_softmax(0)[label]) / 6
        order = sorted(range(local.salience.shape[1]), key=lambda n: -float(local.salience[image, n]))
        places = [rows[image, 0], *(rows[image, 1 + n] for n in order[:2]), rows[image].mean(0)]
        for place in places:
            near -= float((scale * texts @ F.normalize(place, dim=0)).log_softmax(0)[label]) / (6 * 4)

    losses = learner.loss(batch)
    assert losses["cross_entropy"].item() == pytest.approx(main, rel=1e-4)
    assert losses["refiner_local"].item() == pytest.approx(0.1 * near, rel=1e-4)
    assert losses["refiner_pull"].item() == pytest.approx(2.0 * pull, rel=1e-4)


def test_every_token_joins_its_nearest_item() -> None:
    generator = torch.Generator().manual_seed(0)
    memory = F.normalize(torch.randn(6, 4, generator=generator), dim=-1)
    tokens = torch.randn(5, 4, generator=generator)

    items = [item.clone() for item in memory]
    units = [token / token.norm() for token in tokens]
    nearest = [max(range(6), key=lambda i, t=unit: float(t @ memory[i])) for unit in units]
    for i in range(6):
        largest = max(float(unit @ memory[i]) for unit in units)
        joined = [unit for unit, place in zip(units, nearest, strict=True) if place == i]
        if joined:
            total = sum(torch.exp(unit @ memory[i] - largest) * unit for unit in joined)
            items[i] = 0.8 * memory[i] + 0.2 * total  # type: ignore[operator]
    torch.testing.assert_close(written(memory, tokens, 0.8), F.normalize(torch.stack(items), dim=-1))
    assert len(set(nearest)) < 6  # some item stays
    assert torch.equal(written(memory, tokens, 1.0), F.normalize(memory, dim=-1))


def test_a_step_writes_the_tokens_of_all_its_parts_once(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    learner = refiner(backbone)
    before = learner.memory.clone()
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 4), slice(4, 6))]
    tokens = []
    for part in parts:
        learner.loss(part)
        features = local_tokens(backbone.vision, part["image"]).features.flatten(0, 1)
        tokens.append(learner.projector(features).detach())
    assert torch.equal(learner.memory, before)  # until the step is taken

    learner.transform_gradients({})
    torch.testing.assert_close(learner.memory, written(before, torch.cat(tokens), 0.8))
    after = learner.memory.clone()
    learner.transform_gradients({})
    assert torch.equal(learner.memory, after)


def test_the_memory_is_learned_saved_and_exported(
    backbone: Backbone, images: Tensor, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """In the authors' code it is a plain attribute, which no state holds."""
    learner = refiner(backbone)
    learner.loss(batch)
    learner.transform_gradients({})
    learner.eval()
    save(learner, tmp_path)
    assert torch.equal(load(tmp_path, backbone).memory, learner.memory)  # type: ignore[arg-type]
    assert torch.equal(learner.with_classes(["tulip", "dog"]).memory, learner.memory)  # type: ignore[arg-type]

    with torch.no_grad():
        exported = ExportedClassifier(export(learner, tmp_path / "model.onnx"))
        torch.testing.assert_close(exported(images), learner(images), rtol=0, atol=1e-3)
        other = learner(images)
        learner.load_trainable_state(
            {**learner.trainable_state(), "memory": -learner.memory}
        )  # the logits read it
        assert not torch.allclose(learner(images), other)


def test_published_lengths_are_an_option(backbone: Backbone, images: Tensor) -> None:
    """The authors' code compares refined embeddings of any length; here they have length 1 unless asked."""
    published = refiner(backbone, lengths="published").eval()
    unit = refiner(backbone).eval()
    with torch.no_grad():
        lengths = published.class_weights().norm(dim=-1)
        assert float((lengths - 1).abs().min()) > 1e-3
        torch.testing.assert_close(unit.class_weights().norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(published(images), unit(images) * lengths)
    for name in ("kgcoop", "promptsrc"):
        with pytest.raises(DataError, match=f"can't stand on {name}: its loss is more than .* lengths=unit"):
            refiner(backbone, name, lengths="published")


def test_kept_states_train_as_pixels_do(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    """All blocks but the last run once for every image, whatever the learner inside does with them."""
    for name, stages in (("coop", backbone.vision.layers), ("maple", 1)):
        learner = refiner(backbone, name)
        assert learner.frozen_stages() == stages
        kept = {**batch, "image": learner.frozen_states(batch["image"])}
        pixels, states = learner.loss(batch), learner.loss(kept)  # type: ignore[arg-type]
        for key, value in pixels.items():
            assert states[key].item() == pytest.approx(value.item(), rel=1e-5), key


def test_it_is_trained_inside_other_plug_ins(backbone: Backbone) -> None:
    data = load_dataset("digits", "train", shots=1, seed=1)
    plugins = ["dept", "text_refiner", {"name": "dpc", "choices": 2}]
    learner = create_learner("coop", backbone, data.classnames, plugins=plugins)
    assert learner.layers() == ["text_refiner", "dept", "dpc"]  # type: ignore[attr-defined]
    key = "inner.inner.memory"
    before = learner.trainable_state()[key].clone()
    fit(learner, data, epochs=2, batch_size=5, lr=0.01, callbacks=(), views=1)
    assert not torch.equal(learner.trainable_state()[key], before)


def test_its_memory_is_written_under_a_regulator(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    learner = refiner(backbone)
    before = learner.memory.clone()
    steps = TensorBatches({name: [tensor] for name, tensor in batch.items()}, 6, seed=1)
    regulator = create_regulator("identity", {}, backbone.dim)
    Trainer(Regulated(learner, regulator), steps, TrainOptions(epochs=1, batch_size=6, lr=0.01)).run()
    assert not torch.equal(learner.memory, before)


@pytest.mark.parametrize("names", [("scenes/shape", "digits"), ("digits",)])
def test_tasks_can_t_share_its_memory(names: tuple[str, ...], backbone: Backbone) -> None:
    data = {name: TaskData(load_dataset(name, "train", shots=1)) for name in names}
    learner: Learner = refiner(backbone)
    with pytest.raises(DataError, match="keeps the local tokens of one task"):
        fit_multitask(learner, data, epochs=1)


@pytest.mark.parametrize(("tower", "reason"), REFUSED.values(), ids=REFUSED)
def test_towers_whose_tokens_can_t_be_read_are_refused(
    tower: dict[str, Any], reason: str, make_backbone: Callable[..., Backbone]
) -> None:
    with pytest.raises(
        BackboneError, match=f"local tokens of this backbone's image tower can't be read: .*{reason}"
    ):
        refiner(make_backbone(**tower))
