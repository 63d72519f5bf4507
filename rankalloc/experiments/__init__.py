"""A configured run or sweep, and the tasks they train on.

Read in this order:

1. ``config`` and ``sections``: what a run is asked to do, one validated tree from defaults, YAML and overrides.
2. ``tasks``, named in ``task_names``: data, tokenizer and a recipe for a fresh model.
3. ``runner`` with ``trainer``: one run, from the configuration to adapter, trace and report. ``run_folder`` says what
   lies in its folder, ``launched`` which of several processes writes it; ``tracking`` sends it to wandb, ``judging``
   evaluates finished adapters.
4. ``sweeps``: many runs over a search space, on a base that is loaded once (``kept_base``); ``paired`` compares two,
   ``preemption`` stops one to be continued.
"""
