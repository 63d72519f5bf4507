"""Two real processes under torchrun: the same ranks and adapters to the bit, and those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rankalloc as ra
from rankalloc.distributed import check_whole

from .conftest import assert_same, make_mlp

ROOT = Path(__file__).parent.parent


def start(folder: Path, *launcher: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, *launcher, "-m", "tests.distributed.script", str(folder)], cwd=ROOT, env=environment,
        check=True, timeout=240, capture_output=True, text=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    start(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    start(folder)
    return folder


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("run", ["auto", "adalora", "dylora", "trainer"])
def test_two_processes_end_alike_and_as_one_does(runs, run):
    one, two, whole = (tensors(runs / f"{run}-{name}.pt") for name in ("2-0", "2-1", "1-0"))
    assert_same(one, two)
    assert one.keys() == whole.keys()
    for name, tensor in updates(one).items():
        torch.testing.assert_close(tensor, updates(whole)[name], rtol=1e-5, atol=1e-5)


def updates(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ΔW of each adapter, and what else there is: singular vectors of nearly equal values may turn into each other."""
    names = [name.removesuffix(".lam") for name in state if name.endswith(".lam")]
    products = {name: state[f"{name}.P"] * state[f"{name}.lam"] @ state[f"{name}.Q"] for name in names}
    others = {key: value for key, value in state.items() if key.rpartition(".")[0] not in names}
    ranks = {f"{name}.rank": torch.tensor(len(state[f"{name}.lam"])) for name in names}
    return {**products, **others, **ranks}


def test_processes_that_choose_differently_all_say_so(runs):
    texts = [(runs / f"disagreement-{rank}.txt").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1] and "different ranks" in texts[0] and "DistributedDataParallel" in texts[0]


def test_sharded_adapters_are_refused():
    adapters = ra.attach(make_mlp(), rank=2)
    check_whole(adapters)
    next(iter(adapters)).P._is_flat_param = True
    with pytest.raises(ra.RankallocError, match="FSDP"):
        check_whole(adapters)
