"""``rankalloc ls targets``: what is adapted in a model, what trains whole, what stays frozen and why."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from rankalloc.cli.app import app
from tests.support.architectures import ARCHITECTURES


def run(name, folder, *options, file=""):
    ARCHITECTURES[name].config().save_pretrained(folder)
    done = CliRunner().invoke(app, ["ls", "targets", str(folder / file), *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_what_stays_frozen_is_listed_with_its_reason(tmp_path):
    found = json.loads(run("siglip", tmp_path, "--json"))
    why = {group["suffix"]: (group["weights"], group["shape"], group["why"]) for group in found["frozen"]}
    assert why["vision_model.head.attention.in_proj_weight"][:2] == (1, [96, 32])
    assert why["text_model.embeddings.token_embedding"] == (
        1, [64, 32], "an embedding: adapted if target_modules names it"
    )
    assert 0.9 < found["coverage"] < 0.91 and found["architecture"] == "SiglipModel"
    shown = run("siglip", tmp_path)
    assert "27 layers can be adapted, 90.2 % of the weights of linear layers" in shown
    assert "left frozen:" in shown and "nn.MultiheadAttention keeps the weights" in " ".join(shown.split())


def test_a_configuration_file_is_enough(tmp_path):
    shown = run("bert", tmp_path, file="config.json")
    assert "13 layers can be adapted, 100 % of the weights of linear layers" in shown
    assert "heads, trained whole: classifier (99 parameters)" in shown


def test_a_model_in_which_nothing_is_adapted_by_default_is_shown_all_the_same(tmp_path):
    found = json.loads(run("resnet", tmp_path, "--json"))
    assert found["groups"] == [] and found["coverage"] == 0 and found["heads"] == {"classifier": 99}
    assert sum(group["weights"] for group in found["frozen"]) == 7
    assert "running statistics" in found["notes"][0] and "convolution (7)" in found["notes"][1]
    assert "0 layers can be adapted, 0 % of" in run("resnet", tmp_path)
