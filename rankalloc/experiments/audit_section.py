"""The part of a configuration that says how an audit compares: arms, tuning, seeds and margin."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from ..errors import unknown
from .audit_arms import ARM_NAMES
from .fields import Choices, Float, Int, Positive, Section


class AuditConfig(Section):
    """The arms beside the method, and how they are compared.

    ``arms`` null means all that apply. Every arm is tuned by ``trials`` runs: learning rates a factor ``spread`` apart
    around ``training.learning_rate`` at first (half of it for B·A, which learns faster), then beyond the best one where
    that is at an edge, and between it and its better neighbour where it is not. After each number of paired seeds in
    ``looks`` the audit may end: a difference is shown, or that there is none larger than ``margin``, in units of the
    metric (0.002 is 0.2 points of F1). ``open_ended`` looks after every seed, up to ``seeds_at_most``."""

    arms: Choices[str] | None = None
    trials: Annotated[Int, Field(ge=3, le=40)] = 5
    spread: Annotated[Float, Field(gt=1, le=100)] = 2.0
    margin: Positive = 0.002
    looks: Choices[Annotated[Int, Field(ge=2, le=40)]] = [4, 6, 8]
    open_ended: bool = False
    seeds_at_most: Annotated[Int, Field(ge=2, le=40)] = 20

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, value: list[str] | None) -> list[str] | None:
        for name in value or []:
            if name not in ARM_NAMES:
                raise ValueError(unknown("arm", name, ARM_NAMES))
        return None if value is None else list(dict.fromkeys(value))

    @field_validator("looks")
    @classmethod
    def _rising(cls, value: list[int], info: ValidationInfo) -> list[int]:
        if sorted(set(value)) != value:
            raise ValueError(f"should be rising numbers of seeds, such as [4, 6, 8], got {value}")
        return value
