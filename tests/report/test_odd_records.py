"""Records that are odd, old, damaged or full of secrets: shown as far as they can be, or refused in one sentence."""

from __future__ import annotations

import json
import re

import pytest

from rankalloc.errors import RankallocError
from rankalloc.report.html import render
from rankalloc.report.lenient import read_patiently
from rankalloc.report.redact import redacted, redacted_text
from rankalloc.report.source import Source, read_source
from rankalloc.report.writing import write_report
from rankalloc.trace import RankTrace
from tests.support import report_odd_samples as odd
from tests.support import report_samples as samples


def small():
    """The JSON of a run of twelve layers."""
    return samples.run(blocks=2, target=72).model_dump(mode="json")


QUICK = {"allocations": [], "scores": None, "singular_values": None}
"""What leaves a trace with few figures to draw."""


def edited(**changes):
    """That JSON with ``path__to__key=value`` set."""
    data = small()
    for path, value in changes.items():
        *before, last = path.split("__")
        holder = data
        for key in before:
            holder = holder[int(key) if key.isdecimal() else key]
        holder[int(last) if last.isdecimal() else last] = value
    return data


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"evaluations__0__metrics__f1": float("inf")}, "too large to show: evaluations.metrics.f1."),
        ({"logs__3__step": 10**18}, "too large to show: logs.step."),
        ({"allocations__2__ranks__0": 10**17}, "unreadable: allocations."),
        ({"scores__kept__0__0": 1e308}, "unreadable: scores."),
        ({"singular_values__3": "x"}, "unreadable: singular_values."),
        ({"wall_seconds": "long"}, "unreadable: wall_seconds."),
        ({"evaluations__1__example_losses__3": None}, "unreadable: evaluations.example_losses."),
        ({"novel": 1, "layers__0__novel": 3}, "unknown to this version: layers.novel, novel."),
        ({"version": "1.4"}, "written as version 1.4"),
    ],
)
def test_what_cannot_be_read_is_left_out_and_named(changes, note):
    record, notes = read_patiently(RankTrace, edited(**changes), "x.json", "trace")
    assert len(record.layers) == 12 and record.evaluations[1].metrics["f1"] == 0.508
    assert any(note in said for said in notes)


def test_the_page_of_an_odd_trace_says_what_it_lacks(tmp_path):
    data = edited(logs__3__step=10**18, novel=1) | QUICK
    text = json.dumps(data).replace('"f1": 0.512', '"f1": 1e400')
    (tmp_path / "trace.json").write_text(text)
    page = write_report(tmp_path, tmp_path / "page.html").read_text()
    assert "too large to show: logs.step, evaluations.metrics.f1" in page and "unknown to this version: novel" in page
    assert read_source(tmp_path / "page.json") == read_source(tmp_path)  # the notes are kept


def test_a_sound_record_has_no_notes():
    record, notes = read_patiently(RankTrace, small(), "x.json", "trace")
    assert notes == [] and record.model_dump(mode="json") == small()


def test_a_trace_of_an_older_version_is_shown():
    data = small()
    needed = {name for name, field in RankTrace.model_fields.items() if field.is_required()} | {"version"}
    trace, notes = read_patiently(RankTrace, {key: data[key] for key in needed}, "x.json", "trace")
    assert notes == [] and "not recorded" in render(Source(trace))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2, and this rankalloc reads version 1"),
        ({"layers__0__d_in": "x"}, "no valid trace: layers.0.d_in"),
        ({"alpha": float("inf")}, "alpha is no number that a report can hold"),
    ],
)
def test_what_a_trace_cannot_do_without_is_one_sentence(changes, words):
    with pytest.raises(RankallocError, match=words):
        read_patiently(RankTrace, edited(**changes), "x.json", "trace")


def test_numbers_of_any_size_are_shown():
    metrics = {"a": 1e308, "b": -1e300, "c": 5e-324, "f1": 0.508}
    trace = RankTrace.model_validate(
        edited(evaluations__0__metrics=metrics, logs__0__values__loss=1e308, logs__1__values__loss=1e90) | QUICK
    )
    text = render(Source(trace))
    assert all(shown in text for shown in ("1e+308", "−1e+300", "4.941e−324", "1e+90"))


def test_no_layers_no_figures_but_a_page():
    trace = odd.bare().model_copy(update={"layers": []})
    text = render(Source(trace))
    assert "The trace lists no layers." in text and "<figure" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--hub-token hf_abcdefghijklmn --x 1", "--hub-token *** --x 1"),
        ("WANDB_API_KEY=0123456789abcdef python", "WANDB_API_KEY=*** python"),
        ("api_key=abc&b=1", "api_key=***&b=1"),
        ('{"password": "pw"}', '{"password": "***"}'),
        ("postgresql+psycopg://me:pw@host/db", "postgresql+psycopg://me:***@host/db"),
        ("a hf_abcdefghijklmn b", "a *** b"),
        ("--data /home/ada/x.csv", "--data ~/x.csv"),
        ("/Users/ada/x and /root/y", "~/x and ~/y"),
        ("C:\\Users\\ada\\x", "~\\x"),
        ("--set task=token-classification --max-tokens 5", "--set task=token-classification --max-tokens 5"),
        ("token ids are padded", "token ids are padded"),
        ("pad_token=<pad> eos_token: </s>", "pad_token=<pad> eos_token: </s>"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("wandb login " + "0123456789" * 4, "wandb login ***"),
        ("0123abc0123abc0123abc0123abc0123abc01234", "0123abc0123abc0123abc0123abc0123abc01234"),  # a git hash
        ("data/home/ada.csv", "data/home/ada.csv"),
    ],
)
def test_secrets_and_homes_are_hidden_and_nothing_else(text, shown):
    assert redacted_text(text) == shown and redacted_text(shown) == shown


def test_no_file_of_a_report_holds_a_secret(tmp_path):
    config = {"hub": {"token": "t0psecret"}, "storage": "postgresql://u:t0psecret@h/d", "path": "/home/ada/x"}
    told = {"command": "rankalloc train --api-key t0psecret", "notes": ["token=t0psecret"]}
    trace = samples.run(blocks=2, target=72).model_copy(update={"config": config, **told, **QUICK})
    for name in ("a.html", "b.md", "c.json"):
        write_report(trace, tmp_path / name)
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert "t0psecret" not in text and "/home/ada" not in text, path.name
    assert len(list(tmp_path.iterdir())) == 4 and "--api-key ***" in (tmp_path / "a.json").read_text()


def test_names_of_layers_are_no_secrets():
    data = {"layers": [{"name": "token=abc"}], "command": "token=abc", "pad_token": "<pad>", "wandb": "0123456789" * 4}
    assert redacted(data) == data | {"command": "token=***", "wandb": "***"}


def test_a_file_that_no_one_could_read_is_one_sentence(tmp_path):
    for content in ("{", "[1]", '{"version": 1}', '{"points": 3, "knee": null}', "\x00"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(RankallocError) as error:
            write_report(tmp_path / "x.json", tmp_path / "out.html")
        assert not re.search(r"\n|Traceback", str(error.value)) and not (tmp_path / "out.html").exists()
