"""Audits: do adaptive ranks help on my task? The statistics of a few paired seeds, looked at as they come in.

``judgements`` says what may be claimed. It stands on ``sequential`` (looks planned in advance) or ``anytime`` (a look
after every seed, without an end). ``examples`` adds the uncertainty of the examples that all seeds share.
"""
