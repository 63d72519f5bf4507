"""What the peers of :mod:`studies.file_speed.peers` work on: SmolLM2-135M trained for a few steps on the chat task.

    python -m studies.file_speed.material FOLDER [--steps 16]

Writes ``adapter/``, PEFT's LoRA of rank 16 on every linear layer, and ``base/`` and ``tuned/``, a full fine-tune in
bfloat16 and what it began with. Both see the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import peft
import torch

from ..chat import task
from ..common.arguments import at_least_one, parse, parser_of

BATCH = 8


def train(model: torch.nn.Module, tokenizer, rate: float, steps: int) -> None:
    """Train what can be trained, with AdamW, clipped at norm 1."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for step in range(steps):
        rows = task.rows()["train"][step * BATCH : (step + 1) * BATCH]
        ids, labels, mask = task.padded([task.encode(tokenizer, row) for row in rows], tokenizer.pad_token_id)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("file_speed.material", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=at_least_one, default=16)
    args = parse(parser, argv, steps=2)
    task.unpacked()
    torch.manual_seed(0)
    model, tokenizer = task.model_and_tokenizer()
    model.bfloat16().save_pretrained(args.folder / "base")
    train(model.float(), tokenizer, 2e-5, args.steps)
    model.bfloat16().save_pretrained(args.folder / "tuned")
    model, tokenizer = task.model_and_tokenizer()
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    train(adapted, tokenizer, 5e-4, args.steps)
    adapted.save_pretrained(args.folder / "adapter")


if __name__ == "__main__":
    main()
