"""TRL's trainers with a LoraConfig and one line more: the budget, checkpoints, resuming, and readers of the result."""

from __future__ import annotations

import shutil
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rankalloc as ra
from rankalloc.errors import ConfigError, NotAdaptedError
from rankalloc.storage.tensors import read_tensors
from tests.support.language import (
    STEPS,
    make_trl,
    parameters_held,
    save_language_model,
)
from tests.support.language import (
    load_language_model as plain,
)
from tests.support.language import (
    make_lora as lora,
)
from tests.support.models import assert_same, logits_of, tensors_of

pytest.importorskip("trl")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
RANKS = 21
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("base"))


def callback(ranks=RANKS, method="auto", **options):
    return ra.RankCallback(budget=ra.RankBudget(ranks=ranks, every=2), method=method, **options)


def earlier(folder: Path, target: Path, step: int) -> Path:
    """A copy of a run's folder as it was after ``step``; its last checkpoint."""
    shutil.copytree(folder, target)
    for checkpoint in target.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    return target / f"checkpoint-{step}"


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """kind -> a finished run of its trainer with checkpoints, and what it and its twin without our callback held."""

    @cache
    def finished(kind: str) -> SimpleNamespace:
        folder, chooses = tmp_path_factory.mktemp(kind), callback()
        trainer = make_trl(kind, folder, plain(base), lora(), callbacks=[chooses], save_strategy="steps", save_steps=4)
        twin = make_trl(kind, folder / "twin", plain(base), lora())
        held = parameters_held(trainer), parameters_held(twin)
        trainer.train()
        trainer.save_model(str(folder / "final"))
        logits = logits_of(trainer.model)
        return SimpleNamespace(kind=kind, folder=folder, trainer=trainer, callback=chooses, held=held, logits=logits)

    return finished


@pytest.fixture(scope="module", params=[
    "sft", "dpo", "grpo", pytest.param("rloo", marks=pytest.mark.long), pytest.param("kto", marks=pytest.mark.long),
])
def run(request, runs):
    return runs(request.param)


def test_one_more_line_ends_on_the_budget(run):
    adapters = run.callback.adapters
    assert sum(adapters.ranks().values()) == RANKS == sum(a.rank for a in adapters)
    assert min(adapters.ranks().values()) == 0 and len(set(adapters.ranks().values())) > 2
    trace = ra.RankTrace.load(run.folder / "trace.json")
    assert trace.finished and trace.steps_done == STEPS and not trace.alerts and not trace.nonfinite_steps
    assert trace.final_ranks == list(adapters.ranks().values())


def test_no_second_base_is_held(run, base):
    """What a trainer can reach: the base once, also where it compares with a reference (DPO, GRPO)."""
    mine, twin = run.held
    assert mine == twin == sum(p.numel() for p in peft.get_peft_model(plain(base), lora()).parameters())
    assert getattr(run.trainer, "ref_model", None) is None
    adapters = run.callback.adapters
    gone = sum(a.params_per_rank * (4 - a.rank) for a in adapters)
    assert parameters_held(run.trainer) == twin - gone


def test_checkpoints_hold_no_base_weight(run, base):
    base_names = {name.removesuffix(".weight") for name in tensors_of(plain(base))}
    numbers = []
    for checkpoint in [*(run.folder / f"checkpoint-{step}" for step in (4, 8, 12)), run.folder / "final"]:
        files = {file.name: read_tensors(file)[0] for file in checkpoint.rglob("*.safetensors")}
        assert files.keys() - {"rankalloc_state.safetensors"} == {"adapter_model.safetensors"}
        adapter = files["adapter_model.safetensors"]
        assert all(".lora_A." in name or ".lora_B." in name for name in adapter)
        assert {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter} <= base_names
        assert all(tensor.numel() for tensor in adapter.values())
        numbers.append(sum(tensor.numel() for tensor in adapter.values()))
    held = run.callback.adapters.num_params()
    assert numbers[0] > numbers[1] == numbers[2] == numbers[3] == held
    sizes = [(run.folder / f"checkpoint-{step}" / "optimizer.pt").stat().st_size for step in (4, 8)]
    assert sizes[0] > sizes[1]


def test_a_resumed_run_is_the_uninterrupted_one(run, base, tmp_path):
    for step in (4, 8) if run.kind == "sft" else (4,):  # amid the schedule, and once after it
        output, again = tmp_path / str(step), callback()
        checkpoint = earlier(run.folder, output, step)
        trainer = make_trl(
            run.kind, output, plain(base), lora(), callbacks=[again], save_strategy="steps", save_steps=4
        )
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert_same(tensors_of(trainer.model), tensors_of(run.trainer.model))
        assert again.trace.allocations == run.callback.trace.allocations


def test_peft_reads_the_result_exactly_and_without_a_warning(run, base):
    uniform = run.folder / "uniform"
    peft.get_peft_model(plain(base), lora()).save_pretrained(uniform)

    def read(folder):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            one = peft.PeftModel.from_pretrained(plain(base), folder)
            other = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
        return (one, other), {str(warning.message) for warning in said}

    models, said = read(run.folder / "final")
    for model in models:
        torch.testing.assert_close(logits_of(model), run.logits, **CLOSE)
        assert model.get_nb_trainable_parameters()[1] == sum(p.numel() for p in plain(base).parameters()) + (
            run.callback.adapters.num_params())
    assert said == read(uniform)[1]


# --- a model that was shrunk before ----------------------------------------------------------------------------


def in_order(config) -> dict:
    """A configuration whose sets are sorted lists, as those of a driven adapter are."""
    return {key: sorted(value) if isinstance(value, set | list) else value for key, value in config.to_dict().items()}


