"""Saving a run's state and continuing from it; settings that must not change are compared."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, replace
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.adapter_set import Adapters
from ..adapters.triplets import Triplets
from ..budget import BudgetPlan, RankBudget, in_ranks
from ..errors import RankallocError
from ..layers import families, native, products
from ..methods.scores import Score
from ..trace import RankTrace
from .run_state import RunState

STATE_VERSION = 1

logger = logging.getLogger(__name__)


def state_of(state: RunState) -> dict[str, Any]:
    """{"tensors": the score's state, "meta": JSON text of everything else}."""
    meta = {
        "version": STATE_VERSION, "step": state.step, "method": state.settings.method.name,
        "plan": asdict(state.schedule), "initial_ranks": [layer.initial_rank for layer in state.trace.layers],
        "weights": weights_key(state.adapters), "factors": factors_key(state.adapters),
        "siblings": families.known(_own(state.adapters)),
        "kept": [a.kept.tolist() for a in state.adapters if not a.own_forward],  # part of no model's weights
        "scalings": [a.scaling for a in state.adapters], "idle": state.idle,
        "trace": state.trace.model_dump(mode="json"),
    }
    tensors = dict(state.score.tensors()) if state.score is not None and not state.frozen else {}
    return {"tensors": tensors, "meta": json.dumps(meta)}


def restore(state: RunState, saved: dict[str, Any]) -> None:
    """Bring ``state`` to a saved one; everything is checked before anything is changed.

    Raises:
        RankallocError: the saved state is damaged or belongs to another run.
    """
    adapters = state.adapters
    meta = _meta_of(saved)
    if meta["method"] != state.settings.method.name:
        raise RankallocError(
            f"cannot resume: the run began with method {meta['method']!r} and now has {state.settings.method.name!r}"
        )
    if len(meta["initial_ranks"]) != len(adapters):
        raise RankallocError(
            f"cannot resume: the rank state is of {len(meta['initial_ranks'])} layers and this model has "
            f"{len(adapters)} adapted ones"
        )
    shapes = [replace(s, rank=r) for s, r in zip(adapters.shapes(), meta["initial_ranks"], strict=True)]
    length = _length_of_schedule(meta, state)
    schedule = _as_meant(state, meta).resolve(shapes, length, adapters.bytes_per_param())
    trace = RankTrace.model_validate(meta["trace"])
    _require_same_settings(meta, trace, schedule, state.trace)
    _require_same_scalings(meta, adapters)
    if not _of_these_weights(meta, adapters):
        raise RankallocError(
            "cannot resume: the model's adapter weights are not those the rank state was saved with; resume from the "
            "folder that holds both"
        )
    masks = _masks_of(meta, adapters)
    scoring = state.score is not None and meta["step"] < schedule.freeze_step
    score = _score_of(state, saved) if scoring else state.score
    # nothing below refuses
    for adapter, mask in masks:
        adapter.kept = mask
    state.score = score
    families.remember(_own(adapters), meta.get("siblings", []))
    for note in _other_length(meta, state.schedule) + _other_sums(trace, state.trace):
        trace.alerts += [note] * (note not in trace.alerts)
        logger.warning(note)
    state.step, state.trace, state.idle = meta["step"], trace, list(meta.get("idle", []))
    state.reschedule(schedule)
    state.rule.prepare(state.step + 1)


def adopt_scores(state: RunState, saved: dict[str, Any]) -> bool:
    """Take over the scores of an earlier moment of this run, whose weights were loaded as its best ones.

    Returns False, and changes nothing, when the adapters' weights are not of that moment.

    Raises:
        RankallocError: the saved state is damaged; nothing has been changed then.
    """
    meta = _meta_of(saved)
    if not _of_these_weights(meta, state.adapters):
        return False
    masks, score = _masks_of(meta, state.adapters), _score_of(state, saved)
    for adapter, mask in masks:
        adapter.kept = mask
    state.score = score
    state.trace.alerts.append(
        f"the best checkpoint, of step {meta['step']}, is from before the freeze at step {state.schedule.freeze_step}: "
        "its weights were loaded, and are brought to the budget by the scores they had"
    )
    return True


def _of_these_weights(meta: dict[str, Any], adapters: Adapters) -> bool:
    of_factors = factors_key(adapters)  # which 0.1 did not write
    return bool(meta["weights"] == weights_key(adapters) and meta.get("factors", of_factors) == of_factors)


def _as_meant(state: RunState, meta: dict[str, Any]) -> RankBudget:
    """The budget in the unit that the run began with: a fraction was once a share of the ranks."""
    budget, plan = state.settings.budget, state.adapters.plan
    if not counts_ranks(meta):
        return budget
    if budget.fraction is not None:
        return in_ranks(budget, sum(meta["initial_ranks"]))
    if plan is not None and plan.budget is not None and plan.budget.fraction is not None:
        return replace(budget, params=None, ranks=sum(meta["initial_ranks"]))  # what it was restated to
    return budget


def counts_ranks(meta: dict[str, Any]) -> bool:
    """Whether the run of this state spends ranks."""
    return bool(meta["plan"]["unit"] == "ranks")


def began_with(budget: RankBudget, saved: dict[str, Any], initial: int) -> RankBudget:
    """``budget`` as it was meant when the run of this saved state began with ``initial`` ranks."""
    return in_ranks(budget, initial) if budget.fraction is not None and counts_ranks(_meta_of(saved)) else budget


def _length_of_schedule(meta: dict[str, Any], state: RunState) -> int:
    """The number of steps that the schedule is made for: the first run's, once its ranks are final.

    Raises:
        RankallocError: the run is to end before the step it goes on from, or to have another length while ranks are
            still being chosen, which would be another schedule.
    """
    step, then, now = meta["step"], meta["plan"]["total_steps"], state.schedule.total_steps
    final = 0 if state.settings.method.planner is not None else meta["plan"]["freeze_step"]
    if step > now:
        raise RankallocError(
            f"cannot resume: {step} steps have been trained, and this run is to end after {now}; resume from an "
            f"earlier checkpoint, or ask for at least {step} steps"
        )
    if now != then and step < final:
        raise RankallocError(
            f"cannot resume with another number of steps (total_steps was {then} and now is {now}) from step {step}: "
            f"ranks are final from step {final} on, and until then the schedule would be another; resume with {then} "
            f"steps, or from a checkpoint of step {final} or later"
        )
    return then


def _other_length(meta: dict[str, Any], now: BudgetPlan) -> list[str]:
    """What to tell of a run that goes on for another number of steps than it was begun with."""
    then = meta["plan"]["total_steps"]
    if then == now.total_steps:
        return []
    return [
        f"the run began with {then} steps and was resumed at step {meta['step']} to end after {now.total_steps}; its "
        "ranks were final and stay"
    ]


def _own(adapters: Adapters) -> dict[str, Adapter]:
    """The adapters whose forward pass is ours, and may be shared."""
    return {name: adapter for name, adapter in adapters.modules.items() if isinstance(adapter, Adapter)}


def _meta_of(saved: dict[str, Any]) -> dict[str, Any]:
    try:
        meta = json.loads(saved["meta"])
    except ValueError as error:
        raise RankallocError(f"cannot resume: the rank state is damaged ({error})") from None
    if meta.get("version") != STATE_VERSION:
        raise RankallocError(f"rank state of version {meta.get('version')!r}; this rankalloc reads {STATE_VERSION}")
    return meta


def _require_same_settings(meta: dict[str, Any], trace: RankTrace, schedule: BudgetPlan, current: RankTrace) -> None:
    then = {**meta["plan"], **trace.method_options, "scaling": trace.scaling}
    now = json.loads(json.dumps(asdict(schedule)))
    now |= {**current.method_options, "scaling": current.scaling}
    changed = [
        f"{key} was {then.get(key, 'its default')} and now is {now.get(key, 'its default')}"
        for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)
    ]
    if changed:
        raise RankallocError(
            f"cannot resume with other settings than the run began with: {'; '.join(changed)}. Give it those of the "
            "first run, or begin anew in another folder"
        )


