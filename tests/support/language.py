"""A tiny language model with its tokenizer, in a folder, and what trainers of language models want: texts, preferences,
prompts, conversations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 44
"""Words w0 to w43; texts count on in steps of 5."""

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }} <eos> {% endgeneration %}{% else %}{{ message['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ("<pad>", "<eos>", "<unk>", "<bos>")
    words = [f"w{i}" for i in range(WORDS)] + [*special, "<user>", "<assistant>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(("pad_token", "eos_token", "unk_token", "bos_token"), special, strict=True))
    )
    made.chat_template = TEMPLATE
    return made


def make_language_model(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": WORDS, "eos_token_id": WORDS + 1,
        "bos_token_id": WORDS + 3, **config,
    })).eval()


def save_language_model(folder: Path) -> Path:
    """The base model and its tokenizer as ``from_pretrained`` reads them."""
    make_language_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def counting(start: int, length: int = 10, step: int = 5) -> str:
    return " ".join(f"w{(start + step * i) % WORDS}" for i in range(length))


def _starts(rows: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(WORDS) for _ in range(rows)]


def texts(rows: int = 48) -> list[dict[str, str]]:
    return [{"text": counting(start)} for start in _starts(rows)]


def preferences(rows: int = 48) -> list[dict[str, str]]:
    """Counting on is preferred to counting back."""
    return [
        {"prompt": counting(s, 4), "chosen": " " + counting(s + 20, 5), "rejected": " " + counting(s + 20, 5, step=-7)}
        for s in _starts(rows)
    ]


def prompts(rows: int = 48) -> list[dict[str, str]]:
    return [{"prompt": counting(start, 4)} for start in _starts(rows)]


def conversations(rows: int = 48) -> list[dict[str, Any]]:
    return [
        {"messages": [
            {"role": "user", "content": counting(start, 4)}, {"role": "assistant", "content": counting(start + 20, 6)},
        ]}
        for start in _starts(rows)
    ]
