"""A whole sweep: the study is opened, workers train its slots, and the best pair is compared.

The first trial is uniform LoRA at the start point's budget, the next the configured method at that point,
then uniform LoRA at further learning rates. The last is a *matched* control: uniform LoRA with the
parameters of the best adaptive trial so far (equal ranks are not equal parameters: layers differ in size),
at the best learning rate uniform LoRA has shown. Choices are made on the tune split, the last one among the
best few by runs with fresh seeds; the report split is used once, at the end, for one adaptive and one uniform trial.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from optuna.trial import FrozenTrial

from ...errors import NothingFeasibleError
from ...files import write_text
from ...trace import SweepRecord, TrialRecord
from ..config import RunConfig
from ..kept_base import with_kept_base
from ..preemption import Stop
from ..run_folder import BEST_NAME, RunFolder, SweepFolder
from ..tasks import prepare
from . import storages
from .finals import left
from .jobs import in_processes
from .record import Sweep, compare_on_report, sweep_record, table_of, trial_record
from .sharing import answers, column_of
from .slots import Slots
from .space import check_space
from .study import SweepSpaceError, open_study
from .trial_runs import run_of, trained
from .worker import work

OnTrial = Callable[[TrialRecord, int, int], None]
__all__ = ["SweepSpaceError", "run_sweep"]


def run_sweep(
    config: RunConfig,
    folder: Path,
    *,
    trials: int | None = None,
    storage: str | None = None,
    jobs: int = 1,
    command: str | None = None,
    on_trial: OnTrial | None = None,
    stop: Stop | None = None,
) -> SweepRecord:
    """Run trials until ``trials`` of them have finished, and write ``folder``/sweep.json.

    An existing study is resumed; an interrupted sweep ends exactly like an uninterrupted one. What a killed process
    left running is trained again, or goes on from its last checkpoint.

    Args:
        trials: number of finished trials, earlier ones and those of other workers included; None for
            ``sweep.trials``.
        storage: Optuna storage URL, or ``journal:PATH`` for a journal file; None for SQLite in ``folder``.
        jobs: processes that train at the same time.
        command: recorded as the command that reproduces the sweep.
        on_trial: called after each trial with its record, the number of finished trials and the number wanted.
        stop: asked after every step; where it says so, the trial in hand is put back with a checkpoint.

    Raises:
        ConfigError: ``trials`` or the space is not valid.
        SweepSpaceError: the study in the storage searches another space.
        NothingFeasibleError: no trial completed.
        Preempted: ``stop`` ended it.
        RankallocError: the storage cannot be opened, or the data cannot be used.
    """
    wanted = config.replaced({"sweep.trials": trials}).sweep.trials if trials else config.sweep.trials
    check_space(config)
    column_of(config)
    prepared = with_kept_base(prepare(config), config.adapter.modules_to_save)
    sweep = Sweep(config, SweepFolder(folder), prepared, storages.shown(storage), command)
    slots = open_study(sweep, storage, wanted)
    if not sweep.folder.config.is_file() or sweep.folder.config.read_text(encoding="utf-8") != config.to_yaml():
        write_text(sweep.folder.config, config.to_yaml())

    def after(trial: FrozenTrial, done: int) -> None:
        _save(sweep_record(slots, sweep, over=False), sweep.folder)
        if on_trial is not None:
            on_trial(trial_record(trial, config, folder), done, wanted)

    stop = stop or Stop()
    if jobs == 1:
        work(sweep, slots, wanted, stop, after)
    elif left(slots, config, wanted):
        in_processes(jobs, sweep, slots, storages.located(storage, sweep.folder), wanted, stop, after)
    return _concluded(slots, sweep)


def _concluded(slots: Slots, sweep: Sweep) -> SweepRecord:
    """Compare the best pair on the report split, and write best/ and the final record."""
    final = sweep_record(slots, sweep)
    if final.best is None:
        _save(final, sweep.folder)
        raise NothingFeasibleError(_why_none(final))

    def ensure(number: int) -> None:
        """Train a trial again whose run is not here: it was trained elsewhere, or its folder is gone."""
        place, trial = sweep.folder.trial(number), slots.all()[number]
        if not (place.trace.is_file() and place.adapter.is_dir()):
            place.discard()
            trained(sweep, run_of(sweep.config, trial.user_attrs, number, trial.params), place, trial.params)

    ensure(final.best)
    pair = compare_on_report(final, sweep, ensure)
    final = sweep_record(slots, sweep)  # a run that was trained again has a trace now
    final.pair, final.column = pair, answers(slots, sweep)
    final.steps = (final.steps or 0) + sum(one.steps for one in final.column)
    if (earlier := _concluded_before(final, sweep.folder)) is not None:
        return earlier
    assert final.best is not None  # as above
    best = slots.all()[final.best]
    _copy_best(sweep.folder, sweep.folder.trial(final.best).path)
    again = run_of(sweep.config, best.user_attrs, final.best, best.params)
    again = again.replaced({"name": f"{sweep.config.name}-best", "output": None})
    write_text(sweep.folder.best_config, again.to_yaml())
    _save(final, sweep.folder)
    return final


def _save(record: SweepRecord, folder: SweepFolder) -> None:
    """Write sweep.json and trials.csv."""
    record.save(folder.record)
    write_text(folder.table, table_of(record))


def _why_none(record: SweepRecord) -> str:
    """Why no trial can be the best."""
    many, complete = len(record.trials), [trial for trial in record.trials if trial.state == "complete"]
    if complete:
        limits = sorted({name for trial in complete for name in trial.over})
        return (
            f"none of {many} trials is within sweep.limits ({', '.join(limits)}): {len(complete)} exceed them; allow "
            "more, or search smaller budgets (sweep.search.budget, sweep.search.rank)"
        )
    reasons = sorted({trial.message for trial in record.trials if trial.message})
    return f"none of {many} trials completed: {'; '.join(reasons)}"


def _concluded_before(final: SweepRecord, folder: SweepFolder) -> SweepRecord | None:
    """The record of the sweep when it had ended exactly so before; None when it had not."""
    if not folder.record.is_file() or not RunFolder(folder.best).trace.is_file():
        return None
    earlier = SweepRecord.load(folder.record)
    return earlier if final.model_copy(update={"created": earlier.created}) == earlier else None


def _copy_best(folder: SweepFolder, best: Path) -> None:
    """Make best/ a copy of the best trial's folder."""
    fresh = folder.path / f".{BEST_NAME}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(best, fresh)
    shutil.rmtree(folder.best, ignore_errors=True)
    fresh.rename(folder.best)
