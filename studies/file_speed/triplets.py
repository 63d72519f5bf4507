"""The largest triplets of one square matrix, by spectrum: block Krylov beside the exact decomposition.

    python -m studies.file_speed.triplets                        side 2048, one thread
    python -m studies.file_speed.triplets --side 1024 --repeats 5

Both are timed in turn in one process and a ratio is taken within its turn, since a machine's speed changes by up to
two within minutes. Prints one JSON document: for each spectrum and rank the median ratio exact / Krylov, whether the
answer passed its check, and the share of the best energy that it lacks.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from rankalloc.posthoc import dense

from ..common.arguments import at_least_one, parse, parser_of


def matrices(side: int) -> dict[str, torch.Tensor]:
    """Pure noise, rank 8 in noise, rank 8 in the rounding of bfloat16, and rank 8."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, low = draw(side, side) * side**-0.5, 0.1 / side * draw(side, 8) @ draw(8, side)
    spread = 0.01 * side**-0.5 * draw(side, side)
    return {
        "noise": spread, "rank 8 and noise": low + spread,
        "rank 8 in bfloat16": (weight + low).bfloat16().float() - weight.bfloat16().float(), "rank 8": low,
    }


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def exact(delta: torch.Tensor, rank: int) -> None:
    """The ``rank`` largest triplets by the eigenvectors of ΔW ΔWᵀ in float64, as where Krylov is not tried."""
    wide = delta.double()
    vectors = torch.linalg.eigh(wide @ wide.T)[1][:, -rank:]
    vectors.T @ wide


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("file_speed.triplets", __doc__)
    parser.add_argument("--side", type=at_least_one, default=2048)
    parser.add_argument("--ranks", type=at_least_one, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--threads", type=at_least_one, default=1)
    options = parse(parser, argv, side=512, ranks=[16], repeats=1)
    torch.set_num_threads(options.threads)
    rows = []
    for label, delta in matrices(options.side).items():
        energy = torch.linalg.eigvalsh(delta.double() @ delta.double().T).flip(0)
        for rank in options.ranks:
            ratios = []
            for _ in range(options.repeats):
                slow, _ = timed(lambda rank=rank, delta=delta: exact(delta, rank))
                fast, found = timed(lambda rank=rank, delta=delta: dense.largest(delta, rank))
                ratios.append(slow / fast)
            left = (delta.double() - found.B.double() @ found.A.double()).square().sum()
            short = ((left - energy[rank:].sum()) / energy[:rank].sum()).item()
            rows.append({
                "spectrum": label, "rank": rank, "exact_over_krylov": round(statistics.median(ratios), 2),
                "checked": not found.exact, "short": float(f"{max(0.0, short):.2g}"),
            })
            print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"side": options.side, "threads": options.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
