"""Every claim of README and docs that a study answers for, with what computes its numbers from a committed JSON.

A new number in the places that ``test_claims.py`` names needs a row: the words as they stand, where they stand, and
what computes each of their numbers, in order and in the unit of the text. ``holds`` checks what the words say without a
number. Numbers that are no findings are in ``SETTINGS``, with the reason; the words of a row may contain them. Further
rows are in ``other_claims.py`` (variants, files, searches, audits) and ``cost_claims.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from studies.chat.arms import ATTACH as CHAT_ATTACH
from studies.chat.arms import DRIVEN as CHAT_DRIVEN
from studies.default.arms import PEAK
from studies.doors.arms import ATTACH, DRIVEN
from studies.frontier.analysis import MARGIN
from studies.tight.analysis import LEVEL
from studies.tight.arms import SIZES

from .findings import (
    HAND,
    TASKS,
    all_above_zero,
    audit,
    by,
    chat,
    chat_seeds,
    default,
    door_runs,
    doors,
    finds_every_rank,
    frontier,
    is_stable,
    mean_of,
    no_gain_is_shown,
    planted_are_found,
    planted_errors,
    points,
    rates_beside_attach,
    read,
    steps_of,
    tight,
    tried,
)  # fmt: skip

README, HELP, STUDIES = "README.md", "docs/does-it-help.md", "studies/README.md"
AUDITS, DOORS = "docs/audits.md", "docs/doors.md"


class Claim(NamedTuple):
    """Words that stand in ``places``, what computes their numbers, and what else they say."""

    words: str
    places: tuple[str, ...]
    numbers: Callable[[], Sequence[float]] = list
    holds: Callable[[], bool] = lambda: True


class Setting(NamedTuple):
    """Words whose numbers are no findings, and why."""

    words: str
    places: tuple[str, ...]
    reason: str


TIGHT = [
    Claim(
        "with at most one rank a layer `auto` was ahead of the best pattern written by hand, on two tagging tasks at "
        "four sizes",
        (README,), lambda: [len(TASKS), len(tight(HAND)) / len(TASKS)],
        lambda: all(row["difference"] > 0 for row in tight(HAND)),
    ),
    Claim(
        "Below one rank the gain is the placement's", (HELP,),
        holds=lambda: all(all_above_zero(tight("auto, shuffled ranks", size)) for size in list(SIZES)[:3]),
    ),
    Claim(
        "on two tasks at 1/8, 1/4, 1/2 and 1 rank a layer it is 0.0037 to 0.0174 nats ahead of the best pattern by "
        "hand, in six of eight cells with an interval that excludes zero", (HELP,),
        lambda: [
            len(TASKS), *SIZES.values(), min(by(tight(HAND), "difference")), max(by(tight(HAND), "difference")),
            sum(row["low"] > 0 for row in tight(HAND)), len(tight(HAND)),
        ],
    ),
    Claim(
        "punctuation 0.0051 nats (95 % 0.0015 to 0.0088), part of speech 0.0106 (0.0049 to 0.0162), 96 steps, six "
        "paired seeds",
        (HELP,), lambda: [
            *by(tight("every layer"), "difference", "low", "high"), steps_of("tight"), tight("every layer")[0]["seeds"],
        ],
    ),
    Claim(
        "With its ranks on other layers the same method is 0.0048 and 0.0095 behind: level with uniform LoRA", (HELP,),
        lambda: by(tight("auto, shuffled ranks", "one"), "difference"),
        lambda: all(
            abs(one["loss"] - other["loss"]) < LEVEL
            for one, other in zip(tight("auto, shuffled ranks", "one"), tight("every layer"), strict=True)
        ),
    ),
    Claim(
        "ahead of the best pattern by hand on two tasks at four sizes, in six of eight with an interval that excludes "
        "zero, and of tuned uniform LoRA at one rank", (STUDIES,),
        lambda: [
            len(TASKS), len(tight(HAND)) / len(TASKS), sum(row["low"] > 0 for row in tight(HAND)), len(tight(HAND)),
        ],
        lambda: all(row["difference"] > 0 for row in tight(HAND)) and all_above_zero(tight("every layer")),
    ),
]  # fmt: skip

ONE_RUN = "auto, recovered"


def share_of_the_steps() -> float:
    return frontier(ONE_RUN)["steps"] / frontier("uniform")["steps"]


FRONTIER = [
    Claim(
        "one `auto` run, cut to 1 to 32 ranks a layer and trained on a little at each, has the area under the curve of "
        "six tuned runs in a fifth of their steps; at one rank it is 0.8 points behind", (STUDIES,),
        lambda: [
            min(frontier(ONE_RUN)["budgets"]), max(frontier(ONE_RUN)["budgets"]), len(frontier("uniform")["budgets"]),
            share_of_the_steps(), -100 * frontier(ONE_RUN)["budgets"][1]["difference"],
        ],
        lambda: frontier(ONE_RUN)["low"] < 0 < frontier(ONE_RUN)["high"],
    ),
    Claim(
        "from 1 to 32 ranks a layer? | Nearly: on punctuation one `auto` run, cut and trained on a little at each, has "
        "the area under the curve of six tuned uniform runs (0.6285 and 0.6293) in a fifth of their steps. At one rank "
        "it is 0.8 points F1 behind (90 % 0.7 to 1.0), and level within 0.2 points is shown at no budget", (HELP,),
        lambda: [
            min(frontier(ONE_RUN)["budgets"]), max(frontier(ONE_RUN)["budgets"]), len(frontier("uniform")["budgets"]),
            frontier(ONE_RUN)["area"], frontier("uniform")["area"], share_of_the_steps(),
            *(-100 * frontier(ONE_RUN)["budgets"][1][what] for what in ("difference", "high", "low")), 100 * MARGIN,
        ],
        lambda: not any(
            row["low"] > -MARGIN and row["high"] < MARGIN for row in frontier(ONE_RUN)["budgets"].values()
        ),
    ),
]  # fmt: skip

AT_RANK_THREE = [
    Claim("no gain over tuned uniform LoRA was shown", (README,), holds=lambda: all(map(no_gain_is_shown, TASKS))),
    Claim("no gain over tuned uniform LoRA is shown", (HELP,), holds=lambda: all(map(no_gain_is_shown, TASKS))),
    Claim(
        "with equal tuning and 96 steps? | No gain is shown on either task: punctuation 0.0 points F1 (90 % −0.4 to "
        "+0.3), brown 0.0 points accuracy (−0.2 to +0.2), 8 paired seeds", (HELP,),
        lambda: [
            audit("pos").config["training"]["steps"], *points("punctuation", "uniform"), *points("pos", "uniform"),
            audit("pos").seeds,
        ],
        lambda: all(map(no_gain_is_shown, TASKS)),
    ),
    Claim(
        "On punctuation at 10,368 parameters, yes: 2.8 points F1 over tuned uniform LoRA in the first layers (90 % "
        "1.7 to 4.0), and 2.7 over its own ranks on other layers (0.4 to 4.9), 8 paired seeds", (HELP,),
        lambda: [
            audit("tight-punctuation").params, *points("tight-punctuation", "uniform"),
            *points("tight-punctuation", "shuffled"), audit("tight-punctuation").seeds,
        ],
        lambda: all(audit("tight-punctuation").comparison(arm).claim == "better" for arm in ("uniform", "shuffled")),
    ),
    Claim(
        "The chosen pattern is stable from seed to seed, and handing it to other layers costs 0.0 to 0.1 points",
        (HELP,),
        lambda: sorted(points(task, "shuffled")[0] for task in TASKS), lambda: all(map(is_stable, TASKS)),
    ),
    Claim(
        "at a mean rank of 3 no gain of `auto` over tuned uniform LoRA is shown on either; the chosen pattern is "
        "stable from seed to seed", (STUDIES,),
        holds=lambda: all(no_gain_is_shown(task) and is_stable(task) for task in TASKS),
    ),
    Claim(
        AUDIT_SAYS := "At 124,416 parameters no gain of auto over tuned uniform LoRA is shown, nor that the two are "
        "equivalent: 0.0 points F1 (90 % −0.4 to +0.3, 8 seeds).", (AUDITS,),
        holds=lambda: audit("punctuation").sentence == AUDIT_SAYS,
    ),
]  # fmt: skip

FIVE = ("punctuation", "brown", "genre", "valence", "sentiment")


def better_on() -> list[str]:
    """The tasks on which auto has less loss than tuned uniform LoRA, shown by an interval without zero."""
    return [task for task in FIVE if default("auto")[task].low > 0]


def worse_on_none() -> bool:
    return all(default("auto")[task].high >= 0 for task in FIVE)


def level_with_equal_ranks() -> list[str]:
    """The tasks on which no difference from equal ranks is shown, neither in loss nor in the task's metric."""
    return [
        task for task in FIVE
        if all(default("auto", "auto/uniform", what)[task].covers_zero for what in ("loss", "metric"))
    ]  # fmt: skip


