"""Which method finds ranks that are known? See README.md in this folder.

    python studies/planted/run.py [--variants main half] [--seeds 5] [--methods adalora ...] [--workers 2]
    python studies/planted/run.py --report         # only the table and reports/planted.html, from finished runs

Each (variant, network, method, seed, learning rate, steps) is one training run; finished ones are kept in the
JSON file and not run again, so the study can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from page import write_page
from problems import ARCHITECTURES, VARIANTS
from summary import table
from training import PROTOCOL, STEPS, few_methods, method_names, rate_of, run

from rankalloc.files import write_json, write_text
from rankalloc.training.environment import describe

HERE = Path(__file__).parent
REPORT = HERE.parents[1] / "reports" / "planted.html"
KEY = ("variant", "architecture", "method", "seed", "rate", "steps")
BROAD = ("main", "half")


def set_up() -> None:
    """One thread a process; and numbers too small to matter, which gradients become here, cost no time."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def planned(args: argparse.Namespace) -> list[tuple]:
    """The keys of the runs asked for, seed by seed, so that a study that was stopped is balanced."""
    keys = []
    for seed in range(args.seeds):
        for variant in args.variants:
            methods = args.methods or (method_names() if variant in BROAD else few_methods())
            for architecture in args.architectures:
                for method in methods:
                    for rate in args.rates or [rate_of(method)]:
                        keys.append((variant, architecture, method, seed, rate, args.steps))
    return keys


def attempt(key: tuple) -> dict:
    """A run's record; of one that fails, its key and the error: one method must not end the study."""
    try:
        return run(*key)
    except Exception as error:
        return {"protocol": PROTOCOL, **dict(zip(KEY, key, strict=True)), "failed": f"{type(error).__name__}: {error}"}


def attempts(keys: list[tuple], workers: int) -> Iterator[dict]:
    """Records in the order in which they are done."""
    if workers == 1:
        yield from map(attempt, keys)
        return
    with ProcessPoolExecutor(workers, initializer=set_up) as pool:
        for future in as_completed([pool.submit(attempt, key) for key in keys]):
            yield future.result()


def study(keys: list[tuple], output: Path, workers: int = 1) -> dict:
    """Do the runs that ``output`` does not hold yet; after each, write it anew. Returns the whole record.

    A run that failed is tried again. Runs of another protocol are kept and left alone.
    """
    record = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"runs": [], "failed": []}
    done = {key_of(item) for item in record["runs"] if item["protocol"] == PROTOCOL}
    todo = [key for key in keys if key not in done]
    for count, item in enumerate(attempts(todo, workers), start=1):
        record["failed"] = [old for old in record["failed"] if key_of(old) != key_of(item)]
        record["failed" if "failed" in item else "runs"].append(item)
        record["environment"] = describe("cpu").model_dump()
        write_json(output, record)
        print(f"[{count}/{len(todo)}] {_line(item)}", flush=True)
    return record


def key_of(item: dict) -> tuple:
    return tuple(item[name] for name in KEY)


def _line(item: dict) -> str:
    text = f"{item['variant']} {item['architecture']} {item['method']} seed {item['seed']} rate {item['rate']:g}: "
    if "failed" in item:
        return text + "failed, " + item["failed"]
    return text + f"{item['exact']:.0%} exact, error {item['relative_error']:.1e}, {item['cpu_seconds']:.0f} s"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--methods", nargs="+", choices=method_names(),
                        help="default: all in main and half, a handful in the others")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this number, exclusive (5)")
    parser.add_argument("--rates", nargs="+", type=float, help="default: one for each parametrisation")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of a run ({STEPS})")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (2)")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    parser.add_argument("--page", type=Path, default=REPORT, help="where the HTML report goes")
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    set_up()
    record = study([] if args.report else planned(args), args.output, args.workers)
    print(table(record))
    write_text(args.page, write_page(record))
    print(f"\n{args.page}")
    for item in record["failed"]:
        print(_line(item), file=sys.stderr)
    return 1 if record["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
