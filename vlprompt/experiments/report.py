"""One self-contained HTML page about a run: what was reached, how it got there, where it goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.files import write_text
from vlprompt.core.paths import user_path
from vlprompt.data.thumbnails import data_uri
from vlprompt.experiments.tables import Table, is_fraction, written

__all__ = ["RunRecord", "write_report"]

MATRIX_CLASSES = 40  # above this a confusion matrix can't be read, and a list of confusions can
ImageSource = Callable[[int], Image.Image]


@dataclass
class RunRecord:
    """Everything a report shows; whatever is left empty is left out of the page.

    Attributes:
        title: The run in a few words, for example ``"CoOp on scenes/shape"``.
        headline: Label to a fraction, from the baseline to the final result; the page opens with these.
        summary: One or two sentences below the title.
        metrics: Flat keys of metrics.json.
        history: One record per epoch (see :func:`vlprompt.experiments.figures.learning_curves`).
        classnames: C names.
        labels: True classes of the test samples, (n,).
        probs: Predicted probabilities, (n, C).
        image: Returns the i-th test image; it is asked for the few samples shown.
        curves: Method to (shots, accuracy, half-width of the 95 % interval or None).
        tables: Of results.
        listings: Title to (what it shows, lines of text).
        drawings: Title to (what it shows, SVG), for what only some protocols have.
        failures: What went wrong in cells of a protocol, one sentence each.
        config: The resolved configuration, YAML.
        command: The command that repeats the run.
        environment: Fingerprints and versions.
    """

    title: str
    headline: Mapping[str, float] = field(default_factory=dict)
    summary: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    classnames: Sequence[str] = ()
    labels: np.ndarray | None = None
    probs: np.ndarray | None = None
    image: ImageSource | None = None
    curves: Mapping[str, Sequence[tuple[int, float, float | None]]] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    listings: Mapping[str, tuple[str, Sequence[str]]] = field(default_factory=dict)
    drawings: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    failures: Sequence[str] = ()
    config: str = ""
    command: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)


def write_report(path: Path | str, record: RunRecord) -> Path:
    """Write the report of a run as one HTML file that needs nothing else, neither files nor network.

    Args:
        path: Where to; a name ending in ``.html``.
        record: What to show.

    Returns:
        The path written.

    Raises:
        DataError: If probabilities, labels and class names don't fit each other.
        CheckpointError: If the file can't be written; an older report stays as it was.
    """
    page = render(record)
    write_text(user_path(path), page)
    return user_path(path)


def render(record: RunRecord) -> str:
    """Return the page as HTML (see :func:`write_report`)."""
    # Drawing and templating libraries take a second to import, and a command that writes no report needs
    # neither.
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    from vlprompt.experiments import figures

    page = Environment(
        loader=PackageLoader("vlprompt.experiments", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    values: dict[str, Any] = {
        "run": record,
        "headline": _headline(record.headline),
        "metrics": _metrics(record.metrics),
    }
    values["tables"] = [_table(table) for table in record.tables]
    values["curves_svg"] = Markup(figures.learning_curves(record.history)) if record.history else ""
    values["drawings"] = [(title, text, Markup(svg)) for title, (text, svg) in record.drawings.items()]
    values["shots_svg"] = Markup(figures.shots_curve(record.curves)) if record.curves else ""
    if record.probs is not None and record.labels is not None:
        values |= _predictions(
            record, np.asarray(record.probs, dtype=float), np.asarray(record.labels, dtype=int)
        )
    return page.get_template("report.html.j2").render(values)


def _predictions(record: RunRecord, probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return what the page shows of the predictions on the test samples."""
    from markupsafe import Markup

    from vlprompt.experiments import figures

    names = list(record.classnames)
    classes = len(record.classnames)
    if probs.shape != (len(labels), classes) or not len(labels):
        raise DataError(
            f"the report needs probabilities of shape ({len(labels)}, {classes}), "
            f"one row per label and one column per class name; got {probs.shape}."
        )
    guesses = probs.argmax(1)
    counts = np.zeros((classes, classes), dtype=int)
    np.add.at(counts, (labels, guesses), 1)
    per_class = counts.sum(1)
    recall = np.divide(counts.diagonal(), per_class, out=np.full(classes, np.nan), where=per_class > 0)
    return {
        "per_class_svg": Markup(figures.per_class(names, recall, per_class)),
        "confusion_svg": Markup(figures.confusion(names, counts)) if classes <= MATRIX_CLASSES else "",
        "confusions": _top_confusions(names, counts, 5 if classes <= MATRIX_CLASSES else 20),
        "reliability_svg": Markup(figures.reliability(probs.max(1), guesses == labels)),
        "samples": _samples(record, record.image, probs, labels) if record.image else [],
        "tested": len(labels),
        "correct": int((guesses == labels).sum()),
    }


