"""Workers that share a sweep: every slot is trained once, and a stopped trial goes on to the bit."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from safetensors.torch import load_file
from typer.testing import CliRunner

from rankalloc.cli import app
from rankalloc.errors import ConfigError, NothingFeasibleError
from rankalloc.experiments.preemption import Preempted, Stop
from rankalloc.experiments.run_folder import SweepFolder
from rankalloc.experiments.sweeps import jobs, storages
from rankalloc.experiments.sweeps.record import Sweep
from rankalloc.experiments.sweeps.slots import Slots, ended, of_slots, slot_of
from rankalloc.experiments.sweeps.study import SweepSpaceError, join_study
from rankalloc.experiments.sweeps.sweep import run_sweep
from rankalloc.experiments.sweeps.worker import take_up, work
from rankalloc.experiments.tasks import prepare
from rankalloc.trace import RankTrace
from tests.support.runs import small_config

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def config(home):
    return small_config(home, "sweep.trials=3", "training.scheduler=constant")


@pytest.fixture(scope="module")
def whole(config, home):
    return run_sweep(config, home / "whole")


def test_runs_that_end_together_are_counted_one_by_one(whole, home):
    slots, _, _ = join_study(storages.named(str(home / "whole")), None)
    counted = []
    told = set()
    for _ in jobs._news(slots, told, lambda trial, done: counted.append(done)):
        pass
    assert counted == list(range(1, len(slots.all()) + 1)) and len(told) >= len(counted)


def test_a_query_that_is_interrupted_logs_no_traceback(whole, home, capfd):
    slots, _, _ = join_study(storages.named(str(home / "whole")), None)
    engine = slots.storage._backend.engine
    engine.pool.logger.error("Error closing cursor")  # as SQLAlchemy does at Ctrl-C
    assert capfd.readouterr().err == ""


def test_another_sweep_in_the_folder_is_refused(whole, config, home):
    before = sorted((home / "whole").rglob("*"))
    with pytest.raises(SweepSpaceError, match="holds the sweep 'small', and this one is 'other'; give --output"):
        run_sweep(config.replaced({"name": "other"}), home / "whole")
    assert sorted((home / "whole").rglob("*")) == before


def weights(folder: Path, slot: int) -> bytes:
    return (SweepFolder(folder).trial(slot).adapter / WEIGHTS).read_bytes()


def connected(name: str) -> Slots:
    """Slots with a connection of their own, as another process has it."""
    kept, guard = storages.opened(name)
    study = optuna.create_study(study_name="s", storage=kept, load_if_exists=True)
    return Slots(study, kept, guard)


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_any_number_of_workers_makes_and_takes_every_slot_once(kind, tmp_path):
    """All begin at once, with an empty storage: the tables, the study and the slots are contended for."""
    name = f"sqlite:///{tmp_path}/s.db" if kind == "sqlite" else f"journal:{tmp_path}/s.log"
    points = [({"x": i}, "start") for i in range(2)]
    taken: list[tuple[int, int]] = []
    failures: list[BaseException] = []
    together = threading.Barrier(4)

    def worker(number: int) -> None:
        try:
            together.wait()
            slots = connected(name)
            slots.fill(9, points)
            while slots.left(9):
                trial = slots.take(9)
                if trial is None:
                    continue
                taken.append((slot_of(trial), number))
                slots.storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.0])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert sorted(slot for slot, _ in taken) == list(range(9))
    assert taken[-1][0] == 8  # the last slot waits for the others
    slots = connected(name).all()
    assert list(slots) == list(range(9)) and all(map(ended, slots.values()))
    assert [slots[i].system_attrs["fixed_params"] for i in range(2)] == [{"x": 0}, {"x": 1}]


def test_fewer_or_more_trials_than_before_are_met_exactly(tmp_path):
    slots = connected(f"sqlite:///{tmp_path}/s.db")
    slots.fill(4, [])
    for wanted in (2, 6):
        slots.fill(wanted, [])
        while slots.left(wanted):
            trial = slots.take(wanted)
            slots.storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.0])
        assert slots.take(wanted) is None
        assert sum(map(ended, slots.all().values())) == wanted


@pytest.mark.parametrize(
    ("slot", "step"), [(1, 4), *(pytest.param(*at, marks=pytest.mark.long) for at in ((0, 1), (2, 5)))]
)
def test_a_preempted_trial_goes_on_to_the_bits_of_an_uninterrupted_one(slot, step, whole, config, home):
    """Stopped in the first trial, in a later one, and in the matched control."""
    folder = home / f"stopped-{slot}"
    asked = []

    class After(Stop):
        def __call__(self) -> bool:
            if SweepFolder(folder).trial(slot).config.exists():
                asked.append(slot)
            return len(asked) >= step

    with pytest.raises(Preempted):
        run_sweep(config, folder, stop=After())
    assert [p.name for p in SweepFolder(folder).trial(slot).checkpoints()] == [f"checkpoint-{step}"]
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{folder / 'study.db'}")
    states = [trial.state for trial in of_slots(study.get_trials()).values()]
    assert states == [TrialState.COMPLETE] * slot + [TrialState.WAITING] * (3 - slot)
    resumed = run_sweep(config, folder)
    assert len(study.get_trials()) == 3  # the same trial, not another one
    assert [(t.number, t.params, t.value) for t in resumed.trials] == [
        (t.number, t.params, t.value) for t in whole.trials
    ]
    for number in range(3):
        assert weights(folder, number) == weights(home / "whole", number)


@pytest.mark.long
def test_a_worker_needs_nothing_but_the_storage_and_a_folder_of_its_own_may_be_anywhere(whole, config, home):
    """Two workers with folders of their own; who concludes trains again what lies elsewhere."""
    name = f"journal:{home / 'shared.log'}"
    sweep = Sweep(config, SweepFolder(home / "first"), prepare(config), storages.shown(name), None)

    class AfterOne(Stop):
        def __call__(self) -> bool:
            return SweepFolder(home / "first").trial(0).trace.exists()

    with pytest.raises(Preempted):
        run_sweep(config, home / "first", storage=name, stop=AfterOne())
    slots, found, wanted = join_study(name, None)
    assert found == config.replaced({"output": None}) and wanted == 3
    work(Sweep(found, SweepFolder(home / "second"), sweep.prepared, name, None), slots, wanted, Stop())
    assert not SweepFolder(home / "first").trial(1).trace.exists()
    record = run_sweep(config, home / "first", storage=name)
    assert [(t.params, t.value) for t in record.trials] == [(t.params, t.value) for t in whole.trials]
    assert record.best == whole.best and record.pair.difference == whole.pair.difference
    assert weights(home / "first", record.best) == weights(home / "whole", record.best)


@pytest.mark.parametrize("gone", ["folder", "trace", "adapter"])
def test_what_was_deleted_is_trained_again(gone, whole, config, home):
    folder = home / f"without-{gone}"
    shutil.copytree(home / "whole", folder)
    place = SweepFolder(folder).trial(whole.best)
    shutil.rmtree({"folder": place.path, "adapter": place.adapter}.get(gone, folder / "best"))
    if gone == "trace":
        place.trace.unlink()
    moved = home / f"moved-{gone}"
    folder.rename(moved)
    record = run_sweep(config, moved)
    assert record.best == whole.best and record.pair.difference == whole.pair.difference
    assert weights(moved, whole.best) == weights(home / "whole", whole.best)
    assert RankTrace.load(moved / "best" / "trace.json").finished


@pytest.mark.parametrize("sampler", ["random"])
def test_another_sampler_is_another_sweep(sampler, whole, config, home):
    with pytest.raises(SweepSpaceError, match=f'sweep.sampler was "tpe" and now is "{sampler}"'):
        run_sweep(config.replaced({"sweep.sampler": sampler}), home / "whole")
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{home / 'whole' / 'study.db'}")
    identity = study.user_attrs["identity"]
    study.set_user_attr("identity", {k: v for k, v in identity.items() if k != "sweep.sampler"})
    assert run_sweep(config.replaced({"sweep.sampler": sampler}), home / "whole") is not None  # not noted at first
    study.set_user_attr("identity", identity)


def test_a_trial_that_ends_its_process_again_and_again_has_failed(tmp_path):
    slots = connected(f"sqlite:///{tmp_path}/s.db")
    slots.fill(1, [])
    for death in range(5):
        trial = slots.take(1)
        assert trial is not None, death
        host = trial.user_attrs["owner"].rpartition(":")[0]
        slots.storage.set_trial_user_attr(trial._trial_id, "owner", f"{host}:0")
        take_up(slots)
    (trial,) = slots.all().values()
    assert ended(trial) and "killed 5 times" in trial.user_attrs["message"]


def test_a_trial_that_was_claimed_a_moment_ago_is_nobodys_orphan(tmp_path):
    """Between the claim and the owner's signature, which a storage without a lock shows to others."""
    slots = connected(f"journal:{tmp_path}/s.log")
    slots.fill(2, [])
    for trial in slots.study.get_trials():
        slots.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    take_up(slots)
    assert [trial.state for trial in slots.all().values()] == [TrialState.RUNNING] * 2


