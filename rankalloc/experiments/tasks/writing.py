"""Prompts and answers to features: the tokens that a model reads, and those that it learns to write.

Tokens are TRL's: a text's end token is added to what is to be learnt; a completion begins where the tokens of the
prompt and those of both together part. A test compares them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...layers.batches import IGNORED
from ..file_task import FileTask
from .cells import Mistake
from .chat import ChatTemplate, PrefixBroken
from .conversations import Message

Ids = list[int]


class Writer:
    """Rows of one task to features.

    Attributes:
        cut: how many examples were cut since it was last set to 0.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: FileTask, max_length: int) -> None:
        self.tokenizer, self.task, self.max_length = tokenizer, task, max_length
        self.cut = 0
        self._template: ChatTemplate | None = None

    def choose_template(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """The chat template for these rows, and a note where it is not the tokenizer's own.

        Raises:
            ConfigError: there is none and a row has messages.
        """
        if not any(isinstance(value, list) for row in rows for value in row.values()):
            return []
        self._template = own = ChatTemplate(self.tokenizer)
        try:
            for row in rows:
                self._example(row)
        except PrefixBroken:
            version = own.training_version()
            if version is None:
                return []  # the row is told where it is made
            self._template = version
            return ["the chat template writes earlier turns anew: TRL's version of it for training is used"]
        except Mistake:
            pass
        return []

    def features(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """A row's features; None when nothing that is to be learnt is within the longest length. Raises Mistake."""
        if self.task.kind == "preference":
            return self._preference(row)
        if self.task.kind == "seq2seq":
            ids, labels = self._ids(row["prompt"]), list(self.tokenizer(text_target=row["completion"])["input_ids"])
            self.cut += max(len(ids), len(labels)) > self.max_length
            ids, labels = self._shortened(ids), self._shortened(labels)
        else:
            ids, labels = self._example(row)
            self.cut += len(ids) > self.max_length
            ids, labels = ids[: self.max_length], labels[: self.max_length]
            if all(label == IGNORED for label in labels[1:]):  # the first token is predicted from nothing
                self.cut -= len(ids) == self.max_length
                return None
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def prompt(self, row: dict[str, Any]) -> tuple[Ids, str]:
        """What a model is asked, as tokens, and what it should answer. Raises Mistake."""
        if "messages" in row:
            last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
            asked = self._chat.ids(row["messages"][:last], self._options(row), prompted=True)
            return asked[-self.max_length :], _said(row["messages"][last])
        if self.task.kind == "seq2seq":
            return self._shortened(self._ids(row["prompt"])), row["completion"]
        asked = self._asked(row)
        answer = row["completion"]
        return asked[-self.max_length :], answer if isinstance(answer, str) else _said(answer[-1])

    def _example(self, row: dict[str, Any]) -> tuple[Ids, Ids]:
        if self.task.kind == "preference":
            prompt, chosen, _ = self._answers(row)
            return [*prompt, *chosen], [*prompt, *chosen]
        loss_on = self.task.loss_on or "completion"
        if "messages" in row:
            return self._chat.learnt(row["messages"], self._options(row), loss_on)
        if isinstance(row["prompt"], list) and loss_on == "assistant":
            return self._chat.learnt([*row["prompt"], *row["completion"]], self._options(row), loss_on)
        whole = self._answered(row, "completion")
        begins = 0 if loss_on == "all" else len(os.path.commonprefix([self._asked(row), whole]))
        return whole, [IGNORED] * begins + whole[begins:]

    def _preference(self, row: dict[str, Any]) -> dict[str, Any] | None:
        prompt, *answers = self._answers(row)
        if len(prompt) >= self.max_length:
            return None
        self.cut += any(len(prompt) + len(answer) > self.max_length for answer in answers)
        chosen, rejected = ((prompt + answer)[: self.max_length] for answer in answers)
        masked = [IGNORED] * len(prompt)
        return {
            "input_ids": chosen, "attention_mask": [1] * len(chosen), "labels": masked + chosen[len(prompt) :],
            "rejected_input_ids": rejected, "rejected_labels": masked + rejected[len(prompt) :],
        }

    def _answers(self, row: dict[str, Any]) -> tuple[Ids, Ids, Ids]:
        """Tokens of the prompt, as far as both answers share it, and those of the answers."""
        asked, chosen, rejected = self._asked(row), self._answered(row, "chosen"), self._answered(row, "rejected")
        shared = min(len(os.path.commonprefix([asked, one])) for one in (chosen, rejected))
        if not chosen[shared:] or not rejected[shared:]:
            raise Mistake("'chosen' or 'rejected' has no tokens of its own after the prompt")
        return asked[:shared], chosen[shared:], rejected[shared:]

    def _asked(self, row: dict[str, Any]) -> Ids:
        prompt = row["prompt"]
        return self._ids(prompt) if isinstance(prompt, str) else self._chat.ids(prompt, self._options(row), True)

    def _answered(self, row: dict[str, Any], column: str) -> Ids:
        prompt, answer = row["prompt"], row[column]
        if not isinstance(prompt, str):
            return self._chat.ids([*prompt, *answer], self._options(row))
        end = self.tokenizer.eos_token or ""
        return self._ids(prompt + answer + ("" if answer.endswith(end) else end))

    def _ids(self, text: str) -> Ids:
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def _shortened(self, ids: Ids) -> Ids:
        """At most the longest length, the end token kept."""
        return ids if len(ids) <= self.max_length else [*ids[: self.max_length - 1], ids[-1]]

    @property
    def _chat(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer)
        return self._template

    def _options(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}


def _said(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
