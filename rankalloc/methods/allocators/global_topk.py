"""Global top-k: the triplets with the highest scores over all layers are kept.

AdaLoRA's rule (Zhang et al., ICLR 2023, arXiv 2303.10512, eq. 6) made exact: ties never prune more than asked, floors
and caps hold, and a budget in parameters or bytes buys by score per cost, the greedy rule of the knapsack problem
(Dantzig, 1957).

Distance from the optimum. Let scores be at least 0, let OPT be the highest sum of kept scores that any allocation
reaches with the same amount, floors, caps and multiples, and let b be the first block, in the order of score per cost,
that no longer fits; ``left`` is the unspent amount at that moment. Then

    value ≥ OPT − score(b) · left / cost(b) > OPT − score(b)      (without the last step when score(b) = 0),

and value = OPT when every block fits, or when all ranks cost the same. Proof: some optimal allocation keeps each
layer's best triplets, so it contains the blocks that the floors buy first, and both values include them. For the rest,
allow fractions of blocks, in any order within a layer, as many as the caps permit: that can only raise OPT. The problem
is then a fractional knapsack, whose optimum is all blocks before b and left / cost(b) of b. The rule buys all blocks
before b, and the blocks it buys after skipping b have scores of at least 0. Masks remain prefixes of their layers:
within a layer all blocks cost the same and scores fall, so blocks are bought in order, and when one does not fit, no
later one does. With equal costs no allocation buys more blocks than the rule does, and the rule's have the highest
scores. Negative scores void the bound, because the budget is spent regardless.

The bound is nearly attained: with 10 to spend, a block of score 1.1 and cost 1 excludes one of score 10 and cost 10.
With two distinct costs the best split could be found exactly by trying every number of blocks of the more expensive
kind, but allocations at neighbouring budgets would then no longer be nested, and ranks would flicker while a budget
shrinks.
"""

from __future__ import annotations

from .base import Demand, Kept, Scores, fill


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Keep the triplets of the highest score per cost; see :func:`~rankalloc.methods.allocators.base.fill`."""
    return fill(scores, demand, lambda blocks: blocks.score / blocks.cost)