def _require_same_scalings(meta: dict[str, Any], adapters: Adapters) -> None:
    """Compare s of every layer, which an alpha_pattern of PEFT's sets alone; states of 0.1 do not hold it."""
    then = meta.get("scalings", [a.scaling for a in adapters])
    changed = [
        (name, old, adapter.scaling) for (name, adapter), old in zip(adapters.modules.items(), then, strict=True)
        if not math.isclose(old, adapter.scaling, rel_tol=1e-6)
    ]
    if changed:
        name, old, new = changed[0]
        others = f" (and of {len(changed)} layers in all)" if len(changed) > 1 else ""
        raise RankallocError(
            f"cannot resume: the scaling of {name} was {old:g} and now is {new:g}{others}; give it the alpha and the "
            "alpha_pattern of the first run, or begin anew in another folder"
        )


def _score_of(state: RunState, saved: dict[str, Any]) -> Score | None:
    """The score of a saved state, made anew: the adapters may have shrunk since the present one was."""
    score, tensors = state.new_score(), saved["tensors"]
    if score is None:
        return None
    for name, tensor in score.tensors().items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise RankallocError(f"cannot resume: the rank state lacks {name} in the shape these adapters need")
    score.load_tensors(tensors)
    return score


def _masks_of(meta: dict[str, Any], adapters: Adapters) -> list[tuple[Triplets, torch.Tensor]]:
    """What was kept of each layer of PEFT's, whose weights carry no mask."""
    driven = {name: adapter for name, adapter in adapters.modules.items() if not adapter.own_forward}
    masks = meta.get("kept", [])
    ranks = [adapter.rank for adapter in driven.values()]
    if (lengths := [len(mask) for mask in masks]) != ranks:
        raise RankallocError(
            f"cannot resume: the rank state has masks of the lengths {lengths} for layers of the ranks {ranks}, so it "
            "is damaged; resume from an earlier one"
        )
    return [
        (adapter, torch.tensor(mask, dtype=torch.bool, device=adapter.lam.device))
        for adapter, mask in zip(driven.values(), masks, strict=True)
    ]


