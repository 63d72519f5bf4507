"""What a report says first, and what should make its reader wary."""

from __future__ import annotations

import pytest

from rankalloc.report import sweeps, wording
from rankalloc.report.alerts import alerts
from rankalloc.report.facts import Facts
from rankalloc.report.outcome import budget_state, moved_at_freeze
from rankalloc.report.verdict import verdict
from rankalloc.trace import AllocationRecord
from tests.support import report_odd_samples as odd
from tests.support import report_samples as samples


@pytest.fixture(scope="module")
def trace():
    return samples.run()


@pytest.mark.parametrize(
    ("unit", "ranks", "target", "state"),
    [
        ("ranks", (3, 1), 4, "exact"),
        ("ranks", (3, 2), 4, "over"),
        ("ranks", (2, 1), 4, "under"),
        ("params", (3, 1), 65, "within"),
        ("params", (3, 1), 70, "under"),
        ("bytes", (3, 1), 69, "within"),
    ],
)
def test_budget_state(unit, ranks, target, state):
    assert budget_state(odd.two_layers(unit, ranks, target)) == state


def test_verdict_of_a_run_claims_no_more_than_it_knows(trace):
    said = verdict(Facts(trace), None)
    assert said.outcome == "cannot tell"
    assert (
        "met exactly (216 of 216 ranks)" in said.sentence
        and "f1 is 0.508 on the report split (400 examples)" in said.sentence
    )
    assert "cannot say whether adaptive ranks helped" in said.sentence and "uniform control" in said.sentence
    assert "is a control" in verdict(Facts(samples.uniform_run()), None).sentence
    assert "not measured" in verdict(Facts(odd.bare()), None).sentence


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("adalora", {"placement": "uniform"}, "every layer has the same rank, so this run is a control"),
        ("uniform", {}, "every layer has the same rank, so this run is a control"),
        ("adalora", {"placement": "random"}, "placed at random, so this run is a control"),
        ("adalora", {"placement": "shuffled"}, "went to other layers, so this run is a control"),
        ("eva", {"placement": "grouped"}, "a module type share one rank, so this run is a control"),
        ("mine", {"placement": "by-depth"}, "placed by 'by-depth', so this run is a control"),
        ("manual", {}, "given before training"),
        ("module-types", {}, "given before training"),
        ("non-uniform", {}, "without a uniform control"),
        ("my-uniform", {}, "without a uniform control"),
    ],
)
def test_verdict_of_a_run_says_how_its_ranks_were_chosen(trace, method, options, words):
    made = trace.model_copy(update={"method": method, "method_options": options})
    sentence = verdict(Facts(made), None).sentence
    assert words in sentence and ("cannot say whether" in sentence) == (made.rank_choice == "adaptive")


def placed(placement, method="adalora"):
    """A sweep without a pair whose trials all ran ``method`` with ``placement``."""
    record = samples.sweep()
    trials = [t.model_copy(update={"params": {**t.params, "method": method}, "role": "start"}) for t in record.trials]
    config = {"method": method, "method_options": {"placement": placement}}
    return record.model_copy(update={"pair": None, "trials": trials, "config": config})


@pytest.mark.parametrize(
    ("placement", "method", "words"),
    [
        ("uniform", "adalora", "(uniform, "),
        ("random", "adalora", "(a control, "),
        ("chosen", "manual", "(with given ranks, "),
        ("chosen", "my-uniform", "(adaptive, "),
        ("chosen", "non-uniform", "(adaptive, "),
    ],
)
def test_a_sweep_names_its_best_trial_by_how_its_ranks_were_chosen(placement, method, words):
    record = placed(placement, method)
    said = verdict(None, record)
    assert words in said.sentence and "cannot say whether adaptive ranks helped" in said.sentence
    assert ("No completed trial chose its ranks adaptively." in said.notes) == ("(adaptive" not in words)
    assert (sweeps.control_of(record) is not None) == (words == "(uniform, ")


