"""The first sentence of a comparison: like with like, or first of all that it is not."""

from __future__ import annotations

from .compare import Comparison
from .outcome import contradicts
from .side import Side
from .verdict import Verdict
from .wording import Outcome, count, fixed, number, percent, plural, printable


def compared(pair: Comparison) -> Verdict:
    """What the two show about each other. "helped" means that the first did better, and that it is not larger."""
    size = _size(pair)
    said, outcome = _quality(pair)
    if outcome == "helped" and not pair.equal_size and pair.one.params > pair.other.params:
        outcome = "cannot tell"
    if outcome == "hurt" and not pair.equal_size and pair.other.params > pair.one.params:
        outcome = "cannot tell"
    return Verdict(f"{size}{said}.", outcome, [_ranks(pair), *_notes(pair)])


def _size(pair: Comparison) -> str:
    one, other = pair.names
    sizes = f"{count(pair.one.params)} against {count(pair.other.params)} parameters"
    if pair.one.params == pair.other.params:
        return f"At the same size ({count(pair.one.params)} parameters), "
    if pair.equal_size:
        return f"At the same size to within one rank ({sizes}), "
    if not pair.other.params:
        return f"Not like with like: {printable(other)} keeps no ranks ({sizes}). Beyond that, "
    share = pair.one.params / pair.other.params - 1
    way = "larger" if share > 0 else "smaller"
    return (
        f"Not like with like: {printable(one)} is {percent(abs(share))} {way} than {printable(other)} ({sizes}). "
        "Beyond that, "
    )


def _quality(pair: Comparison) -> tuple[str, Outcome]:
    one, other = map(printable, pair.names)
    paired = pair.paired
    if paired is not None:
        measured = (
            f"difference {fixed(paired.difference, signed=True)} in mean loss per example, 95\u00a0% interval "
            f"{fixed(paired.low, signed=True)} to {fixed(paired.high, signed=True)}, "
            f"{plural(paired.examples, 'example')}"
        )
        if paired.low <= 0 <= paired.high:
            return f"the {paired.split} split cannot tell {one} from {other} ({measured})", "cannot tell"
        better = paired.high < 0
        said = f"{one} did {'better' if better else 'worse'} than {other} on the {paired.split} split ({measured})"
        against = [
            f"{name} says the opposite, {number(first)} for {one} and {number(second)} for {other}"
            for split, name, first, second in pair.quality
            if split == paired.split and contradicts(name, first, second, paired.difference)
        ]
        if against:
            return f"by its loss {said}; but {'; '.join(against)}", "cannot tell"
        return said, "helped" if better else "hurt"
    for split, name, first, second in sorted(pair.quality, key=lambda row: (row[0] != "report", "loss" in row[1])):
        if first is not None and second is not None:
            return (
                f"{name} on the {split} split is {number(first)} for {one}{_over(pair.one)} and {number(second)} for "
                f"{other}{_over(pair.other)}, without losses of the same examples to tell how much of that is chance",
                "cannot tell",
            )
    return "no quality was measured for both on one split, so only their ranks can be compared", "cannot tell"


def _over(side: Side) -> str:
    """What a value is a mean over, where it is one."""
    return "" if side.seeds is None else f" (mean over {plural(side.seeds, 'seed')})"


def _ranks(pair: Comparison) -> str:
    if not pair.common:
        return "They have no layer in common."
    moved = sum(a != b for a, b in pair.common)
    total = len(pair.common)
    text = f"Of {plural(total, 'common layer')}, {count(moved)} {'differs' if moved == 1 else 'differ'} in rank"
    if pair.rank_overlap is not None:
        text += f"; of all ranks that either keeps, {percent(pair.rank_overlap)} are kept by both"
    if pair.correlation is not None:
        text += f". Spearman's correlation of the ranks is {fixed(pair.correlation, 2)}"
    return text + "."


def _untuned(pair: Comparison) -> list[str]:
    """That nothing here was tuned, with the learning rates where the records have them."""
    rates = [(side.config.get("training") or {}).get("learning_rate") for side in (pair.one, pair.other)]
    if not all(isinstance(rate, int | float) for rate in rates):
        return []
    at = f"learning rate {rates[0]:g}" if rates[0] == rates[1] else f"learning rates {rates[0]:g} and {rates[1]:g}"
    return [
        f"Each was run at one rate ({at}), and methods differ in the rate that suits them: a difference may be the "
        "rate's."
    ]


def _notes(pair: Comparison) -> list[str]:
    notes = []
    missing = [sum(row.other is None for row in pair.layers), sum(row.one is None for row in pair.layers)]
    for name, lonely in zip(pair.names, missing, strict=True):
        if lonely:
            notes.append(f"{plural(lonely, 'layer')} only in {printable(name)}.")
    if pair.paired is not None:
        notes.append(
            "The difference is the first minus the second, so a negative one speaks for the first. It comes from one "
            "training run each, and the interval covers the data only: another seed may move it by more."
        )
        notes += _untuned(pair)
        notes += [
            f"On the {split} split {name} is {number(one)} for {printable(pair.names[0])} and {number(other)} for "
            f"{printable(pair.names[1])}."
            for split, name, one, other in pair.quality
            if split == pair.paired.split and "loss" not in name and one is not None and other is not None
        ][:1]
    elif pair.one.fingerprint and pair.other.fingerprint and pair.one.fingerprint != pair.other.fingerprint:
        notes.append("They were evaluated on different data, so their metrics are not paired.")
    return notes
