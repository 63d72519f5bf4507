"""The samplers a sweep can draw by: one function and one line each in :data:`SAMPLERS`, all of them Optuna's."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

from ..config import RunConfig
from .space import search_space

_STARTUP = 8  # trials before a model is fitted
_POPULATION = 8


def _tpe(config: RunConfig, seed: int) -> BaseSampler:
    conditional = any("when" in dimension for dimension in search_space(config).values())
    # multivariate: which rate is good depends on the method; the liar keeps workers from one point
    return TPESampler(
        seed=seed, n_startup_trials=_STARTUP, multivariate=True, group=conditional, constant_liar=True
    )


def _random(config: RunConfig, seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def _gp(config: RunConfig, seed: int) -> BaseSampler:
    return GPSampler(seed=seed, n_startup_trials=_STARTUP, deterministic_objective=False)


def _nsga2(config: RunConfig, seed: int) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=_POPULATION)


SAMPLERS: dict[str, Callable[[RunConfig, int], BaseSampler]] = {
    "tpe": _tpe, "random": _random, "gp": _gp, "nsga2": _nsga2,
}
"""{name in ``sweep.sampler``: what makes the sampler, of the configuration and a seed}."""


def sampler_of(config: RunConfig, slot: int, draw: int = 0) -> BaseSampler:
    """Seeded by the slot, so that an interrupted sweep draws what another would, and no two workers draw alike."""
    seed = (config.seed * 1_000_003 + slot + 7_919 * draw) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SAMPLERS[config.sweep.sampler](config, seed)
