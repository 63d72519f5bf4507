"""Global top-k: the triplets with the highest scores over all layers stay.

AdaLoRA's rule (Zhang et al., ICLR 2023, arXiv 2303.10512, eq. 6) made exact: ties never prune
more than asked, floors and caps hold, and a budget in parameters or bytes buys by score per cost,
the greedy rule of the knapsack problem (Dantzig, 1957).

How far from the best that is. Let scores be at least 0, let OPT be the highest sum of kept scores that any
allocation reaches with the same amount, floors, caps and multiples, and let b be the first block, in the order of
score per cost, that no longer fits; ``left`` is what is unspent at that moment. Then

    value ≥ OPT − score(b) · left / cost(b) > OPT − score(b)      (without the last step when score(b) = 0),

and value = OPT when every block fits, or when all ranks cost the same. Proof: some best allocation keeps each
layer's best triplets, so it holds the blocks that the floors buy first, and both values contain them. Of the rest,
allow fractions of blocks, in any order within a layer, as many as the caps let be sold: that can only raise OPT. It
is then a fractional knapsack, whose optimum is all blocks before b and left / cost(b) of b. The rule holds all blocks
before b, and what it buys after passing over b has scores of at least 0. Masks stay prefixes of their layers: within a
layer all blocks cost the same and scores fall, so a block comes after those before it, and when one does not fit no
later one does. With equal costs every allocation buys at most as many blocks as the rule does, and the rule's are the
highest. Negative scores void the bound, since the budget is spent all the same.

The bound is nearly attained: for 10 to spend, a block of score 1.1 and cost 1 bars one of score 10 and cost 10. With
two distinct costs the best split could be found exactly by trying every number of blocks of the dearer kind, but
allocations at neighbouring budgets would then no longer contain one another, and ranks would flicker while a budget
shrinks.
"""

from __future__ import annotations

from .base import Demand, Kept, Scores, fill


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Keep the triplets of the highest score per cost; see :func:`~rankalloc.methods.allocators.base.fill`."""
    return fill(scores, demand, lambda blocks: blocks.score / blocks.cost)
