"""Finding the layers to adapt, the task heads to train in full, and the layers to leave frozen."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import TargetError, did_you_mean
from .adaptable import is_quantized, kind_of, shape_of, stacked_weights, supported, why_not
from .kinds import LINEAR
from .missing import missing_modules
from .out_of_reach import out_of_reach

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool]

ALL_LINEAR = "all-linear"
HEAD_NAMES = (
    "classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "head", "decode_head",
    "cls_classifier", "distillation_classifier", "logits_proj", "sequence_summary",
)
ROUTER = "a router, which chooses experts: adapted if target_modules names it"
ONE_OUTPUT = "it has one output, as a gate: adapted if target_modules names it"
LM_HEAD_NAMES = ("lm_head", "embed_out")


def find_targets(
    model: nn.Module, targets: Targets, exclude: Sequence[str] = (), heads: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The modules to adapt, by full name, in the model's order.

    Args:
        targets: "all-linear" (every linear layer except task heads, output heads and tied embeddings), a list of names
            or suffixes, a regular expression for the whole name, or a callable (name, module) -> bool.
        exclude: names or suffixes never to adapt.
        heads: names of modules that are trained in full.

    Raises:
        TargetError: nothing matches, or a match cannot be adapted; the message lists what can be.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    _require_known("exclude_modules", exclude, [*modules, *stacked_in(model)])
    if targets == ALL_LINEAR:
        found = _all_linear(model, modules, heads)
    else:
        matches = _matcher(targets)
        found = {name: module for name, module in modules.items() if matches(name, module)}
        inside_heads = [name for name in found if _under(name, heads)]
        if inside_heads:
            raise TargetError(
                f"{inside_heads[0]} is a task head that is trained whole, so it cannot be adapted too; leave it out of "
                "target_modules, or pass modules_to_save without it"
            )
    found = {name: module for name, module in found.items() if not _has_suffix(name, exclude)}
    bypassed = out_of_reach(model)
    callable_layers = {name: module for name, module in modules.items() if id(module) not in bypassed}
    reasons = {name: why_not(module) or bypassed.get(id(module)) for name, module in found.items()}
    refused = {name: reason for name, reason in reasons.items() if reason}
    if refused:
        name, reason = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise TargetError(f"cannot adapt {name}{more}: {reason}. {_could_be(callable_layers)}")
    if not callable(targets) and not isinstance(targets, str):
        asked = [n for n in stacked_in(model) if _has_suffix(n, targets)]
        if asked:
            more = f" and {len(asked) - 1} more" if asked[1:] else ""
            raise TargetError(
                f"target_modules names weights of experts, {asked[0]}{more}: stacked in one tensor for all experts, "
                "they are not a layer and stay frozen; leave them out"
            )
    if not found:
        hint = ""
        if isinstance(targets, str) and targets != ALL_LINEAR:
            hint = " (a string is a regular expression for the whole name; for suffixes pass a list)"
        elif isinstance(targets, Sequence) and not isinstance(targets, str):
            suffixes = {name.rsplit(".", 1)[-1] for name, module in modules.items() if kind_of(module)}
            hint = next((h for h in (did_you_mean(t, sorted(suffixes)) for t in targets) if h), "")
        raise TargetError(f"target_modules={_shown(targets)} matches no layer{hint}. {_could_be(callable_layers)}")
    if not callable(targets) and not isinstance(targets, str):
        _require_known("target_modules", targets, modules)
    return found


def unadapted(
    model: nn.Module, targets: Targets, exclude: Sequence[str] = (), heads: Sequence[str] = ()
) -> list[str]:
    """What "all-linear" cannot adapt, one sentence a reason: layers that an adapter would not reach, and the weights
    of experts, stacked in one tensor."""
    if targets != ALL_LINEAR:
        return []
    stacks = {
        name: count for name, count in stacked_in(model).items()
        if not any(_has_suffix(part, exclude) for part in (name, name.rpartition(".")[0]))
    }
    said = [
        f"{len(stacks)} stacked expert weights ({sum(stacks.values())} matrices; {next(iter(stacks))} is the first) "
        "are not adapted: they lie in tensors of three dimensions, which rankalloc leaves frozen"
    ] if stacks else []
    unreached = out_of_reach(model)
    modules = dict(model.named_modules())
    reasons: dict[str, list[str]] = {}
    for name, module in modules.items():
        is_linear = kind_of(module) in LINEAR or isinstance(module, NonDynamicallyQuantizableLinear)
        reason = unreached.get(id(module)) or why_not(module) if is_linear else None
        if not _under(name, heads):
            reason = reason or decides(module, name, modules)
        if reason and not _has_suffix(name, exclude):
            reasons.setdefault(reason, []).append(name)
    for reason, (first, *others) in reasons.items():
        more = f" and {len(others)} more are" if others else " is"
        said.append(f"{first}{more} not adapted: {reason}")
    return said


def stacked_in(model: nn.Module) -> dict[str, int]:
    """{full name of a parameter that stacks the weights of experts: the number of experts}."""
    modules = [(f"{name}." if name else "", module) for name, module in model.named_modules()]
    return {f"{n}{w}": len(getattr(module, w)) for n, module in modules for w in stacked_weights(module)}


def find_heads(model: nn.Module) -> list[str]:
    """Names of the modules to train in full: those that the model's checkpoint lacked, and the task heads: known names
    at the top level of the model, such as ``classifier`` and ``score``, except a language-modelling head."""
    output = output_embeddings(model)
    heads = []
    for name, child in model.named_children():
        has_parameters = next(child.parameters(), None) is not None
        is_output = output is not None and any(module is output for module in child.modules())
        if name in HEAD_NAMES and has_parameters and not is_output:
            heads.append(name)
    return [name for name in missing_modules(model) if not _under(name, heads)] + heads


def named_heads(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The full names of the modules that ``modules_to_save`` names (names or suffixes).

    Raises:
        TargetError: a name matches no module with parameters or buffers.
    """
    modules = {
        n: m for n, m in model.named_modules() if n and next(chain(m.parameters(), m.buffers()), None) is not None
    }
    if isinstance(names, str):
        raise TargetError(f"modules_to_save takes a list of names, got {names!r}")
    found: list[str] = []
    for name in names:
        suffixed = [n for n in modules if _has_suffix(n, [name]) and not _under(n, found)]
        matching = [name] if name in modules else suffixed
        if not matching:
            children = [n for n, _ in model.named_children()]
            raise TargetError(
                f"modules_to_save names {name!r}, which the model does not have{did_you_mean(name, modules)}; "
                f"its top-level modules are {', '.join(children)}"
            )
        found += [n for n in matching if n not in found]
    return found


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], heads: Sequence[str]) -> dict[str, nn.Module]:
    output = output_embeddings(model)
    bypassed, everything = out_of_reach(model), {"": model, **modules}
    tied = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    found = {}
    for name, module in modules.items():
        head = module is output or name.rsplit(".", 1)[-1] in LM_HEAD_NAMES or _under(name, heads)
        if head or id(module) in bypassed or id(getattr(module, "weight", None)) in tied:
            continue
        if decides(module, name, everything):
            continue
        if is_quantized(module):
            found[name] = module  # the caller refuses it with its reason: never silently skipped
        elif kind_of(module) in LINEAR:
            found[name] = module
    return found


