"""The study of speed on a GPU, tried out on the CPU, and how it reads a profiler's events and warnings."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from studies.speed import gpu, gpu_measures
from studies.speed.gpu_arms import ARMS, ATTACH, FLOOR, PEFT_ADALORA, PEFT_LORA

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TINY = ["--device", "cpu", "--tiny", "--output"]


def read(folder: Path) -> tuple[dict, str]:
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


@pytest.mark.long
def test_every_arm_is_measured_or_says_why_not(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    gpu.main([*TINY, str(tmp_path)])
    record, table = read(tmp_path)
    assert table in capsys.readouterr().out
    assert list(record["measured"]) == ["tiny, bf16", "tiny, 4bit"]
    for found in record["measured"].values():
        rows = found["arms"]
        assert list(rows) == list(ARMS) and all(table.count(f"| {kind} |") == 2 for kind in ARMS)
        for kind, row in rows.items():
            assert set(row["missing"]) == {"peak memory"}
            assert len(row["seconds"]) == 3 and all(0 < s < math.inf for s in row["seconds"])
            assert all(0 < row["ratio"][of] < math.inf for of in ("low", "ratio", "high"))
            assert ("observe" in row["calls"]) == (kind not in (FLOOR, PEFT_LORA, PEFT_ADALORA))
            if kind not in (FLOOR, PEFT_LORA):
                assert 0 < row["allocation"]["steps"] < math.inf and row["allocation"]["calls"]["operators"] > 0
        assert rows[PEFT_LORA]["ratio"]["ratio"] == 1 and rows[FLOOR]["calls a module"] == 0
        assert rows[PEFT_ADALORA]["calls a module"] > rows[PEFT_LORA]["calls a module"] > 0
        assert rows[PEFT_ADALORA]["own calls a module"] > rows[ATTACH]["own calls a module"] > 0
    ways = record["factorisations"]["tiny"]["rows"]
    assert len(ways) == 3 * 2 * 6 and all(0 < way["seconds"] < math.inf for way in ways)


def test_4_bits_without_bitsandbytes_are_rows_that_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    gpu.main([*TINY, str(tmp_path), "--precision", "4bit"])
    record, table = read(tmp_path)
    for kind, row in record["measured"]["tiny, 4bit"]["arms"].items():
        assert "bitsandbytes" in row["missing"]["arm"] and f"| {kind} | missing: ModuleNotFoundError" in table


def test_an_arm_that_fails_in_a_round_leaves_and_the_others_go_on():
    def arm(good_steps: float) -> SimpleNamespace:
        left = [good_steps]

        def step() -> None:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("out of memory\nmore")

        return SimpleNamespace(step=step, device=torch.device("cpu"))

    failed: dict[str, str] = {}

    def attempt(kind, what, call):
        try:
            return call()
        except RuntimeError as error:
            failed[kind] = gpu_measures.reason(error)

    times = gpu.interleaved({"a": arm(9), "b": arm(4), "c": arm(0), "d": arm(math.inf)}, 3, 2, attempt)
    assert {kind: len(seconds) for kind, seconds in times.items()} == {"a": 3, "b": 0, "c": 0, "d": 3}
    assert failed == dict.fromkeys(("b", "c"), "RuntimeError: out of memory")


def test_what_cannot_be_used_is_said_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for words, said in (
        ([*TINY, str(tmp_path / "file" / "folder")], "could not write"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--device", "cpu", "--shapes", "llama-9b"], "llama-9b"),
        (["--device", "cpu", "--rounds", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit) as refused:
            gpu.main(words)
        assert said in f"{refused.value}{capsys.readouterr().err}"


def test_kernels_launches_and_waits_are_told_apart():
    def event(name, of_device, annotated=False):
        where = DeviceType.CUDA if of_device else DeviceType.CPU
        return FunctionEvent(0, name, 0, 0, 1, device_type=where, is_user_annotation=annotated)

    seen = [
        event("void at::native::vectorized_elementwise_kernel<4>(int)", True),
        event("ampere_bf16_s16816gemm_bf16_128x64_ldg8", True),
        event("Memcpy DtoH (Device -> Pageable)", True),
        event("Memcpy HtoD (Pageable -> Device)", True),
        event("Memset (Device)", True),
        event("Optimizer.step#AdamW.step", True, annotated=True),
        event("cudaLaunchKernel", False),
        event("cudaLaunchKernelExC", False),
        event("cuLaunchKernelEx", False),
        event("cudaMemcpyAsync", False),
        event("cudaStreamSynchronize", False),
        event("cudaDeviceSynchronize", False),  # the profiler's own
        event("aten::mm", False),
    ]
    assert gpu_measures.tally(seen) == {"kernels": 2, "launches": 3, "waits": 1, "copies to the host": 1}


def test_synchronisations_are_counted_by_place():
    said = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:1.)"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        own = gpu_measures.ROOT / "rankalloc" / "training" / "checks.py"
        for place, line in ((own, 41), ("/any/site-packages/torch/x.py", 7), (own, 41)):
            warnings.warn_explicit(said, UserWarning, str(place), line)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
    assert gpu_measures.places(seen) == {"rankalloc/training/checks.py:41": 2, "torch/x.py:7": 1}
