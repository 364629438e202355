"""The trials of a search, in Optuna's storage, which any number of workers share.

Every trial has a place: 0, 1, 2 ... What is tried at a place depends on the seed and on the trials of earlier rounds
alone. A place whose worker was killed is tried again, with the same values. Optuna gives the sampler, the pruner, the
storage and the sign of life of a worker; rounds and places make a search the same however it is run.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlprompt.core.errors import VLPromptError
from vlprompt.core.process_marks import ProcessMark
from vlprompt.core.seeding import derive_seed
from vlprompt.experiments.search.options import Dimension, SearchOptions

__all__ = ["Attempt", "Study", "TrialEnded", "TrialRecord", "best_first", "import_optuna"]

_PLACE, _ERROR, _WORKER = "place", "error", "worker"  # attributes of a trial
_MOST_FAILURES = 3  # of the first trials; then all would fail
_POLL_SECONDS = 0.5  # between looks at what others do
_HEARTBEAT_SECONDS = 10  # between signs of life
_LOST_SECONDS = 300  # without a sign of life
_CONNECTIONS = 5  # attempts: two workers may make the same tables at the same time
_AGAIN_SECONDS = 0.1  # times the number of the attempt
_OPTUNAS_WORDS = "Should not reach."
_STEPS_OF_A_CELL = 100_000  # steps of the next cell begin behind those

_present: set[tuple[str, int]] = set()  # trials of this process


class TrialEnded(BaseException):
    """Ends a trial that is worse than others, through everything that survives a failing cell."""


@dataclass(frozen=True)
class TrialRecord:
    """What became of a place.

    Attributes:
        place: Number in the order of the search.
        state: ``"complete"``, ``"pruned"`` or ``"failed"``.
        params: Dotted key to the value that was tried.
        value: The objective; None unless complete.
        error: What failed, for people.
    """

    place: int
    state: str
    params: Mapping[str, Any]
    value: float | None
    error: str | None

    def record(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return {
            "trial": self.place,
            "state": self.state,
            "value": self.value,
            "params": dict(self.params),
            "error": self.error,
        }


class Study:
    """All trials of a search.

    Args:
        storage: A database, as SQLAlchemy names it: ``sqlite:///FILE``, ``postgresql+psycopg://USER@HOST/NAME`` ...
        name: Of the study in it.
        options: What is searched.

    Raises:
        VLPromptError: If optuna or the database's driver isn't installed, or the database can't be reached.
    """

    def __init__(self, storage: str, name: str, options: SearchOptions) -> None:
        self.options = options
        self.optuna = import_optuna()
        self.name = name
        self.study = self._open(storage)
        self._states = self.optuna.trial.TrialState

    def work(self, run: Callable[[Attempt], float]) -> None:
        """Run trials until every place has one, beside other workers of the same study.

        Args:
            run: Returns the objective of one attempt.

        Raises:
            VLPromptError: If the first trials failed all.
        """
        while True:
            self._release_lost()
            trials = self._trials()
            done = self._done(trials)
            if len(done) >= self.options.trials:
                return

            self._check_hope(done)
            self._offer_round(trials, done)
            if self.study.get_trials(deepcopy=False, states=(self._states.WAITING,)):
                self._run_one(run)
            else:
                time.sleep(_POLL_SECONDS)

    def records(self) -> list[TrialRecord]:
        """Return what became of all places that are done, in order."""
        return self._records(self._done(self._trials()))

    def best(self) -> TrialRecord:
        """Return the best trial; of equal ones the first.

        Raises:
            VLPromptError: If none finished.
        """
        ranked = best_first(self.records(), self.options.direction)
        if not ranked:
            raise VLPromptError(f"no trial of {self.name} finished.")
        return ranked[0]

    def is_hopeless(self, place: int, values: Mapping[int, float]) -> bool:
        """Return whether a trial is worse than the median of the trials of earlier rounds.

        Args:
            place: Of the trial.
            values: Step to what its monitored figure was, of the present cell.
        """
        pruner = self.optuna.pruners.MedianPruner(
            n_startup_trials=self.options.startup, n_warmup_steps=self.options.warmup
        )
        trial = self.optuna.trial.create_trial(
            state=self._states.RUNNING, intermediate_values=dict(values), value=None
        )
        return bool(pruner.prune(self._before(place, self._done(self._trials())), trial))

    def _open(self, storage: str) -> Any:
        """Return the study of the storage; the first worker makes it."""
        from sqlalchemy.exc import ArgumentError, SQLAlchemyError  # optuna needs it

        settings = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}
        for attempt in range(_CONNECTIONS):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
                    database = self.optuna.storages.RDBStorage(
                        storage,
                        engine_kwargs=settings,
                        heartbeat_interval=_HEARTBEAT_SECONDS,
                        grace_period=_LOST_SECONDS,
                    )
                return self.optuna.create_study(
                    storage=database,
                    study_name=self.name,
                    direction=self.options.direction,
                    load_if_exists=True,
                )
            except ArgumentError as error:
                raise VLPromptError(f"--storage {storage!r} names no database: {error}") from error
            except ImportError as error:
                raise VLPromptError(f"--storage: {error}") from None
            except SQLAlchemyError as error:
                if attempt == _CONNECTIONS - 1:
                    reason = str(error).partition("\n")[0]
                    raise VLPromptError(f"--storage: the database can't be used: {reason}") from error
                time.sleep(_AGAIN_SECONDS * (attempt + 1))

        raise AssertionError

    def _trials(self) -> list[Any]:
        return [t for t in self.study.get_trials(deepcopy=False) if _PLACE in t.user_attrs]

    def _done(self, trials: Sequence[Any]) -> dict[int, Any]:
        """Return place to its trial, of the places that are done."""
        done: dict[int, Any] = {}
        for trial in trials:
            is_told = trial.state in (self._states.COMPLETE, self._states.PRUNED)
            if is_told or (trial.state == self._states.FAIL and _ERROR in trial.user_attrs):
                done.setdefault(trial.user_attrs[_PLACE], trial)
        return done

    def _records(self, done: Mapping[int, Any]) -> list[TrialRecord]:
        return [_record(place, done[place], self._states) for place in sorted(done)]

    def _release_lost(self) -> None:
        """Fail the trials of workers that are gone."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            self.optuna.storages.fail_stale_trials(self.study)

        for trial in self.study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            key = (self.name, trial.number)
            if _is_gone(trial.user_attrs.get(_WORKER, {}), key in _present):
                with contextlib.suppress(self.optuna.exceptions.UpdateFinishedTrialError, ValueError):
                    self.study.tell(trial.number, state=self._states.FAIL)

    def _offer_round(self, trials: Sequence[Any], done: Mapping[int, Any]) -> None:
        """Put the places of the first unfinished round that nobody works on into the queue."""
        size = self.options.together
        open_places = [place for place in range(self.options.trials) if place not in done]
        first = open_places[0] // size * size
        live = (self._states.RUNNING, self._states.WAITING)
        taken = {trial.user_attrs[_PLACE] for trial in trials if trial.state in live}

        for place in open_places:
            if place < first + size and place not in taken:
                self.study.enqueue_trial(self._propose(place, done), user_attrs={_PLACE: place})

    def _propose(self, place: int, done: Mapping[int, Any]) -> dict[str, Any]:
        """Return what is tried at a place: a function of the seed and of the rounds before."""
        seed = derive_seed(self.options.seed, "search", place) % 2**32
        before = self._before(place, done)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)
            before.sampler = self.optuna.samplers.TPESampler(
                n_startup_trials=self.options.startup,
                multivariate=True,
                seed=seed,
            )
        space = {key: self._distribution(dimension) for key, dimension in self.options.space.items()}
        return dict(before.ask(space).params)

    def _before(self, place: int, done: Mapping[int, Any]) -> Any:
        """Return a study, in memory, of the trials of the rounds before that of a place."""
        first = place // self.options.together * self.options.together
        told = (self._states.COMPLETE, self._states.PRUNED)
        study = self.optuna.create_study(direction=self.options.direction)
        study.add_trials([done[i] for i in range(first) if i in done and done[i].state in told])
        return study

    def _distribution(self, dimension: Dimension) -> Any:
        kinds = self.optuna.distributions
        if dimension.choices is not None:
            return kinds.CategoricalDistribution(dimension.choices)
        if dimension.is_whole:
            return kinds.IntDistribution(dimension.low, dimension.high, log=dimension.log)
        return kinds.FloatDistribution(dimension.low, dimension.high, log=dimension.log)

    def _run_one(self, run: Callable[[Attempt], float]) -> None:
        """Run a trial of the queue; one that another worker took for lost meanwhile is left to that worker."""
        try:
            self.study.optimize(lambda trial: self._attempt(trial, run), 1, catch=(VLPromptError,))
        except self.optuna.exceptions.UpdateFinishedTrialError:
            pass
        except AssertionError as error:  # what optuna makes of it
            if str(error) != _OPTUNAS_WORDS:
                raise

    def _attempt(self, trial: Any, run: Callable[[Attempt], float]) -> float:
        """Run one trial that was taken from the queue."""
        place = trial.user_attrs.get(_PLACE)
        trials = self._trials()
        if place is None or self._is_taken(trial, place, trials):
            raise VLPromptError("another worker has this trial.")

        key = (self.name, trial.number)
        _present.add(key)
        try:
            trial.set_user_attr(_WORKER, ProcessMark.here().record())
            params = {name: self._suggested(trial, name) for name in self.options.space}
            attempt = Attempt(self, trial, place, params)
            attempt.take_over(self._reported(place, trials))
            return run(attempt)
        except TrialEnded:
            raise self.optuna.TrialPruned from None
        except VLPromptError as error:  # for example a rate at which the loss is no longer finite
            trial.set_user_attr(_ERROR, str(error))
            raise
        finally:
            _present.discard(key)

    def _suggested(self, trial: Any, name: str) -> Any:
        dimension = self.options.space[name]
        if dimension.choices is not None:
            return trial.suggest_categorical(name, dimension.choices)
        suggest = trial.suggest_int if dimension.is_whole else trial.suggest_float
        return suggest(name, dimension.low, dimension.high, log=dimension.log)

    def _is_taken(self, trial: Any, place: int, trials: Sequence[Any]) -> bool:
        """Return whether another trial has the same place: two workers may have queued it at the same time."""
        if place in self._done(trials):
            return True
        return any(
            other.user_attrs[_PLACE] == place
            and other.state == self._states.RUNNING
            and other.number < trial.number
            for other in trials
        )

    def _reported(self, place: int, trials: Sequence[Any]) -> dict[int, float]:
        """Return what earlier attempts at a place reported before they were killed."""
        values: dict[int, float] = {}
        for trial in trials:
            if trial.user_attrs[_PLACE] == place and trial.state == self._states.FAIL:
                values |= trial.intermediate_values
        return dict(sorted(values.items()))

    def _check_hope(self, done: Mapping[int, Any]) -> None:
        """Refuse to go on where nothing but mistakes came back."""
        records = self._records(done)
        failed = [record for record in records if record.state == "failed"]
        if len(failed) == len(records) and len(failed) >= min(_MOST_FAILURES, self.options.trials):
            raise VLPromptError(
                f"the first trials of {self.name} failed, the last one with: {failed[-1].error}"
            )


