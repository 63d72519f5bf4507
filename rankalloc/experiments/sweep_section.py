"""The sections of a configuration that a sweep reads: what is searched, by what, and what the best is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from .fields import Choices, Count, Float, Int, Number, OneOrMore, Positive, Searched, Section, Share
from .sections import known_method

MOST_TRIALS = 9_999


class FloatRange(Section):
    """All numbers from ``low`` to ``high``, on a log scale or in steps, but not both."""

    low: Float
    high: Float
    log: bool = False
    step: Positive | None = None

    @field_validator("high")
    @classmethod
    def _ordered(cls, value: float, info: ValidationInfo) -> float:
        if "low" in info.data and value < info.data["low"]:
            raise ValueError(f"should be at least low {info.data['low']}, got {value}")
        return value

    @field_validator("log")
    @classmethod
    def _positive(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("low", 1) <= 0:
            raise ValueError(f"a log scale needs low above 0, got low {info.data['low']}")
        return value

    @field_validator("step")
    @classmethod
    def _no_log_step(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("log"):
            raise ValueError(f"a log scale takes no step, got {value}")
        return value


class IntRange(FloatRange):
    """All whole numbers from ``low`` to ``high``."""

    low: Int
    high: Int
    step: Count | None = None


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class FurtherDimension(Section):
    """One more dimension: ``choices``, or a range from ``low`` to ``high``. ``when`` names the methods that it is for:
    a trial of another method keeps the configured value."""

    choices: Choices[Any] | None = None
    low: Number | None = None
    high: Number | None = None
    log: bool = False
    step: Number | None = None
    when: Annotated[list[str], BeforeValidator(_several)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> FurtherDimension:
        ends = (self.low, self.high)
        if (self.choices is None) == (None in ends) or (self.choices is not None and ends != (None, None)):
            raise ValueError("give choices, or low and high")
        if self.low is not None and self.high is not None:
            # the rules of every range, with its messages
            kind = IntRange if self.whole_numbers else FloatRange
            kind.model_validate(self.model_dump(include={"low", "high", "log", "step"}))
        return self

    @field_validator("when")
    @classmethod
    def _known_methods(cls, value: list[str] | None) -> list[str] | None:
        return None if value is None else [known_method(name) for name in value]

    @property
    def whole_numbers(self) -> bool:
        """Whether every value of the range is a whole number."""
        return all(value is None or isinstance(value, int) for value in (self.low, self.high, self.step))


def _flat(tree: Any) -> Any:
    """``{"training": {"bf16": [...]}}`` as ``{"training.bf16": [...]}``, which says the same."""
    if not isinstance(tree, dict):
        return tree
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and not set(value) & set(FurtherDimension.model_fields):
            found |= {f"{key}.{further}": inner for further, inner in _flat(value).items()}
        else:
            found[str(key)] = value
    return found


class SearchConfig(Section):
    """The search space: per dimension a value, a list of choices, or a range. ``budget`` is a share of the parameters
    of the first rank in every layer; ``method`` null means the configured method and "uniform". ``alpha_ratio`` is
    alpha / rank, in place of ``alpha``. ``more`` has further keys of a run (``adapter.dropout``,
    ``adapter.target_modules``, ``training.warmup_steps`` …), each with a list of choices or a mapping."""

    method: OneOrMore[str] | None = None
    rank: Searched[Count, IntRange] = [4, 8, 12]
    # far above twice the rank: the best alpha grows with it (arXiv 2606.12883)
    alpha: Searched[Positive, FloatRange] = FloatRange(low=4, high=128, log=True)
    alpha_ratio: Searched[Positive, FloatRange] | None = None
    budget: Searched[Share, FloatRange] = FloatRange(low=0.25, high=1.0)
    learning_rate: Searched[Positive, FloatRange] = FloatRange(
        low=1e-3, high=2e-2, log=True
    )
    more: Annotated[dict[str, Searched[Any, FurtherDimension]], BeforeValidator(_flat)] = {}

    @model_validator(mode="after")
    def _one_alpha(self) -> SearchConfig:
        if self.alpha_ratio is not None and self.alpha != type(self).model_fields["alpha"].default:
            raise ValueError("give alpha or alpha_ratio, which is alpha / rank, not both")
        return self

    @field_validator("method")
    @classmethod
    def _known_methods(cls, value: str | list[str] | None) -> str | list[str] | None:
        for name in [value] if isinstance(value, str) else value or []:
            known_method(name)
        return value

    @field_validator("rank", "alpha", "alpha_ratio", "budget", "learning_rate")
    @classmethod
    def _in_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, FloatRange):
            if value.low <= 0:
                raise ValueError(f"low should be above 0, got {value.low}")
            if info.field_name == "budget" and value.high > 1:
                raise ValueError(f"high should be at most 1 (a share of rank x layers), got {value.high}")
        return value


class LimitsConfig(Section):
    """What a trial may cost at most, to be chosen: the parameters and bytes of what it ships, seconds a step."""

    params: Count | None = None
    bytes: Count | None = None
    step_seconds: Positive | None = None

    @property
    def given(self) -> dict[str, float]:
        """{what: its limit}."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class SweepConfig(Section):
    """The number of trials, what they look for, the sampler and the space.

    ``goal`` "quality" looks for the best trial within ``limits``, and stops poor ones early (``pruner``); "pareto"
    looks for the front of quality against ``against``. A trial is trained with ``seeds`` seeds, and its value is their
    mean; the best ``finalists`` are trained again with ``fresh_seeds`` fresh seeds before the winner is named.
    ``control_learning_rates`` are the rates at which uniform LoRA is tried, in this order; null means a half of
    ``training.learning_rate``, all of it and a quarter, since B·A learns faster than P·Λ·Q from Λ = 0. ``start_from``
    are folders of earlier sweeps, whose best points are tried first. With ``share_runs`` one run at the largest budget
    answers all of ``search.budget``: it is cut to the others. ``processes`` train one trial together (torchrun)."""

    trials: Annotated[Count, Field(le=MOST_TRIALS)] = 20
    goal: Literal["quality", "pareto"] = "quality"
    against: Literal["params", "bytes"] = "params"
    limits: LimitsConfig = LimitsConfig()
    sampler: Literal["tpe", "random", "gp", "nsga2"] = "tpe"
    pruner: Literal["halving", "wilcoxon", "none"] = "halving"
    seeds: Count = 1
    finalists: Count = 3
    fresh_seeds: Count = 2
    share_runs: bool = False
    processes: Count = 1
    control_learning_rates: Choices[Positive] | None = None
    start_from: Choices[str] | None = None
    search: SearchConfig = SearchConfig()

    @field_validator("limits")
    @classmethod
    def _of_quality(cls, value: LimitsConfig, info: ValidationInfo) -> LimitsConfig:
        if value.given and info.data.get("goal") == "pareto":
            raise ValueError("are for goal quality; the front of goal pareto shows every size, got "
                             f"{', '.join(value.given)}")
        return value
