"""The sections of a configuration: their keys, defaults and ranges."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..errors import unknown
from .fields import Choices, Count, Float, Int, OneOrMore, Positive, Section, Share

BUDGET_UNITS = ("ranks", "params", "bytes", "fraction")


def known_method(name: str) -> str:
    """``name`` when it is a registered method; ValueError with the nearest one otherwise."""
    from ..methods import METHODS

    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    return name


class ModelConfig(Section):
    """The base model: its folder or hub id, and how it is held. ``load_in_4bit`` is NF4 and ``load_in_8bit`` LLM.int8,
    both by bitsandbytes; adapters beside them stay in float32. ``dtype`` null is float32, or the checkpoint's with
    ``training.bf16``. ``chat_template`` is a Jinja template, or a file that holds one, in place of the tokenizer's."""

    name: str | None = None
    revision: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    attn_implementation: str | None = None
    chat_template: str | None = None

    @field_validator("load_in_8bit")
    @classmethod
    def _one_width(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("load_in_4bit"):
            raise ValueError("a model is held in 4 or in 8 bits, not in both; set one of them to false")
        return value

    @field_validator("chat_template")
    @classmethod
    def _some_template(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError(f"should be a Jinja template or a file that holds one, got {value!r}")
        return value


class AdapterConfig(Section):
    """The adapter at the start: ``rank`` triplets per layer, scaled by ``alpha / rank`` (``scale: rslora``: by
    ``alpha / √rank``). ``init`` null means the method's own parametrisation; "lora-fa", "vera" and "lora-xs"
    freeze factors."""

    rank: Count = 12
    alpha: Positive = 24.0
    scale: Literal["lora", "rslora"] = "lora"
    init: Literal["svd", "lora", "gate", "lora-fa", "vera", "lora-xs"] | None = None
    target_modules: OneOrMore[str] = "all-linear"
    exclude_modules: Choices[str] | None = None
    modules_to_save: list[str] | None = None
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0


class BudgetConfig(Section):
    """The budget and its schedule. It is given in exactly one unit; ``fraction`` is a share of the parameters that the
    adapters begin with. ``warmup`` and ``freeze`` are shares of the training steps, ``every`` is in optimizer steps."""

    ranks: Count | None = None
    params: Count | None = None
    bytes: Count | None = None
    fraction: Share | None = None
    min_rank: Annotated[Int, Field(ge=0)] = 0
    max_rank: Count | None = None
    multiple_of: Count = 1
    warmup: Annotated[Float, Field(ge=0, lt=1)] = 0.05
    freeze: Annotated[Float, Field(ge=0, lt=1)] = 0.3
    every: Count = 10
    shape: Literal["cubic", "linear", "constant"] = "cubic"

    @field_validator("fraction")
    @classmethod
    def _one_unit(cls, value: float | None, info: ValidationInfo) -> float | None:
        given = {u: info.data[u] for u in BUDGET_UNITS[:3] if info.data.get(u) is not None}
        if value is not None:
            given["fraction"] = value
        if len(given) > 1:
            got = " and ".join(f"{unit} {amount}" for unit, amount in given.items())
            raise ValueError(f"give one of {', '.join(BUDGET_UNITS)}, not several (null unsets one), got {got}")
        return value if given else 0.5

    @field_validator("max_rank")
    @classmethod
    def _above_floor(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < info.data.get("min_rank", 0):
            raise ValueError(f"should be at least min_rank {info.data['min_rank']}, got {value}")
        return value

    @field_validator("freeze")
    @classmethod
    def _room_to_allocate(cls, value: float, info: ValidationInfo) -> float:
        if value + info.data.get("warmup", 0) >= 1:
            raise ValueError(f"{value} and warmup {info.data['warmup']} leave no steps to allocate in (sum below 1)")
        return value


class TrainingConfig(Section):
    """The training loop. Give ``steps`` or ``epochs``, not both; ``*_steps`` and ``*_every`` are optimizer steps.
    ``learning_rate`` applies to Q and the heads; P and Λ have ``plus_ratio`` times it (LoRA+).
    ``away_from``: folders of finished adapters of the same base; a penalty with ``away_weight`` (null: 0.1) keeps the
    new adapter out of their subspaces, on the side of the inputs, the outputs or both (``away_side``, null: input)."""

    epochs: Positive | None = None
    steps: Count | None = None
    batch_size: Count = 16
    eval_batch_size: Count = 64
    learning_rate: Positive = 5e-3
    plus_ratio: Positive = 1.0
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    warmup_steps: Annotated[Int, Field(ge=0)] = 0
    gradient_accumulation_steps: Count = 1
    max_grad_norm: Annotated[Float, Field(ge=0)] = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    log_every: Count = 10
    eval_every: Count | None = None
    save_every: Count | None = None
    away_from: OneOrMore[str] | None = None
    away_weight: Positive | None = None
    away_side: Literal["input", "output", "both"] | None = None

    @field_validator("away_weight", "away_side")
    @classmethod
    def _away_from_what(cls, value: float | str | None, info: ValidationInfo) -> float | str | None:
        if value is not None and "away_from" in info.data and info.data["away_from"] is None:
            raise ValueError(f"{value!r} does nothing without away_from; name the adapters to keep out of")
        return value

    @property
    def away(self) -> dict[str, Any]:
        """The controller's options from the ``away_*`` keys; {} for none."""
        given = {"away_from": self.away_from, "away_weight": self.away_weight, "away_side": self.away_side}
        return {name: value for name, value in given.items() if value is not None}

    @field_validator("steps")
    @classmethod
    def _one_length(cls, value: int | None, info: ValidationInfo) -> int | None:
        epochs = info.data.get("epochs")
        if value is not None and epochs is not None:
            raise ValueError(f"give steps or epochs, not both (null unsets one): steps {value} and epochs {epochs:g}")
        return value if value is not None or epochs is not None else 150


class DataConfig(Section):
    """The examples kept per split (null: all, or the task's default), the tokens kept per example, and whether a new
    classifier's bias starts at the classes' log frequencies in the training split."""

    limit_train: Count | None = None
    limit_tune: Count | None = None
    limit_report: Count | None = None
    max_length: Annotated[Int, Field(ge=2)] = 128
    prior_bias: bool = False
