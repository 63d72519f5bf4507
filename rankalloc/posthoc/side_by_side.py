"""Work on many layers in parallel, a little ahead of the results that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Result = TypeVar("Result")


@contextmanager
def side_by_side(work: Callable[[str], Result], names: Iterable[str]) -> Iterator[Callable[[str], Result]]:
    """Give a function that returns ``work(name)``, to be called in the order of ``names``.

    Each worker has one of torch's threads, because the matrices of one layer are too small to gain from several;
    scipy's and numpy's own threads, which would contend with the workers, are limited to one in the meantime.
    Results are kept for twice as many layers as there are workers, so memory stays that of a few layers.
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
        with threadpool_limits(1, user_api="blas"):
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
