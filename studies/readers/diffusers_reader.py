"""diffusers: a tiny UNet and a tiny CLIP text encoder, with files of its own form and of kohya's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import rankalloc as ra

from .samples import sample

LINEAR = ["to_q", "to_v", "to_out.0", "ff.net.2"]
CONVOLUTIONS = ["proj_in", "conv1"]
"""Which shrink and compose do not take."""


def unet() -> Any:
    """A tiny UNet of random weights, always the same."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    ).eval()


@torch.no_grad()
def image_of(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    return model(noise, torch.tensor([3]), text).sample


def outcomes(folder: Path) -> dict[str, Any]:
    """Each source and form: {name: the outcome}."""
    import diffusers
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    found: dict[str, Any] = {"version": f"diffusers {diffusers.__version__}"}
    plain = image_of(unet())
    for source in ("trained", "shrunk", "composed"):
        targets = LINEAR + CONVOLUTIONS * (source == "trained")
        adapter = sample(source, unet(), folder / source, size=0.3, target_modules=targets)
        model = unet()
        ra.load(model, adapter)
        wanted = image_of(model)
        forms = {"--for diffusers": {"reader": "diffusers"}, "--for kohya": {"reader": "kohya"},
                 "kohya, padded": {"format": "kohya", "pad_to": 8}}
        for name, options in forms.items():
            out = folder / f"{source}-{name.replace(' ', '')}.safetensors"
            ra.export(adapter, out, **options)
            there = unet()
            state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
                str(out), unet_config=there.config, return_lora_metadata=True
            )
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, there, metadata=metadata)
            found[f"{source}, {name}"] = {
                "difference": float((image_of(there) - wanted).abs().max()),
                "effect": float((wanted - plain).abs().max()),
            }
    return found
