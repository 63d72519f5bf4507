"""The record of a run: strict, versioned, and clear about files that are not one."""

from __future__ import annotations

import json

import pytest

from rankalloc import METHODS, PLANNERS, RankTrace
from rankalloc.errors import RankallocError
from rankalloc.layer_names import places
from rankalloc.records import finite
from rankalloc.trace import (
    GIVEN,
    AllocationRecord,
    BudgetRecord,
    EvaluationRecord,
    LayerRecord,
    LogRecord,
    SweepRecord,
    TrialRecord,
)


def trace(**changes):
    return RankTrace(**{
        "method": "adalora", "alpha": 8.0, "rank": 4, "scaling": 2.0,
        "layers": [
            LayerRecord(name=n, kind="linear", block=None, role=n, d_in=8, d_out=4, initial_rank=4) for n in "ab"
        ],
        "budget": BudgetRecord(
            given={"ranks": 5}, unit="ranks", target=5, initial=8, min_rank=0, max_rank=None, multiple_of=1,
            shape="cubic", total_steps=20, warmup_steps=2, freeze_step=14, allocate_every=2,
        ),
        **changes,
    })


def test_a_trace_comes_back_as_it_was_written(tmp_path):
    one = trace(
        allocations=[AllocationRecord(step=4, asked=6, reached=6, ranks=[4, 2], lowest_kept=0.25)],
        logs=[LogRecord(step=1, values={"loss": 0.1 + 0.2})],
        evaluations=[EvaluationRecord(split="test", examples=2, metrics={"f1": 0.5}, example_losses=[0.1, 0.3])],
    )
    path = one.save(tmp_path / "deep" / "trace.json")
    assert RankTrace.load(path) == one


def test_numbers_that_are_none_are_left_out_of_json(tmp_path):
    one = trace(logs=[LogRecord(step=1, values={"loss": float("nan"), "lr": 1.0})], wall_seconds=float("inf"))
    loaded = RankTrace.load(one.save(tmp_path / "t.json"))
    assert loaded.logs[0].values == {"lr": 1.0} and loaded.wall_seconds is None
    assert finite({"a": [1.0, float("inf")], "b": float("nan"), "c": {"d": 2}}) == {"a": [1.0, None], "c": {"d": 2}}


def test_final_ranks_and_evaluations():
    assert trace().final_ranks == [4, 4] and trace().evaluation("test") is None
    allocations = [AllocationRecord(step=s, asked=5, reached=5, ranks=r) for s, r in ((4, [3, 3]), (6, [4, 1]))]
    runs = [EvaluationRecord(split="test", examples=1, metrics={"f1": f}) for f in (0.1, 0.2)]
    done = trace(allocations=allocations, evaluations=runs)
    assert done.final_ranks == [4, 1] and done.evaluation("test").metrics == {"f1": 0.2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no trace at"), ("{", "no JSON"), ("", "no JSON"), ("[1]", "holds a list"), ("{}", "version None"),
        ('{"version": 2}', "version 2, and this rankalloc reads version 1"), ('{"version": 1}', "no valid trace: "),
        (b"\xff\xfe\x00", "could not read"),
    ],
)
def test_a_file_that_is_no_trace_gets_one_clear_sentence(text, words, tmp_path):
    path = tmp_path / "trace.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RankallocError) as caught:
        RankTrace.load(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_field_and_a_wrong_type_are_named(tmp_path):
    path = trace().save(tmp_path / "t.json")
    data = json.loads(path.read_text())
    for change, words in (({"surprise": 1}, "surprise"), ({"layers": [{"name": 3}]}, "layers.0")):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(RankallocError, match=words):
            RankTrace.load(path)


def test_a_sweep_record_comes_back_and_finds_its_trials(tmp_path):
    record = SweepRecord(
        name="s", task="t", metric="f1", direction="maximize", space={}, storage="x",
        trials=[TrialRecord(number=3, state="failed")],
    )
    again = SweepRecord.load(record.save(tmp_path / "sweep.json"))
    assert again == record and again.trial(3).state == "failed"
    with pytest.raises(KeyError):
        again.trial(0)
    with pytest.raises(RankallocError, match="no sweep record at"):
        SweepRecord.load(tmp_path / "none.json")


CHOICES = [
    ("adalora", {}, "adaptive"), ("adalora", {"placement": "chosen"}, "adaptive"), ("auto", {"beta": 0.9}, "adaptive"),
    ("uniform", {}, "uniform"), ("uniform", {"placement": "random"}, "uniform"),
    ("adalora", {"placement": "uniform"}, "uniform"), ("manual", {"placement": "uniform"}, "uniform"),
    ("module-types", {"placement": "uniform"}, "uniform"),
    ("auto", {"placement": "random"}, "control"), ("auto", {"placement": "shuffled"}, "control"),
    ("eva", {"placement": "grouped"}, "control"), ("manual", {"placement": "random"}, "control"),
    ("manual", {"rank_pattern": {"q": 2}}, "given"), ("module-types", {}, "given"),
    ("non-uniform", {}, "adaptive"), ("my-uniform", {}, "adaptive"), ("uniformly-better", {}, "adaptive"),
]


@pytest.mark.parametrize(("method", "options", "choice"), CHOICES)
def test_a_run_and_a_trial_agree_on_how_ranks_were_chosen(method, options, choice):
    """A trial of 0.1 has its placement in the sweep's configuration alone."""
    record = SweepRecord(
        name="s", task="t", metric="f1", direction="maximize", space={}, storage="x",
        trials=[TrialRecord(number=0, state="complete", params={"method": method, **options})],
    )
    of_0_1 = record.model_copy(update={
        "config": {"method": "auto", "method_options": options},
        "trials": [TrialRecord(number=0, state="complete", params={"method": method})],
    })
    assert trace(method=method, method_options=options).rank_choice == choice
    assert record.rank_choice(record.trials[0]) == of_0_1.rank_choice(of_0_1.trials[0]) == choice


def test_a_trials_own_placement_wins_over_the_sweeps():
    record = SweepRecord(
        name="s", task="t", metric="f1", direction="maximize", space={}, storage="x",
        config={"method": "auto", "method_options": {"placement": "uniform"}},
        trials=[
            TrialRecord(number=0, state="complete", params={"method": "mine", "placement": "chosen"}),
            TrialRecord(number=1, state="complete", params={"rank": 4}),
        ],
    )
    assert [record.rank_choice(t) for t in record.trials] == ["adaptive", "uniform"]


def test_given_ranks_are_those_of_methods_that_look_at_nothing():
    blind = [
        name for name, method in METHODS.items()
        if method.score is None and method.planner is not None and not PLANNERS[method.planner].needs_data
    ]
    assert sorted(blind) == sorted(GIVEN)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"version": ' + "9" * 5000 + "}"], ids=["deep", "long number"])
def test_json_beyond_the_parsers_limits_gets_one_clear_sentence(text, tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(RankallocError, match="it may be damaged"):
        RankTrace.load(path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["encoder.layer.3.output.dense", "pooler.dense"], [(3, "output.dense"), (None, "pooler.dense")]),
        (["encoder.block.0.layer.1.q", "decoder.block.0.q"], [(0, "encoder.block.layer.1.q"), (0, "decoder.block.q")]),
        (["0", "2"], [(0, "layer"), (2, "layer")]),
        (["h.11.attn.c_attn"], [(11, "attn.c_attn")]),
        (["layers.1"], [(1, "layers")]),
        (["l1", "l11"], [(None, "l1"), (None, "l11")]),
        ([], []),
    ],
)
def test_the_place_of_a_layer_is_read_from_its_name(names, expected):
    assert places(names) == expected
