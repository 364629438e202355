"""What a template may be, how proposals are cleaned, and files of templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.text_search.conftest import CLASSES
from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.core.template_files import listed_templates, read_templates, write_templates
from vlprompt.text_search.templates import Rules, masked, normalised


@pytest.mark.parametrize(
    ("text", "template"),
    [
        ("  a photo   of a {} ", "a photo of a {}."),
        ('"A photo of <CLASS>!"', "A photo of {}!"),
        ("- 'a [class] here'", "a {} here."),
        ("12) the {class_name}?", "the {}?"),
        ("\u201ca {}\u201d", "a {}."),
        ("2 photos of {}", "2 photos of {}."),
        ("  ", ""),
    ],
)
def test_proposals_are_cleaned(text: str, template: str) -> None:
    assert normalised(text) == template
    assert normalised(template) == template


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "blank"),
        ("{}.", "blank"),
        ("a photo of something.", "missing"),
        ("a {} and a {}.", "twice"),
        ("a {} <b>.", "brace or a tag"),
        ("a {} {x}.", "brace or a tag"),
        ("a \ud800 of a {}.", "sign that is not seen"),
        ("a \x00 of a {}.", "sign that is not seen"),
        ("a \u202e of a {}.", "sign that is not seen"),
        ("#1 photo of a {}.", "begins with #"),
        ("a photo of a {} with a Dog.", "class name 'dog'"),
        ("a red circle around a {}.", "class name 'red circle'"),
        ("a {} " + "very " * 90 + ".", "longer than 400 characters"),
        (
            "a {} " + "xqz " * 60 + ".",
            r"with the class 'boeing 737-800' it has \d+ tokens, the text tower reads 75",
        ),
    ],
)
def test_what_is_refused_says_why(template: str, reason: str, backbone: Backbone) -> None:
    import re

    assert re.search(reason, Rules(backbone, CLASSES).problem(template))


@pytest.mark.parametrize("template", ["a photo of a {}.", "a dogged {}.", "a red {}.", "{} circle."])
def test_what_is_allowed(template: str, backbone: Backbone) -> None:
    assert Rules(backbone, CLASSES).problem(template) == ""


def test_names_are_masked_the_longest_first() -> None:
    text = "A Red Circle left of a circle, and dogs."
    assert masked(text, ["circle", "red_circle", "dog"]) == "A <CLASS> left of a <CLASS>, and dogs."


def test_a_file_comes_back(tmp_path: Path) -> None:
    path = write_templates(tmp_path / "t.txt", ["a {}.", "the {} there."], ["found by a test"])
    assert path.read_text() == "# found by a test\na {}.\nthe {} there.\n"
    assert read_templates(path) == ("a {}.", "the {} there.")
    assert listed_templates(f"file:{path}") == ["a {}.", "the {} there."]
    assert listed_templates(["a {}."]) == ["a {}."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a {}.\n\nno place\n", r"t.txt, line 3: a template has exactly one \{\}"),
        (b"# nothing\n", "holds no template"),
        (b"\xff\xfe\xff", "no readable text in UTF-8"),
        (None, "there is no file of templates"),
    ],
)
def test_a_bad_file_names_the_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_templates(path)


def test_other_text_is_no_list_of_templates() -> None:
    with pytest.raises(ValueError, match="a list of sentences, or file:PATH; got 'a photo'"):
        listed_templates("a photo")
