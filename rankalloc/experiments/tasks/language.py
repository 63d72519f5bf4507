"""Tasks of which the model writes text, from the user's own data: chat, prompt-completion, preference and seq2seq."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from transformers import DataCollatorForSeq2Seq

from ...errors import DataError
from ...files import sha256_of
from ..config import RunConfig
from ..sections import FileTask
from .base import PreparedTask
from .cells import Mistake
from .chat import ChatTemplate, PrefixBroken
from .conversations import conversation, form_of, options_in, pair, preference, tools_in
from .encode import limited
from .metrics import token_metrics
from .models import builder, find_model
from .reading import Table, read_tables
from .splitting import Row, read_splits
from .written import Writer