@pytest.mark.parametrize(("kind", "settings"), [
    ("dpo", {}), pytest.param("dpo", {"precompute_ref_log_probs": True}, marks=pytest.mark.long),
    pytest.param("grpo", {}, marks=pytest.mark.long),
])
def test_the_reference_adapter_stays_as_it_was(base, runs, tmp_path, kind, settings):
    """TRL gives its "ref" adapter the configuration object of the one that trains."""
    folder, before = runs("sft").folder / "final", runs("sft").logits

    def begin(output, adopted=False):
        model = peft.PeftModel.from_pretrained(plain(base), folder, is_trainable=True)
        chooses = callback(ranks=12)
        if adopted:  # before TRL makes the second adapter
            chooses = ra.RankCallback(ra.adopt(model), chooses.budget)
        return make_trl(
            kind, output, model, callbacks=[chooses], save_strategy="steps", save_steps=4, **settings
        ), chooses

    trainer, chooses = begin(tmp_path / "run")
    model = trainer.model
    reference = {name: p.clone() for name, p in model.named_parameters() if ".ref." in name}
    described = in_order(model.peft_config["ref"])
    trainer.train()
    assert reference and in_order(model.peft_config["ref"]) == described
    assert_same(reference, {name: p for name, p in model.named_parameters() if ".ref." in name})
    assert sum(chooses.adapters.ranks().values()) == 12 == sum(a.rank for a in chooses.adapters)
    trainer.save_model(str(tmp_path / "final"))
    after = logits_of(model)
    assert (after - before).abs().max() > 1e-2
    for saved, expected in (("final", after), ("final/ref", before)):
        torch.testing.assert_close(
            logits_of(peft.PeftModel.from_pretrained(plain(base), tmp_path / saved)), expected, **CLOSE
        )
    checkpoint = earlier(tmp_path / "run", tmp_path / "again", 4)
    trainer, _ = begin(tmp_path / "again", adopted=True)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same(tensors_of(trainer.model), tensors_of(model))
    assert in_order(trainer.model.peft_config["ref"]) == described


def test_the_same_model_can_be_driven_again_and_then_trained_as_it_is(base, tmp_path):
    chooses = callback()
    trainer = make_trl("sft", tmp_path / "a", plain(base), lora(), callbacks=[chooses])
    trainer.train()
    ranks = chooses.adapters.ranks()
    trainer.train()
    assert chooses.adapters.ranks() == ranks and 0 in ranks.values()
    lower = callback(ranks=12)
    make_trl("sft", tmp_path / "b", trainer.model, callbacks=[lower]).train()
    assert sum(a.rank for a in lower.adapters) == 12
    last = make_trl("sft", tmp_path / "c", trainer.model, max_steps=2)
    last.train()
    last.save_model(str(tmp_path / "final"))
    there = peft.PeftModel.from_pretrained(plain(base), tmp_path / "final")
    torch.testing.assert_close(logits_of(there), logits_of(last.model), **CLOSE)


# --- methods ---------------------------------------------------------------------------------------------------

METHODS = (
    "adalora", "singular-value", "first-order", "fisher", "signal-to-noise", "gradient-norm", "magnitude", "elalora",
    "increlora", "uniform", "eva", "gora", "fim", "gradient-share", "effective-rank", "module-types",
)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_methods_end_on_the_budget(base, tmp_path, method):
    chooses = callback(method=method)
    trainer = make_trl(
        "sft", tmp_path / "run", plain(base), lora(), callbacks=[chooses], save_strategy="steps", save_steps=4
    )
    trainer.train()
    assert sum(chooses.adapters.ranks().values()) == RANKS == sum(a.rank for a in chooses.adapters)
    trainer.save_model(str(tmp_path / "final"))
    there = peft.PeftModel.from_pretrained(plain(base), tmp_path / "final")
    torch.testing.assert_close(logits_of(there), logits_of(trainer.model), **CLOSE)
    checkpoint = earlier(tmp_path / "run", tmp_path / "again", 4)
    again = make_trl("sft", tmp_path / "again", plain(base), lora(), callbacks=[callback(method=method)])
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same(tensors_of(again.model), tensors_of(trainer.model))


@pytest.mark.parametrize(("method", "words"), [
    ("sora", "trained Λ"), ("l1ra", "trained Λ"), ("dylora", "PEFT's own layers"),
    ("matryoshka", "PEFT's own layers"),
])
def test_methods_that_need_layers_of_our_own_are_refused_by_name(base, tmp_path, method, words):
    with pytest.raises(ConfigError, match=f"method '{method}' .*{words}"):
        make_trl("sft", tmp_path, plain(base), lora(), callbacks=[callback(method=method)])


@pytest.mark.parametrize(("kind", "method", "words"), [
    ("grpo", "eva", "cannot be called with a batch that is list"), ("grpo", "gora", "cannot be called with a batch"),
    ("dpo", "gora", "no loss for a batch"),
])
def test_plans_from_batches_that_are_none_of_the_models_own_are_refused(base, tmp_path, kind, method, words):
    trainer = make_trl(kind, tmp_path, plain(base), lora(), callbacks=[callback(method=method)])
    with pytest.raises(ConfigError, match=words):
        trainer.train()


def test_a_callback_that_comes_after_the_trainer_is_told(base, tmp_path):
    trainer = make_trl("sft", tmp_path, plain(base), lora())
    trainer.add_callback(callback())
    with pytest.raises(NotAdaptedError, match="add_callback is too late"):
        trainer.train()