class Attempt:
    """One attempt at a place of a study.

    Attributes:
        place: Number in the order of the search.
        params: Dotted key to the value that is tried.
    """

    def __init__(self, study: Study, trial: Any, place: int, params: Mapping[str, Any]) -> None:
        self.place = place
        self.params = params
        self._study = study
        self._trial = trial
        self._values: dict[int, float] = {}

    def report(self, cell: int, epoch: int | None, value: float) -> None:
        """Tell a validation figure.

        Args:
            cell: Number of the cell in the order of the run.
            epoch: Of its training, from 0; None for the figure of the whole cell.
            value: In the direction of the objective.

        Raises:
            TrialEnded: If the trial is worse than others at the same place of theirs.
        """
        last = _STEPS_OF_A_CELL - 1
        self._tell(cell * _STEPS_OF_A_CELL + (last if epoch is None else min(epoch, last - 1)), value)

    def take_over(self, values: Mapping[int, float]) -> None:
        """Tell what an earlier attempt told: a training that continues does not tell it again."""
        for step, value in values.items():
            self._tell(step, value)

    def _tell(self, step: int, value: float) -> None:
        if step in self._values:
            return
        self._values[step] = value
        self._trial.report(value, step)

        cell = step // _STEPS_OF_A_CELL
        of_cell = {s: v for s, v in self._values.items() if s // _STEPS_OF_A_CELL == cell}
        if self._study.is_hopeless(self.place, of_cell):
            raise TrialEnded


def import_optuna() -> Any:
    """Return optuna, which says nothing by itself.

    Raises:
        VLPromptError: If it isn't installed.
    """
    try:
        import optuna  # an extra of the package, and nothing else needs it
    except ImportError:
        raise VLPromptError("a search needs optuna: pip install 'vlprompt[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _record(place: int, trial: Any, states: Any) -> TrialRecord:
    names = {states.COMPLETE: "complete", states.PRUNED: "pruned", states.FAIL: "failed"}
    value = trial.value if trial.state == states.COMPLETE else None
    return TrialRecord(place, names[trial.state], dict(trial.params), value, trial.user_attrs.get(_ERROR))


def _is_gone(worker: Mapping[str, Any], is_present: bool) -> bool:
    """Return whether the process that ran a trial ended; one of another machine is known by its signs of life alone."""
    try:
        mark = ProcessMark.from_record(worker)
    except (KeyError, TypeError, ValueError):
        return False
    if mark == ProcessMark.here():
        return not is_present
    return mark.runs() is False


def best_first(records: Sequence[TrialRecord], direction: str) -> list[TrialRecord]:
    """Return the complete trials, the best first; of equal ones the earlier first."""
    complete = [record for record in records if record.value is not None]
    sign = -1 if direction == "maximize" else 1
    return sorted(complete, key=lambda record: sign * (record.value or 0.0))
