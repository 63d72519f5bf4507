"""Every damaged adapter folder gets one clear sentence, and the model stays as it was."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import rankalloc as ra
from rankalloc.adapters.adapter import Adapter
from rankalloc.errors import AdapterFileError
from tests.support.models import make_bert
from tests.support.saved import adapted


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
    ra.save(adapters, folder, "uniform")
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
