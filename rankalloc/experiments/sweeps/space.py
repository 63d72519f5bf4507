"""The space a sweep searches: plain data, how a trial draws from it, and the configuration key of each value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, RankallocError, unknown
from ...methods import ANY_METHOD, find_method
from ...trace import SWEEP_NAME, SweepRecord
from ..config import RunConfig
from ..sweep_section import FloatRange, FurtherDimension, IntRange

if TYPE_CHECKING:
    import optuna

PATHS = {
    "method": "method", "rank": "adapter.rank", "alpha": "adapter.alpha", "alpha_ratio": "adapter.alpha",
    "budget": "budget.fraction", "learning_rate": "training.learning_rate",
}
"""The key of each dimension in a run's configuration; a further one is named by its key."""

CONTROL, START, EARLIER, MATCHED, SAMPLED = "uniform control", "start", "earlier best", "matched control", "sampled"
"""Roles of a trial: the first three are enqueued first, the fourth last; the sampler draws the fifth."""

_NEVER = ("name", "task", "model", "seed", "output", "tracking", "sweep", "data", "trust_remote_code", "reader")
_EARLIER = 3  # best points of an earlier sweep that are tried

Space = dict[str, dict[str, Any]]


def search_space(config: RunConfig) -> Space:
    """Each dimension as plain data: {"choices": [...]} or {"kind", "low", "high", "log", "step"}, with "when" where it
    is for some methods only. A choice that is no single value stands there as JSON ("coded").

    The budget is a share of the parameters of the first rank in every layer, so that every point is feasible. An
    absolute budget (ranks, params or bytes) is the same in every trial, and no dimension.
    """
    search = config.sweep.search
    given = {"method": config.searched_methods} | {name: getattr(search, name) for name in list(PATHS)[1:]}
    if config.budget.fraction is None:
        del given["budget"]
    if config.sweep.share_runs and "budget" in given:
        shares = given["budget"]
        if isinstance(shares, (FloatRange, list)):
            given["budget"] = shares.high if isinstance(shares, FloatRange) else max(shares)
    del given["alpha" if search.alpha_ratio is not None else "alpha_ratio"]
    space = {name: _dimension(value) for name, value in given.items()}
    return space | {path: _dimension(value) for path, value in search.more.items()}


def _dimension(value: Any) -> dict[str, Any]:
    when = {}
    if isinstance(value, FurtherDimension):
        when = {} if value.when is None else {"when": value.when}
        if value.choices is None:
            kind = "int" if value.whole_numbers else "float"
            return {"kind": kind, **value.model_dump(include={"low", "high", "log", "step"}), **when}
        value = value.choices
    if isinstance(value, FloatRange):
        kind = "int" if isinstance(value, IntRange) else "float"
        return {"kind": kind, "low": value.low, "high": value.high, "log": value.log, "step": value.step}
    choices = list(value) if isinstance(value, list) else [value]
    if any(isinstance(choice, (list, dict)) for choice in choices):
        return {"choices": [json.dumps(choice) for choice in choices], "coded": True, **when}
    return {"choices": choices, **when}


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """Draw every dimension for ``trial``; one that is for other methods than its own is left out."""
    params: dict[str, Any] = {}
    for name, dimension in space.items():
        if "when" in dimension and params["method"] not in dimension["when"]:
            continue
        if "choices" in dimension:
            params[name] = trial.suggest_categorical(name, dimension["choices"])
            continue
        draw = trial.suggest_int if dimension["kind"] == "int" else trial.suggest_float
        step = {"step": dimension["step"]} if dimension["step"] else {}
        params[name] = draw(name, dimension["low"], dimension["high"], log=dimension["log"], **step)
    return params


def values_at(config: RunConfig, params: dict[str, Any]) -> dict[str, Any]:
    """{key of the configuration: its value} at a point of the space."""
    values: dict[str, Any] = {}
    for name, value in params.items():
        further = config.sweep.search.more.get(name)
        if name == "alpha_ratio":
            value = value * params.get("rank", config.adapter.rank)
        elif further is not None and _dimension(further).get("coded"):
            value = json.loads(value)
        values[PATHS.get(name, name)] = value
    return values


def configured(config: RunConfig, params: dict[str, Any]) -> RunConfig:
    """The run at a point of the space. It keeps those ``method_options`` that its method has."""
    return config.replaced({**values_at(config, params), "method_options": options_of(config, params)})


def given_by_trials(config: RunConfig) -> Iterator[str]:
    """The keys of the configuration that every trial replaces."""
    for name, dimension in search_space(config).items():
        if "when" not in dimension:
            yield PATHS.get(name, name)


