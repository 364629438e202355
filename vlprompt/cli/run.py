"""``vlprompt run``: the one command for every experiment."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from vlprompt.cli._complete import complete_config
from vlprompt.cli._errors import on_interrupt
from vlprompt.cli._progress import count_progress
from vlprompt.core.errors import VLPromptError

if TYPE_CHECKING:
    from vlprompt.experiments.runner import RunOutcome

__all__ = ["command"]


def command(
    cfg: Annotated[
        str | None,
        typer.Argument(
            metavar="CFG",
            show_default=False,
            autocompletion=complete_config,
            help="A YAML file, or the name of a shipped one (see: vlprompt list configs).",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", show_default=False, help="Changes to it, for example train.lr=0.01."
        ),
    ] = None,
    option_cfg: Annotated[
        str | None, typer.Option("--cfg", metavar="CFG", help="The same as the argument CFG.")
    ] = None,
    on: Annotated[
        str,
        typer.Option(
            metavar="EXECUTOR",
            help="Where cells run: serial, processes:N, ray[:ADDRESS][,gpus=1 ...], slurm:partition=NAME,time=4h ...",
        ),
    ] = "serial",
    restart: Annotated[
        bool, typer.Option("--restart", help="Move an earlier run of the same id aside, and begin anew.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fail if there is nothing to continue, and say what differs.")
    ] = False,
    join: Annotated[
        bool,
        typer.Option(
            "--join", help="Work on the run beside other commands that do, here or on other machines."
        ),
    ] = False,
    attach: Annotated[
        bool,
        typer.Option("--attach", help="Wait for jobs that an earlier command left in a queue; start none."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only print the cells, and which data and weights are missing."),
    ] = False,
    expect_only: Annotated[
        bool,
        typer.Option("--expect-only", help="Only print the figures that the configuration expects."),
    ] = False,
) -> int:
    """Run an experiment: train, evaluate, and write tables and a report.

    A run that was stopped continues; one that is finished says so and stays as it is. The last line on standard output
    is the path of metrics.json and the headline.

    Exit status: 0; 1 if cells failed, or for --dry-run if something is missing; 2 after a mistake in the
    configuration; 130 after Ctrl-C.
    """
    words = [*([cfg] if cfg is not None else []), *(overrides or [])]
    if option_cfg is not None:
        words.insert(0, option_cfg)
    if not words:
        raise VLPromptError(
            "name a configuration, for example: vlprompt run quickstart.yaml. "
            "`vlprompt list configs` prints the names of all."
        )

    if expect_only:
        return _print_expectations(words[0], words[1:])
    if dry_run:
        return _describe(words[0], words[1:])
    from vlprompt.experiments import tasks

    with on_interrupt("The same command continues where it stopped."), count_progress() as progress:
        outcome = tasks.run(
            words[0], words[1:], on, restart, resume, join=join, attach=attach, progress=progress
        )
    _print(outcome)
    return outcome.exit_code


def _describe(cfg: str, overrides: list[str]) -> int:
    """Print what a run would do; return 1 if something is missing."""
    from vlprompt.experiments.runner import describe_plan, what_is_missing
    from vlprompt.experiments.tasks import read_experiment

    experiment = read_experiment(cfg, overrides)
    print(describe_plan(experiment))
    return 1 if what_is_missing(experiment) else 0


def _print_expectations(cfg: str, overrides: list[str]) -> int:
    """Print what papers report, or what was measured, for a configuration."""
    from vlprompt.experiments.tasks import read_experiment

    expected = read_experiment(cfg, overrides).config.expect
    for expectation in expected:
        for line in expectation.lines():
            print(line)
    if not expected:
        print(f"{cfg} expects no figure (key: expect)")
    return 0


def _print(outcome: RunOutcome) -> None:
    """Print tables and the headline, and failures to standard error."""
    from vlprompt.experiments.tables import is_fraction

    print(outcome.text)
    if outcome.finished_before:
        print(f"finished before: nothing was left to run; the results are in {outcome.folder}")
    print(f"report: {outcome.folder / 'report.html'}")
    for failure in outcome.failures:
        print(f"failed: {failure}", file=sys.stderr)

    value = outcome.metrics.get(outcome.headline)
    if value is None:
        headline = "no result"
    elif is_fraction(outcome.headline):
        headline = f"{outcome.headline} {100 * value:.1f} %"
    else:
        headline = f"{outcome.headline} {value:.4g}"
    print(f"{outcome.folder / 'metrics.json'}: {headline}", flush=True)
