"""Compile and link one C++ source against the installed torch, with nothing but g++.

torch.utils.cpp_extension does the same through ninja but links the system's OpenMP: a second pool of threads, which
busy-waits on the cores of torch's own. Here OpenMP is resolved from torch at load time.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ...errors import RankallocError

_VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}


def compile_library(source: Path, target: Path, capability: str) -> None:
    """Compile ``source`` into ``target``, which appears complete or not at all.

    Raises:
        RankallocError: no compiler, not Linux, a folder that cannot be written, or the compiler failed.
    """
    if sys.platform != "linux":
        raise RankallocError(
            f"the kernel can be built on Linux only, this is {platform.system()}; everything works without it"
        )
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        raise RankallocError(
            f"no C++ compiler {compiler[0]!r} is installed: install g++ 11 or newer (Debian: apt install g++), or name "
            "one in CXX; everything works without the kernel"
        )
    torch_folder = Path(torch.__path__[0])
    includes = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    options = [
        "-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", *_VECTORS.get(capability, ()),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made, linked = Path(folder, "fused.o"), Path(folder, target.name)
            _run([*compiler, *options, *(f"-I{path}" for path in includes), "-c", str(source), "-o", str(made)])
            _run([
                *compiler, "-shared", str(made), "-o", str(linked), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu",
                "-ltorch",
            ])
            os.replace(linked, target)
    except OSError as error:
        raise RankallocError(
            f"cannot write the kernel to {target.parent} ({error.strerror}); name another folder in "
            "TORCH_EXTENSIONS_DIR"
        ) from None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.splitlines() or ["it gave no reason"]
        reason = next((line for line in said if "error" in line), said[0]).strip()
        raise RankallocError(f"{command[0]} could not build the kernel: {reason}")
