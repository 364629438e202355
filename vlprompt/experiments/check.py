"""Does a finished run reach what its configuration expects?"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from vlprompt.core.errors import CheckpointError, ConfigError, UnknownNameError
from vlprompt.core.paths import user_path
from vlprompt.experiments.config import ASIDE, ExperimentConfig, list_configs
from vlprompt.experiments.expectation import Expectation
from vlprompt.experiments.tasks import read_experiment

__all__ = ["Verdict", "check_run", "is_run", "unknown_figures"]

_PLACES = frozenset({"output", "name", "expect", *ASIDE})
_KINDS_OF_PLACES = ("folder", "csv", "tar")
# Where files lie, and what is kept of what never changes, changes no figure.
_PLACE_KEYS = frozenset({"root", "cache_dir", "prefix_gib", "store", "on_bad_image"})
_FOLDER_KEYS = frozenset({"photographs"})  # a path whose last part counts
_NOT_FORETOLD = ("train/", "source/train/")  # what a learner says of itself
_SHOWN = 5


@dataclass(frozen=True)
class Verdict:
    """What became of one expected figure.

    Attributes:
        outcome: ``"pass"``, ``"fail"``, or ``"not comparable"``.
        expectation: What was expected, with its source.
        metric: Which of its figures; empty where none is known.
        value: What the run reached; None if it has no such figure.
        reason: Why it can't be compared: which settings differ, or that the figure is missing.
    """

    outcome: Literal["pass", "fail", "not comparable"]
    expectation: Expectation
    metric: str = ""
    value: float | None = None
    reason: str = ""

    def text(self) -> str:
        """Return the verdict as a line."""
        if not self.expectation.figures:
            return f"{self.outcome}: {self.expectation.lines()[0]}"

        reached = "" if self.value is None else f"reached {self.value:.4g}; "
        reason = f"{self.reason}; " if self.reason else ""
        return f"{self.outcome}: {reached}{reason}expected {self.expectation.text(self.metric)}"


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a finished run."""
    return (folder / "metrics.json").is_file() and (folder / "config.yaml").is_file()


def check_run(folder: Path, cfg: str | None = None) -> list[Verdict]:
    """Compare a run's figures with what its configuration expects.

    A figure can be compared if the run has the settings in which the figure was reached: those of the configuration
    file, with what ``under`` changes.

    Args:
        folder: Of the run.
        cfg: The configuration file that it is held against; None for the file that its command names, also where the
            run has another name, or else the shipped one of the run's name, or else the run's own.

    Raises:
        CheckpointError: If the run is not finished, or damaged.
        UnknownNameError: If ``cfg`` does not exist.
        ConfigError: If ``cfg`` is of another task.
    """
    if not is_run(folder):
        raise CheckpointError(f"{folder} holds no finished run: it needs config.yaml and metrics.json.")

    run_config = read_experiment(folder / "config.yaml").config
    metrics = _metrics(folder / "metrics.json")
    reference = _reference(run_config, str(metrics.get("command", "")), folder) if cfg is None else cfg
    expected = read_experiment(reference).config.expect

    settings = dict(_flat(run_config))
    verdicts = []
    for expectation in expected:
        wanted = read_experiment(reference, _overrides(expectation.under)).config
        if wanted.task != run_config.task:
            raise ConfigError(
                [f"task: the run is of {run_config.task!r}, the file of {wanted.task!r}."], str(reference)
            )
        differences = _differences(settings, dict(_flat(wanted)))
        verdicts += [_verdict(expectation, metric, metrics, differences) for metric in expectation.figures]
        if not expectation.figures:
            verdicts.append(Verdict("not comparable", expectation))

    return verdicts


def unknown_figures(cfg: str | Path) -> list[str]:
    """Return a sentence for each expected figure that no run of a configuration can have.

    Args:
        cfg: A path, or the name of a shipped file.

    Raises:
        ConfigError: If ``under`` of an expectation is no valid change of the file.
        UnknownNameError: If there is no such file.
    """
    experiment = read_experiment(cfg)
    problems = []
    for number, expectation in enumerate(experiment.config.expect):
        under = _overrides(expectation.under)
        known = (read_experiment(cfg, under) if under else experiment).figures()
        for metric in expectation.figures:
            if metric not in known and not metric.startswith(_NOT_FORETOLD):
                problems.append(f"expect.{number}.figures: {UnknownNameError('figure', metric, known)}")
    return problems


def _reference(config: ExperimentConfig, command: str, folder: Path) -> str | Path:
    """Return the file whose settings and expectations a run is held against.

    A run's own file holds what was expected of the file that it was read from, and the settings that were changed on
    the command line. So it says nothing where the other file can be found.
    """
    shipped = list_configs()
    _, _, file, *_ = [*shlex.split(command), "", "", ""]
    if file in shipped:
        return shipped[file]
    if file and user_path(file).is_file():
        return user_path(file)
    return shipped.get(f"{config.name}.yaml", folder / "config.yaml")


def _verdict(
    expectation: Expectation, metric: str, metrics: Mapping[str, Any], differences: Sequence[str]
) -> Verdict:
    figure = expectation.figures[metric]
    value = metrics.get(metric)
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        return Verdict(
            "not comparable", expectation, metric, reason=f"{'; '.join(differences[:_SHOWN])}{more}"
        )
    if not isinstance(value, int | float):
        return Verdict("not comparable", expectation, metric, reason=f"the run has no figure {metric!r}")

    reached = abs(value - figure.value) <= figure.within
    return Verdict("pass" if reached else "fail", expectation, metric, float(value))


def _differences(run: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return how the settings of a run differ, as ``key=value instead of other``."""
    keys = dict.fromkeys([*wanted, *run])
    return [
        f"{key}={run.get(key)} instead of {wanted.get(key)}"
        for key in keys
        if run.get(key) != wanted.get(key)
    ]


def _flat(config: ExperimentConfig) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of what can change a figure."""
    content = config.model_dump(mode="json", exclude=set(_PLACES))
    yield from _flat_mapping(content, "")


def _flat_mapping(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if key in _PLACE_KEYS:
            continue
        if isinstance(value, Mapping):
            yield from _flat_mapping(value, f"{prefix}{key}.")
        elif key in _FOLDER_KEYS and value is not None:
            yield f"{prefix}{key}", PurePath(value).name
        else:
            yield f"{prefix}{key}", _without_place(value)


def _without_place(value: Any) -> Any:
    """Return a setting without the place of what it names: of ``folder:/somewhere/photos`` the last part counts."""
    if isinstance(value, list):
        return [_without_place(part) for part in value]
    kind, _, path = value.partition(":") if isinstance(value, str) else ("", "", "")
    return f"{kind}:{PurePath(path).name}" if kind in _KINDS_OF_PLACES else value


def _overrides(under: Mapping[str, Any]) -> list[str]:
    """Return settings as they are written on the command line."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in under.items()]


def _metrics(path: Path) -> dict[str, Any]:
    """Return the figures of a run; data sets in their names are named without their place, as settings are."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no figures.")

    data = content.get("data", [])
    for name in [data] if isinstance(data, str) else data:
        content = {key.replace(name, _without_place(name)): value for key, value in content.items()}
    return content
