"""The report's charts: matplotlib figures as inline SVG that takes its ink from the page, light or dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = [
    "confusion",
    "curves",
    "learning_curves",
    "per_class",
    "reliability",
    "shares_by_layer",
    "shots_curve",
    "transfer_matrix",
]

PALETTE = ("#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#64748b")
INK = "#0a0b0c"  # stands for the page's text colour, put in when the SVG is written
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "vlprompt",  # the same run gives the same bytes
    "text.color": INK,
    "text.parse_math": False,  # class names may hold dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}


def learning_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Draw loss, accuracy and learning rate over epochs.

    Args:
        history: One record per epoch; ``epoch`` counts from 0. Numbers whose key holds ``loss``,
            ``accuracy`` or ``lr`` are drawn, accuracies (fractions) in percent.
    """
    groups = {"loss": ("loss", 1.0), "accuracy": ("accuracy (%)", 100.0), "lr": ("learning rate", 1.0)}
    keys = list(
        dict.fromkeys(k for record in history for k, v in record.items() if isinstance(v, int | float))
    )
    panels = {g: [k for k in keys if g in re.split(r"[/_]", k)] for g in groups}

    panels = {g: lines for g, lines in panels.items() if lines}
    if not panels:
        return ""

    with rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * len(panels), 2.7), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (group, lines) in zip(axes, panels.items(), strict=True):
            title, factor = groups[group]
            for colour, key in zip(PALETTE * len(lines), lines, strict=False):
                points = [
                    (r.get("epoch", i) + 1, factor * r[key])
                    for i, r in enumerate(history)
                    if isinstance(r.get(key), int | float)
                ]
                marker = "o" if len(points) <= 60 else ""
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=2.5, label=key)

            _finish(axis, title, "epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))

            if len(lines) > 1:
                axis.legend(fontsize=8)

        return _svg(figure, "Learning curves")


def per_class(names: Sequence[str], recall: np.ndarray, counts: np.ndarray, shown: int = 40) -> str:
    """Draw each class's accuracy as a bar, worst first; of many classes only the worst and the best.

    Args:
        names: C class names.
        recall: Accuracy per class, (C,); NaN where a class has no sample.
        counts: Samples per class, (C,).
        shown: Most bars drawn.
    """
    order = [int(c) for c in np.argsort(recall, kind="stable") if counts[c] > 0]
    if len(order) > shown:
        order = [*order[: shown // 2], *order[-(shown // 2) :]]

    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 0.6 + 0.2 * len(order)), layout="constrained")
        axis = figure.subplots()
        values = 100 * recall[order]
        axis.barh(range(len(order)), values, color=[_traffic(v) for v in values], height=0.72)

        for row, (value, c) in enumerate(zip(values, order, strict=True)):
            axis.text(value + 0.8, row, f"{value:.0f}  (n={counts[c]})", va="center", fontsize=7, alpha=0.75)

        axis.set_yticks(range(len(order)), [_short(names[c]) for c in order], fontsize=8)
        axis.set_ylim(len(order) - 0.4, -0.6)
        axis.set_xlim(0, 112)
        axis.set_xticks([0, 20, 40, 60, 80, 100])
        axis.axvline(float(100 * np.nanmean(recall)), color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        _finish(axis, "", "accuracy (%), dotted: mean over classes", grid="x")

        return _svg(figure, "Accuracy per class")


def confusion(names: Sequence[str], counts: np.ndarray) -> str:
    """Draw the confusion matrix, each row as shares of its true class.

    Args:
        names: C class names.
        counts: Samples by true class (rows) and predicted class (columns), (C, C).
    """
    classes = len(names)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(7.2, max(3.6, 1.8 + 0.34 * classes))
    colours = LinearSegmentedColormap.from_list("share", [(0.23, 0.51, 0.96, 0.0), (0.23, 0.51, 0.96, 1.0)])
    font = 8 if classes <= 15 else 6

    with rc_context(_STYLE):
        figure = Figure(figsize=(size, size), layout="constrained")
        axis = figure.subplots()
        axis.imshow(share, cmap=colours, vmin=0, vmax=1)
        labels = [_short(n, 16) for n in names]
        axis.set_xticks(range(classes), labels, rotation=90, fontsize=font)
        axis.set_yticks(range(classes), labels, fontsize=font)

        if classes <= 15:
            for i, j in np.argwhere(counts > 0):
                axis.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=7)

        axis.spines[:].set_visible(False)
        axis.set(xlabel="predicted", ylabel="true")
        return _svg(figure, "Confusion matrix")


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> str:
    """Draw accuracy against confidence, with the share of samples in each bin behind it.

    Args:
        confidence: Probability of the predicted class, (n,).
        correct: Whether the prediction was right, (n,).
        bins: Equal-width bins, as in the calibration error.
    """
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    total = np.bincount(which, minlength=bins)
    used = total > 0
    hit = np.bincount(which, weights=correct, minlength=bins)[used] / total[used]
    mean = np.bincount(which, weights=confidence, minlength=bins)[used] / total[used]

    with rc_context(_STYLE):
        figure = Figure(figsize=(3.6, 3.2), layout="constrained")
        axis = figure.subplots()
        centres = 100 * (np.arange(bins) + 0.5) / bins
        axis.bar(
            centres, 100 * total / total.sum(), width=90 / bins, color=PALETTE[5], alpha=0.35, label="samples"
        )
        axis.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        axis.plot(100 * mean, 100 * hit, color=PALETTE[0], marker="o", markersize=4, label="accuracy")
        axis.set(xlim=(0, 101), ylim=(0, 102), ylabel="accuracy, share of samples (%)")
        axis.legend(fontsize=8, loc="upper left")
        _finish(axis, "", "confidence (%)")

        return _svg(figure, "Confidence against accuracy")


def shots_curve(
    curves: Mapping[str, Sequence[tuple[int, float, float | None]]],
    x: str = "training samples per class",
    y: str = "accuracy (%)",
    title: str = "Accuracy against shots",
) -> str:
    """Draw a measure against a number, with 95 % intervals: accuracy against training samples per class, or others.

    Args:
        curves: Method to (shots, accuracy, half-width of the interval or None), fractions. A single point
        with
            0 shots (zero-shot) becomes a horizontal line.
        x: What the number is.
        y: What the measure is.
        title: What the figure is, for who can't see it.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.2), layout="constrained")
        axis = figure.subplots()

        for colour, (method, points) in zip(PALETTE * len(curves), curves.items(), strict=False):
            if [k for k, _, _ in points] == [0]:
                axis.axhline(100 * points[0][1], color=colour, linestyle="--", label=method)
                continue

            shots, mean, half = (np.array(column, dtype=float) for column in zip(*points, strict=True))
            axis.plot(shots, 100 * mean, color=colour, marker="o", markersize=4, label=method)
            half = np.nan_to_num(half)
            axis.fill_between(
                shots, 100 * (mean - half), 100 * (mean + half), color=colour, alpha=0.15, linewidth=0
            )

        ticks = sorted({k for points in curves.values() for k, _, _ in points if k > 0})
        if ticks:
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(k) for k in ticks])
            axis.minorticks_off()

        axis.set_ylabel(y)
        axis.legend(fontsize=8)
        _finish(axis, "", x)

        return _svg(figure, title)


def shares_by_layer(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Draw a share of every layer as bars, one colour per series.

    Args:
        shares: Series to layer to fraction; layers from top to bottom in the order they first appear.
    """
    layers = list(dict.fromkeys(layer for series in shares.values() for layer in series))
    height = 0.8 / max(1, len(shares))

    with rc_context(_STYLE):
        figure = Figure(
            figsize=(7.2, 0.8 + 0.2 * len(layers) * max(1.0, 0.6 * len(shares))), layout="constrained"
        )
        axis = figure.subplots()

        for i, (label, series) in enumerate(shares.items()):
            rows = [row + (i - (len(shares) - 1) / 2) * height for row in range(len(layers))]
            values = [100 * series.get(layer, 0.0) for layer in layers]
            axis.barh(rows, values, height=0.9 * height, color=PALETTE[i % len(PALETTE)], label=label)

        axis.set_yticks(range(len(layers)), [_short(layer, 48) for layer in layers], fontsize=7)
        axis.set_ylim(len(layers) - 0.4, -0.6)
        _finish(axis, "", "weights switched off (%)", grid="x")

        if len(shares) > 1:
            axis.legend(fontsize=8)
        return _svg(figure, "Weights switched off, by layer")


def transfer_matrix(names: Sequence[str], gains: np.ndarray) -> tuple[str, bytes]:
    """Draw what each source (row) is worth to each target (column), as SVG for a page and as a PNG image.

    Args:
        names: N tasks.
        gains: (N, N) relative gains in percent; NaN leaves a gap.
    """
    count = len(names)
    finite = np.abs(gains[np.isfinite(gains)])
    limit = max(1.0, float(finite.max())) if finite.size else 1.0
    ends = [(0.94, 0.27, 0.27, 1.0), (0.5, 0.5, 0.5, 0.04), (0.06, 0.73, 0.51, 1.0)]
    colours = LinearSegmentedColormap.from_list("gain", ends)
    size = max(4.2, 2.2 + 0.42 * count)

    with rc_context(_STYLE):
        figure = Figure(figsize=(size + 0.8, size), layout="constrained")
        axis = figure.subplots()
        drawn = axis.imshow(gains, cmap=colours, vmin=-limit, vmax=limit)
        labels = [_short(n, 18) for n in names]
        axis.set_xticks(range(count), labels, rotation=90, fontsize=8)
        axis.set_yticks(range(count), labels, fontsize=8)

        for i, j in np.argwhere(np.isfinite(gains)) if count <= 20 else ():
            axis.text(j, i, f"{gains[i, j]:+.1f}", ha="center", va="center", fontsize=7)

        axis.spines[:].set_visible(False)
        axis.set(xlabel="target", ylabel="source")
        figure.colorbar(
            drawn, ax=axis, shrink=0.8, label="relative gain over scratch (%)"
        ).outline.set_visible(False)
        png = io.BytesIO()
        figure.set_facecolor("white")
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
        figure.set_facecolor("none")

        return _svg(figure, "Relative gain of every target from every source"), png.getvalue()


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str) -> str:
    """Draw several quantities over one axis.

    Args:
        lines: Label to points (x, y).
        xlabel: Of the common axis.
        ylabel: Of the quantity.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 2.8), layout="constrained")
        axis = figure.subplots()

        for colour, (label, points) in zip(PALETTE * len(lines), lines.items(), strict=False):
            axis.plot(*zip(*points, strict=True), color=colour, label=label)

        axis.set_ylabel(ylabel)
        _finish(axis, "", xlabel)
        axis.legend(fontsize=8)

        return _svg(figure, f"{ylabel} by {xlabel}")


def _finish(axis: Axes, title: str, xlabel: str, grid: Literal["both", "x", "y"] = "both") -> None:
    axis.grid(True, axis=grid)
    axis.set_axisbelow(True)
    axis.set_title(title)
    axis.set_xlabel(xlabel)


def _traffic(percent: float) -> str:
    return PALETTE[4] if percent < 50 else PALETTE[1] if percent < 80 else PALETTE[2]


def _short(name: str, length: int = 30) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _svg(figure: Figure, label: str) -> str:
    """Return a figure as an ``<svg>`` element that scales with its container."""
    out = io.BytesIO()
    with warnings.catch_warnings():  # the browser's fonts draw the text, so a glyph missing here is no loss
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(out, metadata=nothing)

    text = out.getvalue().decode()
    text = re.sub(
        r"<metadata>.*?</metadata>| font-family: [^;\"]*;", "", text[text.index("<svg") :], flags=re.DOTALL
    )
    style = f"width:100%;max-width:{figure.get_figwidth() * 96:.0f}px;height:auto"
    text = re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)
    text = text.replace("<svg", f'<svg role="img" aria-label="{label}" style="{style}"', 1)

    return text.replace(INK, "currentColor")
