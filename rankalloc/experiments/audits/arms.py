"""The arms of an audit: what each changes in the audited configuration, and why one does not apply.

Every arm has the size of the audit, in parameters of the LoRA that ships, the same task, steps and batches, and is
tuned by itself. Task, model, data and the scaling alpha / rank are the configuration's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from ...budget import LayerShape
from ...methods import find_method
from ..audit_arms import ARM_NAMES, BY_HAND, UNIFORM
from ..config import RunConfig
from ..tasks.base import PreparedTask
from .hand_patterns import pattern

Way = Literal["trained", "cut", "cut and trained on", "peft"]
"""How an arm comes to its adapter."""


@dataclass(frozen=True)
class Setting:
    """What all arms share: the audited configuration, its size in parameters, its layers, and its task."""

    config: RunConfig
    params: int
    shapes: Sequence[LayerShape]
    prepared: PreparedTask

    @property
    def one_rank(self) -> int:
        """The parameters of one rank in every layer."""
        return sum(shape.params_per_rank for shape in self.shapes)

    @property
    def peak(self) -> int:
        """The parameters that the method begins with."""
        return sum(shape.params_per_rank * shape.rank for shape in self.shapes)


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name, what: as records have them.
        values: {dotted key: value} that it changes in the audited configuration.
        way: how it comes to its adapter.
        skipped: why it does not apply; None where it does.
    """

    name: str
    what: str
    values: dict[str, Any]
    way: Way = "trained"
    skipped: str | None = None

    def configured(self, setting: Setting, rate: float, seed: int) -> RunConfig:
        """The configuration of its run."""
        return setting.config.replaced({
            **self.values, "name": f"{setting.config.name}-{self.name}", "training.learning_rate": rate, "seed": seed,
            "output": None,
        })  # fmt: skip


def first_rate(setting: Setting, arm: Arm) -> float:
    """The rate in the middle of those that the arm is tried at first: B·A learns faster than P·Λ·Q from Λ = 0."""
    rate = setting.config.training.learning_rate
    trains_svd = arm.way == "peft" or find_method(arm.values["method"]).init == "svd"
    return rate if trains_svd and setting.config.adapter.init in (None, "svd") else rate / 2


def arms_of(setting: Setting) -> list[Arm]:
    """The method first, then the arms that the configuration asks for (all of them by default), those that do not apply
    with the reason."""
    method = setting.config.method
    wanted = setting.config.audit.arms or list(ARM_NAMES)
    own = Arm(method, f"the audited method {method}", _of_method(setting, "chosen"))
    names = [UNIFORM, *(name for name in ARM_NAMES if name in wanted and name != UNIFORM)]  # it is what all is about
    return [own, *(_MADE[name](name, setting) for name in names)]


def _size(setting: Setting) -> dict[str, Any]:
    return {f"budget.{unit}": None for unit in ("ranks", "bytes", "fraction")} | {"budget.params": setting.params}


def _of_method(setting: Setting, placement: str) -> dict[str, Any]:
    placed = {} if placement == "chosen" else {"placement": placement}
    return {
        **_size(setting), "method": setting.config.method,
        "method_options": {**setting.config.method_options, **placed},
    }


def _plain(setting: Setting, method: str = UNIFORM, **options: Any) -> dict[str, Any]:
    return {**_size(setting), "method": method, "method_options": options, "adapter.init": None}


def _uniform(name: str, setting: Setting) -> Arm:
    return Arm(name, ARM_NAMES[name], _plain(setting))


def _placed(placement: str) -> Callable[[str, Setting], Arm]:
    def made(name: str, setting: Setting) -> Arm:
        method, skipped = setting.config.method, None
        if "placement" not in find_method(method).options:
            skipped = f"method {method!r} has no other placements"
        return Arm(name, ARM_NAMES[name], _of_method(setting, placement), skipped=skipped)

    return made


def _cut(way: Way) -> Callable[[str, Setting], Arm]:
    def made(name: str, setting: Setting) -> Arm:
        values = {**_plain(setting), "budget.params": setting.peak}
        skipped = None
        if setting.params >= setting.peak:
            skipped = f"the size is that of rank {setting.config.adapter.rank} everywhere: there is nothing to cut"
        elif way == "cut and trained on" and setting.prepared.trainer == "dpo":
            skipped = "DPO cannot begin with an adapter that has moved"
        return Arm(name, ARM_NAMES[name], values, way, skipped)

    return made


def _peft(name: str, setting: Setting) -> Arm:
    skipped = None
    if find_spec("peft") is None:
        skipped = 'PEFT is not installed: pip install "rankalloc[peft]"'
    elif setting.prepared.trainer != "plain":
        skipped = f"the task is trained by TRL's {setting.prepared.trainer.upper()}Trainer"
    elif setting.params < setting.one_rank:
        skipped = "it takes a whole mean rank, and the size is below one rank a layer"
    return Arm(name, ARM_NAMES[name], _plain(setting), "peft", skipped)


def _by_hand(name: str, setting: Setting) -> Arm:
    if setting.params >= setting.one_rank:
        return Arm(name, ARM_NAMES[name], _plain(setting), skipped="the size is one rank a layer or more")
    ranks = pattern(name, setting.shapes, setting.params)
    skipped = None if any(ranks.values()) else "no layer of this kind fits the size"
    # whole ranks of these layers may leave a part of the size unspent
    spent = {"budget.params": sum(shape.params_per_rank * ranks[shape.name] for shape in setting.shapes)}
    return Arm(name, ARM_NAMES[name], _plain(setting, "manual", rank_pattern=ranks) | spent, skipped=skipped)


_MADE: dict[str, Callable[[str, Setting], Arm]] = {
    UNIFORM: _uniform, "twin": _placed("uniform"), "random": _placed("random"), "shuffled": _placed("shuffled"),
    "post": _cut("cut"), "cont": _cut("cut and trained on"), "peft-adalora": _peft,
    **dict.fromkeys(BY_HAND, _by_hand),
}
