"""What does a step cost when experts are adapted: rankalloc's ragged ranks beside PEFT's target_parameters.

    python -m studies.speed.experts [--rounds 24] [--output studies/speed/experts.json]

Two small mixtures of experts with random weights, of 8 and of 64 experts a block. In each round every arm takes one
step on the same tokens; a ratio is taken within its round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import rankalloc as ra
from rankalloc.files import write_json
from rankalloc.training.environment import describe

from ..common.arguments import at_least_one
from ..common.table import markdown

HERE = Path(__file__).parent
RANK, BATCH, LENGTH, NOT_COUNTED = 8, 4, 64, 3
_SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "8 experts of 256 × 512": lambda: MixtralForCausalLM(MixtralConfig(
        **_SIZES, intermediate_size=512, num_local_experts=8, num_experts_per_tok=2,
    )),
    "64 experts of 256 × 96": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **_SIZES, intermediate_size=512, moe_intermediate_size=96, head_dim=32, num_experts=64, num_experts_per_tok=4,
    )),
}  # fmt: skip


def whole(model: nn.Module) -> nn.Module:
    """Every expert at the first rank."""
    ra.attach(model, rank=RANK)
    return model


def cut(model: nn.Module) -> nn.Module:
    """Half of the ranks, as an allocation may leave them: experts of all ranks, some without any."""
    for place, adapter in enumerate(ra.attach(model, rank=RANK)):
        adapter.select(torch.arange(place * 7 % (RANK + 1)))
    return model


def peft(model: nn.Module) -> nn.Module:
    """PEFT's adapters of the same matrices."""
    return get_peft_model(model, LoraConfig(
        r=RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ))  # fmt: skip


ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {"PEFT": peft, "rankalloc": whole, "rankalloc, cut to half": cut}


def measure(make: Callable[[], nn.Module], rounds: int) -> dict[str, list[float]]:
    """{arm: seconds of each counted step}."""
    torch.manual_seed(0)
    tokens, running = torch.randint(0, _SIZES["vocab_size"], (BATCH, LENGTH)), {}
    for arm, adapt in ARMS.items():
        model = adapt(make().train())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
        running[arm] = model, torch.optim.AdamW(trained, lr=1e-3)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(NOT_COUNTED + rounds):
        for arm, (model, optimizer) in running.items():
            started = time.perf_counter()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number >= NOT_COUNTED:
                seconds[arm].append(time.perf_counter() - started)
    return seconds


def table(measured: dict[str, dict[str, list[float]]]) -> str:
    """Median milliseconds and the median ratio to PEFT's with its quartiles, in Markdown."""
    rows = []
    for model, seconds in measured.items():
        for arm, own in seconds.items():
            ratios = [a / b for a, b in zip(own, seconds["PEFT"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows.append([model, arm, f"{1e3 * statistics.median(own):.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    return markdown(("model", "arm", "ms a step", "÷ PEFT's (quartiles)"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    about = "What does a step cost when experts are adapted?"
    parser = argparse.ArgumentParser(prog="python -m studies.speed.experts", description=about)
    parser.add_argument("--rounds", type=at_least_one, default=24, help="counted rounds (24)")
    parser.add_argument("--output", type=Path, default=HERE / "experts.json")
    args = parser.parse_args(argv)
    measured = {name: measure(make, args.rounds) for name, make in MODELS.items()}
    write_json(args.output, {"seconds": measured, "environment": describe("cpu").model_dump()})
    print(table(measured))


if __name__ == "__main__":
    main()
