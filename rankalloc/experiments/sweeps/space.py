"""The space a sweep searches: plain data, how a trial draws from it, and the configuration key of each value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, unknown
from ...methods import ANY_METHOD, find_method
from ..config import RunConfig
from ..sections import FloatRange, IntRange

if TYPE_CHECKING:
    import optuna

PATHS = {
    "method": "method", "rank": "adapter.rank", "alpha": "adapter.alpha", "budget": "budget.fraction",
    "learning_rate": "training.learning_rate",
}
"""The key of each dimension in a run's configuration."""

CONTROL, START, MATCHED, SAMPLED = "uniform control", "start", "matched control", "sampled"
"""Roles of a trial: the first two are enqueued first, the third last; the sampler draws the fourth."""

Space = dict[str, dict[str, Any]]


def search_space(config: RunConfig) -> Space:
    """Each dimension as plain data: {"choices": [...]} or {"kind", "low", "high", "log", "step"}.

    The budget is a share of the parameters of the first rank in every layer, so that every point is feasible. An
    absolute budget (ranks, params or bytes) is the same in every trial, and no dimension.
    """
    search = config.sweep.search
    given = {"method": config.searched_methods} | {name: getattr(search, name) for name in list(PATHS)[1:]}
    if config.budget.fraction is None:
        del given["budget"]
    space: Space = {}
    for name, value in given.items():
        if isinstance(value, FloatRange):
            kind = "int" if isinstance(value, IntRange) else "float"
            space[name] = {"kind": kind, "low": value.low, "high": value.high, "log": value.log, "step": value.step}
        else:
            space[name] = {"choices": list(value) if isinstance(value, list) else [value]}
    return space


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """Draw every dimension for ``trial``."""
    params: dict[str, Any] = {}
    for name, dimension in space.items():
        if "choices" in dimension:
            params[name] = trial.suggest_categorical(name, dimension["choices"])
            continue
        draw = trial.suggest_int if dimension["kind"] == "int" else trial.suggest_float
        step = {"step": dimension["step"]} if dimension["step"] else {}
        params[name] = draw(name, dimension["low"], dimension["high"], log=dimension["log"], **step)
    return params


def configured(config: RunConfig, params: dict[str, Any]) -> RunConfig:
    """The run at a point of the space. It keeps those ``method_options`` that its method has."""
    values = {PATHS[name]: value for name, value in params.items()}
    return config.replaced({**values, "method_options": options_of(config, params)})


def options_of(config: RunConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Those of the configured ``method_options`` that the method at this point has."""
    known = (*find_method(params.get("method", config.method)).options, *ANY_METHOD)
    return {name: value for name, value in config.method_options.items() if name in known}


def check_options(config: RunConfig) -> None:
    """Raise ConfigError when none of the methods to be searched has an option of ``method_options``."""
    known = {*ANY_METHOD, *(name for method in config.searched_methods for name in find_method(method).options)}
    for name in config.method_options:
        if name not in known:
            raise ConfigError(unknown(f"option of the methods {', '.join(config.searched_methods)}:", name, known))


def first_points(config: RunConfig) -> list[tuple[dict[str, Any], str]]:
    """(params, role) of the trials every sweep begins with: the start point as uniform LoRA, then as each
    other method, then as uniform LoRA at further learning rates; all moved to the nearest point of the space.

    Two parametrisations cannot be compared at one shared rate (arXiv 2602.04998), so one rate is not a control."""
    space = search_space(config)
    start: dict[str, float | None] = {
        "rank": config.adapter.rank, "alpha": config.adapter.alpha, "learning_rate": config.training.learning_rate,
        "budget": config.budget.fraction,
    }
    point = {
        name: _nearest(space[name], value) for name, value in start.items() if name in space and value is not None
    }
    methods = space["method"]["choices"]
    rates = config.sweep.control_learning_rates or [config.training.learning_rate / part for part in (4, 2, 8)]
    distinct = dict.fromkeys(_nearest(space["learning_rate"], rate) for rate in rates)
    controls = [({"method": "uniform", **point, "learning_rate": rate}, CONTROL) for rate in distinct]
    controls = controls if "uniform" in methods else []
    starts = [({"method": name, **point}, START) for name in methods if name != "uniform"]
    return controls[:1] + starts + controls[1:]


def _nearest(dimension: dict[str, Any], value: float) -> Any:
    if "choices" in dimension:
        return min(dimension["choices"], key=lambda choice: abs(choice - value))
    value = min(max(value, dimension["low"]), dimension["high"])
    if dimension["step"]:
        value = dimension["low"] + round((value - dimension["low"]) / dimension["step"]) * dimension["step"]
    return int(value) if dimension["kind"] == "int" else float(value)
