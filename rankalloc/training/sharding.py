"""A base that FSDP2 shards over processes, beside adapters that are whole in each of them.

    fully_shard(model, ignored_params=adapters.ignored_params())

Scoring a triplet takes all of it, and its parameters change their size, so adapters (and the task heads that are saved
with them) stay out of the sharding; they are small. FSDP2 leaves what it ignores alone: nobody broadcasts it, nobody
averages its gradients. Both happen here: at the start every process takes the adapters of the first one, and at the
end of each backward pass all gradients go through one all-reduce, as under DistributedDataParallel, so that clipping,
scoring and the optimizer see the same numbers everywhere.

Cost: one all-reduce of the adapters' parameters a backward pass, after it and not beside it. Weakness: with gradient
accumulation that is one for each backward pass, where one a step would do; the average is the same.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist
from torch import nn
from torch.autograd import Variable

from ..errors import RankallocError
from .processes import several_processes, wrappers_of

if TYPE_CHECKING:
    from ..adapters.adapter_set import Adapters


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is one process's part of a tensor (DTensor: FSDP2, tensor parallelism)."""
    return hasattr(tensor, "device_mesh")


def prepare(adapters: Adapters) -> None:
    """Make ready for training beside a sharded base, if there is one; all processes call it together.

    Raises:
        RankallocError: the adapters are sharded themselves, or the base in a way that is not known here.
    """
    check_whole(adapters)
    if adapters.averaging is not None or not several_processes() or not has_shards(adapters.model):
        return
    if wrappers_of(adapters.model):
        return  # DDP averages them
    for parameter in adapters.model.parameters():
        if is_sharded(parameter) and parameter.device_mesh.size() != dist.get_world_size():
            raise RankallocError(
                f"the base is sharded over {parameter.device_mesh.size()} of {dist.get_world_size()} processes, and "
                "gradients of the adapters are averaged over all; shard it over all of them"
            )
    with torch.no_grad():
        for tensor in whole(adapters):
            dist.broadcast(tensor.data, src=0)
    adapters.averaging = Averaging(adapters.parameters())


def check(adapters: Adapters) -> None:
    """At the first step: raise RankallocError when gradients were not averaged, or the adapters are sharded."""
    check_whole(adapters)
    unprepared = adapters.averaging is None and several_processes() and has_shards(adapters.model)
    if unprepared and not wrappers_of(adapters.model):
        raise RankallocError(
            "the model was sharded (fully_shard) after the RankController was made, so nobody averages the adapters' "
            "gradients; make the controller after sharding"
        )


def check_whole(adapters: Adapters) -> None:
    """Raise RankallocError when adapters or task heads are sharded over processes (FSDP, tensor parallelism)."""
    if any(is_sharded(parameter) for parameter in whole(adapters)):
        raise RankallocError(
            "these adapters are sharded over processes (FSDP), and scoring a triplet takes all of it: keep them and "
            "the task heads out of the sharding with ignored_params=adapters.ignored_params() in every fully_shard, or "
            "use DistributedDataParallel (with the Trainer and accelerate, whose FSDP shards everything)"
        )
    if _flattened(adapters.model):
        raise RankallocError(
            "FullyShardedDataParallel flattens parameters, and ranks cannot leave a flat one; use "
            "torch.distributed.fsdp.fully_shard with ignored_params=adapters.ignored_params(), or "
            "DistributedDataParallel"
        )


class Averaging:
    """Averages the gradients of ``parameters`` over all processes at the end of each backward pass.

    A parameter without a gradient in one process counts as zero there; without one in any, it stays so. What was
    averaged before and is accumulated upon may be averaged again: the average of equal numbers is that number.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self._pass = -1
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in parameters]

    def end(self) -> None:
        """Leave gradients alone from now on."""
        for handle in self._handles:
            handle.remove()

    def _arrived(self, parameter: torch.Tensor) -> None:
        # by its number, and no flag: a pass that ends with an error never comes to its end
        current = torch._C._current_graph_task_id()
        if current != self._pass and several_processes():
            self._pass = current
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        alike: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in self.parameters:
            alike.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for some in alike.values():
            zeros = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in some]
            has_one = some[0].new_tensor([p.grad is not None for p in some])
            flat = torch.cat([has_one, *(grad.flatten() for grad in zeros)]).div_(dist.get_world_size())
            dist.all_reduce(flat)
            has_one, *means = flat.split([len(some), *(p.numel() for p in some)])
            for parameter, mean, present in zip(some, means, has_one.tolist(), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(mean.view_as(parameter))
                elif present:
                    parameter.grad = mean.view_as(parameter).clone()


def whole(adapters: Adapters) -> Iterator[nn.Parameter]:
    """What has to be whole in every process, in the same order in each."""
    for adapter in adapters:
        yield from adapter.parameters(recurse=False)
    for head in adapters.heads.values():
        yield from head.parameters()


def has_shards(model: nn.Module) -> bool:
    """Whether any weight of ``model`` is sharded over processes."""
    # between a forward and a backward pass FSDP2 may hold a module's weights whole, and the module tells
    return any(hasattr(m, "_get_fsdp_state") for m in model.modules()) or any(map(is_sharded, model.parameters()))


def _flattened(model: nn.Module) -> bool:
    """Whether the first FullyShardedDataParallel holds ``model`` or a part of it."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None or not several_processes():
        return False
    kind = module.FullyShardedDataParallel
    if any(isinstance(part, kind) for part in model.modules()):
        return True
    around = [item for item in gc.get_objects() if issubclass(type(item), kind)]
    return any(part is model for wrapper in around for part in wrapper.modules())