def test_a_worker_is_told_what_its_storage_lacks(tmp_path):
    name = f"sqlite:///{tmp_path}/s.db"
    for missing in (name, f"journal:{tmp_path}/s.log", f"sqlite:///{tmp_path}/no/folder.db"):
        with pytest.raises(ConfigError, match="no sweep's storage at"):
            join_study(missing, None)
    assert not list(tmp_path.iterdir())  # looking for a storage makes none
    kept, _ = storages.opened(name)
    with pytest.raises(ConfigError, match="holds no study"):
        join_study(name, None)
    optuna.create_study(study_name="other", storage=kept)
    with pytest.raises(ConfigError, match="not made by rankalloc sweep"):
        join_study(name, None)
    optuna.create_study(study_name="third", storage=kept)
    with pytest.raises(ConfigError, match="other, third"):
        join_study(name, None)
    with pytest.raises(ConfigError, match="unknown study"):
        join_study(name, "thrid")
    assert json.dumps(storages.shown("postgresql://me:secret@h/db")).count("secret") == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [(["my.yaml"], "CONFIG"), (["--trials", "3"], "--trials"), (["--jobs", "2", "--dry-run"], "--dry-run, --jobs"),
     (["--set", "seed=1"], "--set"), (["--storage", "sqlite:///x", "--json"], "--storage, --json")],
)
def test_what_a_worker_would_take_no_notice_of_is_refused(words, named):
    done = CliRunner().invoke(app, ["sweep", "--worker", "sqlite:///none.db", *words])
    assert done.exit_code == 2 and f"leave out {named} (" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.long
