"""Figures and tables of security, computed from the long table of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlprompt.experiments.cell import Coordinate
from vlprompt.experiments.layout import Layout, gain_tables, label
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import Summary, paired_difference, summarise
from vlprompt.experiments.tables import Row, Table
from vlprompt.security.config import SecurityConfig

__all__ = ["SUSPECT", "VICTIM", "row_label", "security_tables", "summary"]

VICTIM = "victim"
"""The stage of a cell that trains a victim."""

SUSPECT = "suspect"
"""The part of a scanner's figures that is of the suspected set."""

_ROW = ("stage", "part", "method", "variant")  # coordinates of a row of figures
_CLEAN = "clean"
_SCANNER_COLUMNS = {
    "AUROC seen": "auroc/seen",
    "AUROC unseen": "auroc/unseen",
    "FPR at 95 % TPR, seen": "fpr_at_95_tpr/seen",
    "TPR": "tpr",
    "FPR": "fpr",
    "FPR, photographs": "fpr/photographs",
    "trigger named": "trigger_accuracy",
    "object, clean": "object_accuracy_clean",
    "object, triggered": "object_accuracy_triggered",
    "HM": "best_hm",
    "AUC": "auc",
}
_SUSPECT_COLUMNS = {"AUROC": "auroc", "suspected, poisoned": "tpr", "suspected, clean": "fpr"}


def row_label(where: Mapping[str, Coordinate]) -> str:
    """Return what the row of a scanner or of a victim is called."""
    method = where.get("method")
    if where.get("stage") != VICTIM:
        return label(("method", "variant"), (method, where.get("variant")))

    part = where["part"]
    if method is not None:
        return f"victim of the set {part} by {method}"

    article = "the" if part == "poisoned" else "a"
    return f"victim of {article} {part} set"


def summary(results: Results) -> dict[str, float]:
    """Return flat figures: means over seeds with their spread, ``<data>/<row>/<metric>``."""
    figures: dict[str, float] = {}
    for (data,), of_data in results.by("data").items():
        for key, rows in of_data.by(*_ROW).items():
            where = dict(zip(_ROW, key, strict=True))
            suspect = where["stage"] is None and where["part"] == SUSPECT
            prefix = f"{data}/{row_label(where)}/{'suspect/' if suspect else ''}"
            for metric in rows.metrics():
                values = list(rows.select(metric).value_by("seed").values())
                figures |= summarise(values).flat(f"{prefix}{metric}")
            gain = _attack_gain(of_data, rows) if where["stage"] == VICTIM else None
            if gain is not None:
                figures |= gain.flat(f"{prefix}attack_gain")

    return figures


def security_tables(results: Results, config: SecurityConfig, layout: Layout) -> list[Table]:
    """Return the tables of each data set: scanners, single triggers, suspects, victims; then paired gains."""
    names = config.compositions.triggers[1:]
    triggers = {f"AUROC {name}": f"auroc/{name}" for name in names}
    triggers |= {f"object {name}": f"object_accuracy/{name}" for name in names}
    seeds = ", ".join(map(str, config.protocol.seeds))
    note = f"Percent, {config.data.split} split, seeds {seeds}; mean and 95 % interval over seeds."

    tables = []

    for (data,), of_data in results.by("data").items():
        scanners = of_data.select(stage=None, part=None)
        suspects = of_data.select(stage=None, part=SUSPECT)
        title = f"{data}, single images, some of compositions that training didn't show"
        tables.append(Table(_rows(scanners, _SCANNER_COLUMNS), title=title, note=note, best=False))
        title = f"{data}, one trigger at a time"
        tables.append(Table(_rows(scanners, triggers), title=title, best=False))
        title = f"{data}, the suspected set"
        tables.append(Table(_rows(suspects, _SUSPECT_COLUMNS), title=title, best=False))
        title = f"{data}, what victims learn"
        tables.append(Table(_victim_rows(of_data, names), title=title, best=False))
        tables += gain_tables(scanners.select(layout.metric), layout, f"{data}, AUROC")

    return [table for table in tables if table.rows]


def _rows(results: Results, columns: Mapping[str, str]) -> list[Row]:
    """Return a row per scanner.

    Args:
        results: Of one data set.
        columns: Title to metric.
    """
    rows = []
    for key, group in results.by(*_ROW).items():
        values = _values(group, columns)
        if values:
            rows.append(Row(row_label(dict(zip(_ROW, key, strict=True))), values))
    return rows


def _victim_rows(results: Results, triggers: Sequence[str]) -> list[Row]:
    """Return a row per victim: accuracy, success of the attack, and what the attack adds to it."""
    single = {f"attack {name}": f"attack_success/{name}" for name in triggers}
    rows = []

    for key, group in results.select(stage=VICTIM).by(*_ROW).items():
        values = _values(group, {"accuracy": "accuracy", "attack": "attack_success"})
        gain = _attack_gain(results, group)
        if gain is not None:
            values["attack gain"] = gain

        values |= _values(group, single)
        rows.append(Row(row_label(dict(zip(_ROW, key, strict=True))), values))

    return rows


def _values(group: Results, columns: Mapping[str, str]) -> dict[str, float | Summary]:
    values: dict[str, float | Summary] = {}
    for title, metric in columns.items():
        by_seed = group.select(metric).value_by("seed")
        if by_seed:
            values[title] = summarise(list(by_seed.values()))
    return values


def _attack_gain(results: Results, victim: Results) -> Summary | None:
    """Return what an attack adds to its success, paired by seed.

    A victim of clean images may well take a triggered image for the target, too.

    Args:
        results: Of one data set.
        victim: Lines of one victim.
    """
    success = victim.select("attack_success").value_by("seed")
    innocent = results.select("attack_success", stage=VICTIM, part=_CLEAN).value_by("seed")
    seeds = [seed for seed in success if seed in innocent]
    if not seeds:
        return None
    return paired_difference([success[seed] for seed in seeds], [innocent[seed] for seed in seeds])