def options_of(config: RunConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Those of the configured ``method_options`` that the method at this point has."""
    known = (*find_method(params.get("method", config.method)).options, *ANY_METHOD)
    return {name: value for name, value in config.method_options.items() if name in known}


def check_space(config: RunConfig) -> None:
    """Raise ConfigError when none of the methods to be searched has an option of ``method_options``, or a further
    dimension is not one of a run, or has a value that a run refuses."""
    known = {*ANY_METHOD, *(name for method in config.searched_methods for name in find_method(method).options)}
    for name in config.method_options:
        if name not in known:
            raise ConfigError(unknown(f"option of the methods {', '.join(config.searched_methods)}:", name, known))
    for path, further in config.sweep.search.more.items():
        if path in PATHS.values() or path.partition(".")[0] in _NEVER:
            raise ConfigError(f"sweep.search.more cannot search {path}" + (
                ": it has a dimension of its own" if path in PATHS.values() else ""
            ))  # fmt: skip
        dimension = _dimension(further)
        for value in dimension.get("choices") or [dimension["low"], dimension["high"]]:
            config.replaced({path: json.loads(value) if dimension.get("coded") else value})
        strangers = [name for name in dimension.get("when", ()) if name not in config.searched_methods]
        if strangers:
            raise ConfigError(
                f"sweep.search.more.{path} is for method {strangers[0]!r}, and the sweep searches "
                f"{', '.join(config.searched_methods)}"
            )


def first_points(config: RunConfig) -> list[tuple[dict[str, Any], str]]:
    """(params, role) of the trials every sweep begins with: the start point as uniform LoRA, then as each
    other method, then as uniform LoRA at further learning rates and at each budget that is a choice, then the best
    points of earlier sweeps; all moved to the nearest point of the space.

    Two parametrisations cannot be compared at one shared rate (arXiv 2602.04998), so one rate is not a control."""
    space = search_space(config)
    start: dict[str, float | None] = {
        "rank": config.adapter.rank, "alpha": config.adapter.alpha, "learning_rate": config.training.learning_rate,
        "budget": config.budget.fraction, "alpha_ratio": config.adapter.alpha / config.adapter.rank,
    }
    point = {
        name: _nearest(space[name], value) for name, value in start.items() if name in space and value is not None
    }
    methods = space["method"]["choices"]
    further = {path: _configured_value(config, path, space[path]) for path in config.sweep.search.more}
    rates = config.sweep.control_learning_rates or [config.training.learning_rate / part for part in (2, 1, 4)]
    distinct = dict.fromkeys(_nearest(space["learning_rate"], rate) for rate in rates)
    def at(method: str, **values: Any) -> dict[str, Any]:
        own = {path: value for path, value in further.items() if method in space[path].get("when", (method,))}
        return {"method": method, **point, **own, **values}

    controls = [(at("uniform", learning_rate=rate), CONTROL) for rate in distinct]
    controls += [
        ({**controls[0][0], "budget": share}, CONTROL)
        for share in space.get("budget", {}).get("choices", ()) if share != point.get("budget")
    ]
    controls = controls if "uniform" in methods else []
    starts = [(at(name), START) for name in methods if name != "uniform"]
    earlier = [(at(own.pop("method", methods[0]), **own), EARLIER) for own in _of_earlier_sweeps(config, space)]
    found: list[tuple[dict[str, Any], str]] = []
    for params, role in controls[:1] + starts + controls[1:] + earlier:
        if all(params != known for known, _ in found):
            found.append((params, role))
    return found


def _configured_value(config: RunConfig, path: str, dimension: dict[str, Any]) -> Any:
    """The point of a further dimension that the configuration itself is at, or is nearest to."""
    value: Any = config.model_dump(mode="json")
    for part in path.split("."):
        value = value[part]
    if "choices" in dimension:
        value = json.dumps(value) if dimension.get("coded") else value
        if value in dimension["choices"] or not isinstance(value, (int, float)):
            return value if value in dimension["choices"] else dimension["choices"][0]
        numbers = [choice for choice in dimension["choices"] if isinstance(choice, (int, float))]
        return _nearest({"choices": numbers}, value) if numbers else dimension["choices"][0]
    return _nearest(dimension, value if isinstance(value, (int, float)) else dimension["low"])


def _of_earlier_sweeps(config: RunConfig, space: Space) -> list[dict[str, Any]]:
    """The best points of ``sweep.start_from``, as far as they have this sweep's dimensions, at the nearest point of
    it."""
    found: list[dict[str, Any]] = []
    for folder in config.sweep.start_from or ():
        path = Path(folder)
        try:
            record = SweepRecord.load(path / SWEEP_NAME if path.is_dir() else path)
        except RankallocError:
            raise ConfigError(
                f"sweep.start_from: {folder} is no folder of a sweep with a {SWEEP_NAME} that can be read"
            ) from None
        complete = [trial for trial in record.trials if trial.value is not None]
        complete.sort(key=lambda trial: trial.value or 0.0, reverse=record.direction == "maximize")
        for trial in complete[:_EARLIER]:
            given, rank = dict(trial.params), trial.params.get("rank")
            if rank and "alpha" in given and "alpha_ratio" in space:
                given["alpha_ratio"] = given["alpha"] / rank
            elif rank and "alpha_ratio" in given and "alpha" in space:
                given["alpha"] = given["alpha_ratio"] * rank
            point = {
                name: _nearest(space[name], value) for name, value in given.items()
                if name in space and (name == "method" or isinstance(value, (int, float)))
            }  # fmt: skip
            if point.get("method", space["method"]["choices"][0]) in space["method"]["choices"] and point not in found:
                found.append(point)
    return found


def _nearest(dimension: dict[str, Any], value: Any) -> Any:
    if "choices" in dimension:
        if isinstance(value, str) or value in dimension["choices"]:
            return value
        return min(dimension["choices"], key=lambda choice: abs(choice - value))
    value = min(max(value, dimension["low"]), dimension["high"])
    if dimension["step"]:
        value = dimension["low"] + round((value - dimension["low"]) / dimension["step"]) * dimension["step"]
    return int(value) if dimension["kind"] == "int" else float(value)
