"""Adapters on disk: the same function in ours and in real PEFT, and a clear sentence for every damaged folder."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankalloc as ra
from rankalloc.adapters.adapter import Adapter
from rankalloc.errors import AdapterFileError, ConfigError, RankallocError, TargetError
from tests.support.models import MAKERS, logits_of, make_bert, make_gpt2, make_llama, make_mlp, prune, randomize

peft = pytest.importorskip("peft")
ROOT = Path(__file__).resolve().parents[2]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def adapted(name: str = "bert", ranks=(3, 0, 1, 4, 2, 0), shrink: bool = True, **options):
    """(model, adapters) with visibly trained weights and mixed ranks, some of them zero."""
    model = MAKERS[name]()
    adapters = ra.attach(model, rank=4, alpha=6, **options)
    randomize(adapters)
    live = [ranks[i % len(ranks)] for i in range(len(adapters))]
    if shrink:
        prune(adapters, live)
    else:
        for adapter, rank in zip(adapters, live, strict=True):
            adapter.drop(torch.arange(adapter.rank) < rank)
    return model, adapters


def in_peft(name: str, folder, make=None):
    model = (make or MAKERS[name])()
    return peft.PeftModel.from_pretrained(model, folder)


def read(folder):
    return json.loads((Path(folder) / "adapter_config.json").read_text()), load_file(
        Path(folder) / "adapter_model.safetensors"
    )


# --- the same function in PEFT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [True, False], ids=["in memory", "held at zero"])
@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_peft_computes_what_we_compute(name, layout, shrink, tmp_path):
    plain = logits_of(MAKERS[name]())
    model, adapters = adapted(name, shrink=shrink)
    ours = logits_of(model)
    assert (ours - plain).abs().max() > 1e-2
    assert ra.save(adapters, tmp_path / "a", layout) == tmp_path / "a"
    torch.testing.assert_close(logits_of(in_peft(name, tmp_path / "a")), ours, **CLOSE)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_uniform_layout_is_right_for_readers_that_know_no_patterns(name, tmp_path):
    model, adapters = adapted(name)
    ra.save(adapters, tmp_path)
    config, tensors = read(tmp_path)
    assert config["r"] == config["lora_alpha"] == 4 and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["use_rslora"] is False and config["bias"] == "none" and config["peft_type"] == "LORA"
    assert {t.shape[0] for k, t in tensors.items() if ".lora_A." in k} == {4}
    assert {t.shape[1] for k, t in tensors.items() if ".lora_B." in k} == {4}
    # a reader with one global scale and nothing else: plain loops over the file
    other = MAKERS[name]()
    with torch.no_grad():
        for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
            module = other.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            delta = tensors[key.replace("lora_A", "lora_B")] @ tensors[key] * (config["lora_alpha"] / config["r"])
            module.weight += delta.T if type(module).__name__ == "Conv1D" else delta
        for head in config["modules_to_save"] or []:
            prefix = f"base_model.model.{head}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            other.get_submodule(head).load_state_dict(state)
    torch.testing.assert_close(logits_of(other), logits_of(model), **CLOSE)
    for key in ("rank_pattern", "alpha_pattern"):
        del config[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits_of(in_peft(name, tmp_path)), logits_of(model), **CLOSE)


def test_the_compact_layout_holds_live_ranks_alone(tmp_path):
    _, adapters = adapted("bert", shrink=False)
    ra.save(adapters, tmp_path, "compact")
    config, tensors = read(tmp_path)
    ranks = {n: r for n, r in adapters.ranks().items() if r}
    stored = {
        k.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): t.shape[0]
        for k, t in tensors.items() if "lora_A" in k
    }
    assert stored == ranks and 0 < len(ranks) < len(adapters)
    assert config["rank_pattern"] == config["alpha_pattern"]
    lora = sum(t.numel() for k, t in tensors.items() if "lora_" in k)
    assert lora == adapters.num_params()


@pytest.mark.parametrize("multiple", [1, 3, 8, 16])
def test_padding_to_what_a_server_wants(multiple, tmp_path):
    model, adapters = adapted()
    ra.save(adapters, tmp_path, pad_multiple=multiple)
    assert read(tmp_path)[0]["r"] == -(-4 // multiple) * multiple
    torch.testing.assert_close(logits_of(in_peft("bert", tmp_path)), logits_of(model), **CLOSE)
    again = make_bert()
    assert ra.load(again, tmp_path).ranks() == adapters.ranks()
    torch.testing.assert_close(logits_of(again), logits_of(model), **CLOSE)


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("ranks", [(0,), (1,), (4,)], ids=["all zero", "all one", "all full"])
def test_the_extremes(layout, ranks, tmp_path):
    model, adapters = adapted("bert", ranks=ranks)
    ra.save(adapters, tmp_path, layout)
    torch.testing.assert_close(logits_of(in_peft("bert", tmp_path)), logits_of(model), **CLOSE)
    again = make_bert()
    loaded = ra.load(again, tmp_path)
    torch.testing.assert_close(logits_of(again), logits_of(model), **CLOSE)
    assert sum(loaded.ranks().values()) == sum(adapters.ranks().values())


class Look(nn.Module):
    """Names that suffix matching and unescaped patterns confuse."""

    def __init__(self):
        super().__init__()
        self.l1, self.l11, self.xl1 = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.sub = nn.ModuleDict({"l1": nn.Linear(16, 16), "lx1": nn.Linear(16, 16)})

    def forward(self, x):
        return self.sub["lx1"](self.sub["l1"](self.xl1(self.l11(self.l1(x)))))


def make_look():
    torch.manual_seed(0)
    return Look().eval()


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("ranks", [(1, 2, 3, 4, 2), (1, 0, 0, 0, 0), (0, 3, 0, 1, 0), (4, 4, 1, 4, 4)])
def test_names_that_contain_each_other(layout, ranks, tmp_path):
    model = make_look()
    adapters = ra.attach(model, rank=4)
    randomize(adapters)
    prune(adapters, ranks)
    ra.save(adapters, tmp_path, layout)
    there = in_peft("", tmp_path, make_look)
    torch.testing.assert_close(logits_of(there), logits_of(model), **CLOSE)
    names = {n for n, m in there.base_model.model.named_modules() if hasattr(m, "lora_A")}
    expected = {n for n, r in adapters.ranks().items() if r or layout == "uniform"}
    assert names == expected
    again = make_look()
    loaded = ra.load(again, tmp_path).ranks()
    assert {n: r for n, r in loaded.items() if r} == {n: r for n, r in adapters.ranks().items() if r}
    assert torch.equal(logits_of(again), logits_of(model))


def test_heads_travel_as_modules_to_save(tmp_path):
    model, adapters = adapted()
    ra.save(adapters, tmp_path)
    config, tensors = read(tmp_path)
    assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "TOKEN_CLS"
    assert torch.equal(tensors["base_model.model.classifier.weight"], model.classifier.weight)
    fresh = make_bert()
    fresh.classifier.weight.data.zero_()
    assert list(ra.load(fresh, tmp_path).heads) == ["classifier"]
    assert torch.equal(fresh.classifier.weight, model.classifier.weight)


def test_peft_loads_an_adapter_without_a_head_of_a_model_that_has_one(tmp_path):
    adapters = ra.attach(make_bert(), rank=2, modules_to_save=(), exclude_modules=["classifier"])
    randomize(adapters)
    ra.save(adapters, tmp_path)
    torch.testing.assert_close(logits_of(in_peft("bert", tmp_path)), logits_of(adapters.model), **CLOSE)


def test_a_head_is_the_one_of_that_name_and_no_other(tmp_path):
    def make():
        torch.manual_seed(0)
        aux = nn.ModuleDict({"score": nn.Linear(4, 4)})
        return nn.ModuleDict({"body": nn.Linear(16, 16), "score": nn.Linear(16, 3), "aux": aux})

    adapters = ra.attach(make(), rank=2, exclude_modules=["aux.score"])
    assert list(adapters.heads) == ["score"]
    ra.save(adapters, tmp_path)
    again = make()
    assert list(ra.load(again, tmp_path).heads) == ["score"]
    assert not again["aux"]["score"].weight.requires_grad


def test_a_gpt2_adapter_says_how_its_weights_lie(tmp_path):
    _, adapters = adapted("gpt2")
    ra.save(adapters, tmp_path)
    config, _ = read(tmp_path)
    assert config["fan_in_fan_out"] is True and config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]


def test_a_run_may_be_saved_between_two_allocations_with_what_grew_back(tmp_path):
    model, adapters = adapted("bert", shrink=False)
    grown = next(a for a in adapters if a.live_rank == 1)
    grown.lam.data[2] = 0.7
    ra.save(adapters, tmp_path, "compact")
    torch.testing.assert_close(logits_of(in_peft("bert", tmp_path)), logits_of(model), **CLOSE)


@pytest.mark.parametrize(
    "arguments",
    [{"layout": "unifrom"}, {"pad_multiple": 0}, {"layout": "compact", "pad_multiple": 8}, {"pad_multiple": 2.5}],
)
def test_layouts_that_do_not_exist_are_refused(arguments, tmp_path):
    _, adapters = adapted()
    with pytest.raises(ConfigError):
        ra.save(adapters, tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()


# --- and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_what_was_saved_loads_bit_for_bit(name, layout, tmp_path):
    model, adapters = adapted(name)
    ra.save(adapters, tmp_path, layout)
    again = MAKERS[name]()
    loaded = ra.load(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    live = {n: r for n, r in adapters.ranks().items() if r or layout == "uniform"}
    assert loaded.ranks() == live and loaded.num_params() == adapters.num_params()
    ra.save(loaded, tmp_path / "b", layout)
    one, two = read(tmp_path)[1], read(tmp_path / "b")[1]
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_loaded_adapters_train_on(tmp_path):
    model, adapters = adapted()
    ra.save(adapters, tmp_path)
    again = make_bert()
    loaded = ra.load(again, tmp_path)
    again.train()
    again(torch.arange(16).reshape(2, 8), labels=torch.zeros(2, 8, dtype=torch.long)).loss.backward()
    assert all(a.P.grad.any() and a.lam.grad.any() and a.Q.grad.any() for a in loaded if a.rank)
    assert again.classifier.weight.grad.any() and again.bert.embeddings.word_embeddings.weight.grad is None


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_rslora": True},
        {"rank_pattern": {"layer.0.attention.self.query": 2, "c_attn": 3}, "alpha_pattern": {"key": 20, "c_fc": 7}},
        {
            "rank_pattern": {r"layer\.1\..*dense": 5, "h.1.attn.c_proj": 1}, "alpha_pattern": {"query": 1},
            "use_rslora": True,
        },
        {"lora_alpha": 32, "init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "patterns", "patterns and rslora", "gaussian"],
)
def test_an_adapter_made_by_peft_computes_the_same_here(name, options, tmp_path):
    targets = ["query", "key", "dense"] if name == "bert" else ["c_attn", "c_fc", "c_proj"]
    config = peft.LoraConfig(**{
        "r": 4, "lora_alpha": 12, "target_modules": targets, "fan_in_fan_out": name == "gpt2",
        "task_type": "TOKEN_CLS" if name == "bert" else "CAUSAL_LM", **options,
    })
    theirs = peft.get_peft_model(MAKERS[name](), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    theirs.save_pretrained(tmp_path)
    ours = MAKERS[name]()
    adapters = ra.load(ours, tmp_path)
    assert (logits_of(theirs) - logits_of(MAKERS[name]())).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), **CLOSE)
    ra.save(adapters, tmp_path / "again")
    torch.testing.assert_close(logits_of(in_peft(name, tmp_path / "again")), logits_of(theirs), **CLOSE)
    ra.merge(adapters)  # whose one product is rounded otherwise than two
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_whose_base_weights_were_changed_are_refused(init, tmp_path):
    """PEFT changes the frozen weights with these; the file alone does not say what the model computes."""
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=init)
    peft.get_peft_model(make_bert(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="init_lora_weights"):
        ra.load(make_bert(), tmp_path)


# --- the same bytes --------------------------------------------------------------------------------------------


def test_the_same_adapters_give_the_same_bytes(tmp_path):
    """Also across processes: nothing may depend on the order of a hash table."""
    digests = set()
    for attempt in range(12):
        _, adapters = adapted("bert")
        ra.save(adapters, tmp_path / str(attempt))
        digests.add(tuple(
            hashlib.sha256((tmp_path / str(attempt) / name).read_bytes()).hexdigest()
            for name in ("adapter_config.json", "adapter_model.safetensors")
        ))
    assert len(digests) == 1


# --- damaged folders -------------------------------------------------------------------------------------------


def break_config(**changes):
    def act(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        strip_seal(folder)

    return act


def strip_seal(folder):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})


def change_tensors(edit):
    def act(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return act


def keep_bytes(name, size):
    def act(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size] if size >= 0 else data[: len(data) + size])

    return act


def only_pickle(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def pop(ending):
    return change_tensors(lambda t: t.pop(next(k for k in t if k.endswith(ending))))


def rename(old, new):
    def edit(tensors):
        for key in [k for k in tensors if old in k]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change_tensors(edit)


def narrow(tensors):
    key = next(k for k in tensors if k.endswith("query.lora_A.weight"))
    tensors[key] = tensors[key][:, :-1].clone()


def misfit(tensors):
    key = next(k for k in tensors if k.endswith("query.lora_A.weight"))
    tensors[key] = tensors[key][:-1].clone()


def unsqueeze(tensors):
    key = next(k for k in tensors if k.endswith("query.lora_A.weight"))
    tensors[key] = tensors[key][:, :, None, None].clone()


def mixed_saves(folder):
    _, other = adapted("bert", ranks=(2,))
    ra.save(other, folder.parent / "other", "compact")
    shutil.copy(folder.parent / "other" / "adapter_config.json", folder / "adapter_config.json")


DAMAGE = {
    "no folder": (shutil.rmtree, "no adapter folder"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    "config is no JSON": (keep_bytes("adapter_config.json", 40), "adapter_config.json is damaged"),
    "config is empty": (keep_bytes("adapter_config.json", 0), "adapter_config.json is damaged"),
    "config is binary": (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe\x00\x80"), "is damaged"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), "is an adapter of type [1]"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "weights are a pickle": (only_pickle, "can run code"),
    "weights cut at the end": (keep_bytes("adapter_model.safetensors", -7), "damaged or truncated"),
    "weights cut in the header": (keep_bytes("adapter_model.safetensors", 60), "damaged or truncated"),
    "weights empty": (keep_bytes("adapter_model.safetensors", 0), "damaged or truncated"),
    "weights are text": (lambda f: (f / "adapter_model.safetensors").write_text("hello, I am no tensor"), "damaged"),
    "two saves": (mixed_saves, "not of one save"),
    "another method": (break_config(peft_type="LOHA"), "type 'LOHA'"),
    "LoRA weights said to be AdaLoRA": (break_config(peft_type="ADALORA"), "does not read"),
    "a weight is not finite": (change_tensors(lambda t: next(iter(t.values())).view(-1)[0].fill_(torch.nan)), "finite"),
    "a convolution": (change_tensors(unsqueeze), "do not fit each other"),
    "DoRA": (break_config(use_dora=True), "use_dora"),
    "biases": (break_config(bias="lora_only"), "bias='lora_only'"),
    "half a pair": (pop("query.lora_A.weight"), "has lora_B but no lora_A"),
    "no LoRA": (change_tensors(lambda t: [t.pop(k) for k in list(t) if "lora_" in k]), "holds no LoRA weights"),
    "another kind of weight": (rename("lora_A.weight", "lora_magnitude_vector"), "does not read"),
    "missing layer": (rename("layer.1.", "layer.7."), "made for another model: this one has no layer"),
    "another shape": (change_tensors(narrow), "31 → 32 in the adapter and 32 → 32 here"),
    "factors that do not fit": (change_tensors(misfit), "do not fit each other"),
    "missing head": (rename("classifier.", "decoder."), "made for another model"),
    "half a head": (pop("classifier.bias"), "classifier.bias is missing in the adapter and (5,) here"),
    "ranks of another save": (break_config(rank_pattern={"query": 2}), "has rank 2 in the first and 4 in the second"),
    "patterns are no table": (break_config(rank_pattern=[1, 2]), "rank_pattern"),
    "pattern is no regex": (break_config(alpha_pattern={"(": 3}), "alpha_pattern"),
    "alpha is text": (break_config(lora_alpha="big"), "lora_alpha"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_gets_one_clear_sentence_and_leaves_the_model_alone(what, tmp_path):
    damage, words = DAMAGE[what]
    folder = tmp_path / "adapter"
    _, adapters = adapted("bert", ranks=(3, 4, 1))
    ra.save(adapters, folder)
    damage(folder)
    model = make_bert()
    state, flags = copy.deepcopy(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(AdapterFileError) as caught:
        ra.load(model, folder)
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 400, message
    assert not any(isinstance(m, Adapter) for m in model.modules())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))


@pytest.mark.parametrize("labels", [3, 9])
def test_another_number_of_labels_is_told(labels, tmp_path):
    _, adapters = adapted("bert", ranks=(3,))
    ra.save(adapters, tmp_path)
    model = make_bert(labels=labels)
    with pytest.raises(AdapterFileError, match="made for another model.*classifier"):
        ra.load(model, tmp_path)
    assert not any(isinstance(m, Adapter) for m in model.modules()) and model.classifier.out_features == labels


def test_another_architecture_and_an_adapted_model_are_told(tmp_path):
    _, adapters = adapted("bert", ranks=(3,))
    ra.save(adapters, tmp_path)
    for other in (make_gpt2(), make_llama(), make_mlp(), make_bert(hidden=16)):
        with pytest.raises(AdapterFileError, match="made for another model"):
            ra.load(other, tmp_path)
    model = make_bert()
    ra.attach(model, rank=2)
    with pytest.raises(TargetError, match="attached already"):
        ra.load(model, tmp_path)


# --- interrupted writing ---------------------------------------------------------------------------------------


def previous(tmp_path):
    """A folder with a good adapter and a file of the user's; its logits and its bytes."""
    folder = tmp_path / "adapter"
    model, adapters = adapted("bert", ranks=(1,))
    ra.save(adapters, folder)
    (folder / "README.md").write_text("mine")
    return folder, logits_of(model), {p.name: p.read_bytes() for p in folder.iterdir()}


