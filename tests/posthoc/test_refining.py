"""Refining: the sensitivities are true derivatives, and the factors keep to their bound and each layer's Σσ."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import rankalloc as ra
from rankalloc.cli import app
from rankalloc.cli.refining import verdict_of
from rankalloc.errors import ConfigError, RankallocError
from rankalloc.experiments.config import load_config
from rankalloc.experiments.tasks import prepare
from rankalloc.posthoc import refining
from rankalloc.posthoc.refining import RULES
from rankalloc.posthoc.sensitivity import Sensitivity
from tests.support.adapter_folders import dense, random_layers, write_peft
from tests.support.models import LABELS, assert_same, make_bert, make_gpt2, randomize, token_data
from tests.support.runs import small_config


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


def test_sensitivities_at_half_precision_are_of_the_same_adapter(folder):
    half = ra.sensitivities(make_bert().bfloat16(), folder, batches(1))
    assert ra.refine(folder, half).layers


@pytest.mark.parametrize("bound", [1 + 1e-9, 1.5, 100])
def test_a_shuffle_hands_out_the_same_factors_before_they_are_scaled(bound):
    sigma = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    seen = Sensitivity(torch.tensor([1.0, -2.0, 0.5, -0.1, 0.3, 0.0]).double(), torch.arange(6).double(), sigma)
    for name, rule in RULES.items():
        plain = refining.scaled_factors(sigma, seen, name, bound, None)
        shuffled = refining.scaled_factors(sigma, seen, name, bound, torch.Generator().manual_seed(1))
        order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
        asked = rule(sigma, seen, bound)
        for factors, wanted in ((plain, asked), (shuffled, asked[order])):
            inside = (factors > 1 / bound) & (factors < bound)
            common = (factors / wanted)[inside]
            if len(common):
                torch.testing.assert_close(common, common[:1].expand_as(common))
            assert float((factors * sigma).sum()) == pytest.approx(float(sigma.sum()), rel=1e-9)
            assert factors.min() >= 1 / bound and factors.max() <= bound


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
    for bound in (1e3, 1e200):
        with pytest.raises(ConfigError, match="bound must be a number above 1 and at most 100"):
            ra.refine(folder, seen, bound=bound)
    for rank in (3, 6, 8):  # one of the same ranks too
        other = ra.attach(make_bert(labels=LABELS), rank=rank)
        randomize(other, rank)
        with pytest.raises(ConfigError, match="another adapter"):
            ra.refine(ra.save(other, tmp_path / f"other{rank}"), seen)
    with pytest.raises(ConfigError):
        ra.refine(folder, seen, folder)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="rankalloc")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A configuration file, and an adapter of its model."""
    place = tmp_path_factory.mktemp("task")
    config = small_config(place)
    adapters = ra.attach(prepare(config).build_model(), rank=4)
    randomize(adapters)
    return place / "small.yaml", ra.save(adapters, place / "run" / "adapter")


def test_the_command_says_before_after_and_what_shuffles_do(task, tmp_path):
    config, adapter = task
    done = run("refine", adapter.parent, "--task", config, "--batches", 2, "--controls", 2, "-o", tmp_path / "a")
    assert done.exit_code == 0 and "before" in done.stdout and "shuffled" in done.stdout, done.output
    again = run("refine", adapter, "--task", config, "--batches", 2, "--controls", 2, "-o", tmp_path / "b", "--json")
    told, record = json.loads(again.stdout), json.loads((tmp_path / "b" / "refine.json").read_text())
    assert told.pop("path") == str(tmp_path / "b") and told == record
    judged = told["judged"]
    assert len(judged["shuffled"]) == 2 and judged["split"] == "tune" and judged["verdict"] in done.stdout
    judge = ra.TaskEvaluator(prepare(load_config(config)), batch_size=4)
    assert (judged["before"], judged["after"]) == (judge(adapter), judge(tmp_path / "b"))
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert one == two


@pytest.mark.parametrize(
    "sign, after, shuffled, told",
    [
        (1, 0.5, [0.1], "better before"), (1, 0.4, [0.1], "better before"), (-1, 0.6, [0.9], "better before"),
        (1, 0.6, [0.4, 0.6], "by chance"), (-1, 0.4, [0.5, 0.3], "by chance"),
        (1, 0.6, [0.4, 0.55], "ahead"), (-1, 0.4, [0.5, 0.45], "ahead"),
    ],
)
def test_the_verdict(sign, after, shuffled, told):
    assert told in verdict_of(sign, 0.5, after, shuffled)


@pytest.mark.parametrize(
    "words, told",
    [
        (["{a}", "--task", "punctation"], "did you mean 'punctuation'"),
        (["{a}", "--task", "{t}", "--rule", "selct"], "did you mean 'select'"),
        (["{a}", "--task", "{t}", "--bound", "0.9"], "bound must be a number above 1"),
        (["{a}", "--task", "{t}", "--layout", "paded"], "layout"),
        (["nowhere", "--task", "{t}"], "no adapter folder"),
        (["{x}", "--task", "{t}"], "not finite on batch 1"),
        (["{e}", "--task", "{t}"], "adapts experts stacked in one tensor"),
    ],
)
def test_mistakes_end_in_one_sentence(words, told, task, tmp_path):
    config, adapter = task
    broken = tmp_path / "broken"  # far too large: the loss is not a number
    shutil.copytree(adapter, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    save_file({key: value * 1e30 for key, value in tensors.items()}, broken / "adapter_model.safetensors")
    experts = tmp_path / "experts"
    shutil.copytree(adapter, experts)
    settings = json.loads((experts / "adapter_config.json").read_text())
    (experts / "adapter_config.json").write_text(json.dumps({**settings, "target_parameters": ["experts.down_proj"]}))
    names = {"a": adapter, "t": config, "x": broken, "e": experts}
    done = run("refine", *[word.format(**names) for word in words], "-o", tmp_path / "o")
    assert done.exit_code in (1, 2) and told in " ".join(done.stderr.split()), done.output
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1 and not (tmp_path / "o").exists()


def test_a_metric_that_is_not_a_number_is_no_value(task, tmp_path):
    config, adapter = task
    judge = ra.TaskEvaluator(dataclasses.replace(prepare(load_config(config)), metric="loss"), batch_size=4)
    shutil.copytree(adapter, tmp_path / "broken")
    tensors = load_file(adapter / "adapter_model.safetensors")
    huge = {key: value * 1e30 for key, value in tensors.items()}
    save_file(huge, tmp_path / "broken" / "adapter_model.safetensors")
    with pytest.raises(RankallocError, match=r"loss is (nan|inf) on its tune split"):
        judge(tmp_path / "broken")
    assert judge(adapter) > 0
