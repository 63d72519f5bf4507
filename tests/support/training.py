"""Short training runs that many tests share: a plain loop, and transformers' Trainer."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

import rankalloc as ra

from .models import make_llama, make_mlp, token_data, token_ids


def train(controller, optimizer, steps, loss_of, before_observe=None) -> list[float]:
    """A plain loop up to step ``steps`` that lowers ``loss_of(step)``; the losses it saw."""
    losses = []
    for step in range(controller.step, steps):
        loss = loss_of(step)
        loss.backward()
        if before_observe is not None:
            before_observe(step + 1)
        controller.observe()
        optimizer.step()
        controller.update(optimizer or None)  # where there is nothing to step, an optimizer is false
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_mlp(model, controller, optimizer, steps, seed: int = 3, before_observe=None) -> None:
    """The plain loop on a fixed regression problem, one fresh seeded batch a step."""
    def loss_of(step: int) -> torch.Tensor:
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(seed * 1000 + step))
        return F.mse_loss(model(x), torch.stack([x[:, :8].sin(), x[:, 8:].cos()]).sum(0))

    train(controller, optimizer, steps, loss_of, before_observe)


def make_trainer(model, folder, callbacks=(), data=None, steps: int = 20, **settings):
    """A quiet, seeded Trainer on the CPU; ``settings`` are TrainingArguments, trainer_class= apart."""
    trainer_class = settings.pop("trainer_class", Trainer)
    extra = {k: settings.pop(k) for k in ("optimizers", "eval_dataset", "compute_loss_func") if k in settings}
    arguments = TrainingArguments(**{
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 11,
        "dataloader_pin_memory": False, "log_level": "error", **settings,
    })
    trainer = trainer_class(model, arguments, train_dataset=data or token_data(), callbacks=list(callbacks), **extra)
    trainer.remove_callback(PrinterCallback)
    return trainer


STEPS = 20
BUDGET = ra.RankBudget(ranks=5, every=2)


def begin_mlp(budget=BUDGET, rank=4, steps=STEPS, optimizer=torch.optim.AdamW, attach=None, **options):
    """(model, adapters, controller, optimizer) of a run of the MLP that has not begun."""
    model = make_mlp()
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=rank, **(attach or {}))
    controller = ra.RankController(adapters, budget, total_steps=steps, **{"method": "adalora", **options})
    return model, adapters, controller, optimizer(adapters.parameters(), lr=1e-2)


def controlled_mlp():
    """The MLP, adapted, and the controller of a run of six steps."""
    model = make_mlp()
    return model, ra.RankController(ra.attach(model, rank=4), ra.RankBudget(ranks=5, every=2), 6)


def trained_llama() -> tuple[list[float], dict[str, torch.Tensor], dict[str, int]]:
    """Losses, weights and ranks of a short run that shrinks, of a model whose layers share inputs."""
    model = make_llama().train()
    adapters = ra.attach(model, rank=6, modules_to_save=())
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(fraction=0.5, every=2), 12)
    losses = train(controller, optimizer, 12, lambda step: model(ids := token_ids(step), labels=ids).loss)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return losses, weights, adapters.ranks()
