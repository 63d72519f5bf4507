"""The page of an audit: its answer first, its numbers beside every figure, and nothing of a name that is not text."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

import rankalloc as ra
from rankalloc.audit_record import ArmRecord, ArmRun, AuditRecord, ComparisonRecord, StabilityRecord, TriedRate
from rankalloc.cli import app
from rankalloc.errors import RankallocError
from rankalloc.report import figures_audit
from rankalloc.report.audited import difference, limits, unit
from rankalloc.trace import LayerRecord

ODD = "<script>alert(1)</script>"


def arm(name: str, values: list[float], what: str = "an arm") -> ArmRecord:
    return ArmRecord(
        name=name, what=what, rate=0.01, command=f"rankalloc train a.yaml --set name={name}",
        tried=[TriedRate(rate=rate, value=0.5 + rate) for rate in (0.005, 0.01, 0.02)],
        runs=[ArmRun(seed=k + 1, value=value, loss=1 - value, params=64, peak_params=128, ranks=[2, k % 3],
                     steps=8, seconds=1.5) for k, value in enumerate(values)],
    )  # fmt: skip


@pytest.fixture
def record() -> AuditRecord:
    arms = [arm("auto", [0.61, 0.63, 0.62, 0.60]), arm("uniform", [0.6, 0.61, 0.61, 0.6]), arm("twin", [0.6] * 4)]
    arms.append(ArmRecord(name="post", what="cut", skipped="there is nothing to cut"))
    comparisons = [
        ComparisonRecord(arm="uniform", claim="better", seeds=4, mean=0.01, low=0.002, high=0.018, p=0.01, effect=1.1,
                         both_low=-0.001, both_high=0.021, differences=[0.01, 0.02, 0.01, 0.0]),
        ComparisonRecord(arm="twin", claim="undecided", seeds=4, mean=0.015, p=1.0, differences=[0.01, 0.03, 0.02, 0]),
    ]  # fmt: skip
    layers = [LayerRecord(name=f"layer.{k}.{ODD}", kind="", block=k, role=ODD, d_in=8, d_out=8, initial_rank=4)
              for k in range(2)]  # fmt: skip
    return AuditRecord(
        name=ODD, task="tags", model="m", metric="f1", direction="maximize", method="auto", params=64, layers=layers,
        margin=0.002, looks=[4, 6], seeds=4, arms=arms, comparisons=comparisons,
        stability=StabilityRecord(rank_correlation=0.5, jaccard=0.25), sentence="auto gains 1.0 points F1.",
        advice="Use auto.", command_next="rankalloc train a.yaml", config={"name": ODD}, finished=True,
    )


def page_of(record: AuditRecord, folder) -> str:
    record.save(folder / "audit.json")
    ra.write_report(folder, folder / "page.html")
    return (folder / "page.html").read_text()


def test_the_answer_comes_first_and_every_arm_is_in_the_numbers(record, tmp_path):
    page = page_of(record, tmp_path)
    assert page.index("auto gains 1.0 points F1.") < page.index("Use auto.") < page.index("<figure")
    for key in ("forest", "seeds", "tuning", "map"):
        assert f'id="figure-{key}"' in page
    assert "It reads a.yaml. With this page alone, save the resolved configuration" in page
    for name in ("uniform", "twin"):
        assert page.count(f'<th scope="row">{name}</th>') >= 3
    assert "post (there is nothing to cut)" in page
    assert "+1.0" in page and "+0.2" in page and "undecided" in page


def test_names_are_text_and_ids_are_unique(record, tmp_path):
    page = page_of(record, tmp_path)
    assert ODD not in page and "&lt;script&gt;" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_same_record_gives_the_same_bytes(record, tmp_path):
    assert page_of(record, tmp_path) == page_of(record, tmp_path)


def test_an_audit_under_way_is_shown_as_far_as_it_is(record, tmp_path):
    begun = record.model_copy(update={
        "sentence": None, "advice": None, "comparisons": [], "finished": False, "seeds": 0,
        "arms": [one.model_copy(update={"runs": []}) for one in record.arms],
    })  # fmt: skip
    page = page_of(begun, tmp_path)
    assert "no answer yet: 9 runs are made" in page and 'id="figure-forest"' not in page
    assert 'id="figure-tuning"' in page


def test_a_damaged_record_is_one_sentence(record, tmp_path):
    record.save(tmp_path / "audit.json")
    text = (tmp_path / "audit.json").read_text()
    (tmp_path / "audit.json").write_text(text[: len(text) // 2])
    with pytest.raises(RankallocError, match="audit.json is no JSON"):
        ra.write_report(tmp_path, tmp_path / "page.html")
    (tmp_path / "audit.json").write_text(text.replace('"metric": "f1"', '"metric": null'))
    with pytest.raises(RankallocError, match="no valid audit record: metric"):
        ra.write_report(tmp_path, tmp_path / "page.html")


def test_the_command_writes_markdown_and_json_of_it(record, tmp_path):
    record.save(tmp_path / "audit.json")
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--format", "md", "-o", str(tmp_path / "a.md")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "a.md").read_text()
    assert "auto gains 1.0 points F1." in text and "**Next:** Use auto.\n\n```sh\nrankalloc train a.yaml\n```" in text
    assert "| Against | Verdict | Mean, points F1 |" in text and "| `uniform` | the method is better | +1.0 |" in text
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--format", "json", "-o", str(tmp_path / "a.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["kind"] == "audit" and found["verdict"]["outcome"] == "helped"
    assert found["next"] == [{"advice": "Use auto.", "command": "rankalloc train a.yaml"}]


def test_an_audit_beside_another_compares_the_ranks_of_their_first_seeds(record, tmp_path):
    for name, ranks in (("one", [2, 0]), ("other", [1, 1])):
        (tmp_path / name).mkdir()
        arms = [record.arms[0].model_copy(update={
            "runs": [run.model_copy(update={"ranks": ranks}) for run in record.arms[0].runs]
        }), *record.arms[1:]]  # fmt: skip
        record.model_copy(update={"name": name, "arms": arms}).save(tmp_path / name / "audit.json")
    ra.write_report(tmp_path / "one", tmp_path / "both.html", compare=tmp_path / "other")
    page = (tmp_path / "both.html").read_text()
    assert "audit of auto: quality over 4 seeds, ranks of seed 1" in page and 'id="figure-' in page
    ra.write_report(tmp_path / "one", tmp_path / "both.md", compare=tmp_path / "other")
    text = (tmp_path / "both.md").read_text()
    assert "f1 on the report split is 0.615 for one (mean over 4 seeds) and 0.615 for other (mean over" in text
    assert "report: f1 | 0.615 | 0.615 |" in text  # the mean of 0.61, 0.63, 0.62 and 0.60
    record.model_copy(update={"arms": []}).save(tmp_path / "audit.json")
    with pytest.raises(RankallocError, match="has made no run with ranks yet"):
        ra.write_report(tmp_path, tmp_path / "none.html", compare=tmp_path / "other")


def test_what_an_axis_leaves_out_is_marked_and_said(record, tmp_path):
    lost = [*record.arms[0].tried, TriedRate(rate=0.00125, value=0.01)]
    arms = [record.arms[0].model_copy(update={"tried": lost, "rate": 0.00125}), *record.arms[1:]]
    cut = record.model_copy(update={"arms": arms})
    assert figures_audit.outside(cut, arms) == [0.01] and figures_audit.outside(record, record.arms) == []
    page = page_of(cut, tmp_path)
    assert "outside the axis, and in the numbers only (1 run, 0.0100)" in page
    assert ">0.00125 *<" in page and ">0.00125</td>" in page  # as it is typed, in both tables
    worse = cut.model_copy(update={"direction": "minimize"})
    assert figures_audit.outside(worse, arms) == []  # the lowest is the best one there


def test_an_interval_beyond_the_axis_is_said(record, tmp_path):
    assert not figures_audit.is_cut(record)
    long = record.comparisons[0].model_copy(update={"low": -5.0, "high": 5.0})
    one = record.model_copy(update={"comparisons": [*record.comparisons[:1] * 9, long]})
    assert figures_audit.is_cut(one) and "An arrow: the interval goes on" in page_of(one, tmp_path)


@pytest.mark.parametrize("metric, value, said", [
    ("f1", 0.0123, "+1.2 points F1"), ("loss", -0.0123, "−0.0123 in loss"),
    ("accuracy", -0.004, "−0.4 points accuracy"), ("spearman", 0.1, "+0.1 in spearman"),
])  # fmt: skip
def test_differences_as_people_say_them(metric, value, said):
    assert f"{difference(value, metric, True)} {unit(metric)}" == said


def test_an_interval_without_spread_is_told(record):
    assert limits(record.comparisons[1], "f1") == "the same difference on every seed"
    assert limits(record.comparisons[0], "f1") == "90 % +0.2 to +1.8"
