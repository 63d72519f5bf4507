"""A whole audit: every arm is tuned, then compared on paired seeds until the answer is known.

It makes its runs on the machinery of a sweep: a queue in Optuna's storage, workers here or elsewhere, runs that are
put back when a machine goes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial
from transformers import set_seed

from ...audit_record import AuditRecord
from ...errors import ConfigError, NothingFeasibleError
from ...files import write_text
from ...methods import find_method
from ...methods.planners.planning import layer_shapes
from ...training.checks import hasty
from ..audit_arms import UNIFORM
from ..config import RunConfig, load_config
from ..kept_base import with_kept_base
from ..preemption import Stop
from ..run_folder import AuditFolder
from ..runner import budget_from, steps_of, targets_of
from ..sweeps.jobs import worker_command, workers_on
from ..sweeps.slots import Slots
from ..sweeps.trials import Saved
from ..sweeps.worker import Failures, heartbeat, settled, work_through
from ..tasks import prepare
from ..tasks.base import base_of
from ..trainer import require_length
from .arms import Setting, arms_of
from .cells import FOLDER, complete, folder_of, seed_of, wanted
from .concluding import audit_record, seeds_by_now
from .progress import most_runs, unfinished
from .running import Audit, attrs_of
from .study import ALL, cell_of, changed_plan, join_audit, located, matters, open_audit, results_of, shown
from .wording import no_answer_of

OnRun = Callable[[str, int, int], None]
"""Called with a line on a run that has ended, how many runs have, and how many there are at most."""


def audit(
    config: RunConfig | str | os.PathLike,
    folder: str | os.PathLike,
    *,
    overrides: Sequence[str] = (),
    storage: str | None = None,
    jobs: int = 1,
    on_run: OnRun | None = None,
) -> AuditRecord:
    """Find out whether a method helps on a task and budget, and write ``folder``/audit.json.

    Every arm (:mod:`rankalloc.experiments.audits.arms`) has the size of the budget, is tuned by as many runs on the
    tune split, and is compared with the method on paired seeds that tuning did not use, by the report split
    (:mod:`rankalloc.experiments.audits.judgements`). An audit that was interrupted goes on where it was.

    Args:
        config: the run to audit, or the YAML file that describes it; its ``audit`` section says how.
        folder: what it writes: runs, the study, ``audit.json``.
        overrides: changes of the file's values, ``a.b=c``, as the command's ``--set``.
        storage: Optuna storage URL, or ``journal:PATH``; None for SQLite in ``folder``.
        jobs: processes that train at the same time.
        on_run: called after each run with a line on it, how many runs have ended, and how many there are at most.

    Raises:
        ConfigError: there is nothing to audit: the method is uniform LoRA, or no LoRA.
        SweepSpaceError: the study in the storage was begun with other settings.
        NothingFeasibleError: the method, or uniform LoRA, could not be trained.
        RankallocError: the storage cannot be opened, or the data cannot be used.
    """
    if not isinstance(config, RunConfig):
        config = load_config(Path(config), overrides)
    return conduct(prepared_audit(config, Path(folder), storage, None), storage, jobs, on_run)


def conduct(
    found: Audit, storage: str | None, jobs: int = 1, on_run: OnRun | None = None, stop: Stop | None = None,
    on_begin: Callable[[], None] | None = None,
) -> AuditRecord:
    """The same for an audit that is prepared; ``stop`` is asked after every step, and where it says so the run in hand
    is put back with a checkpoint (Preempted). ``on_begin`` is called once the folder is this audit's."""
    slots = open_audit(found, storage)
    # the commands of the arms train from it, into folders of their own
    write_text(found.folder.config, found.config.replaced({"output": None}).to_yaml())
    most = most_runs(found)
    if remaining(found, slots):  # an earlier answer, and its page, must not outlive that there is more to come
        _so_far(found, slots).save(found.folder.record)
        for page in (found.folder.report, found.folder.report.with_suffix(".json")):
            page.unlink(missing_ok=True)
    if on_begin is not None:
        on_begin()

    def after(trial: FrozenTrial, done: int) -> None:
        _so_far(found, slots).save(found.folder.record)
        if on_run is not None:
            on_run(line_of(found, trial), done, most)

    stop = stop or Stop()
    if jobs == 1:
        work(found, slots, stop, after)
    elif remaining(found, slots):
        workers_on(
            jobs, slots, lambda: remaining(found, slots), stop, after,
            worker_command("audit", located(storage, found), found.config.name, found.folder.path),
            alike=Failures(matters),
        )
    record = audit_record(found, results_of(slots), finished=True, changed=changed_plan(slots))
    record.save(found.folder.record)
    if (why := no_answer_of(record)) is not None:
        raise NothingFeasibleError(why)
    return record


