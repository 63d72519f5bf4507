"""Stopping a run in the middle, so that it can be continued to the bit: a signal, a checkpoint, an exception.

Schedulers send SIGTERM some seconds before they take a machine away, and so does a sweep to its own workers. The run
then writes a checkpoint at the end of the step that it is in.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from ..errors import RankallocError


class Preempted(RankallocError):
    """A run was asked to stop, and has written the checkpoint that it goes on from."""


class Stop:
    """Whether this process has been asked to stop: by SIGTERM, or because the process that started it is gone."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._parent: int | None = None

    def __call__(self) -> bool:
        return self._asked.is_set() or (self._parent is not None and os.getppid() != self._parent)

    def ask(self) -> None:
        """Stop as soon as possible."""
        self._asked.set()

    def with_parent(self, parent: int | None) -> Stop:
        """Stop, too, when the process with this number no longer is the parent."""
        self._parent = parent
        return self

    @contextmanager
    def on_sigterm(self) -> Iterator[Stop]:
        """Listen to SIGTERM; only the main thread of a process can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self.ask())
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)


class StopCallback(TrainerCallback):
    """Has a checkpoint written at the end of the step in which ``stop`` says so, and raises :class:`Preempted` then.

    Processes that train together stop after the same step: the one that one of them is asked in. It must come after the
    callbacks that add to a checkpoint.
    """

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop, self._asked = stop, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step < state.max_steps and _agreed(self.stop(), args):
            self._asked = control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked:
            raise Preempted(f"stopped after step {state.global_step} of {state.max_steps}")


def _agreed(asked: bool, args: Any) -> bool:
    """Whether any process has been asked, which all of them learn."""
    if args.world_size == 1:
        return asked
    flag = torch.tensor(int(asked), device=args.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)