@pytest.mark.parametrize("low, high, probe", [(0.01, 0.02, True), (-0.01, 0.02, True), (-0.02, -0.01, False)])
def test_learning_rates_of_controls_do_not_make_a_side_look_tuned(low, high, probe):
    """Three rates of a random placement are no search for a good adaptive run; one that won with less tuning won."""
    record = samples.sweep(low=low, high=high)
    rates = {"adalora": (4e-3,), "adalora random": (1e-3, 2e-3, 8e-3), "uniform": (1e-3, 2e-3, 4e-3)}
    trials = [
        record.trials[0].model_copy(update={"number": n, "adapter_params": 1000, "params": {
            "method": name.split()[0], "placement": (name.split() + ["chosen"])[1], "learning_rate": rate,
        }})
        for n, (name, rate) in enumerate((name, rate) for name, values in rates.items() for rate in values)
    ]
    pair = record.pair.model_copy(update={"adaptive": 0, "uniform": 5})
    sentence = verdict(None, record.model_copy(update={"trials": trials, "pair": pair})).sentence
    assert ("adaptive ranks were tried at 1 learning rate," in sentence) == probe


def same_size(record, adaptive=30_000, uniform=30_000):
    """The sweep with these sizes in its pair."""
    sizes = {record.pair.adaptive: adaptive, record.pair.uniform: uniform}
    trials = [
        t.model_copy(update={"adapter_params": sizes.get(t.number, t.adapter_params), "ranks": 300})
        for t in record.trials
    ]  # fmt: skip
    return record.model_copy(update={"trials": trials})


@pytest.mark.parametrize(
    ("low", "high", "adaptive", "uniform", "begins", "outcome"),
    [
        (-0.02, -0.01, 30_000, 30_100, "Adaptive ranks did better than the best uniform ranks of no larger", "helped"),
        (-0.02, -0.01, 36_000, 30_000, "Not like with like: the adaptive adapter is 20.0 % larger than", "cannot tell"),
        (-0.02, -0.01, 30_000, 36_000, "Not like with like: the adaptive adapter is 16.7 % smaller than", "helped"),
        (0.01, 0.02, 30_000, 36_000, "Not like with like: the adaptive adapter is 16.7 % smaller than", "cannot tell"),
        (0.01, 0.02, 36_000, 30_000, "Not like with like: the adaptive adapter is 20.0 % larger than", "hurt"),
    ],
)
def test_a_difference_in_size_is_said_first(low, high, adaptive, uniform, begins, outcome):
    """One rank costs 30,000 / 300 = 100 parameters: a difference of that much is none."""
    said = verdict(None, same_size(samples.sweep(low, high), adaptive, uniform))
    assert said.sentence.startswith(begins) and said.outcome == outcome


def test_the_matched_control_is_named_where_the_pair_differs_in_size():
    record = same_size(samples.sweep(), 36_000, 30_000)
    matched = next(t for t in record.trials if t.role == "matched control")
    others = {t.number: t.model_copy(update={"role": "sampled"}) for t in record.trials if t is not matched}
    pair = record.pair.model_copy(update={"uniform": next(n for n in others if n != record.pair.adaptive)})
    trials = [others.get(t.number, t) for t in record.trials]
    sizes = {pair.adaptive: 36_000, pair.uniform: 30_000}
    trials = [t.model_copy(update={"adapter_params": sizes.get(t.number, 36_000)}) for t in trials]
    notes = verdict(None, record.model_copy(update={"pair": pair, "trials": trials})).notes
    assert sum(f"matched control (trial {matched.number}, 36,000 parameters)" in note for note in notes) == 1


@pytest.mark.parametrize(
    ("low", "high", "outcome", "words"),
    [
        (-0.012, 0.004, "cannot tell", "cannot tell"),
        (-0.012, -0.004, "helped", "did better"),
        (0.002, 0.009, "hurt", "Uniform ranks won"),
        (-0.004, 0.0, "cannot tell", "cannot tell"),
        (0.0, 0.004, "cannot tell", "cannot tell"),
    ],
)
def test_verdict_of_a_pair(low, high, outcome, words):
    said = verdict(None, same_size(samples.sweep(low, high)))
    assert said.outcome == outcome and words in said.sentence and "Not like" not in said.sentence
    assert wording.fixed(low, signed=True) in said.sentence and wording.fixed(high, signed=True) in said.sentence
    assert any("single training seed" in n and "interval covers the data only" in n for n in said.notes)


