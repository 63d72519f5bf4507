"""vLLM on the CPU, in an environment of its own: ``--vllm PYTHON`` names that environment's interpreter.

This module writes adapters and what transformers makes of them; ``vllm_process.py`` runs in vLLM's environment and
needs nothing of rankalloc.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaForCausalLM

import rankalloc as ra
from studies.chat.task import unpacked

from .llama_cpp import NEW_TOKENS, PROMPTS, expected
from .samples import SOURCES, sample


def outcomes(folder: Path, python: str) -> dict[str, Any]:
    """Each source and layout: {name: the outcome}."""
    home = unpacked()
    tokenizer = AutoTokenizer.from_pretrained(home)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    asked: dict[str, Any] = {"model": str(home.resolve()), "prompts": prompts, "tokens": NEW_TOKENS, "adapters": {}}
    base = LlamaForCausalLM.from_pretrained(home)
    wanted: dict[str, list[list[int]]] = {"base": expected(base, prompts)["texts"]}
    for source in SOURCES:
        adapter = sample(source, base, folder / source)
        model = LlamaForCausalLM.from_pretrained(home)
        ra.load(model, adapter)
        texts = expected(model, prompts)["texts"]
        for layout in ("compact", "uniform", "one-alpha") if source == "trained" else ("compact",):
            name = f"{source}, {layout}"
            out = folder / name.replace(", ", "-")
            ra.export(adapter, out, layout=layout)
            asked["adapters"][name], wanted[name] = str(out), texts
    (folder / "asked.json").write_text(json.dumps(asked))
    subprocess.run(
        [python, str(Path(__file__).with_name("vllm_process.py")), str(folder / "asked.json"),
         str(folder / "answer.json")], check=True, timeout=1200,
    )
    answer = json.loads((folder / "answer.json").read_text())
    found: dict[str, Any] = {"version": f"vllm {answer.pop('version')}"}
    for name, texts in answer.items():
        if isinstance(texts, str):
            found[name] = {"refused": texts}
            continue
        pairs = [
            (a, b) for prompt, text, other in zip(prompts, wanted[name], texts, strict=True)
            for a, b in zip(text[len(prompt):], other, strict=False)
        ]
        found[name] = {"same": sum(a == b for a, b in pairs), "tokens": len(PROMPTS) * NEW_TOKENS}
    return found
