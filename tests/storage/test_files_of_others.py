"""Files of other tools, and files that mean harm: read exactly, or refused in one sentence and in no time."""

from __future__ import annotations

import json
import os
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankalloc as ra
from rankalloc.errors import AdapterFileError, ConfigError, RankallocError
from rankalloc.experiments.config import load_config
from rankalloc.layers import native
from rankalloc.storage.key_names import METADATA_KEY, kohya_key
from rankalloc.storage.patterns import by_pattern
from rankalloc.storage.peft_keys import COMPUTES_OTHERWISE, OF_TRAINING, READ
from rankalloc.storage.skeletons import build_skeleton
from rankalloc.training.environment import git_hash
from tests.support.models import make_llama, make_mlp, prune, randomize

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
PATIENCE = 20
"""Seconds: what is refused here would otherwise take hours, and a busy machine takes a few."""


@pytest.fixture
def folder(tmp_path):
    adapters = ra.attach(make_mlp(), rank=3)
    randomize(adapters)
    return ra.save(adapters, tmp_path / "a")


def configured(folder, text=None, **keys):
    """The adapter with other keys in its configuration, as if its tool had written them."""
    path = folder / "adapter_config.json"
    path.write_text(text or json.dumps({**json.loads(path.read_text()), **keys}))
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})
    return folder


# --- keys of PEFT's that this version does not know -------------------------------------------------------------


@pytest.mark.parametrize("key", [*COMPUTES_OTHERWISE, "use_something_new", "lora_magnitude"])
def test_a_key_that_makes_something_else_of_a_lora_is_refused_by_its_name(key, folder):
    with pytest.raises(AdapterFileError, match=key) as caught:
        ra.FinishedAdapter(configured(folder, **{key: [[1, 2]]}))
    assert "\n" not in str(caught.value)
    for unset in (None, False, [], {}, 0):
        ra.FinishedAdapter(configured(folder, **{key: unset}))


def test_all_keys_of_the_peft_that_is_here_are_known():
    peft = pytest.importorskip("peft")
    for kind in (peft.LoraConfig, peft.AdaLoraConfig):
        unknown = set(kind.__dataclass_fields__) - READ - OF_TRAINING - set(COMPUTES_OTHERWISE)
        assert not unknown, unknown


# --- diffusers' header, convolutions, names of text encoders, lycoris -------------------------------------------


@pytest.mark.parametrize(("config", "scales"), [
    ({"r": 4, "lora_alpha": 8}, (2, 2)), ({"r": 4, "lora_alpha": 8, "use_rslora": True}, (4, 4)),
    ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"2": 12}}, (1, 3)),
    ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"^2": 2}, "rank_pattern": {"^0": 4}}, (1, 0.5)),
])  # fmt: skip
def test_the_scales_in_a_header_of_diffusers_are_read(config, scales, tmp_path):
    torch.manual_seed(0)
    pairs = {"0": (torch.randn(4, 16), torch.randn(24, 4)), "2": (torch.randn(4, 24), torch.randn(24, 4))}
    tensors = {
        f"unet.{name}.lora_{part}.weight": tensor
        for name, pair in pairs.items() for part, tensor in zip("AB", pair, strict=True)
    }
    about = {METADATA_KEY: json.dumps({f"unet.{key}": value for key, value in config.items()})}
    save_file(tensors, tmp_path / "f.safetensors", about)
    ra.import_lora(tmp_path / "f.safetensors", make_mlp(), tmp_path / "a")
    adapters = ra.load(make_mlp(), tmp_path / "a")
    for (name, (a, b)), scale in zip(pairs.items(), scales, strict=True):
        torch.testing.assert_close(adapters.modules[name].delta_weight(), b @ a * scale, rtol=1e-4, atol=1e-4)
        layer = next(la for la in ra.check(tmp_path / "f.safetensors").layers if la.name.endswith(f".{name}"))
        assert layer.norm == pytest.approx(float((b @ a * scale).norm()), rel=1e-4)
    for broken in ("{", "[1]", json.dumps({"unet.lora_alpha": "many"}), json.dumps({"unet.use_dora": True})):
        save_file(tensors, tmp_path / "f.safetensors", {METADATA_KEY: broken})
        with pytest.raises(AdapterFileError, match="header"):
            ra.import_lora(tmp_path / "f.safetensors", make_mlp(), tmp_path / "b")


