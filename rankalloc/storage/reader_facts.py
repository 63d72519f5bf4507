"""What the tools of :mod:`.readers` have to know of a folder that is there already."""

from __future__ import annotations

from ..layer_names import gaps
from ..layers.kinds import LAYER_KINDS
from .left_out import left_out_in
from .peft_names import KEY
from .readers import READERS, Facts, Verdict, verdict
from .reading import FinishedAdapter


def facts_of(adapter: FinishedAdapter) -> Facts:
    """The facts of a finished adapter, from its configuration and the shapes in its file alone."""
    config, layers = adapter.config, list(adapter.layers.values())
    r = int(config.get("r", 8))
    held = {
        "heads": bool(adapter.heads), "experts": bool(adapter.stacks or config.get(KEY)),
        "embeddings": any(layer.ends == LAYER_KINDS["embedding"].keys for layer in layers),
        "groups": any(
            not layer.plain and adapter.shape(layer.name, "A")[0] != adapter.shape(layer.name, "B")[1]
            for layer in layers
        ),
    }
    return Facts(
        scales=tuple(layer.scaling for layer in layers), ranks=tuple(layer.rank for layer in layers), r=r,
        alpha=float(config.get("lora_alpha", 8)), rslora=bool(config.get("use_rslora")),
        holds=[what for what, there in held.items() if there], gaps=tuple(gaps(adapter.layers)),
        lasting_gaps=tuple(gaps([*adapter.layers, *left_out_in(adapter.metadata)])),
    )


def verdicts(adapter: FinishedAdapter) -> list[Verdict]:
    """What every reader makes of this folder, in the order of the table."""
    if adapter.config["peft_type"] != "LORA":
        return [
            Verdict(name, name == "peft", "" if name == "peft" else "it reads plain LoRA, and this is AdaLoRA",
                    "" if name == "peft" else f"--for {name}")
            for name in READERS
        ]
    facts = facts_of(adapter)
    return [verdict(reader, facts) for reader in READERS.values()]
