"""Adapters in other tools' forms: what servers, kohya's scripts, diffusers and llama.cpp read, and back again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankalloc as ra
from rankalloc.errors import AdapterFileError, ConfigError, RankallocError
from rankalloc.storage import plain_lora
from rankalloc.storage.folder import CONFIG_NAME, WEIGHTS_NAME
from rankalloc.storage.reader_facts import verdicts
from tests.support.models import MAKERS, logits_of, make_bert, make_llama, make_mlp, prune, randomize

peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RANKS = (3, 0, 1, 4, 2)


def adapted(tmp_path, name="llama", layout="uniform", **options):
    """(logits of the adapted model, its ranks), saved in tmp_path / "a"."""
    model = MAKERS[name]()
    adapters = ra.attach(model, rank=4, alpha=6, **options)
    randomize(adapters)
    prune(adapters, [RANKS[i % len(RANKS)] for i in range(len(adapters))])
    ra.save(adapters, tmp_path / "a", layout)
    return logits_of(model), adapters.ranks()


def delta_applied(model, deltas):
    """The model with {module: ΔW} added: a reader of a file that knows nothing but tensors."""
    with torch.no_grad():
        for name, delta in deltas.items():
            module = model.get_submodule(name)
            module.weight += delta.T if type(module).__name__ == "Conv1D" else delta
    return logits_of(model)


# --- layouts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["uniform", "compact", "one-alpha"])
@pytest.mark.parametrize("layout, pad_to", [("uniform", 1), ("uniform", 8), ("compact", 1), ("one-alpha", 1)])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_an_export_computes_the_same_here_and_in_peft(name, source, layout, pad_to, tmp_path):
    expected, ranks = adapted(tmp_path, name, source)
    assert ra.export(tmp_path / "a", tmp_path / "b", layout=layout, pad_to=pad_to) == tmp_path / "b"
    there = peft.PeftModel.from_pretrained(MAKERS[name](), tmp_path / "b")
    torch.testing.assert_close(logits_of(there), expected, **CLOSE)
    again = MAKERS[name]()
    loaded = ra.load(again, tmp_path / "b").ranks()
    assert {n: r for n, r in loaded.items() if r} == {n: r for n, r in ranks.items() if r}
    torch.testing.assert_close(logits_of(again), expected, **CLOSE)
    tensors = load_file(tmp_path / "b" / WEIGHTS_NAME)
    stored = {t.shape[0] for k, t in tensors.items() if "lora_A" in k}
    assert stored == ({-(-4 // pad_to) * pad_to} if layout == "uniform" else {1, 2, 3, 4})


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_a_base_in_bfloat16(layout, tmp_path):
    model = make_llama().bfloat16()
    adapters = ra.attach(model, rank=4, alpha=6)
    randomize(adapters)
    for adapter in adapters:
        adapter.scaling *= 0.2
    ra.save(adapters, tmp_path / "a")
    ra.export(tmp_path / "a", tmp_path / "b", layout=layout)
    there = peft.PeftModel.from_pretrained(make_llama().bfloat16(), tmp_path / "b")
    assert (logits_of(model) - logits_of(make_llama().bfloat16())).abs().max() > 0.05
    torch.testing.assert_close(logits_of(there), logits_of(model), rtol=1e-2, atol=1e-2)


def test_a_lora_of_pefts_own_is_exported_with_its_scales_folded_in(tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2},
        alpha_pattern={"up_proj": 7}, use_rslora=True, init_lora_weights=False,
    )
    model = peft.get_peft_model(make_llama(), config).eval()
    model.save_pretrained(tmp_path / "a")
    ra.export(tmp_path / "a", tmp_path / "b", pad_to=8)
    config = json.loads((tmp_path / "b" / CONFIG_NAME).read_text())
    assert config["r"] == config["lora_alpha"] == 8 and not config["rank_pattern"] and not config["use_rslora"]
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]
    there = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "b")
    torch.testing.assert_close(logits_of(there), logits_of(model), **CLOSE)


@pytest.mark.parametrize("layout", ["uniform", "compact", "one-alpha"])
def test_readers_with_a_simpler_rule(layout, tmp_path):
    """One global alpha / r, and llama.cpp's alpha over each tensor's own rank: both are right in the uniform layout.

    llama.cpp's converter takes lora_alpha from adapter_config.json alone, and its runtime divides it by the columns
    of lora_b.
    """
    expected, _ = adapted(tmp_path)
    ra.export(tmp_path / "a", tmp_path / "b", layout=layout)
    config = json.loads((tmp_path / "b" / CONFIG_NAME).read_text())
    tensors = load_file(tmp_path / "b" / WEIGHTS_NAME)
    pairs = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (a, tensors[key.replace("_A", "_B")])
        for key, a in tensors.items() if key.endswith(".lora_A.weight")
    }
    rules = {
        "global": lambda a, b: config["lora_alpha"] / config["r"],
        "llama.cpp": lambda a, b: config["lora_alpha"] / b.shape[1],
    }
    got = {
        rule: delta_applied(make_llama(), {n: scale(a, b) * b @ a for n, (a, b) in pairs.items()})
        for rule, scale in rules.items()
    }
    right = {rule: bool((logits - expected).abs().max() < 1e-4) for rule, logits in got.items()}
    assert right == {"global": layout != "one-alpha", "llama.cpp": layout != "compact"}
    said = {one.reader: one.right for one in verdicts(ra.FinishedAdapter(tmp_path / "b"))}
    assert [said[name] for name in ("peft", "vllm", "llama.cpp")] == [True, True, right["llama.cpp"]]
    older = next(one for one in verdicts(ra.FinishedAdapter(tmp_path / "b")) if one.reader == "vllm")
    assert ("before 0.32" in older.why) == (not right["global"])  # since then it reads the patterns


def test_options_that_do_not_fit_are_named_and_write_nothing(tmp_path):
    adapted(tmp_path)
    for options, word in [
        ({"layout": "dense"}, "layout"), ({"layout": "compact", "pad_to": 8}, "8"), ({"pad_to": 0}, "0"),
        ({"format": "ggml"}, "kohya"), ({"format": "kohya", "prefix": "unet"}, "lora_unet"),
        ({"format": "kohya"}, ".safetensors"), ({"format": "gguf"}, ".gguf"), ({"format": "diffusers"}, ".safetensors"),
        ({"reader": "ollama"}, "vllm"), ({"reader": "vllm", "layout": "uniform"}, "and not both"),
        ({"reader": "tgi", "pad_to": 4}, "and not both"), ({"pad_to": 10**9}, "65536"),
    ]:
        with pytest.raises(ConfigError, match=word):
            ra.export(tmp_path / "a", tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


# --- kohya and diffusers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_to_kohya_and_back(name, tmp_path):
    expected, ranks = adapted(tmp_path, name)
    ra.export(tmp_path / "a", tmp_path / "k.safetensors", format="kohya", prefix="lora_te")
    tensors = load_file(tmp_path / "k.safetensors")
    downs = {k: t for k, t in tensors.items() if k.endswith(".lora_down.weight")}
    held = [full for full, rank in ranks.items() if rank]
    # ranks differ, so that no alphas stand beside them, and what has none is left out
    assert len(tensors) == 2 * len(held) == 2 * len(downs) < 2 * len(ranks)
    # kohya's own rule: up @ down times alpha over the rank of that pair, and an alpha that is missing is that rank
    deltas = {}
    for full in held:
        stem = "lora_te_" + full.replace(".", "_")
        down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
        deltas[full] = up @ down
    torch.testing.assert_close(delta_applied(MAKERS[name](), deltas), expected, **CLOSE)
    with torch.device("meta"):
        skeleton = type(MAKERS[name]())(MAKERS[name]().config)
    ra.import_lora(tmp_path / "k.safetensors", skeleton, tmp_path / "back")
    model = MAKERS[name]()
    assert ra.load(model, tmp_path / "back").ranks() == ranks
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)
    there = peft.PeftModel.from_pretrained(MAKERS[name](), tmp_path / "back")
    torch.testing.assert_close(logits_of(there), expected, **CLOSE)


def test_kohyas_alpha_is_over_each_pairs_own_rank(tmp_path):
    model = make_mlp()
    down, up = torch.randn(2, 16), torch.randn(24, 2)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(0.5)}
    save_file({f"lora_unet_0.{part}": tensor for part, tensor in parts.items()}, tmp_path / "k.safetensors")
    ra.import_lora(tmp_path / "k.safetensors", model, tmp_path / "a")
    adapters = ra.load(model, tmp_path / "a")
    torch.testing.assert_close(adapters.modules["0"].delta_weight(), up @ down * 0.25, **CLOSE)


STYLES = {
    "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "older": ("text_encoder.{}.lora_linear_layer.down.weight", "text_encoder.{}.lora_linear_layer.up.weight"),
    "lora.down": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "bare": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "dotted kohya": ("unet.{}.lora_down.weight", "unet.{}.lora_up.weight"),
}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_names_with_dots(style, tmp_path):
    expected, ranks = adapted(tmp_path)
    lora = plain_lora.read(tmp_path / "a")
    tensors = {}
    for name, pair in lora.pairs.items():
        tensors |= {key.format(name): t.clone() for key, t in zip(style, pair, strict=True)}
    save_file(tensors, tmp_path / "d.safetensors")
    model = make_llama()
    ra.import_lora(tmp_path / "d.safetensors", model, tmp_path / "back")
    ra.load(model, tmp_path / "back")
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)


def two_ways():
    """Two layers that are one in kohya's names."""
    return nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(8, 8)}), "a": nn.ModuleDict({"b_c": nn.Linear(8, 8)})})


