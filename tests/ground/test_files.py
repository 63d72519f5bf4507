"""Files are replaced whole or not at all, with a clear sentence when the disk does not take them."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import save

from rankalloc.errors import AdapterFileError, RankallocError
from rankalloc.files import replacing, sha256_of, write_json, write_text
from rankalloc.storage.tensors import Spec, TensorFile, encode, read_tensors, write_stream, write_tensors


def test_writing_makes_folders_and_replaces_the_file(tmp_path):
    path = tmp_path / "a" / "b.txt"
    assert write_text(path, "eins ä") == path
    write_text(path, "zwei")
    assert path.read_text(encoding="utf-8") == "zwei" and os.listdir(path.parent) == ["b.txt"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = write_text(tmp_path / "x", "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_json_is_strict_and_whole(tmp_path):
    path = write_json(tmp_path / "x.json", {"b": [1, 2.5], "ä": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [1, 2.5], "ä": None}
    with pytest.raises(ValueError):
        write_json(path, {"b": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8"))["b"] == [1, 2.5]


def test_a_new_file_has_ordinary_permissions(tmp_path):
    mask = os.umask(0o027)
    try:
        assert write_text(tmp_path / "x", "").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(mask)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where the system permits one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told_and_leaves_the_old_file(small_disk):
    path = write_text(small_disk / "x", "old")
    big = {"t": torch.zeros(100_000)}
    for write in (lambda: write_text(path, "new" * 100_000), lambda: write_tensors(path, big, {})):
        with pytest.raises(RankallocError, match="could not write .*No space left on device; .* left as it was"):
            write()
        assert path.read_text() == "old" and os.listdir(small_disk) == ["x"]


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(RankallocError, match="could not write"):
        write_text(tmp_path / "x" / "y", "")


def test_parts_of_a_hash_cannot_run_together():
    assert sha256_of("ab", "c") != sha256_of("a", "bc") != sha256_of("abc")
    assert sha256_of("ä") == sha256_of("ä".encode())


def test_tensors_come_back_and_equal_content_is_equal_bytes(tmp_path):
    tensors = {
        "b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor([True, False]), "none": torch.zeros(0, 4),
        "half": torch.ones(3, dtype=torch.bfloat16), "__odd": torch.zeros(1),
    }
    metadata = {str(i): "ä" * i for i in range(9)}
    assert len({encode(tensors, dict(sorted(metadata.items(), reverse=i % 2 == 0))) for i in range(20)}) == 1
    write_tensors(tmp_path / "x", tensors, metadata)
    back, note = read_tensors(tmp_path / "x")
    assert note == metadata and back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensors[k]) and back[k].dtype == tensors[k].dtype for k in tensors)


def test_a_streamed_file_is_the_librarys_and_is_read_tensor_by_tensor(tmp_path):
    tensors = {
        f"{name}.{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for name in "bca"
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float64, torch.bool)
    } | {"none": torch.zeros(0, 4), "one": torch.tensor(3.0)}
    assert encode(tensors, {"format": "pt"}) == save(tensors, {"format": "pt"})
    write_tensors(tmp_path / "x", tensors, {"format": "pt"})
    file = TensorFile(tmp_path / "x")
    assert file.specs == {key: Spec.of(value) for key, value in tensors.items()}
    assert all(torch.equal(file[key], value) for key, value in tensors.items())
    with pytest.raises(KeyError):
        file["other"]


def test_a_tensor_that_is_not_what_was_announced_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="announced"), replacing(tmp_path / "x") as temporary:
        write_stream(temporary, {"a": Spec((2,), torch.float32)}, {}, lambda key: torch.zeros(3))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_a_cut_tensor_file_is_told(size, tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.zeros(64)}, {})
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:size])
    with pytest.raises(AdapterFileError, match="damaged or truncated"):
        read_tensors(tmp_path / "x")
