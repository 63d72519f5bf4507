"""What does an adaptive step cost beside a PEFT LoRA step?

BERT of the shape of MiniLM-L6 (6 layers, 384 wide), batch 16 × 64 tokens, adapters of rank 12 on every
linear layer of the encoder, AdamW. Each variant takes one training step in turn, round after round, so
that a machine's changing speed hits all alike; what is compared are medians. Prints ratios and writes
reports/speed.json.

    python studies/speed/bench.py [--rounds 20] [--rank 12]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import BertConfig, BertForTokenClassification

import rankalloc as ra
from rankalloc.environment import describe

TARGETS = r".*encoder.*(query|key|value|dense)"
PLAIN, FUSED, DEFAULT = "adapter, plain", "adapter, fused", "adapter, default method"


def model() -> BertForTokenClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522,
        num_labels=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
    return BertForTokenClassification(config)


class Variant:
    """A model with its optimizer and what happens around a step."""

    def __init__(self, kind: str, rank: int, steps: int) -> None:
        self.kind, self.model, self.controller = kind, model(), None
        if kind == "floor":
            self.model.requires_grad_(False)
            # gradients pass every layer and end there; the embedding table's own gradient would be counted otherwise
            self.model.bert.embeddings.register_forward_hook(lambda _module, _inputs, out: out.requires_grad_())
        elif kind == "peft lora":
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
            self.model = get_peft_model(self.model, config)
        elif kind == "peft adalora":
            config = AdaLoraConfig(
                init_r=rank, target_r=rank // 2, tinit=1, tfinal=1, deltaT=1, total_step=steps * 10,
                lora_alpha=2 * rank, target_modules=TARGETS, task_type="TOKEN_CLS",
            )
            self.model = get_peft_model(self.model, config)
        else:
            adapters = ra.attach(self.model, rank=rank, target_modules=TARGETS, modules_to_save=())
            self.adapters = adapters
            if kind == PLAIN:
                for adapter in adapters:
                    adapter.base_layer.register_forward_hook(lambda *_: None)  # who is watched is not fused
            elif kind == DEFAULT:
                budget = ra.RankBudget(fraction=0.5, warmup=0.0, freeze=0.1, every=1)
                # allocating at every step is dearer than any real schedule; the freeze is never reached
                self.controller = ra.RankController(adapters, budget, total_steps=steps * 10)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3) if kind != "floor" else None
        self.count = 0

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        started = time.perf_counter()
        self.count += 1
        self.model(**batch).loss.backward()
        if self.controller is not None:
            self.controller.observe()
        if self.optimizer is not None:
            self.optimizer.step()
        if self.controller is not None:
            self.controller.update(self.optimizer)
        if self.kind == "peft adalora":
            self.model.base_model.update_and_allocate(self.count)
        self.model.zero_grad()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="counted steps of each variant (default 20)")
    parser.add_argument("--rank", type=int, default=12, help="rank of every adapter (default 12)")
    parser.add_argument("--output", type=Path, default=Path("reports/speed.json"))
    args = parser.parse_args()

    batch = {
        "input_ids": torch.randint(1000, 30000, (16, 64)), "attention_mask": torch.ones(16, 64, dtype=torch.long),
        "labels": torch.randint(0, 24, (16, 64)),
    }
    kinds = ("floor", "peft lora", "peft adalora", PLAIN, FUSED, DEFAULT)
    variants = [Variant(kind, args.rank, args.rounds + 3) for kind in kinds]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(args.rounds + 3):
        order = variants if number % 2 else variants[::-1]
        for variant in order:
            seconds = variant.step(batch)
            if number >= 3:
                times[variant.kind].append(seconds)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    ours = variants[-1]
    own = sum(p.numel() * p.element_size() for a in ours.adapters for p in (a.P, a.lam, a.Q))
    state = ours.controller.trace.allocator_state_bytes
    ratios = {
        "adaptive step / PEFT LoRA step": medians[DEFAULT] / medians["peft lora"],
        "adaptive step / PEFT AdaLoRA step": medians[DEFAULT] / medians["peft adalora"],
        "adaptive step / frozen floor": medians[DEFAULT] / medians["floor"],
        "step without scoring / frozen floor": medians[FUSED] / medians["floor"],
        "step without scoring / the same, plain": medians[FUSED] / medians[PLAIN],
        "allocator state / adapter": state / own,
    }
    for kind, seconds in medians.items():
        spread = f"{min(times[kind]) * 1000:.0f}–{max(times[kind]) * 1000:.0f}"
        print(f"{kind:24} {seconds * 1000:7.0f} ms a step ({spread}), {seconds / medians['floor']:.3f} × floor")
    for name, value in ratios.items():
        print(f"{name:40} {value:.3f}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "question": __doc__.splitlines()[0], "rounds": args.rounds, "rank": args.rank, "median_seconds": medians,
        "ratios": ratios, "environment": describe("cpu").model_dump(),
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
