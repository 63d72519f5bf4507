"""The sizes of bottleneck adapters under a budget: as many parameters as the LoRA they are compared with.

A bottleneck of m units behind a layer of width d has 2·d·m + m + d parameters (:mod:`rankalloc.adapters.bottleneck`).
All places get equally many units, and what is left goes to the first ones, unit by unit, as far as it buys one:

    Σ (2·d·m + m + d) ≤ B < the same with one more unit anywhere

B is the budget itself where it is in parameters or bytes. A budget in ranks, or a fraction of them, prices the uniform
LoRA that it would buy at the same target layers: B is that adapter's size. So one configuration compares the two at
equal size by changing its method alone. ``min_rank``, ``max_rank`` and ``multiple_of`` are those of that LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from ..adapters.plan import RankPlan
from ..adapters.triplets import BOTTLENECK
from ..budget import RankBudget
from ..errors import BudgetError, ConfigError, did_you_mean
from ..layers.adaptable import kind_of, shape_of
from ..layers.experts import ExpertMatrix
from ..layers.kinds import LINEAR
from .allocators import ALLOCATORS, Demand

AFTER = ("houlsby", "pfeiffer")
_ATTENTION = ("o_proj", "out_proj", "out_lin", "c_proj", "dense", "o", "Wo", "wo")
_FEED_FORWARD = (
    "down_proj", "fc2", "lin2", "c_proj", "dense_4h_to_h", "fc_out", "wo", "Wo", "w2", "ffn_output", "output.dense",
)


def plan_bottlenecks(
    targets: Mapping[str, nn.Module], priced: Mapping[str, int], budget: RankBudget, rank: int,
    after: str | Sequence[str] = "houlsby", bytes_per_param: int = 4,
) -> RankPlan:
    """{target layer: units of the bottleneck behind it}, 0 for most.

    Args:
        targets: the layers that a LoRA of the same configuration would adapt.
        priced: {target layer: rank} of the uniform LoRA that the budget buys.
        rank: recorded as the plan's.
        after: one of :data:`AFTER`, or names or endings of target layers.

    Raises:
        ConfigError: no target is such a layer.
        BudgetError: the budget does not buy one unit at each place, or is above what they can hold.
    """
    places = places_among(targets, after)
    if budget.bytes is not None:
        params = budget.bytes // bytes_per_param
    elif budget.params is not None:
        params = budget.params
    else:
        params = sum(rank * sum(shape_of(targets[name])) for name, rank in priced.items())
    shapes = {name: shape_of(targets[name]) for name in places}
    widths = {name: d_out for name, (_, d_out) in shapes.items()}
    units = sizes(widths, params, {name: min(shape) for name, shape in shapes.items()})
    spent = sum(size_of(widths[name], count) for name, count in units.items())
    of_lora = "" if budget.params is not None or budget.bytes is not None else ", those of uniform LoRA"
    notes = [
        f"the {len(units)} bottlenecks hold {spent:,} parameters, 2·d·m + m + d each with their biases; the budget "
        f"allows {params:,}{of_lora}"
    ]
    return RankPlan({**dict.fromkeys(targets, 0), **units}, "bottleneck", BOTTLENECK, rank, budget, notes=notes)


def size_of(width: int, units: int) -> int:
    """Parameters of one bottleneck: 2·d·m + m + d, and none without units."""
    return 2 * width * units + units + width if units else 0


def sizes(widths: Mapping[str, int], params: int, most: Mapping[str, int] | None = None) -> dict[str, int]:
    """{place: units} that spend ``params`` parameters on bottlenecks of these widths {place: d}.

    Args:
        most: {place: units}, at most d, the default.

    Raises:
        BudgetError: they do not buy one unit at each place, or are more than ``most`` units at each hold.

    Example:
        >>> sizes({"a": 8, "b": 8}, 110)
        {'a': 3, 'b': 2}
    """
    caps = [d if most is None else most[name] for name, d in widths.items()]
    floor = sum(size_of(d, 1) for d in widths.values())
    ceiling = sum(size_of(d, cap) for d, cap in zip(widths.values(), caps, strict=True))
    if params < floor:
        raise BudgetError(
            f"the budget of {params:,} parameters buys no bottleneck of one unit at each of {len(widths)} places, "
            f"which takes {floor:,}; raise it, or name fewer places (method_options: after)"
        )
    if params > ceiling:
        raise BudgetError(
            f"the budget of {params:,} parameters is above the {ceiling:,} of bottlenecks as wide as their layers; "
            "lower it, or name more places (method_options: after)"
        )
    demand = Demand(
        params - sum(widths.values()), tuple(2 * d + 1 for d in widths.values()), (1,) * len(widths),
        tuple(caps),
    )
    kept = ALLOCATORS["uniform"]([np.zeros(cap) for cap in caps], demand)
    return {name: int(mask.sum()) for name, mask in zip(widths, kept, strict=True)}


def places_among(targets: Mapping[str, nn.Module], after: str | Sequence[str] = "houlsby") -> list[str]:
    """The target layers that bottlenecks stand behind.

    Args:
        after: "houlsby" for the output projections of attention and feed-forward, "pfeiffer" for feed-forward alone, or
            names or endings.

    Raises:
        ConfigError: there is no such layer among the targets.
    """
    linear = [n for n, base in targets.items() if kind_of(base) in LINEAR and not isinstance(base, ExpertMatrix)]
    if isinstance(after, str):
        if after not in AFTER:
            raise ConfigError(f"after must be {' or '.join(AFTER)}, or a list of layer names or endings, got {after!r}")
        found = [name for name in linear if _is_feed_forward(name) or after == "houlsby" and _is_attention(name)]
        if not found:
            raise ConfigError(
                f"none of the {len(targets)} target layers is known as the output of an attention or feed-forward "
                f"layer; name those that bottlenecks are to stand behind, as method_options: "
                f"{{after: [{_ending(targets)}]}}"
            )
        return found
    endings = list(after)
    for ending in endings:
        if not any(_ends(name, ending) for name in linear):
            hint = did_you_mean(ending, {n.rsplit(".", 1)[-1] for n in linear})
            raise ConfigError(f"after: no linear target layer is called or ends with {ending!r}{hint}")
    found = [name for name in linear if any(_ends(name, ending) for ending in endings)]
    if not found:
        raise ConfigError("after names no layer; give houlsby, pfeiffer, or layer names or endings")
    return found


def _is_attention(name: str) -> bool:
    return _in_attention(name) and any(_ends(name, ending) for ending in _ATTENTION)


def _is_feed_forward(name: str) -> bool:
    return not _in_attention(name) and any(_ends(name, ending) for ending in _FEED_FORWARD)


def _in_attention(name: str) -> bool:
    return any("att" in part.lower() for part in name.split(".")[:-1])


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _ending(targets: Mapping[str, nn.Module]) -> str:
    return next(iter(targets)).rsplit(".", 1)[-1]
