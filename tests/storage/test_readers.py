"""What is written for each reader, what it stores, and what the table says of folders that are there."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import rankalloc as ra
from rankalloc.errors import AdapterFileError, ConfigError, RankallocError
from rankalloc.storage.exporting import write_export
from rankalloc.storage.layout import LAYOUTS, Layout
from rankalloc.storage.left_out import left_out_in
from rankalloc.storage.reader_facts import verdicts
from rankalloc.storage.readers import READERS, VLLM_RANKS, layout_for
from rankalloc.storage.saving import most_stored, stored_of
from rankalloc.storage.tensors import read_header
from tests.layers.test_experts import make_mixtral
from tests.support.models import logits_of, make_bert, make_llama, prune, randomize

WIDTH = 8
KINDS = {
    "linear": lambda: nn.Linear(WIDTH, 6), "wide": lambda: nn.Linear(WIDTH, 20),
    "embedding": lambda: nn.Embedding(9, 5),
    "convolution": lambda: nn.Conv2d(WIDTH, 6, 3), "pointwise": lambda: nn.Conv1d(WIDTH, 6, 1),
    "grouped": lambda: nn.Conv2d(WIDTH, 6, 3, groups=2),
}
SPECIAL = {"embedding": "embeddings", "grouped": "groups"}
FOLDERS = [name for name, reader in READERS.items() if reader.layouts]


@st.composite
def cases(draw):
    """Layers of every kind with ranks of 0 to 5, and how they are to be laid out."""
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5))
    ranks = draw(st.lists(st.integers(0, 5), min_size=len(kinds), max_size=len(kinds)))
    how = draw(st.one_of(
        st.sampled_from([{"reader": name} for name in FOLDERS] + [{"layout": name} for name in LAYOUTS]),
        st.integers(2, 9).map(lambda multiple: {"pad_multiple": multiple}),
    ))
    return kinds, ranks, how


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_a_file_holds_as_many_numbers_as_is_said(case, tmp_path):
    kinds, ranks, how = case
    model = nn.ModuleDict({f"{kind}{i}": KINDS[kind]() for i, kind in enumerate(kinds)})
    adapters = ra.attach(model, rank=5, target_modules=list(model), modules_to_save=[])
    randomize(adapters)
    before = ra.RankBudget(params=adapters.num_params()).resolve(adapters.shapes())
    layout = layout_for(how.get("layout"), how.get("pad_multiple", 1), how.get("reader"))
    most = most_stored(adapters, before, layout)
    prune(adapters, [min(rank, adapter.rank) for rank, adapter in zip(ranks, adapters, strict=True)])
    said = stored_of(adapters, layout)
    refused = READERS[how["reader"]].refuses if "reader" in how else ()
    if any(SPECIAL.get(kind) in refused for kind in kinds):
        with pytest.raises(ConfigError, match="cannot take"):
            ra.save(adapters, tmp_path / "never", **how)
        how = {"layout": layout.name, "pad_multiple": 1}
        layout = Layout(layout.name)
        said = stored_of(adapters, layout)
    path = ra.save(adapters, tmp_path / "a", **how)
    shapes = read_header(path / "adapter_model.safetensors").shapes
    assert said.numbers == sum(math.prod(shape) for shape in shapes.values()) <= most
    assert said.padding == said.numbers - adapters.num_params() and said.bytes == 4 * said.numbers
    config = json.loads((path / "adapter_config.json").read_text())
    assert said.rank == config["r"] == config["lora_alpha"]
    compact = layout.name != "uniform" and any(ranks) and "grouped" not in "".join(kinds)
    assert not compact or said.padding == 0
    assert how.get("reader") != "tgi" or config["r"] in (8, 16)


def test_a_stack_of_experts_is_counted_as_it_is_padded(tmp_path):
    model = make_mixtral()
    adapters = ra.attach(model, rank=4)
    randomize(adapters)
    prune(adapters, [i % 4 for i in range(len(adapters))])
    said = stored_of(adapters, Layout())
    path = ra.save(adapters, tmp_path / "a")
    shapes = read_header(path / "adapter_model.safetensors").shapes
    assert said.numbers == sum(math.prod(s) for key, s in shapes.items() if "lora_" in key)
    assert said.padding == said.numbers - adapters.num_params() > 0


def saved(folder, **how):
    adapters = ra.attach(make_llama(), rank=4, alpha=6)
    randomize(adapters)
    prune(adapters, [(3, 0, 1, 4, 2)[i % 5] for i in range(len(adapters))])
    return adapters, ra.save(adapters, folder, **how)


@pytest.mark.parametrize("reader", FOLDERS)
def test_what_is_written_for_a_reader_is_right_in_it(reader, tmp_path):
    adapters, path = saved(tmp_path / "a", reader=reader)
    said = {one.reader: one for one in verdicts(ra.FinishedAdapter(path))}
    assert said[reader].right and said["peft"].right
    again = make_llama()
    ra.load(again, path)
    torch.testing.assert_close(logits_of(again), logits_of(adapters.model), rtol=1e-5, atol=1e-5)
    for name, one in said.items():
        if not one.right and READERS[name].layouts:  # what mends it does
            mended = ra.export(path, tmp_path / name, reader=name)
            assert {v.reader: v for v in verdicts(ra.FinishedAdapter(mended))}[name].right
    flags = said["vllm"].flags if said["vllm"].right else "--enable-lora --max-lora-rank 8"
    assert flags == "--enable-lora --max-lora-rank 8"


def test_readers_that_cannot_take_something_say_what():
    flags = [READERS["vllm"].flags(rank) for rank in (1, 2, 17, 321, 512, 513)]
    assert flags[:2] == ["--enable-lora --max-lora-rank 1", "--enable-lora --max-lora-rank 8"]
    assert flags[2:] == [*(f"--enable-lora --max-lora-rank {rank}" for rank in (32, 512, 512)), ""]
    assert sorted(VLLM_RANKS) == list(VLLM_RANKS)
    for name in ("kohya", "diffusers"):
        with pytest.raises(ConfigError, match=f"--for {name}"):
            layout_for(None, reader=name)
    assert [Layout("uniform", (8, 16)).stored_rank([top]) for top in (1, 8, 9, 17, 40)] == [8, 8, 16, 32, 48]


def test_what_a_reader_cannot_take_is_not_written_for_it(tmp_path):
    adapters = ra.attach(make_bert(), rank=2)
    path = ra.save(adapters, tmp_path / "a")
    for reader, attempt in (
        ("vllm", lambda: ra.save(adapters, tmp_path / "b", reader="vllm")),
        ("tgi", lambda: ra.export(path, tmp_path / "b", reader="tgi")),
        ("kohya", lambda: ra.export(path, tmp_path / "b.safetensors", reader="kohya")),
    ):
        with pytest.raises(RankallocError, match="modules that were trained whole"):
            attempt()
        assert not next(one for one in verdicts(ra.FinishedAdapter(path)) if one.reader == reader).right
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    grouped = ra.attach(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), rank=1, target_modules=["0"], modules_to_save=[])
    with pytest.raises(RankallocError, match="adapters of grouped convolutions"):
        ra.save(grouped, tmp_path / "c", reader="vllm")
    assert ra.save(grouped, tmp_path / "c", reader="peft")


def module_names(path):
    return {key.removeprefix("base_model.model.").split(".lora_")[0] for key in read_header(weights(path)).shapes}


def weights(path):
    return path / "adapter_model.safetensors"


@pytest.mark.parametrize("way", ["saved", "shrunk", "exported twice", "imported"])
def test_layers_without_ranks_are_there_again_where_a_reader_wants_them(way, tmp_path):
    """TGI adapts a kind of layer in all blocks or in none, and the compact layout leaves out what has no ranks."""
    adapters, path = saved(tmp_path / "a")
    if way == "shrunk":
        ra.shrink(path, ra.RankBudget(ranks=9), tmp_path / "b")
    elif way == "exported twice":
        ra.export(ra.export(path, tmp_path / "x", layout="one-alpha"), tmp_path / "b")
    elif way == "imported":
        ra.import_lora(ra.export(path, tmp_path / "k.safetensors", reader="kohya"), make_llama(), tmp_path / "b")
    else:
        path.rename(tmp_path / "b")
    assert len(module_names(tmp_path / "b")) < len(adapters)
    assert not {one.reader: one for one in verdicts(ra.FinishedAdapter(tmp_path / "b"))}["tgi"].right
    out = ra.export(tmp_path / "b", tmp_path / "tgi", reader="tgi")
    assert module_names(out) == set(adapters.modules)
    assert {one.reader: one for one in verdicts(ra.FinishedAdapter(out))}["tgi"].right
    small = ra.shrink(tmp_path / "b", ra.RankBudget(ranks=8), tmp_path / "tgi2", reader="tgi")
    assert module_names(tmp_path / "tgi2") == set(adapters.modules)
    stored = sum(math.prod(shape) for shape in read_header(weights(tmp_path / "tgi2")).shapes.values())
    assert small.stored_params == stored == 8 * sum(shape.params_per_rank for shape in adapters.shapes())
    again = [make_llama(), make_llama()]
    for model, folder in zip(again, (tmp_path / "b", out), strict=True):
        ra.load(model, folder)
    torch.testing.assert_close(logits_of(again[0]), logits_of(again[1]), rtol=1e-5, atol=1e-5)


def test_a_file_with_gaps_that_nobody_can_fill_is_not_for_tgi(tmp_path):
    model = make_llama()
    names = [n for n, m in model.named_modules() if "_proj" in n and "1.mlp" not in n]
    adapters = ra.attach(model, rank=2, target_modules=names)
    randomize(adapters)
    with pytest.raises(ConfigError, match=r"or in none, and model.layers.1.mlp.\w+ is not adapted .3 such"):
        ra.save(adapters, tmp_path / "a", reader="tgi")
    assert not (tmp_path / "a").exists()
    path = ra.save(adapters, tmp_path / "a", "uniform", pad_multiple=8)
    found = {one.reader: one for one in verdicts(ra.FinishedAdapter(path))}["tgi"]
    assert not found.right and "has no model.layers.1.mlp" in found.why and "and 2 more" in found.why
    assert not found.mend  # which would be refused
    with pytest.raises(ConfigError, match="3 such layers"):
        ra.export(path, tmp_path / "b", reader="tgi")


@pytest.mark.parametrize("text", ["", "[1]", '{"a": [3]}', '{"a": [3, 0]}', '{"a": [3, 1e9]}', '{"a": [3, 9999999]}'])
def test_a_damaged_list_of_layers_without_ranks_is_refused(text, tmp_path):
    _, path = saved(tmp_path / "a")
    tensors = load_file(weights(path))
    header = read_header(weights(path)).metadata
    assert left_out_in(header).keys() and "rankalloc_left_out" in header
    save_file(tensors, weights(path), {**header, "rankalloc_left_out": text})
    with pytest.raises(AdapterFileError, match="rankalloc_left_out does not hold"):
        ra.export(path, tmp_path / "b", layout="uniform")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("kind", "words"), [
    ("embedding", "embeddings, such as embedding0"), ("grouped", "grouped convolutions, such as grouped0"),
    ("linear", "trained whole, such as head"),
])  # fmt: skip
@pytest.mark.parametrize("reader", ["vllm", "llama.cpp", "tgi"])
def test_nothing_is_written_for_a_reader_that_cannot_take_it(reader, kind, words, tmp_path):
    model = nn.ModuleDict({f"{kind}0": KINDS[kind](), "head": nn.Linear(3, 3)})
    adapters = ra.attach(
        model, rank=2, target_modules=[f"{kind}0"], modules_to_save=["head"] if kind == "linear" else []
    )
    randomize(adapters)
    what = SPECIAL.get(kind, "heads")
    path = ra.save(adapters, tmp_path / "a")
    if what not in READERS[reader].refuses:
        ra.save(adapters, tmp_path / "b", reader=reader)
        return
    for write in (lambda out: ra.save(adapters, out, reader=reader), lambda out: ra.export(path, out, reader=reader)):
        with pytest.raises(ConfigError, match=words) as caught:
            write(tmp_path / "b")
        assert READERS[reader].title in str(caught.value) and not (tmp_path / "b").exists()


gguf = pytest.importorskip("gguf")


def numbers_in(path):
    """The numbers in the pairs of factors of a folder or file, and the bytes of those."""
    if path.suffix == ".gguf":
        tensors = [torch.tensor(tensor.data) for tensor in gguf.GGUFReader(path).tensors]
    else:
        held = load_file(weights(path) if path.is_dir() else path)
        tensors = [t for key, t in held.items() if not key.endswith("alpha")]
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("source", LAYOUTS)
def test_what_an_export_says_is_in_the_file(source, tmp_path):
    """For every reader and layout, of mixed ranks with zeros among them."""
    adapters, path = saved(tmp_path / "a", layout=source)
    adapters.model.config.save_pretrained(tmp_path / "base")
    folders = [{"reader": name} for name in READERS] + [{"layout": name} for name in LAYOUTS]
    files = [{"format": "kohya", "pad_to": 8}, {"format": "diffusers", "pad_to": 6}, {"format": "gguf"}]
    nothing = dict.fromkeys(("reader", "layout", "format", "prefix", "base"))
    for number, how in enumerate([*folders, {"layout": "uniform", "pad_to": 6}, *files]):
        name = how.get("reader") or how.get("format")
        suffix = {"llama.cpp": ".gguf", "gguf": ".gguf", "kohya": ".safetensors", "diffusers": ".safetensors"}
        out = tmp_path / f"{number}{suffix.get(name, '')}"
        base = tmp_path / "base" if out.suffix == ".gguf" else None
        done = write_export(path, out, **{**nothing, "pad_to": 1, **how, "base": base})
        numbers, size = numbers_in(out)
        assert done.stored == numbers and done.params == adapters.num_params(), how
        assert done.padding_bytes == size - 4 * adapters.num_params(), how
        pads = how.get("pad_to", 1) > 1 or how.get("reader") == "tgi" or how.get("layout") == "uniform"
        assert pads == (done.padding_bytes > 0), how


def test_a_gguf_holds_what_llama_cpp_undoes(tmp_path):
    """Each pair times alpha over its own rank is the update, with q and k in the order of llama.cpp's converter."""
    adapters, path = saved(tmp_path / "a")
    config = adapters.model.config
    config.save_pretrained(tmp_path / "base")
    out = ra.export(path, tmp_path / "a.gguf", reader="llama.cpp", base=tmp_path / "base")
    read = gguf.GGUFReader(out)
    kept = {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0,
    }
    assert {key: read.fields[key].contents() for key in kept} == kept
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in read.tensors}
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
        "up_proj": "ffn_up", "down_proj": "ffn_down",
    }
    seen = 0
    for name, adapter in adapters.modules.items():
        _, _, block, _, role = name.split(".")
        stem = f"blk.{block}.{names[role]}.weight"
        if not adapter.rank:
            assert f"{stem}.lora_a" not in tensors
            continue
        a, b = tensors.pop(f"{stem}.lora_a"), tensors.pop(f"{stem}.lora_b")
        assert a.shape == (adapter.rank, adapter.d_in)
        found = b @ a * (4.0 / adapter.rank)
        wanted = adapter.delta_weight().detach()
        if role in ("q_proj", "k_proj"):
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}[role]
            rows = torch.arange(len(wanted)).view(heads, 2, -1)  # of each head its two halves, one after the other ...
            wanted = wanted[rows.transpose(1, 2).flatten()]  # ... which the converter puts side by side
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        seen += 1
    assert seen == 11 and not tensors


