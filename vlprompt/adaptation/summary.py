"""Figures and tables of test-time adaptation: every method beside the same classifier without adaptation."""

from __future__ import annotations

from dataclasses import replace

from vlprompt.adaptation.config import AdaptationConfig
from vlprompt.experiments.cell import Cell, CellResult, Coordinate
from vlprompt.experiments.layout import AVERAGE, Layout, complete_means, tabulate
from vlprompt.experiments.results import Line, Results
from vlprompt.experiments.statistics import paired_difference, summarise
from vlprompt.experiments.tables import Table

__all__ = [
    "METRICS",
    "ROBUST",
    "adaptation_tables",
    "headline",
    "headline_data",
    "sketch",
    "summary",
]

METRICS = ("accuracy", "mean_per_class", "ece", "ece_20", "nll", "brier")
ROBUST = "robust_accuracy"
"""The accuracy on attacked images."""
OF_MIXED_STREAMS = ("ood_auroc_msp", "ood_fpr95_msp", "ood_aupr_msp", "ood_oscr_msp", "accuracy_alone")
"""What every method has for a mixed stream; methods that answer by similarities have more."""
OVER_ORDERS = {
    "accuracy_over_orders": "Mean accuracy over {orders} orders of the stream",
    "accuracy_worst_tenth": "Mean accuracy in the worst tenth of {orders} orders",
}
"""What methods that depend on the order have where there are several; without adaptation all orders are alike."""
_BEFORE = "before_"
_OOD = "ood_"  # before the metrics of telling intruders apart
_OF_MIXED = ("accuracy_alone", "intruders_accuracy")
_OOD_TABLES = {
    "ood_auroc_msp": "AUROC of the highest probability, known images against intruders",
    "ood_fpr95_msp": "Share of intruders that pass the threshold which 95 % of the known images pass",
    "accuracy_alone": "Accuracy on the same known images where no others come among them",
    "intruders_accuracy": "Accuracy on the intruders",
}
_ALIKE = ("alike", "alike_blurred")


def sketch(cell: Cell, config: AdaptationConfig) -> CellResult:
    """Return the metrics that a cell of a stream will have (see :meth:`Experiment.sketch`)."""
    metrics = [*METRICS]
    if config.attack is not None:
        metrics.append(ROBUST)
    paired = [*metrics, *(_before(metric) for metric in metrics)]
    if config.protocol.stream.kind == "mixed":
        paired += OF_MIXED_STREAMS
    if config.protocol.orders > 1:
        paired += OVER_ORDERS

    result = CellResult()
    for label in config.methods:
        for name in [cell["data"]] if "data" in cell.where else config.data.names:
            result.sketch(paired, method=label, data=name)
    return result


def headline(config: AdaptationConfig) -> str:
    """Return the key of the figure that is said first: the accuracy of the first method."""
    return f"{next(iter(config.methods))}/{headline_data(config)}/accuracy"


def headline_data(config: AdaptationConfig) -> str:
    """Return what stands for the data sets in keys of figures: the average, or the only one."""
    return _columns(config)[-1]


def summary(results: Results, config: AdaptationConfig) -> dict[str, float]:
    """Return the figures of ``metrics.json``.

    Args:
        results: The long table; a line of a method has its metric twice, the second time as ``before_<metric>``.
        config: Of the run.

    Returns:
        ``<method>/<data>/<metric>``, the mean over seeds, with ``_std`` and ``_ci95``; the same as ``before_<metric>``,
        without adaptation; and ``<metric>_gain``, paired over seeds. ``<data>`` is also ``average``, over data sets.
        Of mixed streams also what :func:`vlprompt.adaptation.measure.scores` says, and ``accuracy_alone``.
        ``views/<data>/alike`` is the share of stored views, in [0, 1], that get the class of their image.
    """
    figures: dict[str, float] = {}
    of_mixed = [metric for metric in results.metrics() if metric.startswith(_OOD) or metric in _OF_MIXED]
    for label in config.methods:
        for data in _columns(config):
            for metric in (*METRICS, ROBUST, *OVER_ORDERS, *of_mixed):
                after = _by_seed(results.select(metric, method=label), data, config)
                before = _by_seed(results.select(_before(metric), method=label), data, config)
                if not after:
                    continue
                figures |= summarise(list(after.values())).flat(f"{label}/{data}/{metric}")
                if not before:
                    continue
                gains = paired_difference(list(after.values()), list(before.values()))
                figures |= summarise(list(before.values())).flat(f"{label}/{data}/{_BEFORE}{metric}")
                figures |= gains.flat(f"{label}/{data}/{metric}_gain")

    for metric in _ALIKE:
        for name in results.select(metric).coordinates("data"):
            shares = results.select(metric, data=name).values()
            figures |= summarise(shares).flat(f"views/{name}/{metric}")

    return figures


