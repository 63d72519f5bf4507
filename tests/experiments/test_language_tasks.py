"""Chat, prompt-completion, preference and seq2seq data: what is learnt, what it is compared with, what is refused."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch

from rankalloc.errors import ConfigError, DataError
from rankalloc.experiments.tasks import metric_of, prepare
from rankalloc.experiments.tasks.base import evaluate
from rankalloc.experiments.tasks.generation import exact_match, rouge_l
from rankalloc.layers.batches import IGNORED
from tests.support.language import TEMPLATE, conversations, make_tokenizer, make_trl, preferences, save_language_model
from tests.support.task_files import file_config, write_rows

PLAIN = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TWO_TURNS = [
    {"messages": [*a["messages"], *b["messages"]]}
    for a, b in zip(conversations(12), conversations(24)[12:], strict=True)
]
PAIRS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences(12)]


def said(pairs):
    return [
        {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": c.strip()}]}
        for p, c in ((row["prompt"], row["completion"]) for row in pairs)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def unmarked(tmp_path_factory):
    """The same with a template that does not mark what the assistant says."""
    folder = save_language_model(tmp_path_factory.mktemp("unmarked"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    return folder


def prepared(model, kind, path, *sets):
    return prepare(file_config(kind, path, "data.max_length=40", *sets, model=model))


def by_tokens(task, *splits):
    """(input_ids, labels) of the splits, all by default, sorted."""
    rows = [row for split in splits or task.splits for row in task.splits[split]]
    return sorted((list(row["input_ids"]), list(row["labels"])) for row in rows)


# What is learnt


@pytest.mark.parametrize(
    "kind, rows, options",
    [
        ("chat", conversations(12), {"assistant_only_loss": True}),
        ("prompt-completion", PAIRS, {}),
        ("prompt-completion", said(PAIRS), {}),
    ],
    ids=["messages", "texts", "prompts of messages"],
)
def test_tokens_and_labels_are_trls(tmp_path, model, kind, rows, options):
    task = prepared(model, kind, write_rows(tmp_path / "a.jsonl", rows))
    theirs = make_trl("sft", tmp_path, task.build_model(), rows=rows, **options).train_dataset
    assert by_tokens(task) == sorted((row["input_ids"], row["labels"]) for row in theirs)
    assert task.trainer == "sft" and task.notes[-1].startswith("the loss is on")


@pytest.mark.parametrize("rows", [
    preferences(12), [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]}
                      for r in preferences(12)],
], ids=["with prompt", "without"])  # fmt: skip
def test_preferences_are_trls(tmp_path, model, rows):
    task = prepared(model, "preference", write_rows(tmp_path / "a.jsonl", rows))
    every = [row for split in task.rows.values() for row in split]
    theirs = make_trl("dpo", tmp_path, task.build_model(), rows=every).train_dataset
    ours = [row for split in task.splits.values() for row in split]
    for mine, their in zip(ours, theirs, strict=True):
        assert mine["input_ids"] == their["prompt_ids"] + their["chosen_ids"]
        assert mine["rejected_input_ids"] == their["prompt_ids"] + their["rejected_ids"]
        assert mine["labels"].count(IGNORED) == len(their["prompt_ids"]) == mine["rejected_labels"].count(IGNORED)


def test_turns_are_found_without_marks(tmp_path, model, unmarked):
    path = write_rows(tmp_path / "a.jsonl", TWO_TURNS)
    marked, found = (prepared(one, "chat", path) for one in (model, unmarked))
    assert found.splits == marked.splits and found.fingerprint == marked.fingerprint
    last, whole = (prepared(unmarked, "chat", path, f"task.loss_on={on}") for on in ("completion", "all"))
    assert last.splits == prepared(model, "chat", path, "task.loss_on=completion").splits
    learnt = [
        [sum(label != IGNORED for label in row["labels"]) for row in task.splits["train"]]
        for task in (last, found, whole)
    ]
    for of_last, of_turns, of_all in zip(*learnt, strict=True):
        assert (of_last, of_turns) == (7, 14) and of_all > 20


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{% if loop.last %}<{{ m['role'] }}> {% endif %}{{ m['content'] }} {% endfor %}",
    "{{ messages | length }} {% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}",
    "{% for m in messages | reverse %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}",
], ids=["last turn", "count", "backwards"])  # fmt: skip
def test_a_template_without_prefixes_is_refused(tmp_path, model, template):
    path = write_rows(tmp_path / "a.jsonl", TWO_TURNS)
    sets = ("model.chat_template=" + json.dumps(template), f"model.name={model}")
    with pytest.raises(DataError, match="a.jsonl, line .*differently when others follow.*model.chat_template"):
        prepare(file_config("chat", path, "data.max_length=40", *sets, model="''"))
    whole = file_config("chat", path, "data.max_length=40", "task.loss_on=all", *sets, model="''")
    assert all(row["labels"] == row["input_ids"] for row in prepare(whole).splits["train"])


def test_other_names_of_conversations_are_converted_and_it_is_said(tmp_path, model):
    plain = conversations(12)
    expected = by_tokens(prepared(model, "chat", write_rows(tmp_path / "a.jsonl", plain)))
    turns = [[message["content"] for message in row["messages"]] for row in plain]
    forms = {
        "conversations": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
                          for q, a in turns],
        "instruction": [{"instruction": q, "input": "", "output": a} for q, a in turns],
        "prompt": [{"prompt": q, "completion": a} for q, a in turns],
    }  # fmt: skip
    for name, rows in forms.items():
        task = prepared(model, "chat", write_rows(tmp_path / f"{name}.jsonl", rows))
        assert by_tokens(task) == expected and name in task.notes[0]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(row["messages"])] for row in plain)])
    assert by_tokens(prepared(model, "chat", tmp_path / "a.csv")) == expected


def test_system_tools_and_template_options_reach_the_template(tmp_path, model):
    template = "{{ tools[0]['name'] }} {{ mood }} " + TEMPLATE
    rows = [
        {"messages": [{"role": "system", "content": "w9"}, *row["messages"]], "tools": json.dumps([{"name": "w7"}]),
         "chat_template_kwargs": {"mood": "w8"}}
        for row in conversations(12)
    ]  # fmt: skip
    path = write_rows(tmp_path / "a.jsonl", rows)
    sets = ("model.chat_template=" + json.dumps(template), f"model.name={model}")
    task = prepare(file_config("chat", path, "data.max_length=40", *sets, model="''"))
    assert task.tokenizer.decode(task.splits["train"][0]["input_ids"]).split()[:2] == ["w7", "w8"]
    assert all(9 in row["input_ids"] for row in task.splits["train"])


def test_examples_that_are_too_long_are_cut_or_left_out_and_counted(tmp_path, model):
    rows = conversations(20)
    rows[0]["messages"][0]["content"] = " ".join(["w1"] * 60)
    path = write_rows(tmp_path / "a.jsonl", rows)
    task = prepare(file_config("chat", path, "data.max_length=10", model=model))
    assert sum("examples were cut" in note for note in task.notes) == 3
    assert sum("1 of" in note and "nothing to learn within 10" in note for note in task.notes) == 1
    assert sum(map(len, task.splits.values())) == 19
    with pytest.raises(DataError, match="anything to learn within data.max_length 4"):
        prepare(file_config("chat", path, "data.max_length=4", model=model))


# What is measured


def test_a_chat_model_is_measured_as_its_own_loss(tmp_path, model):
    task = prepared(model, "chat", write_rows(tmp_path / "a.jsonl", TWO_TURNS))
    base = task.build_model()
    record = evaluate(task, base, "train", 4)
    batch = task.collator(task.splits["train"])
    with torch.no_grad():
        output = base(**batch)
    assert record.metrics["loss"] == pytest.approx(float(output.loss), rel=1e-4)
    assert record.metrics["perplexity"] == pytest.approx(math.exp(record.metrics["loss"]))
    kept = batch["labels"][:, 1:] != IGNORED
    right = output.logits[:, :-1].argmax(-1)[kept] == batch["labels"][:, 1:][kept]
    assert record.metrics["token_accuracy"] == pytest.approx(float(right.float().mean()))


def test_preferences_are_compared_with_the_untouched_base(tmp_path, model):
    task = prepared(model, "preference", write_rows(tmp_path / "a.jsonl", preferences(24)), "task.beta=0.3")
    base = task.build_model()
    assert evaluate(task, base, "tune", 4).metrics["loss"] == pytest.approx(math.log(2))
    other = task.build_model()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(30)
    record = evaluate(task, other, "tune", 4)

    def log_probability(one, ids, labels):
        with torch.no_grad():
            found = one(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return sum(float(found[i, label]) for i, label in enumerate(labels[1:]) if label != IGNORED)

    margins = []
    for row in task.splits["tune"]:
        sides = [(row["input_ids"], row["labels"]), (row["rejected_input_ids"], row["rejected_labels"])]
        chosen, rejected = (log_probability(other, *side) - log_probability(base, *side) for side in sides)
        margins.append(0.3 * (chosen - rejected))
    assert record.metrics["reward_margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert record.metrics["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-np.array(margins)))), abs=1e-4)
    assert record.metrics["reward_accuracy"] == np.mean(np.array(margins) > 0)

    again = prepared(model, "preference", tmp_path / "a.jsonl", "task.beta=0.3")
    again.comparison.remember(base)
    again.build_model = again.comparison.build_model = None  # no second base is built
    np.testing.assert_allclose(evaluate(again, other, "tune", 2).example_losses, record.example_losses, atol=1e-5)


def test_answers_in_batches_are_those_one_by_one(tmp_path, model):
    rows = [{"prompt": " ".join(row["prompt"].split()[: 1 + i % 4]), "completion": row["completion"]}
            for i, row in enumerate(PAIRS)]  # fmt: skip
    path = write_rows(tmp_path / "a.jsonl", rows)
    sets = ("task.metric=rouge_l", "task.max_new_tokens=5", "task.tune_share=0.5")
    task = prepared(model, "prompt-completion", path, *sets)
    base = task.build_model()
    answers = task.generated_metrics.answers(base, "tune", 4)
    for (ids, _), answer in zip(task.generated_metrics.prompts["tune"], answers, strict=True):
        alone = base.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=5, do_sample=False
        )
        assert task.tokenizer.decode(alone[0, len(ids) :], skip_special_tokens=True) == answer
    assert (task.metric, task.direction) == ("rouge_l", "maximize")
    assert "rouge_l" in evaluate(task, base, "tune", 4).metrics


def test_a_metric_of_the_users_own(tmp_path, model, monkeypatch):
    (tmp_path / "own_scores.py").write_text(
        "def shorter(answers, references):\n    return [len(a) - len(r) for a, r in zip(answers, references)]\n"
        "def broken(answers, references):\n    return answers\n"
    )
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path / "a.jsonl", conversations(12))
    sets = ["task.metric=own_scores:shorter", "task.direction=minimize", "task.max_new_tokens=3"]
    task = prepared(model, "chat", path, *sets)
    assert (task.metric, task.direction) == ("shorter", "minimize")
    assert metric_of(file_config("chat", path, *sets)).metric == "shorter"
    assert math.isfinite(evaluate(task, task.build_model(), "tune", 4).metrics["shorter"])
    with pytest.raises(ConfigError, match="own_scores:nothing' cannot be imported: AttributeError"):
        prepared(model, "chat", path, "task.metric=own_scores:nothing")
    broken = prepared(model, "chat", path, "task.metric=own_scores:broken", "task.max_new_tokens=1")
    with pytest.raises(DataError, match="the metric broken failed on the tune split's .* ValueError"):
        evaluate(broken, broken.build_model(), "tune", 4)


def test_rouge_is_as_published():
    """Lin (2004), section 3.1: of S2 and S3, the first keeps the reference's order."""
    reference = "police killed the gunman"
    assert rouge_l(["police kill the gunman", "the gunman kill police"], [reference] * 2) == [0.75, 0.5]
    assert rouge_l(["", "Über uns!"], ["a", "über  UNS"]) == [0, 1]
    assert exact_match([" a ", "b"], ["a", "B"]) == [1, 0]


