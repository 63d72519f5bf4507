"""Modules around a model that change the names of its parts: torch.compile, DataParallel, averages, FSDP, checkpoints.

An adapter's file has the names of the plain model, which every reader builds. So adapters are put into the plain model,
whatever is around it; what is around a part of it has to be put there afterwards.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..errors import TargetError

_INNER = {
    "_orig_mod": "torch.compile", "_checkpoint_wrapped_module": "an activation checkpoint",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
}
"""{attribute under which a wrapper holds what it is around: the wrapper in the words of a message}."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model in ``model``, which torch.compile, DataParallel or an average of weights may be around.

    Raises:
        TargetError: DistributedDataParallel is around it, which has seen its parameters as they were; or something that
            changes names is around a part of it.
    """
    while True:
        if isinstance(model, DistributedDataParallel):
            raise TargetError(
                "the model is wrapped in DistributedDataParallel, which would not know the adapters; put them in "
                "before it is wrapped"
            )
        if isinstance(model, (nn.DataParallel, AveragedModel)):
            model = model.module
            continue
        inner = next((model._modules[key] for key in _INNER if model._modules.get(key) is not None), None)
        if inner is None:
            break
        model = inner
    for name, module in model.named_modules():
        found = next((key for key in _INNER if module._modules.get(key) is not None), None)
        if found:
            raise TargetError(
                f"{name} is wrapped by {_INNER[found]}, which changes the names of its layers, so no other tool could "
                "read the adapter's file; put the adapters in first and wrap it afterwards"
            )
    return model