def adaptation_tables(results: Results, config: AdaptationConfig, layout: Layout) -> list[Table]:
    """Return accuracies, a row for each method and one for each classifier without adaptation, and paired gains.

    Of several orders also what they give together; of mixed streams how well intruders are told apart, and accuracies
    without them; with an attack the same tables for attacked images.

    Args:
        results: The long table.
        config: Of the run.
        layout: Without baselines: which classifier a method starts from is read from the results.
    """
    notes = (layout.note, _different_views(config), _tuned(config))
    layout = replace(layout, note=" ".join(filter(None, notes)))
    tables = _tables_of("accuracy", results, config, layout)
    for metric, title in OVER_ORDERS.items():
        if len(results.select(metric)):
            said = title.format(orders=config.protocol.orders)
            tables += [
                replace(t, title=f"{said}: {t.title}" if t.title else said)
                for t in _tables_of(metric, results, config, layout)
            ]

    for metric, title in _OOD_TABLES.items():
        if len(results.select(metric)):
            values, *_ = _tables_of(metric, results, config, layout)
            tables.append(replace(values, title=title, best=False))

    if config.attack is not None:
        attack = config.attack
        title = f"Under attack (PGD, eps {255 * attack.eps:g}/255, {attack.steps} steps, non-adaptive)"
        for table in _tables_of(ROBUST, results, config, layout):
            tables.append(replace(table, title=f"{title}: {table.title}" if table.title else title))
    return tables


def _different_views(config: AdaptationConfig) -> str:
    """Return the views of the methods that have several, if they are not the same for all."""
    plans: dict[str, list[str]] = {}
    for label in config.methods:
        count, augment = config.views(label)
        if count > 1:
            plans.setdefault(f"{count} of {augment}", []).append(label)
    if len(plans) < 2:
        return ""
    parts = [f"{plan} for {', '.join(labels)}" for plan, labels in plans.items()]
    return f"Views differ: {'; '.join(parts)}."


def _tuned(config: AdaptationConfig) -> str:
    """Return which methods' options were not one value everywhere; empty if all were."""
    sentences = []
    for tuning, how in (("F", "per family of data sets"), ("D", "per data set")):
        labels = [label for label in config.methods if config.tuning(label) == tuning]
        if labels:
            sentences.append(f"Tuned {how}: {', '.join(labels)}.")
    return " ".join(sentences)


def _tables_of(metric: str, results: Results, config: AdaptationConfig, layout: Layout) -> list[Table]:
    """Return the table of a metric, and that of its paired gains where it has a value without adaptation."""
    baselines: dict[str, tuple[str, ...]] = {}
    before: dict[tuple[Coordinate, ...], Line] = {}
    for label in config.methods:
        for line in results.select(_before(metric), method=label).lines:
            row = f"without adaptation ({line.where['start']})"
            baselines[label] = (row,)
            # Methods that start from the same classifier share its row.
            key = (row, line.where["data"], line.where["seed"])
            before.setdefault(key, Line({**line.where, "method": row}, metric, line.value))

    after = results.select(metric, method=set(config.methods))
    rows = Results([*before.values(), *after.lines])
    return tabulate(rows, replace(layout, metric=metric, baselines=baselines))


def _before(metric: str) -> str:
    """Return what a metric is called without adaptation."""
    return f"{_BEFORE}accuracy" if metric in OVER_ORDERS else f"{_BEFORE}{metric}"


def _columns(config: AdaptationConfig) -> list[str]:
    names = config.data.names
    return [*names, AVERAGE] if len(names) > 1 else list(names)


def _by_seed(lines: Results, data: str, config: AdaptationConfig) -> dict[Coordinate, float]:
    """Return one value for each seed; of the average only for seeds that have every data set."""
    if data != AVERAGE:
        return lines.select(data=data).value_by("seed")
    return complete_means(lines, "seed", "data", config.data.names)
