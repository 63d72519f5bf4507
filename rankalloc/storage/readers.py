"""The tools that read adapters, and what each of them has to be given: one table.

A reader differs from PEFT in the scale that it applies, in whether it knows a rank for each layer, and in its format.
:data:`READERS` says what to write for each; what an existing file is worth in each is :func:`verdict`. docs/serving.md
shows the table, and ``make test-readers`` holds it against the tools themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError, unknown
from ..layer_names import gaps
from .layout import LAYOUTS, Layout

__all__ = ["READERS", "Facts", "Reader", "Verdict", "find_reader", "layout_for", "require_taken", "verdict"]

HELD = {
    "heads": "modules that were trained whole", "embeddings": "adapters of embeddings",
    "experts": "adapters of experts", "groups": "adapters of grouped convolutions",
}
"""What an adapter may hold that some readers cannot take, for people."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


@dataclass(frozen=True)
class Reader:
    """A tool that reads adapters.

    Attributes:
        name: on the command line, as in ``--for vllm``.
        title: for people.
        scale: the scale that it gives a layer, for people.
        format: of :data:`~rankalloc.storage.export_formats.EXPORT_FORMATS`, what ``rankalloc export --for`` writes.
        layout: what is written for it: of a folder, and of the ranks in another format.
        pad_to: as in :class:`~rankalloc.storage.layout.Layout`.
        layouts: those of a PEFT folder that it reads right; empty where it reads no folder.
        refuses: what it cannot take: keys of :data:`HELD`.
        whole_kinds: whether it adapts a kind of layer in all blocks of a stack, or in none.
        note: what else is to be known, a sentence.
    """

    name: str
    title: str
    scale: str
    layouts: tuple[str, ...]
    format: str = "peft"
    layout: str = "compact"
    pad_to: int | tuple[int, ...] = 1
    refuses: tuple[str, ...] = ()
    whole_kinds: bool = False
    note: str = ""

    def folder_layout(self) -> Layout:
        """The layout of a folder that is written for it.

        Raises:
            ConfigError: it reads a file in a format of its own, which :func:`rankalloc.export` writes.
        """
        if not self.layouts:
            raise ConfigError(
                f"{self.title} reads no folder: write one first, and then the file for it with rankalloc export "
                f"--for {self.name}"
            )
        return Layout(self.layout, self.pad_to, self.name)

    def flags(self, rank: int) -> str:
        """What its command line has to say for an adapter whose highest rank in the file is ``rank``; may be empty."""
        if self.name != "vllm":
            return ""
        fits = next((size for size in VLLM_RANKS if rank <= size), None)
        return "" if fits is None else f"--enable-lora --max-lora-rank {fits}"


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader(
            "peft", "PEFT", "each layer's own alpha / rank, patterns included", LAYOUTS,
            note="its hot swap wants one rank: the uniform layout",
        ),
        Reader(
            "vllm", "vLLM", "each layer's own alpha / rank; before 0.32 one alpha / r for all layers", LAYOUTS,
            refuses=("heads", "groups"),
            note=f"it takes ranks up to {VLLM_RANKS[-1]}; older versions read compact and uniform folders right",
        ),
        Reader(
            "llama.cpp", "llama.cpp", "the file's one alpha over each layer's own rank", ("one-alpha", "uniform"),
            format="gguf", layout="one-alpha", refuses=("heads", "experts", "groups"),
            note="its converter reads a folder; rankalloc export --format gguf writes its own format",
        ),
        Reader(
            "tgi", "TGI and LoRAX", "one alpha / r for all layers, and one rank", ("uniform",), layout="uniform",
            pad_to=(8, 16), refuses=("heads", "embeddings", "experts", "groups"), whole_kinds=True,
            note="one rank of 8 or a multiple of 16; a kind of layer that one block lacks is left out in all",
        ),
        Reader(
            "diffusers", "diffusers", "each layer's own alpha / rank, or 1 without one", (), format="diffusers",
            refuses=("heads", "embeddings", "experts"),
        ),
        Reader(
            "kohya", "kohya's scripts and ComfyUI", "each layer's own alpha over its rank", (), format="kohya",
            refuses=("heads", "embeddings", "experts", "groups"),
        ),
    )
}


def find_reader(name: str) -> Reader:
    """The reader of this name. Raises ConfigError when there is none."""
    if name not in READERS:
        raise ConfigError(unknown("reader", name, READERS))
    return READERS[name]


def layout_for(layout: str | None, pad_multiple: int = 1, reader: str | None = None) -> Layout:
    """The layout of a folder: the reader's, or the one that the user names, or the compact one (where only padding is
    asked for, the uniform one).

    Raises:
        ConfigError: there is no such reader or layout; the reader reads no folder; both are given.
    """
    if reader is None:
        return Layout(layout or ("compact" if pad_multiple == 1 else "uniform"), pad_multiple).check()
    if layout is not None or pad_multiple != 1:
        raise ConfigError(f"the reader {reader!r} decides on layout and padding; give it, or them, and not both")
    return find_reader(reader).folder_layout()


