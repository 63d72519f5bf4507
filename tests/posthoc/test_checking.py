"""What check says of an adapter is what the tools that it names would do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import rankalloc as ra
from rankalloc.cli import app
from rankalloc.errors import AdapterFileError, RankallocError
from rankalloc.report.checked import render_check, write_check
from tests.support.models import make_bert, make_llama, make_mlp, prune, randomize

RANKS = (3, 0, 1, 4, 2)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def saved(folder, make=make_llama, ranks=RANKS, seed=2, layout=None, **attach):
    adapters = ra.attach(make(), rank=4, **attach)
    randomize(adapters, seed=seed)
    if ranks:
        prune(adapters, [ranks[i % len(ranks)] for i in range(len(adapters))])
    return ra.save(adapters, folder, layout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("checked") / "a", layout="uniform")


def test_the_curve_is_what_shrink_does(folder, tmp_path):
    found = ra.check(folder)
    assert found.curve[0] == (0, 0.0) and found.curve[-1] == (found.params, pytest.approx(1.0))
    for params, kept in found.curve[1::7]:
        result = ra.shrink(folder, ra.RankBudget(params=params))
        assert result.params == params
        assert result.error == pytest.approx(max(0.0, 1 - kept**2) ** 0.5, abs=1e-5)
    for share, params in found.keeping.items():
        assert ra.shrink(folder, ra.RankBudget(params=params), tmp_path / "s").error <= (1 - share**2) ** 0.5 + 1e-5
        assert found.kept(params) >= share - 1e-9 or found.kept(params) > 0.5  # the curve is drawn at fewer points


def test_what_can_go_for_free_goes_without_loss(folder, tmp_path):
    found = ra.check(folder)
    assert found.stored == 4 * sum(layer.d_in + layer.d_out for layer in found.layers)  # padded to one rank
    assert found.params < found.stored and any("directions are zero" in alert for alert in found.alerts)
    result = ra.shrink(folder, ra.RankBudget(params=found.params), tmp_path / "free")
    assert result.error < 1e-6
    assert ra.check(tmp_path / "free").stored == found.params
    assert {layer.name: layer.used for layer in found.layers} == ra.load(make_llama(), folder).ranks()


def test_directions_that_repeat_are_found(tmp_path):
    adapters = ra.attach(make_mlp(), rank=4)
    randomize(adapters)
    one, two, three = adapters
    with torch.no_grad():
        one.Q[1] = one.Q[0]  # the sum of two is one
        two.lam.zero_()
        three.P[:, 2:] = 0
    found = ra.check(ra.save(adapters, tmp_path / "a", "uniform"))
    assert [layer.used for layer in found.layers] == [3, 0, 2]
    assert any("1 and 0 more" not in alert and "of 3 layers do nothing" in alert for alert in found.alerts)
    assert 2 < found.layers[0].effective <= 3 and found.layers[1].effective == 0
    with torch.no_grad():
        for adapter in adapters:
            adapter.lam.zero_()
    never = ra.check(ra.save(adapters, tmp_path / "b", "uniform"))
    assert never.alerts[-1].startswith("every update is zero") and never.params == 0 and not never.keeping


def test_other_forms_are_checked_too(tmp_path, folder):
    """kohya's and diffusers' files, a run's folder, AdaLoRA of PEFT's, heads, convolutions and embeddings."""
    whole = ra.check(folder)
    for form, name in (("kohya", "lora_te"), ("diffusers", "text_encoder")):
        ra.export(folder, tmp_path / "f.safetensors", format=form, prefix=name)
        found = ra.check(tmp_path / "f.safetensors")
        assert found.params == whole.params and found.readers == [] and "one file" in found.kind
        assert sorted(layer.norm for layer in found.layers if layer.norm) == pytest.approx(
            sorted(layer.norm for layer in whole.layers if layer.norm), rel=1e-4
        )
    bert = ra.check(saved(tmp_path / "bert", make_bert))
    assert sum(bert.heads.values()) == 5 * 33 and not next(r for r in bert.readers if r.reader == "vllm").right
    torch.manual_seed(0)

    def make():
        return torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.Conv2d(8, 6, 1), torch.nn.Flatten(), torch.nn.Linear(6, 3)
        )

    model = make()
    adapters = ra.attach(model, rank=2, target_modules=["0", "1", "3"], modules_to_save=[])
    randomize(adapters)
    found = ra.check(ra.save(adapters, tmp_path / "conv"))
    norms = {layer.name: layer.norm for layer in found.layers}
    for name in ("1", "3"):
        assert norms[name] == pytest.approx(adapters.modules[name].delta_weight().norm().item(), rel=1e-4)


def test_several_adapters_and_how_they_interfere(folder, tmp_path):
    twin = ra.export(folder, tmp_path / "twin")
    other = saved(tmp_path / "other", seed=9, ranks=(2,))
    found = ra.check(folder, twin, other)
    same, first, second = found.interference
    assert same["alignment"] == pytest.approx(1, abs=1e-5) and same["output_overlap"] == pytest.approx(1, abs=1e-5)
    assert abs(first["alignment"]) < 0.5
    assert abs(second["alignment"]) < 0.5 and second["first"].endswith("twin")
    with pytest.raises(AdapterFileError, match="not of one base"):
        ra.check(saved(tmp_path / "x", make_mlp), saved(tmp_path / "y", lambda: make_mlp(hidden=20)))


def test_the_command_and_its_page(folder, tmp_path):
    done = run("check", folder, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    for words in ("can go without any loss: rankalloc shrink", "99% of ‖ΔW‖", "--max-lora-rank 8", "self_attn.q_proj"):
        assert words in done.stdout, words
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure") == 3 and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert json.loads(run("check", folder, "--json").stdout)["params"] == ra.check(folder).params
    again = ra.check(folder).record()
    assert render_check(again) == page.rstrip("\n")
    again["layers"][0]["name"] = "<script>alert(1)</script>"
    assert "<script>alert" not in render_check(again)
    with pytest.raises(RankallocError, match="ending in .html"):
        write_check(again, tmp_path / "page.txt")
    for given, words in (
        (tmp_path / "nowhere", "nowhere"), (tmp_path / "page.html", "page.html"), (damaged(folder, tmp_path), "NaN"),
    ):
        refused = run("check", given)
        assert refused.exit_code in (1, 2) and words in refused.stderr and "Traceback" not in refused.stderr


def damaged(folder, tmp_path):
    bad = ra.export(folder, tmp_path / "bad")
    tensors = load_file(bad / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, bad / "adapter_model.safetensors")
    return bad
