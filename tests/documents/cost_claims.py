"""Every claim of README and docs about what a step costs, as in ``claims.py``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .claims import Claim, Setting
from .findings import read

COSTS = "docs/costs.md"
ROWS = {
    "a step, with the kernel | 0.63 | 0.64 | 0.51 | 0.46": ("steps", ""),
    "a step, without it | 0.75 | 0.76 | 0.63 | 0.58": ("steps", "no kernel"),
    "a step on four of SmolLM2's layers | | 0.67 | 0.58 | 0.54": ("decoder", ""),
    "an allocation every five | | | 0.62 | 0.58": ("runs", ""),
    "the same of a model without dropout | | | 0.54 | 0.49": ("runs without dropout", ""),
    "a step, multiplied by torch's choice | 1.05 | 1.07 | 0.87 | 0.80": ("steps", "torch"),
    "the whole run without dropout, likewise | | | 0.87 | 0.80": ("runs without dropout", "torch"),
    "a step on an earlier processor, likewise | 1.10 | 1.10 | 0.80 | 0.69": ("steps", "earlier"),
    "the whole run without dropout there, likewise | | | 0.83 | 0.70": ("runs without dropout", "earlier"),
}
"""{a row of the table: its part of reports/speed.json, and the setting it was measured in}."""
_SETTINGS = {"": "", "no kernel": ", python", "torch": ", torch's products",
             "earlier": ", torch's products, earlier processor"}  # fmt: skip
_COLUMNS = (
    "adapter / frozen floor", "default method / frozen floor", "default method / PEFT LoRA",
    "default method / PEFT AdaLoRA",
)  # fmt: skip
_PRUNED = ("adapter, all ranks pruned / frozen floor", "default method / adapter, all ranks pruned")


def speed(part: str, setting: str = "", pairs: Sequence[str] = _COLUMNS) -> list[float]:
    """Median ratios of a part of reports/speed.json, of those pairs that it has."""
    ratios = measured(part + _SETTINGS[setting])["ratios"]
    return [ratios[pair]["ratio"] for pair in pairs if pair in ratios]


def to_lora(setting: str = "") -> float:
    """A step of auto over PEFT LoRA's."""
    return speed("steps", setting, _COLUMNS[2:3])[0]


def measured(part: str) -> Any:
    return read("reports/speed.json")[part]["measured"]


def tuned(part: str) -> list[float]:
    """The tune loss at which whole runs ended: auto, AdaLoRA, LoRA."""
    return [measured(part)["tune"][kind]["loss"] for kind in ("default method", "PEFT AdaLoRA", "PEFT LoRA")]


def gpu(shape: str, arm: str) -> dict[str, Any]:
    """An arm on the GPU, with its ratio to PEFT's LoRA and its GiB."""
    found = read("reports/speed-gpu.json")["measured"][f"llama-8b, bf16, {shape} tokens"]["arms"][arm]
    return {**found["ratio"], "GiB": found["peak bytes"] / 2**30}


def experts() -> list[float]:
    """For each model a step with experts over PEFT's, both at one rank, and how many experts a block has."""
    return [
        value for model, seconds in read("studies/speed/experts.json")["seconds"].items() for value in (
            statistics.median(a / b for a, b in zip(seconds["rankalloc"], seconds["PEFT"], strict=True)),
            int(model.split()[0]),
        )
    ]  # fmt: skip


LARGE, SMALL = "4 × 2048", "4 × 512"

