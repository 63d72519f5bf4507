"""The statistics of an audit against published values, other ways of computing them, and simulated audits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, special, stats

from rankalloc.errors import ConfigError, DataError
from rankalloc.experiments.audits.anytime import AnytimeT
from rankalloc.experiments.audits.examples import example_interval
from rankalloc.experiments.audits.judgements import (
    BETTER,
    EQUIVALENT,
    UNDECIDED,
    UNDECIDED_AT_THE_END,
    WORSE,
    Design,
    hedges_g,
    holm,
    interval,
    is_over,
    judge,
    next_look,
)
from rankalloc.experiments.audits.sequential import sequential_t, spent

SEEDS = (0.1, 0.2, -0.1, 0.15, 0.05, 0.12, -0.02, 0.1)


def standard(mean: float, sd: float, seeds: int = 8) -> np.ndarray:
    """Numbers of exactly this mean and standard deviation, at every second look roughly so."""
    values = np.array([(-1.0) ** i * (1 + 0.01 * i) for i in range(seeds)])
    return mean + sd * (values - values.mean()) / values.std(ddof=1)


def test_with_many_seeds_the_limits_are_those_of_lan_and_demets():
    looks = (100_000, 200_000, 300_000)
    test = sequential_t(looks, rho=1.0)
    # gsDesign: sfLDOF, alpha = 0.025, equal information
    assert [test.limit(0.025, n) for n in looks] == pytest.approx((3.710, 2.511, 1.993), abs=0.01)


def test_the_level_is_spent_as_planned_with_few_seeds():
    looks, level = (4, 6, 8), 0.049
    values = np.random.default_rng(1).standard_normal((100_000, 8))
    t = np.stack([stats.ttest_1samp(values[:, :n], 0, axis=1).statistic for n in looks], axis=1)
    over = t >= [sequential_t(looks).limit(level, n) for n in looks]
    for k, n in enumerate(looks):
        planned = spent(level, n / 8)
        assert over[:, : k + 1].any(axis=1).mean() == pytest.approx(planned, abs=4 * math.sqrt(planned / 100_000))
    assert spent(level, 1.0) == pytest.approx(level)


def test_one_look_is_the_t_test_and_its_p_value():
    values = np.array(SEEDS)
    ordinary = stats.ttest_1samp(values, 0, alternative="greater")
    test = sequential_t((8,))
    assert test.p_value(ordinary.statistic, 8) == pytest.approx(ordinary.pvalue, rel=0.01)
    assert test.limit(0.05, 8) == pytest.approx(stats.t.isf(0.05, 7), rel=1e-3)


@pytest.mark.parametrize("seeds", [4, 6, 8])
def test_limits_and_p_values_are_inverse_and_extremes_are_defined(seeds):
    test = sequential_t((4, 6, 8))
    for level in (0.3, 0.049, 0.002):
        assert test.p_value(test.limit(level, seeds), seeds) == pytest.approx(level)
    assert test.limit(1e-9, seeds) == math.inf
    assert test.p_value(-50, seeds) == 1 and test.p_value(1e12, seeds) < 1e-4


def test_holm_by_hand():
    # 0.01 <= 0.05 / 4, 0.013 <= 0.05 / 3, 0.03 > 0.05 / 2: Holm stops there
    p = {"a": 0.01, "b": 0.04, "c": 0.013, "d": 0.03}
    assert holm(p, 0.05) == {"a", "c"}
    assert holm(p | {"d": 0.024}, 0.05) == {"a", "b", "c", "d"}
    # half of the level for a; then b has its half of what is left, and c all
    assert holm({"a": 0.024, "b": 0.02, "c": 0.05}, 0.05, {"a": 2, "b": 1, "c": 1}) == {"a", "b", "c"}
    assert holm({"a": 0.026, "b": 0.013, "c": 0.05}, 0.05, {"a": 2, "b": 1, "c": 1}) == set()


def test_equivalence_with_one_look_is_two_t_tests():
    values, margin = np.array(SEEDS), 0.16
    greater = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    less = stats.ttest_1samp(values, margin, alternative="less").pvalue
    p = max(greater, less)
    claims = {
        level: judge({"u": values}, Design((8,), level=level, margin=margin), "u")["u"].claim
        for level in (p * 0.95, p * 1.05)
    }
    assert claims == {p * 0.95: UNDECIDED_AT_THE_END, p * 1.05: EQUIVALENT}


@pytest.mark.parametrize(("mean", "claim"), [(5, BETTER), (-5, WORSE), (0.0, UNDECIDED_AT_THE_END)])
def test_a_single_comparison(mean, claim):
    (found,) = judge({"u": standard(mean, 1)}, Design(), "u").values()
    assert found.claim == claim and found.seeds == 8 and found.low < found.mean < found.high
    assert (found.p <= 0.05) == (claim != UNDECIDED_AT_THE_END)


def test_others_wait_for_the_primary_comparison():
    clear, unclear = standard(5, 1), standard(0, 1)
    opened = judge({"uniform": clear, "random": clear, "twin": unclear}, Design(), "uniform")
    assert [one.claim for one in opened.values()] == [BETTER, BETTER, UNDECIDED_AT_THE_END]
    closed = judge({"uniform": unclear, "random": clear}, Design(), "uniform")
    assert {one.claim for one in closed.values()} == {UNDECIDED_AT_THE_END}


def test_the_others_share_what_the_primary_comparison_used():
    design = Design((8,))
    level = 0.05 * 0.98 * 0.98 / 2  # of the first of two in Holm's procedure
    near = {p: standard(stats.t.isf(p, 7) / math.sqrt(8), 1) for p in (level * 0.95, level * 1.05)}
    for p, values in near.items():
        found = judge({"u": standard(5, 1), "v": values, "w": standard(0, 1)}, design, "u")
        assert found["v"].claim == (BETTER if p < level else UNDECIDED_AT_THE_END)


def test_a_claim_stands_and_the_audit_goes_on_for_the_others():
    design = Design()
    values = np.array([1.0, 1.01, 0.99, 1.02, -4.0, 3.0, -5.0, 2.0])
    other = standard(0, 1)
    early = judge({"u": values[:4], "v": other[:4]}, design, "u")
    assert (early["u"].claim, early["v"].claim) == (BETTER, UNDECIDED) and not is_over(early)
    late = judge({"u": values, "v": other}, design, "u")
    assert late["u"].claim == BETTER and late["u"].low < 0 and is_over(late)


def test_an_equivalent_primary_comparison_ends_the_audit():
    found = judge({"u": standard(0, 0.01, 4), "v": standard(0, 1, 4)}, Design(margin=1.0), "u")
    assert [one.claim for one in found.values()] == [EQUIVALENT, UNDECIDED_AT_THE_END] and is_over(found)


def test_differences_without_spread_are_not_claimed():
    found = judge({"u": [0.5] * 8}, Design(margin=1.0), "u")["u"]
    assert found.claim == UNDECIDED_AT_THE_END and found.p > 0.5
    assert (found.low, found.high) == (-math.inf, math.inf) and math.isnan(found.effect)


def test_the_looks():
    assert [next_look(n, Design()) for n in (0, 4, 5, 8)] == [4, 6, 6, None]
    assert [next_look(n, Design(open_ended=True)) for n in (0, 2, 30)] == [2, 3, 31]


def test_false_claims_and_power_in_simulated_audits():
    rng = np.random.default_rng(3)
    false = found = 0
    for _ in range(600):
        arms = rng.standard_normal((3, 8))
        differences = dict(zip("uv", (arms[0] - arms[1:]) / math.sqrt(2), strict=True))
        false += any(one.claim in (BETTER, WORSE) for one in judge(differences, Design(), "u").values())
        found += judge({"u": differences["u"] + 1}, Design(), "u")["u"].claim == BETTER
    assert false <= 45 and 450 <= found <= 515  # 30 and 481 are expected


def test_the_limits_hold_at_every_look_together():
    rng = np.random.default_rng(4)
    missed = np.zeros(2)
    for values in 3 + rng.standard_normal((800, 8)):
        limits = [interval(values[:n], Design(), 0.049) for n in (4, 6, 8)]
        missed += [any(low > 3 for low, _ in limits), any(high < 3 for _, high in limits)]
    assert (missed < 62).all() and (missed > 20).all()  # 39 are expected


@pytest.mark.parametrize("t", [-3.0, -0.5, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("c", [0.5, 1.0])
def test_the_two_halves_of_the_e_value_make_the_published_martingale(t, c):
    n = 7
    values = standard(t / math.sqrt(n), 1, n)
    total, squares = values.sum(), (values**2).sum()
    # Wang & Ramdas, Theorem 4.9
    published = math.sqrt(c**2 / (n + c**2)) * (1 - total**2 / ((n + c**2) * squares)) ** (-n / 2)
    test = AnytimeT(c)
    assert (test.e_value(t, n) + test.e_value(-t, n)) / 2 == pytest.approx(published)


def test_the_e_value_is_the_mixture_of_likelihood_ratios():
    n, t = 6, 2.0
    values = standard(t / math.sqrt(n), 1, n)
    ratio = values.sum() / math.sqrt((values**2).sum())

    def inner(y: float, theta: float) -> float:
        # the likelihood of mean / sd = theta under the scale-invariant prior, relative to 0
        shape = y ** (n / 2 - 1) * math.exp(-y - n * theta**2 / 2 + theta * ratio * math.sqrt(2 * y))
        return shape / special.gamma(n / 2) * 2 * stats.norm.pdf(theta)

    expected, _ = integrate.dblquad(inner, 0, 6, 0, 80, epsabs=1e-5)
    assert AnytimeT().e_value(t, n) == pytest.approx(expected, rel=1e-4)


def test_the_confidence_sequence_against_the_published_one():
    """Two limits of half the level are a little outside of the two-sided sequence of Theorem 4.9."""
    n, alpha, c = 12, 0.05, 1.0
    root = (alpha**2 * c**2 / (n + c**2)) ** (1 / n)
    variance = (n - 1) / n  # of n values with standard deviation 1
    published = math.sqrt((n + c**2) * (1 - root) / (root * (n + c**2) - c**2) * variance)
    ours = AnytimeT(c).limit(alpha / 2, n) / math.sqrt(n)
    assert published <= ours == pytest.approx(published, rel=1e-3)
    assert AnytimeT().limit(0.05, 2) == math.inf


def test_an_open_ended_audit_keeps_its_promise():
    rng = np.random.default_rng(5)
    n = np.arange(1, 61)
    values = rng.standard_normal((3000, 60))
    mean = values.cumsum(axis=1) / n
    spread = np.sqrt(((values**2).cumsum(axis=1) - n * mean**2)[:, 1:] / (n[1:] - 1))
    t = mean[:, 1:] * np.sqrt(n[1:]) / spread
    limits = [AnytimeT().limit(0.049, int(seeds)) for seeds in n[1:]]
    assert 0.01 < (t >= limits).any(axis=1).mean() < 0.049
    (found,) = judge({"u": standard(2, 1, 20)}, Design(open_ended=True), "u").values()
    assert found.claim == BETTER
    assert judge({"u": standard(0, 1, 20)}, Design(open_ended=True), "u")["u"].claim == UNDECIDED


def test_hedges_g():
    # J(7) = 0.8882 (Hedges 1981, table 1), near 1 - 3 / (4 * 7 - 1)
    assert hedges_g(standard(1, 1)) == pytest.approx(0.8882, abs=1e-4)
    draws = 0.7 + np.random.default_rng(6).standard_normal((4000, 6))
    assert np.mean([hedges_g(row) for row in draws]) == pytest.approx(0.7, abs=0.03)


def test_an_interval_over_examples_alone_is_the_clustered_one():
    """With seeds that agree, what is left is Miller's clustered standard error."""
    rng = np.random.default_rng(7)
    per_example, clusters = rng.standard_normal(60), np.repeat(np.arange(20), 3)
    found = example_interval(np.tile(per_example, (4, 1)), clusters)
    off = per_example - per_example.mean()
    squares = sum(off[i] * off[j] for i in range(60) for j in range(60) if clusters[i] == clusters[j])
    error = math.sqrt(20 / 19 * squares) / 60
    assert found.example_error == pytest.approx(error) and found.seed_error == pytest.approx(0)
    assert found.high - found.mean == pytest.approx(stats.t.isf(0.025, 19) * error)
    alone = example_interval(np.tile(per_example, (4, 1)))
    assert alone.example_error == pytest.approx(per_example.std(ddof=1) / math.sqrt(60))


