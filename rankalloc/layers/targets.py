"""Finding the layers to adapt, the task heads to train in full, and the layers to leave frozen."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from itertools import chain

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import TargetError, did_you_mean
from .adaptable import is_quantized, kind_of, supported, why_not
from .experts import ExpertMatrix, expert_matrices, stack_of, stacked_weights
from .kinds import LINEAR
from .missing import missing_modules
from .out_of_reach import out_of_reach
from .routers import routers_in, said_of_routers

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool]

ALL_LINEAR = "all-linear"
HEAD_NAMES = (
    "classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "head", "decode_head",
    "cls_classifier", "distillation_classifier", "logits_proj", "sequence_summary",
)
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
    experts = expert_matrices(model)
    _require_known("exclude_modules", exclude, [*modules, *map(stack_of, experts)])
    if targets == ALL_LINEAR:
        found = _all_linear(model, modules, heads)
        found |= {name: matrix for name, matrix in experts.items() if not _under(name, heads)}
    else:
        matches = _matcher(targets)
        found = {name: module for name, module in modules.items() if matches(name, module)}
        whole = {id(module) for module in found.values() if stacked_weights(module)}
        found = {name: module for name, module in found.items() if id(module) not in whole}
        found |= {
            name: matrix for name, matrix in experts.items()
            if id(matrix.owner) in whole or matches(name, matrix)
            or (not callable(targets) and matches(stack_of(name), matrix))
        }
        inside_heads = [name for name in found if _under(name, heads)]
        if inside_heads:
            raise TargetError(
                f"{inside_heads[0]} is a task head that is trained whole, so it cannot be adapted too; leave it out of "
                "target_modules, or pass modules_to_save without it"
            )
    found = {name: module for name, module in found.items() if not _excluded(name, module, exclude)}
    bypassed = out_of_reach(model)
    callable_layers = {name: module for name, module in modules.items() if id(module) not in bypassed} | experts
    reasons = {name: why_not(module) or bypassed.get(id(module)) for name, module in found.items()}
    refused = {name: reason for name, reason in reasons.items() if reason}
    if refused:
        name, reason = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise TargetError(f"cannot adapt {name}{more}: {reason}. {_could_be(callable_layers)}")
    if not found:
        hint = ""
        if isinstance(targets, str) and targets != ALL_LINEAR:
            hint = " (a string is a regular expression for the whole name; for suffixes pass a list)"
        elif isinstance(targets, Sequence) and not isinstance(targets, str):
            suffixes = {name.rsplit(".", 1)[-1] for name, module in modules.items() if kind_of(module)}
            hint = next((h for h in (did_you_mean(t, sorted(suffixes)) for t in targets) if h), "")
        raise TargetError(f"target_modules={_shown(targets)} matches no layer{hint}. {_could_be(callable_layers)}")
    if not callable(targets) and not isinstance(targets, str):
        _require_known("target_modules", targets, [*modules, *experts, *map(stack_of, experts)])
    return _in_order(model, found)


def _in_order(model: nn.Module, found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The experts' matrices where the module of the experts is in the model."""
    places = {name: i for i, (name, _) in enumerate(model.named_modules())}

    def place(name: str) -> int:
        return places[stack_of(stack_of(name)) if isinstance(found[name], ExpertMatrix) else name]

    return {name: found[name] for name in sorted(found, key=place)}


def _excluded(name: str, module: nn.Module, exclude: Sequence[str]) -> bool:
    """Whether a layer is excluded by its name, or an expert's matrix by that of its stack or of the experts."""
    names = [name]
    if isinstance(module, ExpertMatrix):
        names += [stack_of(name), stack_of(stack_of(name))]
    return any(_has_suffix(each, exclude) for each in names)


def unadapted(model: nn.Module, targets: Targets, exclude: Sequence[str] = ()) -> list[str]:
    """What "all-linear" leaves out, one sentence a reason: routers, layers that an adapter would not reach, and weights
    of experts in packed numbers."""
    if targets != ALL_LINEAR:
        return []
    routers = routers_in(model)
    said = said_of_routers([name for name in routers if not _has_suffix(name, exclude)])
    stacks = [
        f"{name}.{key}" for name, module in model.named_modules() for key in stacked_weights(module)
        if not getattr(module, key).is_floating_point()
    ]
    stacks = [name for name in stacks if not any(_has_suffix(part, exclude) for part in (name, stack_of(name)))]
    if stacks:
        said.append(
            f"{len(stacks)} stacked expert weights ({stacks[0]} is the first) are not adapted: their numbers are "
            "packed in a way that is not known here"
        )
    unreached = out_of_reach(model)
    reasons: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        is_linear = kind_of(module) in LINEAR or isinstance(module, NonDynamicallyQuantizableLinear)
        reason = unreached.get(id(module)) or why_not(module) if is_linear else None
        if reason and name not in routers and not _has_suffix(name, exclude):
            reasons.setdefault(reason, []).append(name)
    for reason, (first, *others) in reasons.items():
        more = f" and {len(others)} more are" if others else " is"
        said.append(f"{first}{more} not adapted: {reason}")
    return said


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
    bypassed = out_of_reach(model)
    tied = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    routers = routers_in(model)
    found = {}
    for name, module in modules.items():
        head = name in routers or module is output or name.rsplit(".", 1)[-1] in LM_HEAD_NAMES or _under(name, heads)
        if head or id(module) in bypassed or id(getattr(module, "weight", None)) in tied:
            continue
        if is_quantized(module):
            found[name] = module  # the caller refuses it with its reason: never silently skipped
        elif kind_of(module) in LINEAR:
            found[name] = module
    return found


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
            suffix = (stack_of(name) if isinstance(module, ExpertMatrix) else name).rsplit(".", 1)[-1]
            suffixes[suffix] = suffixes.get(suffix, 0) + 1
    if not suffixes:
        return f"This model has no layer that rankalloc adapts ({supported()})"
    return "What can be adapted: " + ", ".join(f"{suffix} ({count})" for suffix, count in suffixes.items())


def _shown(targets: Targets) -> str:
    return getattr(targets, "__name__", "a callable") if callable(targets) else repr(targets)
