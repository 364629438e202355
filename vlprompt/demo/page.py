"""The page itself, in Gradio: what stands where, and which answer goes where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from jinja2 import Environment, PackageLoader

from vlprompt.adaptation import list_adapters
from vlprompt.core.errors import VLPromptError
from vlprompt.data import load_dataset
from vlprompt.data.images import EXTENSIONS
from vlprompt.demo import answers
from vlprompt.demo.answers import Answer
from vlprompt.demo.limits import Limits
from vlprompt.demo.models import EXAMPLES, DemoModels

__all__ = ["CSS", "TEXTS", "THEME", "build_page", "draw_examples"]

CSS = Path(__file__).with_name("page.css")

# Fonts of the system alone: nothing is fetched. White on the darker blues is at least 4.5 to 1.
THEME = gr.themes.Default(
    primary_hue="blue",
    secondary_hue="blue",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    link_text_color_dark="*primary_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
    button_primary_text_color_dark="white",
)

# Gradio 6.31 shows the name of this text in place of the text.
TEXTS = gr.I18n(en={"common.upload": "Add images"})

_TEMPLATE = Environment(
    loader=PackageLoader("vlprompt.demo", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
).get_template("answer.html.j2")

_TOPK = 3
_SHOWN = 12  # images of a scan
_EXAMPLES = 4

# One question at a time: models keep what they computed for the last one.
_ONE_AT_A_TIME: dict[str, Any] = {
    "concurrency_id": "models",
    "concurrency_limit": 1,
    "api_visibility": "private",
}


def build_page(models: DemoModels, limits: Limits, examples: Sequence[Path]) -> gr.Blocks:
    """Return the page.

    Args:
        models: What answers.
        limits: What may be asked.
        examples: Files of the images that a button fills in.
    """
    with gr.Blocks(title="vlprompt", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(f"<h1>vlprompt</h1><p>{escape(_about(models))}</p>")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                images = gr.File(
                    label=f"Images: at most {limits.images}, of {limits.megabytes} MB each",
                    file_count="multiple",
                    file_types=list(EXTENSIONS),
                    elem_id="images",
                )
                fill = gr.Button("Fill in example images", elem_id="examples")
                names = gr.Textbox(
                    "\n".join(models.learner.classnames),
                    label="Class names, one a line",
                    lines=6,
                    max_lines=12,
                    elem_id="names",
                )
            with gr.Column(scale=5, min_width=280), gr.Tabs(overflow_behavior="wrap"):
                with gr.Tab("Name"):
                    _name_tab(models, limits, images, names)
                with gr.Tab("Adapt"):
                    _adapt_tab(models, limits, images, names)
                with gr.Tab("Find a phrase"):
                    _phrase_tab(models, limits, images)
                with gr.Tab("Scan a folder"):
                    _scan_tab(models, limits)

        fill.click(lambda: [str(path) for path in examples], None, images, **_ONE_AT_A_TIME)
    return page


def draw_examples(folder: Path) -> list[Path]:
    """Write a few embedded images, of different classes, into a folder."""
    data = load_dataset(EXAMPLES, "test")
    paths = []
    for number, label in enumerate(range(0, len(data.classnames), len(data.classnames) // _EXAMPLES), 1):
        image, _ = data[data.labels.index(label)]
        paths.append(folder / f"scene {number}.png")
        image.save(paths[-1])
    return paths[:_EXAMPLES]


def _about(models: DemoModels) -> str:
    learner = models.learner
    return f"{learner.title()} on {learner.backbone.name}. Nothing that you upload leaves this machine."


def _name_tab(models: DemoModels, limits: Limits, images: gr.File, names: gr.Textbox) -> None:
    topk = gr.Slider(1, 10, _TOPK, step=1, label="Names per image", elem_id="topk")
    shown = gr.HTML(elem_id="named")

    @_as_html
    def answer(paths: list[str] | None, text: str, count: int) -> Answer | None:
        if not paths:  # an empty page is no mistake
            return None
        return answers.name_images(models.learner, paths, text, count, limits)

    # While somebody types, only the last state counts.
    gr.on(
        [images.change, names.change, topk.change],
        answer,
        [images, names, topk],
        shown,
        trigger_mode="always_last",
        show_progress="minimal",
        **_ONE_AT_A_TIME,
    )


def _adapt_tab(models: DemoModels, limits: Limits, images: gr.File, names: gr.Textbox) -> None:
    method = gr.Dropdown(list_adapters(), value="tpt", label="Method", elem_id="adapter")
    button = gr.Button("Adapt", variant="primary", elem_id="adapt")
    shown = gr.HTML(elem_id="adapted")

    @_as_html
    def answer(paths: list[str] | None, text: str, adapter: str) -> Answer:
        return answers.adapt_to_images(models.learner, paths or [], text, adapter, _TOPK, limits)

    button.click(answer, [images, names, method], shown, **_ONE_AT_A_TIME)


def _phrase_tab(models: DemoModels, limits: Limits, images: gr.File) -> None:
    phrase = gr.Textbox("a yellow cross", label="Phrase", elem_id="phrase")
    threshold = gr.Slider(
        0.05, 0.95, 0.5, step=0.05, label="Probability above which a pixel is inside", elem_id="threshold"
    )
    button = gr.Button("Find", variant="primary", elem_id="find")
    shown = gr.HTML(elem_id="found")

    @_as_html
    def answer(paths: list[str] | None, words: str, limit: float) -> Answer:
        return answers.find_phrase(models.segmenter, paths or [], words, limit, limits)

    gr.on([button.click, phrase.submit], answer, [images, phrase, threshold], shown, **_ONE_AT_A_TIME)


def _scan_tab(models: DemoModels, limits: Limits) -> None:
    folder = gr.Textbox(limits.first_folder(), label="Folder", elem_id="folder")
    top = gr.Slider(1, 60, _SHOWN, step=1, label="Images to show", elem_id="top")
    button = gr.Button("Scan", variant="primary", elem_id="scan")
    shown = gr.HTML(elem_id="scanned")

    @_as_html
    def answer(text: str, count: int, progress: gr.Progress = gr.Progress()) -> Answer:  # noqa: B008 - Gradio's way
        def show(_: str, done: int, total: int) -> None:
            progress((done, total), unit="images")

        return answers.scan_for_triggers(models.scanner, text, count, limits, show)

    gr.on([button.click, folder.submit], answer, [folder, top], shown, **_ONE_AT_A_TIME)


def _as_html(answer: Callable[..., Answer | None]) -> Callable[..., str]:
    """Return a function that gives an answer, or a user's mistake, as HTML."""

    @wraps(answer)
    def html(*arguments: Any) -> str:
        try:
            return _TEMPLATE.render(answer=answer(*arguments))
        except VLPromptError as error:
            return _TEMPLATE.render(error=str(error))
        except MemoryError:
            return _TEMPLATE.render(error="There is not enough memory. Use fewer or smaller images.")
        except OSError as error:  # a full disk, a folder that may not be listed
            return _TEMPLATE.render(error=f"{error.strerror or error}.")

    return html
