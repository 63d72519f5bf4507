"""The study that chooses the default method: its grid, its resuming and its statistics, on a model of a test's size."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile

import pytest

from rankalloc.errors import ConfigError, DataError, RankallocError
from rankalloc.methods import find_method
from studies.common.grid import Grid
from studies.default import analysis, arms, brown, run, valence
from tests.support.runs import WORDS, tiny_model


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    tiny_model(folder / "model")
    rows = [{"tokens": WORDS[i % 9 : i % 9 + 4], "labels": ["a", "b", "c", "a"]} for i in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "tiny.yaml"
    path.write_text(
        "task: {kind: token-classification, train: data.jsonl, tune: data.jsonl, report: data.jsonl}\n"
        "model: ./model\nbudget: {every: 1}\ntraining: {steps: 3, batch_size: 4}\n"
    )
    return path


def synthetic(arm, seed, phase, rate, value, task="t", **extra):
    split = {"rates": "tune", "seeds": "report"}[phase]
    return {
        "task": task, "budget": 1, "arm": arm, "seed": seed, "phase": phase, "rate": rate, "metric": "f1",
        "direction": "maximize", "data": "d", split: {"f1": value, "loss": 1 - value}, **extra,
    }


@pytest.mark.long
def test_a_whole_study_and_its_resuming(task, tmp_path, monkeypatch, capsys):
    rates = {"lora": (4e-3,), "svd": (8e-3,)}
    monkeypatch.setattr(
        run, "grid_of",
        lambda arm: Grid(rates[find_method(arm.method).init], extensions=0),
    )  # fmt: skip
    compared = ["uniform", "auto", "auto/uniform", "uniform/truncated"]
    output = tmp_path / "results.json"
    command = ["--tasks", str(task), "--budgets", "1", "--arms", *compared, "--rate-seeds", "1", "--workers", "1",
               "--output", str(output)]  # fmt: skip
    run.main([*command, "--seeds", "1", "--phase", "rates", "--minutes", "0"])
    assert not output.exists(), "no time, no run"
    run.main([*command, "--seeds", "2"])
    runs = json.loads(output.read_text())["runs"]
    assert [sum(r["phase"] == phase for r in runs) for phase in ("rates", "seeds")] == [4, 2 * 4]
    for each in runs:
        params = each["budget_params"]
        adaptive = each["arm"] != "uniform"
        assert params - 32 < each["final_params"] <= params, "exact to the cheapest rank"
        assert each["peak_params"] == params * (4 if adaptive else 1)
        assert ("tune" in each, "report" in each) == ((True, False) if each["phase"] == "rates" else (False, True))
        if each["arm"].endswith("/uniform"):
            assert set(each["final_ranks"]) == {1}
    rate = {arm: {r["rate"] for r in runs if r["arm"] == arm and r["phase"] == "seeds"} for arm in compared}
    assert all(len(rates) == 1 for rates in rate.values()), "every arm is judged at one rate"
    assert (tmp_path / "forest.png").stat().st_size > 1000 and "<svg" in (tmp_path / "forest.svg").read_text()
    assert "auto against auto/uniform" in (tmp_path / "findings.md").read_text()

    def refuse(cell):
        raise AssertionError(f"{cell} was finished and runs again")

    monkeypatch.setattr(run, "run_cell", refuse)
    before = output.read_bytes()
    run.main([*command, "--seeds", "2"])
    assert output.read_bytes() == before
    with pytest.raises(AssertionError, match="seed=102"):
        run.main([*command, "--seeds", "3"])
    task.write_text(task.read_text().replace("batch_size: 4", "batch_size: 5"))
    with pytest.raises(AssertionError, match="phase|seed=0"):  # other settings are other runs
        run.main([*command, "--seeds", "2"])


def test_a_rate_is_chosen_on_tune_losses_of_all_its_seeds():
    tried = [(1.0, 0.6, 0), (1.0, 0.6, 1), (2.0, 0.7, 0), (2.0, 0.7, 1)]
    runs = [synthetic("uniform", seed, "rates", rate, value) for rate, value, seed in tried]
    runs.append(synthetic("uniform", 0, "rates", 4.0, 0.9))  # its other seed is still to run
    assert analysis.chosen_rate(runs, "t", 1, "uniform", 2) == 2.0
    assert analysis.chosen_rate(runs, "t", 1, "uniform/truncated", 2) is None
    assert arms.arm_of("adalora/random").rates_of == arms.arm_of("adalora")
    del runs[2]["tune"]  # diverged
    assert analysis.chosen_rate(runs, "t", 1, "uniform", 2) == 1.0


def test_differences_are_paired_by_seed_and_turned_so_that_more_is_better():
    runs = []
    for arm, gains in (("uniform", [0.0] * 5), ("adalora", [0.1, 0.11, 0.09, 0.1, 0.12]),
                       ("adalora/uniform", [0.2, 0.0, 0.1, 0.12, 0.1])):  # fmt: skip
        runs.append(synthetic(arm, 0, "rates", 1.0, 0.5))
        runs += [synthetic(arm, 100 + i, "seeds", 1.0, 0.5 + 0.05 * i + gain) for i, gain in enumerate(gains)]
        runs.append(synthetic(arm, 100, "seeds", 9.0, 0.0))  # at a rate that was not chosen
    for measure in ("metric", "loss"):
        found = {(c.arm, c.against): c for c in analysis.compare(runs, measure, 1)}
        assert set(found) == {("adalora", "uniform"), ("adalora", "adalora/uniform"), ("adalora/uniform", "uniform")}
        better, level = found["adalora", "uniform"], found["adalora", "adalora/uniform"]
        assert better.difference == pytest.approx(0.104) and not better.covers_zero
        assert better.p_value == pytest.approx(1 / 16), "all that five seeds can show"
        assert level.difference == pytest.approx(0.0, abs=1e-9) and level.covers_zero
    said = analysis.sentences([better, level])
    assert "better by 0.1040" in said[0] and "the interval covers zero" in said[1]
    runs[-1]["data"] = "other"
    with pytest.raises(RankallocError, match="different data"):
        analysis.compare(runs, "loss", 1)


def test_arms_that_do_not_exist_are_refused():
    for text in ("adalorra", "uniform/random", "adalora/truncated"):
        with pytest.raises(ConfigError):
            arms.arm_of(text)


def test_the_corpus_is_split_by_text_and_every_genre_is_in_every_split(tmp_path):
    corpus = tmp_path / "package"
    corpus.mkdir()
    names = [f"c{'ab'[i % 2]}{i:02d}" for i in range(20)]
    (corpus / "cats.txt").write_text("".join(f"{name} {'news' if name[1] == 'a' else 'humor'}\n" for name in names))
    for name in names:
        text = f"The/at-tl {name}/np don't/do* caf\xe9/fw-nn I'm/ppss+bem\n"
        (corpus / name).write_bytes(text.encode("latin-1") * 30)
    assert brown.convert(tmp_path, tmp_path / "out") == {"train": 84, "tune": 12, "report": 24, "classes": 5}
    genres = [json.loads(line) for line in (tmp_path / "out" / "genre-report.jsonl").read_text().splitlines()]
    assert len(genres) == 24 and all(
        bool(re.search(r"\bca\d", row["text"])) == (row["label"] == "news") for row in genres
    )
    seen = {}
    for split in ("train", "tune", "report"):
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()]
        assert all(len(row["tokens"]) == len(row["labels"]) == 24 for row in rows)
        seen[split] = {word for row in rows for word in row["tokens"] if word in names}
        assert {name[1] for name in seen[split]} == {"a", "b"}
    assert not (seen["train"] & seen["tune"] or seen["report"] & (seen["train"] | seen["tune"]))
    assert sum(map(len, seen.values())) == 20
    with pytest.raises(DataError, match="npm pack"):
        brown.convert(tmp_path / "out", tmp_path / "again")


def test_rated_sentences_are_split_once_and_for_all(tmp_path):
    texts = {name: [f"{name} {i}" for i in range(20)] + ["twice"] for name in valence.SETS}
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name, rows in texts.items():
            content = "".join(f"{i}\t{i / 3}\t{text} caf\xe9\n" for i, text in enumerate(rows)).encode("latin-1")
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as package:
        package.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    assert valence.convert(tmp_path / "package.zip", tmp_path / "out") == {"train": 43, "tune": 6, "report": 12}
    rows = [json.loads(line) for split in ("train", "tune", "report")
            for line in (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()]  # fmt: skip
    assert len({row["text"] for row in rows}) == len(rows) == 61
    assert all(row["label"] == round(int(row["text"].split()[1]) / 3, 4) for row in rows if "twice" not in row["text"])
    whole = inner.getvalue()
    altered = whole[:100] + bytes(60) + whole[160:]
    for wrong in (b"no archive", b"", whole[:200], altered, whole[:10]):
        (tmp_path / "wrong.zip").write_bytes(wrong)
        if wrong.startswith(whole[:10]):
            with zipfile.ZipFile(tmp_path / "wrong.zip", "w") as package:
                package.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", wrong)
        with pytest.raises(DataError, match="pip download"):
            valence.convert(tmp_path / "wrong.zip", tmp_path / "other")
    with pytest.raises(DataError, match="pip download"):
        valence.convert(tmp_path / "missing.zip", tmp_path / "other")
    assert not (tmp_path / "other").exists()
