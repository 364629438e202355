"""What a benchmark of segmentation leaves for people: figures, tables, gains, Dice against depth."""

from __future__ import annotations

from collections.abc import Sequence

from vlprompt.experiments import figures
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.layout import AVERAGE, Layout, complete_means, gain_tables, label
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import Summary, paired_difference, summarise
from vlprompt.experiments.tables import Row, Table
from vlprompt.segmentation.config import SegmentationConfig

__all__ = ["benchmark_tables", "depth_caption", "depth_figure", "describe", "layout", "summary"]

_ROW = ("model", "method", "depth")
_METRICS = (
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
_ALL_FOREGROUND = "all_foreground_dice"
_TRAINABLE = "learns"
_FORMATS = {"hd95": ".1f", _TRAINABLE: ",.0f"}  # pixels, numbers; everything else is a fraction
_FIRST_FIGURES = 6  # that open the report

_CITATION = "MedVLSM, MIDL 2024, 2308.07706, table 2: whole model fine-tuned, same splits"
#: Test Dice of models fine-tuned end to end, in percent. TuneVLSeg's repository holds no table of its own results.
_FINE_TUNED = {
    "CLIPSeg": {"kvasir_seg": 89.51, "clinicdb": 88.74, "bkai_igh": 86.47, "isic2016": 92.12, "dfu": 73.24,
                "camus": 88.85, "busi": 64.32, "chexlocalize": 59.56},
    "CRIS": {"kvasir_seg": 91.39, "clinicdb": 91.69, "bkai_igh": 92.40, "isic2016": 91.94, "dfu": 76.13,
             "camus": 91.09, "busi": 69.31, "chexlocalize": 62.57},
}  # fmt: skip


def layout(config: SegmentationConfig, cells: Sequence[Cell]) -> Layout:
    """Return how results are laid out; what is said first is the Dice of the last row that is no baseline.

    Args:
        config: The benchmark's.
        cells: All of them.
    """
    rows = {label(_ROW, tuple(cell.get(name) for name in _ROW)): cell for cell in cells}
    baselines = {}

    for row, cell in rows.items():
        baseline = label(_ROW, (cell["model"], config.protocol.baseline, None))
        if config.protocol.baseline is not None and row != baseline:
            baselines[row] = (baseline,)

    compared = [cell for cell in cells if cell["method"] != config.protocol.baseline] or cells
    last = compared[-1]
    key = _key(config, (last["model"], last["method"], last.get("depth")), last.get("images"))
    return Layout(
        headline=f"{key}/{_columns(config)[-1]}/dice",
        metric="dice",
        rows=_ROW,
        columns=("data",),
        average="data",
        baselines=baselines,
        note=_heading(config),
    )


def summary(config: SegmentationConfig, results: Results) -> dict[str, float]:
    """Return flat figures: ``<model>/<method>[/depthJ][/imagesN]/<data set>/<metric>``, and paired gains in Dice."""
    flat: dict[str, float] = {}
    for images, lines in _by_images(config, results):
        for row, group in lines.by(*_ROW).items():
            key = _key(config, row, images)
            baseline = lines.select(model=row[0], method=config.protocol.baseline, depth=None)
            for column in _columns(config):
                for metric in _METRICS:
                    values = _by_seed(config, group, metric, column)
                    if values:
                        flat |= summarise(list(values.values())).flat(f"{key}/{column}/{metric}")
                gain = _gain(config, group, baseline, column)
                if gain is not None and row[1] != config.protocol.baseline:
                    flat |= gain.flat(f"{key}/{column}/dice_gain")
            flat[f"{key}/trainable"] = group.select("trainable", part=None).values()[0]

    return flat


def benchmark_tables(config: SegmentationConfig, results: Results, laid_out: Layout) -> list[Table]:
    """Return Dice beside published figures, the other metrics, and paired gains, for every number of images.

    Args:
        config: The benchmark's.
        results: All lines.
        laid_out: See :func:`layout`.
    """
    tables: list[Table] = []
    several = len(config.protocol.images) > 1

    for images, lines in _by_images(config, results):
        if not len(lines):
            continue

        title = f"{images or 'all'} training images" if several else ""
        tables.append(_dice_table(config, lines, title, laid_out.note))
        tables.append(_other_table(config, lines, title))
        tables += gain_tables(lines.select("dice", part=None), laid_out, title)

    return tables


def depth_figure(config: SegmentationConfig, results: Results) -> str:
    """Return Dice against the prompt depth as SVG; empty unless depths are compared."""
    if len(config.protocol.depths) < 2:
        return ""

    images = config.protocol.images[-1]
    lines = dict(_by_images(config, results))[images]
    column = _columns(config)[-1]
    curves: dict[str, list[tuple[int, float, float | None]]] = {}

    for row, group in lines.by(*_ROW).items():
        model, method, depth = row
        values = _by_seed(config, group, "dice", column)
        # What has no depth is a horizontal line: only the baseline is worth one.
        if not values or (depth is None and method != config.protocol.baseline):
            continue

        mean = summarise(list(values.values()))
        points = curves.setdefault(label(_ROW, (model, method, None)), [])
        points.append((int(depth or 0), mean.mean, mean.ci95))

    return figures.shots_curve(curves, "prompt depth (layers)", "Dice (%)", "Dice against prompt depth")


def depth_caption(config: SegmentationConfig) -> str:
    """Return what stands above the figure of :func:`depth_figure`."""
    column = _columns(config)[-1]
    return (
        f"Dice on {column} against the number of layers with prompts of their own; 95 % intervals over seeds."
    )


def describe(record: RunRecord, config: SegmentationConfig, results: Results) -> None:
    """Set the title, the summary and the figures that open the page, the baseline first."""
    record.title = f"Segmentation of {', '.join(config.data.names)}"
    record.summary = _heading(config)
    lines = dict(_by_images(config, results))[config.protocol.images[-1]]
    column = _columns(config)[-1]

    rows = sorted(lines.by(*_ROW).items(), key=lambda item: item[0][1] != config.protocol.baseline)
    for row, group in rows[:_FIRST_FIGURES]:
        values = _by_seed(config, group, "dice", column)
        if values:
            record.headline = {**record.headline, label(_ROW, row): summarise(list(values.values())).mean}


def _heading(config: SegmentationConfig) -> str:
    seeds = ", ".join(map(str, config.protocol.seeds))
    counts = "/".join(str(images or "all") for images in config.protocol.images)
    asked = "the classes they show" if config.data.queries == "present" else "every class"
    return (
        f"Dice per pair at the masks' own size on {config.data.split}, {counts} training images, seeds {seeds}; "
        f"mean and 95 % interval over seeds. Images are asked for {asked}."
    )


def _columns(config: SegmentationConfig) -> list[str]:
    """Return the data sets, and their average if there are several."""
    names = config.data.names
    return [*names, AVERAGE] if len(names) > 1 else list(names)


def _key(config: SegmentationConfig, row: tuple[object, ...], images: int | None) -> str:
    """Return the beginning of a row's keys in ``metrics.json``."""
    model, method, depth = row
    key = f"{model}/{method}" if depth is None else f"{model}/{method}/depth{depth}"
    return f"{key}/images{images or 'all'}" if len(config.protocol.images) > 1 else key


def _by_images(config: SegmentationConfig, results: Results) -> list[tuple[int | None, Results]]:
    """Return the lines of every number of training images; what learns nothing is among all of them."""
    groups = []
    for images in config.protocol.images:
        lines = [
            line
            for line in results.lines
            if line.where.get("images") == images
            or not config.learns(str(line.where["model"]), str(line.where["method"]))
        ]
        groups.append((images, Results(lines)))

    return groups


def _by_seed(config: SegmentationConfig, group: Results, metric: str, column: str) -> dict[int, float]:
    """Return a row's metric by seed; of the average over data sets only seeds that all of them have."""
    lines = group.select(metric, part=None)
    if column != AVERAGE:
        return lines.select(data=column).value_by("seed")
    means = complete_means(lines, "seed", "data", config.data.names)
    return {int(str(seed)): value for seed, value in means.items()}


def _gain(config: SegmentationConfig, ours: Results, theirs: Results, column: str) -> Summary | None:
    """Return the paired gain in Dice over the baseline; one that learns nothing is the same for every seed."""
    values = _by_seed(config, ours, "dice", column)
    baseline = _by_seed(config, theirs, "dice", column)
    if len(baseline) == 1:
        baseline = dict.fromkeys(values, next(iter(baseline.values())))

    seeds = [seed for seed in values if seed in baseline]
    if not seeds:
        return None
    return paired_difference([values[seed] for seed in seeds], [baseline[seed] for seed in seeds])


def _dice_table(config: SegmentationConfig, lines: Results, title: str, note: str) -> Table:
    """Return Dice, the count of learned numbers, what marking every pixel reaches, and published figures."""
    rows = []
    everything: dict[str, float | Summary] = {}

    for row, group in lines.by(*_ROW).items():
        values: dict[str, float | Summary] = {}
        values[_TRAINABLE] = group.select("trainable", part=None).values()[0]

        for column in _columns(config):
            dice = _by_seed(config, group, "dice", column)
            if dice:
                values[column] = summarise(list(dice.values()))

            marked = _by_seed(config, group, _ALL_FOREGROUND, column)
            if marked:
                everything[column] = next(iter(marked.values()))

        rows.append(Row(label(_ROW, row), values))

    rows.append(Row("every pixel marked", {_TRAINABLE: 0.0, **everything}))

    for model, dice_of in _FINE_TUNED.items():
        published: dict[str, float | Summary] = {
            name: dice_of[name] / 100 for name in config.data.names if name in dice_of
        }
        if published:
            rows.append(Row(f"{model} fine-tuned", published, "published", _CITATION))

    return Table(rows, [_TRAINABLE, *_columns(config)], title, note, formats=_FORMATS)


def _other_table(config: SegmentationConfig, lines: Results, title: str) -> Table:
    """Return the other metrics, on the one data set or averaged over all."""
    column = _columns(config)[-1]
    rows = []

    for row, group in lines.by(*_ROW).items():
        values: dict[str, float | Summary] = {}
        for metric in _METRICS:
            by_seed = _by_seed(config, group, metric, column)
            if by_seed and metric not in ("dice", _ALL_FOREGROUND):
                values[metric] = summarise(list(by_seed.values()))
        rows.append(Row(label(_ROW, row), values))

    heading = f"Other metrics on {column}, distances (hd95) in pixels"
    return Table(rows, title=f"{title}: {heading}" if title else heading, best=False, formats=_FORMATS)
