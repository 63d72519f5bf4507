"""Work on many layers, side by side and a little ahead of whoever asks for the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


@contextmanager
def side_by_side(work: Callable[[str], Result], names: Iterable[str]) -> Iterator[Callable[[str], Result]]:
    """A callable that gives ``work(name)``; meant to be asked in the order of ``names``.

    One thread of torch's for each worker: matrices of a layer are too small to gain from several. Results are held
    for twice as many layers as there are workers, so memory stays that of a few layers.
    """
    threads, queue = torch.get_num_threads(), iter(names)
    waiting: dict[str, Future] = {}
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def result(name: str) -> Result:
        while len(waiting) < 2 * threads and (following := next(queue, None)) is not None:
            waiting[following] = pool.submit(work, following)
        return waiting.pop(name).result() if name in waiting else work(name)

    torch.set_num_threads(1)
    try:
        yield result
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
