"""What a segmentation run leaves for people: tables, gains, Dice against depth, images with masks, one page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from vlprompt.core.files import write_atomic, write_text
from vlprompt.experiments import tables
from vlprompt.experiments.report import RunRecord, write_report
from vlprompt.experiments.statistics import Summary, paired_difference, summarise

if TYPE_CHECKING:
    from vlprompt.segmentation.config import SegmentConfig
    from vlprompt.segmentation.experiment import SegmentCell, Session

__all__ = ["summary", "write_results"]

Cells = Mapping["SegmentCell", Mapping[str, float]]
_SHOWN = (
    "dice",
    "iou",
    "hd95",
    "macro_dice",
    "macro_iou",
    "iou_dataset",
    "all_foreground_dice",
    "dice_empty",
    "argmax_miou",
)
_PUBLISHED = "MedVLSM, MIDL 2024, 2308.07706, table 2: whole model fine-tuned, same splits"
#: Test Dice of models fine-tuned end to end, in percent. TuneVLSeg's repository holds no table of its own results.
_FINE_TUNED = {
    "CLIPSeg": {"kvasir_seg": 89.51, "clinicdb": 88.74, "bkai_igh": 86.47, "isic2016": 92.12, "dfu": 73.24,
                "camus": 88.85, "busi": 64.32, "chexlocalize": 59.56},
    "CRIS": {"kvasir_seg": 91.39, "clinicdb": 91.69, "bkai_igh": 92.40, "isic2016": 91.94, "dfu": 76.13,
             "camus": 91.09, "busi": 69.31, "chexlocalize": 62.57},
}  # fmt: skip


def summary(config: SegmentConfig, cells: Cells) -> dict[str, float]:
    """Return flat figures: ``<model>/<strategy>[/depthJ]/<data set>/<measure>`` with ``_ci95``, and paired gains."""
    flat: dict[str, float] = {}
    for model, strategy, depth in _rows(cells):
        for name in _columns(config):
            place = f"{model}/{strategy}" + ("" if depth is None else f"/depth{depth}") + f"/{name}"
            for measure in _SHOWN:
                values = _by_seed(config, cells, model, strategy, depth, name, measure)
                if values:
                    flat |= summarise(list(values.values())).flat(f"{place}/{measure}")
            gain = _gain(config, cells, model, strategy, depth, name)
            if gain is not None and strategy != config.baseline:
                flat |= gain.flat(f"{place}/dice_gain")
        trainable = [
            n["trainable"]
            for c, n in cells.items()
            if (c.model, c.strategy, c.depth) == (model, strategy, depth)
        ]
        flat[f"{model}/{strategy}" + ("" if depth is None else f"/depth{depth}") + "/trainable"] = trainable[
            0
        ]
    return flat


def write_results(
    session: Session, cells: Cells, metrics: Mapping[str, Any], failures: Sequence[str], command: str
) -> str:
    """Write tables, figures, overlays and the report into the run's folder; return the Markdown."""
    from vlprompt.segmentation.overlays import overlay_sheets

    config, folder = session.config, session.folder
    dice, gains = _dice_rows(config, cells), _gain_rows(config, cells)
    columns = [*_columns(config)]
    markdown = f"{_heading(config)}\n\n{tables.to_markdown(dice, columns)}"
    if others := _other_rows(config, cells):
        markdown += f"\nOther measures, mean over data sets; distances (hd95) in pixels:\n\n{others}"
    if gains:
        text = f"\nGain in Dice over {config.baseline}, in points, paired over seeds:\n\n"
        markdown += text + tables.to_markdown(gains, columns, best=False)
    write_text(folder / "results.md", markdown)
    write_text(folder / "results.csv", tables.to_csv(dice, columns))
    write_text(folder / "results.tex", tables.to_latex(dice, columns))
    drawings = _depth_figure(config, cells)
    for title, (_, svg) in drawings.items():
        write_text(folder / f"{'-'.join(title.lower().split())}.svg", svg)
    for name, png in overlay_sheets(session, cells).items():
        write_atomic(folder / "overlays" / f"{name}.png", _writer(png))
        data = base64.b64encode(png).decode()
        image = f'<img alt="{name}" style="max-width:100%" src="data:image/png;base64,{data}">'
        drawings[f"Masks: {name}"] = ("Image, truth, and what each strategy finds (first seed).", image)
    write_report(folder / "report.html", _record(config, cells, metrics, drawings, failures, command))
    return markdown


def _writer(data: bytes) -> Any:
    return lambda path: path.write_bytes(data)


def _heading(config: SegmentConfig) -> str:
    seeds = ", ".join(map(str, config.seeds))
    images = f"{config.data.images} training images" if config.data.images else "all training images"
    asked = "the classes they show" if config.data.queries == "present" else "every class"
    return (
        f"Dice per pair at the masks' own size on test, {images}, seeds {seeds}; mean and 95 % interval over seeds. "
        f"Images are asked for {asked}. In brackets: numbers that learn."
    )


def _rows(cells: Cells) -> list[tuple[str, str, int | None]]:
    return list(dict.fromkeys((c.model, c.strategy, c.depth) for c in cells))


def _columns(config: SegmentConfig) -> list[str]:
    return [*config.data.names, *(["average"] if len(config.data.names) > 1 else [])]


