"""The page in a real browser: it answers, it is reached by keyboard, it fits, it is readable, and it stays at home."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vlprompt
from tests.browser import load_browser

gradio = pytest.importorskip("gradio", reason="the page is an extra: pip install 'vlprompt[demo]'")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Browser = Any

# Connections of the process that serves the page, one a line.
WATCH = """
import sys
open({log!r}, "a").write("watching\\n")
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        with open({log!r}, "a") as file:
            file.write(f"{{event}} {{args[1] if event == 'socket.connect' else args[0]}}\\n")
sys.addaudithook(watch)
"""


FIELD = ["#images .icon-button"]  # Gradio puts the field for files into the button that opens it
# What has the keyboard: a tab's or a slider's name, else the identity of what it lies in.
FOCUSED = """
const element = document.activeElement;
if (element.getAttribute("role") === "tab") return element.innerText;
const label = element.getAttribute("aria-label") || "";
if (label.includes(" for ")) return label;
const box = element.closest("[id]");
return box ? box.id : element.tagName;
"""


TOOLS = load_browser()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page runs: a scanner, a folder that it may scan, one that it may not, and files to upload."""
    folder = tmp_path_factory.mktemp("page")
    tiny = vlprompt.create_backbone("tiny")
    vlprompt.save(vlprompt.create_learner("dbom", tiny, ["circle", "square"]), folder / "scanner")
    data = vlprompt.load_dataset("scenes/shape", "test")
    for name in ("open", "secret"):
        (folder / name).mkdir()
        for index in range(0, 60, 10):
            data[index][0].save(folder / name / f"{name}{index}.png")

    data[0][0].save(folder / "first.png")
    data[80][0].save(folder / "${7*7} {{7*7}}.png")
    (folder / "broken.png").write_bytes((folder / "first.png").read_bytes()[:120])
    (folder / "notes.txt").write_text("no image")
    (folder / "large.png").write_bytes(bytes(2_500_000))
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Of the running page, whose process writes down where it connects to."""
    (folder / "watched").mkdir()
    watch = WATCH.format(log=str(folder / "connections.txt"))
    (folder / "watched" / "sitecustomize.py").write_text(watch)
    environment = {
        "PYTHONPATH": f"{folder / 'watched'}:{ROOT}",
        "HOME": str(folder),
        "TMPDIR": str(folder),
    }
    words = ["scanner", "--folder", "open", "--max-images", "3", "--max-mb", "2"]
    for style in ("circle", "square", "triangle", "star"):
        words += ["--class", style]
    with TOOLS.running_demo(words, folder, environment) as address:
        yield address
    # Uploads go with the page.
    assert list(folder.glob("vlprompt-demo-*")) == []


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with TOOLS.browser() as browser:
        yield browser


@pytest.fixture
def page(opened: Browser, address: str) -> Iterator[Browser]:
    """The page, opened anew; whatever a test does, nothing is asked for elsewhere."""
    opened.resize(1280)
    opened.use_dark(False)
    opened.open(address)
    opened.find("#names textarea")
    yield opened
    assert opened.requested_elsewhere() == []


def upload(page: Browser, *paths: Path) -> None:
    page.find("#images input[type=file]").send_keys("\n".join(map(str, paths)))


def type_into(page: Browser, selector: str, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    field = page.find(selector)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text)


def test_uploaded_images_are_named_and_names_can_be_edited(page: Browser, folder: Path) -> None:
    upload(page, folder / "first.png")
    shown = page.wait_for_text("#named", "1 image named by zero_shot on tiny")
    expected = vlprompt.predict(
        vlprompt.create_learner(
            "zero_shot", vlprompt.create_backbone("tiny"), ["circle", "square", "triangle", "star"]
        ),
        folder / "first.png",
        topk=3,
    )[0]
    for label, share in zip(expected["labels"], expected["probs"], strict=True):
        assert f"{label}\n{100 * share:.1f} %" in shown

    # The bars are as long as the shares.
    tracks = page.find_all("#named .vl-track")
    widths = [
        track.find_element("css selector", "span").size["width"] / track.size["width"] for track in tracks
    ]
    assert widths == pytest.approx(expected["probs"], abs=0.02)

    type_into(page, "#names textarea", "ring\nzebra")
    shown = page.wait_for_text("#named", "zebra\n")
    assert "triangle" not in shown

    type_into(page, "#names textarea", "ring")
    assert "at least two classes" in page.wait_for_text("#named [role=alert]", "classes")


def test_what_is_typed_or_uploaded_is_text_and_nothing_else(page: Browser, folder: Path) -> None:
    upload(page, folder / "${7*7} {{7*7}}.png")
    page.wait_for_text("#named", "1 image")
    odd = "<img src=x onerror=alert(1)>"
    type_into(page, "#names textarea", f"{odd}\n${{7*7}} {{{{7*7}}}}")
    shown = page.wait_for_text("#named .vl-bars", "${7*7} {{7*7}}")
    assert odd in shown
    assert "49" not in page.text("#named .vl-title")
    assert page.find_all("#named img[src=x]") == []


def test_damaged_and_foreign_files_are_refused_with_a_reason(page: Browser, folder: Path) -> None:
    upload(page, folder / "broken.png", folder / "first.png")
    shown = page.wait_for_text("#named", "1 image named")
    assert "can't read the image broken.png: " in shown
    assert str(folder) not in shown


@pytest.mark.parametrize("name", ["notes.txt", "large.png"])
def test_files_of_other_kinds_and_too_large_ones_are_not_taken(
    page: Browser, folder: Path, name: str
) -> None:
    upload(page, folder / name)
    said = "file type" if name == "notes.txt" else "maximum allowed size"
    page.wait(lambda: said in page.run("return document.body.innerText"), f"the page says {said!r}")
    assert page.text("#named") == ""


def test_too_many_images_are_refused(page: Browser, folder: Path) -> None:
    upload(page, *sorted((folder / "open").glob("*.png"))[:4])
    page.wait_for_text("#named [role=alert]", "4 images are too many at once; the limit is 3")


def test_a_phrase_is_laid_over_the_image(page: Browser, folder: Path) -> None:
    upload(page, folder / "first.png")
    page.wait_for_text("#named", "1 image")
    page.choose_tab("Find a phrase")
    type_into(page, "#phrase textarea, #phrase input", "circle")
    page.find("#find").click()
    shown = page.wait_for_text("#found", "% of the image")
    assert "1 image searched for 'circle' by clipseg" in shown
    inside = float(re.search(r"([\d.]+) % of the image", shown)[1])  # type: ignore[index]
    assert 0 < inside < 60

    type_into(page, "#phrase textarea, #phrase input", " ")
    page.find("#find").click()
    page.wait_for_text("#found [role=alert]", "Type what to find")


def test_a_folder_is_scanned_with_the_most_suspicious_first(page: Browser, folder: Path) -> None:
    page.choose_tab("Scan a folder")
    assert page.find("#folder textarea, #folder input").get_attribute("value") == "open"
    page.find("#scan").click()
    shown = page.wait_for_text("#scanned", "The most suspicious come first")
    report = vlprompt.scan(folder / "open", vlprompt.load(folder / "scanner"))
    expected = sorted(report.rows, key=lambda row: -row["score"])
    titles = [title.text for title in page.find_all("#scanned .vl-title")]
    assert titles == [Path(row["image"]).name for row in expected]
    assert f"{100 * expected[0]['score']:.1f} %" in shown

    type_into(page, "#folder textarea, #folder input", str(folder / "secret"))
    page.find("#scan").click()
    page.wait_for_text("#scanned [role=alert]", "lies outside what the page may read")
    assert "secret0" not in page.text("#scanned")


def test_adaptation_stands_beside_what_it_adapts(page: Browser, folder: Path) -> None:
    page.find("#examples").click()
    page.wait_for_text("#named", "4 images are too many")  # three are the limit of this page
    page.open(page.driver.current_url)
    upload(page, folder / "first.png")
    page.wait_for_text("#named", "1 image")
    page.choose_tab("Adapt")
    page.find("#adapt").click()
    shown = page.wait_for_text("#adapted", "changes the first name of")
    headings = page.find_all("#adapted .vl-heading")
    assert [heading.text for heading in headings] == ["as it is", "with tpt"]
    left, right = (heading.rect for heading in headings)
    assert left["x"] + left["width"] <= right["x"]
    assert left["y"] == right["y"]
    assert shown.count(" %") == 6


def show_everything(page: Browser, folder: Path) -> list[str]:
    """Fill every tab with an answer; return the tabs' names."""
    upload(page, folder / "first.png", folder / "broken.png", folder / "${7*7} {{7*7}}.png")
    type_into(page, "#names textarea", "circle\nsquare\nzebra " + "long" * 12)
    page.wait_for_text("#named", "long" * 12)
    for name, button, shown, said in (
        ("Adapt", "#adapt", "#adapted", "2 images"),
        ("Find a phrase", "#find", "#found", "2 images"),
        ("Scan a folder", "#scan", "#scanned", "6 images"),
    ):
        page.choose_tab(name)
        page.find(button).click()
        page.wait_for_text(shown, said)
    return ["Name", "Adapt", "Find a phrase", "Scan a folder"]


