"""studies/tight: patterns fit their size, the best one alone is judged, and the committed rows are the runs' own."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

import rankalloc as ra
from rankalloc.layer_names import places
from studies import tight
from studies.tight.analysis import rows_of
from studies.tight.arms import ARMS, AUTO, SHUFFLED, Cell
from studies.tight.hand import HAND, QUERY_VALUE, ranks_of
from studies.tight.run import choices_of, wanted

FOLDER = Path(tight.__file__).parent
BERT = [("attention.self.query", 8, 8), ("attention.self.key", 8, 8), ("attention.self.value", 8, 8),
        ("attention.output.dense", 8, 8), ("intermediate.dense", 8, 32), ("output.dense", 32, 8)]
LLAMA = [("self_attn.q_proj", 8, 8), ("self_attn.k_proj", 8, 4), ("self_attn.v_proj", 8, 4), ("self_attn.o_proj", 8, 8),
         ("mlp.gate_proj", 8, 24), ("mlp.up_proj", 8, 24), ("mlp.down_proj", 24, 8)]


def shapes_of(layers, stack, blocks=6):
    return [ra.LayerShape(f"{stack}.{block}.{name}", d_in, d_out, 4) for block in range(blocks) for name, d_in, d_out
            in layers]


@pytest.mark.parametrize(
    "layers, stack", [(BERT, "bert.encoder.layer"), (LLAMA, "model.layers")], ids=["BERT", "Llama"]
)
@pytest.mark.parametrize("name", [*HAND, QUERY_VALUE])
def test_a_pattern_spends_what_its_ranks_fit_into_and_begins_where_it_says(layers, stack, name):
    shapes = shapes_of(layers, stack)
    dearest = max(shape.params_per_rank for shape in shapes)
    for params in (130, 400, 700):
        ranks = ranks_of(name, shapes, params)
        spent = sum(shape.params_per_rank * ranks[shape.name] for shape in shapes)
        assert params - dearest < spent <= params
    few = [layer for layer, rank in ranks_of(name, shapes, 45).items() if rank]
    begins = next((at for start, at in (("middle", 2), ("last", 5)) if start in name), 0)
    assert begins in {block for block, _ in places(few)}


def made_up(arm, rate, loss, phase="rates", seed=50):
    return {**Cell("pos", "a half", phase, arm, rate, 96, seed)._asdict(), "loss": loss, "metric": 0.5, "params": 8}


def test_of_the_patterns_the_one_that_is_best_on_the_tune_split_is_judged_alone():
    arms = [AUTO, HAND[0], HAND[4], SHUFFLED]
    args = Namespace(tasks=["pos"], sizes=["a half"], arms=arms, steps=96, seeds=2, rates=[0.01, 0.02])
    losses = dict(zip(arms[:3], (0.3, 0.4, 0.35), strict=True))
    runs = [made_up(arm, rate, loss + rate) for arm, loss in losses.items() for rate in args.rates]
    assert [c.arm for c in choices_of(runs[:-1], args, "pos", "a half")] == [AUTO, SHUFFLED]  # one rate is to come
    assert [(c.arm, c.rate) for c in choices_of(runs, args, "pos", "a half")] == [
        (AUTO, 0.01), (HAND[4], 0.01), (SHUFFLED, 0.01)
    ]
    assert {cell.arm for cell in wanted(runs, args) if cell.phase == "seeds"} == {AUTO, HAND[4], SHUFFLED}
    for seed in (100, 101):
        runs += [made_up(AUTO, 0.01, 0.3, "seeds", seed), made_up(HAND[4], 0.01, 0.34, "seeds", seed)]
    rows = {row.arm: row for row in rows_of(runs, args.rates)}
    assert rows[HAND[4]].difference == pytest.approx(0.04) and rows[HAND[4]].seeds == 2


def test_the_committed_rows_are_those_of_the_committed_runs():
    runs = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))["runs"]
    found = [row._asdict() for row in rows_of(runs, None)]
    assert found == json.loads((FOLDER / "rows.json").read_text(encoding="utf-8"))
    assert {row["arm"] for row in found} <= set(ARMS)
