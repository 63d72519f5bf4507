"""A base that FSDP2 shards over processes, beside adapters that are whole in each of them.

    fully_shard(model, ignored_params=adapters.ignored_params())

A score needs whole triplets, and their parameters change size, so adapters (and the task heads that are saved with
them) stay out of the sharding; they are small. FSDP2 neither broadcasts the parameters it ignores nor averages their
gradients. Both happen here: at the start every process takes the adapters of the first one, and at the end of each
backward pass one all-reduce averages all gradients, as under DistributedDataParallel, so that clipping, scoring and the
optimizer see the same numbers everywhere.

Cost: one all-reduce of the adapters' gradients after each backward pass, not overlapped with it. Weakness: with
gradient accumulation that is one for each backward pass, where one for each step would do.
"""

from __future__ import annotations

import sys

import torch
from torch import distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from ..adapters.adapter_set import Adapters
from ..errors import RankallocError
from ..layers.sharding import has_shards, is_sharded
from .processes import several_processes
from .wrappers import wrappers_of


def prepare(adapters: Adapters) -> None:
    """Make ready for training beside a sharded base, if there is one; all processes call it together.

    Raises:
        RankallocError: the adapters are sharded themselves, or the base in a way that is not known here.
    """
    check_whole(adapters)
    if not _needs_averaging(adapters):
        return
    for parameter in adapters.model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and mesh.size() != dist.get_world_size():
            raise RankallocError(
                f"the base is sharded over {mesh.size()} of {dist.get_world_size()} processes, and "
                "gradients of the adapters are averaged over all; shard it over all of them"
            )
    with torch.no_grad():
        for tensor in adapters.whole_parameters():
            dist.broadcast(tensor.data, src=0)
    adapters.on_detach.append(Averaging(adapters.parameters()))


def check(adapters: Adapters) -> None:
    """At the first step: raise RankallocError when gradients were not averaged, or the adapters are sharded."""
    check_whole(adapters)
    if _needs_averaging(adapters):
        raise RankallocError(
            "the model was sharded (fully_shard) after the RankController was made, so nobody averages the adapters' "
            "gradients; make the controller after sharding"
        )


def check_whole(adapters: Adapters) -> None:
    """Raise RankallocError when adapters or task heads are sharded over processes (FSDP, tensor parallelism)."""
    if any(is_sharded(parameter) for parameter in adapters.whole_parameters()):
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

    def __call__(self) -> None:
        """End: leave gradients alone from now on. Called when the adapters are detached."""
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


def _flattened(model: nn.Module) -> bool:
    """Whether the first FullyShardedDataParallel holds ``model`` or a part of it."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None or not several_processes():
        return False
    kind = module.FullyShardedDataParallel
    if any(isinstance(part, kind) for part in model.modules()):
        return True
    return bool(wrappers_of([model], kind))


def _needs_averaging(adapters: Adapters) -> bool:
    """Whether the base is sharded and nobody averages the adapters' gradients yet."""
    if any(isinstance(called, Averaging) for called in adapters.on_detach):
        return False
    sharded = several_processes() and has_shards(adapters.model)
    return sharded and not wrappers_of([adapters.model], DistributedDataParallel)
