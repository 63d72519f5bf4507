"""What an optimizer remembers of an adapter's gradients, carried to another basis (:mod:`.canonical`).

First moments follow a change of basis as the gradient does. Squared gradients follow with the squared coefficients, as
if entries were uncorrelated; of Adafactor's factored ones only the factor that counts triplets changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..errors import NotAdaptedError, RankallocError
from . import eight_bit
from .adapter import Adapter
from .memory import unwrap

_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")
# factored second moments (Adafactor): means over columns, and over rows
_ROWS, _COLUMNS = ("exp_avg_sq_row", "row_var"), ("exp_avg_sq_col", "col_var")

Turn = Callable[[str, bool, torch.dtype], torch.Tensor]
"""(factor "p", "lam" or "q", squared, dtype) -> what its gradient is multiplied by, (r, r): "p" and "lam" on the
right, "q" on the left."""


def check(adapters: Iterable[Adapter], optimizer: torch.optim.Optimizer | None) -> None:
    """Make sure at the first step that the optimizer's memory can follow a change of basis.

    Raises:
        NotAdaptedError: no optimizer is given.
        RankallocError: it remembers something that cannot be carried over.
    """
    if optimizer is None:
        raise NotAdaptedError(
            "changing the basis needs the optimizer: call controller.update(optimizer), or use canonical=False"
        )
    for adapter in adapters:
        carry(adapter, optimizer, None)


def carry(adapter: Adapter, optimizer: torch.optim.Optimizer, turn: Turn | None) -> None:
    """Carry the optimizer's memory of one adapter over; without ``turn``, only look whether that could be done.

    Raises:
        RankallocError: it remembers something that cannot be carried over.
    """
    optimizer = unwrap(optimizer)
    for parameter, name in ((adapter.P, "p"), (adapter.lam, "lam"), (adapter.Q, "q")):
        state = optimizer.state.get(parameter, {})
        for key, value in list(state.items()):
            if not isinstance(value, torch.Tensor) or value.dim() == 0 or eight_bit.belongs_to_packed(state, key):
                continue
            if parameter.dim() == 2 and key in (*_ROWS, *_COLUMNS):
                if turn is not None and (key in _COLUMNS) == (name == "p"):
                    matrix, flat = turn(name, True, torch.float64), value.double().flatten()
                    value.copy_((matrix @ flat if name == "q" else flat @ matrix).reshape(value.shape))
                continue
            plain = "first" if key in _FIRST else "second" if key in _SECOND else None
            order = eight_bit.meaning(optimizer, key) or plain
            if order is None or value.shape != parameter.shape:
                raise RankallocError(
                    f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)}, which cannot be carried to "
                    "another basis; use AdamW, Adafactor or SGD, or the option canonical=False"
                )
            if turn is None:
                continue
            is_packed = eight_bit.is_packed(state, key)
            old = eight_bit.unpacked(state, key) if is_packed else value
            old = old.to(torch.promote_types(old.dtype, torch.float32))
            matrix = turn(name, order == "second", old.dtype)
            new = matrix @ old if name == "q" else old @ matrix
            if is_packed:
                state.update(eight_bit.packed(state, key, new))
            else:
                value.copy_(new)