COST_CLAIMS = [
    *(Claim(words, (COSTS,), lambda of=of: speed(*of)) for words, of in ROWS.items()),
    Claim(
        "About half of a PEFT LoRA step on this CPU, mostly oneDNN's gain", ("docs/does-it-help.md",),
        lambda: [to_lora()],
        lambda: to_lora("torch") - to_lora() > (1 - to_lora()) / 2,
    ),
    Claim(
        "rank left then takes 0.57 × the time of the frozen one here. This is oneDNN's gain, not the adapter's: "
        "against that model a step of `auto` costs 1.10 ×", (COSTS,), lambda: speed("steps", pairs=_PRUNED),
    ),
    Claim("faster on a CPU than plain LoRA", ("README.md",), holds=lambda: max(to_lora(), to_lora("torch")) < 1),
    Claim(
        "a step without any rank takes 0.57 × the time of the frozen model's on an EPYC", ("CHANGELOG.md",),
        lambda: speed("steps", pairs=_PRUNED[:1]),
    ),
    Claim(
        "a step of `ra.attach` takes 0.84 × the time of PEFT's LoRA (quartiles 0.84 and 0.85; AdaLoRA 1.43) and holds "
        "8.2 GiB where PEFT's holds 9.5", (COSTS,),
        lambda: [
            *(gpu(LARGE, "ra.attach")[what] for what in ("ratio", "low", "high")), gpu(LARGE, "PEFT AdaLoRA")["ratio"],
            gpu(LARGE, "ra.attach")["GiB"], gpu(LARGE, "PEFT LoRA")["GiB"],
        ],
    ),
    Claim("(4 × 512), it takes 1.16 ×", (COSTS,), lambda: [gpu(SMALL, "ra.attach")["ratio"]]),
    Claim("keeps PEFT's layers and takes 1.03 ×", (COSTS,), lambda: [gpu(LARGE, "ra.adopt")["ratio"]]),
    Claim(
        "The whole runs ended at a tune loss of 0.493 (AdaLoRA 0.520; LoRA 0.772", (COSTS,), lambda: tuned("runs"),
    ),
    Claim(
        "Without dropout the losses are 0.482, 0.501 and 0.674 (nine seeds)", (COSTS,),
        lambda: [*tuned("runs without dropout"), measured("runs without dropout")["rounds"]],
    ),
    Claim(
        "dispatch 14 operators a step, however many layers there are (PEFT: 33 a layer)", (COSTS,),
        lambda: [
            measured("operators")["default method"][0]["operators"],
            measured("operators")["PEFT AdaLoRA"][0]["operators"] / measured("operators")["PEFT AdaLoRA"][0]["modules"],
        ],
        lambda: len({point["operators"] for point in measured("operators")["default method"]}) == 1,
    ),
    Claim(
        "(35,840 triplets, a parameter budget with floors and caps) costs 1.7 × the time of sorting", (COSTS,),
        lambda: [measured("allocation")["70B"][what] for what in ("triplets", "ratio")],
    ),
    Claim(
        "as much as in a run that began with those ranks (0.99 ×, quartiles 0.97 and 1.02), and uses the same bytes",
        (COSTS,),
        lambda: [measured("freeze")["ratio"][what] for what in ("ratio", "low", "high")],
        lambda: measured("freeze")["bytes"]["shrunk"] == measured("freeze")["bytes"]["born"],
    ),
    Claim(
        "takes 1.1 times as long with 8 experts a block and 1.3 times with 64", ("docs/experts.md",),
        experts,
    ),
]  # fmt: skip

COST_SETTINGS = [
    Setting("MiniLM-L6 at rank 12, on two cores of an AMD EPYC (Zen 5)", (COSTS,), "what was measured, and on what"),
    Setting("60 steps from rank 12 to a third, an allocation every five", (COSTS,), "the run that was measured"),
    Setting("a step on four of SmolLM2's layers", (COSTS,), "the model that was measured"),
    Setting("an allocation every ten steps", (COSTS,), "the run that was measured"),
    Setting("The last two rows of the table", (COSTS,), "the rows of this table"),
    Setting(
        "NVIDIA H200, bfloat16, rank 16, four layers of Llama 3.1 8B and 4 × 2048 tokens", (COSTS,),
        "what was measured",
    ),
    Setting("GPUs, half precision", (COSTS,), "sixteen bits"),
    Setting("(4 × 512)", (COSTS,), "the tokens of a step"),
]
