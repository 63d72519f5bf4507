"""What does choosing ranks cost, beside plain LoRA, PEFT's AdaLoRA and a frozen model? See README.md in this folder.

    python -m studies.speed                               # everything, about an hour on 2 cores
    python -m studies.speed --parts steps allocation      # some of it; the rest of reports/speed.json stays
    python -m studies.speed --parts steps --kernel python # without the compiled kernel
    python -m studies.speed --parts steps --products torch    # torch chooses how frozen layers are multiplied
    python -m studies.speed --parts runs --freed returned # with a heap that glibc returns to the system
    python -m studies.speed --report                      # only the table and the figure of what was measured

Only ratios within one run mean anything: a machine's speed changes from minute to minute.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rankalloc.errors import RankallocError
from rankalloc.layers import native, products
from rankalloc.training.environment import describe
from rankalloc.training.host_memory import keep_freed_memory

from ..common.arguments import QUICK, at_least_one, parse, parser_of
from ..common.results import Results
from . import allocation, arms, memory, operators, steps, summary, whole_runs


def parts(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """{part: what measures it}."""
    return {
        "steps": lambda: steps.beside_peers(
            arms.bert, arms.bert_batch(), arms.BERT_TARGETS, args.rank, args.rounds, args.round_steps
        ),
        "decoder": lambda: steps.beside_peers(
            arms.llama, arms.llama_batch(), arms.LLAMA_TARGETS, args.rank, args.rounds, args.round_steps,
            kinds=(arms.FLOOR, arms.PEFT_LORA, arms.PEFT_ADALORA, arms.DEFAULT),
        ),
        "freeze": lambda: steps.after_the_freeze(args.rank, min(args.rounds, 30)),
        "runs": lambda: whole_runs.measure(args.rank, args.steps, min(args.rounds, 9)),
        "runs without dropout": lambda: whole_runs.measure(args.rank, args.steps, min(args.rounds, 9), dropout=False),
        "growth": lambda: steps.growth(min(args.rounds, 20)),
        "operators": operators.measure,
        "memory": lambda: memory.measure(args.rank),
        "allocation": allocation.measure,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("speed", __doc__)
    parser.add_argument("--parts", nargs="+", help="some of the parts (default: all)")
    parser.add_argument("--report", action="store_true", help="measure nothing: print and draw what has been measured")
    parser.add_argument("--rounds", type=at_least_one, default=60, help="alternating rounds (60)")
    parser.add_argument("--round-steps", type=at_least_one, default=2, help="steps of each arm in a round (2)")
    parser.add_argument("--steps", type=at_least_one, default=60, help="steps of a whole run (60)")
    parser.add_argument("--rank", type=at_least_one, default=12, help="rank of every adapter (12)")
    parser.add_argument(
        "--kernel", choices=("compiled", "python"), default="compiled",
        help="compiled builds it where it is not built yet; what is measured in python is kept beside the rest",
    )  # fmt: skip
    parser.add_argument(
        "--freed", choices=("kept", "returned"), default="kept",
        help="whether the process keeps what it frees, for all kinds; the other is kept beside the rest",
    )  # fmt: skip
    parser.add_argument(
        "--products", choices=("chosen", "torch"), default="chosen",
        help="how adapters multiply by frozen weights: as rankalloc chooses for this processor, or as torch does",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("reports/speed.json"))
    args = parse(
        parser, argv, parts=["steps", "operators", "memory"], rounds=4, kernel="python",
        output=QUICK / "speed" / "speed.json",
    )  # fmt: skip

    known = parts(args)
    wanted = [] if args.report else args.parts or list(known)
    if strangers := [part for part in wanted if part not in known]:
        parser.error(f"no part {strangers[0]!r}; there are {', '.join(known)}")
    taken = (args.rounds + 1) * (args.round_steps + 1)  # with a round and steps that are not counted
    if wanted and taken < arms.EVERY:
        parser.error(f"an arm takes {taken} steps and allocates every {arms.EVERY}; raise --rounds or --round-steps")
    results = Results(args.output, question=__doc__.splitlines()[0])
    if wanted:
        set_up(args, parser)
    suffix = setting(args)
    for part in wanted:
        print(f"{part} …", flush=True)
        results.record[part + suffix] = {
            "measured": known[part](), "environment": describe("cpu").model_dump(), "freed memory": args.freed,
            "load": os.getloadavg()[0],
        }  # fmt: skip
        results.save()
    print(summary.table(results.record))
    summary.figure(results.record, args.output)


def set_up(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Settle kernel, products and heap for this process and those it starts."""
    os.environ[native.SWITCH] = "1" if args.kernel == "compiled" else "0"
    if args.products == "torch":
        os.environ[products.SWITCH] = "0"
    if args.kernel == "compiled":
        try:
            native.build()
        except RankallocError as error:
            parser.error(f"{error}; --kernel python measures without it")
    if args.freed == "kept" and not keep_freed_memory():
        parser.error(
            "this process cannot keep what it frees: only glibc can, and MALLOC_… variables take precedence; "
            "--freed returned measures without it"
        )


def setting(args: argparse.Namespace) -> str:
    """What is added to the name of a part that was measured under other than the default settings."""
    return (
        ", python" * (args.kernel == "python") + ", torch's products" * (args.products == "torch")
        + ", freed memory returned" * (args.freed == "returned")
    )  # fmt: skip
