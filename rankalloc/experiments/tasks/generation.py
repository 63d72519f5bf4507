"""Metrics of what a model writes: it answers prompts greedily, and the answers are compared with references.

    exact_match    the share of answers that are the reference, blanks at the ends apart
    rouge_l        F1 of the longest common subsequence of words, mean (Lin 2004, "ROUGE", section 3.2, β = 1)
    module:name    the user's own function of (answers, references), two lists of texts: a number, or one each
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import ConfigError, DataError
from ...layers.batches import evaluating
from ...storage.quiet import quiet
from ..task_names import GENERATED_METRICS
from .base import progress_of

Score = Callable[[list[str], list[str]], Any]


@dataclass
class Generation:
    """Generates answers to a task's prompts, and scores them.

    Attributes:
        prompts: by split, each prompt's tokens and what should be answered.
        score: a number, or one for each answer.
        metric: the name of the score.
    """

    tokenizer: Any
    prompts: dict[str, list[tuple[list[int], str]]]
    score: Score
    metric: str
    max_new_tokens: int

    def __call__(self, model: torch.nn.Module, split: str, batch_size: int) -> dict[str, float]:
        """The metric on a split; "train" has none.

        Raises:
            DataError: the user's own function fails, or gives no number.
        """
        if split not in self.prompts:
            return {}
        answers = self.answers(model, split, batch_size)
        references = [reference for _, reference in self.prompts[split]]
        try:
            value = float(np.mean(np.asarray(self.score(answers, references), dtype=float)))
        except Exception as error:  # it is the user's
            raise DataError(
                f"the metric {self.metric} failed on the {split} split's {len(answers)} answers: "
                f"{type(error).__name__}: {error}"
            ) from error
        return {self.metric: value}

    def answers(self, model: torch.nn.Module, split: str, batch_size: int) -> list[str]:
        """What ``model`` answers to the prompts of a split, greedily, in their order."""
        prompts = [ids for ids, _ in self.prompts[split]]
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        found = [""] * len(prompts)
        writer: Any = getattr(model, "module", model)  # of a wrapper that spreads it over processes
        pad, device = self.tokenizer.pad_token_id, next(model.parameters()).device
        with evaluating(model), quiet(), torch.no_grad(), progress_of(f"{split} by generation", len(prompts)) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                longest = len(prompts[rows[0]])
                # On the left: what is written follows the prompt.
                ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in rows], device=device)
                mask = torch.tensor(
                    [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=device
                )
                written = writer.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=self.max_new_tokens, do_sample=False,
                    num_beams=1, pad_token_id=pad, eos_token_id=self.tokenizer.eos_token_id, use_cache=True,
                )  # fmt: skip
                new = written if writer.config.is_encoder_decoder else written[:, longest:]
                for i, text in zip(rows, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                    found[i] = text
                bar.update(len(rows))
        return found


def scorer(metric: str) -> Score | None:
    """The function behind a metric's name; None for one that needs no generation.

    Raises:
        ConfigError: the user's own cannot be imported.
    """
    if metric in GENERATED_METRICS:
        return {"exact_match": exact_match, "rouge_l": rouge_l}[metric]
    if ":" not in metric:
        return None
    module, _, name = metric.partition(":")
    here = str(Path().absolute())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # it is the user's
        raise ConfigError(f"task.metric {metric!r} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f"task.metric {metric!r} should be a function of two lists of texts, and is {found!r}")
    return found


def exact_match(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 for each answer that is its reference, blanks at the ends apart; else 0."""
    return [float(one.strip() == other.strip()) for one, other in zip(answers, references, strict=True)]


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """For each answer the F1 of its longest common subsequence of words with its reference; words are runs of letters
    and digits, without case."""
    return [_rouge_l(_words(one), _words(other)) for one, other in zip(answers, references, strict=True)]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _rouge_l(one: list[str], other: list[str]) -> float:
    common = [0] * (len(other) + 1)  # of the words of `one` so far with the first of `other`
    for word in one:
        before = 0
        for i, candidate in enumerate(other, start=1):
            before, common[i] = common[i], before + 1 if word == candidate else max(common[i], common[i - 1])
    return 2 * common[-1] / (len(one) + len(other)) if one and other else float(one == other)