def decides(module: nn.Module, name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Why a linear layer decides rather than computes, in a few words: it has one output, or stands beside experts that
    it chooses from; else None. ``modules`` are all of the model's, by full name."""
    if kind_of(module) not in LINEAR:
        return None
    parent, _, own = name.rpartition(".")
    if own in ("gate", "router") and hasattr(modules.get(parent), "experts"):
        return ROUTER
    return ONE_OUTPUT if shape_of(module)[1] == 1 else None


def _matcher(targets: Targets) -> Callable[[str, nn.Module], bool]:
    if callable(targets):
        return lambda name, module: bool(targets(name, module))
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(f"target_modules={targets!r} is not a valid regular expression: {error}") from None
        return lambda name, module: pattern.fullmatch(name) is not None
    suffixes = list(targets)
    if not suffixes or not all(isinstance(s, str) and s for s in suffixes):
        raise TargetError(f"target_modules must be names, got {targets!r}")
    return lambda name, module: _has_suffix(name, suffixes)


def _require_known(argument: str, names: Sequence[str], modules: Collection[str]) -> None:
    if isinstance(names, str):
        raise TargetError(f"{argument} takes a list of names, got {names!r}")
    for name in names:
        if not any(_has_suffix(full, [name]) for full in modules):
            endings = sorted({full.rsplit(".", 1)[-1] for full in modules})
            raise TargetError(f"{argument} names {name!r}, which the model does not have{did_you_mean(name, endings)}")


def _has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def _under(name: str, parents: Sequence[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into scores over the vocabulary; None if the model has none."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if getter else None
    except (AttributeError, NotImplementedError):  # the errors of models without one
        return None


def _could_be(modules: dict[str, nn.Module]) -> str:
    suffixes: dict[str, int] = {}
    for name, module in modules.items():
        if kind_of(module):
            suffix = name.rsplit(".", 1)[-1]
            suffixes[suffix] = suffixes.get(suffix, 0) + 1
    if not suffixes:
        return f"This model has no layer that rankalloc adapts ({supported()})"
    return "What can be adapted: " + ", ".join(f"{suffix} ({count})" for suffix, count in suffixes.items())


def _shown(targets: Targets) -> str:
    return getattr(targets, "__name__", "a callable") if callable(targets) else repr(targets)
