"""A task on the user's own data, as a configuration describes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..errors import unknown
from .fields import Count, Float, Positive, Section
from .task_names import GENERATED_METRICS, LANGUAGE_KINDS, LANGUAGE_METRICS, PREFERENCE_METRICS, TASK_KINDS, KindInfo


class FileTask(Section):
    """A task from the user's own data: a file, a folder, or a set on the hub (``owner/name``, ``owner/name:config``,
    ``owner/name[split]``). Paths are absolute once loaded. Without ``tune`` or ``report``, the set's own validation and
    test splits are used, or else a share of ``train`` is split off.

    ``text`` and ``label`` name the columns where they are not the kind's own. ``loss_on`` says which tokens of a
    conversation or of prompt and completion are learnt. ``metric`` is what runs are compared by: null is the kind's,
    and ``module:function`` scores generated texts. ``beta`` is DPO's."""

    kind: Literal[
        "text-classification", "regression", "token-classification", "causal-lm", "chat", "prompt-completion",
        "preference", "seq2seq", "image-classification", "audio-classification",
    ]  # fmt: skip
    train: str
    tune: str | None = None
    report: str | None = None
    tune_share: Annotated[Float, Field(gt=0, lt=1)] = 0.1
    report_share: Annotated[Float, Field(gt=0, lt=1)] = 0.1
    streaming: bool = False
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    delimiter: str | None = None
    encoding: str | None = None
    loss_on: Literal["assistant", "completion", "all"] | None = None
    metric: str | None = None
    direction: Literal["maximize", "minimize"] | None = None
    max_new_tokens: Count = 64
    beta: Positive = 0.1

    @field_validator("report_share")
    @classmethod
    def _room_to_train(cls, value: float, info: ValidationInfo) -> float:
        if value + info.data.get("tune_share", 0) >= 1:
            raise ValueError(f"{value} and tune_share {info.data['tune_share']} leave nothing to train on")
        return value

    @field_validator("streaming")
    @classmethod
    def _streamed(cls, value: bool, info: ValidationInfo) -> bool:
        kind, kinds = info.data.get("kind"), ("causal-lm", "chat", "prompt-completion", "seq2seq")
        if value and kind is not None and kind not in kinds:
            raise ValueError(f"is for {', '.join(kinds)}: kind {kind!r} looks at its whole training set first")
        return value

    @field_validator("text", "label")
    @classmethod
    def _column(cls, value: str | None, info: ValidationInfo) -> str | None:
        of_text, of_label = _COLUMNS.get(info.data.get("kind", ""), ("text", "label"))
        return value or (of_text if info.field_name == "text" else of_label)

    @field_validator("text_pair")
    @classmethod
    def _pair(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("kind") not in (None, "text-classification", "regression"):
            raise ValueError(f"a second text does not fit kind {info.data['kind']!r}, got {value!r}")
        return value

    @field_validator("loss_on")
    @classmethod
    def _learnt(cls, value: str | None, info: ValidationInfo) -> str | None:
        kind = info.data.get("kind")
        if value is not None and kind not in (None, "chat", "prompt-completion"):
            raise ValueError(f"is for kinds chat and prompt-completion, got {value!r} for kind {kind!r}")
        return value or {"chat": "assistant", "prompt-completion": "completion"}.get(kind or "")

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, value: str | None, info: ValidationInfo) -> str | None:
        kind = info.data.get("kind")
        if value is None or kind is None:
            return value
        known: Sequence[str] = [TASK_KINDS[kind].metric]
        if kind in LANGUAGE_KINDS:
            known = list(PREFERENCE_METRICS if kind == "preference" else LANGUAGE_METRICS)
            if kind == "causal-lm":
                known = [name for name in known if name not in GENERATED_METRICS]
            elif kind != "preference" and re.fullmatch(r"[\w.]+:\w+", value):
                return value
        if value not in known:
            raise ValueError(unknown("metric", value, known) + f" for kind {kind!r}")
        return value

    @field_validator("direction")
    @classmethod
    def _own_direction(cls, value: str | None, info: ValidationInfo) -> str | None:
        metric = info.data.get("metric")
        if value is not None and ":" not in (metric or ""):
            raise ValueError(f"is for a metric of your own (module:function), got {value!r} for metric {metric!r}")
        return value

    @property
    def judged_by(self) -> KindInfo:
        """The metric that runs are compared by, and its direction."""
        info = TASK_KINDS[self.kind]
        if self.metric is None:
            return info
        named = {**LANGUAGE_METRICS, **PREFERENCE_METRICS, info.metric: info.direction}
        if self.metric in named:
            return KindInfo(self.metric, named[self.metric], info.trainer)
        return KindInfo(self.metric.partition(":")[2], self.direction or "maximize", info.trainer)


# The columns of a kind's input and of what is to be learnt.
_COLUMNS: dict[str, tuple[str | None, str | None]] = {
    "token-classification": ("tokens", "labels"), "chat": ("messages", None),
    "prompt-completion": ("prompt", "completion"), "seq2seq": ("prompt", "completion"), "preference": (None, None),
    "image-classification": ("image", "label"), "audio-classification": ("audio", "label"),
}  # fmt: skip
