"""The state of a controller between two processes: what is kept, and what must not have changed."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ..adapters.adapter_set import Adapters
from ..errors import RankallocError
from ..layers import families, native, products
from ..trace import RankTrace

if TYPE_CHECKING:
    from .controller import RankController

STATE_VERSION = 1

logger = logging.getLogger(__name__)


def state_of(controller: RankController) -> dict[str, Any]:
    """{"tensors": the score's state, "meta": JSON text of everything else}."""
    controller.count_time()
    trace = controller.trace
    meta = {
        "version": STATE_VERSION, "step": controller.step, "method": controller.method.name,
        "plan": asdict(controller.plan), "initial_ranks": [layer.initial_rank for layer in trace.layers],
        "weights": weights_key(controller.adapters), "siblings": families.known(controller.adapters.modules),
        "trace": trace.model_dump(mode="json"),
    }
    scoring = controller.score is not None and not controller.frozen
    return {"tensors": dict(controller.score.tensors()) if scoring else {}, "meta": json.dumps(meta)}


def restore(controller: RankController, state: dict[str, Any]) -> None:
    """Bring ``controller`` to a saved state; everything is checked before anything is changed.

    Raises:
        RankallocError: the state is damaged or belongs to another run.
    """
    adapters = controller.adapters
    try:
        meta = json.loads(state["meta"])
    except ValueError as error:
        raise RankallocError(f"cannot resume: the rank state is damaged ({error})") from None
    if meta.get("version") != STATE_VERSION:
        raise RankallocError(f"rank state of version {meta.get('version')!r}; this rankalloc reads {STATE_VERSION}")
    if meta["method"] != controller.method.name:
        raise RankallocError(
            f"cannot resume: the run began with method {meta['method']!r} and now has {controller.method.name!r}"
        )
    if len(meta["initial_ranks"]) != len(adapters):
        raise RankallocError(
            f"cannot resume: the rank state is of {len(meta['initial_ranks'])} layers and this model has "
            f"{len(adapters)} adapted ones"
        )
    shapes = [replace(s, rank=r) for s, r in zip(adapters.shapes(), meta["initial_ranks"], strict=True)]
    plan = controller.budget.resolve(shapes, controller.plan.total_steps, adapters.bytes_per_param())
    trace = RankTrace.model_validate(meta["trace"])
    then = {**meta["plan"], **trace.method_options, "scaling": trace.scaling}
    now = json.loads(json.dumps(asdict(plan)))
    now |= {**controller.trace.method_options, "scaling": controller.trace.scaling}
    changed = [
        f"{key} was {then.get(key, 'its default')} and now is {now.get(key, 'its default')}"
        for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)
    ]
    if changed:
        raise RankallocError(f"cannot resume with other settings than the run began with: {'; '.join(changed)}")
    if meta["weights"] != weights_key(adapters):
        raise RankallocError(
            "cannot resume: the model's adapter weights are not those the rank state was saved with; resume from the "
            "folder that holds both"
        )
    if controller.score is not None and meta["step"] < plan.freeze_step:
        saved, score = state["tensors"], controller.new_score()  # the adapters may have shrunk since it was made
        for name, tensor in score.tensors().items():
            if name not in saved or saved[name].shape != tensor.shape:
                raise RankallocError(f"cannot resume: the rank state lacks {name} in the shape these adapters need")
        score.load_tensors(saved)
        controller.score = score
    families.remember(adapters.modules, meta.get("siblings", []))
    for note in _other_sums(trace, controller.trace):
        trace.alerts += [note] * (note not in trace.alerts)
        logger.warning(note)
    controller.plan, controller.step, controller.trace = plan, meta["step"], trace
    controller.rule.plan = plan
    controller.rule.prepare(controller.step + 1)
    controller.clock.restart()


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
        digest.update(adapter.kept.cpu().numpy().tobytes())
    return digest.hexdigest()
