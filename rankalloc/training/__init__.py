"""One training run: the controller, and what surrounds it.

Read in this order:

    settings      what a run is asked to do, checked: method, budget, options
    run_state     what changes from step to step
    controller    observe and update, the two calls of a training loop
    allocation    one allocation: score, budget, allocate, apply
    resuming      saving that state and continuing from it
    callback      the same driven by transformers' Trainer
    checkpoints   what a Trainer's checkpoint needs to be resumed, and the best one at the end

Beside them: processes and sharding (DDP, FSDP2), averages (EMA, SWA), regularizer and subspace_penalty (gradients that
are added), recording, clock and environment (the trace), precision (what a trainer has cast), past_the_end (a run that
is resumed at its last step), other_model (a callback in a second Trainer).
"""
