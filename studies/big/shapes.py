"""What the models and their adapters hold, by formula: parameters, and the memory that training takes at most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rankalloc.experiments.config import RunConfig

GIB = 2**30
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes of a weight in four bits with its constants: 8 bits for 64 weights, and 32 bits for 256 of those constants."""
TRAINED_BYTES = 16
"""Bytes of a trained number: itself, its gradient and Adam's two moments, in float32."""
LOGIT_BYTES = 10
"""Bytes of a logit: in bfloat16, in float32, and its gradient in float32."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A Llama of these sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_size: int
    tied: bool
    vocabulary: int = 128_256

    def sizes(self, module: str) -> tuple[int, int]:
        """(d_in, d_out) of a linear layer."""
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (self.hidden, query), "k_proj": (self.hidden, key), "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden), "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden),
        }[module]  # fmt: skip

    def lora_params(self, modules: Iterable[str], rank: int) -> int:
        """Parameters of LoRA of one rank in these modules of every layer: rank · (d_in + d_out) each."""
        return self.layers * rank * sum(sum(self.sizes(module)) for module in modules)

    @property
    def linear_params(self) -> int:
        """Parameters of the linear layers, which four bits hold."""
        return self.layers * sum(d_in * d_out for d_in, d_out in map(self.sizes, LINEAR))

    @property
    def params(self) -> int:
        """All parameters: linear layers, embedding (and output layer, where it is another), norms."""
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.linear_params + tables + (2 * self.layers + 1) * self.hidden

    @property
    def kept_a_token(self) -> int:
        """Numbers that one layer keeps of one token for the backward pass: the inputs of its norms, products and
        non-linearities."""
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        return 4 * self.hidden + 2 * query + 2 * key + 4 * self.intermediate


MODELS = {
    "meta-llama/Llama-3.2-1B": Shape(2048, 16, 32, 8, 8192, 64, tied=True),
    "meta-llama/Llama-3.2-3B": Shape(3072, 28, 24, 8, 8192, 128, tied=True),
    "meta-llama/Llama-3.1-8B": Shape(4096, 32, 32, 8, 14336, 128, tied=False),
}


def modules_of(config: RunConfig) -> tuple[str, ...]:
    """The modules that a configuration adapts."""
    given = config.adapter.target_modules
    return LINEAR if given == "all-linear" else (given,) if isinstance(given, str) else tuple(given)


def memory(config: RunConfig) -> dict[str, float]:
    """Bytes that a step takes at most, when every example has data.max_length tokens: of the frozen base, of what is
    trained at the start, of activations, of logits."""
    shape, settings, training = MODELS[config.model_settings.name or ""], config.model_settings, config.training
    peak = shape.lora_params(modules_of(config), config.adapter.rank)
    tokens = training.batch_size * config.data.max_length
    few_bits = shape.linear_params * (NF4_BYTES - 2) if settings.load_in_4bit else 0.0
    every = tokens * shape.layers * shape.kept_a_token
    one = tokens * shape.layers * shape.hidden + tokens * shape.kept_a_token  # each layer's input, and one layer anew
    return {
        "base": 2.0 * shape.params + few_bits, "trained": float(TRAINED_BYTES * peak),
        "activations": 2.0 * (one if training.gradient_checkpointing else every),
        "logits": float(LOGIT_BYTES * tokens * shape.vocabulary),
    }  # fmt: skip


def table(configs: Iterable[RunConfig]) -> str:
    """One row a configuration, in Markdown: its size and the memory of a step in GiB."""
    lines = ["| configuration | LoRA parameters | at the start | base | trained | activations | logits | all, GiB |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for config in configs:
        shape, parts = MODELS[config.model_settings.name or ""], memory(config)
        peak = shape.lora_params(modules_of(config), config.adapter.rank)
        shown = " | ".join(f"{part / GIB:.1f}" for part in parts.values())
        size = f"{config.budget.params:,}" if config.budget.params else "searched"
        lines.append(f"| {config.name} | {size} | {peak:,} | {shown} | **{sum(parts.values()) / GIB:.0f}** |")
    return "\n".join(lines)
