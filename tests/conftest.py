"""The environment, one thread and a seed for every test, and one fixture for each tiny model."""

from __future__ import annotations

import gc
import os

# xdist's workers and the processes that tests start keep bytecode: without it each of them compiles torch and
# transformers again, which takes longer than everything else it does
os.environ["PYTHONDONTWRITEBYTECODE"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# no result depends on whether this machine has built the kernel or on what its processor multiplies with:
# tests/layers/test_native.py builds and uses its own kernel, tests/layers/test_products.py switches oneDNN on
os.environ.setdefault("RANKALLOC_NATIVE", "0")
os.environ.setdefault("RANKALLOC_ONEDNN", "0")

import pytest
import torch

from .support.models import make_bert, make_gpt2, make_llama, make_mlp

torch.set_num_threads(1)  # for models this small, more threads only wait for each other


@pytest.fixture
def bert():
    return make_bert()


@pytest.fixture
def gpt2():
    return make_gpt2()


@pytest.fixture
def llama():
    return make_llama()


@pytest.fixture
def mlp():
    return make_mlp()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_finish():
    """Everything that is imported by now stays: no collection of garbage looks at it again. The Trainer collects at
    every training, and half of a small run's time would go into objects of transformers."""
    gc.collect()
    gc.freeze()


# the files that take longest, 20 to 35 seconds of one core each
LONGEST = (
    "tests/several_processes/", "tests/experiments/test_sweep_goals.py", "tests/contracts/test_methods.py",
    "tests/layers/test_native.py", "tests/report/test_html.py", "tests/cli/test_app.py",
    "tests/experiments/test_sweep.py",
)


def pytest_collection_modifyitems(items):
    """The longest files begin first, so that neither worker is left with one at the end."""
    places = {start: place for place, start in enumerate(LONGEST)}
    items.sort(key=lambda item: next((places[s] for s in LONGEST if item.nodeid.startswith(s)), len(LONGEST)))
