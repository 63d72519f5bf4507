"""A training process that is killed while it evaluates: ``python -m tests.experiments.dying HOME SPLIT FOLDER``."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

from rankalloc.experiments.config import load_config
from rankalloc.experiments.runner import train
from rankalloc.experiments.tasks import prepare

SAVING = ("training.save_every=3", "training.scheduler=constant")  # a step too many would show in the weights


def main(home: str, split: str, folder: str) -> None:
    config = load_config(Path(home) / "small.yaml", SAVING)
    prepared = prepare(config)
    evaluated = []

    def metrics_or_death(predicted, expected):
        evaluated.append(split)
        if len(evaluated) == ("tune", "report").index(split) + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return prepared.metrics_of(predicted, expected)

    train(config, Path(folder), prepared=dataclasses.replace(prepared, metrics_of=metrics_or_death))


if __name__ == "__main__":
    main(*sys.argv[1:])
