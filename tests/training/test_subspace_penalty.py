"""The penalty's gradient is autograd's; it turns a new adapter out of the given ones; it is never silently nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.errors import AdapterFileError, ConfigError, RankallocError
from rankalloc.experiments.config import load_config
from rankalloc.lowrank import Factors, bases, principal_angles
from rankalloc.training.subspace_penalty import SubspacePenalty
from tests.support.adapter_folders import random_layers, write_peft
from tests.support.models import assert_same, make_bert, make_mlp, randomize, tensors_of
from tests.support.runs import small_config
from tests.support.training import make_trainer, train

SHORT = 1e-3
START = 1.0
"""Mean square of the targets, sin² + cos²: a model that has learned nothing is at that or above."""


def task(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(step))
    return x, x[:, :8].sin() + x[:, 8:].cos()


def learn(folder: Path | None, method: str = "uniform", steps: int = 50, seed: int = 1, ranks: int = 6, rank: int = 3,
          **options):
    """A real run on one task; the same one for every adapter, so that all want the same directions."""
    model = make_mlp()
    torch.manual_seed(seed)
    init = ra.METHODS[method].init
    budget = ra.RankBudget(ranks=ranks, every=3)
    if ra.METHODS[method].planner:
        plan = ra.plan_ranks(model, [task(i) for i in range(4)], budget, method, rank=rank, loss_fn=F.mse_loss)
        adapters = ra.attach(model, ranks=plan)
    else:
        adapters = ra.attach(model, rank=rank, init=init)
    controller = ra.RankController(adapters, budget, steps, method, **options)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=2e-2)

    def loss_of(step):
        x, y = task(step)
        return F.mse_loss(model(x), y)

    losses = train(controller, optimizer, steps, loss_of)
    trace = controller.finish()
    return adapters, (folder and ra.save(adapters, folder)), trace, sum(losses[-10:]) / 10


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return learn(tmp_path_factory.mktemp("given"), ranks=9)[1]


def angles(adapters, folder, side: int = 1) -> float:
    """Mean principal angle to the finished adapter over the layers, in degrees; side 1 reads, 0 writes."""
    finished = ra.FinishedAdapter(folder)
    found = []
    for name, adapter in adapters.modules.items():
        mine = bases(Factors(adapter.P.detach(), adapter.Q.detach(), adapter.lam.detach()))[side]
        theirs = bases(finished.factors(name))[side]
        found.append(principal_angles(mine, theirs))
    return float(torch.cat(found).mean())


def doubled(mlp, ranks=(4, 4, 2)):
    adapters = ra.attach(mlp, rank=4, ranks=dict(zip(["0", "2", "4"], ranks, strict=True)))
    randomize(adapters)
    for adapter in adapters:
        for factor in (adapter.P, adapter.lam, adapter.Q):
            factor.data = factor.data.double()
    with torch.no_grad():
        adapters.modules["0"].Q[1] *= 1e-3  # shorter than what a row counts as at least
        adapters.modules["0"].Q[2] = 0
    return adapters


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_the_gradient_is_that_of_the_penalty(mlp, given, side):
    adapters = doubled(mlp)
    penalty = SubspacePenalty(adapters, [given], 0.3, side)
    finished, total = ra.FinishedAdapter(given), 0.0
    for name, adapter in adapters.modules.items():
        columns, rows = bases(finished.factors(name))
        for factor, basis, which in ((adapter.Q, rows, "input"), (adapter.P.T, columns, "output")):
            if side in (which, "both"):
                size = factor.square().sum(1)
                inside = (factor @ basis.float().double()).square().sum(1)
                total = total + (inside / torch.where(size > SHORT, size, SHORT)).sum()
    factors = [f for a in adapters for f, which in ((a.Q, "input"), (a.P, "output")) if side in (which, "both")]
    expected = [0.3 * g for g in torch.autograd.grad(total, factors)]
    for adapter in adapters:
        for factor in (adapter.P, adapter.Q):
            factor.grad = torch.full_like(factor, 0.25)
    penalty.add_gradient()
    for factor, gradient in zip(factors, expected, strict=True):
        assert gradient.abs().max() > 1e-2
        torch.testing.assert_close(factor.grad - 0.25, gradient, rtol=1e-9, atol=1e-12)
    left = [f for a in adapters for f in (a.P, a.Q) if not any(f is g for g in factors)]
    assert all((f.grad == 0.25).all() for f in left) and all(a.lam.grad is None for a in adapters)


def test_its_force_depends_on_neither_the_size_of_the_old_nor_the_number_of_the_new(mlp, given, tmp_path):
    """Old factors ten times as large, and twice as many new triplets: each triplet feels the same."""
    finished = ra.FinishedAdapter(given)
    larger = {name: (10 * finished.factors(name).Q, finished.factors(name).P) for name in finished.layers}
    write_peft(tmp_path / "larger", larger, base_model_name_or_path=None)
    small, large = ra.attach(mlp, rank=2), ra.attach(make_mlp(), rank=4)
    randomize(small)
    pushes = []
    for adapters, others in ((small, given), (small, tmp_path / "larger"), (large, given)):
        for adapter, model in zip(adapters, small, strict=True):
            adapter.Q.data[:2] = model.Q.data
            adapter.Q.grad = torch.zeros_like(adapter.Q)
        SubspacePenalty(adapters, others).add_gradient()
        pushes.append(torch.cat([a.Q.grad[:2].flatten() for a in adapters]))
    torch.testing.assert_close(pushes[1], pushes[0])
    torch.testing.assert_close(pushes[2], pushes[0])
    assert pushes[0].abs().max() > 1e-3


@pytest.mark.parametrize("method", ["uniform", "auto", "dylora", "gora"])
def test_a_new_adapter_keeps_out_and_still_learns(method, given):
    """With a score and without, nested, planned: on the very task of the given adapter, ranks leaving on the way."""
    free, _, _, loss = learn(None, method, seed=2)
    away, _, trace, its_loss = learn(None, method, seed=2, away_from=[given])
    assert angles(away, given) > angles(free, given) + 12, (angles(away, given), angles(free, given))
    assert its_loss < 1.25 * loss < 0.8 * START
    shares = [log.values["away_share"] for log in trace.logs]
    assert len(shares) == 2 and shares[1] < 0.1 < shares[0]
    assert sum(away.ranks().values()) == 6


def test_column_spaces(given):
    free, away = (learn(None, seed=2, **o)[0] for o in ({}, {"away_from": given, "away_side": "output"}))
    assert angles(away, given, 0) > angles(free, given, 0) + 5


def test_accumulation_does_not_multiply_it_and_scores_do_not_see_it(given):
    seen = []
    for pieces in (1, 4):
        model = make_mlp()
        adapters = ra.attach(model, rank=4)
        controller = ra.RankController(adapters, ra.RankBudget(ranks=6), 10, "adalora", away_from=[given])
        x, y = task(0)
        for part, target in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            (F.mse_loss(model(part), target) / pieces).backward()
        controller.observe()
        plain = ra.RankController(adapters, ra.RankBudget(ranks=6), 10, "adalora")
        seen.append([a.Q.grad.clone() for a in adapters])
        scores = {name: value.clone() for name, value in controller.state.score.tensors().items()}
        adapters.model.zero_grad()
        F.mse_loss(model(x), y).backward()
        plain.observe()
        for name, value in plain.score.tensors().items():
            torch.testing.assert_close(scores[name], value, rtol=1e-4, atol=1e-6)
        assert any(not torch.allclose(a.Q.grad, g) for a, g in zip(adapters, seen[-1], strict=True))
    for one, four in zip(*seen, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)


def test_layers_that_only_one_of_them_has_are_left_alone(given):
    adapters = ra.attach(make_mlp(), rank=2, target_modules=["0"], init="lora")
    SubspacePenalty(adapters, given)
    trained = learn(None)[0]  # adapts all three
    for name in ("0", "4"):
        trained.modules[name].drop(torch.zeros(trained.modules[name].rank, dtype=torch.bool))
    part = ra.save(trained, given.parent / "part", "compact")
    adapters = ra.attach(make_mlp(), rank=2)
    for adapter in adapters:
        adapter.Q.grad = torch.zeros_like(adapter.Q)
    SubspacePenalty(adapters, part).add_gradient()
    assert [bool(a.Q.grad.any()) for a in adapters] == [False, True, False]


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.conv = nn.Embedding(20, 6, padding_idx=3), nn.Conv2d(4, 8, 3, groups=2)


def test_embeddings_and_convolutions(tmp_path):
    """The very rows of the given adapter lie inside whole; a padding row stays zero whatever the other one did."""
    others = ra.attach(Odd(), rank=2, target_modules=["words", "conv"], init="lora")
    randomize(others)
    others.modules["words"].Q.data[:, 3] = 1.0
    adapters = ra.attach(Odd(), rank=2, target_modules=["words", "conv"], init="lora")
    penalty = SubspacePenalty(adapters, ra.save(others, tmp_path), side="both")
    assert 0 < penalty.share() < 0.9
    for adapter in adapters:
        adapter.Q.grad = torch.zeros_like(adapter.Q)
    penalty.add_gradient()
    push = adapters.modules["words"].Q.grad
    assert not push[:, 3].any() and push.any() and adapters.modules["conv"].Q.grad.any()
    for adapter, other in zip(adapters, others, strict=True):
        adapter.Q.data, adapter.P.data = 3 * other.Q.data, -other.P.data
    adapters.modules["words"].Q.data[:, 3] = 0
    assert penalty.share() == pytest.approx(1, abs=1e-5)


def test_a_base_that_nothing_is_known_of_is_told(tmp_path):
    folder = write_peft(tmp_path / "peft", {"0": (torch.randn(2, 16), torch.randn(24, 2))})
    model = make_mlp()
    model.name_or_path = "mine"
    (note,) = controller(folder, model=model).trace.alerts
    assert "was made for base model 'base'" in note and "'mine'" in note
    model = make_mlp()
    model.name_or_path = "base"
    assert not controller(folder, model=model).trace.alerts


def test_what_several_adapters_share_counts_once(mlp, given, tmp_path):
    shutil.copytree(given, tmp_path / "copy")
    adapters = ra.attach(mlp, rank=2)
    pushes = []
    for others in ([given], [given, tmp_path / "copy", ra.FinishedAdapter(given)]):
        for adapter in adapters:
            adapter.Q.grad = torch.zeros_like(adapter.Q)
        SubspacePenalty(adapters, others).add_gradient()
        pushes.append(torch.cat([a.Q.grad.flatten() for a in adapters]))
    torch.testing.assert_close(*pushes)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """The trainer's own way, with an adapter that moved in between; other settings are refused."""
    others = ra.attach(make_bert(), rank=2, init="lora")
    randomize(others)
    given = ra.save(others, tmp_path / "given")

    def begin(seed, **options):
        model = make_bert(dropout=0.1)
        torch.manual_seed(seed)
        options = {"away_from": [given], "away_weight": 0.5, "away_side": "both", **options}
        return model, ra.RankCallback(ra.attach(model, rank=4), ra.RankBudget(ranks=20, every=2), **options)

    settings = {"steps": 4, "save_strategy": "steps", "save_steps": 2}
    model, callback = begin(1)
    make_trainer(model, tmp_path / "run", [callback], **settings).train()
    whole, logs = tensors_of(model), callback.trace.logs
    given = shutil.move(given, tmp_path / "moved")
    model, callback = begin(77)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    make_trainer(model, tmp_path / "run", [callback], **settings).train(resume_from_checkpoint=checkpoint)
    assert_same(tensors_of(model), whole)
    assert [x.values["away_share"] for x in callback.trace.logs if "away_share" in x.values] == [
        x.values["away_share"] for x in logs if "away_share" in x.values]
    model, callback = begin(77, away_weight=0.4)
    with pytest.raises(RankallocError, match="away_weight was 0.5 and now is 0.4"):
        make_trainer(model, tmp_path / "run", [callback], **settings).train(resume_from_checkpoint=checkpoint)


