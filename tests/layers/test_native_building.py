"""One C++ source becomes one library, whole or not at all, and each reason why it cannot is one sentence."""

from __future__ import annotations

import ctypes
import shutil
import sys

import pytest
from typer.testing import CliRunner

from rankalloc.cli.app import app
from rankalloc.errors import RankallocError
from rankalloc.layers import native
from rankalloc.layers.native.building import compile_library

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="the kernel is built by g++ on Linux"
)


def test_a_source_becomes_a_library_that_replaces_the_one_before(tmp_path):
    source, target = tmp_path / "answer.cpp", tmp_path / "new" / "answer.so"
    target.parent.mkdir()
    target.write_bytes(b"an older one")
    source.write_text('extern "C" int answer() { return 42; }')
    compile_library(source, target, native.capability())
    assert ctypes.CDLL(target).answer() == 42 and list(target.parent.iterdir()) == [target]


def test_a_source_that_does_not_compile_leaves_the_library_before_it(tmp_path):
    source, target = tmp_path / "broken.cpp", tmp_path / "broken.so"
    target.write_bytes(b"an older one")
    source.write_text("int answer() { return; }")
    with pytest.raises(RankallocError, match="could not build the kernel: .*broken.cpp.*error"):
        compile_library(source, target, native.capability())
    assert target.read_bytes() == b"an older one" and sorted(tmp_path.iterdir()) == [source, target]


def test_without_a_compiler_or_with_a_broken_one_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    for compiler, message in (("no-such-compiler", "no C\\+\\+ compiler"), ("false", "could not build the kernel")):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(RankallocError, match=message):
            native.build()
        done = CliRunner().invoke(app, ["build-kernel"])
        assert done.exit_code == 1 and "error:" in done.stderr and "Traceback" not in done.stderr
    assert not native.library_path().exists() and not list((tmp_path / "new").rglob("*.*"))
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(RankallocError, match="TORCH_EXTENSIONS_DIR"):
        native.build()
