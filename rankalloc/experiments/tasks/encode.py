"""Texts, words and documents to features: plain lists of numbers, unpadded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from ...layers.batches import IGNORED
from .base import Features

Row = TypeVar("Row")


def limited(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """At most ``limit`` rows, drawn with a fixed seed (a file may be sorted by label), in their original order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), limit))]


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None, labels: list[Any], max_length: int
) -> tuple[Features, int]:
    """Features of texts with one label each, and how many were cut at ``max_length`` tokens."""
    full = tokenizer(texts, pairs, verbose=False)["input_ids"]
    cut = sum(len(ids) > max_length for ids in full)
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    return _features(encoded, labels), cut


def encode_words(
    tokenizer: PreTrainedTokenizerBase, words: list[list[str]], labels: list[list[int]], max_length: int
) -> tuple[Features, int]:
    """Features of word lists with one label per word, and how many were cut at ``max_length`` tokens. A word's first
    token has its label; its other tokens and special tokens have -100."""
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    placed, cut = [], 0
    for i, row in enumerate(labels):
        seen, of_tokens = -1, []
        for word in encoded.word_ids(i):
            of_tokens.append(row[word] if word is not None and word != seen else IGNORED)
            seen = seen if word is None else word
        placed.append(of_tokens)
        cut += seen < len(row) - 1
    return _features(encoded, placed), cut


def encode_blocks(tokenizer: PreTrainedTokenizerBase, documents: list[str], max_length: int) -> Features:
    """Documents joined with the end token and cut into blocks of ``max_length`` tokens. A last block of one token is
    left out: there is nothing to predict in it. Labels are the tokens themselves."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    stream: list[int] = []
    for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        stream += ids if end is None else [*ids, end]
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    return [
        {"input_ids": block, "attention_mask": [1] * len(block), "labels": list(block)}
        for block in blocks
        if len(block) > 1
    ]


def cut_note(split: str, cut: int, total: int, max_length: int) -> list[str]:
    """The sentence for examples cut at ``max_length``, if there are any."""
    return [f"{cut} of {total} {split} examples were cut at data.max_length {max_length} tokens"] if cut else []


def _features(encoded: Any, labels: list[Any]) -> Features:
    keys = [key for key in ("input_ids", "token_type_ids", "attention_mask") if key in encoded]
    return [{**{key: encoded[key][i] for key in keys}, "labels": label} for i, label in enumerate(labels)]
