"""Adapters of grouped convolutions in files: rows that stand once for each group, in PEFT's form and in no other."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rankalloc as ra
from rankalloc.errors import AdapterFileError, RankallocError
from tests.support.models import randomize
from tests.support.towers import adapt, ids, make


@pytest.mark.parametrize("origin", ["ours", "peft's"])
@pytest.mark.parametrize("kind", ["groups", "depthwise", "3d"])
def test_grouped_convolutions_are_exported_and_imported_as_peft_has_them(kind, origin, tmp_path):
    peft = pytest.importorskip("peft")
    if origin == "ours":
        model, adapters = adapt(kind)
        randomize(adapters)
        adapters.modules["layer"].drop(torch.tensor([True, False, True]), erase=True)
        ra.save(adapters, tmp_path / "a")
    else:
        model = peft.get_peft_model(make(kind), peft.LoraConfig(r=8, lora_alpha=3, target_modules=["layer", "out"]))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight)
        model.eval().save_pretrained(tmp_path / "a")
    expected = model(ids())
    assert (expected - make(kind)(ids())).abs().max() > 0.1
    for name, options in (("b", {"layout": "compact"}), ("c", {"pad_to": 12})):
        ra.export(tmp_path / "a", tmp_path / name, **options)
        there = peft.PeftModel.from_pretrained(make(kind), tmp_path / name).eval()
        torch.testing.assert_close(there(ids()), expected, rtol=1e-5, atol=1e-5)
    size = {name: (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in "bc"}
    assert size["b"] < size["c"]
    if origin == "ours":
        again = make(kind)
        assert ra.load(again, tmp_path / "b").ranks()["layer"] == 2
        torch.testing.assert_close(again(ids()), expected, rtol=1e-5, atol=1e-5)
    else:
        ra.import_lora(tmp_path / "b" / "adapter_model.safetensors", make(kind), tmp_path / "d")
        there = peft.PeftModel.from_pretrained(make(kind), tmp_path / "d").eval()
        torch.testing.assert_close(there(ids()), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(RankallocError, match="grouped convolution layer, which kohya's format"):
            ra.export(tmp_path / "a", tmp_path / "k.safetensors", format="kohya")


def test_a_grouped_convolutions_lora_must_know_its_groups(tmp_path):
    rows, wide, out = torch.ones(4, 4, 3, 3), torch.ones(6, 4, 1, 1), torch.ones(6, 2, 1, 1)
    for pair, kind, words in (
        ((rows, wide), "groups", "takes no account of the 2 groups of the convolution layer"),
        ((rows, out), "plain", "the factors of layer do not fit each other"),
        ((rows[:, :2], out), "groups", "layer is 18 → 6 in the adapter and 36 → 6 here"),
        ((rows[:3], out), "groups", "the factors of layer do not fit each other"),
    ):
        tensors = {f"lora_unet_layer.lora_{part}.weight": t for part, t in zip(("down", "up"), pair, strict=True)}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "k.safetensors")
        with pytest.raises(AdapterFileError, match=words):
            ra.import_lora(tmp_path / "k.safetensors", make(kind), tmp_path / "a")