@pytest.mark.parametrize(("spoil", "words"), [
    ({"model_type": "bert"}, "unknown model type for format 'gguf'"), (None, "cannot be read"),
    ({"num_attention_heads": 7, "num_key_value_heads": 7}, "is of another model"),
    ({"num_hidden_layers": 1}, "has no layer model.layers.1"),
])  # fmt: skip
def test_what_a_gguf_cannot_hold_is_one_sentence(spoil, words, tmp_path):
    adapters, path = saved(tmp_path / "a")
    base = tmp_path / "config.json"
    if spoil is not None:
        base.write_text(json.dumps({**adapters.model.config.to_dict(), **spoil}))
    with pytest.raises(RankallocError, match=words) as caught:
        ra.export(path, tmp_path / "a.gguf", format="gguf", base=base)
    assert "\n" not in str(caught.value) and not (tmp_path / "a.gguf").exists()
    with pytest.raises(ConfigError, match="end in .gguf"):
        ra.export(path, tmp_path / "folder", format="gguf", base=base)


def test_diffusers_own_form_says_its_ranks_in_the_header(tmp_path):
    adapters, path = saved(tmp_path / "a")
    out = ra.export(path, tmp_path / "d.safetensors", reader="diffusers", prefix="transformer")
    header = read_header(out)
    config = json.loads(header.metadata["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 4
    assert config["transformer.rank_pattern"] == config["transformer.alpha_pattern"]
    assert not any(key.endswith("alpha") for key in header.shapes)
    with torch.device("meta"):
        skeleton = type(adapters.model)(adapters.model.config)
    ra.import_lora(out, skeleton, tmp_path / "back")
    again = make_llama()
    ra.load(again, tmp_path / "back")
    torch.testing.assert_close(logits_of(again), logits_of(adapters.model), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="unknown prefix"):
        ra.export(path, out, reader="diffusers", prefix="lora_te")