# --- errors ----------------------------------------------------------------------------------------------------


def controller(away_from, method="uniform", init=None, model=None, **options):
    adapters = ra.attach(model or make_mlp(), rank=2, init=init or ra.METHODS[method].init)
    return ra.RankController(adapters, ra.RankBudget(ranks=4), 10, method, away_from=away_from, **options)


def other_base():
    model = make_mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return model


def test_mistakes_are_told_before_training(given, tmp_path):
    elsewhere = write_peft(tmp_path / "elsewhere", random_layers(3))
    nothing = ra.save(ra.attach(make_mlp(), rank=2), tmp_path / "nothing")
    shape = write_peft(tmp_path / "shape", {"0": (torch.randn(2, 7), torch.randn(24, 2))})
    full = write_peft(tmp_path / "full", {"0": (torch.eye(16), torch.randn(24, 16))})
    for error, told, call in [
        (ConfigError, "names no adapter", lambda: controller([])),
        (ConfigError, "takes folders of adapters", lambda: controller(3)),
        (AdapterFileError, "no adapter folder", lambda: controller([tmp_path / "nowhere"])),
        (ConfigError, "no layer in common", lambda: controller([given, elsewhere])),
        (ConfigError, r"ΔW is zero", lambda: controller([nothing])),
        (ConfigError, "fill the whole space of inputs", lambda: controller([full])),
        (AdapterFileError, "away_from: .*7 → 24 in the adapter and 16 → 24 here", lambda: controller([shape])),
        (AdapterFileError, "another base model: the frozen weights", lambda: controller(given, model=other_base())),
        (ConfigError, "init='lora-fa'", lambda: controller(given, init="lora-fa")),
        (ConfigError, "init='vera'", lambda: controller(given, init="vera", away_side="output")),
        (ConfigError, "did you mean 'output'", lambda: controller(given, away_side="outputs")),
        (ConfigError, "away_weight must be a number above 0", lambda: controller(given, away_weight=0)),
        (ConfigError, "away_weight=0.3 does nothing without", lambda: controller(None, away_weight=0.3)),
        (ConfigError, "away_side='both' does nothing", lambda: controller(None, away_side="both")),
    ]:
        with pytest.raises(error, match=told):
            call()
    assert controller(given, init="lora-fa", away_side="output").away.side == "output"
    note = controller([given, full]).trace.alerts
    assert len(note) == 1 and "fill the whole space of inputs of 0 (1 layers" in note[0]
    with pytest.raises(ConfigError, match="no layer in common"):  # a method that plans is told as early
        ra.RankCallback(ra.attach(make_mlp(), rank=2, init="lora"), ra.RankBudget(ranks=4), "gora", away_from=elsewhere)


