"""The model of a run: one padding token, heads for other labels, and the model section."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from rankalloc.errors import ConfigError
from rankalloc.experiments.config import load_config
from rankalloc.experiments.runner import evaluate_saved, train
from rankalloc.experiments.tasks import prepare
from rankalloc.experiments.tasks.base import evaluate
from tests.support.language import TEMPLATE, WORDS, counting, make_language_model, make_tokenizer, save_language_model
from tests.support.models import make_bert
from tests.support.task_files import write_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    lengths = [3, 9, 5, 14, 4, 7, 11, 6] * 3
    for labels in (2, 3, 5):
        rows = [
            {"text": counting(i, n) + (" w0" if i % 2 else " <eos>"), "label": f"class {i % labels}"}
            for i, n in enumerate(lengths)
        ]
        write_rows(folder / f"{labels}.jsonl", rows)
    write_rows(folder / "numbers.jsonl", [{"text": counting(i, n), "label": n} for i, n in enumerate(lengths)])
    write_rows(folder / "words.jsonl", [
        {"tokens": counting(i, n).split(), "labels": ["even" if j % 2 else "odd" for j in range(n)]}
        for i, n in enumerate(lengths)
    ])  # fmt: skip
    save_language_model(folder / "base")
    return folder


def config_of(home, model, file="2.jsonl", *overrides, kind="text-classification"):
    return load_config(None, [
        f"task.kind={kind}", f"task.train={home / file}", f"model={model}", "adapter.rank=2", "training.steps=2",
        "training.batch_size=4", "data.max_length=24", *overrides,
    ])


def saved(folder, model, **tokens):
    """A model beside a tokenizer with other special tokens."""
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def left_padded_gpt2():
    return GPT2ForSequenceClassification(GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64, pad_token_id=0, eos_token_id=WORDS + 1,
        bos_token_id=WORDS + 3,
    ))


ODD = {
    "a word's token": (lambda: make_language_model(pad_token_id=0), {}),
    "the end token": (lambda: make_language_model(pad_token_id=WORDS + 1), {}),
    "none": (lambda: make_language_model(pad_token_id=None), {}),
    "none in the tokenizer": (lambda: make_language_model(), {"pad_token": None}),
    "none in either": (lambda: make_language_model(pad_token_id=None), {"pad_token": None}),
    "padding on the left": (left_padded_gpt2, {"padding_side": "left"}),
}


@pytest.mark.parametrize("case", ODD)
def test_a_loss_does_not_depend_on_what_an_example_is_batched_with(home, case):
    make, tokens = ODD[case]
    folder = saved(home / case.replace(" ", "-").replace("'", ""), make(), **tokens)
    prepared = prepare(config_of(home, folder))
    torch.manual_seed(0)
    model = prepared.build_model()
    alone = evaluate(prepared, model, "train", 1).example_losses
    together = evaluate(prepared, model, "train", 16).example_losses
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(together), rtol=1e-4, atol=1e-5)
    assert model.config.pad_token_id == prepared.tokenizer.pad_token_id
    said = [note for note in prepared.notes if "padding token" in note]
    assert len(said) == (not case.startswith("none") or case == "none in the tokenizer")
    for note in said:
        assert ("'<eos>' (45)" if case.startswith("none") else "'<pad>' (44)") in note


def test_the_padding_token_is_that_of_generation_too(home):
    folder = saved(home / "generation", make_language_model(pad_token_id=0))
    model = prepare(config_of(home, folder, kind="causal-lm")).build_model()
    assert model.config.pad_token_id == model.generation_config.pad_token_id == WORDS


def test_a_tokenizer_without_any_token_to_pad_with_is_refused(home):
    folder = saved(home / "nothing", make_language_model(pad_token_id=None), pad_token=None, eos_token=None)
    with pytest.raises(ConfigError, match="neither a padding nor an end token"):
        prepare(config_of(home, folder))


@pytest.fixture(scope="module")
def three(home):
    """A checkpoint with a head of three labels."""
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    config = make_language_model().config
    config.num_labels = 3
    return saved(home / "three", LlamaForSequenceClassification(config))


@pytest.mark.parametrize(("file", "kind", "labels"), [
    ("2.jsonl", "text-classification", 2), ("5.jsonl", "text-classification", 5), ("numbers.jsonl", "regression", 1),
])
def test_a_head_of_other_labels_begins_afresh_and_is_saved(home, three, file, kind, labels):
    config = config_of(home, three, file, kind=kind)
    prepared = prepare(config)
    assert [note for note in prepared.notes if "head" in note] == [
        f"the head of model 'three' is for 3 labels and the data has {labels}: it begins afresh"
    ]
    torch.manual_seed(0)
    fresh = prepared.build_model().score.weight
    assert fresh.shape[0] == labels and fresh.std() > 0
    trace = train(config, home / f"run-{labels}", prepared=prepared)
    assert list(trace.heads) == ["score"] and sum("begins afresh" in alert for alert in trace.notes) == 1
    again = evaluate_saved(config, prepared, home / f"run-{labels}" / "adapter", "tune")
    assert again.metrics["loss"] == pytest.approx(trace.evaluation("tune").metrics["loss"], rel=1e-5)
    written = json.loads((home / f"run-{labels}" / "adapter" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["score"]


def test_a_head_of_the_same_labels_is_kept(home, three):
    prepared = prepare(config_of(home, three, "3.jsonl"))
    assert not [note for note in prepared.notes if "head" in note]
    torch.manual_seed(5)
    first = prepared.build_model().score.weight
    torch.testing.assert_close(first, prepared.build_model().score.weight)


def test_a_word_classifier_of_other_labels_begins_afresh_too(home):
    from transformers import BertForTokenClassification

    bert = make_bert().config
    bert.num_labels, bert.vocab_size = 4, 50
    folder = saved(home / "words", BertForTokenClassification(bert))
    prepared = prepare(config_of(home, folder, "words.jsonl", "data.max_length=16", kind="token-classification"))
    assert prepared.build_model().classifier.out_features == 2
    assert any("is for 4 labels and the data has 2" in note for note in prepared.notes)


def test_weights_of_another_size_elsewhere_are_refused(home, three):
    import shutil

    shutil.copytree(three, home / "wider")
    config = json.loads((home / "wider" / "config.json").read_text())
    (home / "wider" / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    for kind in ("text-classification", "causal-lm"):
        with pytest.raises(ConfigError, match="cannot be loaded"):
            prepare(config_of(home, home / "wider", kind=kind)).build_model()


# --- the model section -----------------------------------------------------------------------------------------


def test_a_name_and_a_mapping_say_the_same(home, tmp_path):
    task = "task: {kind: causal-lm, train: a.jsonl}\n"
    (tmp_path / "run.yaml").write_text(f"{task}model: {{name: ./base, dtype: bfloat16}}")
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    config = load_config(tmp_path / "run.yaml", ["model.revision=v2"])
    assert config.model_settings.name == str(tmp_path / "base") and config.model_settings.revision == "v2"
    (tmp_path / "run.yaml").write_text(f"{task}model: {{name: owner/name, chat_template: template.jinja}}")
    config = load_config(tmp_path / "run.yaml")
    assert config.model_settings.chat_template == str(tmp_path / "template.jinja")
    (tmp_path / "run.yaml").write_text(f"{task}model: owner/name")
    named = load_config(tmp_path / "run.yaml", ["model.load_in_4bit=true"])
    assert named.model_settings.name == "owner/name" and named.model_settings.load_in_4bit
    assert load_config(tmp_path / "run.yaml").model == "owner/name"
    (tmp_path / "again.yaml").write_text(named.to_yaml())
    assert load_config(tmp_path / "again.yaml") == named


@pytest.mark.parametrize(("override", "said"), [
    ("model.load_in_4bit=perhaps", "model.load_in_4bit: should be true or false, got 'perhaps'"),
    ("model.dtype=float8", "model.dtype: unknown choice 'float8'"),
    ("model.nme=x", "model.nme: unknown key 'nme' (did you mean 'name'?)"),
    ("model={name: x, load_in_4bit: true, load_in_8bit: true}", "in 4 or in 8 bits, not in both"),
    ("model={dtype: float32}", "a task from a file needs one"),
    ("model.chat_template=' '", "should be a Jinja template"),
])  # fmt: skip
def test_mistakes_in_the_model_section(override, said):
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["task.kind=causal-lm", "task.train=a.jsonl", "model.name=x", override])
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_the_model_is_held_as_the_section_says(home):
    config = config_of(home, home / "base", kind="causal-lm").replaced({
        "model.dtype": "bfloat16", "model.attn_implementation": "eager", "model.chat_template": "{{ messages }}",
    })
    prepared = prepare(config)
    model = prepared.build_model()
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert prepared.tokenizer.chat_template == "{{ messages }}"
    (home / "own.jinja").write_text(TEMPLATE)
    written = prepare(config.replaced({"model.chat_template": str(home / "own.jinja")}))
    assert written.tokenizer.chat_template == TEMPLATE
    with pytest.raises(ConfigError, match="chat_template .*cannot be read: No such file"):
        prepare(config.replaced({"model.chat_template": str(home / "no.jinja")}))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        prepare(config.replaced({"model.attn_implementation": "quick"})).build_model()


def test_a_set_on_the_hub_keeps_its_name_and_a_file_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "chat").mkdir(parents=True)
    for given, absolute in {
        "owner/name": False, "owner/name:config": False, "owner/name[train]": False, "data/chat": True,
        "data/missing.jsonl": True, "other/missing.jsonl": True, "./owner/name": True, "chat.jsonl": True,
        "data/chat[train]": True,
    }.items():
        train = load_config(None, ["task.kind=causal-lm", f"task.train='{given}'", "model=x"]).task.train
        assert train == (str((tmp_path / given).absolute()) if absolute else given), given
