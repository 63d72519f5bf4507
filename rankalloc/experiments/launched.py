"""Several processes that torchrun or ``accelerate launch`` has started to train one run.

Importing this module is cheap: what the launcher says stands in the environment.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from .config import RunConfig


def processes() -> int:
    """How many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the one that writes and prints; the only one is."""
    return processes() == 1 or int(os.environ.get("RANK", 0)) == 0


def require_alone(command: str) -> None:
    """Raise ConfigError when ``command``, which runs in one process, was started in several."""
    if processes() > 1:
        raise ConfigError(
            f"rankalloc {command} runs in one process and was launched in {processes()}; start it without torchrun or "
            "accelerate launch"
        )


def together(arguments: Any) -> None:
    """Wait until all processes are here. ``arguments``: the Trainer's, which have joined them."""
    arguments.distributed_state.wait_for_everyone()


def processes_note(config: RunConfig, arguments: Any, examples: int | None) -> list[str]:
    """A sentence on what a step takes where several processes share it; ``examples`` of the train split, None where
    they are streamed."""
    if arguments.world_size == 1:
        return []
    factors = [arguments.world_size, config.training.batch_size]
    if config.training.gradient_accumulation_steps > 1:
        factors.append(config.training.gradient_accumulation_steps)
    product = " x ".join(map(str, factors))
    taken = math.prod(factors)
    repeated = f", some of the {examples} in the train split more than once" if examples and examples < taken else ""
    return [f"{arguments.world_size} processes trained together: a step took {product} = {taken} examples{repeated}"]


def speaks(what: str) -> bool:
    """Whether this process is the first to say ``what`` of those that a launcher started on this machine; its store
    decides. Without one every process speaks."""
    if processes() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from datetime import timedelta

    from torch import distributed

    dist: Any = distributed  # which does not say that it exports its stores

    try:
        server = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=10)
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore("rankalloc", server).add(f"{what}/{attempt}", 1) == 1
    except (RuntimeError, KeyError, ValueError):
        return True  # the launcher has gone
