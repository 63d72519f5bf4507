"""Many adapters on one model through PEFT: hot swaps, mixed batches, a byte cap, and names that lead nowhere else."""

from __future__ import annotations

import sys

import pytest
import torch

import rankalloc as ra
from rankalloc.errors import AdapterFileError, ConfigError, RankallocError, TargetError
from tests.support.models import logits_of, make_bert, make_llama, prune, randomize, token_ids

pytest.importorskip("peft")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LAYOUTS = {"german": "uniform", "legal": "compact", "short": "uniform"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """(folder, {name: logits}) of three adapters with other ranks each; one has two versions."""
    folder = tmp_path_factory.mktemp("library")
    expected = {}
    for seed, (name, layout) in enumerate(LAYOUTS.items()):
        for version in ("v9", "v10") if name == "legal" else ("",):
            model = make_llama()
            adapters = ra.attach(model, rank=4, alpha=6)
            randomize(adapters, seed=10 * seed + len(version))
            prune(adapters, [(i + seed) % 4 + (seed == 2) for i in range(len(adapters))])
            ra.save(adapters, folder / name / version, layout, **({"pad_multiple": 8} if seed == 2 else {}))
            expected[f"{name}@{version}" if version else name] = logits_of(model)
    expected["legal"] = expected["legal@v10"]
    return folder, expected


@pytest.fixture(scope="module")
def plain():
    return logits_of(make_llama())


def test_the_folder_lists_names_versions_and_fingerprints(shelf):
    library = ra.AdapterLibrary(shelf[0])
    listed = {version.reference: version for version in library.list()}
    assert list(listed) == ["german", "legal@v10", "short"]
    assert [v.version for v in library.versions("legal")] == ["v9", "v10"]
    prints = {v.fingerprint for v in (*library.versions("legal"), listed["german"], listed["short"])}
    assert len(prints) == 4 and all(len(mark) == 16 for mark in prints)
    assert len({v.base.id for v in listed.values()}) == 1
    assert listed["german"].layers == set(ra.attach(make_llama(), rank=1).modules)
    with pytest.raises(ConfigError, match="no model"):
        library.use("german")


def test_three_hot_swaps_on_one_model(shelf, plain):
    folder, expected = shelf
    model = make_llama()
    weights = {name: p for name, p in model.named_parameters()}
    library = ra.AdapterLibrary(folder, model)
    for name in ("german", "legal", "short", "german", "legal@v9", "legal@v10"):
        torch.testing.assert_close(logits_of(library.use(name)), expected[name], **CLOSE)
    assert library.cached == ["short", "german", "legal@v9", "legal@v10"]
    held = {id(p) for p in library.model.parameters()}
    assert all(id(p) in held for p in weights.values()), "the base was loaded again"
    assert library.close() is model and library.cached == [] and library.cached_bytes == 0
    assert torch.equal(logits_of(model), plain)
    torch.testing.assert_close(logits_of(library.use("short")), expected["short"], **CLOSE)


@torch.no_grad()
def test_a_mixed_batch_equals_one_by_one(shelf, plain):
    folder, expected = shelf
    library = ra.AdapterLibrary(folder, make_llama())
    ids = token_ids(rows=3)
    rows = ["short", None, "german", "legal@v9", "short", "legal"]
    mixed = library.forward(rows, torch.cat([ids, ids])).logits
    for index, name in enumerate(rows):
        alone = (plain if name is None else expected[name])[index % 3]
        torch.testing.assert_close(mixed[index], alone, **CLOSE)
    # afterwards each still computes alone
    torch.testing.assert_close(logits_of(library.use("german")), expected["german"], **CLOSE)


def test_the_byte_cap_is_honoured_and_the_least_recent_leaves(shelf):
    folder, expected = shelf
    free = ra.AdapterLibrary(folder, make_llama())
    sizes = {}
    for name in LAYOUTS:
        before = free.cached_bytes
        free.use(name)
        sizes[name] = free.cached_bytes - before
    assert sizes["short"] > sizes["german"] > 0
    cap = sizes["german"] + sizes["short"]
    library = ra.AdapterLibrary(folder, make_llama(), max_bytes=cap)
    order = ["german", "short", "german", "legal", "short", "german", "short"]
    for name in order:
        torch.testing.assert_close(logits_of(library.use(name)), expected[name], **CLOSE)
        assert 0 < library.cached_bytes <= cap
        held = sum(p.numel() * 4 for n, p in library.model.named_parameters() if "lora_" in n)
        assert held == library.cached_bytes
    assert library.cached == ["german", "short"]
    with pytest.raises(RankallocError, match="above max_bytes"):
        library.forward(["german", "short", "legal"], token_ids(rows=3))
    assert library.cached_bytes <= cap
    small = ra.AdapterLibrary(folder, make_llama(), max_bytes=sizes["german"] - 1)
    with pytest.raises(RankallocError, match="german takes .* bytes, above max_bytes"):
        small.use("german")
    assert small.cached == []
    with pytest.raises(ConfigError, match="max_bytes"):
        ra.AdapterLibrary(folder, max_bytes=0)


def test_a_replaced_file_is_seen(shelf, tmp_path):
    import shutil

    folder, expected = shelf
    shutil.copytree(folder / "german", tmp_path / "x")
    library = ra.AdapterLibrary(tmp_path, make_llama())
    torch.testing.assert_close(logits_of(library.use("x")), expected["german"], **CLOSE)
    shutil.rmtree(tmp_path / "x")
    shutil.copytree(folder / "short", tmp_path / "x")
    torch.testing.assert_close(logits_of(library.use("x")), expected["short"], **CLOSE)
    assert library.cached == ["x"]
    library.drop("x")
    assert library.cached == []


@pytest.mark.parametrize(
    "name",
    ["../outside", "german/../../outside", "/etc", "..", ".", "", "german/", "legal/v9", "link", "german@v1",
     "legal@v8", None],
)
def test_names_are_data(shelf, name, tmp_path):
    import shutil

    shutil.copytree(shelf[0], tmp_path / "lib")
    shutil.copytree(shelf[0] / "german", tmp_path / "outside")
    (tmp_path / "lib" / "link").symlink_to(tmp_path / "outside")
    library = ra.AdapterLibrary(tmp_path / "lib", make_llama())
    assert "link" not in {v.name for v in library.list()}
    with pytest.raises(AdapterFileError):
        library.use(name)
    assert library.cached == [] and library.model is library.close()


def test_adapters_that_do_not_belong_are_refused_and_the_model_is_as_it_was(shelf, tmp_path):
    import shutil

    folder, expected = shelf
    shutil.copytree(folder / "german", tmp_path / "good")
    adapters = ra.attach(make_bert(), rank=2)
    randomize(adapters)
    ra.save(adapters, tmp_path / "bert")
    other = make_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    adapters = ra.attach(other, rank=2)
    randomize(adapters)
    ra.save(adapters, tmp_path / "other")
    library = ra.AdapterLibrary(tmp_path, make_llama())
    for name, words in [("bert", "made for another model"), ("other", "another base model"), ("goood", "did you mean")]:
        with pytest.raises(AdapterFileError, match=words):
            library.use(name)
    torch.testing.assert_close(logits_of(library.use("good")), expected["german"], **CLOSE)
    with pytest.raises(AdapterFileError, match="another base model"):
        library.use("other")
    assert library.cached == ["good"]
    torch.testing.assert_close(logits_of(library.model), expected["german"], **CLOSE)
    ra.AdapterLibrary(tmp_path, make_llama(), check_base=False).use("other")
    (tmp_path / "other" / "adapter_model.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(AdapterFileError, match="damaged"):
        library.list()
    with pytest.raises(TargetError, match="attached already"):
        ra.AdapterLibrary(folder, adapters.model)
    with pytest.raises(AdapterFileError, match="no adapter library"):
        ra.AdapterLibrary(tmp_path / "nowhere")


@torch.no_grad()
def test_heads_swap_and_mix_with_their_adapters(tmp_path):
    expected = {}
    for seed, name in enumerate("ab"):
        model = make_bert()
        adapters = ra.attach(model, rank=2)
        randomize(adapters, seed=seed)
        ra.save(adapters, tmp_path / name)
        expected[name] = logits_of(model)
    for name, excluded in (("headless", ["classifier"]), ("clashing", [])):
        adapters = ra.attach(make_bert(), rank=2, modules_to_save=(), exclude_modules=excluded)
        randomize(adapters)
        ra.save(adapters, tmp_path / name)
    library = ra.AdapterLibrary(tmp_path, make_bert())
    for name in "aba":
        torch.testing.assert_close(logits_of(library.use(name)), expected[name], **CLOSE)
    mixed = library.forward(["b", "a", None], token_ids(rows=3)).logits
    torch.testing.assert_close(mixed[0], expected["b"][0], **CLOSE)
    torch.testing.assert_close(mixed[1], expected["a"][1], **CLOSE)
    torch.testing.assert_close(mixed[2], logits_of(make_bert())[2], **CLOSE)
    with pytest.raises(RankallocError, match="different heads .classifier"):
        library.forward(["a", "headless", "a"], token_ids(rows=3))
    with pytest.raises(RankallocError, match="classifier is trained whole in one and adapted in the other"):
        library.use("clashing")
    torch.testing.assert_close(logits_of(library.use("a")), expected["a"], **CLOSE)


def test_loading_draws_no_random_numbers(shelf):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ra.AdapterLibrary(shelf[0], make_llama_unseeded()).use("german")
    assert torch.equal(torch.rand(3), expected)


def make_llama_unseeded():
    with torch.random.fork_rng():
        return make_llama()


def test_without_peft_the_way_out_is_named(shelf, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RankallocError, match=r"rankalloc\[peft\]"):
        ra.AdapterLibrary(shelf[0], make_llama()).use("german")


def test_two_references_to_one_version_are_loaded_once(shelf):
    folder, expected = shelf
    library = ra.AdapterLibrary(folder, make_llama())
    mixed = library.forward(["legal", "legal@v10", None], token_ids(rows=3)).logits
    assert library.cached == ["legal@v10"]
    for row in range(2):
        torch.testing.assert_close(mixed[row], expected["legal"][row], **CLOSE)
