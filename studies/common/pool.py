"""Cells to outcomes, on several processes, for as long as there is something to run."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

Cell = TypeVar("Cell", bound=Hashable)
Outcome = TypeVar("Outcome")


def outcomes(
    work: Callable[[Cell], Outcome],
    todo: Callable[[], Iterable[Cell]],
    workers: int = 1,
    deadline: float = math.inf,
    set_up: Callable[[], None] | None = None,
) -> Iterator[tuple[Cell, Outcome]]:
    """Yield each cell with its outcome, in the order in which they finish.

    Args:
        work: a function of a module, since workers import it.
        todo: the cells still to run, most urgent first. It is asked again whenever a worker is free, so that what has
            finished may call for further cells. No cell is begun twice.
        workers: processes; with 1 the work is done in this one.
        deadline: ``time.monotonic()`` after which no cell is begun.
        set_up: called first in each worker process, never in this one.
    """
    begun: set[Cell] = set()

    def following() -> Iterator[Cell]:
        while time.monotonic() < deadline:
            cell = next((cell for cell in todo() if cell not in begun), None)
            if cell is None:
                return
            begun.add(cell)
            yield cell

    if workers == 1:
        for cell in following():
            yield cell, work(cell)
        return
    running: dict[Future[Outcome], Cell] = {}
    # not forked: torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=set_up) as pool:
        while True:
            cells = following()
            while len(running) < workers and (cell := next(cells, None)) is not None:
                running[pool.submit(work, cell)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