def test_it_fits_wide_and_narrow_and_is_readable_in_light_and_dark(page: Browser, folder: Path) -> None:
    pytest.importorskip("axe_core_python", reason="axe measures contrast and looks for names")
    tabs = show_everything(page, folder)
    page.stop_motion()

    wrong = []
    for name in tabs:
        page.choose_tab(name)
        for width in (390, 1280):
            page.resize(width)
            wrong += [f"{name}, {width} px: {problem}" for problem in page.overflowing()]
        for dark in (False, True):
            page.use_dark(dark)
            page.run("document.body.classList.toggle('dark', arguments[0])", dark)
            wrong += [f"{name}, dark {dark}: {problem}" for problem in page.problems_of_access(but=FIELD)]
    assert wrong == [], "\n".join(wrong)


def test_the_keyboard_reaches_and_works_everything(page: Browser, folder: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        ActionChains(page.driver).send_keys(*keys).perform()

    def focused() -> str:
        return str(page.run(FOCUSED))

    def press_tab_until(wanted: str) -> list[str]:
        passed = []
        for _ in range(40):
            press(Keys.TAB)
            passed.append(focused())
            outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none" or passed[-1] == "BODY", (
                f"{passed[-1]} does not show that it has the keyboard"
            )
            if passed[-1] == wanted:
                return passed
        raise AssertionError(f"{wanted} is not reached: {passed}")

    passed = press_tab_until("range slider for Names per image")
    assert [
        where for where in passed if where in ("images", "examples", "names", "Name", "Scan a folder")
    ] == [
        "images",
        "examples",
        "names",
        "Name",
        "Scan a folder",
    ]

    upload(page, folder / "first.png")
    page.wait_for_text("#named", "1 image")
    press(Keys.ARROW_RIGHT)
    page.wait(lambda: len(page.find_all("#named .vl-bars li")) == 4, "four names are shown")

    for name, last in (("Adapt", "adapt"), ("Find a phrase", "find"), ("Scan a folder", "scan")):
        page.run("document.activeElement.blur()")
        press_tab_until(name)
        press(Keys.ENTER)
        press_tab_until(last)
        press(Keys.ENTER)
        page.wait_for_text({"adapt": "#adapted", "find": "#found", "scan": "#scanned"}[last], "image")


def test_nothing_is_asked_of_the_world(page: Browser, address: str, folder: Path) -> None:
    """After all other tests of this file: the process connected to this machine alone, and runs no other pages."""
    first, *lines = (folder / "connections.txt").read_text().splitlines()
    assert first == "watching"
    foreign = [line for line in lines if not re.search(r"127\.0\.0\.1|'?::1|localhost|/", line)]
    assert foreign == []

    html = urllib.request.urlopen(address).read().decode()
    assert not re.search(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["'](?:https?:)?//""", html)
    config = json.loads(urllib.request.urlopen(f"{address}/config").read())
    assert config["analytics_enabled"] is False

    for path, headers in (("/", {"Host": "evil.example"}), ("/gradio_api/proxy=http://127.0.0.1", {})):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(urllib.request.Request(address + path, headers=headers))
    # A file of this machine is not served.
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{address}/gradio_api/file={folder}/secret/secret0.png")
