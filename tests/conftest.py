"""What every test starts from: the environment, one thread, a seed, and one fixture for each tiny model."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# whether this machine has built the kernel, and who multiplies on its processor, is no part of a test;
# tests/layers/test_native.py builds and uses a kernel of its own, tests/layers/test_products.py takes oneDNN
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