def still_there(folder, logits, files, leftovers=False):
    assert {n: (folder / n).read_bytes() for n in files} == files
    assert leftovers or {p.name for p in folder.iterdir()} == set(files)
    model = make_bert()
    ra.load(model, folder)
    assert torch.equal(logits_of(model), logits)


SCRIPT = """
import os, resource, signal, sys
import torch
import rankalloc as ra
torch.manual_seed(0)
adapters = ra.attach(torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256)), rank=8)
{body}
"""


def run_script(body, *arguments):
    code = SCRIPT.format(body=textwrap.dedent(body))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_full_disk_leaves_the_old_adapter(tmp_path):
    """A file-size limit makes the write fail half-way, as a full disk does."""
    folder, logits, files = previous(tmp_path)
    done = run_script(
        """
        from rankalloc.errors import RankallocError
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            ra.save(adapters, sys.argv[1])
        except RankallocError as error:
            print("told:", error)
        """, folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("told: could not write") and done.stdout.count("\n") == 1
    still_there(folder, logits, files)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    folder, logits, files = previous(tmp_path)
    folder.chmod(0o500)
    _, adapters = adapted("bert", ranks=(2,))
    try:
        with pytest.raises(RankallocError, match="could not write"):
            ra.save(adapters, folder)
    finally:
        folder.chmod(0o700)
    still_there(folder, logits, files)


def test_a_path_that_is_a_file_is_told(tmp_path):
    (tmp_path / "taken").write_text("mine")
    _, adapters = adapted("bert", ranks=(2,))
    with pytest.raises(RankallocError, match="taken is a file; give a folder"):
        ra.save(adapters, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_process_killed_while_writing_leaves_the_old_adapter(tmp_path):
    """kill -9 at the moment both new files are complete and neither has its name yet."""
    folder, logits, files = previous(tmp_path)
    done = run_script(
        """
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        ra.save(adapters, sys.argv[1])
        """, folder,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(list(folder.glob("*.tmp"))) + len(list(folder.glob(".*.tmp"))) >= 1
    still_there(folder, logits, files, leftovers=True)


def test_a_process_killed_between_the_two_names_is_noticed_or_harmless(tmp_path):
    folder, logits, files = previous(tmp_path)
    done = run_script(
        """
        replace = os.replace
        def once(*paths):
            replace(*paths)
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace = once
        ra.save(adapters, sys.argv[1])
        """, folder,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    with pytest.raises(AdapterFileError, match="not of one save"):
        ra.load(make_bert(), folder)
    _, adapters = adapted("bert", ranks=(1,))
    ra.save(adapters, folder)
    model = make_bert()
    ra.load(model, folder)
    assert torch.equal(logits_of(model), logits)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    folder, _, files = previous(tmp_path)
    model, adapters = adapted("bert", ranks=(2,))
    ra.save(adapters, folder)
    assert (folder / "README.md").read_text() == "mine" and {p.name for p in folder.iterdir()} == set(files)
    again = make_bert()
    ra.load(again, folder)
    assert torch.equal(logits_of(again), logits_of(model))
