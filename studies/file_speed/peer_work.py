"""What each tool of :mod:`studies.file_speed.peers` does: a function that imports it, and returns the work itself."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

Work = Callable[[], object]


def shrink(source: str, out: str, params: int) -> Work:
    import rankalloc as ra

    ra.shrink, ra.FinishedAdapter  # noqa: B018 - they are imported when first named
    return lambda: ra.shrink(source, ra.RankBudget(params=params), out)


def extract(base: str, tuned: str, out: str, params: int, rank: int) -> Work:
    import transformers  # noqa: F401 - as mergekit has it before it begins
    from transformers import LlamaForCausalLM  # noqa: F401

    import rankalloc as ra

    return lambda: ra.extract(base, tuned, ra.RankBudget(params=params), out, rank=rank, dtype="bfloat16")


def peft(source: str, base: str, out: str, rank: int) -> Work:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), source)
    model.load_adapter(source, "again")  # a single adapter is copied as it is, whatever rank is asked for

    def work() -> None:
        model.add_weighted_adapter(["default", "again"], [0.5, 0.5], "small", combination_type="svd", svd_rank=rank)
        model.save_pretrained(out, selected_adapters=["small"])
        (Path(out) / "small" / "adapter_config.json").rename(Path(out) / "adapter_config.json")
        (Path(out) / "small" / "adapter_model.safetensors").rename(Path(out) / "adapter_model.safetensors")

    return work


def kohya(kohya: str, source: str, out: str, rank: int, rule: str | None, value: float | None) -> Work:
    import torch

    script = _kohya_script(Path(kohya))

    def work() -> None:
        tensors, _ = script.load_state_dict(source, torch.float)
        resized, _, _ = script.resize_lora_model(tensors, rank, rank, torch.float, "cpu", rule, value, False)
        script.save_to_file(out, resized, {})

    return work


def _kohya_script(checkout: Path) -> types.ModuleType:
    """kohya's resize_lora.py. The rest of its checkout, which needs diffusers and more, serves it only for a file's
    ending and a log: those are given here."""
    library = {name: types.ModuleType(name) for name in ("library", "library.utils", "library.train_util")}
    library["library.model_util"] = types.ModuleType("library.model_util")
    library["library.model_util"].is_safetensors = lambda path: path.endswith(".safetensors")  # type: ignore[attr-defined]
    library["library.utils"].setup_logging = lambda: None  # type: ignore[attr-defined]
    for name in ("train_util", "model_util"):
        setattr(library["library"], name, library[f"library.{name}"])
    sys.modules |= library
    path = checkout / "networks" / "resize_lora.py"
    spec = importlib.util.spec_from_file_location("resize_lora", path)
    assert spec is not None and spec.loader is not None, f"{path} is not there"
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def mergekit(base: str, tuned: str, out: str, rank: int) -> Work:
    import logging

    from mergekit.scripts.extract_lora import main

    logging.disable()
    words = ["--model", tuned, "--base-model", base, "--out-path", out, "--max-rank", str(rank)]
    return lambda: main(words, standalone_mode=False)


WORK: dict[str, Callable[..., Work]] = {
    "shrink": shrink, "extract": extract, "peft": peft, "kohya": kohya, "mergekit": mergekit,
}  # fmt: skip
