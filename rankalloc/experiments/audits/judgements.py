"""What may be claimed from paired seeds that are looked at as they come in: better, worse, equivalent, or undecided.

A comparison has one difference for each seed: method minus another arm, positive where the method is better. At each
look it has one-sided sequential p-values p(bound) for "the true mean is at most the bound", the least of all looks so
far: p(0) for *better*; the same of the negated differences for *worse*; the greater of the two against −margin for
*equivalent* (two one-sided tests; Schuirmann, J. Pharmacokinetics and Biopharmaceutics 1987). An audit makes two
families of claims. The chance of any wrong claim in a family is at most the level, whatever the true differences are:

- **A difference: better or worse.** The primary comparison is the gatekeeper. It may be *better* at ``share`` of the
  level and *worse* at the rest: 4.9 % and 0.1 %, since the question is "do adaptive ranks help?". Once it has been
  claimed, its part of the level passes to the others: *better* by Holm among them at ``share`` of it, *worse* by Holm
  at the rest. This is a graph of Maurer & Bretz (Statistics in Biopharmaceutical Research 2013).
- **Equivalence.** Weighted Holm at the level, half for the primary comparison and half for all others; all of it for
  the primary one where it is alone. There is no gate.

A claim once made stands. An equivalent primary comparison ends the audit.

Why 98 % for *better*: with 8 seeds and a difference of one sd, a t-test without looks has a power of 0.68 at one-sided
2.5 %, of 0.80 at 4.6 % and of 0.81 at 4.9 %. With looks at 4, 6 and 8 that becomes 0.80 (studies/audit_rates).

Cost: under a millisecond for each comparison. Known weakness: where some comparisons truly differ by the margin or
more and others not at all, both families can err, and only twice the level bounds a wrong claim of either. *Worse*
takes a large difference: −2 sd are found in 73 % of audits with 8 seeds. Set ``share`` to 0.5 where it matters as
much as *better*. Rare failures of the method raise the chance of a wrong *better* (7 % with an exponential tail): a
few seeds without one look too good. Differences without any spread, as of a coarse metric, are never claimed, since
their error is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

from ...errors import ConfigError, DataError
from .anytime import AnytimeT
from .sequential import SequentialT, sequential_t

BETTER, WORSE, EQUIVALENT = "better", "worse", "equivalent"
UNDECIDED, UNDECIDED_AT_THE_END = "undecided", "undecided at the end"


@dataclass(frozen=True)
class Design:
    """How an audit looks and what it risks, settled before the first seed.

    Attributes:
        looks: the numbers of seeds at which it is judged, rising.
        level: the chance of a wrong claim in the whole audit.
        share: the part of the level that is for *better*; the rest is for *worse*.
        margin: the largest difference that counts as none, in units of the metric; None claims no equivalence.
        open_ended: judge after every seed from the second and never end; ``looks`` is not used.
    """

    looks: tuple[int, ...] = (4, 6, 8)
    level: float = 0.05
    share: float = 0.98
    margin: float | None = None
    open_ended: bool = False

    def __post_init__(self) -> None:
        if not self.looks or self.looks[0] < 2 or any(b <= a for a, b in zip(self.looks, self.looks[1:], strict=False)):
            raise ConfigError(f"looks must be rising numbers of seeds of at least 2, got {self.looks}")
        for name in ("level", "share"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.margin is not None and not 0 < self.margin < np.inf:
            raise ConfigError(f"margin must be a positive number, or none, got {self.margin}")

    @property
    def test(self) -> SequentialT | AnytimeT:
        """What gives p-values and limits at the looks."""
        return AnytimeT() if self.open_ended else sequential_t(self.looks)

    def looks_until(self, seeds: int) -> list[int]:
        """The looks at up to ``seeds`` seeds."""
        return list(range(2, seeds + 1)) if self.open_ended else [look for look in self.looks if look <= seeds]

    def limit(self, error: float, seeds: int) -> float:
        """The t of a one-sided limit that is wrong with a chance of at most ``error``, over all looks together."""
        return self.test.limit(error, seeds)


class Judgement(NamedTuple):
    """One comparison at a look.

    Attributes:
        claim: "better", "worse", "equivalent", "undecided" (look again) or "undecided at the end".
        low, high: limits of the mean, each wrong with a chance of at most level × share (4.9 %) over all looks
            together, so about a 90 % interval: repeated confidence limits (Jennison & Turnbull, JRSS B 1989). The
            primary comparison is *better* at just the looks where low is above 0. The number of comparisons is not
            corrected for.
        p: the least level of a whole audit at which a difference would be claimed, were this its only comparison.
        effect: Hedges' g.
    """

    claim: str
    seeds: int
    mean: float
    low: float
    high: float
    p: float
    effect: float


def judge(differences: Mapping[str, Sequence[float]], design: Design, primary: str) -> dict[str, Judgement]:
    """Judge every comparison at the look given by the number of seeds.

    Args:
        differences: {other arm: differences in the order of the seeds}, equally many for all, positive where the method
            is better. Earlier looks are judged again from the first differences.
        primary: the comparison that the others wait for.

    Raises:
        DataError: there is no such comparison, the numbers of seeds differ or are not a look, or a value is not finite.
    """
    arms = {name: np.asarray(values, float) for name, values in differences.items()}
    if primary not in arms:
        raise DataError(f"the primary comparison {primary!r} has no differences; there are some of {', '.join(arms)}")
    seeds = len(arms[primary])
    if odd := [name for name, values in arms.items() if values.shape != (seeds,) or not np.isfinite(values).all()]:
        raise DataError(f"the differences of {odd[0]} are not {seeds} finite numbers, as {primary}'s are")
    looks = design.looks_until(seeds)
    if seeds not in looks:
        planned = "2 or more" if design.open_ended else ", ".join(map(str, design.looks))
        raise DataError(f"there are differences of {seeds} seeds, but this audit looks at {planned}")
    claims: dict[str, str] = {}
    lowest = {name: dict.fromkeys((BETTER, WORSE, EQUIVALENT), 1.0) for name in arms}
    for look in looks:
        for name, values in arms.items():
            for claim, p in _p_values(values[:look], design).items():
                lowest[name][claim] = min(lowest[name][claim], p)
        for name, claim in _claims(lowest, design, primary).items():
            claims.setdefault(name, claim)
    over = next_look(seeds, design) is None or claims.get(primary) == EQUIVALENT
    found = {}
    for name, values in arms.items():
        p = min(1.0, lowest[name][BETTER] / design.share, lowest[name][WORSE] / (1 - design.share))
        claim = claims.get(name, UNDECIDED_AT_THE_END if over else UNDECIDED)
        low, high = interval(values, design, design.level * design.share)
        found[name] = Judgement(claim, seeds, float(values.mean()), low, high, p, hedges_g(values))
    return found


def is_over(judgements: Mapping[str, Judgement]) -> bool:
    """Whether no comparison waits for another look."""
    return all(judgement.claim != UNDECIDED for judgement in judgements.values())


def next_look(seeds: int, design: Design) -> int | None:
    """The number of seeds at which to look after ``seeds``; None at the end."""
    if design.open_ended:
        return max(seeds + 1, 2)
    return next((look for look in design.looks if look > seeds), None)


def interval(values: Sequence[float] | np.ndarray, design: Design, error: float) -> tuple[float, float]:
    """(low, high) of the mean at a look; each is wrong with a chance of at most ``error`` over all looks together."""
    mean, spread = float(np.mean(values)), design.limit(error, len(values)) * _standard_error(values)
    return mean - spread, mean + spread


def hedges_g(values: Sequence[float] | np.ndarray) -> float:
    """Mean / sd of paired differences times Γ(ν/2) / (√(ν/2) Γ((ν − 1)/2)), ν = n − 1, which makes it unbiased.

    Hedges (J. Educational Statistics 1981), eq. 6e. NaN below three seeds and without spread.
    """
    nu = len(values) - 1
    spread = np.std(values, ddof=1)
    if nu < 2 or spread == 0:
        return float("nan")
    correction = np.exp(special.gammaln(nu / 2) - special.gammaln((nu - 1) / 2)) / np.sqrt(nu / 2)
    return float(correction * np.mean(values) / spread)


def holm(p_values: Mapping[str, float], level: float, weights: Mapping[str, float] | None = None) -> set[str]:
    """The names that Holm's procedure rejects (Scand. J. Statistics 1979, with its weights, where given).

    Each hypothesis is tested at its weight's share of the level among those not rejected yet.
    """
    weights = weights or dict.fromkeys(p_values, 1.0)
    rejected: set[str] = set()
    while True:
        left = sum(weights[name] for name in p_values if name not in rejected)
        more = {name for name, p in p_values.items() if name not in rejected and p <= level * weights[name] / left}
        if not more:
            return rejected
        rejected |= more


def _claims(lowest: Mapping[str, Mapping[str, float]], design: Design, primary: str) -> dict[str, str]:
    """What the p-values so far allow to be claimed; a difference goes before equivalence."""
    parts = {BETTER: design.share, WORSE: 1 - design.share}
    others = [name for name in lowest if name != primary]
    claims: dict[str, str] = {}
    for opened, part in parts.items():
        if lowest[primary][opened] <= part * design.level and primary not in claims:
            claims[primary] = opened
            for side, share in parts.items():
                for name in holm({name: lowest[name][side] for name in others}, part * share * design.level):
                    claims.setdefault(name, side)
    weights = dict.fromkeys(others, 1.0) | {primary: float(len(others) or 1)}
    for name in holm({name: lowest[name][EQUIVALENT] for name in lowest}, design.level, weights):
        claims.setdefault(name, EQUIVALENT)
    return claims


def _p_values(values: np.ndarray, design: Design) -> dict[str, float]:
    def above(bound: float, sign: int = 1) -> float:
        t = (sign * values.mean() - bound) / _standard_error(values)
        return design.test.p_value(t, len(values))

    found = {BETTER: above(0), WORSE: above(0, -1)}
    if design.margin is not None:
        found[EQUIVALENT] = max(above(-design.margin), above(-design.margin, -1))
    return found


def _standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of the mean; infinite without spread, so that nothing is claimed from it."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if np.ptp(values) > 0 else np.inf
