"""The environment of a run: versions, device, and the commit of the code that called it."""

from __future__ import annotations

import functools
import os
import platform
import re
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
    """The commit of the working folder, with "+changes" when files differ; None outside a checkout.

    The folder may be anybody's, and its own configuration can name programs that git starts when it compares files. So
    git is asked with those switched off, and where filters or other files' settings are named, not to compare at all.
    """
    try:
        head = _git("rev-parse", "HEAD")
        if _RUNS.search(_git("config", "--local", "--list", "--name-only")):
            return head
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


_RUNS = re.compile(
    r"^(filter|include|includeif|diff|extensions|core\.(attributesfile|sshcommand|worktree))\b",
    re.MULTILINE | re.IGNORECASE,
)
_OFF = ("core.fsmonitor=false", "core.hooksPath=/dev/null", "core.attributesFile=/dev/null")


def _git(*args: str) -> str:
    switched = [word for setting in _OFF for word in ("-c", setting)]
    done = subprocess.run(
        ["git", *switched, *args], capture_output=True, text=True, timeout=10, check=True,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout.strip()
