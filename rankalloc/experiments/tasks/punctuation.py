"""Restoring punctuation and case, which speech transcripts lack, learnt from film reviews.

A word's class is its case and the mark that follows it; the model sees bare lower-cased words. Each review gives
one window, from its start, so windows are independent and no review is in two splits. The windows do not depend
on the run's seed.
"""

from __future__ import annotations

import functools
import random
import re

from transformers import DataCollatorForTokenClassification

from ...files import sha256_of
from ..config import RunConfig
from . import TASKS
from .base import PreparedTask
from .encode import cut_note, encode_words
from .metrics import exact_f1
from .models import builder, find_model
from .packages import reviews

MARKS = ("", ",", ".", "?", "!", ":", ";", "-")
CASES = ("lower", "Capitalised", "UPPER")
LABELS = [case + mark for mark in MARKS for case in CASES]
"""The 24 classes, such as "lower," or "Capitalised."; class 0 has neither a mark nor a capital."""

WINDOW_WORDS = 40
SIZES = {"train": 1800, "tune": 300, "report": 300}

_EMOTICON = re.compile(r"(?<!\w)[:;]['-]?[()DPp](?!\w)")
_JOINED = re.compile(r"(?<=\w)(-{2,}|\.{2,}|[—–…])(?=\w)|(?<=[a-z])([.,!?;:])(?=[A-Z])")
_TOKEN = re.compile(r"([\W_]*)(.*?)([\W_]*)", re.DOTALL)


def punctuated_words(text: str, first: int | None = None) -> list[tuple[str, int]]:
    """(bare lower-cased word, class) of each word in a text, or of the ``first`` words.

    Quotes, brackets and other signs are stripped. Of several marks the first counts ("?!" is "?",
    "..." is "."); a dash of any length is "-". A mark on its own belongs to the word before it.

    Example:
        >>> [(word, LABELS[label]) for word, label in punctuated_words('He said "WAIT!" - twice.')]
        [('he', 'Capitalised'), ('said', 'lower'), ('wait', 'UPPER!'), ('twice', 'lower.')]
    """
    text = _EMOTICON.sub(" ", re.sub(r"<br\s*/?>", " ", text))
    found: list[list] = []
    for token in _JOINED.sub(lambda joint: joint[0] + " ", text).split():
        parts = _TOKEN.fullmatch(token)
        assert parts is not None  # the pattern matches any text
        before, core, after = parts.groups()
        if found and not found[-1][1]:
            found[-1][1] = _mark(before)
        if core and len(found) == first:  # the last word has its mark by now
            break
        if core:
            found.append([core, _mark(after)])
    return [(core.lower(), MARKS.index(mark) * len(CASES) + _case(core)) for core, mark in found]


def _mark(signs: str) -> str:
    signs = signs.replace("—", "-").replace("–", "-").replace("…", ".")
    return next((sign for sign in signs if sign in MARKS), "")


def _case(core: str) -> int:
    letters = [c for c in core if c.isalpha()]
    if len(letters) > 1 and all(c.isupper() for c in letters):
        return 2
    return int(core[0].isupper())


@functools.lru_cache(maxsize=1)
def windows() -> dict[str, tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]]:
    """The splits as (words, classes) of 40 words each: 1,800 to train, 300 to tune, 300 to report."""
    texts = [text for text, _ in reviews("imdb")]
    random.Random(20240229).shuffle(texts)
    # Distinct by words: some reviews were posted twice, with other punctuation or a longer ending.
    distinct: dict[tuple[str, ...], tuple[int, ...]] = {}
    for text in texts:
        pairs = punctuated_words(text, WINDOW_WORDS)
        if len(pairs) == WINDOW_WORDS:
            words, classes = zip(*pairs, strict=True)
            distinct.setdefault(words, classes)
        if len(distinct) == sum(SIZES.values()):
            break
    found = list(distinct.items())
    splits, start = {}, 0
    for split, size in SIZES.items():
        splits[split] = tuple(found[start : start + size])
        start += size
    return splits


def prepare(config: RunConfig) -> PreparedTask:
    """The task for a model of the user's choice; see :func:`rankalloc.experiments.tasks.prepare`."""
    info = TASKS["punctuation"]
    found = find_model(config, info.kind, info.default_model)
    splits, notes, hashed = {}, [], []
    for split, rows in windows().items():
        rows = rows[: getattr(config.data, f"limit_{split}")]
        features, cut = encode_words(
            found.tokenizer, [list(words) for words, _ in rows], [list(classes) for _, classes in rows],
            config.data.max_length,
        )  # fmt: skip
        splits[split] = features
        notes += cut_note(split, cut, len(rows), config.data.max_length)
        hashed += [split, *(f"{' '.join(words)}\t{' '.join(map(str, classes))}" for words, classes in rows)]
    return PreparedTask(
        name=info.name, kind=info.kind, model_ref=found.reference, model_name=found.short_name,
        tokenizer=found.tokenizer, splits=splits, collator=DataCollatorForTokenClassification(found.tokenizer),
        build_model=builder(found, config, info.kind, LABELS), metric=info.metric, direction=info.direction,
        metrics_of=functools.partial(exact_f1, background=0), fingerprint=sha256_of(*hashed),
        labels=list(LABELS), notes=notes,
    )  # fmt: skip
