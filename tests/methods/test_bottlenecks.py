"""Bottlenecks as a baseline: sized exactly under a LoRA's budget, near the identity, and of no use as anything else."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.errors import AdapterFileError, BudgetError, ConfigError, TargetError
from rankalloc.experiments.config import load_config
from rankalloc.experiments.runner import evaluate_saved, preview, train
from rankalloc.experiments.sweeps.sweep import run_sweep
from rankalloc.experiments.tasks import prepare
from rankalloc.layers.targets import ALL_LINEAR, find_heads, find_targets
from rankalloc.methods.bottlenecks import places_among, size_of, sizes
from rankalloc.report import write_report
from rankalloc.trace import SweepRecord
from tests.support.architectures import ARCHITECTURES
from tests.support.models import assert_same, logits_of, make_bert, make_llama, make_mlp
from tests.support.runs import small_yaml
from tests.support.training import make_trainer

HALF = ra.RankBudget(fraction=0.5)


def begun(budget=HALF, make=make_bert, **options):
    model = make()
    torch.manual_seed(1)
    return model, ra.attach(model, ranks=ra.plan_ranks(model, None, budget, "bottleneck", rank=4, **options))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), st.floats(0, 1))
def test_sizes_spend_the_budget_to_within_a_unit_and_evenly(widths, share):
    widths = {str(i): d for i, d in enumerate(widths)}
    floor, most = (sum(size_of(d, 1 if low else d) for d in widths.values()) for low in (True, False))
    params = floor + int(share * (most - floor))
    units = sizes(widths, params)
    spent = sum(size_of(d, units[name]) for name, d in widths.items())
    growable = [2 * d + 1 for name, d in widths.items() if units[name] < d]
    assert 0 <= params - spent < min(growable, default=1)
    open_ones = [units[name] for name, d in widths.items() if units[name] < d]
    assert all(units.values()) and (len(set(widths.values())) > 1 or max(units.values()) - min(units.values()) <= 1)
    assert len(set(widths.values())) > 1 or not open_ones or max(open_ones) - min(open_ones) <= 1
    for wrong in (floor - 1, most + 1):
        with pytest.raises(BudgetError, match=f"{wrong:,} parameters"):
            sizes(widths, wrong)


@pytest.mark.parametrize("budget", [
    {"fraction": 0.5}, {"ranks": 24}, {"params": 2000}, {"bytes": 8000},
    {"fraction": 0.5, "max_rank": 3, "min_rank": 1},
])
def test_a_budget_buys_as_many_parameters_as_it_buys_of_lora(budget):
    budget = ra.RankBudget(**budget)
    uniform = make_bert()
    lora = ra.attach(uniform, ranks=ra.plan_ranks(uniform, None, budget, "uniform", rank=4))
    allowed = budget.params or (budget.bytes or 0) // 4 or lora.num_params()
    _, adapters = begun(budget)
    held = [p.numel() for a in adapters for p in a.trained() if a.rank]
    assert adapters.num_params() == sum(held) and allowed - 65 < adapters.num_params() <= allowed
    (note,) = adapters.plan.notes
    assert f"{adapters.num_params():,} parameters" in note and f"allows {allowed:,}" in note


PLACES = {
    "bert": ["attention.output.dense", "output.dense"], "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "llama": ["self_attn.o_proj", "mlp.down_proj"], "falcon": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "distilbert": ["attention.out_lin", "ffn.lin2"], "vit": ["attention.o_proj", "mlp.fc2"],
    "t5": ["SelfAttention.o", "DenseReluDense.wo"], "xlm": ["out_lin", "lin2"],
}
"""{architecture: endings of its attention and feed-forward outputs}."""


@pytest.mark.parametrize("name", PLACES)
def test_they_stand_behind_attention_and_feed_forward(name):
    model = ARCHITECTURES[name].build()
    targets = find_targets(model, ALL_LINEAR, (), find_heads(model))
    for after, (attention, feed_forward) in (("houlsby", PLACES[name]), ("pfeiffer", ["", PLACES[name][1]])):
        found = places_among(targets, after)
        assert any(attention and place.endswith(attention) for place in found) == (after == "houlsby")
        assert any(place.endswith(feed_forward) for place in found)
        blocks = sum(name.endswith(feed_forward) for name in targets)
        assert len(found) <= 3 * blocks and not any("quer" in place or "intermediate" in place for place in found)
    _, adapters = begun(after=["query", "bert.encoder.layer.1.output.dense"])
    assert [place.rsplit(".", 2)[-1] for place, rank in adapters.ranks().items() if rank] == ["query", "query", "dense"]


def test_the_start_is_near_the_identity_and_all_four_parts_learn(tmp_path):
    model, adapters = begun()
    start = logits_of(model)
    assert 0 < (start - logits_of(make_bert())).abs().max() < 1e-3
    before = [p.clone() for a in adapters for p in a.trained() if a.rank]
    callback = ra.RankCallback(adapters, HALF, "bottleneck")
    trainer = make_trainer(model, tmp_path, [callback], steps=4)
    trainer.train()
    after = [p for a in adapters for p in a.trained() if a.rank]
    assert len(after) == 16 and all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert callback.trace.final_ranks == list(adapters.ranks().values())
    assert callback.trace.adapter_params_final == adapters.num_params()
    groups = {group["name"]: group for group in adapters.parameter_groups(1e-3, weight_decay=0.1)}
    assert len(groups["biases"]["params"]) >= 8 and groups["biases"]["weight_decay"] == 0


def test_the_formula_is_that_of_the_paper():
    model = make_mlp()
    adapters = ra.attach(model, rank=3, init="bottleneck", target_modules=["0"])
    (adapter,) = adapters
    with torch.no_grad():
        for part in adapter.trained():
            part.normal_()
    x = torch.randn(5, 16)
    h = make_mlp()[0](x)
    expected = h + F.gelu(h @ adapter.Q.T + adapter.b_down) @ adapter.P.T + adapter.b_up
    torch.testing.assert_close(model[0](x), expected)
    assert adapters.num_params() == 2 * 24 * 3 + 3 + 24 == sum(p.numel() for p in adapter.trained())
    assert [p.dtype for p in begun(make=lambda: make_bert().bfloat16())[0].parameters()].count(torch.float32) == 12 * 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, adapters = begun()
    make_trainer(model, folder, [ra.RankCallback(adapters, HALF, "bottleneck")], steps=4, save_steps=2,
                 save_strategy="steps").train()
    return model, adapters, folder, ra.save(adapters, folder / "own")


def test_what_is_saved_is_loaded_to_the_bit(saved, tmp_path):
    model, adapters, folder, own = saved
    for path in (own, folder / "checkpoint-4"):
        again = make_bert()
        loaded = ra.load(again, path)
        assert torch.equal(logits_of(again), logits_of(model)) and loaded.num_params() == adapters.num_params()
        ra.save(loaded, tmp_path / path.name)
        for file in ("bottleneck.json", "bottleneck.safetensors"):
            assert (tmp_path / path.name / file).read_bytes() == (own / file).read_bytes()
    ra.detach(loaded)
    assert dict(again.named_parameters()).keys() == dict(make_bert().named_parameters()).keys()
    resumed, adapters = begun()
    trainer = make_trainer(resumed, folder, [ra.RankCallback(adapters, HALF, "bottleneck")], steps=4)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("ask, error, sentence", [
    (lambda a, f: ra.merge(a), ra.RankallocError, "not a linear map"),
    (lambda a, f: ra.shrink(f, ra.RankBudget(ranks=2)), AdapterFileError, "no LoRA: rankalloc.load puts them"),
    (lambda a, f: ra.export(f, f / "out"), AdapterFileError, "no LoRA"),
    (lambda a, f: ra.save(a, f, "uniform"), ConfigError, "leave layout, padding and reader out"),
    (lambda a, f: ra.save(a, f, reader="vllm"), ConfigError, "leave layout, padding and reader out"),
    (lambda a, f: ra.mix(make_bert(), [f]), AdapterFileError, "no LoRA"),
    (lambda a, f: ra.RankController(a, HALF, 9, "auto"), ConfigError, "trains low-rank updates"),
    (lambda a, f: ra.RankController(a, HALF, 9, "uniform"), ConfigError, "trains low-rank updates"),
    (lambda a, f: ra.RankController(a, ra.RankBudget(params=1000), 9, "bottleneck"), BudgetError, "1,753 parameters"),
    (lambda a, f: ra.RankController(a, ra.RankBudget(ranks=3), 9, "bottleneck"), BudgetError, "25 units"),
    (lambda a, f: ra.RankController(a, HALF, 9, "bottleneck", away_from=[f]), ConfigError, "no update of a weight"),
    (lambda a, f: ra.RankController(ra.attach(make_bert(), 4), HALF, 9, "bottleneck"), ConfigError, "bottlenecks, and"),
    (lambda a, f: ra.attach(make_bert(), 2, init="bottleneck", target_modules=["word_embeddings"]), TargetError,
     "behind a linear layer"),
    (lambda a, f: begun(make=make_mlp), ConfigError, "name those that bottlenecks are to stand behind"),
    (lambda a, f: begun(after="both"), ConfigError, "houlsby or pfeiffer"),
    (lambda a, f: begun(after=["querry"]), ConfigError, "did you mean 'query'"),
    (lambda a, f: begun(after=[]), ConfigError, "names no layer"),
    (lambda a, f: begun(placement="random"), ConfigError, "unknown option of method 'bottleneck'"),
    (lambda a, f: begun(ra.RankBudget(params=300)), BudgetError, "buys no bottleneck"),
])
def test_what_a_bottleneck_is_not_is_said(ask, error, sentence, saved):
    _, adapters, _, own = saved
    with pytest.raises(error, match=sentence) as caught:
        ask(adapters, own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage, sentence", [
    (lambda f: (f / "bottleneck.json").write_text("{"), "damaged"),
    (lambda f: (f / "bottleneck.json").write_text("{}"), "does not describe"),
    (lambda f: (f / "bottleneck.json").write_text(json.dumps({"format": "rankalloc-bottleneck", "version": 9})), "9"),
    (lambda f: (f / "bottleneck.safetensors").unlink(), "holds no bottleneck.safetensors"),
    (lambda f: (f / "bottleneck.json").write_text((f / "bottleneck.json").read_text() + " "), "not of one save"),
])
def test_damaged_bottlenecks_are_refused_by_name(damage, sentence, saved, tmp_path):
    folder = ra.save(saved[1], tmp_path / "copy")
    damage(folder)
    with pytest.raises(AdapterFileError, match=sentence):
        ra.load(make_bert(), folder)
    with pytest.raises(AdapterFileError, match="another"):
        ra.load(make_llama(), saved[3])
    lora = ra.save(ra.attach(make_bert(), rank=2), tmp_path / "lora")
    with pytest.raises(ConfigError, match="holds a LoRA"):
        ra.save(saved[1], lora)


@pytest.mark.long
def test_a_sweep_compares_them_with_lora(tmp_path):
    config = load_config(small_yaml(tmp_path), ["budget.fraction=0.75", "sweep.search.method=[uniform, bottleneck]",
                                                "sweep.search.rank=4", "sweep.search.budget=0.75", "sweep.trials=2"])
    record: SweepRecord = run_sweep(config, tmp_path / "sweep")
    uniform, bottleneck = record.trials[:2]
    assert [t.params["method"] for t in (uniform, bottleneck)] == ["uniform", "bottleneck"]
    assert [record.rank_choice(t) for t in (uniform, bottleneck)] == ["uniform", "control"]
    assert 0.9 * uniform.adapter_params < bottleneck.adapter_params <= uniform.adapter_params


def test_a_configuration_trains_them(tmp_path):
    alone = load_config(small_yaml(tmp_path), ["method=bottleneck", "method_options.after=pfeiffer",
                                               "budget.fraction=0.25"])
    prepared = prepare(alone)
    seen = preview(alone)
    trace = train(alone, tmp_path / "run", prepared=prepared, splits=("tune",))
    assert seen.params_final == trace.adapter_params_final and trace.rank_choice == "control"
    assert seen.notes == [note for note in trace.notes if "bottlenecks hold" in note] != []
    assert sum(layer.rank > 0 for layer in seen.layers) == 2
    assert trace.stored.numbers == trace.adapter_params_final == seen.stored and trace.stored.padding == 0
    with pytest.raises(ConfigError, match="reads LoRA, and method 'bottleneck' trains none"):
        preview(alone.replaced({"reader": "vllm"}))
    again = evaluate_saved(alone, prepared, tmp_path / "run" / "adapter", "tune")
    assert again.metrics == trace.evaluation("tune").metrics
    assert train(alone, tmp_path / "run", prepared=prepared, resume=True).steps_done == trace.steps_done
    page = write_report(trace, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "bottleneck adapters have no ranks" in page and "rank_pattern" not in page and "wanted more" not in page
    assert "init=&#39;bottleneck&#39;" in page
