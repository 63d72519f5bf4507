"""A sweep's study in a real optuna-dashboard, over HTTP: verdict, rank maps, ranks and report are found there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from rankalloc.experiments.sweeps.publishing import VERDICT, publish
from rankalloc.experiments.sweeps.study import join_study
from rankalloc.experiments.sweeps.sweep import run_sweep
from rankalloc.report import write_report
from rankalloc.trace import RankTrace
from tests.support.runs import small_config

pytest.importorskip("optuna_dashboard")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    record = run_sweep(small_config(folder, "training.steps=3"), folder / "sweep", trials=2)
    write_report(folder / "sweep", folder / "sweep" / "report.html")
    publish(folder / "sweep", None, record)
    return folder / "sweep", record


@pytest.fixture(scope="module")
def dashboard(published):
    """A function that gets a path from the dashboard."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    folder, _ = published
    server = subprocess.Popen(
        [sys.executable, "-m", "optuna_dashboard._cli", f"sqlite:///{folder / 'study.db'}", "--host", "127.0.0.1",
         "--port", str(port), "--artifact-dir", str(folder / "artifacts")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def get(path: str) -> bytes:
        for _ in range(200):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                    return answer.read()
            except (ConnectionError, urllib.error.URLError):
                assert server.poll() is None, "the dashboard ended"
                time.sleep(0.1)
        raise TimeoutError(path)

    yield get
    server.terminate()
    server.wait()


def test_the_dashboard_shows_the_verdict_and_serves_the_files(published, dashboard):
    folder, record = published
    (study,) = json.loads(dashboard("/api/studies"))["study_summaries"]
    found = json.loads(dashboard(f"/api/studies/{study['study_id']}"))
    slots, _, _ = join_study(f"sqlite:///{folder / 'study.db'}", None)
    assert slots.study.user_attrs[VERDICT] in found["note"]["body"]
    files = {one["filename"]: one["artifact_id"] for one in found["artifacts"]}
    assert set(files) == {"rank-map.png", "ranks.csv", "report.html"}
    served = {name: dashboard(f"/artifacts/{study['study_id']}/{key}") for name, key in files.items()}
    assert served["rank-map.png"].startswith(b"\x89PNG") and served["report.html"].startswith(b"<!")
    for trial in record.trials:
        (shown,) = [one for one in found["trials"] if one["number"] == trial.number]
        own = {one["filename"]: one["artifact_id"] for one in shown["artifacts"]}
        table = dashboard(f"/artifacts/{study['study_id']}/{shown['trial_id']}/{own['ranks.csv']}").decode()
        ranks = RankTrace.load(folder / trial.trace).final_ranks
        assert [int(row.split(",")[6]) for row in table.splitlines()[1:]] == ranks
        if trial.number == record.best:
            assert table.encode() == served["ranks.csv"]


def test_what_is_published_again_takes_the_place_of_what_was(published, dashboard):
    folder, record = published
    before = sorted(path.name for path in (folder / "artifacts").iterdir())
    (folder / "report.html").write_text("<!doctype html>again")
    publish(folder, None, record)
    assert sorted(path.name for path in (folder / "artifacts").iterdir()) == before
    (study,) = json.loads(dashboard("/api/studies"))["study_summaries"]
    found = json.loads(dashboard(f"/api/studies/{study['study_id']}"))
    key = next(one["artifact_id"] for one in found["artifacts"] if one["filename"] == "report.html")
    assert dashboard(f"/artifacts/{study['study_id']}/{key}") == b"<!doctype html>again"
