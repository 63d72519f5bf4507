"""The search for a rule: training many runs at once is the package's training of each, and its record and table."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import rankalloc as ra
from studies.tight.search import __main__ as command
from studies.tight.search import runs as search_runs
from studies.tight.search.factors import NAMES, Factors
from studies.tight.search.model import FrozenBert
from studies.tight.search.rules import Rule
from studies.tight.search.runs import Job, Outcome
from studies.tight.search.table import report, row_of
from studies.tight.search.training import Data, Fleet, Spec
from studies.tight.search.tried import FIRST_LOOK, HERE, TRIED, Tried
from studies.tight.search.variants import ADOPTED, BASE, VARIANTS
from tests.support.models import LABELS, VOCAB, make_bert

STEPS, BATCH, WARMUP, RANK, SCALING, RATE, PARAMS = 12, 4, 2, 4, 2.0, 3e-2, 230


@pytest.fixture
def dtype() -> torch.dtype:
    return torch.float64


@pytest.fixture
def model(dtype) -> nn.Module:
    """A random BERT whose layers have something to say: the usual start gives nearly equal outputs everywhere."""
    bert = make_bert(hidden=16)
    with torch.no_grad():
        for name, parameter in bert.named_parameters():
            if parameter.dim() == 2 and "classifier" not in name:
                parameter.mul_(8)
    return bert.to(dtype)


@pytest.fixture
def data() -> Data:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (24, 7), generator=generator)
    mask = torch.arange(7) < torch.randint(3, 8, (24, 1), generator=generator)
    labels = torch.where(mask & (ids % 7 > 0), ids % LABELS, -100)
    return Data(ids, labels, mask)


def drawn(base: FrozenBert, seed: int, init: str) -> dict[str, list[torch.Tensor]]:
    """A start with sizes between those of the two kinds of adapters, (1, ...) each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return 0.05 * torch.randn(1, *shape, generator=generator, dtype=torch.float64).to(base.bias.dtype)

    p = [normal(shape.d_out, RANK) * (init == "svd") for shape in base.shapes]
    q = [4 * normal(RANK, shape.d_in) for shape in base.shapes]
    lam = [torch.full((1, RANK), float(init == "lora"), dtype=base.bias.dtype) for _ in base.shapes]
    return {"P": p, "lam": lam, "Q": q}


def rows_of(*seeds: int) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randint(24, (STEPS, BATCH), generator=generator) for generator in generators])


def fleet_of(model: nn.Module, runs: dict[int, Rule | None], init: str = "svd") -> Fleet:
    """{seed: rule} as a fleet."""
    base = FrozenBert(model, dtype=model.classifier.weight.dtype)
    starts = [drawn(base, seed, init) for seed in runs]
    start = {name: [torch.cat(parts) for parts in zip(*(s[name] for s in starts), strict=True)] for name in NAMES}
    # ranks that stay are a pattern, as those by hand are
    held = torch.tensor([[RANK if rule else at % 3 for at in range(len(base.shapes))] for rule in runs.values()])
    weight, bias = model.classifier.weight.detach(), model.classifier.bias.detach()
    heads = weight.repeat(len(runs), 1, 1), bias.repeat(len(runs), 1)
    specs = [
        Spec(RATE * (1 + 0.2 * seed), rule, rule and rule.plan(base.shapes, RANK, PARAMS, STEPS))
        for seed, rule in runs.items()
    ]
    renewed = [drawn(base, seed + 50, init) for seed in runs]
    factors = Factors(base.shapes, start, held, init, SCALING)
    return Fleet(base, factors, heads, specs, STEPS, WARMUP, renewed.__getitem__, dropout=False)


