"""Data of conversations in TRL's columns, and what others call the same, brought into TRL's columns.

    messages                            [{role, content}, ...]
    prompt, completion                  both texts, or both lists of messages
    prompt, chosen, rejected            the same; the prompt may stand at the beginning of both answers instead
    conversations                       ShareGPT: [{from, value}, ...], or messages by another name
    instruction, (input,) output        Alpaca

Every function raises a ``Mistake``, which the caller completes with the place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .cells import Mistake, listed, shown

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

_SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool", "function_response": "tool", **{role: role for role in ROLES},
}  # fmt: skip
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})

_CONVERTED = {
    "conversations": "the column 'conversations' was read as 'messages' (human is the user, gpt the assistant)",
    "instruction": "the columns 'instruction', 'input' and 'output' were read as {to} (instruction, empty line, input)",
    "prompt": "the columns 'prompt' and 'completion' were read as a user's turn and an assistant's",
}


def form_of(kind: str, columns: Iterable[str], text: str | None, label: str | None) -> tuple[str, list[str]]:
    """Which of the forms above a set has, by its first column's name, and a note where it is converted.

    Args:
        kind: "chat", "prompt-completion" or "preference".
        columns: those of the set.
        text, label: the columns that the user named, or the kind's own.

    Raises:
        Mistake: the columns are those of another kind, or of none.
    """
    have = set(columns)
    paired, preferred = {text or "prompt", label or "completion"} <= have, {"chosen", "rejected"} <= have
    if kind == "preference":
        if preferred:
            return "chosen", []
        raise Mistake(f"preference needs the columns 'chosen' and 'rejected' (and 'prompt'), and {_has(columns)}")
    if preferred and not paired and not (kind == "chat" and text in have):
        raise Mistake(f"{kind} data has one answer, and this has 'chosen' and 'rejected'; use kind: preference")
    forms: tuple[tuple[str, set[str]], ...]
    if kind == "chat":
        forms = (("messages", {text or "messages"}), ("conversations", {"conversations"}),
                 ("prompt", {"prompt", "completion"}), ("instruction", {"instruction", "output"}))  # fmt: skip
    else:
        if not paired and have & {"messages", "conversations"}:
            raise Mistake("prompt-completion data has 'prompt' and 'completion', and this has messages; use kind: chat")
        forms = (("prompt", {text or "prompt", label or "completion"}), ("instruction", {"instruction", "output"}))
    for form, needed in forms:
        if needed <= have:
            to = "a user's turn and an assistant's" if kind == "chat" else "'prompt' and 'completion'"
            own = form == "messages" or (form == "prompt" and kind == "prompt-completion")
            return form, [] if own else [_CONVERTED[form].format(to=to)]
    other = "; for plain texts use kind: causal-lm" if "text" in have else ""
    raise Mistake(f"{kind} needs {' or '.join(_named(needed) for _, needed in forms)}, and {_has(columns)}{other}")


def conversation(form: str, values: dict[str, Any], text: str | None) -> list[Message]:
    """A row of one of the forms as one conversation. Raises Mistake."""
    if form in ("messages", "conversations"):
        return messages_in(values, text or "messages" if form == "messages" else form)
    if form == "instruction":
        return [{"role": "user", "content": _instructed(values)}, _answer(values, "output")]
    if isinstance(values["prompt"], str) and isinstance(values["completion"], str):
        return [{"role": "user", "content": _text(values, "prompt")}, _answer(values, "completion")]
    return [*messages_in(values, "prompt"), *messages_in(values, "completion")]


def pair(
    form: str, values: dict[str, Any], text: str | None, label: str | None
) -> tuple[str | list[Message], str | list[Message]]:
    """A row of one of the forms as prompt and completion, both texts or both messages. Raises Mistake."""
    if form == "instruction":
        return f"{_instructed(values)}\n\n", _text(values, "output")
    return _alike(values, text or "prompt", label or "completion")


def preference(values: dict[str, Any]) -> dict[str, str | list[Message]]:
    """A row's ``prompt``, ``chosen`` and ``rejected``, as TRL takes them. Raises Mistake."""
    chosen, rejected = _alike(values, "chosen", "rejected")
    if chosen == rejected:
        raise Mistake(f"'chosen' and 'rejected' are the same, {shown(chosen)}")
    prompt = values.get("prompt")
    if prompt is not None:
        prompt = _one(values, "prompt")
        if isinstance(prompt, str) == isinstance(chosen, str):
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if isinstance(chosen, str):
            raise Mistake("'prompt' is a list of messages and 'chosen' is text; give both alike")
        # A text beside whole conversations repeats what they begin with.
    at = 0
    while at < min(len(chosen), len(rejected)) and chosen[at] == rejected[at]:
        at += 1
    if isinstance(chosen, str) and at and chosen[at - 1] == " ":
        at -= 1
    if not at:
        raise Mistake("there is no 'prompt', and 'chosen' and 'rejected' begin differently")
    if at == len(chosen) or at == len(rejected):
        raise Mistake("there is no 'prompt', and one of 'chosen' and 'rejected' is the beginning of the other")
    return {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}


