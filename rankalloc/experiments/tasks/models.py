"""Models and tokenizers by folder or hub id, for each kind of task; failures are reported in one sentence.

Weights are read from safetensors only, and a model's own code is not run unless the user allows it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ...errors import ConfigError
from ...layers.quantized import keep_packing
from ...storage.quiet import quiet
from ..config import RunConfig
from ..sections import ModelConfig
from ..task_names import DECODER_KINDS
from .packages import reference_of
from .padding import choose_padding, pad_alike

_AUTO_CLASSES: dict[str, Any] = {
    "text-classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "image-classification": transformers.AutoModelForImageClassification,
    "audio-classification": transformers.AutoModelForAudioClassification,
}
_PROCESSORS = {
    "image-classification": transformers.AutoImageProcessor,
    "audio-classification": transformers.AutoFeatureExtractor,
}
_DTYPES: dict[str, Any] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto",
}


@dataclass(frozen=True)
class LoadedReference:
    """A model found but not yet loaded: its name for people, its reference for ``from_pretrained``, its
    configuration, its tokenizer (which has a padding token; for images and audio their processor), and what is
    to be said of it, one sentence each."""

    name: str
    reference: str
    config: PreTrainedConfig
    tokenizer: Any
    notes: list[str] = field(default_factory=list)

    @property
    def short_name(self) -> str:
        """The name without a folder's path."""
        return Path(self.name).name if Path(self.name).is_dir() else self.name


def find_model(config: RunConfig, kind: str, default: str | None = None) -> LoadedReference:
    """Configuration and tokenizer of the configured model (or of ``default``).

    Raises:
        ConfigError: there is no such model, its tokenizer does not fit ``kind``, ``data.max_length`` exceeds
            its positions, or its chat template cannot be read.
        DataError: the default model's package is not installed.
    """
    settings = config.model_settings
    name = settings.name or default or ""
    reference = reference_of(name)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if settings.revision is not None:
        options["revision"] = settings.revision
    # Byte-level tokenizers take words only when each is given its leading space.
    words = {"add_prefix_space": True} if kind == "token-classification" else {}
    reader: Any = _PROCESSORS.get(kind, AutoTokenizer)
    with quiet(), _one_sentence(name, reference):
        model_config = AutoConfig.from_pretrained(reference, **options)
    _require_kind(name, model_config, kind)
    _require_tokenizer(name, reference, kind)
    with quiet(), _one_sentence(name, reference):
        tokenizer = reader.from_pretrained(reference, **options, **words)
    found = LoadedReference(name, reference, model_config, tokenizer)
    if kind in _PROCESSORS:
        return found
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes of a folder without one
        raise ConfigError(
            f"the tokenizer of model {name!r} knows no words, so every text would be the same: {reference} has no "
            "tokenizer files; save the model's tokenizer there too"
        )
    if kind == "token-classification" and not tokenizer.is_fast:
        raise ConfigError(f"model {name!r} has no fast tokenizer, which token-classification needs")
    found.notes.extend(choose_padding(tokenizer, model_config, name))
    if settings.chat_template is not None:
        tokenizer.chat_template = template_text(settings.chat_template)
    positions = min(getattr(model_config, "max_position_embeddings", None) or 10**9, tokenizer.model_max_length)
    longest = config.data.max_length
    if longest > positions:
        raise ConfigError(f"data.max_length {longest} is more than the {positions} positions of {name!r}")
    tokens = getattr(model_config.get_text_config(), "vocab_size", None) or len(tokenizer)
    if len(tokenizer) > tokens:
        raise ConfigError(f"the tokenizer of {name!r} has {len(tokenizer)} tokens, more than the {tokens} of the model")
    return found


def _require_kind(name: str, found: PreTrainedConfig, kind: str) -> None:
    """Raise ConfigError when transformers has no model for ``kind`` of this configuration, or one that sees later
    tokens; :func:`builder` looks at the model itself, too."""
    auto_class = _AUTO_CLASSES.get(kind, transformers.AutoModelForCausalLM)
    if getattr(found, "auto_map", None):
        return  # its own code says what it is
    text = found.get_text_config(decoder=True) if kind in DECODER_KINDS else found
    known = type(found) in auto_class._model_mapping or type(text) in auto_class._model_mapping
    encoder = type(found) in transformers.AutoModelForMaskedLM._model_mapping and not found.is_decoder
    if known and not (kind in DECODER_KINDS and encoder and not found.is_encoder_decoder):
        return
    both = type(found) in transformers.AutoModelForSeq2SeqLM._model_mapping
    what = "an encoder-decoder" if both else "an encoder" if encoder else "a model of another kind"
    why = ", which sees later tokens" if encoder and not both and kind in DECODER_KINDS else ""
    way_out = ", or make the task kind: seq2seq" if both and kind in DECODER_KINDS else ""
    raise ConfigError(
        f"model {name!r} is {what} ({found.model_type}){why}, so it cannot learn {kind}; give "
        f"{_NEEDED.get(kind, 'a decoder')}{way_out}"
    )


_NEEDED = {
    "text-classification": "a model of texts, such as a BERT or a Llama",
    "regression": "a model of texts, such as a BERT or a Llama",
    "token-classification": "a model of texts, such as a BERT",
    "seq2seq": "an encoder-decoder, such as a T5",
    "image-classification": "a model of images, such as a ViT",
    "audio-classification": "a model of sounds, such as a Wav2Vec2",
}


