"""torch.nn.DataParallel copies a model to every GPU at each call; adapters refuse to run in such a copy."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import rankalloc as ra
from rankalloc.errors import RankallocError
from rankalloc.layers.families import known


class Pair(nn.Module):
    """Two layers that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.one(x) + self.two(x)


def replica_of(model: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate makes, on the same device: parameters become plain attributes."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, made in copies.items():
        made._former_parameters = {}
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else copies[child]
            if child is not None:
                setattr(made, name, copies[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                made._parameters[name] = None
            else:
                setattr(made, name, parameter * 1)
    return copies[model]


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4)),
    "family": (Pair, torch.ones(2, 4)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 4)), torch.ones(2, 3, dtype=torch.long)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1)), torch.ones(2, 4, 3)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("init", ["svd", "vera"])
@pytest.mark.parametrize("name", MODELS)
def test_a_replica_refuses_in_one_sentence(name, init, rank, training):
    make, x = MODELS[name]
    model = make().train(training)
    names = [n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    ra.attach(model, rank=2, target_modules=names, ranks=dict.fromkeys(names, rank), init=init)
    model(x)  # families have met
    with pytest.raises(RankallocError, match="torch.nn.DataParallel.*torchrun or accelerate launch.*CUDA_VISIBLE"):
        replica_of(model)(x)
    model(x)


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_it_does_not_matter_who_came_first(wrapped_first):
    model = Pair()
    wrapper = nn.DataParallel(model) if wrapped_first else None
    ra.attach(model, rank=2)
    wrapper = wrapper or nn.DataParallel(model)
    x = torch.ones(2, 4)
    # without GPUs the wrapper calls the model itself, which is fine
    torch.testing.assert_close(wrapper(x), model(x))
    with pytest.raises(RankallocError, match="adapters do not run in torch.nn.DataParallel"):
        replica_of(wrapper.module)(x)


@pytest.mark.parametrize("factor", ["P", "lam", "Q"])
def test_factors_that_are_parametrized_are_refused_too(factor):
    adapters = ra.attach(Pair(), rank=2)
    register_parametrization(adapters.modules["one"], factor, nn.Identity())
    with pytest.raises(RankallocError, match="are not its parameters any more .parametrized, pruned or flattened"):
        adapters.model(torch.ones(2, 4))


def test_a_replica_without_adapters_is_left_alone():
    replica_of(Pair())(torch.ones(2, 4))


def test_threads_do_not_join_one_another_in_a_family():
    """Two models of one process that are called in turn with the same tensor, each by its own thread."""
    models = [Pair(), Pair()]
    adapters = [ra.attach(model, rank=2, target_modules=["one"]) for model in models]
    x = torch.ones(2, 4)
    for model in models:
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        thread.join()
    assert [known(one.modules) for one in adapters] == [[["one"]], [["one"]]]
    assert adapters[0].modules["one"].family is not adapters[1].modules["one"].family
