"""Which base an adapter was made for: the same one in any precision passes, every other one is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import rankalloc as ra
from rankalloc.errors import AdapterFileError
from rankalloc.storage import fingerprint
from rankalloc.storage.folder import WEIGHTS_NAME
from tests.support.models import MAKERS, logits_of, make_bert, make_llama, make_mlp, randomize


def saved(tmp_path, model):
    adapters = ra.attach(model, rank=2)
    randomize(adapters)
    ra.save(adapters, tmp_path)
    return adapters


def another(make):
    model = make()
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_file_names_its_base_and_another_is_refused(name, tmp_path):
    make = MAKERS[name]
    model = make()
    saved(tmp_path, model)
    assert fingerprint.check(make(), tmp_path / WEIGHTS_NAME) == "same"
    other = another(make)
    before = logits_of(other)
    with pytest.raises(AdapterFileError, match="another base model: the frozen weights differ by .*check_base=False"):
        ra.load(other, tmp_path)
    assert torch.equal(logits_of(other), before) and not [m for m in other.modules() if type(m).__name__ == "Adapter"]
    ra.load(other, tmp_path, check_base=False)
    torch.testing.assert_close(logits_of(ra.load(make(), tmp_path).model), logits_of(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16])
def test_another_precision_is_the_same_base(there, here, tmp_path):
    saved(tmp_path, make_llama().to(there))
    grade = "same" if there == here else "another precision"
    assert fingerprint.check(make_llama().to(here), tmp_path / WEIGHTS_NAME) == grade


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_is_the_same_base_both_ways(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))

    def make_4bit():
        model = make()
        for index in (0, 2):
            layer = bnb.nn.Linear4bit(model[index].in_features, model[index].out_features, quant_type="nf4")
            layer.load_state_dict(model[index].state_dict())
            model[index] = layer.to("cpu")
        return model

    saved(tmp_path / "plain", make())
    saved(tmp_path / "packed", make_4bit())
    assert fingerprint.check(make_4bit(), tmp_path / "plain" / WEIGHTS_NAME) == "another precision"
    assert fingerprint.check(make(), tmp_path / "packed" / WEIGHTS_NAME) == "another precision"
    assert fingerprint.check(make_4bit(), tmp_path / "packed" / WEIGHTS_NAME) == "same"
    with pytest.raises(AdapterFileError, match="4bit there, float32 here"):
        fingerprint.check(another(make), tmp_path / "packed" / WEIGHTS_NAME)


def test_a_fine_tune_of_the_same_base_is_another_base(tmp_path):
    saved(tmp_path, make_llama().bfloat16())
    tuned = make_llama()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 0.03 * torch.randn_like(parameter))
    with pytest.raises(AdapterFileError, match="another base model"):
        fingerprint.check(tuned.bfloat16(), tmp_path / WEIGHTS_NAME)


def test_a_merged_update_makes_another_base(tmp_path):
    saved(tmp_path, make_llama())
    merged = make_llama()
    adapters = ra.attach(merged, rank=2, target_modules=["q_proj"])
    randomize(adapters)
    ra.merge(adapters)
    with pytest.raises(AdapterFileError, match="another base model"):
        ra.load(merged, tmp_path)


def test_the_configuration_is_compared_by_field(tmp_path):
    saved(tmp_path, make_bert())
    other = make_bert()
    other.config.hidden_act = "relu"
    with pytest.raises(AdapterFileError, match="hidden_act is 'gelu' there and 'relu' here"):
        ra.load(other, tmp_path)


def test_heads_labels_and_vocabulary_do_not_matter(tmp_path):
    model = make_llama()
    saved(tmp_path, model)
    other = make_llama()
    other.resize_token_embeddings(60)
    assert fingerprint.check(other, tmp_path / WEIGHTS_NAME) == "same"


def test_equal_bases_give_equal_ids_and_unequal_ones_do_not(tmp_path):
    ids = {fingerprint.fingerprint(make()).id for make in (make_mlp, make_llama, make_bert)}
    assert len(ids) == 3 and fingerprint.fingerprint(make_mlp()).id in ids
    first = fingerprint.fingerprint(make_llama())
    assert fingerprint.Fingerprint.decode(first.encode()).encode() == first.encode()
    assert first.id != fingerprint.fingerprint(make_llama().bfloat16()).id
    assert len(first.encode()) < 10_000


def test_a_model_without_weights_has_none_and_a_file_without_one_is_taken():
    with torch.device("meta"):
        assert fingerprint.fingerprint(nn.Sequential(nn.Linear(8, 8))) is None


def test_a_damaged_fingerprint_is_named(tmp_path):
    from rankalloc.storage.tensors import read_tensors, write_tensors

    saved(tmp_path, make_mlp())
    tensors, metadata = read_tensors(tmp_path / WEIGHTS_NAME)
    for text in ("{", "[]", json.dumps({"version": 99}), json.dumps({"version": 1, "names": ["a"]})):
        write_tensors(tmp_path / WEIGHTS_NAME, tensors, {**metadata, fingerprint.KEY: text})
        with pytest.raises(AdapterFileError, match="damaged"):
            ra.load(make_mlp(), tmp_path)
    metadata.pop(fingerprint.KEY)
    write_tensors(tmp_path / WEIGHTS_NAME, tensors, metadata)
    ra.load(another(make_mlp), tmp_path)
    with safe_open(tmp_path / WEIGHTS_NAME, framework="pt") as file:
        assert fingerprint.KEY not in file.metadata()