def failed(arm: str) -> int:
    """Runs on sentiment's report split that stayed at chance."""
    runs = [r for r in read("studies/default/results.json")["runs"] if r["phase"] == "seeds" and r["arm"] == arm]
    return sum(r["report"]["accuracy"] < 0.55 for r in runs if r["task"] == "sentiment")


DEFAULT = [
    Claim(
        "with one rank a layer its loss was below tuned uniform LoRA's on three of five tasks and above it on none (on "
        "one of them accuracy was 0.9 points lower)",
        (README,), lambda: [
            len(better_on()), len(default("auto")), -100 * default("auto", measure="metric")["sentiment"].difference,
        ], worse_on_none,
    ),
    Claim(
        "equal ranks trained the same way were level on four of the five", (README,),
        lambda: [len(level_with_equal_ranks()), len(FIVE)],
        lambda: all(default("auto/uniform")[task].low > 0 for task in ("brown", "genre")),
    ),
    Claim(
        "equal ranks trained the same way were level on four of five tasks", (HELP,),
        lambda: [len(level_with_equal_ranks()), len(FIVE)],
        lambda: all(default("auto/uniform")[task].low > 0 for task in ("brown", "genre")),
    ),
    Claim(
        "At one rank a layer and 160 steps it is better than tuned uniform LoRA in loss on three of five tasks: "
        "punctuation 0.0031, part of speech 0.0195, genre 0.1315 nats (accuracy +0.5 and +3.4 points on the latter "
        "two). On sentiment and on rated sentences no difference in loss is shown, and on sentiment accuracy is 0.9 "
        "points lower (0.1 to 1.6)",
        (HELP,), lambda: [
            steps_of("default"), len(better_on()), len(FIVE),
            *(default("auto")[task].difference for task in FIVE[:3]),
            *(100 * default("auto", measure="metric")[task].difference for task in ("brown", "genre")), 2,
            *(-100 * value for c in [default("auto", measure="metric")["sentiment"]]
              for value in (c.difference, c.high, c.low)),
        ],
        lambda: better_on() == list(FIVE[:3]) and all(default("auto")[task].covers_zero for task in FIVE[3:]),
    ),
    Claim(
        "with equal ranks the same method is level on four of the five; on sentiment one of its six runs failed to "
        "learn, and none of `auto`'s. A LoRA of four times the size, cut afterwards without data, is 0.0216 and 0.0580 "
        "nats behind tuned uniform LoRA on the two tagging tasks",
        (HELP,), lambda: [
            len(level_with_equal_ranks()), len(FIVE), default("auto")["sentiment"].seeds, PEAK,
            *(-default("uniform/truncated")[task].difference for task in FIVE[:2]), 2,
        ],
        lambda: (failed("auto/uniform"), failed("auto")) == (1, 0) and "sentiment" not in level_with_equal_ranks(),
    ),
    Claim(
        "With equal ranks it is 0.0087 behind on punctuation (0.0042 to 0.0133); on part of speech no difference is "
        "shown", (HELP,),
        lambda: by(tight("auto, equal ranks")[:1], "difference", "low", "high"),
        lambda: tight("auto, equal ranks")[1]["low"] < 0 < tight("auto, equal ranks")[1]["high"],
    ),
    Claim(
        "at one rank a layer its loss was below tuned uniform LoRA's on three of five tasks and above it on none; with "
        "equal ranks it was level on four", (STUDIES,),
        lambda: [len(better_on()), len(FIVE), len(level_with_equal_ranks())], worse_on_none,
    ),
]  # fmt: skip

