"""Writing that is interrupted: a full disk, a killed process, a folder that takes no files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rankalloc as ra
from rankalloc.errors import AdapterFileError, RankallocError
from tests.support.models import logits_of, make_bert
from tests.support.saved import adapted

ROOT = Path(__file__).resolve().parents[2]


def previous(folder):
    """A good adapter in ``folder`` and a file of the user's; its logits and its bytes."""
    model, adapters = adapted("bert", ranks=(1,))
    ra.save(adapters, folder)
    (folder / "README.md").write_text("mine")
    return logits_of(model), {p.name: p.read_bytes() for p in folder.iterdir()}


def still_there(folder, logits, files, leftovers=False):
    assert {n: (folder / n).read_bytes() for n in files} == files
    assert leftovers or {p.name for p in folder.iterdir()} == set(files)
    model = make_bert()
    ra.load(model, folder)
    assert torch.equal(logits_of(model), logits)


# each way to end is a process of its own, forked from one that has imported torch
SCRIPT = """
import os, resource, signal, sys, warnings
import torch
import rankalloc as ra
from rankalloc.errors import RankallocError

replace = os.replace
adapters = ra.attach(torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256)), rank=8)

def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the write fails half-way, as on a full disk

def before_names():
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)

def between_names():
    def once(*paths):
        replace(*paths)
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace = once

for prepare in (full_disk, before_names, between_names):
    child = os.fork()
    if not child:
        prepare()
        try:
            ra.save(adapters, os.path.join(sys.argv[1], prepare.__name__))
        except RankallocError as error:
            print("told:", error, flush=True)
        os._exit(0)
    print(prepare.__name__, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """{how a process that overwrites an adapter ends: (folder, what was there before, lines, exit code)}."""
    root = tmp_path_factory.mktemp("interrupted")
    before = {name: previous(root / name) for name in ("full_disk", "before_names", "between_names")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, said = {}, []
    for line in done.stdout.splitlines():
        name, _, code = line.partition(" ")
        if name in before:
            found[name], said = (root / name, before[name], said, int(code)), []
        else:
            said.append(line)
    return found


def test_a_full_disk_leaves_the_old_adapter(ended):
    """A file-size limit makes the write fail half-way, as a full disk does."""
    folder, before, said, code = ended["full_disk"]
    assert code == 0 and len(said) == 1 and said[0].startswith("told: could not write")
    still_there(folder, *before)


def test_a_process_killed_while_writing_leaves_the_old_adapter(ended):
    """kill -9 at the moment both new files are complete and neither has its name yet."""
    folder, before, _, code = ended["before_names"]
    assert code == -signal.SIGKILL
    assert len(list(folder.glob("*.tmp"))) + len(list(folder.glob(".*.tmp"))) >= 1
    still_there(folder, *before, leftovers=True)


def test_a_process_killed_between_the_two_names_is_noticed_or_harmless(ended):
    folder, (logits, _), _, code = ended["between_names"]
    assert code == -signal.SIGKILL
    with pytest.raises(AdapterFileError, match="not of one save"):
        ra.load(make_bert(), folder)
    _, adapters = adapted("bert", ranks=(1,))
    ra.save(adapters, folder)
    model = make_bert()
    ra.load(model, folder)
    assert torch.equal(logits_of(model), logits)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    folder = tmp_path / "adapter"
    logits, files = previous(folder)
    folder.chmod(0o500)
    _, adapters = adapted("bert", ranks=(2,))
    try:
        with pytest.raises(RankallocError, match="could not write"):
            ra.save(adapters, folder)
    finally:
        folder.chmod(0o700)
    still_there(folder, logits, files)


def test_a_path_that_is_a_file_is_told(tmp_path):
    (tmp_path / "taken").write_text("mine")
    _, adapters = adapted("bert", ranks=(2,))
    with pytest.raises(RankallocError, match="taken is a file; give a folder"):
        ra.save(adapters, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    folder = tmp_path / "adapter"
    _, files = previous(folder)
    model, adapters = adapted("bert", ranks=(2,))
    ra.save(adapters, folder)
    assert (folder / "README.md").read_text() == "mine" and {p.name for p in folder.iterdir()} == set(files)
    again = make_bert()
    ra.load(again, folder)
    assert torch.equal(logits_of(again), logits_of(model))
