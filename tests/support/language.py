"""A tiny language model with its tokenizer, in a folder, what trainers of language models want (texts, preferences,
prompts, conversations), and those of TRL."""

from __future__ import annotations

import random
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

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
    names = ("pad_token", "eos_token", "unk_token", "bos_token")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, special, strict=True)))
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


def judged(rows: int = 48) -> list[dict[str, Any]]:
    """Completions that are good or bad, each alone."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in zip(preferences(rows), ("chosen", "rejected") * rows, strict=False)
    ]


DATA = {"sft": texts, "dpo": preferences, "grpo": prompts, "rloo": prompts, "kto": judged}
STEPS = 12


def make_trl(
    kind: str, folder: Path, model: nn.Module, lora: Any = None, callbacks: Iterable[Any] = (), rows: Any = None,
    **settings: Any,
) -> Any:
    """A quiet, seeded trainer of TRL's on the CPU.

    Args:
        kind: a key of :data:`DATA`.
        folder: its output folder.
        lora: the LoraConfig it makes a PeftModel with; None where ``model`` is one.
        rows: training data; None for its kind's own.
        settings: of its configuration; trainer_class= and eval_dataset= apart.
    """
    import trl  # seconds of its own
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    trainer_class, config_class = {
        "sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
    }[kind]
    trainer_class = settings.pop("trainer_class", trainer_class)
    extra = {"eval_dataset": settings.pop("eval_dataset")} if "eval_dataset" in settings else {}
    if kind in ("grpo", "rloo"):
        settings = {"beta": 0.05, "num_generations": 2, "max_completion_length": 6, **settings}
        extra["reward_funcs"] = different_words
    arguments = config_class(**{
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 4, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
        "bf16": False, "gradient_checkpointing": False, "log_level": "error", **settings,
    })
    torch.manual_seed(0)  # of the adapters
    trainer = trainer_class(
        model, args=arguments, train_dataset=Dataset.from_list(DATA[kind]() if rows is None else rows),
        processing_class=make_tokenizer(), peft_config=lora, callbacks=list(callbacks), **extra,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def different_words(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward: how many different words there are."""
    return [float(len(set(completion.split()))) for completion in completions]


def parameters_held(root: Any) -> int:
    """Numbers in the different parameters that can be reached from ``root`` through attributes and containers."""
    seen, numbers, open_ends = set(), 0, [root]
    while open_ends:
        item = open_ends.pop()
        if id(item) in seen or isinstance(item, (type, types.ModuleType)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            numbers += item.numel() * isinstance(item, nn.Parameter)
        elif isinstance(item, dict):
            open_ends += item.values()
        elif isinstance(item, (list, tuple, set)):
            open_ends += item
        elif hasattr(item, "__dict__"):
            open_ends += vars(item).values()
    return numbers


def make_lora(**options: Any) -> Any:
    """A LoraConfig of rank 4 on all linear layers, for a causal model."""
    from peft import LoraConfig

    return LoraConfig(**{
        "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options,
    })


def load_language_model(folder: Path, **options: Any) -> LlamaForCausalLM:
    """The base model, without an adapter, as :func:`save_language_model` wrote it."""
    return LlamaForCausalLM.from_pretrained(folder, **options)
