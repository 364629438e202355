"""The report: it stands alone, holds the figures given, and class names can't break it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.experiments.report import RunRecord, write_report

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and refuses badly nested HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def make_image(index: int) -> Image.Image:
    return Image.new("RGB", (300, 200), (index % 256, 40, 90))


def run(classes: int = 3, samples: int = 60, **changes: object) -> RunRecord:
    rng = np.random.default_rng(0)
    labels = np.arange(samples) % classes
    probs = rng.dirichlet(np.ones(classes), samples)
    probs[::2] = 0.9 * np.eye(classes)[labels[::2]] + 0.1 / classes
    values: dict[str, object] = {
        "title": "CoOp on scenes/shape",
        "headline": {"zero-shot": 0.571, "CoOp": 0.848},
        "metrics": {"accuracy": 0.848, "accuracy_ci95": 0.0123, "nll": 0.61234, "runs": 3.0},
        "history": [
            {"epoch": e, "loss": 1 / (e + 1), "lr": 0.002, "val/accuracy": 0.5 + e / 10} for e in range(4)
        ],
        "classnames": [f"class {c}" for c in range(classes)],
        "labels": labels,
        "probs": probs,
        "image": make_image,
        "curves": {"zero-shot": [(0, 0.571, None)], "CoOp": [(1, 0.6, 0.02), (16, 0.848, 0.01)]},
        "config": "learner: coop\n",
        "environment": {"backbone": "tiny 3f9ac0"},
    }
    return RunRecord(**{**values, **changes})  # type: ignore[arg-type]


def read(path: Path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an ordinary run."""
    return write_report(tmp_path_factory.mktemp("usual") / "report.html", run())


def test_nothing_is_fetched_from_anywhere(usual: Path) -> None:
    html, page = read(usual)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), (tag, name, target)
    assert not re.search(r"@import|url\((?!#)", html)


def test_the_figures_given_are_on_the_page(usual: Path) -> None:
    _, page = read(usual)
    for text in (
        "CoOp on scenes/shape",
        "57.1",
        "84.8",
        "+27.7 points",
        "84.8 ± 1.2 %",
        "0.6123",
        "tiny 3f9ac0",
    ):
        assert text in page.text
    charts = [a["aria-label"] for t, a in page.tags if t == "svg"]
    assert charts == [
        "Accuracy against shots",
        "Learning curves",
        "Accuracy per class",
        "Confusion matrix",
        "Confidence against accuracy",
    ]
    assert "learner: coop" in page.text


def test_sample_images_are_right_and_wrong_ones_with_probabilities(tmp_path: Path) -> None:
    record = run()
    asked: list[int] = []

    def remember(index: int) -> Image.Image:
        asked.append(index)
        return make_image(index)

    record.image = remember
    _, page = read(write_report(tmp_path / "report.html", record))
    hits = record.probs[asked].argmax(1) == record.labels[asked]
    assert (hits.sum(), (~hits).sum()) == (8, 8)
    wrong = [i for i, hit in zip(asked, hits, strict=True) if not hit]
    assert list(record.probs[wrong].max(1)) == sorted(record.probs[wrong].max(1), reverse=True)
    assert {record.labels[i] for i, hit in zip(asked, hits, strict=True) if hit} == {0, 1, 2}
    sources = [a["src"] for t, a in page.tags if t == "img"]
    shown = Image.open(io.BytesIO(base64.b64decode(sources[0].split(",")[1])))
    assert shown.getpixel((5, 5)) == (asked[0], 40, 90)
    assert max(shown.size) <= 144
    assert f"{100 * record.probs[asked[0]].max():.0f} %" in page.text


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", '"><img src="http://example.invalid/x.png">', "$\\frac{1}$ & 猫"]
    record = run(classnames=names, title="<b>run</b>", config="<i>", environment={"<u>": "</table>"})
    _, page = read(write_report(tmp_path / "report.html", record))
    assert "script" not in {t for t, _ in page.tags}
    assert all(a["src"].startswith("data:") for t, a in page.tags if t == "img")
    assert "<b>run</b>" in page.text
    assert all(name[:20] in page.text for name in names)


def test_many_classes_give_a_list_of_confusions_and_a_small_page(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", run(classes=200, samples=2000))
    _, page = read(path)
    assert "Confusion matrix" not in [a.get("aria-label") for _, a in page.tags]
    assert "of 200 classes, the lowest and the highest 20" in page.text
    assert path.stat().st_size < 500_000


def test_a_class_without_samples_and_an_unreadable_image(tmp_path: Path) -> None:
    record = run()
    keep = record.labels != 2

    def unreadable(index: int) -> Image.Image:
        raise DataError(f"image {index} is truncated.")

    record.labels, record.probs, record.image = record.labels[keep], record.probs[keep], unreadable
    _, page = read(write_report(tmp_path / "report.html", record))
    assert page.text.count("not readable") == 16


def test_a_bare_record_and_failures(tmp_path: Path) -> None:
    record = RunRecord("bare", failures=["digits_1shots_seed2: the loss is NaN at step 12."])
    html, page = read(write_report(tmp_path / "report.html", record))
    assert "1 run failed" in page.text
    assert "digits_1shots_seed2: the loss is NaN at step 12." in page.text
    assert "<svg" not in html


def test_the_same_run_gives_the_same_bytes_and_drawing_leaves_matplotlib_as_it_was(
    usual: Path, tmp_path: Path
) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    assert write_report(tmp_path / "again.html", run()).read_bytes() == usual.read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\(60, 2\).*got \(60, 3\)"):
        write_report(tmp_path / "report.html", run(classnames=["a", "b"]))
    assert not (tmp_path / "report.html").exists()