def require_taken(reader: Reader, holds: Mapping[str, str], names: Iterable[str]) -> None:
    """Make sure that ``reader`` takes an adapter of the layers ``names``, before it is written for it.

    Args:
        holds: {key of :data:`HELD`: the name of one such module in the adapter}.

    Raises:
        ConfigError: it cannot take what the adapter holds, or would leave some of its layers out.
    """
    for what in reader.refuses:
        if what in holds:
            raise ConfigError(
                f"{reader.title} cannot take {HELD[what]}, such as {holds[what]}; train without, or write the adapter "
                "for another reader"
            )
    if reader.whole_kinds and (missing := gaps(names)):
        raise ConfigError(
            f"{reader.title} adapts a kind of layer in all blocks or in none, and {missing[0]} is not adapted"
            f"{f' ({len(missing)} such layers)' if len(missing) > 1 else ''}; adapt it, too (it may end with rank 0), "
            "or write the adapter for another reader"
        )


@dataclass(frozen=True)
class Facts:
    """What a reader has to know of a PEFT folder.

    Attributes:
        scales: lora_alpha / r of every layer as PEFT computes them.
        ranks: of every layer in the file.
        r: of its configuration.
        alpha: lora_alpha of its configuration.
        rslora: whether it scales by √rank.
        holds: the keys of :data:`HELD` that are in it.
        gaps: layers that some blocks lack and others have (:func:`rankalloc.layer_names.gaps`).
        lasting_gaps: those of them that its metadata does not know as layers without ranks.
    """

    scales: tuple[float, ...]
    ranks: tuple[int, ...]
    r: int
    alpha: float
    rslora: bool
    holds: Collection[str]
    gaps: tuple[str, ...] = ()
    lasting_gaps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether a reader computes what PEFT does from this folder.

    Attributes:
        reader: its name.
        right: whether it does.
        why: what it would do otherwise, or refuse, and what older versions of it would do; else empty.
        mend: the options of ``rankalloc export`` that write what it reads, in older versions too; empty where there is
            nothing to mend, and where nothing helps.
        flags: what its command line has to say.
    """

    reader: str
    right: bool
    why: str = ""
    mend: str = ""
    flags: str = ""


def verdict(reader: Reader, facts: Facts) -> Verdict:
    """What ``reader`` makes of a folder."""
    top = max(facts.ranks, default=facts.r)
    held = [what for what in reader.refuses if what in facts.holds]
    if held:
        return Verdict(reader.name, False, f"it cannot take {' and '.join(HELD[what] for what in held)}")
    if reader.name == "peft":
        return Verdict(reader.name, True)
    if not reader.layouts:
        return Verdict(reader.name, False, "it reads a file of its own format", f"--for {reader.name}")
    if reader.whole_kinds and facts.lasting_gaps:
        return Verdict(reader.name, False, _gap_text(facts.lasting_gaps))
    why = ""
    if reader.name == "vllm":
        if top > VLLM_RANKS[-1]:
            return Verdict(reader.name, False, f"rank {top} is above the {VLLM_RANKS[-1]} that it takes", "")
        one = _one_scale(facts)
        if any(not _same(scale, one) for scale in facts.scales):
            old = f"before 0.32 it scales every layer by {one:g}, and they have scales from {_range(facts.scales)}"
            return Verdict(reader.name, True, old, f"--for {reader.name}", reader.flags(top))
    elif reader.name == "llama.cpp":
        wrong = [s for s, rank in zip(facts.scales, facts.ranks, strict=True) if not _same(s, facts.alpha / rank)]
        if wrong:
            why = f"it scales a layer by {facts.alpha:g} over its own rank, which is wrong for {len(wrong)} layers"
    elif len(set(facts.ranks)) > 1:
        why = f"it wants one rank, and the layers have {min(facts.ranks)} to {top}"
    elif Layout(reader.layout, reader.pad_to).stored_rank([top]) != top:
        why = f"it wants rank 8 or a multiple of 16, and the layers have {top}"
    elif reader.whole_kinds and facts.gaps:
        why = _gap_text(facts.gaps)
    elif any(not _same(scale, _one_scale(facts)) for scale in facts.scales):
        why = f"it scales every layer by {_one_scale(facts):g}, and they have scales from {_range(facts.scales)}"
    if why:
        return Verdict(reader.name, False, why, f"--for {reader.name}")
    return Verdict(reader.name, True, flags=reader.flags(top))


def _gap_text(missing: Sequence[str]) -> str:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"it adapts a kind of layer in all blocks or in none, and the file has no {missing[0]}{more}"


def _one_scale(facts: Facts) -> float:
    return facts.alpha / facts.r**0.5 if facts.rslora else facts.alpha / facts.r


def _same(one: float, two: float) -> bool:
    return abs(one - two) <= 1e-6 * max(abs(one), abs(two))


def _range(scales: tuple[float, ...]) -> str:
    return f"{min(scales):g} to {max(scales):g}"
