"""A sweep: trials over a search space, their controls, and any number of workers that share them.

Read in this order:

1. ``space``: what is searched, and the points that every sweep begins with.
2. ``study``, in one of the ``storages``: the Optuna study, and whether it is the same sweep as before.
3. ``slots``: the queue that workers take trials from, made beforehand, so that the total is met exactly.
4. ``worker``: takes slots and trains them; ``preemption``: how it stops in the middle of one, to be continued.
5. ``sweep``: one worker here, or several (``jobs``), then the conclusion from the ``record``.
"""