def test_a_sweep_through_optunas_grpc_proxy(tmp_path):
    pytest.importorskip("grpc")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    serve = (
        "import optuna, sys; optuna.storages.run_grpc_proxy_server("
        "optuna.storages.get_storage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    )
    server = subprocess.Popen([sys.executable, "-c", serve, f"sqlite:///{tmp_path / 'behind.db'}", str(port)])
    try:
        config = small_config(tmp_path, "training.steps=3")
        record = run_sweep(config, tmp_path / "out", trials=3, storage=f"grpc:127.0.0.1:{port}")
        again = run_sweep(config, tmp_path / "direct", trials=3)
    finally:
        server.kill()
        server.wait()
    assert [(t.params, t.value) for t in record.trials] == [(t.params, t.value) for t in again.trials]


@pytest.mark.parametrize(("name", "said"), [
    ("grpc:localhost", "write grpc:HOST:PORT"), ("grpc::1", "write grpc:HOST:PORT"),
    ("grpc:a:b", "write grpc:HOST:PORT"),
])  # fmt: skip
def test_a_proxys_name_that_is_none(name, said):
    with pytest.raises(ConfigError, match=said):
        join_study(name, None)


@pytest.mark.long
def test_a_trial_is_a_torchrun_job_and_goes_on_when_it_was_stopped(tmp_path):
    """Real torchrun; SIGTERM in the middle of a trial, and the same trial goes on to the bits of an undisturbed one."""
    config = small_config(
        tmp_path, "sweep.processes=2", "training.steps=40", "training.scheduler=constant", "sweep.pruner=none"
    )
    whole = run_sweep(config, tmp_path / "whole", trials=2)
    trace = RankTrace.load(tmp_path / "whole" / "trials" / "0001" / "trace.json")
    assert any("2 processes trained together" in note for note in trace.notes)
    command = [sys.executable, "-m", "rankalloc", "sweep", str(tmp_path / "small.yaml"), "--trials", "2", "--output",
               str(tmp_path / "cut")]  # fmt: skip
    for override in ("sweep.processes=2", "training.steps=40", "training.scheduler=constant", "sweep.pruner=none"):
        command += ["--set", override]
    process = subprocess.Popen([*command, "--set", "training.log_every=1"], stderr=subprocess.PIPE, text=True)
    request = tmp_path / "cut" / "trials" / "0001" / ".request.json"
    while not request.is_file():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(8)  # the job has begun, or is about to
    process.terminate()
    assert process.wait() == 143 and "to continue: rankalloc sweep" in process.stderr.read()
    again = run_sweep(config.replaced({"training.log_every": 1}), tmp_path / "cut", trials=2)
    assert [(t.params, t.value) for t in again.trials] == [(t.params, t.value) for t in whole.trials]
    one, two = (
        load_file(tmp_path / name / "trials" / "0001" / "adapter" / WEIGHTS) for name in ("whole", "cut")
    )
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()


@pytest.mark.long
def test_what_fails_under_torchrun_says_the_same_as_in_one_process(tmp_path):
    config = small_config(tmp_path, "sweep.processes=2", "adapter.target_modules=[nowhere]")
    with pytest.raises(NothingFeasibleError) as many:
        run_sweep(config, tmp_path / "many", trials=1)
    with pytest.raises(NothingFeasibleError) as one:
        run_sweep(config.replaced({"sweep.processes": 1}), tmp_path / "one", trials=1)
    assert str(many.value) == str(one.value)