def test_a_metric_that_contradicts_the_loss_is_said_and_nothing_is_claimed():
    sweep = same_size(samples.sweep(-0.012, -0.004))
    pair = sweep.pair.model_copy(update={"uniform_metrics": {"f1": 0.6}})
    said = verdict(None, sweep.model_copy(update={"pair": pair}))
    assert said.outcome == "cannot tell" and "did better" in said.sentence
    assert "That is by loss; f1 says the opposite, 0.511 against 0.6." in said.sentence


def test_verdict_of_a_sweep_without_a_pair():
    record = samples.sweep().model_copy(update={"pair": None})
    assert "cannot say" in verdict(None, record).sentence
    empty = record.model_copy(update={"best": None})
    assert "None of the 24 trials" in verdict(None, empty).sentence


def test_a_metric_of_zero_is_an_alert(trace):
    rows = [row.model_copy(update={"metrics": {"loss": 0.9, "f1": 0.0}}) for row in trace.evaluations]
    said = [a.text for a in alerts(Facts(trace.model_copy(update={"evaluations": rows})), None)]
    assert any("split is 0: the run has not learned its task" in text for text in said)


def test_alerts_say_what_is_wrong(trace):
    assert alerts(Facts(trace), None) == []
    moving = [
        AllocationRecord(step=s, asked=4, reached=4, ranks=r) for s, r in ((10, [4, 0]), (20, [0, 4]), (30, [4, 0]))
    ]
    bad = odd.two_layers(
        target=3, allocations=moving, finished=False, steps_done=7, nonfinite_steps=[41, 43], alerts=["own words"]
    )
    texts = [alert.text for alert in alerts(Facts(bad), None)]
    for words in (
        "not finished: 7 of 240",
        "budget was not met",
        "still moving at the freeze: 4 of 4",
        "2 steps with a non-finite",
        "(at 41, 43)",
        "1 layer of 2 ended at rank 0: a.1.q",
        "largest rank allowed",
        "own words",
    ):
        assert sum(words in text for text in texts) == 1, words
    assert moved_at_freeze(bad) == (4, 4)
    record = samples.sweep()
    assert any("7 (loss became non-finite at step 41)" in a.text for a in alerts(Facts(trace), record))


@pytest.mark.parametrize(
    "adaptive, uniform, size, words",
    [
        ([2e-3, 4e-3, 8e-3], [1e-3, 2e-3, 4e-3], 1000, None),
        ([2e-3, 4e-3, 8e-3], [1e-3, 2e-3, 4e-3], 990, None),
        ([2e-3, 4e-3, 8e-3], [2e-3, 2e-3, 4e-3], 1000, "uniform ranks were tried at 2 learning rates"),
        ([2e-3, 4e-3, 8e-3], [4e-3, 2e-3, 1e-3], 1000, "uniform ranks did best at the highest learning rate"),
        ([2e-3, 4e-3, 8e-3], [1e-3, 2e-3, 4e-3], 800, "adaptive adapter is 25.0 % larger than the uniform one (1,000"),
    ],
)
def test_an_untuned_side_makes_the_comparison_a_probe(adaptive, uniform, size, words):
    """The middle trial of each side is in the pair, except where the first is named as the best."""
    record = samples.sweep(low=-0.02, high=-0.01)
    one, other = record.trials[0], record.trials[1]
    trials, best = [], 0 if uniform[0] == max(uniform) else 1
    for index, (method, rate) in enumerate([("adalora", r) for r in adaptive] + [("uniform", r) for r in uniform]):
        base = other if method == "uniform" else one
        trials.append(base.model_copy(update={
            "number": index, "state": "complete", "params": {"method": method, "learning_rate": rate},
            "adapter_params": size if method == "uniform" else 1000,
        }))
    pair = record.pair.model_copy(update={"adaptive": 1, "uniform": 3 + best})
    sentence = verdict(None, record.model_copy(update={"trials": trials, "pair": pair})).sentence
    assert (words in sentence) if words else ("probe" not in sentence)
