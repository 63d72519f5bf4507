"""Shrinking: the best choice against brute force and an exact solver, errors against dense matrices, bad folders."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

import rankalloc as ra
from rankalloc.errors import AdapterFileError, BudgetError, ConfigError
from rankalloc.lowrank import Factors, decompose
from rankalloc.storage.exporting import export
from tests.support.adapter_folders import dense, error_of, random_layers, write_peft
from tests.support.models import MAKERS, logits_of, make_bert, randomize

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROOT = Path(__file__).resolve().parents[2]


def spectra(updates):
    return {name: torch.linalg.svdvals(w) for name, w in updates.items()}


def lowest_error(updates, allowed) -> float:
    """The least relative error over all rank vectors that ``allowed`` accepts, by trying every one."""
    values = spectra(updates)
    tails = {n: torch.cat([s.square().flip(0).cumsum(0).flip(0), torch.zeros(1)]).tolist() for n, s in values.items()}
    ranks = [range(int((s > s[0] * 1e-9).sum()) + 1) for s in values.values()]
    names = list(values)
    best = min(
        sum(tails[n][k] for n, k in zip(names, pick, strict=True))
        for pick in itertools.product(*ranks) if allowed(dict(zip(names, pick, strict=True)))
    )
    return (best / sum(t[0] for t in tails.values())) ** 0.5


@pytest.mark.parametrize("start", range(0, 120, 20))
def test_a_rank_budget_is_met_by_the_best_set_and_the_error_is_true(start, tmp_path):
    for seed in range(start, start + 20):
        rslora = seed % 3 == 0
        folder = write_peft(tmp_path / f"{seed}", random_layers(seed), alpha=3 + seed % 7, use_rslora=rslora)
        before = dense(folder)
        held = sum(a.shape[0] for a, _ in random_layers(seed).values())
        ranks = 1 + seed % held
        out = tmp_path / f"{seed}-small"
        result = ra.shrink(folder, ra.RankBudget(ranks=ranks), out)
        assert sum(result.ranks.values()) == result.spent == ranks and result.gap == 0
        assert error_of(before, dense(out)) == pytest.approx(result.error, abs=1e-5)
        assert result.error == pytest.approx(lowest_error(before, lambda r: sum(r.values()) == ranks), abs=1e-6)  # noqa: B023
        after = dense(out)
        for layer in result.layers:
            true = float((before[layer.name] - after.get(layer.name, 0 * before[layer.name])).norm())
            assert layer.error == pytest.approx(true, abs=1e-5 * max(1, layer.norm))
        told = json.loads((out / "shrink.json").read_text())
        assert told["error"] == result.error and told["params"]["after"] == result.params
        assert told["params"]["after"] == told["params"]["stored"]


@pytest.mark.parametrize("unit", ["params", "bytes"])
def test_a_parameter_budget_is_within_the_proven_bound_of_an_exact_solver(unit, tmp_path):
    gaps = []
    for seed in range(30):
        layers = random_layers(seed, count=4)
        folder = write_peft(tmp_path / f"{unit}{seed}", layers)
        costs = {n: a.shape[1] + b.shape[0] for n, (a, b) in layers.items()}
        total = sum(costs[n] * a.shape[0] for n, (a, _) in layers.items())
        amount = max(min(costs.values()), round(total * (0.2 + 0.6 * (seed % 10) / 10)))
        result = ra.shrink(folder, ra.RankBudget(**{unit: amount * (4 if unit == "bytes" else 1)}))
        assert result.params <= amount and result.params == sum(costs[n] * r for n, r in result.ranks.items())
        cheapest = min((costs[c.name] for c in result.layers if c.rank < c.rank_before), default=amount + 1)
        assert amount - result.params < cheapest
        values = {n: s[: layers[n][0].shape[0]].square().numpy() for n, s in spectra(dense(folder)).items()}
        flat = np.concatenate([values[n] for n in layers])
        price = np.concatenate([np.full(len(values[n]), costs[n]) for n in layers])
        best = milp(-flat, constraints=LinearConstraint(price, 0, amount), bounds=Bounds(0, 1),
                    integrality=np.ones(len(flat)))
        energy = sum(float(values[c.name][: c.rank].sum()) for c in result.layers)
        assert energy <= -best.fun * (1 + 1e-6)
        # the docstring's bound, as computed for the case and as one block
        assert -best.fun - energy <= result.gap * flat.sum() + 1e-6 * flat.sum()
        assert -best.fun - energy <= flat.max()
        gaps.append(-best.fun - energy)
    assert max(gaps) > 0, "these cases never need the bound"


def test_floors_caps_and_multiples_are_kept_and_best(tmp_path):
    for seed in range(12):
        folder = write_peft(tmp_path / f"{seed}", {n: pair for n, pair in random_layers(seed, 4).items()})
        held = {n: a.shape[0] for n, (a, _) in random_layers(seed, 4).items()}
        cap = 3
        budget = ra.RankBudget(ranks=sum(min(r, cap) for r in held.values()) - 1, min_rank=1, max_rank=cap)
        result = ra.shrink(folder, budget)
        assert all(1 <= r <= cap for r in result.ranks.values()) and sum(result.ranks.values()) == budget.ranks
        best = lowest_error(
            dense(folder),
            lambda r: sum(r.values()) == budget.ranks and all(1 <= x <= cap for x in r.values()),  # noqa: B023
        )
        assert result.error == pytest.approx(best, abs=1e-6)
        if any(r >= 2 for r in held.values()):
            result = ra.shrink(folder, ra.RankBudget(ranks=2, multiple_of=2))
            assert sum(result.ranks.values()) == 2 and not any(r % 2 for r in result.ranks.values())


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_real_peft_and_we_compute_the_same_from_what_was_shrunk(name, layout, tmp_path):
    peft = pytest.importorskip("peft")
    model = MAKERS[name]()
    adapters = ra.attach(model, rank=4)
    randomize(adapters)
    folder = ra.save(adapters, tmp_path / "a")
    whole = logits_of(model)
    ra.shrink(folder, ra.RankBudget(fraction=1.0), tmp_path / "whole", layout=layout)
    result = ra.shrink(folder, ra.RankBudget(fraction=0.3), tmp_path / "small", layout=layout)
    theirs = logits_of(peft.PeftModel.from_pretrained(MAKERS[name](), tmp_path / "whole"))
    torch.testing.assert_close(theirs, whole, rtol=1e-5, atol=1e-5)
    theirs = logits_of(peft.PeftModel.from_pretrained(MAKERS[name](), tmp_path / "small"))
    ours = MAKERS[name]()
    loaded = ra.load(ours, tmp_path / "small")
    torch.testing.assert_close(logits_of(ours), theirs, **CLOSE)
    assert (theirs - whole).abs().max() > 1e-2
    assert {n: r for n, r in loaded.ranks().items() if r} == {n: r for n, r in result.ranks.items() if r}
    if layout == "compact":
        assert loaded.num_params() == result.params == result.stored_params


def test_nothing_left_is_still_a_file_that_peft_reads(tmp_path):
    peft = pytest.importorskip("peft")
    adapters = ra.attach(make_bert(), rank=2)
    randomize(adapters)
    folder = ra.save(adapters, tmp_path / "a")
    result = ra.shrink(folder, ra.RankBudget(ranks=0), tmp_path / "b")
    assert result.error == pytest.approx(1) and result.params == 0
    bare = make_bert()
    bare.load_state_dict({**bare.state_dict(), **{k: v for k, v in adapters.model.state_dict().items()
                                                  if k.startswith("classifier")}})
    torch.testing.assert_close(logits_of(peft.PeftModel.from_pretrained(make_bert(), tmp_path / "b")),
                               logits_of(bare), **CLOSE)


def test_a_peft_adalora_is_imported_and_shrunk(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=8, lora_alpha=10, task_type="TOKEN_CLS",
        target_modules=["query", "key", "dense"],
    )
    model = peft.get_peft_model(make_bert(), config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(16).reshape(2, 8)
    for step in range(8):
        model(ids, labels=ids % 5).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "ada")
    theirs = logits_of(peft.PeftModel.from_pretrained(make_bert(), tmp_path / "ada"))
    ours = make_bert()
    adapters = ra.load(ours, tmp_path / "ada")
    ranks = adapters.ranks()
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) < 6 * len(ranks)
    assert (theirs - logits_of(make_bert())).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(ours), theirs, **CLOSE)
    ra.shrink(tmp_path / "ada", ra.RankBudget(fraction=1.0), tmp_path / "plain")
    plain = peft.PeftModel.from_pretrained(make_bert(), tmp_path / "plain")
    assert plain.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits_of(plain), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_numbers_stay_what_they_were_and_the_error_counts_their_rounding(dtype, tmp_path):
    folder = write_peft(tmp_path / "a", random_layers(3), dtype=dtype)
    result = ra.shrink(folder, ra.RankBudget(fraction=1.0), tmp_path / "b")
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(tmp_path / "b" / "adapter_model.safetensors").values()} == {dtype}
    assert error_of(dense(folder), dense(tmp_path / "b")) == pytest.approx(result.error, abs=1e-5)
    assert (result.error > 1e-4) == (dtype != torch.float64)


def test_factors_that_are_degenerate_or_cancel_are_still_exact():
    draw = torch.Generator().manual_seed(0)
    p, q = torch.randn(12, 4, generator=draw), torch.randn(4, 9, generator=draw)
    cases = {
        "twice the same column": Factors(torch.cat([p, p], 1), torch.cat([q, q])),
        "cancels": Factors(torch.cat([p, p], 1), torch.cat([q, -q + 1e-5 * torch.randn(4, 9, generator=draw)])),
        "zero": Factors(torch.zeros(12, 4), q),
        "wild": Factors(p * torch.tensor([1e4, 1, 1e-4, 1]), q * torch.tensor([1e-4, 1, 1e4, 1])[:, None]),
        "rank above the width": Factors(torch.randn(3, 8, generator=draw), torch.randn(8, 20, generator=draw)),
        "no rank": Factors(torch.zeros(5, 0), torch.zeros(0, 4)),
    }
    for what, factors in cases.items():
        whole = factors.dense()
        spectrum = decompose(factors)
        true = torch.linalg.svdvals(whole)[: len(spectrum.sigma)]
        size = max(float(true.sum()), 1e-30)
        assert torch.allclose(spectrum.sigma, true, rtol=0, atol=2e-7 * size), what
        for kept in range(len(spectrum.sigma) + 1):
            again = factors.P.double() @ spectrum.left[:, :kept] @ spectrum.right[:kept] @ factors.Q.double()
            assert abs(spectrum.error(kept) - float((whole - again).norm())) < 1e-6 * size, (what, kept)


BAD = {
    "NaN": (lambda layers: layers["layer0.dense"][0].view(-1)[0].fill_(torch.nan), "not finite"),
    "inf": (lambda layers: layers["layer2.dense"][1].view(-1)[-1].fill_(-torch.inf), "not finite"),
}


@pytest.mark.parametrize("what", BAD)
def test_weights_that_are_not_finite_leave_nothing_behind(what, tmp_path):
    layers = random_layers(1)
    BAD[what][0](layers)
    folder = write_peft(tmp_path / "a", layers)
    with pytest.raises(AdapterFileError, match=BAD[what][1]) as caught:
        ra.shrink(folder, ra.RankBudget(ranks=2), tmp_path / "out")
    assert "layer" in str(caught.value) and not (tmp_path / "out").exists()


def test_bad_budgets_folders_and_layouts_are_told_and_leave_nothing_behind(tmp_path):
    folder = write_peft(tmp_path / "a", random_layers(1))
    out = tmp_path / "out"
    held = sum(len(a) for a, _ in random_layers(1).values())
    cases = [
        (BudgetError, "below the floor", dict(budget=ra.RankBudget(ranks=2, min_rank=1))),
        (BudgetError, rf"above the {held} that {folder} holds; lower it$", dict(budget=ra.RankBudget(ranks=held + 1))),
        (BudgetError, "holds in multiples of 2; lower", dict(budget=ra.RankBudget(ranks=1000, multiple_of=2))),
        (BudgetError, "buys no rank", dict(budget=ra.RankBudget(params=1))), (ConfigError, "RankBud", dict(budget=4)),
        (ConfigError, "layout", dict(budget=ra.RankBudget(ranks=3), layout="odd")),
        (ConfigError, "another folder", dict(budget=ra.RankBudget(ranks=3), out=folder)),
        (AdapterFileError, "no adapter folder", dict(adapter=tmp_path / "none", budget=ra.RankBudget(ranks=3))),
    ]
    for kind, words, arguments in cases:
        with pytest.raises(kind, match=words):
            ra.shrink(**{"adapter": folder, "out": out, **arguments})
        assert not out.exists()
    for change, words in [
        ({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "type 'IA3'"), ({"bias": "all"}, "biases")
    ]:
        with pytest.raises(AdapterFileError, match=words):
            ra.shrink(write_peft(tmp_path / "b", random_layers(1), **change), ra.RankBudget(ranks=2), out)
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-9])
    with pytest.raises(AdapterFileError, match="truncated"):
        ra.shrink(folder, ra.RankBudget(ranks=2), out)
    assert not out.exists()


def test_no_layer_loses_what_a_floor_gives_it_and_none_has_to_gain(tmp_path):
    layers = random_layers(2)
    names = list(layers)
    layers[names[0]] = tuple(factor * 0 for factor in layers[names[0]])  # a run's layer that ended at rank 0
    folder = write_peft(tmp_path / "a", layers)
    result = ra.shrink(folder, ra.RankBudget(ranks=len(names) + 1, min_rank=1), tmp_path / "out")
    assert result.ranks[names[0]] == 0 and min(result.ranks[name] for name in names[1:]) >= 1


def test_neither_a_model_nor_a_run_nor_a_source_is_written_into(tmp_path):
    folder = write_peft(tmp_path / "run" / "adapter", random_layers(1))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    writers = [
        lambda out: ra.shrink(folder, ra.RankBudget(ranks=2), out), lambda out: ra.compose([folder], None, None, out),
        lambda out: export(folder, out),
    ]
    places = [
        ("model", "holds a model"), ("run", "holds a run"), ("run/adapter", "is the adapter that is read"),
        ("file", "a file"),
    ]
    for out, words in places:
        for write in writers:
            with pytest.raises(ConfigError, match=words):
                write(tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before
    for _ in range(2):  # a result is replaced by the next
        writers[0](tmp_path / "small")


MEMORY = """
import re, sys
import rankalloc as ra
from rankalloc.posthoc.shrinking import shrink
ra.FinishedAdapter
def peak():  # getrusage would count what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
shrink(sys.argv[1], ra.RankBudget(fraction=0.5), sys.argv[2])
print(peak() - before)
"""


def test_what_the_file_says_of_its_base_goes_along_and_convolutions_are_named(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    folder = write_peft(tmp_path / "a", random_layers(1))
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "rankalloc_base": "told"})
    ra.shrink(folder, ra.RankBudget(ranks=2), tmp_path / "b")
    with safe_open(tmp_path / "b" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["rankalloc_base"] == "told" and file.metadata()["format"] == "pt"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("layer1.dense.lora_A.weight"))
    save_file(tensors | {key: tensors[key][:, :, None, None].clone()}, path)
    with pytest.raises(AdapterFileError, match="layer1.dense.lora_A.weight.*not that of a linear layer"):
        ra.shrink(folder, ra.RankBudget(ranks=2), tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.long
def test_memory_is_bounded_whatever_the_size_of_the_adapter(tmp_path):
    """200 MB of factors in well under that."""
    factor = torch.randn(32, 8192)
    layers = {f"l{i}.q": (factor + i, (factor - i).T) for i in range(96)}
    folder = write_peft(tmp_path / "a", layers)
    del layers
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "b")], capture_output=True, text=True, timeout=120,
        cwd=ROOT, check=True,
    )
    assert 1 < float(done.stdout) < 150, done.stdout