WHERE = [
    Claim(
        "`auto` finds every planted rank, also with correlated inputs and noisy labels", (HELP,),
        holds=lambda: planted_are_found("auto", "main", "correlated", "noise"),
    ),
    Claim(
        "`auto` and `singular-value` find every one when the budget is the planted total", (STUDIES,),
        holds=lambda: planted_are_found("auto", "main") and planted_are_found("singular-value", "main"),
    ),
    Claim(
        "level with tuned equal ranks at two ranks a layer; at half a rank a layer level by driven PEFT layers, and "
        "0.043 nats behind by `ra.attach` (five seeds, 64 steps)", (HELP,),
        lambda: [chat("half", CHAT_ATTACH)[0], chat_seeds(), steps_of("chat")],
        lambda: chat("half", CHAT_ATTACH)[1] > 0 and all(
            chat(budget, arm)[1] < 0 < chat(budget, arm)[2]
            for budget, arm in (("two", CHAT_ATTACH), ("two", CHAT_DRIVEN), ("half", CHAT_DRIVEN))
        ),
    ),
    Claim(
        "at half a rank level by driven PEFT layers and behind by `ra.attach`", (STUDIES,),
        holds=lambda: chat("half", CHAT_ATTACH)[1] > 0 > chat("half", CHAT_DRIVEN)[1],
    ),
    Claim(
        "level with `ra.attach` on punctuation, better on a tiny Llama, every planted rank found. Its best rates are "
        "0.5 to 1 of",
        (HELP,), lambda: [min(rates_beside_attach()), max(rates_beside_attach())],
        lambda: doors("punctuation")[1] < 0 < doors("punctuation")[2] and doors("language")[2] < 0
        and finds_every_rank(DRIVEN),
    ),
    Claim(
        "level on punctuation, better on a tiny Llama, every planted rank found and 0.99 to 1.15 times the error",
        (STUDIES,),
        lambda: [min(planted_errors()), max(planted_errors())],
        lambda: doors("punctuation")[1] < 0 < doors("punctuation")[2] and doors("language")[2] < 0,
    ),
    Claim(
        "every rank found by both; error 0.99 to 1.15 times", (DOORS,),
        lambda: [min(planted_errors()), max(planted_errors())],
        lambda: finds_every_rank(DRIVEN) and finds_every_rank(ATTACH),
    ),
    Claim(
        "punctuation, 6 paired seeds | loss +0.0016 (−0.0020 to +0.0051), F1 +0.0003 (−0.0100 to +0.0105)", (DOORS,),
        lambda: [
            len(door_runs("punctuation", DRIVEN)), *doors("punctuation"),
            *doors("punctuation", value=lambda run: run["f1"]),
        ],
    ),
    Claim(
        "5 paired seeds | loss 0.0520 against 0.0587; LoRA of equal size 0.0688", (DOORS,),
        lambda: [
            len(door_runs("language", DRIVEN)),
            *(mean_of(door_runs("language", arm), "loss") for arm in (DRIVEN, ATTACH, "LoRA, equal size")),
        ],
    ),
    Claim(
        "at 1e-3 its loss on the tiny Llama is four times that of PEFT's layers", (DOORS,),
        lambda: [mean_of(tried("language", ATTACH, 1e-3), "loss") / mean_of(tried("language", DRIVEN, 1e-3), "loss")],
    ),
    Claim(
        "It bears a rate at which both kinds of B·A from that peak rank fail (punctuation, 1.6e-2). Its best rates "
        "were one to two times those of PEFT's layers", (DOORS,),
        lambda: [max(1 / rate for rate in rates_beside_attach())],
        lambda: tried("punctuation", ATTACH, 1.6e-2)[0]["f1"] > 0.5 and min(rates_beside_attach()) > 0
        and not any(tried("punctuation", arm, 1.6e-2)[0]["f1"] for arm in ("attach, lora", DRIVEN)),
    ),
]  # fmt: skip

CLAIMS = [*TIGHT, *FRONTIER, *AT_RANK_THREE, *DEFAULT, *WHERE]

SETTINGS = [
    Setting("95 %", (HELP,), "the level of an interval"),
    Setting("90 %", (HELP, AUDITS), "the level of an interval"),
    Setting("At a mean rank of 3", (README, HELP), "the budget"),
    Setting("at a mean rank of 3", (HELP, STUDIES), "the budget"),
    Setting("two ranks a layer", (HELP, STUDIES), "the budget"),
    Setting("half a rank", (HELP, STUDIES), "the budget"),
    Setting("does `auto` help on six tasks", (STUDIES,), "those of the study, of which five have been run"),
    Setting("within two standard errors", (STUDIES,), "the study's criterion"),
    Setting("at rank 1 it is", (STUDIES,), "one of the ranks compared"),
    Setting("at 1e-3 its loss", (DOORS,), "the rate that was tried"),
    Setting("(punctuation, 1.6e-2)", (DOORS,), "the rate that was tried"),
]
"""Numbers in the same places that are no findings."""
