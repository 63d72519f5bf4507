"""A worker whose trials only wait: ``python -m tests.services.waiting STORAGE NAME`` prints when it began and ended."""

from __future__ import annotations

import sys
import time

import optuna
from optuna.trial import Trial

from rankalloc.experiments.config import load_config
from rankalloc.experiments.sweeps import storages
from rankalloc.experiments.sweeps.samplers import sampler_of
from rankalloc.experiments.sweeps.slots import Slots, slot_of
from rankalloc.experiments.sweeps.space import search_space, suggest

TRIALS, WAIT = 20, 1.0


def main(storage: str, name: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config = load_config(None, [])
    kept, guard = storages.opened(storage)
    study = optuna.create_study(study_name=name, storage=kept, load_if_exists=True)
    slots = Slots(study, kept, guard)
    slots.fill(TRIALS, [])
    began = time.time()
    while slots.left(TRIALS):
        taken = slots.take(TRIALS)
        if taken is None:
            time.sleep(0.02)
            continue
        study.sampler = sampler_of(config, slot_of(taken))
        trial = Trial(study, taken._trial_id)
        suggest(trial, search_space(config))
        time.sleep(WAIT)
        study.tell(trial, float(slot_of(taken)))
    points = [tuple(trial.params.values()) for trial in slots.all().values()]
    assert len(set(points)) == TRIALS, "two trials at one point"
    print(began, time.time())


if __name__ == "__main__":
    main(*sys.argv[1:])
