"""Optimizers whose state rankalloc follows: torch's, transformers' Adafactor, and bitsandbytes' with 8-bit codes."""

from __future__ import annotations

import torch
from transformers import Adafactor

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adam, foreach, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd, momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "torch's adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "transformers' adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9),
    "transformers' adafactor, own rate": lambda p: Adafactor(p, relative_step=True, warmup_init=True),
}
"""{name: parameters -> optimizer}."""


def _bitsandbytes(name, **options):
    def make(parameters):
        import bitsandbytes  # a second of its own

        return getattr(bitsandbytes.optim, name)(parameters, **options)

    return make


EIGHT_BIT = {
    "adamw": _bitsandbytes("AdamW8bit", lr=1e-2), "adamw, 32 bit": _bitsandbytes("AdamW32bit", lr=1e-2),
    "lion": _bitsandbytes("Lion8bit", lr=1e-3), "sgd": _bitsandbytes("SGD8bit", lr=1e-2, momentum=0.9),
    "paged adamw": _bitsandbytes("PagedAdamW8bit", lr=1e-2),
}
"""The same of bitsandbytes, whose state is 8-bit for parameters of 4096 numbers and more."""