def test_an_encoder_decoder_learns_and_writes(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path / "t5"
    T5ForConditionalGeneration(T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=44, eos_token_id=45,
        decoder_start_token_id=44,
    )).save_pretrained(folder)  # fmt: skip
    make_tokenizer().save_pretrained(folder)
    path = write_rows(tmp_path / "a.jsonl", PAIRS)
    task = prepared(folder, "seq2seq", path, "task.metric=exact_match", "task.max_new_tokens=4")
    base = task.build_model()
    record = evaluate(task, base, "train", 4)
    with torch.no_grad():
        loss = float(base(**task.collator(task.splits["train"])).loss)
    assert record.metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert evaluate(task, base, "tune", 2).metrics["exact_match"] == 0


# What is refused


def chat(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


HELLO = chat(("user", "w1"), ("assistant", "w2"))


@pytest.mark.parametrize(
    "kind, row, words",
    [
        ("chat", chat(("user", "w1"), ("robot", "w2")), "turn 2 of 'messages' has the unknown role 'robot'; known: "),
        ("chat", chat(("human", "w1"), ("assistant", "w2")), "unknown role 'human' ('human' is 'user' here)"),
        ("chat", chat(("user", " "), ("assistant", "w2")), "turn 1 of 'messages' is empty"),
        ("chat", chat(("user", "w1"), ("assistant", "")), "turn 2 of 'messages' is empty, got '' of the assistant"),
        ("chat", chat(("user", "w1"), ("user", "w2")), "no turn of the assistant"),
        ("chat", chat(("user", ["w1"]), ("assistant", "w2")), "parts that are no text"),
        ("chat", {"messages": []}, "'messages' should be a list of messages, got []"),
        ("chat", {"messages": "w1 w2"}, "'messages' should be a list of messages, got 'w1 w2'"),
        ("chat", {"prompt": ["w1"], "completion": "w2"}, "'prompt' should"),
        ("prompt-completion", {"prompt": "w1", "completion": [{"role": "user", "content": "w"}]}, "both be texts"),
        ("prompt-completion", {"prompt": "w1", "completion": ""}, "'completion' should be text, got ''"),
        ("preference", {"prompt": "w1", "chosen": "w2", "rejected": "w2"}, "'chosen' and 'rejected' are the same"),
        ("preference", {"prompt": None, "chosen": "a1", "rejected": "b3"}, "begin differently"),
        ("seq2seq", {"prompt": ["w1"], "completion": "w2"}, "'prompt' should be text, got ['w1']"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_sentence(tmp_path, model, kind, row, words):
    good = {"chat": HELLO, "preference": preferences(1)[0]}.get(kind, PAIRS[0])
    rows = [good] * 3 + [row, good, row] if set(row) == set(good) else [row] * 2
    with pytest.raises(DataError) as caught:
        prepared(model, kind, write_rows(tmp_path / "a.jsonl", rows))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert f"a.jsonl, line {len(rows) // 2 + 1 if len(rows) > 2 else 1}" in str(caught.value)
    assert "1 more is wrong (line" in str(caught.value)


@pytest.mark.parametrize(
    "kind, row, words",
    [
        ("chat", preferences(1)[0], "use kind: preference"),
        ("prompt-completion", preferences(1)[0], "use kind: preference"),
        ("prompt-completion", HELLO, "use kind: chat"),
        ("preference", HELLO, "preference needs the columns 'chosen' and 'rejected'"),
        ("chat", {"text": "w1"}, "kind: causal-lm"),
        ("seq2seq", {"text": "w1"}, "task.text and task.label"),
    ],
)
def test_data_of_another_kind_names_the_kind(tmp_path, model, kind, row, words):
    with pytest.raises(DataError, match=words):
        prepared(model, kind, write_rows(tmp_path / "a.jsonl", [row] * 5))


def test_no_chat_template_is_one_sentence(tmp_path, model):
    from transformers import AutoTokenizer

    folder = save_language_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="has no chat template; .*model.chat_template"):
        prepared(folder, "chat", write_rows(tmp_path / "a.jsonl", conversations(12)))
    assert prepared(folder, "prompt-completion", write_rows(tmp_path / "b.jsonl", PAIRS)).splits["train"]


def trls(name):
    """A template of TRL's collection, the original of a model family."""
    from trl import chat_template_utils

    return getattr(chat_template_utils, f"{name}_chat_template")


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "phi3", "gemma", "qwen3"])
def test_templates_of_real_models_teach_all_that_the_assistant_says(tmp_path, model, family):
    """The own ones of phi3 and qwen3 write earlier turns anew; TRL's version is used, and it is said."""
    (tmp_path / "t.jinja").write_text(trls(family))
    path = write_rows(tmp_path / "a.jsonl", TWO_TURNS)
    sets = ("data.max_length=64", f"model.name={model}", f"model.chat_template={tmp_path / 't.jinja'}")
    task = prepare(file_config("chat", path, *sets, model="''"))
    assert any("TRL's version" in note for note in task.notes) == (family in ("phi3", "qwen3"))
    unknown, words = task.tokenizer.unk_token_id, 44
    learnt = sorted([one for one in row["labels"] if 0 <= one < words] for row in task.splits["train"])
    plain = prepared(model, "chat", path).splits["train"]
    known = sorted([one for one in row["labels"] if 0 <= one < words] for row in plain)
    for mine, whole in zip(learnt, known, strict=True):
        assert set(mine) <= set(whole) and len(mine) >= len(whole) - 2  # where marks touch words they are unknown
    assert all(unknown in row["labels"] for row in task.splits["train"])  # a turn's end is learnt too


def test_a_template_that_looks_for_parts_is_told(tmp_path, model):
    (tmp_path / "t.jinja").write_text(trls("smolvlm"))
    path = write_rows(tmp_path / "a.jsonl", TWO_TURNS)
    sets = (f"model.name={model}", f"model.chat_template={tmp_path / 't.jinja'}", "data.max_length=64")
    with pytest.raises(DataError, match="leaves out what the assistant says.*write content as"):
        prepare(file_config("chat", path, *sets, model="''"))


@pytest.mark.parametrize(("template", "words"), [
    ("{% for m in messages }}{{ m }}{% endfor %}", "no Jinja template: unexpected '}'"),
    ("{% for m in messages %}{{ m['content'] }}", "no Jinja template: Unexpected end of template"),
    ("{{ messages[0]['content'] | nosuch }}", "no Jinja template: No filter named 'nosuch'"),
])  # fmt: skip
def test_a_template_that_is_none_is_not_the_datas_fault(tmp_path, model, template, words):
    path = write_rows(tmp_path / "a.jsonl", conversations(12))
    sets = ("model.chat_template=" + json.dumps(template), f"model.name={model}", "data.max_length=64")
    with pytest.raises(ConfigError, match=words) as caught:
        prepare(file_config("chat", path, *sets))
    assert "a.jsonl" not in str(caught.value)


def test_a_template_that_refuses_a_row_is_quoted(tmp_path, model):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATE
    rows = [*conversations(11), chat(("system", "w1"), ("user", "w1"), ("assistant", "w2"))]
    sets = ("model.chat_template=" + json.dumps(template), f"model.name={model}")
    with pytest.raises(DataError, match="line 12: the chat template refuses this conversation: no system turns"):
        prepare(file_config("chat", write_rows(tmp_path / "a.jsonl", rows), "data.max_length=40", *sets, model="''"))


@pytest.mark.parametrize("sets, words", [
    (["task.metric=bleu"], "unknown metric 'bleu'"), (["task.direction=minimize"], "metric of your own"),
    (["task.text_pair=b"], "second text"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_one_sentence(sets, words):
    with pytest.raises(ConfigError, match=words):
        file_config("chat", "a.jsonl", *sets)
    with pytest.raises(ConfigError, match="whole training set"):
        file_config("preference", "a.jsonl", "task.streaming=true")
