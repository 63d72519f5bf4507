"""A process that keeps the memory it frees pays for its pages once; page faults are counted in real processes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.runs import small_yaml

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's heap")

ROOT = Path(__file__).parents[2]
COUNT = """
import resource

def faults():
    # larger than the 32 MiB that glibc may keep by itself, and of several sizes, as in batches of long sequences
    first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (33, 36, 40):
        held = b"x" * (size << 20)
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first
"""
PAGES = (33 + 36 + 40) * 2**20 // os.sysconf("SC_PAGE_SIZE")


def counted(script, **environment):
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT + script], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**surroundings, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_pages_are_asked_for_once_and_not_at_every_step():
    script = """
from rankalloc import keep_freed_memory
before = faults()
kept = keep_freed_memory()
faults()  # the heap grows to what it will keep
print(kept, before, faults())
"""
    kept, before, after = counted(script)
    assert kept == "True"
    assert int(before) >= PAGES and int(after) < PAGES / 20


@pytest.mark.parametrize("chosen", [
    {"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
])
def test_what_the_environment_chose_stays(chosen):
    script = """
from rankalloc import keep_freed_memory
print(keep_freed_memory(), faults(), faults())
"""
    kept, _, after = counted(script, **chosen)
    assert kept == "False" and int(after) >= PAGES


@pytest.mark.long
@pytest.mark.skipif(torch.accelerator.is_available(), reason="for processes that train on the CPU")
def test_a_command_that_trains_keeps_its_memory(tmp_path):
    words = ["train", str(small_yaml(tmp_path)), "--output", str(tmp_path / "out"), "--set", "training.steps=2"]
    script = f"""
from rankalloc.cli import app
app({words!r}, standalone_mode=False)
faults()
print(faults())
"""
    *_, after = counted(script)
    assert int(after) < PAGES / 20
