"""Whole audits of made-up seeds whose true differences are known, judged by the package until they are over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rankalloc.experiments.audits.examples import example_interval
from rankalloc.experiments.audits.judgements import BETTER, EQUIVALENT, WORSE, Design, Judgement, is_over, judge

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def _failing(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal arms, and a method that is now and then much worse than it mostly is."""
    return np.concatenate([1 - rng.exponential(size=(1, *shape[1:])), rng.standard_normal((shape[0] - 1, *shape[1:]))])


def _heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_t(3, shape) / np.sqrt(3)


@dataclass(frozen=True)
class Scenario:
    """One kind of audit.

    Attributes:
        truth: the true difference of each comparison, in standard deviations of its paired differences.
        draw: numbers of mean 0 and variance 1 for the method and every other arm.
        most: seeds after which an open-ended audit is given up.
    """

    truth: tuple[float, ...]
    design: Design = field(default_factory=Design)
    draw: Draw = _normal
    most: int = 8


OPEN = Design(open_ended=True)
SCENARIOS = {
    "no difference anywhere": Scenario((0, 0, 0, 0)),
    "no difference, margin of 2 sd": Scenario((0, 0, 0, 0), Design(margin=2.0)),
    "no difference, the method fails at times": Scenario((0, 0, 0, 0), draw=_failing),
    "no difference, heavy tails": Scenario((0, 0, 0, 0), draw=_heavy),
    "no difference, open-ended": Scenario((0, 0, 0, 0), OPEN, most=20),
    "better than one of four": Scenario((1, 0, 0, 0)),
    "better than all by 1 sd": Scenario((1, 1, 1, 1)),
    "better than all by 1 sd, open-ended": Scenario((1, 1, 1, 1), OPEN, most=20),
    "worse than all by 2 sd": Scenario((-2, -2, -2, -2)),
    "one comparison, at a margin of 2 sd": Scenario((2,), Design(margin=2.0)),
    "one comparison, at minus the margin": Scenario((-2,), Design(margin=2.0)),
    "all at a margin of 2 sd": Scenario((2, 2, 2, 2), Design(margin=2.0)),
    "primary at a margin of 2 sd, others 0": Scenario((2, 0, 0, 0), Design(margin=2.0)),
}


def rates(scenario: Scenario, audits: int, seed: int) -> dict[str, Any]:
    """Shares of ``audits`` audits: with a wrong claim of each family, and with each claim of the primary comparison."""
    rng = np.random.default_rng(seed)
    wrong = {"difference": 0, "equivalence": 0, "either": 0}
    claims: dict[str, int] = {}
    others = low = high = seeds = 0
    for _ in range(audits):
        found = _audit(scenario, rng)
        kinds = {kind for (name, one) in found.items() if (kind := _wrong(one.claim, scenario, int(name)))}
        for kind in kinds:
            wrong[kind] += 1
        wrong["either"] += bool(kinds)
        primary = found["0"]
        claims[primary.claim] = claims.get(primary.claim, 0) + 1
        others += sum(found[name].claim in (BETTER, WORSE) for name in list(found)[1:])
        low, high = low + (primary.low > scenario.truth[0]), high + (primary.high < scenario.truth[0])
        seeds += primary.seeds
    return {
        "audits": audits, "truth": scenario.truth,
        "wrong": {kind: count / audits for kind, count in wrong.items()},
        "primary": {claim: count / audits for claim, count in sorted(claims.items())},
        "others_differ": others / audits / max(len(scenario.truth) - 1, 1),
        "limits_missed": [low / audits, high / audits], "seeds": seeds / audits,
    }  # fmt: skip


def found_by(difference: float, design: Design, seeds: tuple[int, ...], audits: int, seed: int) -> list[float]:
    """Shares of audits with one comparison that claim *better* within each number of ``seeds``."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((audits, max(seeds))) + difference
    return [
        sum(judge({"0": row[:count]}, design, "0")["0"].claim == BETTER for row in values) / audits for count in seeds
    ]


def primary_alone(audits: int, seed: int) -> dict[str, float]:
    """What is claimed of the primary comparison by the default design, in far more audits than can be judged in whole.

    Without any difference, a wrong claim of another comparison needs one of the primary, so "claimed without a
    difference" is the rate of a wrong claim in a whole audit.
    """
    rng, design = np.random.default_rng(seed), Design()
    values = rng.standard_normal((audits, max(design.looks)))

    def claimed(difference: float, sign: int, level: float) -> np.ndarray:
        over = np.zeros(audits, bool)
        for look in design.looks:
            seen = sign * (values[:, :look] + difference)
            over |= seen.mean(axis=1) >= design.limit(level, look) * seen.std(axis=1, ddof=1) / np.sqrt(look)
        return over

    better, worse = design.level * design.share, design.level * (1 - design.share)
    return {
        "claimed without a difference": float((claimed(0, 1, better) | claimed(0, -1, worse)).mean()),
        "better at 1 sd": float(claimed(1, 1, better).mean()),
        "worse at -1 sd": float(claimed(-1, -1, worse).mean()),
        "worse at -2 sd": float(claimed(-2, -1, worse).mean()),
    }


def coverage(audits: int, seed: int) -> dict[str, float]:
    """How often 95 % intervals hold the truth, by 8 seeds and 200 examples in 40 documents.

    The parts of seeds, documents, examples and pairs of seed and example are all present; the intervals are of seeds
    alone, of examples alone as if they were independent, and of both.
    """
    rng = np.random.default_rng(seed)
    documents = np.repeat(np.arange(40), 5)
    held = {"seeds alone": 0, "examples alone": 0, "both": 0}
    for _ in range(audits):
        values = (
            0.1 * rng.standard_normal((8, 1)) + 0.5 * rng.standard_normal(40)[documents]
            + 0.5 * rng.standard_normal(200) + rng.standard_normal((8, 200))
        )
        both = example_interval(values, documents)
        independent = example_interval(values)
        held["seeds alone"] += abs(both.mean) < 2.365 * both.seed_error
        held["examples alone"] += abs(both.mean) < 1.972 * independent.example_error
        held["both"] += both.low < 0 < both.high
    return {name: count / audits for name, count in held.items()}


def _audit(scenario: Scenario, rng: np.random.Generator) -> Mapping[str, Judgement]:
    """One audit, look by look. All comparisons share the method's seeds, so they correlate by a half."""
    draws = scenario.draw(rng, (len(scenario.truth) + 1, scenario.most))
    differences = (draws[0] - draws[1:]) / np.sqrt(2) + np.array(scenario.truth)[:, None]
    for look in scenario.design.looks_until(scenario.most):
        found = judge({str(i): row[:look] for i, row in enumerate(differences)}, scenario.design, "0")
        if is_over(found):
            break
    return found


def _wrong(claim: str, scenario: Scenario, index: int) -> str | None:
    truth, margin = scenario.truth[index], scenario.design.margin
    if (claim == BETTER and truth <= 0) or (claim == WORSE and truth >= 0):
        return "difference"
    return "equivalence" if claim == EQUIVALENT and margin is not None and abs(truth) >= margin else None