def _other_sums(then: RankTrace, now: RankTrace) -> list[str]:
    """What to tell when sums are added in another order from now on; nothing when they are not."""
    if then.environment is None or now.environment is None:
        return []
    ways_out = {
        "kernel": {"compiled": "`rankalloc build-kernel` builds it", "python": f"{native.SWITCH}=0 leaves it out"},
        "products": {"oneDNN": f"{products.SWITCH}=1 takes it", "torch": f"{products.SWITCH}=0 leaves it out"},
    }
    notes = []
    for what, names in (("kernel", "the {} kernel"), ("products", "products by {}")):
        began, goes_on = (getattr(trace.environment, what) for trace in (then, now))
        if began != goes_on and None not in (began, goes_on):
            notes.append(
                f"the run began with {names.format(began)} and goes on with {names.format(goes_on)}, whose sums are "
                "rounded otherwise: its numbers are no longer those of a run that was not interrupted "
                f"({ways_out[what][began]})"
            )
    return notes


def weights_key(adapters: Adapters) -> str:
    """SHA-256 over names, Λ and masks: tells whether weights and state are of one moment."""
    digest = hashlib.sha256()
    for name, adapter in adapters.modules.items():
        digest.update(name.encode())
        digest.update(adapter.lam.detach().float().cpu().numpy().tobytes())
        if adapter.own_forward:
            digest.update(adapter.kept.cpu().numpy().tobytes())
    return digest.hexdigest()


def factors_key(adapters: Adapters) -> str | None:
    """As :func:`weights_key`, over P and Q, or the core between them, where Λ stays 1 and tells nothing; None where it
    is trained."""
    digest = hashlib.sha256()
    parts = [part for a in adapters for part in ((a.P, a.Q) if a.sized_by_factors else (a.core,)) if part is not None]
    for part in parts:
        digest.update(part.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest() if parts else None
