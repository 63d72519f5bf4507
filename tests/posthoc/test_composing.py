"""Composing: exact sums, optimal truncation, interference, and refusals that leave nothing behind."""

from __future__ import annotations

import json

import pytest
import torch

import rankalloc as ra
from rankalloc.errors import AdapterFileError, ConfigError
from rankalloc.lowrank import principal_angles
from tests.support.adapter_folders import dense, error_of, random_layers, write_peft
from tests.support.models import logits_of, make_llama, randomize


def pair(tmp_path, seed=0, **other):
    """Two adapters of the same layers."""
    one = random_layers(seed)
    draw = torch.Generator().manual_seed(seed + 1000)
    two = {n: (torch.randn(a.shape, generator=draw), torch.randn(b.shape, generator=draw)) for n, (a, b) in one.items()}
    return write_peft(tmp_path / f"one{seed}", one), write_peft(tmp_path / f"two{seed}", two, alpha=5, **other)


def weighted(folders, weights):
    parts = [dense(f) for f in folders]
    return {n: sum(w * p[n] for w, p in zip(weights, parts, strict=True)) for n in parts[0]}


@pytest.mark.parametrize("weights", [(1, 1), (0.3, -0.7), (2.5, 0)])
def test_the_full_rank_of_a_sum_is_exact_and_a_budget_takes_the_best(weights, tmp_path):
    for seed in range(12):
        folders = pair(tmp_path, seed)
        target = weighted(folders, weights)
        out = tmp_path / f"whole{seed}"
        result = ra.compose(folders, weights, out=out)
        assert error_of(target, dense(out)) < 2e-6 and result.error < 2e-6
        full = ra.compose(folders, weights, ra.RankBudget(fraction=1.0), tmp_path / f"full{seed}")
        assert error_of(target, dense(tmp_path / f"full{seed}")) < 2e-6 and full.spent == full.asked
        ranks = 1 + seed % 4
        result = ra.compose(folders, weights, ra.RankBudget(ranks=ranks), tmp_path / f"small{seed}")
        assert sum(result.ranks.values()) == ranks
        true = error_of(target, dense(tmp_path / f"small{seed}"))
        assert true == pytest.approx(result.error, abs=1e-5)
        values = torch.cat([torch.linalg.svdvals(w) for w in target.values()]).square().sort(descending=True).values
        assert true == pytest.approx(float((values[ranks:].sum() / values.sum()).sqrt()), abs=1e-5)


def test_an_adapter_less_itself_is_nothing(tmp_path):
    one, _ = pair(tmp_path)
    result = ra.compose([one, one], [1, -1], out=tmp_path / "out")
    assert error_of(dense(one), dense(tmp_path / "out")) == pytest.approx(1, abs=1e-5)
    assert max(layer.norm for layer in result.layers) < 1e-5


def test_peft_computes_the_weighted_sum(tmp_path):
    peft = pytest.importorskip("peft")
    folders = []
    for seed in (2, 3):
        adapters = ra.attach(make_llama(), rank=3)
        randomize(adapters, seed)
        folders.append(ra.save(adapters, tmp_path / f"{seed}"))
    theirs = peft.PeftModel.from_pretrained(make_llama(), folders[0], adapter_name="a")
    theirs.load_adapter(folders[1], "b")
    theirs.add_weighted_adapter(["a", "b"], [0.6, 0.5], "both", combination_type="cat")
    theirs.set_adapter("both")
    expected = logits_of(theirs)
    ra.compose(folders, [0.6, 0.5], out=tmp_path / "sum")
    again = logits_of(peft.PeftModel.from_pretrained(make_llama(), tmp_path / "sum"))
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combination", ["ties", "dare_linear", "dare_ties"])
def test_combinations_are_pefts_own_and_their_error_is_true(combination, tmp_path):
    utils = pytest.importorskip("peft.utils.merge_utils")
    folders = pair(tmp_path)
    parts = [dense(f) for f in folders]
    result = ra.compose(folders, [0.7, 0.4], out=tmp_path / "out", combination=combination, density=0.6, seed=5)
    target = {}
    for number, name in enumerate(parts[0]):
        torch.manual_seed(5 + number)
        target[name] = getattr(utils, combination)([p[name].float() for p in parts], torch.tensor([0.7, 0.4]), 0.6)
    target = {n: w.double() for n, w in target.items()}
    assert error_of(target, dense(tmp_path / "out")) == pytest.approx(result.error, abs=1e-5)
    assert 0.01 < result.error < 0.9


def test_interference_tells_orthogonal_from_shared(tmp_path):
    eye = torch.eye(12)
    layers = [{"a.q": (eye[:2, :10], eye[:, :2])}, {"a.q": (eye[2:4, :10], eye[:, :2] + 0)}]
    folders = [write_peft(tmp_path / f"{i}", each) for i, each in enumerate(layers)]
    (meeting,) = ra.compose(folders).extra["interference"]["a.q"]
    assert meeting["output_angles"] == pytest.approx([0, 0], abs=1e-6)
    assert meeting["input_angles"] == pytest.approx([90, 90])
    assert meeting["output_overlap"] == pytest.approx(1)
    assert [meeting["input_overlap"], meeting["alignment"]] == pytest.approx([0, 0], abs=1e-12)
    assert ra.compose([folders[0]] * 2).extra["interference"]["a.q"][0]["alignment"] == pytest.approx(1)


def test_principal_angles_are_right_where_they_are_small():
    angles = torch.tensor([1e-7, 0.3, 1.2], dtype=torch.float64)
    one = torch.eye(6, dtype=torch.float64)[:, :3]
    two = torch.zeros(6, 3, dtype=torch.float64)
    two[range(3), range(3)], two[range(3, 6), range(3)] = angles.cos(), angles.sin()
    torch.testing.assert_close(principal_angles(one, two), torch.rad2deg(angles), rtol=1e-6, atol=1e-12)


