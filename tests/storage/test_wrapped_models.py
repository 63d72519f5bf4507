"""Whatever is around a model, its adapter has the plain model's names: PEFT loads it, and heads are known."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import rankalloc as ra
from rankalloc.errors import TargetError
from tests.support.models import make_bert, make_mlp, token_ids

WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "two of them": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "an activation checkpoint": checkpoint_wrapper,
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.long) if name == "two of them" else name for name in WRAPPERS
])
def test_a_wrapped_classifier_is_adapted_saved_and_loaded_by_its_own_names(name, tmp_path):
    wrapped = WRAPPERS[name](make_bert())
    adapters = ra.attach(wrapped, rank=2)
    assert type(adapters.model) is type(make_bert()) and list(adapters.heads) == ["classifier"]
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.2)
    expected = logits(wrapped)
    assert torch.equal(logits(adapters.model), expected)
    folder = ra.save(adapters, tmp_path)
    keys = load_file(folder / "adapter_model.safetensors")
    assert not [key for key in keys if "_orig_mod" in key or "module." in key.removeprefix("base_model.model.")]
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make_bert(), folder)), expected)
    again = WRAPPERS[name](make_bert())
    ra.load(again, folder)
    assert torch.equal(logits(again), expected)
    assert ra.plan_ranks(WRAPPERS[name](make_bert()), None, ra.RankBudget(ranks=12)).keys() == adapters.modules.keys()


def test_what_has_seen_the_parameters_or_is_around_a_part_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TargetError, match="DistributedDataParallel, which would not know the adapters"):
            ra.attach(nn.parallel.DistributedDataParallel(make_mlp()), rank=2)
    finally:
        torch.distributed.destroy_process_group()
    for name, words in (("torch.compile", "torch.compile"), ("an activation checkpoint", "an activation checkpoint")):
        model = make_bert()
        model.bert.encoder.layer[0] = WRAPPERS[name](model.bert.encoder.layer[0])
        with pytest.raises(TargetError, match=f"bert.encoder.layer.0 is wrapped by {words}.*wrap it afterwards"):
            ra.attach(model, rank=2)


@pytest.mark.long
def test_a_part_that_is_wrapped_afterwards_keeps_its_names(tmp_path):
    model = make_bert()
    adapters = ra.attach(model, rank=2)
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")
    model.classifier = torch.compile(model.classifier, backend="eager")
    folder = ra.save(adapters, tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make_bert(), folder)), logits(model))
