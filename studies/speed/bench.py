"""What does choosing ranks cost, beside plain LoRA, PEFT's AdaLoRA and a frozen model? See README.md in this folder.

    python studies/speed/bench.py                             # everything, about an hour on 2 cores
    python studies/speed/bench.py --parts steps allocation    # some of it; the rest of reports/speed.json stays
    python studies/speed/bench.py --parts steps --kernel python    # as it is where the kernel is not built
    python studies/speed/bench.py --parts steps --products torch   # frozen layers multiplied by whom torch chooses
    python studies/speed/bench.py --parts runs --freed returned    # with a heap that glibc returns to the system
    python studies/speed/bench.py --parts                     # only the table and the figure of what was measured

Only ratios within one run mean anything: a machine's speed changes from minute to minute.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import allocation
import arms
import memory
import operators
import steps
import summary
import whole_runs

from rankalloc.errors import RankallocError
from rankalloc.files import write_json
from rankalloc.layers import native, products
from rankalloc.training.environment import describe
from rankalloc.training.host_memory import keep_freed_memory


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", help="some of the parts (default: all)")
    parser.add_argument("--rounds", type=int, default=60, help="alternating rounds (default 60)")
    parser.add_argument("--round-steps", type=int, default=2, help="steps of each arm in a round (default 2)")
    parser.add_argument("--steps", type=int, default=60, help="steps of a whole run (default 60)")
    parser.add_argument("--rank", type=int, default=12, help="rank of every adapter (default 12)")
    parser.add_argument(
        "--kernel", choices=("compiled", "python"), default="compiled",
        help="compiled builds it where it is not built yet; what is measured in python is kept beside the rest",
    )
    parser.add_argument(
        "--freed", choices=("kept", "returned"), default="kept",
        help="whether the process keeps what it frees, for all kinds alike; what is measured otherwise is kept beside",
    )
    parser.add_argument(
        "--products", choices=("chosen", "torch"), default="chosen",
        help="who multiplies by frozen weights in the adapters: whom rankalloc chooses for this processor, or torch",
    )
    parser.add_argument("--output", type=Path, default=Path("reports/speed.json"))
    args = parser.parse_args()

    known = parts(args)
    wanted = list(known) if args.parts is None else args.parts
    if strangers := [part for part in wanted if part not in known]:
        parser.error(f"no part {strangers[0]!r}; there are {', '.join(known)}")
    record = json.loads(args.output.read_text()) if args.output.exists() else {}
    record.setdefault("question", __doc__.splitlines()[0])
    # of the processes it starts as well
    os.environ[native.SWITCH] = "1" if args.kernel == "compiled" else "0"
    if args.products == "torch":
        os.environ[products.SWITCH] = "0"
    if wanted and args.kernel == "compiled":
        try:
            native.build()
        except RankallocError as error:
            parser.error(f"{error}; --kernel python measures without it")
    if wanted and args.freed == "kept" and not keep_freed_memory():
        parser.error(
            "this process cannot keep what it frees: glibc alone can, and what MALLOC_… variables say goes first; "
            "--freed returned measures without it"
        )
    without = (
        ", python" * (args.kernel == "python") + ", torch's products" * (args.products == "torch")
        + ", freed memory returned" * (args.freed == "returned")
    )
    for part in wanted:
        print(f"{part} …", flush=True)
        record[part + without] = {
            "measured": known[part](), "environment": describe("cpu").model_dump(), "freed memory": args.freed,
            "load": os.getloadavg()[0],
        }
        write_json(args.output, record)
    print(summary.table(record))
    summary.figure(record, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