def messages_in(values: dict[str, Any], column: str) -> list[Message]:
    """The messages in a column: a list of mappings, or its text as JSON or Python writes it.

    Raises:
        Mistake: it is none, a role is unknown, or a turn is empty.
    """
    given = listed(values.get(column))
    if not isinstance(given, list) or not given:
        raise Mistake(f"{column!r} should be a list of messages, got {shown(given)}")
    return [_message(message, f"turn {i} of {column!r}") for i, message in enumerate(given, start=1)]


def tools_in(values: dict[str, Any]) -> list[Any] | None:
    """The tools that a row's conversation may use: a list, or JSON of one. Raises Mistake."""
    tools = values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise Mistake(f"'tools' should be a list or JSON of one, got {shown(tools)}") from None
    if tools is not None and not isinstance(tools, list):
        raise Mistake(f"'tools' should be a list, got {shown(tools)}")
    return tools or None


def options_in(values: dict[str, Any]) -> dict[str, Any]:
    """A row's further arguments of the template (``chat_template_kwargs``). Raises Mistake."""
    options = values.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise Mistake(f"'chat_template_kwargs' should be a mapping, got {shown(options)}")
    return {name: value for name, value in options.items() if value is not None}


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not any(keys <= set(message) for keys in _MESSAGE_KEYS):
        raise Mistake(f"{where} should have a role and content, got {shown(message)}")
    # Arrow gives every message the keys of all; None is a key that this one does not have.
    given = {name: value for name, value in message.items() if value is not None}
    if "role" not in given:
        given["role"], given["content"] = given.pop("from", None), given.pop("value", None)
    role, content = given["role"], given.get("content")
    if role in _SHAREGPT_ROLES and ("from" in message or role in ROLES):
        given["role"] = _SHAREGPT_ROLES[role]
    else:
        near = f" ({role!r} is {_SHAREGPT_ROLES[role]!r} here)" if role in _SHAREGPT_ROLES else ""
        raise Mistake(f"{where} has the unknown role {role!r}{near}; known: {', '.join(ROLES)}")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Mistake(f"{where} has parts that are no text, which are not read: {shown(content)}")
    elif content is not None and not isinstance(content, str):
        raise Mistake(f"{where} should have text as its content, got {shown(content)}")
    said = content.strip() if isinstance(content, str) else content
    if not said and given["role"] in ("user", "assistant") and not given.get("tool_calls"):
        raise Mistake(f"{where} is empty, got {shown(content)} of the {given['role']}")
    return {**given, "content": content if content is not None else ""}


def _alike(values: dict[str, Any], first: str, second: str) -> tuple[Any, Any]:
    one, other = _one(values, first), _one(values, second)
    if isinstance(one, str) != isinstance(other, str):
        raise Mistake(f"{first!r} and {second!r} should both be texts or both be lists of messages")
    return one, other


def _one(values: dict[str, Any], column: str) -> str | list[Message]:
    """A column's text or messages."""
    given = values.get(column)
    if isinstance(given, str) and not isinstance(listed(given), list):
        return _text(values, column)
    if not isinstance(listed(given), list):
        raise Mistake(f"{column!r} should be text or a list of messages, got {shown(given)}")
    return messages_in(values, column)


def _text(values: dict[str, Any], column: str) -> str:
    given = values.get(column)
    if not isinstance(given, str) or not given.strip():
        raise Mistake(f"{column!r} should be text, got {shown(given)}")
    return given


def _answer(values: dict[str, Any], column: str) -> Message:
    return {"role": "assistant", "content": _text(values, column)}


def _instructed(values: dict[str, Any]) -> str:
    further = values.get("input")
    if further is not None and not isinstance(further, str):
        raise Mistake(f"'input' should be text, got {shown(further)}")
    instruction = _text(values, "instruction")
    return f"{instruction}\n\n{further}" if further and further.strip() else instruction


def _named(columns: set[str]) -> str:
    return " and ".join(map(repr, sorted(columns, reverse="prompt" in columns)))


def _has(columns: Iterable[str]) -> str:
    return f"the columns are {', '.join(map(repr, columns))}"
