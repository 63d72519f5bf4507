"""The contract over many architectures: adapt by default, train to a budget, resume, save, load, merge, generate."""

from __future__ import annotations

import copy
import math
import re
import warnings

import peft
import pytest
import torch

import rankalloc as ra
from rankalloc.cli.layers import fates
from tests.support.architectures import ARCHITECTURES, IMAGE
from tests.support.models import assert_same, tensors_of
from tests.support.training import train

STEPS, STOP = 6, 3
QUICK = (
    "qwen2", "gpt2", "falcon", "deberta_v2", "t5", "segformer", "vit", "whisper", "wavlm", "llava", "clip", "mamba",
    "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss",
)
"""Some of each kind, which every run of the suite sees; the others are among the long tests."""
PARTLY = {
    "gemma3n": 0.99, "xlnet": 0.44, "squeezebert": 0.1, "convbert": 0.56, "resnet": 0.0, "mobilevit": 0.80,
    "wavlm": 0.53, "wav2vec2_conformer": 0.81, "siglip": 0.90, "gemma3_vl": 0.97, "mamba": 0.68, "mamba2": 0.68,
    "falcon_mamba": 0.68, "falcon_h1": 0.91, "jamba": 0.99, "zamba": 0.94, "recurrent_gemma": 0.95,
}
"""The coverage, cut to two digits, of those that compute with convolutions or bare parameters, or have layers that no
adapter reaches (:mod:`rankalloc.layers.out_of_reach`); of the others it is 1."""
IDLE = {
    "canine": r"canine\.final_char_encoder\..*", "esm": r"esm\.contact_head\.regression", "led": r".*_global",
    "llava": r"model\.vision_tower\.encoder\.layers\.1\..*",
}
"""Layers that the inputs of these never reach, or that they never call; every other adapter gets a gradient."""
TIED_LAYERS = ("zamba",)
"""Architectures whose layers share one weight while each has an adapter of its own, so that none can be merged."""
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@torch.no_grad()
def answer(model, inputs):
    """What the model computes in evaluation: its logits."""
    out = model.eval()(**inputs)
    return (out.logits if "logits" in out else out.logits_per_image).clone()


def begin(architecture):
    """(model, adapters, optimizer, controller) of a run that has not begun, on the defaults of attach."""
    model = architecture.build().train()
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is left out is tested in tests/layers/test_targets.py
        adapters = ra.attach(model, target_modules=architecture.targets)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    return model, adapters, optimizer, ra.RankController(adapters, ra.RankBudget(fraction=0.5, every=1), STEPS)


def go_on(architecture, model, controller, optimizer, steps):
    """Train up to step ``steps``; the names of the adapters that got a gradient."""
    reached = set()

    def loss_of(step):
        torch.manual_seed(step)
        return model(**architecture.inputs(step)).loss

    def look(step):
        reached.update(name for name, adapter in controller.adapters.modules.items() if adapter.P.grad is not None)

    train(controller, optimizer, steps, loss_of, look)
    return reached


def check_the_budget(adapters, controller):
    plan = controller.schedule
    spent = plan.spent(list(adapters.ranks().values()))
    assert controller.finish().final_ranks == list(adapters.ranks().values())
    reached = sum(c * a.initial_rank for n, c, a in zip(
        adapters.modules, plan.costs, adapters, strict=True) if n not in controller.state.idle)
    assert 0 <= min(plan.target, reached) - spent < max(plan.costs) and any(adapters.ranks().values())


def check_resuming(architecture, saved, whole):
    model, _, optimizer, controller = begin(architecture)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    controller.load_state_dict(saved["controller"])
    go_on(architecture, model, controller, optimizer, STEPS)
    assert_same(whole, tensors_of(model))


def check_generation(model, inputs):
    """Continuing a text with and without the cache of what was computed gives the same tokens."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    settings = {
        "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE],
    }
    cached, whole = (model.generate(**given, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)


def check_the_coverage(name, model):
    assert math.floor(100 * fates(model).coverage) / 100 == PARTLY.get(name, 1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in ARCHITECTURES
])
def test_an_architecture_keeps_the_whole_contract(name, tmp_path):
    architecture = ARCHITECTURES[name]
    inputs = architecture.inputs(100)
    base = architecture.build()
    before = answer(base, inputs)
    check_the_coverage(name, base)

    model, adapters, optimizer, controller = begin(architecture)
    reached = go_on(architecture, model, controller, optimizer, STOP)
    assert {n for n in adapters.modules if n not in reached} == {
        n for n in adapters.modules if re.fullmatch(IDLE.get(name, ""), n)
    }
    saved = copy.deepcopy({
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "controller": controller.state_dict(),
    })
    go_on(architecture, model, controller, optimizer, STEPS)
    check_the_budget(adapters, controller)
    idle = [n for n in adapters.modules if n not in reached]
    assert not any(adapters.ranks()[n] for n in idle)
    told = [alert for alert in controller.trace.alerts if "never got a gradient" in alert]
    assert bool(idle) == bool(told) and all(f"{len(idle)} of {len(adapters)}" in alert for alert in told)
    check_resuming(architecture, saved, tensors_of(model))

    trained = answer(model, inputs)
    assert not torch.allclose(trained, before, rtol=0, atol=1e-3)
    if architecture.generates:
        check_generation(model, inputs)
    for layout in ("uniform", "compact"):
        ra.save(adapters, tmp_path / layout, layout)
        read = peft.PeftModel.from_pretrained(architecture.build(), tmp_path / layout)
        torch.testing.assert_close(answer(read, inputs), trained, **CLOSE)
    again = architecture.build()
    loaded = ra.load(again, tmp_path / "compact")
    torch.testing.assert_close(answer(again, inputs), trained, **CLOSE)
    assert {n: r for n, r in loaded.ranks().items() if r} == {n: r for n, r in adapters.ranks().items() if r}
    if name in TIED_LAYERS:
        with pytest.raises(ra.RankallocError, match="shares its weight with another module"):
            ra.merge(loaded)
        return
    ra.merge(loaded)
    torch.testing.assert_close(answer(again, inputs), trained, **CLOSE)
