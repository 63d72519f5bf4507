"""The study of routing: domains that share no text, gaps between average and oracle, tables of what is there."""

from __future__ import annotations

import pytest

from studies.mix.analysis import arms_of, routing_table, seeds_of
from studies.mix.domains import DOMAINS, SIZES, both, domain
from studies.mix.routing import ROUTERS, SHARES
from studies.mix.run import main


def run(losses, **more):
    scores = {"loss": dict(zip(DOMAINS, losses, strict=True)), "f1": dict.fromkeys(DOMAINS, 0.5)}
    return {"tune": scores, "report": scores, "params": 10, **more}


def measured():
    """A seed: each adapter 1.0 in its own domain; the average 2.0, routers 1.5 at one rate and worse at another."""
    found = {"audience at 0.1, seed 0": run((1, 4)), "critics at 0.1, seed 0": run((4, 1)),
             "critics at 0.2, seed 0": run((1, 3)), "joint at 0.1, seed 0": run((1.25, 1.25))}
    for share in SHARES:
        place = f"{share:g} of the parameters, seed 0"
        found |= {f"{arm}, {place}": run((2, 2)) for arm in ("average", "constant", "compose")}
        found[f"random router, {place}"] = run((3, 2), gates=dict.fromkeys(DOMAINS, 0.5))
        for arm in ROUTERS:
            found[f"{arm} at 0.1, {place}"] = run((1.5, 1.5), gates={"audience": 0.75, "critics": 0.85})
            found[f"{arm} at 0.2, {place}"] = run((9, 9))
    return found


def test_a_gap_is_nothing_for_the_average_and_one_for_the_oracle():
    record = measured()
    arms = arms_of(record, 1.0, 0)
    assert arms["oracle"]["report"]["loss"] == {"audience": 1, "critics": 1} and seeds_of(record) == [0]
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in routing_table(record, 0.5).splitlines()[2:]}
    assert [rows[arm][6] for arm in ("average", "oracle", "one gate", "random router", "joint")] == [
        "+0.00", "+1.00", "+0.50", "-0.50", "+0.75"
    ]  # fmt: skip
    assert rows["one gate"][7].startswith("0.80") and rows["joint"][7].startswith("–")
    del record["average, 0.5 of the parameters, seed 0"]
    assert seeds_of(record) == [] and len(routing_table(record, 1.0).splitlines()) == 2


def test_the_command_reports_without_running(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["rooting"])
    assert "there is no part 'rooting'" in capsys.readouterr().err
    main(["--report", "--output", str(tmp_path / "results.json")])
    assert "own adapter's gate" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_domains_share_no_text_and_contradict_each_other():
    windows = {
        name: [tuple(row["input_ids"]) for part in domain(name).splits.values() for row in part] for name in DOMAINS
    }  # fmt: skip
    assert all(len(set(rows)) == len(rows) == sum(SIZES.values()) for rows in windows.values())
    assert not set(windows["audience"]) & set(windows["critics"])
    capitals = {
        name: sum(label % 3 > 0 for row in domain(name).splits["train"] for label in row["labels"] if label >= 0)
        for name in DOMAINS
    }  # fmt: skip
    assert capitals["audience"] > 2000 and capitals["critics"] < 20
    assert len(both().splits["tune"]) == 2 * SIZES["tune"]
