"""The environment of a run: versions, device, and the commit of the code that called it."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata

from ..trace import EnvironmentRecord

PACKAGES = (
    "rankalloc", "torch", "transformers", "accelerate", "numpy", "scipy", "optuna", "matplotlib", "safetensors",
    "wandb", "peft",
)


def describe(device: str | None = None) -> EnvironmentRecord:
    """The present environment. ``device`` is the one that trains; None for the best there is."""
    import torch

    from ..layers import native, products

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name()})"
    return EnvironmentRecord(
        python=platform.python_version(), platform=f"{platform.system()} {platform.machine()}", device=device,
        threads=torch.get_num_threads(), versions=dict(versions()), git_hash=git_hash(),
        kernel="compiled" if device == "cpu" and native.fused_linear() is not None else "python",
        products="oneDNN" if device == "cpu" and products.uses_onednn() else "torch", processor=products.processor(),
    )


@functools.cache
def versions() -> dict[str, str]:
    """{package: installed version} of what decides a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_hash() -> str | None:
    """The commit of the working folder, with "+changes" when files differ; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
