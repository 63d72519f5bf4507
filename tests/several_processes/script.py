"""One process of a run, as test_processes.py starts it with torchrun; the whole run where WORLD_SIZE is unset."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import rankalloc as ra
from rankalloc.cli import app
from rankalloc.experiments.plain_trainer import PlainTrainer
from rankalloc.storage.tensors import read_tensors
from tests.support.models import assert_same, make_bert, make_gpt2, make_mlp, token_data, token_ids
from tests.support.training import make_trainer, train

STEPS, ROWS = 20, 12
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SETTINGS = {
    "per_device_train_batch_size": 8 // WORLD, "max_grad_norm": 1.0, "gradient_accumulation_steps": 2,
    # one process and two draw another random order; and averaging tokens, the Trainer doubles this model's loss
    "train_sampling_strategy": "sequential", "average_tokens_across_devices": False,
}


def plain_loop(method: str) -> dict[str, torch.Tensor]:
    """A loop of one's own under DDP; each process sees its part of the same global batch."""
    model = make_mlp(depth=4)
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=4, ranks={"2": 0}, init=ra.METHODS[method].init)
    wrapped = DistributedDataParallel(model) if WORLD > 1 else model
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=4, every=2), STEPS, method, seed=3)
    train(controller, optimizer, STEPS, lambda step: regression(wrapped, step))
    controller.finish()
    return model.state_dict()


def regression(model: nn.Module, step: int) -> torch.Tensor:
    """The loss on this process's part of the batch of ``step``."""
    x = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(step)).chunk(WORLD)[RANK]
    return F.mse_loss(model(x), x[:, :8].sin() + x[:, 8:].cos())


def trainer(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """The Trainer, which wraps the model by itself."""
    model = make_bert()
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=4)
    callback = ra.RankCallback(adapters, ra.RankBudget(fraction=0.4, every=2))
    settings = {**SETTINGS, **settings}
    make_trainer(model, folder / "trainer", [callback], steps=STEPS, **settings).train()
    return model.state_dict()


def task_trainer(folder: Path) -> dict[str, torch.Tensor]:
    """The Trainer of a task, as it is by default, on rows with unlike numbers of labels: tokens are averaged over the
    processes, for a model whose loss is the mean over its own."""
    rows = [
        {**row, "labels": torch.where(torch.arange(len(row["labels"])) > number % 4, -100, row["labels"])}
        for number, row in enumerate(token_data())
    ]
    example = {key: torch.stack([row[key] for row in rows[:2]]) for key in rows[0]}
    return trainer(
        folder, data=rows, average_tokens_across_devices=True, trainer_class=partial(PlainTrainer, example=example),
    )


def peft_loop() -> dict[str, torch.Tensor]:
    """A loop of one's own under DDP that drives the LoRA layers of a PeftModel."""
    torch.manual_seed(1)
    model = get_peft_model(make_mlp(depth=4), LoraConfig(r=4, target_modules=["0", "2", "4", "6"]))
    adapters = ra.adopt(model)
    wrapped = DistributedDataParallel(model) if WORLD > 1 else model
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=6, every=2), STEPS, seed=3)
    train(controller, optimizer, STEPS, lambda step: regression(wrapped, step))
    controller.finish()
    return factors_of(adapters)


def peft_trainer(folder: Path) -> dict[str, torch.Tensor]:
    """The Trainer with a PeftModel, which it wraps, and a callback that adopts its layers; and the same run resumed
    from a checkpoint in which a layer has no rank."""

    def run(resume: str | None = None) -> dict[str, torch.Tensor]:
        model = make_bert()
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value", "dense"]))
        callback = ra.RankCallback(budget=ra.RankBudget(fraction=0.4, every=2))
        settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 14}
        make_trainer(model, folder / f"peft-{WORLD}", [callback], steps=STEPS, **settings).train(resume)
        return factors_of(callback.adapters)

    whole = run()
    assert_same(whole, run(str(folder / f"peft-{WORLD}" / "checkpoint-14")))
    assert not all(len(tensor) for name, tensor in whole.items() if name.endswith(".lam"))
    return whole


def factors_of(adapters: ra.Adapters) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.{factor}": getattr(a, factor).detach()
        for layer, a in adapters.modules.items() for factor in ("P", "lam", "Q")
    }


def shard(adapters: ra.Adapters, blocks: list[nn.Module], **options) -> None:
    """FSDP2 over both processes, block by block, as its tutorial does; nothing where there is but one."""
    for module in (*blocks, adapters.model) if WORLD > 1 else ():
        fully_shard(module, mesh=dist.init_device_mesh("cpu", (WORLD,)), **options)