def test_the_configuration_resolves_paths_and_tells_mistakes(given, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {away_from: [first, ../second], away_weight: 0.5}\n")
    config = load_config(path)
    assert config.training.away == {
        "away_from": [str(tmp_path / "first"), str(tmp_path / ".." / "second")], "away_weight": 0.5}
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config
    assert load_config(path, ["training.away_from=here"]).training.away["away_from"] == str(Path("here").absolute())
    assert load_config(None).training.away == {}
    for override, told in [
        ("training.away_from=[]", "training.away_from"),
        ("training.away_weight=0.5", "training.away_weight: 0.5 does nothing without away_from"),
        ("training.away_side=input", "training.away_side: 'input' does nothing without away_from"),
        ("training.away_form=x", "did you mean 'away_from'"),
    ]:
        with pytest.raises(ConfigError, match=told.replace("[", r"\[")):
            load_config(None, [override])
    with pytest.raises(ConfigError, match="training.away_weight: should be above 0"):
        load_config(path, ["training.away_weight=-1"])


def test_a_configured_run_keeps_away_and_a_dry_run_tells_mistakes(tmp_path):
    from rankalloc.experiments.runner import preview, train
    from rankalloc.experiments.tasks import prepare

    config = small_config(tmp_path, "training.steps=2", "method=uniform")
    prepared = prepare(config)
    train(config, tmp_path / "first", prepared=prepared, splits=())
    away = config.replaced({"training.away_from": str(tmp_path / "first")})
    trace = train(away, tmp_path / "second", prepared=prepared, splits=())
    digest, = trace.method_options["away_from"]
    assert len(digest) == 16 and trace.method_options["away_weight"] == 0.1
    assert len([log for log in trace.logs if "away_share" in log.values]) == 2
    first, second = (ra.FinishedAdapter(tmp_path / name) for name in ("first", "second"))
    assert any(not torch.equal(first.raw(name, "A"), second.raw(name, "A")) for name in first.layers)
    elsewhere = write_peft(tmp_path / "elsewhere", random_layers(3))
    with pytest.raises(ConfigError, match="no layer in common"):
        preview(config.replaced({"training.away_from": [str(elsewhere)]}))
