"""Models and tokenizers by folder or hub id, for each kind of task; failures are reported in one sentence.

Weights are read from safetensors only, and a model's own code is not run unless the user allows it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import ConfigError
from ...storage.quiet import quiet
from ..config import RunConfig
from .packages import reference_of

_AUTO_CLASSES = {
    "text-classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
}


@dataclass(frozen=True)
class LoadedReference:
    """A model found but not yet loaded: its name for people, its reference for ``from_pretrained``, its
    configuration and its tokenizer (which has a padding token)."""

    name: str
    reference: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def short_name(self) -> str:
        """The name without a folder's path."""
        return Path(self.name).name if Path(self.name).is_dir() else self.name


def find_model(config: RunConfig, kind: str, default: str | None = None) -> LoadedReference:
    """Configuration and tokenizer of the configured model (or of ``default``).

    Raises:
        ConfigError: there is no such model, its tokenizer does not fit ``kind``, or ``data.max_length`` exceeds
            its positions.
        DataError: the default model's package is not installed.
    """
    name = config.model or default or ""
    reference = reference_of(name)
    options = {"trust_remote_code": config.trust_remote_code}
    # Byte-level tokenizers take words only when each is given its leading space.
    words = {"add_prefix_space": True} if kind == "token-classification" else {}
    with quiet(), _one_sentence(name, reference):
        model_config = AutoConfig.from_pretrained(reference, **options)
        tokenizer = AutoTokenizer.from_pretrained(reference, **options, **words)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes of a folder without one
        raise ConfigError(
            f"the tokenizer of model {name!r} knows no words, so every text would be the same: {reference} has no "
            "tokenizer files; save the model's tokenizer there too"
        )
    if kind == "token-classification" and not tokenizer.is_fast:
        raise ConfigError(f"model {name!r} has no fast tokenizer, which token-classification needs")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer of model {name!r} has neither a padding nor an end token; add one")
        tokenizer.pad_token = tokenizer.eos_token
    positions = min(getattr(model_config, "max_position_embeddings", None) or 10**9, tokenizer.model_max_length)
    longest = config.data.max_length
    if longest > positions:
        raise ConfigError(f"data.max_length {longest} is more than the {positions} positions of {name!r}")
    tokens = getattr(model_config, "vocab_size", None) or len(tokenizer)
    if len(tokenizer) > tokens:
        raise ConfigError(f"the tokenizer of {name!r} has {len(tokenizer)} tokens, more than the {tokens} of the model")
    return LoadedReference(name, reference, model_config, tokenizer)


def builder(found: LoadedReference, config: RunConfig, kind: str, labels: list[str]) -> Callable[[], PreTrainedModel]:
    """A function that loads a fresh model for ``kind`` at each call.

    Weights missing from the checkpoint (a new head) are drawn from torch's global seed. Weights are float32, or of
    the checkpoint's dtype when ``training.bf16`` is set. The function raises ConfigError when there are no
    safetensors weights or when a causal-lm model sees later tokens.
    """

    def build() -> PreTrainedModel:
        settings = _settings(kind, labels)
        if getattr(found.config, "pad_token_id", None) is None:
            settings["pad_token_id"] = found.tokenizer.pad_token_id
        with quiet(), _one_sentence(found.name, found.reference):
            model = _AUTO_CLASSES[kind].from_pretrained(
                found.reference,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=True,
                dtype="auto" if config.training.bf16 else torch.float32,
                **settings,
            )
        if kind == "causal-lm" and _looks_ahead(model):
            raise ConfigError(f"model {found.name!r} sees later tokens, so it cannot learn causal-lm; use a decoder")
        return model

    return build


def _settings(kind: str, labels: list[str]) -> dict:
    if kind == "causal-lm":
        return {}
    if kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    single = {"problem_type": "single_label_classification"} if kind == "text-classification" else {}
    return {"num_labels": len(labels), **named, **single}


def _looks_ahead(model: PreTrainedModel) -> bool:
    model.eval()
    with quiet(), torch.no_grad():
        ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
        first = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].float()
    return not torch.allclose(first[0], first[1], rtol=1e-2, atol=1e-3)


@contextlib.contextmanager
def _one_sentence(name: str, reference: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        why = why if len(why) < 200 else why[:196] + " ..."
        folder = Path(reference)
        if folder.is_dir():
            raise ConfigError(f"model folder {name!r} cannot be loaded for this task: {why}") from error
        if folder.is_absolute() or name.startswith("."):
            raise ConfigError(
                f"no model folder at {name!r}; give a folder with config.json and safetensors weights"
            ) from error
        raise ConfigError(
            f"model {name!r} is not a local folder and could not be fetched from the model hub; "
            f"give a folder, or go online to fetch it once ({why})"
        ) from error
