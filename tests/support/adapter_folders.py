"""Random finished adapters on disk, written without rankalloc's writer, and their dense updates."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."


def write_peft(folder: Path, layers, alpha: float = 8.0, dtype=torch.float32, heads=None, **config) -> Path:
    """A PEFT LoRA folder of ``layers`` {name: (lora_A (r, d_in), lora_B (d_out, r))} with per-layer ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: a.shape[0] for name, (a, _) in layers.items()}
    top = max(ranks.values())
    described = {
        "peft_type": "LORA", "r": top, "lora_alpha": alpha, "target_modules": sorted(layers),
        "rank_pattern": {f"^{name}": r for name, r in ranks.items() if r != top}, "alpha_pattern": {},
        "base_model_name_or_path": "base", **config,
    }
    tensors = {PREFIX + name: value for name, value in (heads or {}).items()}
    for name, (a, b) in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.to(dtype).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.to(dtype).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def random_layers(seed: int, count: int = 3, largest: int = 14, top: int = 5):
    """Layers of random shapes and ranks, with spectra that decay at random speeds."""
    draw = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    layers = {}
    for index in range(count):
        d_in, d_out = pick(2, largest), pick(2, largest)
        rank = pick(1, min(top, d_in, d_out))
        decay = torch.rand((), generator=draw) * 2
        sizes = torch.arange(1, rank + 1.0).pow(-decay)
        layers[f"layer{index}.dense"] = (
            torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw) * sizes
        )
    return layers


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """{layer: ΔW in float64} of a folder, by PEFT's rule alone: alpha / r, patterns by full name."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            pattern = "^" + name.replace(".", "\\.")
            alpha = config["alpha_pattern"].get(pattern, config["lora_alpha"])
            found[name] = b @ a * (alpha / (a.shape[0] ** 0.5 if config.get("use_rslora") else a.shape[0]))
    return found


def error_of(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """‖before − after‖_F / ‖before‖_F over all layers; a layer that is gone counts as zero."""
    lost = sum(float((w - after.get(name, torch.zeros_like(w))).square().sum()) for name, w in before.items())
    return (lost / sum(float(w.square().sum()) for w in before.values())) ** 0.5