def in_the_package(model: nn.Module, rule: Rule, init: str, data: Data, rows: torch.Tensor):
    """The package's own training of seed 0: its losses, (ranks in memory, live ranks) after each step, its adapters."""
    start = drawn(FrozenBert(model, dtype=model.classifier.weight.dtype), 0, init)
    adapters = ra.attach(model, rank=RANK, alpha=SCALING * RANK, init=init)
    model.to(model.classifier.weight.dtype)  # adapters begin in float32
    with torch.no_grad():
        for layer, adapter in enumerate(adapters):
            for name in NAMES:
                getattr(adapter, name).copy_(start[name][layer][0])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    course = LambdaLR(optimizer, lambda t: t / WARMUP if t < WARMUP else (STEPS - t) / (STEPS - WARMUP))
    budget = ra.RankBudget(params=PARAMS, warmup=rule.warmup / 96, freeze=1 - rule.freeze / 96, every=rule.every)
    controller = ra.RankController(adapters, budget, STEPS)
    losses, ranks = [], []
    model.train()
    for own in rows[0]:
        loss = model(data.ids[own], attention_mask=data.mask[own].long(), labels=data.labels[own]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        course.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ranks.append([(adapter.rank, adapter.live_rank) for adapter in adapters])
    controller.finish()
    return losses, ranks, adapters


@pytest.mark.parametrize("init, dtype", [("svd", torch.float64), ("lora", torch.float64), ("svd", torch.float32)])
def test_a_run_of_the_fleet_is_the_packages(model, data, init, dtype):
    rule, rows = replace(VARIANTS[ADOPTED].rule, every=2), rows_of(1)
    fleet = fleet_of(model, {0: rule}, init)
    losses, ranks = [], []
    for step in range(1, STEPS + 1):
        losses.append(fleet.step(step, data, rows[:, step - 1]).item())
        ranks.append(list(zip(fleet.factors.held[0].tolist(), fleet.factors.kept[0].sum(1).tolist(), strict=True)))
    expected, expected_ranks, adapters = in_the_package(model, rule, init, data, rows)
    assert ranks == expected_ranks
    assert len({str(now) for now in ranks}) > 3 and max(losses) - min(losses) > 0.3  # something was cut, and learnt
    assert sum(memory > live > 0 for now in ranks for memory, live in now) > 3  # there were spares
    exact = dtype == torch.float64
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-10 if exact else 1e-5)
    model.eval()
    with torch.no_grad():
        found = model(data.ids, attention_mask=data.mask.long(), labels=data.labels).loss.item()
    assert fleet.losses(data, batch=10)[0] == pytest.approx([found], abs=1e-10 if exact else 1e-5)
    for layer, adapter in enumerate(adapters if exact else []):
        for name in NAMES:
            own = fleet.factors.of(name)[layer].detach()[0]
            own = own[:, : adapter.rank] if name == "P" else own[: adapter.rank]
            torch.testing.assert_close(own, getattr(adapter, name).detach(), rtol=0, atol=1e-10)


def test_runs_of_a_batch_do_not_touch_one_another(model, data):
    """Each run among others, of other rules and with fixed ranks, is what it is alone."""
    runs: dict[int, Rule | None] = {
        0: VARIANTS[BASE].rule, 1: replace(VARIANTS["layer first"].rule, every=3, warmup=20), 2: None,
        3: replace(VARIANTS["new at 42"].rule, speed={"lam": 3.0}), 4: replace(VARIANTS["entries 0.08"].rule, spares=2),
    }
    rows = rows_of(*runs)
    together = fleet_of(model, runs)
    losses = together.train(data, rows)
    judged = together.losses(data)[0]
    for at, (seed, rule) in enumerate(runs.items()):
        own = fleet_of(model, {seed: rule})
        torch.testing.assert_close(own.train(data, rows[at : at + 1])[:, 0], losses[:, at], rtol=0, atol=1e-10)
        assert torch.equal(own.factors.held[0], together.factors.held[at])
        assert own.losses(data)[0] == pytest.approx([judged[at]], abs=1e-10)
    assert together.factors.held[2].tolist() == [at % 3 for at in range(12)]
    assert len({tuple(held) for held in together.factors.held.tolist()}) == len(runs)