def _headline(headline: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the large numbers; from the second on with the gain over the first, in points."""
    first = next(iter(headline.values()), 0.0)
    return [
        {"label": label, "percent": 100 * value, "gain": 100 * (value - first) if i else None}
        for i, (label, value) in enumerate(headline.items())
    ]


def _table(table: Table) -> dict[str, Any]:
    """Return a table's title, header, lines of text and note."""
    columns = table.columns or list(dict.fromkeys(column for row in table.rows for column in row.values))
    lines = []
    for row in table.rows:
        mark = " †" if row.source == "published" else ""
        lines.append(
            [
                row.method + mark,
                *(written(row.values.get(column), table.formats.get(column)) for column in columns),
            ]
        )
    return {"title": table.title or "Results", "columns": columns, "lines": lines, "note": table.note}


def _metrics(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return (key, text) per metric, its interval in the same line; fractions in percent."""
    rows = []
    for key, value in metrics.items():
        if key.endswith(("_std", "_ci95")):
            continue

        half = metrics.get(f"{key}_ci95")

        if is_fraction(key):
            text = f"{100 * value:.1f}" + (f" ± {100 * half:.1f}" if half is not None else "") + " %"
        else:
            text = f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"
            text += f" ± {half:.2g}" if half is not None else ""

        rows.append((key, text))

    return rows


def _top_confusions(names: Sequence[str], counts: np.ndarray, top: int) -> list[dict[str, Any]]:
    wrong = counts - np.diag(counts.diagonal())
    pairs = sorted(map(tuple, np.argwhere(wrong > 0)), key=lambda p: (-wrong[p], p))[:top]
    return [
        {
            "true": names[i],
            "guess": names[j],
            "count": int(wrong[i, j]),
            "share": 100 * wrong[i, j] / counts[i].sum(),
        }
        for i, j in pairs
    ]


def _samples(
    record: RunRecord, image: ImageSource, probs: np.ndarray, labels: np.ndarray, each: int = 8
) -> list[dict[str, Any]]:
    """Return images: the most confident mistakes first, then right ones of as many classes as possible."""
    confidence = probs.max(1)
    guesses = probs.argmax(1)
    by_confidence = np.argsort(-confidence, kind="stable")
    wrong = [int(i) for i in by_confidence if guesses[i] != labels[i]][:each]
    right = [int(i) for i in by_confidence if guesses[i] == labels[i]]
    first_of_class = list({labels[i]: i for i in reversed(right)}.values())
    spread = np.linspace(0, len(first_of_class) - 1, min(each, len(first_of_class))).astype(int)
    chosen = [first_of_class[i] for i in spread]
    chosen += [i for i in right if i not in chosen][: each - len(chosen)]
    groups = {"Most confident mistakes": wrong, "Right": chosen}

    return [
        {"title": title, "images": [_sample(record, image, probs[i], int(labels[i]), i) for i in indices]}
        for title, indices in groups.items()
        if indices
    ]


def _sample(
    record: RunRecord, image: ImageSource, probs: np.ndarray, label: int, index: int
) -> dict[str, Any]:
    try:
        uri, pixelated = data_uri(image(index))
    except DataError:  # an image that went missing since must not cost the report
        uri = ""
        pixelated = False

    top = [int(c) for c in np.argsort(-probs, kind="stable")[:3]]
    guesses = [{"name": record.classnames[c], "percent": 100 * probs[c], "hit": c == label} for c in top]
    return {"image": uri, "pixelated": pixelated, "true": record.classnames[label], "guesses": guesses}