def test_an_interval_over_seeds_alone_is_the_t_interval():
    seeds = np.array(SEEDS)
    found = example_interval(np.tile(seeds[:, None], (1, 30)))
    ordinary = stats.ttest_1samp(seeds, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((ordinary.low, ordinary.high))
    wider = example_interval(np.tile(seeds[:, None], (1, 30)), limit=4.0)
    assert wider.high - wider.mean == pytest.approx(4 * seeds.std(ddof=1) / math.sqrt(8))


def test_the_interval_over_both_covers_the_truth_and_neither_part_alone_does():
    rng = np.random.default_rng(8)
    documents = np.repeat(np.arange(30), 4)
    held = np.zeros(3)
    for _ in range(400):
        values = 0.1 * rng.standard_normal((6, 1)) + 0.6 * rng.standard_normal(30)[documents]
        values = values + rng.standard_normal((6, 120))
        found = example_interval(values, documents)
        held += [
            found.low < 0 < found.high,
            abs(found.mean) < stats.t.isf(0.025, 5) * found.seed_error,
            abs(found.mean) < stats.t.isf(0.025, 119) * example_interval(values).example_error,
        ]
    assert held[0] >= 368 and (held[1:] < 360).all()  # of 400, 380 are promised


@pytest.mark.parametrize("options", [
    {"looks": ()}, {"looks": (1, 4)}, {"looks": (4, 4)}, {"level": 0.0}, {"share": 1.0}, {"margin": -1.0},
])
def test_a_design_that_makes_no_sense(options):
    with pytest.raises(ConfigError):
        Design(**options)


@pytest.mark.parametrize(("differences", "said"), [
    ({"v": [1.0] * 4}, "primary comparison 'u'"),
    ({"u": [1.0] * 4, "v": [1.0] * 6}, "differences of v"),
    ({"u": [1.0, 2.0, 3.0, math.nan]}, "differences of u"),
    ({"u": [1.0] * 5}, "looks at 4, 6, 8"),
])
def test_differences_that_cannot_be_judged(differences, said):
    with pytest.raises(DataError, match=said):
        judge(differences, Design(), "u")


@pytest.mark.parametrize(("shape", "clusters"), [
    ((4,), None), ((1, 9), None), ((4, 3), [0, 0, 0]), ((4, 3), [0, 1]),
])
def test_examples_that_have_no_interval(shape, clusters):
    with pytest.raises(DataError):
        example_interval(np.ones(shape), clusters)