def test_a_run_that_diverges_leaves_the_others_alone(model, data):
    rule = VARIANTS[ADOPTED].rule
    fleet = fleet_of(model, {0: rule, 1: rule})
    fleet.factors.P[0][0] = float("nan")
    losses = fleet.train(data, rows_of(0, 1))
    assert losses[:, 0].isnan().all() and losses[:, 1].isfinite().all()
    assert fleet.factors.held[1].sum() < fleet.factors.held[0].sum() == 12 * RANK


def test_the_rule_that_was_adopted_is_the_packages():
    shapes = FrozenBert(make_bert(hidden=16)).shapes
    rule = VARIANTS[ADOPTED].rule
    plan = rule.plan(shapes, RANK, PARAMS, 96)
    layers = [replace(shape, rank=RANK) for shape in shapes]
    default = ra.RankBudget(params=PARAMS, freeze=0.4, every=4).resolve(layers, 96)
    assert plan == replace(default, warmup_steps=4) and default.warmup_steps == 5
    assert [rule.asked(plan, step) for step in range(97)] == [plan.asked(step) for step in range(97)]
    fifth, square = (VARIANTS[f"exponent {exponent}"].rule for exponent in (5, 2))
    steps = range(11, 58)
    asked = [[own.asked(own.plan(shapes, RANK, PARAMS, 96), step) for step in steps] for own in (fifth, Rule(), square)]
    assert all(low <= middle <= high for low, middle, high in zip(*asked, strict=True)) and asked[0] != asked[1]


def test_the_command_trains_what_is_missing_and_prints_a_table(tmp_path, monkeypatch, data, capsys):
    base = FrozenBert(make_bert(hidden=16))
    monkeypatch.setattr(search_runs, "place_of", lambda task, device: (base, data, data, BATCH, WARMUP))
    output = tmp_path / "tried.json"
    names = [BASE, ADOPTED, "start 0.04", "base, rank 1, as LoRA", "mixed, first blocks", "all layers, last blocks"]
    asked = ["--tasks", "punctuation", "--steps", "8", "--rates", "1e-2", "--device", "cpu", "--output", str(output)]
    command.main([*asked, "--seeds", "2", "--at-once", "3", "--variants", *names])
    record, printed = Tried(output), capsys.readouterr().out
    assert sorted(cell["variant"] for cell in record.cells(HERE)) == sorted(names)
    assert all(cell["n"] == 2 and 0 < cell["params"] <= 168 for cell in record.cells(HERE))
    assert printed == report(record) == output.with_name("tried.md").read_text(encoding="utf-8")
    assert f"| {ADOPTED} | {VARIANTS[ADOPTED].words} | " in printed

    trained: list[Job] = []
    monkeypatch.setattr(
        command, "outcomes_of", lambda jobs, device: trained.extend(jobs) or [Outcome(None, 0.0, 1) for _ in jobs]
    )
    command.main([*asked, "--seeds", "3", "--variants", BASE])
    assert trained == [Job("punctuation", "a quarter", BASE, 1e-2, 8, 3)]
    cells = Tried(output).cells(HERE)
    diverged = next(cell for cell in cells if cell["variant"] == BASE)
    assert (diverged["mean"], diverged["n"]) == (None, 3) and "null" in output.read_text(encoding="utf-8")
    assert row_of(cells, "punctuation", "a quarter", BASE) is None


def test_the_committed_table_is_that_of_the_committed_record():
    record = Tried(Path(command.__file__).with_name("tried.json"))
    assert report(record) == record.path.with_name("tried.md").read_text(encoding="utf-8")
    for name in (TRIED, FIRST_LOOK):
        for cell in record.cells(name):
            losses = list(cell["losses"].values())
            assert cell["n"] == len(losses) and cell["mean"] == pytest.approx(statistics.fmean(losses), abs=1e-6)
    assert {cell["variant"] for cell in record.cells(TRIED)} <= VARIANTS.keys()
    row = row_of(record.cells(TRIED), "pos", "an eighth", ADOPTED)
    assert row.seeds == 8 and row.difference[2] < 0