def _require_tokenizer(name: str, reference: str, kind: str) -> None:
    """Raise ConfigError when a local folder holds no tokenizer (for images and audio no processor)."""
    folder = Path(reference)
    if not folder.is_dir():
        return
    patterns = _PROCESSOR_FILES if kind in _PROCESSORS else _TOKENIZER_FILES
    if not any(next(folder.glob(pattern), None) for pattern in patterns):
        what = "processor (preprocessor_config.json)" if kind in _PROCESSORS else "tokenizer (tokenizer.json)"
        raise ConfigError(f"the model folder {name!r} holds no {what}; save the model's own there (save_pretrained)")


_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "merges.txt", "*.spm", "*.bpe", "*.tiktoken", "tekken.json")


def template_text(given: str) -> str:
    """A chat template as ``model.chat_template`` gives it: itself, or the content of the file that it names.

    Raises:
        ConfigError: there is no such file, or it is not text.
    """
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"model.chat_template {given!r} cannot be read: {why}; give a Jinja template or a file that holds one"
        ) from None


def builder(found: LoadedReference, config: RunConfig, kind: str, labels: list[str]) -> Callable[[], PreTrainedModel]:
    """A function that loads a fresh model for ``kind`` at each call.

    Weights missing from the checkpoint (a new head) are drawn from torch's global seed; so is a head that was made
    for another number of labels, which ``found.notes`` then says. Weights are of ``model.dtype``; where it is
    null float32, or of the checkpoint's dtype when ``training.bf16`` is set. The function raises ConfigError when
    there are no safetensors weights, when a model that is to predict the next token sees later ones, or when
    weights other than a head's are of another size than the model's.
    """
    settings = _settings(kind, labels)
    found.notes.extend(_fresh_head(found, kind, settings))

    def build() -> PreTrainedModel:
        auto_class = _AUTO_CLASSES.get(kind, transformers.AutoModelForCausalLM)
        options = _loading(config)
        with quiet(), _one_sentence(found.name, found.reference):
            model, loading = auto_class.from_pretrained(
                found.reference, **options, **settings, ignore_mismatched_sizes=kind in _HEADS,
                output_loading_info=True,
            )
            _only_heads(model, loading["mismatched_keys"])
        keep_packing(model)
        if kind not in _PROCESSORS:
            pad_alike(model, found.tokenizer)
        if kind in DECODER_KINDS and _looks_ahead(model):
            raise ConfigError(f"model {found.name!r} sees later tokens, so it cannot learn {kind}; use a decoder")
        return model

    return build


def _loading(config: RunConfig) -> dict[str, Any]:
    """What ``from_pretrained`` is told of how to hold the model, from the ``model`` section."""
    settings = config.model_settings
    dtype = _DTYPES[settings.dtype] if settings.dtype else "auto" if config.training.bf16 else torch.float32
    options: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code, "use_safetensors": True, "dtype": dtype,
        "attn_implementation": settings.attn_implementation, "revision": settings.revision or "main",
    }
    if settings.load_in_4bit or settings.load_in_8bit:
        options["quantization_config"] = _few_bits(settings, torch.bfloat16 if config.training.bf16 else torch.float32)
        if torch.accelerator.is_available():  # a quantised model stays where it is loaded
            options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    return options


def _few_bits(settings: ModelConfig, otherwise: torch.dtype) -> transformers.BitsAndBytesConfig:
    """QLoRA's way to hold a base: NF4 with quantised constants (Dettmers et al. 2023), or eight bits."""
    if find_spec("bitsandbytes") is None:
        bits = 4 if settings.load_in_4bit else 8
        raise ConfigError(f'model.load_in_{bits}bit needs bitsandbytes: pip install "rankalloc[quantized]"')
    if settings.load_in_8bit:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    computed = _DTYPES.get(settings.dtype or "", otherwise)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=otherwise if computed == "auto" else computed,
    )


def _fresh_head(found: LoadedReference, kind: str, settings: dict[str, Any]) -> list[str]:
    """A sentence when the checkpoint's own head was made for this kind and another number of labels."""
    architectures = getattr(found.config, "architectures", None) or [""]
    asked, held = settings.get("num_labels"), found.config.num_labels
    has_head = any(_HEADS[kind] in name for name in architectures) if kind in _HEADS else False
    if asked is None or not has_head or asked == held:
        return []
    return [f"the head of model {found.short_name!r} is for {held} labels and the data has {asked}: it begins afresh"]


_HEADS = {
    "text-classification": "SequenceClassification", "regression": "SequenceClassification",
    "token-classification": "TokenClassification", "image-classification": "ImageClassification",
    "audio-classification": "SequenceClassification",
}


def _only_heads(model: PreTrainedModel, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise ValueError when a weight of another size than the model's lies outside its head."""
    prefix = f"{model.base_model_prefix}."
    for name, held, asked in sorted(mismatched, key=str):
        if name.startswith(prefix) or model.base_model is model:
            raise ValueError(f"{name} is of size {list(held)} in its weights and {list(asked)} in its configuration")


def _settings(kind: str, labels: list[str]) -> dict[str, Any]:
    if kind not in _HEADS:
        return {}
    if kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    single = {} if kind == "token-classification" else {"problem_type": "single_label_classification"}
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
