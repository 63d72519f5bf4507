"""Claims of README and docs about variants, finished files, searches and audits, as in ``claims.py``."""

from __future__ import annotations

from .claims import AUDITS, HELP, STUDIES, Claim
from .findings import (
    audit,
    bottleneck,
    closed,
    cut_to,
    dylora_rows,
    furthest_variant,
    is_level,
    kept,
    peers,
    read,
    recover,
    refined,
    simulated,
    sweep,
    variant_rows,
    wrong,
)  # fmt: skip

SHRINKING, VARIANTS = "docs/shrinking.md", "docs/variants.md"

OTHER_CLAIMS = [
    Claim(
        "Three eighths of the parameters keep 99.4 % of F1 without data; a quarter keeps 99.8 % with gradients",
        (HELP,),
        lambda: [*kept("data-free", 3 / 8), *kept("calibrated", 1 / 4)],
    ),
    Claim(
        "three eighths of a rank 16 LoRA's parameters kept 99.4 % of its F1 without any data, and a quarter kept 99.8 "
        "% when weighted by its gradients", (SHRINKING,),
        lambda: [
            kept("data-free", 3 / 8)[0], read("studies/shrink/results.json")["rank"], kept("data-free", 3 / 8)[1],
            *kept("calibrated", 1 / 4),
        ],
    ),
    Claim(
        "three quarters: what is left keeps 99.4 % of F1 without any data, and 99.8 % when weighed by gradients",
        (STUDIES,),
        lambda: [1 - kept("data-free", 1 / 4)[0], kept("data-free", 1 / 4)[1], kept("calibrated", 1 / 4)[1]],
    ),
    Claim(
        "rsLoRA, LoRA+, LoRA-FA and VeRA come within 0.027 F1 of it; rsLoRA and `auto` are level with it", (HELP,),
        lambda: [furthest_variant()], lambda: is_level("rsLoRA") and is_level("auto"),
    ),
    Claim(
        "rsLoRA, LoRA+, LoRA-FA and VeRA came to within 0.027 F1 of tuned plain LoRA (0.614); rsLoRA and `auto` were "
        "level with it",
        (VARIANTS,), lambda: [furthest_variant(), variant_rows()["LoRA"]["f1"]],
        lambda: is_level("rsLoRA") and is_level("auto"),
    ),
    Claim(
        "all come within 0.027 F1 of it; rsLoRA is level, the others are a little below", (STUDIES,),
        lambda: [furthest_variant()],
        lambda: [arm for arm in variant_rows() if arm != "LoRA" and is_level(arm)]
        == ["rsLoRA", "auto", "auto, ranks uniform"],
    ),
    Claim(
        "At 3 of 4 ranks, given enough steps", (HELP,),
        lambda: [sum(r["within"] for r in dylora_rows()), len(dylora_rows())],
    ),
    Claim(
        "at 3 of 4 ranks it is within two standard errors or better; at rank 1 it is 0.003 nats behind", (STUDIES,),
        lambda: [sum(r["within"] for r in dylora_rows()), len(dylora_rows()), dylora_rows()[0]["difference"]],
        lambda: [row["rank"] for row in dylora_rows() if not row["within"]] == [1],
    ),
    Claim(
        "two thirds of what a cut to a quarter costs come back; the rest, 0.0025 F1, cannot be told from nothing on "
        "six adapters",
        (STUDIES,), lambda: [
            (recover("cut, then steps") - recover("cut")) / (recover("whole") - recover("cut")), cut_to(),
            recover("whole") - recover("cut, then steps"), len(read("studies/recover/results.json")),
        ],
    ),
    Claim(
        "F1 rose by 0.011 on adapters cut to a quarter, 0.010 more than by shuffled weights; the loss did not fall",
        (STUDIES,),
        lambda: [refined("select", "as it was"), cut_to(), refined("select", "select, shuffled")],
        lambda: refined("select", "as it was", "loss") > 0,
    ),
    Claim(
        "a trained router closes two thirds of the gap to the right adapter, the best constant weights half, one LoRA "
        "trained on both 87 %; Houlsby's bottlenecks are 0.014 nats behind LoRA of their size", (STUDIES,),
        lambda: [
            closed("gate a layer", "gate a layer, sigmoid", "gate a layer, scales", "one gate"), closed("constant"),
            100 * closed("joint"), bottleneck("bottleneck"),
        ],
    ),
    Claim(
        "at least as good in the mean of three seeds, in 6 % fewer steps, and it reached the grid's best in 12 to 26 % "
        "of the grid's", (STUDIES,),
        lambda: [
            len(sweep("steps")), 100 - 100 * sum(sweep("steps")) / sum(sweep("steps", "grid")), min(sweep("until")),
            max(sweep("until")),
        ],
        lambda: sum(sweep("f1")) >= max(sum(sweep("f1", other)) for other in ("random", "grid"))
        and sum(sweep("steps", "random")) == sum(sweep("steps", "grid")),
    ),
    Claim(
        "a wrong claim in 5 % where nothing differs; one standard deviation found in 80 % within 8 seeds", (STUDIES,),
        lambda: [simulated("claimed without a difference"), simulated("better at 1 sd"), max(audit("pos").looks)],
    ),
    Claim(
        "a difference of one standard deviation is found in 80 % of audits within 8 seeds", (AUDITS,),
        lambda: [simulated("better at 1 sd"), max(audit("pos").looks)],
    ),
    Claim(
        "the one case that was simulated came to 3.4 %", (AUDITS,),
        lambda: [wrong("primary at a margin of 2 sd, others 0")],
    ),
    Claim(
        "with strongly skewed failures 7.1 % of simulated audits made a wrong claim", (AUDITS,),
        lambda: [wrong("no difference, the method fails at times")],
    ),
    Claim("did no harm (4.5 %)", (AUDITS,), lambda: [wrong("no difference, heavy tails")]),
    Claim(
        "shrinking takes 0.3 s where kohya's and PEFT's tools take 10 to 12, at less error; extracting half of "
        "mergekit's time and a quarter of its memory", (STUDIES,),
        lambda: [
            *(peers(f"shrink: {tool}", "seconds") for tool in ("rankalloc", "kohya", "PEFT svd")),
            *(peers("extract: rankalloc", of) / peers("extract: mergekit", of) for of in ("seconds", "megabytes")),
        ],
        lambda: all(
            peers("shrink: rankalloc", "error") < peers(f"shrink: {other}", "error")
            for other in ("kohya", "kohya sv_fro", "kohya sv_ratio", "PEFT svd")
        ),
    ),
]  # fmt: skip
