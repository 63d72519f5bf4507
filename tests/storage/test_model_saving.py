"""``save_pretrained`` of an adapted model: an adapter, whoever loads it, and never the base."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForTokenClassification, BertForTokenClassification

import rankalloc as ra
from rankalloc.errors import ConfigError, NotAdaptedError
from tests.support.models import MAKERS, assert_same, logits_of, make_bert, make_llama, make_mlp, randomize, tensors_of
from tests.support.runs import tiny_model
from tests.support.saved import CLOSE, read

peft = pytest.importorskip("peft")
FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a base model, which an adapter can name."""
    folder = tmp_path_factory.mktemp("base")
    make_bert().save_pretrained(folder)
    return folder


def adapted(base, rank=4):
    model = AutoModelForTokenClassification.from_pretrained(base)
    adapters = ra.attach(model, rank=rank)
    randomize(adapters)
    return model, adapters


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """(folder that save_pretrained wrote, the model's logits)."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    model, _ = adapted(base)
    model.save_pretrained(folder, max_shard_size="1GB", safe_serialization=True)  # as push_to_hub and old code call it
    assert names(folder) == FILES
    return folder, logits_of(model)


@pytest.mark.parametrize(
    "load",
    [
        lambda base, out: peft.PeftModel.from_pretrained(AutoModelForTokenClassification.from_pretrained(base), out),
        lambda base, out: AutoModelForTokenClassification.from_pretrained(out),
        lambda base, out: BertForTokenClassification.from_pretrained(out),
        lambda base, out: peft.AutoPeftModelForTokenClassification.from_pretrained(out),
        lambda base, out: ra.load(model := AutoModelForTokenClassification.from_pretrained(base), out) and model,
    ],
    ids=["PeftModel", "AutoModel", "the class", "AutoPeftModel", "ra.load"],
)
def test_everyone_loads_the_trained_model(base, saved, load):
    folder, ours = saved
    plain = logits_of(AutoModelForTokenClassification.from_pretrained(base))
    assert (ours - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(load(base, folder)), ours, **CLOSE)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_files_are_those_of_save(name, tmp_path):
    model = MAKERS[name]()
    adapters = ra.attach(model, rank=4)
    randomize(adapters)
    model.save_pretrained(tmp_path / "a")
    ra.save(adapters, tmp_path / "b")
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("leave", [ra.detach, ra.merge], ids=["detach", "merge"])
def test_a_model_without_adapters_has_the_method_of_its_class_again(leave, tmp_path):
    model = make_bert()
    leave(ra.attach(model, rank=4))
    assert "save_pretrained" not in vars(model) and not model._load_state_dict_post_hooks
    model.save_pretrained(tmp_path)
    again = BertForTokenClassification.from_pretrained(tmp_path)
    assert_same(tensors_of(model), tensors_of(again))


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: AveragedModel(m).module],
    ids=["deepcopy", "pickle", "average"],
)
def test_a_copy_saves_its_own_adapters(copy_of, tmp_path):
    model = make_bert()
    adapters = ra.attach(model, rank=4)
    randomize(adapters)
    other = copy_of(model)
    ours = logits_of(other)
    randomize(adapters, seed=9)
    adapters.heads["classifier"].weight.data.zero_()
    ra.detach(adapters)
    other.save_pretrained(tmp_path)
    assert names(tmp_path) == FILES
    fresh = make_bert()
    ra.load(fresh, tmp_path)
    torch.testing.assert_close(logits_of(fresh), ours, **CLOSE)


def test_what_wraps_a_model_saves_under_its_plain_names(tmp_path):
    model = make_bert()
    randomize(ra.attach(model, rank=4))
    wrapped = torch.compile(model)
    wrapped.save_pretrained(tmp_path, state_dict=wrapped.state_dict())
    assert not any("_orig_mod" in key for key in read(tmp_path)[1])
    fresh = make_bert()
    ra.load(fresh, tmp_path)
    torch.testing.assert_close(logits_of(fresh), logits_of(model), **CLOSE)


def test_a_model_inside_saves_its_own_part(base, tmp_path):
    model, _ = adapted(base)
    model.bert.save_pretrained(tmp_path)
    assert names(tmp_path) == FILES and not read(tmp_path)[0]["modules_to_save"]
    part = AutoModelForTokenClassification.from_pretrained(base).bert
    ra.load(part, tmp_path)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(part.eval()(ids)[0], model.bert.eval()(ids)[0])


def test_trained_tied_embeddings_are_in_the_file_once(tmp_path):
    model = make_llama()
    adapters = ra.attach(model, rank=4, modules_to_save=["lm_head"])
    randomize(adapters)
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in read(tmp_path)[1]
    fresh = make_llama()
    ra.load(fresh, tmp_path)
    torch.testing.assert_close(logits_of(fresh), logits_of(model), **CLOSE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"push_to_hub": True}, "model.push_to_hub"), ({"variant": "fp16"}, "variant='fp16'"),
        ({"safe_serialization": False}, "safe_serialization=False"),
        ({"state_dict": {"classifier.bias": torch.ones(5)}}, "load_state_dict"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_an_adapter_cannot_be_is_refused_in_one_sentence(options, words, tmp_path):
    model = make_bert()
    ra.attach(model, rank=4)
    with pytest.raises(ConfigError) as caught:
        model.save_pretrained(tmp_path / "a", **options)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "a").exists()


def test_nothing_is_written_that_should_not_be(base, tmp_path):
    model, adapters = adapted(base)
    model.save_pretrained(tmp_path / "a", is_main_process=False)
    ra.RankCallback(adapters, ra.RankBudget(ranks=20))
    with pytest.raises(NotAdaptedError):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    before = names(base)
    ra.detach(adapters)
    ra.attach(model, rank=4)
    with pytest.raises(ConfigError, match="holds a model"):
        model.save_pretrained(base)
    assert names(base) == before


def test_a_whole_model_is_never_replaced_for_the_name_of_its_folder(tmp_path):
    """A base may well be a checkpoint of a full fine-tune."""
    folder = tmp_path / "checkpoint-500"
    make_bert().save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    model = BertForTokenClassification.from_pretrained(folder)
    ra.attach(model, rank=4)
    with pytest.raises(ConfigError, match="holds a model"):
        model.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_module_without_the_method_gets_none():
    model = make_mlp()
    ra.attach(model, rank=4)
    assert not hasattr(model, "save_pretrained")


def test_a_sentence_transformer_asks_its_transformer_to_save_itself(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = str(tiny_model(tmp_path / "base"))
    model = sentence_transformers.SentenceTransformer(folder, device="cpu")
    randomize(ra.attach(model, rank=2))
    texts = ["the film was good"]
    ours, plain = model.encode(texts), sentence_transformers.SentenceTransformer(folder, device="cpu").encode(texts)
    model.save_pretrained(str(tmp_path / "out"))
    assert names(tmp_path / "out") > FILES | {"modules.json"}
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
    assert abs(ours - plain).max() > 1e-2 and abs(again - ours).max() < 1e-5