def pair(stem, d_in=16, d_out=24, rank=2, ends=("lora_down.weight", "lora_up.weight")):
    return {f"{stem}.{ends[0]}": torch.ones(rank, d_in), f"{stem}.{ends[1]}": torch.ones(d_out, rank)}


@pytest.mark.parametrize(
    "tensors, make, words",
    [
        (pair("lora_unet_a_b_c", 8, 8), two_ways, "could be a_b.c or a.b_c"),
        (pair("lora_unet_nowhere"), make_mlp, "lora_unet_nowhere|nowhere of 1 names fit no layer"),
        (pair("lora_unet_0", 15), make_mlp, "0 is 15 → 24 in the adapter and 16 → 24 here"),
        ({"lora_unet_0.lora_down.weight": torch.ones(2, 16)}, make_mlp, "0 has no lora_up"),
        ({**pair("lora_unet_0"), "lora_unet_0.dora_scale": torch.ones(24)}, make_mlp, "belongs to DoRA"),
        ({"lora_unet_0.hada_w1_a": torch.ones(2, 16)}, make_mlp, "belongs to LoHa"),
        ({**pair("lora_unet_0"), "lora_unet_0.alpha": torch.ones(2)}, make_mlp, "has 2 numbers"),
        ({**pair("lora_unet_0"), "unet.2.lora_A.weight": torch.ones(2, 24)}, make_mlp, "in two ways"),
        ({**pair("lora_unet_0"), **pair("lora_te_0")}, make_mlp, "text_encoder, unet; say with component="),
        ({"lora_unet_0.lora_down.weight": torch.ones(2, 16), "lora_unet_0.lora_up.weight": torch.ones(24, 3)},
         make_mlp, "do not fit each other"),
        ({**pair("lora_unet_0"), "lora_unet_0.lora_up.weight": torch.full((24, 2), torch.nan)}, make_mlp, "NaN or inf"),
        ({"weight": torch.ones(2)}, make_mlp, "a kind of adapter weight that this version does not read"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_nothing_is_written(tensors, make, words, tmp_path):
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(RankallocError, match=words):
        ra.import_lora(tmp_path / "k.safetensors", make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_component_of_several_is_taken_by_name(tmp_path):
    save_file({**pair("lora_unet_0"), **pair("lora_te_9")}, tmp_path / "k.safetensors")
    lora = ra.import_lora(tmp_path / "k.safetensors", make_mlp(), tmp_path / "out", component="unet")
    assert lora.ranks() == {"0": 2}
    with pytest.raises(ConfigError, match="transformer.*text_encoder, unet"):
        ra.import_lora(tmp_path / "k.safetensors", make_mlp(), tmp_path / "out", component="transformer")


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(AdapterFileError, match="no file at"):
        ra.import_lora(tmp_path / "k.safetensors", make_mlp(), tmp_path / "out")
    save_file(pair("lora_unet_0"), tmp_path / "k.safetensors")
    data = (tmp_path / "k.safetensors").read_bytes()
    (tmp_path / "k.safetensors").write_bytes(data[:-20])
    with pytest.raises(AdapterFileError, match="damaged or truncated"):
        ra.import_lora(tmp_path / "k.safetensors", make_mlp(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_kohya_has_no_names_for_is_refused(tmp_path):
    adapted(tmp_path, "bert")
    with pytest.raises(RankallocError, match="trained whole .classifier.*'peft'"):
        ra.export(tmp_path / "a", tmp_path / "k.safetensors", format="kohya")
    adapters = ra.attach(two_ways(), rank=2)
    randomize(adapters)
    ra.save(adapters, tmp_path / "b")
    with pytest.raises(RankallocError, match="would both be lora_unet_a_b_c"):
        ra.export(tmp_path / "b", tmp_path / "k.safetensors", format="kohya")
    assert not (tmp_path / "k.safetensors").exists()


def test_the_base_is_still_named_after_an_export_and_an_import(tmp_path):
    from rankalloc.storage import fingerprint

    adapted(tmp_path)
    ra.export(tmp_path / "a", tmp_path / "b", pad_to=8)
    ra.export(tmp_path / "b", tmp_path / "k.safetensors", format="kohya")
    ra.import_lora(tmp_path / "k.safetensors", make_llama(), tmp_path / "c")
    marks = {fingerprint.read(tmp_path / folder / WEIGHTS_NAME).id for folder in "abc"}
    assert len(marks) == 1 and fingerprint.check(make_llama(), tmp_path / "c" / WEIGHTS_NAME) == "same"


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    adapted(tmp_path)
    for out in "bc":
        ra.export(tmp_path / "a", tmp_path / out, pad_to=8)
        ra.export(tmp_path / "a", tmp_path / f"{out}.safetensors", format="kohya")
    assert (tmp_path / "b" / WEIGHTS_NAME).read_bytes() == (tmp_path / "c" / WEIGHTS_NAME).read_bytes()
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_bert_and_gpt2_say_what_peft_must_know(tmp_path):
    adapted(tmp_path, "gpt2")
    ra.export(tmp_path / "a", tmp_path / "b")
    assert json.loads((tmp_path / "b" / CONFIG_NAME).read_text())["fan_in_fan_out"] is True
    adapted(tmp_path / "x", "bert")
    ra.export(tmp_path / "x" / "a", tmp_path / "c")
    config = json.loads((tmp_path / "c" / CONFIG_NAME).read_text())
    assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "TOKEN_CLS"
    ra.load(make_bert(), tmp_path / "c")
