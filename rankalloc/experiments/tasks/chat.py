"""Conversations to tokens, and which of the tokens are learnt.

The tokens are those of the tokenizer's own chat template. What the assistant says is told from the rest

1. by the template's ``{% generation %}`` marks, where it has them;
2. else by prefixes: the text of the turns up to one is the beginning of the whole text, so that the turn's own part is
   what follows, from behind the generation prompt to the turn's end (its end token included);
3. else, for a template that writes earlier turns anew when others follow, by TRL's training version of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ...errors import ConfigError
from ...layers.batches import IGNORED
from .cells import Mistake, shown
from .conversations import Message

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
LossOn = Literal["assistant", "completion", "all"]


class PrefixBroken(Mistake):
    """The template writes earlier turns differently when others follow."""


@dataclass
class ChatTemplate:
    """A tokenizer's chat template at work.

    Attributes:
        tokenizer: has a chat template.
        template: the template's text, where it is not the tokenizer's own.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str = field(default="")

    def __post_init__(self) -> None:
        if not self.template:
            try:
                self.template = self.tokenizer.get_chat_template()
            except ValueError:
                raise ConfigError(
                    f"the tokenizer of {self.tokenizer.name_or_path!r} has no chat template; use the instruction-tuned "
                    "model of that name, or give one as model.chat_template, or use kind: prompt-completion with texts"
                ) from None
        self._check()

    def _check(self) -> None:
        """Raise ConfigError when the template is no Jinja template."""
        try:
            render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=self.template)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template of {self.tokenizer.name_or_path!r} is no Jinja template: {error.message} (its line "
                f"{error.lineno}); mend it, or give one as model.chat_template"
            ) from None
        except Exception:  # whatever it says of this conversation, and of the ones in the data
            return

    @property
    def marked(self) -> bool:
        """Whether the template itself marks what the assistant says."""
        return _MARKS.search(self.template) is not None

    def training_version(self) -> ChatTemplate | None:
        """TRL's version of this template that marks what the assistant says; None where TRL is missing or has none."""
        if importlib.util.find_spec("trl") is None:
            return None
        from trl.chat_template_utils import get_training_chat_template

        try:
            found = get_training_chat_template(self.tokenizer)
        except (ValueError, jinja2.TemplateError):
            return None
        return ChatTemplate(self.tokenizer, found) if found else None

    def text(self, messages: Sequence[Message], options: dict[str, Any], prompted: bool = False) -> str:
        """The text of messages, with the beginning of the assistant's next turn where ``prompted``.

        Raises:
            Mistake: the template refuses them.
        """
        return str(self._applied(messages, options, tokenize=False, add_generation_prompt=prompted))

    def ids(self, messages: Sequence[Message], options: dict[str, Any], prompted: bool = False) -> list[int]:
        """The tokens of messages. Raises Mistake as :meth:`text`."""
        return list(self._applied(messages, options, add_generation_prompt=prompted, return_dict=True)["input_ids"])

    def learnt(
        self, messages: Sequence[Message], options: dict[str, Any], loss_on: LossOn
    ) -> tuple[list[int], list[int]]:
        """The tokens of a conversation, and its labels: -100 for what is not learnt.

        Args:
            loss_on: "assistant" for all that the assistant says (in a turn at least), "completion" for its last turn,
                or "all".

        Raises:
            Mistake: the template refuses the conversation, or marks nothing in it.
            PrefixBroken: the turns cannot be found in the text.
        """
        if loss_on == "all":
            ids = self.ids(messages, options)
            return ids, list(ids)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if loss_on == "completion":
            turns = turns[-1:]
        whole = self.text(messages, options)
        if self.marked:
            spans = self._marks(messages, options)
            if loss_on == "completion":
                before = self.text(messages[: turns[0]], options) if turns[0] else ""
                spans = [span for span in spans if span[0] >= len(before)] if whole.startswith(before) else spans[-1:]
        else:
            spans = [(self._start(messages, i, options, whole), self._end(messages, i, options, whole)) for i in turns]
        said = messages[turns[-1]]["content"]
        words = re.findall(r"[A-Za-z0-9]+", said) if isinstance(said, str) else []
        if words and words[-1] not in whole:  # a template of images and texts looks for parts
            raise Mistake(
                f"the chat template leaves out what the assistant says, {shown(said)}; if it is one for images and "
                'texts, write content as [{"type": "text", "text": ...}]'
            )
        ids, mask = self._tokens(whole, spans)
        if not any(mask):
            raise Mistake("the chat template marks nothing that the assistant says; mend model.chat_template")
        return ids, [token if one else IGNORED for token, one in zip(ids, mask, strict=True)]

    def _marks(self, messages: Sequence[Message], options: dict[str, Any]) -> list[tuple[int, int]]:
        """Where the marked parts of the text are. The mask of ``apply_chat_template`` is not taken: a part that ends
        in a blank which no token covers is marked up to the text's end there."""
        variables = {**self.tokenizer.special_tokens_map, **options}
        with self._refusals():
            rendered: Any = render_jinja_template(
                [list(messages)], chat_template=self.template, return_assistant_tokens_mask=True, **variables
            )
        return [(start, end) for start, end in rendered[1][0]]

    def _tokens(self, whole: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """The text's tokens, and whether each has a part in one of the spans."""
        if not self.tokenizer.is_fast:
            return self._by_tokens(whole, spans)
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        mask = [int(any(first < b and last > a for a, b in spans)) for first, last in found["offset_mapping"]]
        return list(found["input_ids"]), mask

    def _by_tokens(self, whole: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """The same for a tokenizer that does not tell where its tokens are: by the tokens of the text up to a place."""

        def tokens(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        ids = tokens(whole)
        places = [tuple(len(os.path.commonprefix([ids, tokens(whole[:at])])) for at in span) for span in spans]
        return ids, [int(any(a <= i < b for a, b in places)) for i in range(len(ids))]

    def _start(self, messages: Sequence[Message], turn: int, options: dict[str, Any], whole: str) -> int:
        """Where a turn's own text begins, behind the generation prompt as far as the whole text has it."""
        before = self.text(messages[:turn], options) if turn else ""
        if not whole.startswith(before):
            raise self._broken(turn)
        prompted = self.text(messages[:turn], options, prompted=True) if turn else ""
        shared = len(os.path.commonprefix([prompted, whole]))
        return max(shared, len(before))

    def _end(self, messages: Sequence[Message], turn: int, options: dict[str, Any], whole: str) -> int:
        text = whole if turn == len(messages) - 1 else self.text(messages[: turn + 1], options)
        if not whole.startswith(text):
            raise self._broken(turn + 1)
        return len(text)

    def _broken(self, turns: int) -> PrefixBroken:
        return PrefixBroken(
            f"the chat template writes the first {turns} turns differently when others follow, so what the assistant "
            "says cannot be found; give a template with {% generation %} marks as model.chat_template"
            + ("" if importlib.util.find_spec("trl") else ", install trl, which has such versions of many,")
            + " or set task.loss_on=all"
        )

    def _applied(self, messages: Sequence[Message], options: dict[str, Any], **settings: Any) -> Any:
        with self._refusals():
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, **{**settings, **options}
            )

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What a template raises as a Mistake."""
        try:
            yield
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            why = " ".join(str(error).split())
            raise Mistake(f"the chat template refuses this conversation: {why}") from error
