"""The three parts: where the arms meet, the rates each is tried at, how many seeds, and what is measured."""

from __future__ import annotations

import math
from typing import Any

from ..common.grid import Grid
from ..common.part import Part, loss
from . import language, planted, punctuation
from .arms import ARMS, CHOOSING, EQUAL

TINY = 1e-30  # an error of zero has no logarithm
WRONG = 100.0  # decades of error that all ranks being wrong amounts to


def log_error(run: dict[str, Any]) -> float:
    """log10 of the student's relative error, so that means are geometric."""
    return math.log10(max(TINY, run["relative_error"]))


def ranks_then_error(run: dict[str, Any]) -> float:
    """The error, and far above it the layers with a wrong rank where there is a right one.

    A low rate can have the lowest error on one network and miss ranks on the other (studies/planted).
    """
    wrong = 0.0 if run["place"].startswith("half") else 1.0 - run["exact"]
    return log_error(run) + WRONG * wrong


PARTS = {part.name: part for part in (
    Part("planted", CHOOSING, planted.PLACES, Grid((5e-3, 1e-2, 2e-2)), planted.training.STEPS, rate_seeds=3, seeds=5,
         first_seed=0, run=planted.run, value=log_error, criterion=ranks_then_error),
    Part("language", ARMS, ("language",), Grid((1e-3, 3e-3, 1e-2, 1.4e-2, 2e-2), factor=1.5), 240, rate_seeds=2,
         seeds=5, first_seed=100, run=language.run, value=loss, criterion=loss),
    Part("punctuation", (*CHOOSING, EQUAL), ("punctuation",), Grid((4e-3, 8e-3, 1.6e-2)), 96, rate_seeds=1, seeds=6,
         first_seed=100, run=punctuation.run, value=loss, criterion=loss),
)}  # fmt: skip
"""{name: part}."""