def test_heads_are_equal_chosen_or_left_out(tmp_path):
    heads = [{"classifier.weight": torch.full((2, 3), float(i))} for i in (1, 3)]
    layers = random_layers(0)
    folders = [
        write_peft(tmp_path / f"{i}", layers, heads=h, modules_to_save=["classifier"]) for i, h in enumerate(heads)
    ]
    with pytest.raises(AdapterFileError, match="heads='first'"):
        ra.compose(folders, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    from safetensors.torch import load_file

    for how, value in (("first", 1.0), ("average", 2.0), ("none", None)):
        ra.compose(folders, out=tmp_path / how, heads=how)
        held = load_file(tmp_path / how / "adapter_model.safetensors").get("base_model.model.classifier.weight")
        saved = json.loads((tmp_path / how / "adapter_config.json").read_text())["modules_to_save"]
        assert (held is None and saved is None) if value is None else (held == value).all() and saved == ["classifier"]
    ra.compose([folders[0]] * 2, out=tmp_path / "same")


def test_weights_of_the_base_say_more_than_its_name(tmp_path):
    folders = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        model.name_or_path = f"./model{number}"
        adapters = ra.attach(model, rank=2)
        randomize(adapters)
        folders.append(ra.save(adapters, tmp_path / str(number)))
    ra.compose(folders[:2])
    with pytest.raises(AdapterFileError, match="different bases: the frozen weights differ"):
        ra.compose([folders[0], folders[2]], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ra.compose([folders[0], folders[2]], same_base=True)


def test_unlike_adapters_are_refused_and_leave_nothing_behind(tmp_path):
    one, two = pair(tmp_path)
    layers = random_layers(0)
    wider = {n: (torch.cat([a, a], 1), b) for n, (a, b) in layers.items()}
    fewer = dict(list(layers.items())[:-1])
    cases = [
        (write_peft(tmp_path / "base", layers, base_model_name_or_path="another"), "base model 'another'", {}),
        (write_peft(tmp_path / "wider", wider), "different bases: layer0.dense", {}),
        (write_peft(tmp_path / "fewer", fewer), "missing='zero'", {}),
        (write_peft(tmp_path / "conv", layers, fan_in_fan_out=True), "fan_in_fan_out", {}),
    ]
    out = tmp_path / "out"
    for other, words, options in cases:
        with pytest.raises(AdapterFileError, match=words):
            ra.compose([one, other], out=out, **options)
        assert not out.exists()
    ra.compose([one, cases[0][0]], same_base=True)
    for arguments in (
        {"weights": [1]}, {"weights": [1, float("nan")]}, {"combination": "svd"}, {"heads": "last"},
        {"missing": "skip"}, {"combination": "ties", "density": 0}, {"layout": "odd"}, {"out": two},
    ):
        with pytest.raises(ConfigError):
            ra.compose([one, two], **{"out": out, **arguments})
        assert not out.exists()


def test_a_layer_that_one_lacks_may_count_as_zero(tmp_path):
    layers = random_layers(0)
    one = write_peft(tmp_path / "one", layers)
    two = write_peft(tmp_path / "two", dict(list(layers.items())[:-1]))
    ra.compose([two, one], [1, 2], out=tmp_path / "out", missing="zero")
    parts = dense(two), dense(one)
    target = {n: 2 * w + parts[0].get(n, 0 * w) for n, w in parts[1].items()}
    assert error_of(target, dense(tmp_path / "out")) < 2e-6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert all(__import__("re").fullmatch(config["target_modules"], name) for name in layers)


@pytest.mark.parametrize("combination", ["sum", "ties"])
def test_a_control_has_partners_of_the_same_sizes_that_have_learned_nothing(combination, tmp_path):
    if combination == "ties":
        pytest.importorskip("peft")
    folders = [*pair(tmp_path), write_peft(tmp_path / "three", random_layers(0), alpha=3)]
    how = {"budget": ra.RankBudget(ranks=5), "combination": combination}
    ra.compose(folders, [1, 0, 0], out=tmp_path / "first", combination=combination)
    results = [ra.compose(folders, out=tmp_path / str(n), control=seed, **how) for n, seed in enumerate((7, 7, 8))]
    written = [(tmp_path / str(n) / "adapter_model.safetensors").read_bytes() for n in range(3)]
    assert written[0] == written[1] != written[2]
    assert all(sum(result.ranks.values()) == 5 for result in results)
    assert json.loads((tmp_path / "0" / "compose.json").read_text())["control"] == 7
    # alone, a partner has the singular values of the one it stands for, and other directions
    ra.compose(folders, [0, 1, 0], out=tmp_path / "random", control=7)
    whole, random = dense(folders[1]), dense(tmp_path / "random")
    for name in whole:
        values = [torch.linalg.svdvals(each[name]) for each in (whole, random)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    assert error_of(whole, random) > 0.5
    # the first one is itself
    ra.compose(folders, [1, 0, 0], out=tmp_path / "itself", control=7)
    assert error_of(dense(folders[0]), dense(tmp_path / "itself")) < 1e-5


def test_controls_that_make_no_sense_are_refused(tmp_path):
    one, two = pair(tmp_path)
    with pytest.raises(ConfigError, match="one adapter"):
        ra.compose([one], control=0)
    for seed in (-1, 0.5, True):
        with pytest.raises(ConfigError, match="control"):
            ra.compose([one, two], control=seed)
