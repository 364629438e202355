"""A learner as one file gives the learner's own logits, and names images without a backbone."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

import vlprompt
from tests.commands import Command
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.learners import LEARNERS, Learner
from vlprompt.saved.export import ExportError
from vlprompt.saved.exported import ExportedClassifier

NAMES = ["circle", "square", "star"]
KINDS = ["vpt", "tip_adapter"]  # image tokens, a cache; the coop that other tests read has class weights


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return create_backbone("tiny")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def coop(tiny: Backbone) -> Learner:
    return build("coop", tiny)


@pytest.fixture(scope="module")
def coop_file(coop: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlprompt.export(coop, tmp_path_factory.mktemp("coop") / "model.onnx")


def build(name: str, backbone: Backbone) -> Learner:
    """Return a learner whose parameters are not those it starts from."""
    learner = vlprompt.create_learner(name, backbone, classnames=NAMES)
    if learner.prepares:
        learner.prepare(torch.randn(1, 6, backbone.dim), torch.tensor([0, 1, 2, 0, 1, 2]))

    generator = torch.Generator().manual_seed(2)
    for parameter in learner.learned_parameters().values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.02 * noise
    return learner.eval()


def check(name: str, backbone: Backbone, images: Tensor, folder: Path) -> None:
    learner = build(name, backbone)
    compare(learner, vlprompt.export(learner, folder / "model.onnx"), images)


def compare(learner: Learner, path: Path, images: Tensor) -> None:
    with torch.no_grad():
        expected = learner(images)
    exported = ExportedClassifier(path)
    assert tuple(exported.classnames) == learner.classnames
    for batch in (images, images[:1]):
        torch.testing.assert_close(exported(batch), expected[: len(batch)], rtol=0, atol=1e-4)
    assert not learner.training


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_the_learners(name: str, tiny: Backbone, images: Tensor, tmp_path: Path) -> None:
    check(name, tiny, images, tmp_path)


def test_class_weights_are_stored(coop: Learner, coop_file: Path, images: Tensor) -> None:
    compare(coop, coop_file, images)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LEARNERS.names() if name not in KINDS])
def test_logits_of_every_learner(name: str, backbone: Backbone, tmp_path: Path) -> None:
    """On three blocks: to trace a tower takes as long as it has blocks."""
    check(name, backbone, torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)), tmp_path)


def test_a_program_of_torch(tiny: Backbone, coop: Learner, images: Tensor, tmp_path: Path) -> None:
    learner = coop
    path = vlprompt.export(learner, tmp_path / "model.pt2")
    extra = {"vlprompt": ""}
    program = torch.export.load(str(path), extra_files=extra)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), learner(images), rtol=0, atol=1e-4)
    assert json.loads(extra["vlprompt"])["classnames"] == NAMES

    # Of the towers only what names images is in the file.
    numbers = sum(p.numel() for p in tiny.model.visual.parameters()) + len(NAMES) * tiny.dim
    assert path.stat().st_size < 4 * numbers * 1.3


def test_the_file_says_all_that_is_needed(tiny: Backbone, coop_file: Path) -> None:
    model = onnx.load(str(coop_file))
    onnx.checker.check_model(model)
    (facts,) = [json.loads(entry.value) for entry in model.metadata_props if entry.key == "vlprompt"]
    assert facts["classnames"] == NAMES
    assert facts["method"] == "coop"
    assert facts["preprocess"] == tiny.fingerprint["preprocess"]
    assert facts["backbone"] == {"name": "tiny/scenes", "id": tiny.fingerprint["id"]}

    (given,) = model.graph.input
    (result,) = model.graph.output
    assert (given.name, result.name) == ("images", "logits")
    assert given.type.tensor_type.shape.dim[0].dim_param  # any number of images


def test_images_are_prepared_as_the_learner_prepares_them(tiny: Backbone, coop_file: Path) -> None:
    exported = ExportedClassifier(coop_file)
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    assert torch.equal(exported.preprocess(image), tiny.preprocess(image))


@pytest.mark.slow
def test_eight_bits_are_smaller_and_near(
    coop: Learner, coop_file: Path, images: Tensor, tmp_path: Path
) -> None:
    learner = coop
    small = vlprompt.export(learner, tmp_path / "int8.onnx", int8=True)
    assert small.stat().st_size < 0.5 * coop_file.stat().st_size
    with torch.no_grad():
        difference = ExportedClassifier(small)(images).softmax(-1) - learner(images).softmax(-1)
    assert float(difference.abs().max()) < 0.05


@pytest.mark.slow
def test_the_command_exports_measures_and_predicts(tiny: Backbone, tmp_path: Path, command: Command) -> None:
    digits = vlprompt.load_dataset("digits", split="train", shots=2, seed=1)
    learner = vlprompt.create_learner("coop", tiny, classnames=digits.classnames)
    prompt = str(vlprompt.save(learner, tmp_path / "prompt"))
    file = str(tmp_path / "model.onnx")

    answer = command("export", prompt, file, "--int8", "--data", "digits")
    assert answer.status == 0
    assert "(learner)" in answer.last
    assert "(file)" in answer.last

    assert command("export", prompt, file).status == 0
    digits[0][0].save(tmp_path / "a.png")
    named = command("predict", file, str(tmp_path / "a.png"))
    assert named.out == command("predict", prompt, str(tmp_path / "a.png")).out

    refused = command("predict", file, str(tmp_path / "a.png"), "--class", "a", "--class", "b")
    assert refused.status == 2
    assert "--class: an exported file has its own classes" in refused.err


@pytest.mark.parametrize(
    "name",
    ["clipseg", pytest.param("cris", marks=pytest.mark.slow), pytest.param("dense", marks=pytest.mark.slow)],
)
def test_a_segmenter_for_a_list_of_phrases(name: str, tiny: Backbone, tmp_path: Path) -> None:
    segmenter = vlprompt.create_segmenter(name, tiny, "vpt")
    phrases = ["a red circle", "a square"]
    path = vlprompt.export(segmenter, tmp_path / "model.onnx", phrases=phrases)

    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    running = onnxruntime.InferenceSession(str(path))
    (logits,) = running.run(None, {"images": image.numpy()})
    assert logits.shape == (1, 2, 64, 64)
    with torch.no_grad():
        for i, phrase in enumerate(phrases):
            expected = segmenter(image, [phrase])[0, 0]
            torch.testing.assert_close(torch.from_numpy(logits[0, i]), expected, rtol=1e-4, atol=1e-4)
    assert json.loads(running.get_modelmeta().custom_metadata_map["vlprompt"])["phrases"] == phrases


def test_mistakes_are_sentences(tiny: Backbone, tmp_path: Path) -> None:
    learner = build("zero_shot", tiny)
    with pytest.raises(ExportError, match=r"model\.pth: the ending says what is written: \.onnx .* or \.pt2"):
        vlprompt.export(learner, tmp_path / "model.pth")
    with pytest.raises(ExportError, match=r"int8 is written to \.onnx files alone"):
        vlprompt.export(learner, tmp_path / "model.pt2", int8=True)
    with pytest.raises(ConfigError, match="a classifier has class names"):
        vlprompt.export(learner, tmp_path / "model.onnx", phrases=["a"])

    segmenter = vlprompt.create_segmenter("clipseg", tiny)
    with pytest.raises(ConfigError, match="for a list of phrases; say which"):
        vlprompt.export(segmenter, tmp_path / "model.onnx")
    with pytest.raises(DataError, match="none of them empty"):
        vlprompt.export(segmenter, tmp_path / "model.onnx", phrases=["a", " "])
    assert not list(tmp_path.iterdir())


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such file"):
        ExportedClassifier(tmp_path / "model.onnx")

    (tmp_path / "noise.onnx").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(ExportError, match="no ONNX model that onnxruntime can run"):
        ExportedClassifier(tmp_path / "noise.onnx")

    given = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["b", 3, 8, 8])
    result = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["b", 3, 8, 8])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["images"], ["logits"])], "g", [given], [result]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(ExportError, match="was not written by vlprompt"):
        ExportedClassifier(tmp_path / "other.onnx")

    for text, reason in [
        ("{", "no readable JSON"),
        ("[]", "other.onnx"),
        (
            json.dumps({"method": "coop", "classnames": ["a", "b"], "preprocess": {"size": "x"}}),
            "can't be prepared",
        ),
        (
            json.dumps({"method": "coop", "classnames": ["a", "b"], "preprocess": {"mode": "exec"}}),
            "can't be prepared",
        ),
    ]:
        onnx.helper.set_model_props(model, {"vlprompt": text})
        onnx.save(model, str(tmp_path / "other.onnx"))
        with pytest.raises(ExportError, match=reason):
            ExportedClassifier(tmp_path / "other.onnx")
