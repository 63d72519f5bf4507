"""Names with numbers in them sort by those numbers, and any character may be in a name."""

from __future__ import annotations

import pytest
import torch

import rankalloc as ra
from rankalloc.layer_names import natural_key
from tests.support.adapter_folders import write_peft
from tests.support.models import make_mlp

NOT_DECIMAL = ["²", "①", "¹⁰", "➀", "፩", "🄂"]
"""Characters for which str.isdigit is true and int() fails."""


@pytest.mark.parametrize(
    "names",
    [
        ["layer.9.x", "layer.10.x"], ["2", "10", "head"], ["a", "a1", "a1b", "a2", "ab"],
        ["run", "run1", "run1²", "run2"], ["v٣", "v10"], ["x" + "9" * 5000, "x1" + "0" * 5000], ["b1", "b01x", "b2"],
    ],
)
def test_numbers_count_as_numbers(names):
    assert sorted(reversed(names), key=natural_key) == names


@pytest.mark.parametrize("odd", NOT_DECIMAL)
def test_a_library_takes_folders_of_any_name(odd, tmp_path):
    assert odd.isdigit() and not odd.isdecimal()
    folder = ra.save(ra.attach(make_mlp(), rank=2), tmp_path / f"run1{odd}")
    ra.save(ra.attach(make_mlp(), rank=2), tmp_path / "run1" / odd)
    ra.save(ra.attach(make_mlp(), rank=2), tmp_path / "run1" / f"9{odd}")
    library = ra.AdapterLibrary(tmp_path)
    assert {version.name for version in library.list()} == {folder.name, "run1"}
    assert {version.version for version in library.versions("run1")} == {odd, f"9{odd}"}
    assert library.versions(folder.name)[0].path == folder


@pytest.mark.parametrize("odd", NOT_DECIMAL)
def test_layers_may_have_any_name(odd, tmp_path):
    names = [f"block.9{odd}", f"block.10{odd}"]
    write_peft(tmp_path, {name: (torch.ones(2, 4), torch.ones(4, 2)) for name in reversed(names)})
    assert list(ra.FinishedAdapter(tmp_path).layers) == names
    assert list(ra.shrink(tmp_path, ra.RankBudget(ranks=2)).ranks) == names


def test_versions_that_differ_in_zeros_alone_have_one_order(tmp_path):
    for version in ("v1", "v01", "v001", "v2"):
        ra.save(ra.attach(make_mlp(), rank=2), tmp_path / "x" / version)
    found = [version.version for version in ra.AdapterLibrary(tmp_path).versions("x")]
    assert found == ["v001", "v01", "v1", "v2"]
