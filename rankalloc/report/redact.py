"""What must not be shared: tokens, passwords and the names of home folders, out of everything a report shows.

A report is made to be handed on, and the commands and configurations in it are not: they name whoever ran them. Values
are replaced wherever they stand, by their form (``hf_...``) or by the name before them (``api_key=...``). The names of
layers are left alone.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"
_SECRET_NAME = r"(?:[\w-]*[_-])?(?:api[_-]?key|access[_-]?key|auth[_-]?token|token|secret|passw(?:or)?d|credentials?)"
_NAMED = re.compile(rf"(?i)(?<![\w-])(--?)?({_SECRET_NAME})(\"?\s*[=:]\s*\"?|\s+)([^\s\"'&,;}}]+)")
_HARMLESS = re.compile(r"(?i).*\b(?:pad|eos|bos|unk|mask|sep|cls|image|audio|special|max|num|new|per)[_-]token")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[^\s\"']+")
_WANDB = re.compile(r"(?i)(wandb\W[^\n]{0,40}?)\b[0-9a-f]{40}\b")  # alone it could be a commit of git
_BY_FORM = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|wandb_v\d_[\w-]{8,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w-]{16,}|AKIA[A-Z0-9]{12,}|xox[abprs]-[\w-]{8,}|(?<=local-)[0-9a-f]{40})\b"
)
_URL = re.compile(r"(?<=://)([^\s/:@]*):([^\s/@]+)@")
_HOME = re.compile(
    r"(?<![\w.~-])(?:(?:/home|/Users)/[^/\s\"':;,]+|/root|[A-Za-z]:\\+Users\\+[^\\\s\"':;,]+)(?=[/\\\s\"':;,]|$)"
)
_SECRET_KEY = re.compile(rf"(?i){_SECRET_NAME}")
_UNTOUCHED = ("layers", "scores", "singular_values", "allocations", "logs", "example_losses", "layer_names")


def redacted_text(text: str) -> str:
    """``text`` with secrets as ``***`` and home folders as ``~``.

    Example:
        >>> redacted_text("train --data /home/ada/x.csv --api-key abc postgresql://ada:pw@host/db")
        'train --data ~/x.csv --api-key *** postgresql://ada:***@host/db'
    """
    text = _BY_FORM.sub(HIDDEN, text)
    text = _WANDB.sub(rf"\1{HIDDEN}", _BEARER.sub(rf"\1{HIDDEN}", text))
    text = _URL.sub(rf"\1:{HIDDEN}@", text)
    text = _NAMED.sub(_named, text)
    return _HOME.sub("~", text)


def redacted(value: Any) -> Any:
    """Parsed JSON with its texts redacted, and every value of a key that names a secret hidden."""
    if isinstance(value, str):
        return redacted_text(value)
    if isinstance(value, list):
        return [redacted(item) for item in value]
    if isinstance(value, dict):
        return {
            key: item if key in _UNTOUCHED and isinstance(item, list)
            else HIDDEN if isinstance(item, str) and item and _secret(str(key), item)
            else redacted(item)
            for key, item in value.items()
        }  # fmt: skip
    return value


def _secret(key: str, value: str) -> bool:
    """Whether the value of a key is one, by the key's name."""
    if "wandb" in key.lower() and re.fullmatch("[0-9a-f]{40}", value):
        return True
    return _SECRET_KEY.fullmatch(key) is not None and _HARMLESS.fullmatch(key) is None


def _named(match: re.Match[str]) -> str:
    """A named secret; a word of prose such as "token ids" is none, so without "=" only an option's value is."""
    dashes, name, between, _ = match.groups()
    if (not between.strip() and not dashes) or _HARMLESS.fullmatch(name):
        return match[0]
    return f"{dashes or ''}{name}{between}{HIDDEN}"
