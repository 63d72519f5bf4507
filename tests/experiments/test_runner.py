"""One run from a configuration, with real weights and real files."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rankalloc.errors import BudgetError, ConfigError, NotAdaptedError, RankallocError
from rankalloc.experiments.config import load_config
from rankalloc.experiments.runner import evaluate_saved, preview, steps_of, train
from rankalloc.experiments.tasks import prepare
from rankalloc.trace import RankTrace
from tests.support.runs import meets_budget, small_config


def digest(folder):
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runner")


@pytest.fixture(scope="module")
def config(home):
    return small_config(home)


@pytest.fixture(scope="module")
def first(config, home):
    seen = []
    trace = train(config, home / "first", command="rankalloc train", progress=lambda *step: seen.append(step))
    return trace, seen


def test_a_run_meets_its_budget_and_leaves_everything_behind(first, home, config):
    trace, seen = first
    assert meets_budget(trace) and trace.budget.target == trace.adapter_params_initial // 2
    assert [step for step, _, _ in seen] == list(range(1, 7)) and seen[-1][2]["ranks"] == sum(trace.final_ranks)
    assert {e.split for e in trace.evaluations} == {"tune", "report"}
    assert trace.heads and trace.data_fingerprint and trace.command == "rankalloc train" and trace.finished
    assert RankTrace.load(home / "first" / "trace.json") == trace
    assert load_config(home / "first" / "config.yaml") == config
    assert [log.values["loss"] for log in trace.logs if "loss" in log.values]


def test_a_loss_is_told_with_the_step_it_is_of(first):
    trace, seen = first
    logged = {log.step: log.values["loss"] for log in trace.logs if "loss" in log.values}
    assert 1 < len(logged) < 6
    for step, _, values in seen:
        of = max(known for known in logged if known <= step)
        assert values["loss" if of == step else f"loss at step {of}"] == logged[of]


def test_the_saved_adapter_has_the_quality_the_trace_tells(first, home, config):
    trace, _ = first
    again = evaluate_saved(config, prepare(config), home / "first" / "adapter", "tune")
    assert again.metrics["loss"] == pytest.approx(trace.evaluation("tune").metrics["loss"], abs=1e-6)


def test_peft_reads_what_a_run_saved(first, home, config):
    peft = pytest.importorskip("peft")
    prepared = prepare(config)
    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(config.model)
    theirs = peft.PeftModel.from_pretrained(base, home / "first" / "adapter").eval()
    batch = prepared.collator(prepared.splits["tune"][:4])
    batch.pop("labels")
    from rankalloc.storage.loading import load

    ours = AutoModelForSequenceClassification.from_pretrained(config.model).eval()
    load(ours, home / "first" / "adapter")
    with torch.no_grad():
        assert (theirs(**batch).logits - ours(**batch).logits).abs().max() < 1e-5


def test_same_seed_gives_the_same_bytes_and_another_seed_others(first, home, config):
    train(config, home / "again")
    train(config.replaced({"seed": 1}), home / "other")
    assert digest(home / "first") == digest(home / "again") != digest(home / "other")


def test_resuming_from_the_command_line_equals_not_stopping(first, home, config):
    saving = config.replaced({"training.save_every": 2})
    train(saving, home / "whole")
    for step in (4, 6):  # as if the process had been killed between step 2 and 4
        shutil.rmtree(home / "whole" / f"checkpoint-{step}", ignore_errors=True)
    kept = home / "whole" / "checkpoint-4"
    assert not kept.exists()
    train(saving.replaced({"training.save_every": 1}), home / "ones")
    expected = digest(home / "ones")
    shutil.rmtree(home / "ones" / "checkpoint-6")
    (home / "ones" / "trace.json").unlink()
    train(saving.replaced({"training.save_every": 1}), home / "ones", resume=True)
    assert digest(home / "ones") == expected == digest(home / "first")


def test_resuming_without_a_checkpoint_says_how_to_have_one(home, config):
    with pytest.raises(ConfigError, match="save_every"):
        train(config, home / "empty", resume=True)


@pytest.mark.parametrize("unit", [{"budget.ranks": 20}, {"budget.params": 1000}, {"budget.bytes": 4000}])
@pytest.mark.parametrize("method", ["adalora", "uniform"])
def test_every_unit_and_method_spends_what_was_asked(home, config, unit, method, request):
    (path, amount), = unit.items()
    run = config.replaced({"method": method, "budget.fraction": None, "training.steps": 3, path: amount})
    trace = train(run, home / f"{method}-{path}", splits=())
    reached = trace.allocations[-1].reached
    cheapest = min(layer.d_in + layer.d_out for layer in trace.layers)
    slack = {"ranks": 0, "params": cheapest - 1, "bytes": 4 * cheapest - 1}[trace.budget.unit]
    assert amount - slack <= reached <= amount
    if method == "uniform":
        assert max(trace.final_ranks) - min(trace.final_ranks) <= 1


def test_a_diverged_run_is_an_error_with_a_way_out(home, config):
    run = config.replaced({"training.learning_rate": 1e18, "training.max_grad_norm": 0.0, "training.steps": 8})
    with pytest.raises(RankallocError, match="learning rate"):
        train(run, home / "diverged")
    assert not (home / "diverged" / "adapter").exists()


def test_budget_above_the_start_is_refused_before_training(home, config):
    with pytest.raises(BudgetError, match="above"):
        train(config.replaced({"budget.fraction": None, "budget.ranks": 10**6}), home / "above")
    assert not (home / "above" / "trace.json").exists()


def test_preview_tells_what_a_run_does_and_writes_nothing(first, home, config):
    trace, _ = first
    seen = preview(config)
    assert [layer.name for layer in seen.layers] == [layer.name for layer in trace.layers]
    assert (seen.plan.target, seen.plan.freeze_step) == (trace.budget.target, trace.budget.freeze_step)
    assert seen.heads == trace.heads and seen.params_initial == trace.adapter_params_initial


@pytest.mark.parametrize("reader", ["tgi", "vllm", "llama.cpp"])
def test_a_run_for_a_reader_that_cannot_take_its_head_is_refused_before_training(home, config, reader):
    run = config.replaced({"reader": reader})
    for start in (lambda: preview(run), lambda: train(run, home / "unreadable")):
        with pytest.raises(ConfigError, match="cannot take modules that were trained whole, such as classifier"):
            start()
    assert not (home / "unreadable").exists()


def test_steps_from_epochs(config):
    run = config.replaced({"training.steps": None, "training.epochs": 2.0, "training.gradient_accumulation_steps": 3})
    assert steps_of(run, 48) == 2 * 4


def test_gradient_checkpointing_and_bf16_run(home, config):
    run = config.replaced({"training.gradient_checkpointing": True, "training.bf16": True})
    trace = train(run, home / "checkpointed")
    assert meets_budget(trace)


def test_saving_before_training_is_refused(config):
    from rankalloc.experiments.runner import attach_for
    from rankalloc.storage.saving import save
    from rankalloc.training.callback import RankCallback

    prepared = prepare(config)
    adapters, budget = attach_for(config, prepared.build_model(), prepared)
    RankCallback(adapters, budget)
    with pytest.raises(NotAdaptedError):
        save(adapters, "nowhere")


@pytest.mark.parametrize("options", [{"placement": "foo"}, {"bogus": 1}])
def test_a_dry_run_refuses_the_options_a_run_would(config, options):
    with pytest.raises(ConfigError):
        preview(config.replaced({"method_options": options}))


# --- ranks chosen before training ------------------------------------------------------------------------------

EVA = {"method": "eva", "training.save_every": 4, "method_options": {"max_batches": 3}}


@pytest.mark.parametrize("method", ["auto", "uniform", "eva"])
def test_a_run_whose_fraction_was_one_of_ranks_is_resumed_with_it(config, home, method):
    """What such a run wrote: a checkpoint whose plan counts ranks, beside a configuration that says a fraction."""
    options = {"max_batches": 3} if method == "eva" else {}
    begun = config.replaced({"method": method, "method_options": options, "training.save_every": 2})

    def dies(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # 13 layers of rank 4: 0.55 of 52 ranks
        train(begun.replaced({"budget.fraction": None, "budget.ranks": 28}), home / f"of-ranks-{method}", progress=dies)
    if method == "auto":
        with pytest.raises(RankallocError, match="target was 28 and now is 20"):
            train(begun.replaced({"budget.fraction": 0.4}), home / f"of-ranks-{method}", resume=True)
    trace = train(begun.replaced({"budget.fraction": 0.55}), home / f"of-ranks-{method}", splits=(), resume=True)
    assert (trace.budget.unit, trace.budget.target, sum(trace.final_ranks)) == ("ranks", 28, 28)


def test_a_run_plans_from_its_data_and_a_dry_run_shows_the_same(config, home):
    config = config.replaced(EVA)
    trace = train(config, home / "eva")
    seen = preview(config)
    assert [layer.rank for layer in seen.layers] == trace.final_ranks == [la.initial_rank for la in trace.layers]
    assert seen.params_final == trace.adapter_params_final == seen.stored == trace.stored.numbers
    assert 0 <= seen.plan.target - trace.adapter_params_final < max(seen.plan.costs)
    assert trace.method_options["max_batches"] == 3 and trace.finished
    (home / "eva" / "trace.json").unlink()
    resumed = train(config, home / "eva", resume=True)
    assert resumed.final_ranks == trace.final_ranks
    assert resumed.evaluation("tune").metrics == trace.evaluation("tune").metrics
    assert (home / "eva" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "gora", "method_options": {"placement": "shuffled"}},
        {"method": "module-types", "method_options": {"weights": {"query": 2}}},
        {"method": "manual", "method_options": {"rank_pattern": {"query": 0}}, "budget.fraction": None,
         "budget.ranks": 44},
    ],
)
def test_methods_and_options_by_configuration(config, settings):
    seen = preview(config.replaced({"method_options": {}, **settings}))
    spent = sum(layer.rank * cost for layer, cost in zip(seen.layers, seen.plan.costs, strict=True))
    assert 0 <= seen.plan.target - spent < max(seen.plan.costs)


def test_a_dry_run_refuses_the_options_a_planned_run_would(config):
    for options in ({"bogus": 1}, {"max_batches": 0}):
        with pytest.raises(ConfigError):
            preview(config.replaced({"method": "eva", "method_options": options}))


@pytest.mark.long
def test_a_configuration_names_the_variants(config, home):
    from safetensors.torch import load_file

    plain, prepared = config.replaced({"training.steps": 4}), prepare(config)
    sizes = {}
    for name, values in {
        "plain": {}, "plus": {"training.plus_ratio": 8}, "rslora": {"adapter.scale": "rslora"},
        "fa": {"adapter.init": "lora-fa", "method": "magnitude"},
        "vera": {"adapter.init": "vera", "method": "first-order"}, "decay": {"training.weight_decay": 0.5},
        "xs": {"adapter.init": "lora-xs", "method": "uniform"},
    }.items():
        trace = train(plain.replaced(values), home / name, prepared=prepared, splits=())
        assert meets_budget(trace)
        assert trace.scaling == (4.0 if name == "rslora" else 2.0)
        tensors = load_file(home / name / "adapter" / "adapter_model.safetensors")
        sizes[name] = sum(float(t.square().sum()) for key, t in tensors.items() if "lora_B" in key)
    assert sizes["plus"] > 4 * sizes["plain"] and len(set(sizes.values())) == 7
    with pytest.raises(ConfigError, match="adapter.init: .*did you mean 'lora-fa'"):
        plain.replaced({"adapter.init": "lorafa"})
