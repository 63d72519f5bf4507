"""Two domains of one task that contradict each other: punctuation and case of two kinds of film reviews.

Both are restored from bare lower-cased words, with the 24 classes of the punctuation task. "audience" is the start of
a user's review, written as usual; "critics" is a critic's sentence from a collection without a single capital. So the
right class of a word depends on the domain, which only the other words tell.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace

from rankalloc.experiments.tasks.base import PreparedTask
from rankalloc.experiments.tasks.encode import encode_words
from rankalloc.experiments.tasks.packages import reviews
from rankalloc.experiments.tasks.punctuation import punctuated_words

from ..common.training import SHORT_PUNCTUATION, short_punctuation

SOURCES = {"audience": "imdb", "critics": "rotten_tomatoes"}
DOMAINS = tuple(SOURCES)
WINDOW_WORDS = 20
SIZES = {"train": 1200, "tune": 150, "report": 300}


@functools.cache
def domain(name: str) -> PreparedTask:
    """The punctuation task with windows of 20 words from one domain; no text is in two splits."""
    task = short_punctuation()
    texts = [text for text, _ in reviews(SOURCES[name])]
    random.Random(20240229).shuffle(texts)
    distinct: dict[tuple[str, ...], list[int]] = {}
    for text in texts:
        words, classes = zip(*(punctuated_words(text, WINDOW_WORDS) or [("", 0)]), strict=True)
        if len(words) == WINDOW_WORDS:
            distinct.setdefault(words, list(classes))
        if len(distinct) == sum(SIZES.values()):
            break
    rows, splits, start = list(distinct.items()), {}, 0
    for split, size in SIZES.items():
        part = rows[start : start + size]
        splits[split], _ = encode_words(
            task.tokenizer, [list(words) for words, _ in part], [classes for _, classes in part],
            SHORT_PUNCTUATION["max_length"],
        )  # fmt: skip
        start += size
    return replace(task, name=name, splits=splits)


@functools.cache
def both() -> PreparedTask:
    """The two domains in one, turn by turn."""
    parts = [domain(name) for name in DOMAINS]
    splits = {
        split: [row for pair in zip(*(part.splits[split] for part in parts), strict=True) for row in pair]
        for split in SIZES
    }  # fmt: skip
    return replace(parts[0], name="both", splits=splits)