def _by_seed(
    config: SegmentConfig, cells: Cells, model: str, strategy: str, depth: int | None, name: str, measure: str
) -> dict[int, float]:
    """Return a figure by seed; of the average over data sets only seeds that all of them have."""
    found: dict[int, list[float]] = {}
    for cell, numbers in cells.items():
        place = (cell.model, cell.strategy, cell.depth) == (model, strategy, depth)
        if place and name in (cell.dataset, "average") and measure in numbers:
            found.setdefault(cell.seed, []).append(numbers[measure])
    needed = len(config.data.names) if name == "average" else 1
    return {seed: sum(v) / len(v) for seed, v in found.items() if len(v) == needed}


def _gain(
    config: SegmentConfig, cells: Cells, model: str, strategy: str, depth: int | None, name: str
) -> Summary | None:
    """Return the paired gain in Dice over the baseline; a baseline that learns nothing is the same for every seed."""
    ours = _by_seed(config, cells, model, strategy, depth, name, "dice")
    theirs = _by_seed(config, cells, model, config.baseline, None, name, "dice")
    if not theirs or not ours:
        return None
    if len(theirs) == 1:
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    seeds = [s for s in ours if s in theirs]
    return paired_difference([ours[s] for s in seeds], [theirs[s] for s in seeds]) if seeds else None


def _label(cells: Cells, row: tuple[str, str, int | None]) -> str:
    model, strategy, depth = row
    count = int(_trainable(cells, row))
    return f"{model} {strategy}" + ("" if depth is None else f" depth {depth}") + f" ({count:,})"


def _trainable(cells: Cells, row: tuple[str, str, int | None]) -> float:
    return next(n["trainable"] for c, n in cells.items() if (c.model, c.strategy, c.depth) == row)


def _dice_rows(config: SegmentConfig, cells: Cells) -> list[tables.Row]:
    rows = []
    everything: dict[str, float] = {}
    for row in _rows(cells):
        values: dict[str, float | Summary] = {}
        for name in _columns(config):
            if found := _by_seed(config, cells, *row, name, "dice"):
                values[name] = summarise(list(found.values()))
            if found := _by_seed(config, cells, *row, name, "all_foreground_dice"):
                everything[name] = next(iter(found.values()))
        rows.append(tables.Row(_label(cells, row), values))
    rows.append(tables.Row("every pixel marked (0)", dict(everything)))
    for model, dice in _FINE_TUNED.items():
        known: dict[str, float | Summary] = {n: dice[n] / 100 for n in config.data.names if n in dice}
        if known:
            rows.append(tables.Row(f"{model} fine-tuned", known, "published", _PUBLISHED))
    return rows


def _gain_rows(config: SegmentConfig, cells: Cells) -> list[tables.Row]:
    rows = []
    for row in _rows(cells):
        found = {n: _gain(config, cells, *row, n) for n in _columns(config)}
        values: dict[str, float | Summary] = {n: g for n, g in found.items() if g is not None}
        if row[1] != config.baseline and values:
            rows.append(tables.Row(_label(cells, row), values))
    return rows


def _other_rows(config: SegmentConfig, cells: Cells) -> str:
    """Return a table of the other measures; it mixes percent and pixels, so it is written here."""
    name = _columns(config)[-1]
    measures = [m for m in _SHOWN[1:] if m != "all_foreground_dice" and any(m in n for n in cells.values())]
    lines = ["| method | " + " | ".join(measures) + " |", "|---|" + "---:|" * len(measures)]
    for row in _rows(cells):
        texts = []
        for measure in measures:
            found = _by_seed(config, cells, *row, name, measure)
            value = summarise(list(found.values())) if found else None
            if value is not None and measure == "hd95":
                texts.append(f"{value.mean:.1f}" + ("" if value.ci95 is None else f" ± {value.ci95:.1f}"))
            else:
                texts.append(tables.percent(value))
        lines.append(f"| {_label(cells, row)} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _depth_figure(config: SegmentConfig, cells: Cells) -> dict[str, tuple[str, str]]:
    if len(config.depths) < 2:
        return {}
    from vlprompt.experiments import figures

    name = _columns(config)[-1]
    curves: dict[str, list[tuple[int, float, float | None]]] = {}
    for model, strategy, depth in _rows(cells):
        found = list(_by_seed(config, cells, model, strategy, depth, name, "dice").values())
        if not found or (depth is None and strategy != config.baseline):
            continue
        value = summarise(found)
        curves.setdefault(f"{model} {strategy}", []).append((depth or 0, value.mean, value.ci95))
    text = (
        f"Dice on {name} against the number of layers with prompts of their own; 95 % intervals over seeds."
    )
    svg = figures.shots_curve(curves, "prompt depth (layers)", "Dice (%)", "Dice against prompt depth")
    return {"Dice against depth": (text, svg)}


def _record(
    config: SegmentConfig,
    cells: Cells,
    metrics: Mapping[str, Any],
    drawings: dict[str, tuple[str, str]],
    failures: Sequence[str],
    command: str,
) -> RunRecord:
    numbers = {
        k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    name = _columns(config)[-1]
    headline = {}
    for row in sorted(_rows(cells), key=lambda r: r[1] != config.baseline):
        if found := _by_seed(config, cells, *row, name, "dice"):
            headline[_label(cells, row)] = summarise(list(found.values())).mean
    return RunRecord(
        title=f"Segmentation of {', '.join(config.data.names)}",
        headline=dict(list(headline.items())[:6]),
        summary=_heading(config),
        metrics={k: v for k, v in numbers.items() if not k.endswith("hd95")},
        drawings=drawings,
        failures=failures,
        config=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        command=command,
        environment={k: str(v) for k, v in metrics.items() if k in ("vlprompt", "torch", "python")},
    )