class Net(nn.Module):
    """A text encoder as transformers 5 names it, and what Stable Diffusion has around its attention."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": nn.Linear(6, 6)})])})
        self.proj_in, self.proj = nn.Conv2d(6, 4, 1), nn.Linear(4, 3)
        self.conv = nn.Conv1d(3, 5, 1)

    def forward(self, x):
        x = self.encoder["layers"][0]["self_attn"](x)
        x = self.proj_in(x[:, :, None, None])[:, :, 0, 0]
        return self.conv(self.proj(x)[:, :, None])[:, :, 0]


def net():
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("form", ["kohya", "diffusers", "lycoris", "flattened", "peft"])
def test_convolutions_of_one_pixel_and_text_encoders_go_both_ways(form, tmp_path):
    model = net()
    adapters = ra.attach(model, rank=3, target_modules=["self_attn", "proj_in", "proj", "conv"], modules_to_save=[])
    randomize(adapters)
    prune(adapters, (3, 2, 1, 2))
    path = ra.save(adapters, tmp_path / "a")
    out = tmp_path / "f.safetensors"
    prefix = {"kohya": "lora_te", "diffusers": "unet", "peft": "text_encoder"}.get(form, "lora_unet")
    ra.export(path, out, format="diffusers" if form in ("diffusers", "peft") else "kohya", prefix=prefix)
    tensors = load_file(out)
    if form == "kohya":
        assert "lora_te_text_model_encoder_layers_0_self_attn.lora_down.weight" in tensors
    if form == "lycoris":
        tensors = {key.replace("lora_unet", "lycoris"): t for key, t in tensors.items()}
    if form == "flattened":  # some tools leave the kernels of one pixel out
        tensors = {key: t.flatten(1) if t.dim() > 2 else t for key, t in tensors.items()}
    if form == "peft":
        tensors = {key.replace("encoder.layers", "text_model.encoder.layers"): t for key, t in tensors.items()}
    save_file(tensors, out)
    ra.import_lora(out, net(), tmp_path / "b")
    stored = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert stored["base_model.model.proj_in.lora_A.weight"].shape[1:] == (6, 1, 1)
    again = net()
    ra.load(again, tmp_path / "b")
    x = torch.randn(5, 6)
    torch.testing.assert_close(again(x), model(x), **CLOSE)
    peft = pytest.importorskip("peft")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path / "b")(x), model(x), **CLOSE)


def test_only_a_text_encoders_own_layers_are_inside_its_text_model():
    assert kohya_key("encoder.layers.0.mlp.fc1", "lora_te1") == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert kohya_key("text_model.encoder.layers.0.mlp.fc1", "lora_te") == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert kohya_key("encoder.layers.0", "lora_unet") == "lora_unet_encoder_layers_0"


# --- a layer without ranks is the same in every layout ----------------------------------------------------------


@pytest.mark.parametrize("layouts", [("uniform", "compact"), ("compact", "uniform"), ("one-alpha", "uniform")])
def test_a_layer_of_rank_0_is_one_without_ranks_whatever_the_layout(layouts, tmp_path):
    deltas, paths = [], []
    for seed, layout in enumerate(layouts):
        adapters = ra.attach(make_llama(), rank=3)
        randomize(adapters, seed=seed)
        prune(adapters, [(i + 2 * seed) % 3 for i in range(len(adapters))])
        paths.append(ra.save(adapters, tmp_path / layout, layout))
        deltas.append({name: a.delta_weight().detach() for name, a in adapters.modules.items()})
    ra.compose(paths, [1, -2], out=tmp_path / "sum", missing="zero")
    both = ra.load(make_llama(), tmp_path / "sum")
    for name, adapter in both.modules.items():
        torch.testing.assert_close(adapter.delta_weight(), deltas[0][name] - 2 * deltas[1][name], rtol=1e-4, atol=1e-4)
    # adapters that differ in nothing but how a layer without ranks is written need no permission
    twin = ra.export(paths[0], tmp_path / "twin", layout="compact" if layouts[0] == "uniform" else "uniform")
    assert ra.compose([paths[0], twin], [1, 1]).error < 1e-6
    with pytest.raises(AdapterFileError, match="pass missing='zero'"):
        ra.compose(paths)


# --- what would make the reader work for ever -------------------------------------------------------------------


BOMB = "a: &a [" + ", ".join("x" * 9) + "]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]\n" for before, one in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [
    BOMB, "a: &a [*a]\n", "training: {steps: " + "9" * 5000 + "}\n", "x: " + "[" * 20_000, "{" * 5000 + "}" * 5000,
], ids=["aliases", "a list in itself", "digits", "brackets", "braces"])  # fmt: skip
def test_a_configuration_that_would_never_end_is_refused_at_once(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    began = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml", [])
    assert time.perf_counter() - began < PATIENCE and len(str(caught.value)) < 500


def test_a_few_aliases_are_fine(tmp_path):
    (tmp_path / "c.yaml").write_text("adapter: &x {rank: 5}\nbudget: {fraction: 0.5}\n")
    assert load_config(tmp_path / "c.yaml", []).adapter.rank == 5


@pytest.mark.parametrize("key", [
    "(([a-z._]+)+)+!", "(a.|.a)*b", "(.*)(.*)(.*)(.*)(.*)!", r"(\w+\s?)*!", "(?:(?:a{1,20}){1,20}){1,20}!",
    "(.)\\1*", "(", "x" * 5000,
], ids=["nested", "branches", "many", "words", "counted", "backreference", "no pattern", "long"])  # fmt: skip
def test_a_pattern_that_may_take_for_ever_is_not_tried(key, folder):
    began = time.perf_counter()
    with pytest.raises(AdapterFileError, match="cannot be read") as caught:
        ra.FinishedAdapter(configured(folder, rank_pattern={key: 3}))
    assert time.perf_counter() - began < PATIENCE and len(str(caught.value)) < 500


@pytest.mark.parametrize("key", [
    "0", "^0", r"layers\.[0-3]\..*_proj", "(query|key|value)", ".*dense", r"\w+\.0(\.weight)?",
])  # fmt: skip
def test_patterns_that_people_write_mean_what_they_mean_in_peft(key):
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    for name in ("0", "layers.2.q_proj", "a.query", "b.output.dense", "x.0.weight", "layers.7.k_proj"):
        found = get_pattern_key([key], name)
        assert by_pattern({key: 5}, name, None) == (5 if found != name or key == name else None), name


@pytest.mark.parametrize("text", [
    "[" * 100_000 + "]" * 100_000, '{"peft_type": "LORA", "r": ' + "1" * 5000 + "}",
    '{"peft_type": "LORA", "r": 1e999}', '{"peft_type": "LORA", "lora_alpha": 1' + "0" * 400 + "}",
], ids=["deep", "digits", "infinite", "too large"])  # fmt: skip
def test_an_adapters_configuration_that_is_no_configuration_is_one_sentence(text, folder):
    began = time.perf_counter()
    with pytest.raises(AdapterFileError) as caught:
        ra.FinishedAdapter(configured(folder, text))
    assert time.perf_counter() - began < PATIENCE and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("spoil", [
    {"num_hidden_layers": 10**7}, {"model_type": "mixtral", "num_local_experts": 10**6}, {"num_hidden_layers": 10**9},
])  # fmt: skip
def test_a_model_of_too_many_layers_is_not_built(spoil, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**make_llama().config.to_dict(), **spoil}))
    began = time.perf_counter()
    with pytest.raises(ConfigError, match="no model has more than"):
        build_skeleton(str(tmp_path))
    assert time.perf_counter() - began < PATIENCE


def test_padding_without_end_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="65536"):
        ra.export(folder, tmp_path / "b", pad_to=10**9)
    assert not (tmp_path / "b").exists()


# --- code from where we are -------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [
    "core.fsmonitor", "filter.x.clean", "diff.external", "core.hooksPath", "include.path",
])  # fmt: skip
def test_git_starts_nothing_that_the_folder_names(setting, tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                       capture_output=True)

    git("init")
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / ".gitattributes").write_text("*.txt filter=x diff=x\n")
    git("add", ".")
    git("commit", "-m", "one")
    (tmp_path / "a.txt").write_text("2")
    script = tmp_path / "script.sh"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\ncat\n")
    script.chmod(0o755)
    (tmp_path / "more").write_text(f"[filter \"x\"]\n\tclean = {script}\n")
    named = {"include.path": tmp_path / "more", "core.hooksPath": tmp_path}.get(setting, script)
    git("config", setting, str(named))
    os.utime(tmp_path / "a.txt", (1, 1))
    monkeypatch.chdir(tmp_path)
    assert len(git_hash().removesuffix("+changes")) == 40
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["file", "folder", "around"])
def test_a_kernel_that_others_can_write_is_not_loaded(place, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    path = native.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no library")
    {"file": path, "folder": path.parent, "around": path.parent.parent}[place].chmod(0o777)
    native.fused_linear.cache_clear()
    try:
        with caplog.at_level("WARNING"):
            assert native.fused_linear() is None
        assert "can be written by others" in caplog.text
        for one in (path, path.parent, path.parent.parent):
            one.chmod(0o755)
        assert native._only_ours(path)
    finally:
        native.fused_linear.cache_clear()


def test_what_is_refused_leaves_nothing_behind(folder, tmp_path):
    configured(folder, use_dora=True)
    for attempt in (
        lambda out: ra.export(folder, out), lambda out: ra.shrink(folder, ra.RankBudget(ranks=1), out),
        lambda out: ra.compose([folder, folder], out=out),
    ):
        with pytest.raises(RankallocError, match="use_dora"):
            attempt(tmp_path / "out")
        assert not (tmp_path / "out").exists()