def _so_far(found: Audit, slots: Slots) -> AuditRecord:
    """The record of an audit that is not over, which says so."""
    results = results_of(slots)
    record = audit_record(found, results, changed=changed_plan(slots))
    record.alerts.insert(0, unfinished(found, results))
    return record


def work(found: Audit, slots: Slots, stop: Stop, on_trial: Callable[[FrozenTrial, int], None] | None = None) -> None:
    """Make runs until the audit is over, here or elsewhere."""

    def one(taken: FrozenTrial) -> FrozenTrial:
        trial = optuna.trial.Trial(slots.study, taken._trial_id)

        def train() -> Sequence[float]:
            cell, kept = cell_of(taken), taken.user_attrs
            attrs = attrs_of(found, cell, kept["rate"], stop, (Saved(trial),), kept.get(FOLDER))
            for name, value in attrs.items():
                trial.set_user_attr(name, value)
            return [attrs["value"]]

        with heartbeat(slots, taken):
            return settled(slots, taken, trial, train)

    work_through(slots, ALL, lambda: remaining(found, slots), one, stop, on_trial, Failures(matters))


def remaining(found: Audit, slots: Slots) -> int:
    """How many runs are still to be made by now; what is queued already is not queued again."""
    while True:
        results = results_of(slots)
        seeds = seeds_by_now(found, results)
        cells = wanted(found.arms, results, found.setting, seeds)
        left = slots.ensure({
            cell.slot: ({}, {"rate": rate, FOLDER: folder_of(found.config, cell)}) for cell, rate in cells.items()
        })
        if left or complete(found.arms, results, found.setting, seeds):
            return left
        if results == results_of(slots):  # a result came in between, or an arm failed for good
            return 0


def joined(storage: str, study: str | None, output: str | None) -> tuple[Audit, Slots]:
    """The audit of a storage, for a worker."""
    slots, config = join_audit(storage, study)
    folder = Path(output) if output is not None else config.folder
    return prepared_audit(config, folder, storage, None), slots


def prepared_audit(config: RunConfig, folder: Path, storage: str | None, command: str | None) -> Audit:
    """The audit of a configuration: its task prepared, its size and its arms; raises as :func:`audit`."""
    method = find_method(config.method)
    if config.method == UNIFORM or config.method_options.get("placement", "chosen") != "chosen":
        raise ConfigError(
            f"method {config.method!r} with these options places no ranks of its own: there is nothing to audit; set "
            "method to one that does, such as auto"
        )
    if not method.lora or config.method == "manual":
        raise ConfigError(f"an audit compares methods that choose ranks, and {config.method!r} does not; try auto")
    prepared = with_kept_base(prepare(config), config.adapter.modules_to_save)
    require_length(config, prepared)
    set_seed(config.seed)
    shapes = layer_shapes(base_of(prepared), config.adapter.rank, **targets_of(config))
    plan = budget_from(config).resolve(shapes, steps_of(config, prepared.train_examples or 0))
    one_rank = sum(shape.params_per_rank for shape in shapes)
    params = {
        "params": plan.target, "bytes": plan.target // 4, "ranks": plan.target * one_rank // len(shapes),
    }[plan.unit]  # fmt: skip
    setting = Setting(config, params, shapes, prepared)
    arms = arms_of(setting)
    for arm in arms:
        if arm.skipped is None:
            arm.configured(setting, config.training.learning_rate, config.seed)  # refuses what its run would
    return Audit(setting, arms, AuditFolder(folder), shown(storage), command, hasty(plan, method))


def line_of(found: Audit, trial: FrozenTrial) -> str:
    """One line on a run that has ended."""
    cell, attrs = cell_of(trial), trial.user_attrs
    arm, metric = found.arms[cell.arm].name, found.setting.prepared.metric
    what = f"tuning at {attrs['rate']:.6g}" if cell.phase == "tune" else f"seed {seed_of(found.config, cell)}"
    if "message" in attrs:
        return f"{arm}, {what}: {attrs['message']}"
    return f"{arm}, {what}: {metric} {attrs['value']:.4f} on the {'tune' if cell.phase == 'tune' else 'report'} split"


