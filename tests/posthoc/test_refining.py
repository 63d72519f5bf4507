"""Refining: the sensitivities are true derivatives, and the factors keep to their bound and each layer's Σσ."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import rankalloc as ra
from rankalloc.errors import ConfigError, RankallocError
from tests.support.adapter_folders import dense, random_layers, write_peft
from tests.support.models import LABELS, assert_same, make_bert, make_gpt2, randomize, token_data


def batches(count: int = 2):
    rows = token_data(8 * count)
    return [
        {key: torch.stack([row[key] for row in rows[i : i + 8]]) for key in rows[0]} for i in range(0, 8 * count, 8)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    adapters = ra.attach(make_bert(), rank=6, modules_to_save=["classifier"])
    randomize(adapters)
    return ra.save(adapters, tmp_path_factory.mktemp("refine") / "a", layout="uniform", pad_multiple=8)


@pytest.fixture(scope="module")
def seen(folder):
    return ra.sensitivities(make_bert(), folder, batches())


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_a_sensitivity_is_the_derivative_of_the_loss_by_a_singular_value(make, tmp_path):
    adapters = ra.attach(make(), rank=3)
    randomize(adapters)
    with torch.no_grad():
        next(iter(adapters)).lam[1] = 0.0  # a triplet that does nothing
    where = ra.save(adapters, tmp_path / "a")
    model, data = make(), batches(1)[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = ra.sensitivities(model, where, [data, data])
    assert_same(model.state_dict(), before)
    loaded = ra.load(model, where)
    model.double()  # the difference quotient needs it
    for name in list(loaded.modules)[::3]:
        adapter, scored = loaded.modules[name], found[name]
        torch.testing.assert_close(scored.size, scored.mean.abs())  # of one batch twice
        kept = adapter.P.detach().clone()
        whole = (adapter.P.double() * adapter.lam * adapter.scaling) @ adapter.Q.double()
        u, sigma, vh = torch.linalg.svd(whole.detach(), full_matrices=False)
        for i in range(int((sigma > 1e-6).sum())):
            values = []
            for change in (1e-2, -1e-2):
                moved = whole + change * sigma[i] * u[:, i : i + 1] @ vh[i : i + 1]
                left = moved @ torch.linalg.pinv(adapter.lam[:, None] * adapter.scaling * adapter.Q.double())
                with torch.no_grad():
                    adapter.P.copy_(left)
                    values.append(float(model(**data).loss))
                    adapter.P.copy_(kept)
            slope = (values[0] - values[1]) / 2e-2
            assert slope == pytest.approx(float(scored.mean[i]), rel=1e-3, abs=5e-5)


@pytest.mark.parametrize("rule", ["select", "gradient"])
@pytest.mark.parametrize("shuffled", [None, 3])
def test_factors_keep_to_the_bound_and_a_layer_keeps_its_sum(rule, shuffled, folder, seen, tmp_path):
    done = ra.refine(folder, seen, tmp_path / "b", rule=rule, bound=1.5, shuffled=shuffled)
    before, after = dense(folder), dense(tmp_path / "b")
    moved = 0
    for layer in done.layers:
        factors, sigma = torch.tensor(layer.factors), torch.tensor(layer.sigma)
        assert factors.max() <= 1.5 and factors.min() >= 1 / 1.5
        moved += int((factors != 1).sum())
        u, s, vh = torch.linalg.svd(before[layer.name], full_matrices=False)
        rank = len(sigma)
        core = u[:, :rank].T @ after[layer.name] @ vh[:rank].T  # the directions are the same
        wanted = (s[:rank] * factors).double()
        torch.testing.assert_close(core, torch.diag(wanted), rtol=1e-4, atol=1e-5 * float(s[0]))
        assert float(after[layer.name].norm() ** 2) == pytest.approx(float(core.norm() ** 2), rel=1e-5)
        assert float(wanted.sum()) == pytest.approx(float(s.sum()), rel=1e-5)
    assert moved > len(done.layers)
    again = ra.refine(folder, seen, tmp_path / "c", rule=rule, bound=1.5, shuffled=shuffled)
    assert again.layers == done.layers
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "bc")
    assert one == two
    heads = [{k: v for k, v in load_file(f / "adapter_model.safetensors").items() if "classifier" in k}
             for f in (folder, tmp_path / "b")]
    assert heads[0]
    assert_same(*heads)


def test_the_paper_s_rule_lets_the_most_sensitive_fifth_grow_and_the_least_shrink(folder, seen):
    layers = ra.refine(folder, seen, bound=1.25).layers
    shuffled = ra.refine(folder, seen, bound=1.25, shuffled=0).layers
    for layer in layers:
        slope = seen[layer.name].size[: len(layer.sigma)] / torch.tensor(layer.sigma)
        factors = torch.tensor(layer.factors)
        assert factors.argmax() == slope.argmax() and factors.argmin() == slope.argmin()
        assert float(factors.max() / factors.min()) == pytest.approx(1.25**2, rel=0.2)
    assert any(one.factors != two.factors for one, two in zip(layers, shuffled, strict=True))


def test_a_step_against_the_gradient_lowers_the_loss_it_was_measured_on(folder, seen, tmp_path):
    data = batches()

    def loss(path):
        model = make_bert()
        ra.load(model, path)
        with torch.no_grad():
            return sum(float(model(**batch).loss) for batch in data)

    ra.refine(folder, seen, tmp_path / "down", rule="gradient", bound=1.05)
    assert loss(tmp_path / "down") < loss(folder)


def test_layers_of_rank_one_none_or_zero_stay_as_they_are(tmp_path):
    layers = random_layers(5, count=3, top=3)
    names = list(layers)
    a, b = layers[names[0]]
    layers[names[0]] = a[:1], b[:, :1]
    a, b = layers[names[1]]
    layers[names[1]] = a * 0, b
    where = write_peft(tmp_path / "a", layers)
    model = nn.Module()
    for name in names:
        block = nn.Module()
        block.dense = nn.Linear(layers[name][0].shape[1], layers[name][1].shape[0])
        model.add_module(name.split(".")[0], block)

    def loss(model, batch):
        return sum(block.dense(torch.ones(2, block.dense.in_features)).square().sum() for block in model.children())

    found = ra.sensitivities(model, where, [{}], loss=loss)
    done = {layer.name: layer for layer in ra.refine(where, found, tmp_path / "b").layers}
    assert done[names[0]].factors == [1.0] and set(done[names[1]].factors) <= {1.0}
    before, after = dense(where), dense(tmp_path / "b")
    for name in names[:2]:
        torch.testing.assert_close(after.get(name, 0 * before[name]), before[name], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_refined_is_told(folder, seen, tmp_path):
    model, data = make_bert(), batches(1)
    with pytest.raises(ConfigError, match="at least one batch"):
        ra.sensitivities(model, folder, [])
    with pytest.raises(RankallocError, match=r"not finite on batch 1"):
        ra.sensitivities(model, folder, data, loss=lambda model, batch: model(**batch).loss * float("nan"))
    with pytest.raises(ConfigError, match="rule"):
        ra.refine(folder, seen, rule="selct")
    for bound in (1, 0.5, float("nan"), "wide"):
        with pytest.raises(ConfigError, match="bound"):
            ra.refine(folder, seen, bound=bound)
    with pytest.raises(ConfigError, match="shuffled"):
        ra.refine(folder, seen, shuffled=-1)
    other = ra.attach(make_bert(labels=LABELS), rank=8)
    randomize(other)
    with pytest.raises(ConfigError, match="another adapter"):
        ra.refine(ra.save(other, tmp_path / "other"), seen)
    with pytest.raises(ConfigError):
        ra.refine(folder, seen, folder)