def sharded(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """A loop beside a base sharded by FSDP2: two backward passes a step, clipping, ranks that leave memory.

    The processes attach with other seeds: what counts is the first one's.
    """
    model = make_bert() if name == "bert" else make_gpt2()
    torch.manual_seed(1 + RANK)
    adapters = ra.attach(model, rank=4)
    blocks = model.bert.encoder.layer if name == "bert" else model.transformer.h
    shard(adapters, list(blocks), ignored_params=adapters.ignored_params())
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(fraction=0.4, every=2), STEPS // 2, seed=3)
    model.train()
    for step in range(STEPS // 2):
        for part in range(2):
            rows = token_data(8, seed=2 * step + part)[4 * RANK:][: 8 // WORLD]
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            loss = model(**batch).loss if name == "bert" else model(batch["input_ids"], labels=batch["input_ids"]).loss
            loss.backward()
        norm = nn.utils.clip_grad_norm_(adapters.parameters(), 0.1)
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()
    controller.finish()
    model.eval()
    outputs = model(token_ids()).logits.detach()  # every process takes part, so that all have the whole
    if RANK == 0:
        ra.save(adapters, folder / f"{name}-{WORLD}")
    heads = {f"{n}.{key}": value for n, head in adapters.heads.items() for key, value in head.state_dict().items()}
    return {**factors_of(adapters), **heads, "outputs": outputs, "norm": norm}


def refusals() -> dict[str, str]:
    """The errors of gradients that nobody averages, and of shardings that leave no room for adapters that change."""

    def control(adapters: ra.Adapters) -> ra.RankController:
        return ra.RankController(adapters, ra.RankBudget(ranks=4, every=2), STEPS)

    def whole(adapters: ra.Adapters) -> None:
        shard(adapters, [])
        control(adapters)

    def late(adapters: ra.Adapters, **options) -> None:
        controller = control(adapters)
        shard(adapters, [], **options)
        adapters.model(torch.randn(4, 16)).square().sum().backward()
        controller.observe()

    def late_base(adapters: ra.Adapters) -> None:
        late(adapters, ignored_params=adapters.ignored_params())

    def flat(adapters: ra.Adapters) -> None:
        held = FullyShardedDataParallel(adapters.model, use_orig_params=True, device_id=torch.device("cpu"))
        control(adapters)
        del held

    def attached_after(adapters: ra.Adapters) -> None:
        ra.detach(adapters)
        shard(adapters, [])
        ra.attach(adapters.model, rank=2)

    def merged(adapters: ra.Adapters) -> None:
        shard(adapters, [], ignored_params=adapters.ignored_params())
        ra.merge(adapters)

    def unaveraged(adapters: ra.Adapters) -> None:
        def loss_of(step: int) -> torch.Tensor:
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step + 1000 * RANK))
            return adapters.model(x).square().sum()

        train(control(adapters), torch.optim.AdamW(adapters.parameters(), lr=1e-1), STEPS, loss_of)

    said = {}
    for attempt in (unaveraged, whole, late, late_base, flat, attached_after, merged):
        torch.manual_seed(1)
        adapters = ra.attach(make_mlp(), rank=4)
        try:
            attempt(adapters)
        except ra.RankallocError as error:
            said[attempt.__name__] = str(error)
    return said


def command(folder: Path) -> dict[str, torch.Tensor]:
    """``rankalloc train`` in one folder for all processes, resumed from its checkpoint by the same command."""
    output = folder / "command"
    words = ["train", str(folder / "run.yaml"), "--output", str(output)]
    assert run_command(*words) == 0
    adapter = read_tensors(output / "adapter" / "adapter_model.safetensors")[0]
    together()
    if RANK == 0:  # as if they had been killed in between
        shutil.rmtree(output / "checkpoint-6")
        (output / "trace.json").unlink()
    together()
    assert run_command(*words) == 1  # an unfinished run
    together()
    assert run_command(*words, "--resume") == 0
    assert_same(adapter, read_tensors(output / "adapter" / "adapter_model.safetensors")[0])
    assert not (output / "README.md").exists()
    return adapter


def run_command(*words: str) -> int:
    """The exit code of the command line."""
    return app(list(words), prog_name="rankalloc", standalone_mode=False) or 0


def together() -> None:
    if WORLD > 1:
        dist.barrier()


def runs(folder: Path, part: str) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each run that two processes and one must end alike, by name; ``part`` is "whole", "further" or "sharded". The
    command line, whose order of the data is another with two, is for two alone."""
    if part == "whole":
        yield "auto", plain_loop("auto")
        yield "trainer", trainer(folder)
        if WORLD > 1:
            yield "command", command(folder)
    elif part == "further":
        for method in ("adalora", "dylora"):
            yield method, plain_loop(method)
        yield "task trainer", task_trainer(folder)
        yield "peft loop", peft_loop()
        yield "peft trainer", peft_trainer(folder)
    else:
        for name in ("bert", "gpt2"):
            yield name, sharded(folder, name)


def main(folder: Path, part: str) -> None:
    if WORLD > 1:
        dist.init_process_group("gloo")
    for name, state in runs(folder, part):
        torch.save(state, folder / f"{name}-{WORLD}-{RANK}.pt")
    if WORLD > 1 and part == "sharded":
        (folder / f"refusals-{RANK}.json").write_text(json.dumps(refusals()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
