"""Extracting an adapter of a base from a fully fine-tuned checkpoint, within an exact budget.

For each matrix, Δ = W_tuned − W_base has the singular values σ. Keeping the largest is the best approximation of its
rank in the Frobenius norm (Eckart and Young, 1936), so the allocator chooses over all layers with scores σ² and the
budget's costs. Both checkpoints are streamed: memory never holds more than a few copies of the largest matrix for each
of torch's threads, and the factors that the budget pays for. Factors wait on disk, beside the result, until the choice
is made.

Cost: one decomposition for each matrix (:mod:`rankalloc.posthoc.dense`), as many at a time as torch has threads. Known
weakness: full fine-tuning moves every direction a little, and a change spread over all directions has no low rank; the
error of each layer measures it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from ..budget import LayerShape, RankBudget
from ..errors import AdapterFileError, ConfigError, did_you_mean, unknown
from ..files import write_json
from ..layer_names import places
from ..layers.adaptable import kind_of
from ..layers.targets import ALL_LINEAR, find_heads, find_targets
from ..layers.tied import partners
from ..methods.allocators import ALLOCATORS, Demand
from ..options import integer
from ..storage import fingerprint, plain_lora
from ..storage.folder import require_destination, stored_size
from ..storage.peft_names import KEY, as_parameters, is_parameter
from ..storage.plain_lora import PlainLora
from ..storage.readers import layout_for
from ..storage.skeletons import build_skeleton
from .checkpoints import Checkpoint
from .differences import decompose
from .results import EXTRACTION_NAME, ExtractedLayer, Extraction

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_EMBEDDING = re.compile(r"(^|\.)([a-z_]*embed[a-z_]*|wte|wpe|shared|lm_head|classifier|score|qa_outputs)\.", re.I)


def extract(
    base: str | os.PathLike, tuned: str | os.PathLike, budget: RankBudget, out: str | os.PathLike, *, rank: int = 64,
    allocator: str = "global", layout: str | None = None, pad_to: int = 1, reader: str | None = None,
    dtype: str = "float32",
    modules_to_save: Sequence[str] = (), model: nn.Module | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Extraction:
    """Write the adapter of ``base`` that comes closest to ``tuned`` within ``budget``.

    A head that the base lacks, or has for other labels, is stored whole; so are embeddings that have grown, where
    ``modules_to_save`` names them, and the base must then be given as many rows.

    Args:
        base, tuned: folders with ``model.safetensors`` or its index, or those files themselves, of one model.
        budget: ``fraction`` is relative to the parameters of ``rank`` in every layer; the schedule is ignored.
        out: the adapter's folder.
        rank: the highest rank that a layer can get.
        allocator: key of ``rankalloc.ALLOCATORS``; its scores are σ².
        layout, pad_to, reader: see :func:`rankalloc.save`.
        dtype: of the factors: float32, float16 or bfloat16; ``budget.bytes`` counts in it.
        modules_to_save: modules to copy whole, such as a classifier that was trained; no budget counts them.
        model: the model whose layers are adapted, on the meta device or not; None builds it from the base's
            config.json, or without one goes by names and shapes.
        progress: called with (done, all, name) before each tensor.

    Raises:
        AdapterFileError: a checkpoint is missing, damaged or a pickle, names or shapes differ, or a weight is not
            finite.
        BudgetError: the budget is above what ``rank`` allows, or below its floor.
        ConfigError: an option does not exist or is out of range.
    """
    written = layout_for(layout, pad_to, reader)
    rank = integer("rank", rank, 1)
    if dtype not in _DTYPES:
        raise ConfigError(unknown("dtype", dtype, _DTYPES))
    if allocator not in ALLOCATORS:
        raise ConfigError(unknown("allocator", allocator, ALLOCATORS))
    require_destination(out, base, tuned)
    old, new = Checkpoint(base), Checkpoint(tuned)
    notes: list[str] = []
    common = _common_part(old, new, modules_to_save, notes)
    modules_to_save = sorted({*modules_to_save, *common.whole})
    if model is None and (old.folder / "config.json").is_file():
        model = build_skeleton(str(old.folder))
    turned = _targets(old, model, notes)
    heads = _heads(new, modules_to_save)
    copies = _copies(model, modules_to_save, new)
    shared = {key for key in common.keys if key not in heads}
    turned = {name: flag for name, flag in turned.items() if f"{name}.weight" in shared}
    shapes = [_shape(name, old.shapes[f"{name}.weight"], turned[name], rank) for name in turned]
    demand = _demand(budget, shapes, rank, _DTYPES[dtype].itemsize)

    parent = Path(out).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{Path(out).name}.") as waiting:
        found, leftovers = decompose(
            old, new, {s.name: (s.rank, turned[s.name]) for s in shapes}, shared, Path(waiting), progress
        )
        scores = [np.pad(found[s.name].sigma ** 2, (0, s.rank - len(found[s.name].sigma))) for s in shapes]
        kept = [int(mask.sum()) for mask in ALLOCATORS[allocator](scores, demand)]
        lora = PlainLora({}, config={"fan_in_fan_out": any(turned.values())})
        layers = []
        for shape, asked in zip(shapes, kept, strict=True):
            part = found[shape.name]
            # triplets of zeros are useless, but a floor or a multiple requires them
            exact_ranks = budget.min_rank or budget.multiple_of > 1
            lora.pairs[shape.name] = _factors(part.file, asked, bool(exact_ranks), _DTYPES[dtype])
            energy = (part.sigma[:asked] ** 2).sum()
            layers.append(ExtractedLayer(
                shape.name, shape.d_in, shape.d_out, len(lora.pairs[shape.name][0]), part.change, part.relative,
                float(max(0.0, part.change**2 - energy)) ** 0.5, part.exact,
            ))
    if not heads and not any(layer.change for layer in layers):
        raise ConfigError(f"no matrix of {tuned} differs from {base}, so there is nothing to extract")
    unused = sum(kept) - sum(layer.rank for layer in layers)
    if unused:
        notes.append(f"{unused} of the {sum(kept)} ranks that the budget pays for were not needed: no more has changed")
    lora.heads = {key: new[key].clone() for key in heads} | {key: new[of].clone() for key, of in copies.items()}
    lora.config["modules_to_save"] = sorted({*modules_to_save, *(key.rpartition(".")[0] for key in copies)}) or None
    lora.config["base_model_name_or_path"] = str(base)
    lora.config[KEY] = as_parameters(_config(old).get("model_type"), lora.pairs)
    mark = fingerprint.of_weights(turned, lambda name: old[f"{name}.weight"], _config(old))
    lora.metadata[fingerprint.KEY] = mark.encode()
    plain_lora.write(lora, out, written, _suffixes(lora, old))
    leftovers.sort(key=lambda row: (-row.relative, row.name))
    stored = stored_size(plain_lora.to_write(lora), written)
    done = Extraction(Path(out), layers, leftovers, lora.num_params(), stored, notes)
    write_json(Path(out) / EXTRACTION_NAME, done.record())
    return done


@dataclass(frozen=True)
class _Common:
    """What two checkpoints share: ``keys`` of the same shapes, and ``whole``, the modules of the tuned one that the
    base lacks or has in another size, which only a copy can carry."""

    keys: list[str]
    whole: list[str]


def _common_part(old: Checkpoint, new: Checkpoint, asked: Sequence[str], notes: list[str]) -> _Common:
    """Compare names and shapes. Heads may differ, and embeddings may have grown; what else differs makes the two
    different models.

    Raises:
        AdapterFileError: they are not of one model.
    """
    keys = [key for key, shape in old.shapes.items() if new.shapes.get(key) == shape]
    unlike = [key for key in (*old.shapes, *new.shapes) if old.shapes.get(key) != new.shapes.get(key)]
    for key in dict.fromkeys(unlike):
        (block, _), = places([key])
        shapes = [checkpoint.shapes.get(key) for checkpoint in (old, new)]
        rows_only = None not in shapes and shapes[0][1:] == shapes[1][1:]  # type: ignore[index]
        if block is not None or not keys or not (None in shapes or rows_only):
            raise AdapterFileError(_unlike(old, new, key))
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in unlike if key in new.shapes))
    grown = [name for name in modules if _is_vocabulary(f"{name}.weight", new)]
    gone = list(dict.fromkeys(key.rpartition(".")[0] for key in unlike if key not in new.shapes))
    whole = [name for name in modules if name not in grown or name in asked]
    for name in grown:
        if name not in asked:
            rows = [checkpoint.shapes.get(f"{name}.weight", (0,))[0] for checkpoint in (new, old)]
            notes.append(
                f"{name} has {rows[0]:,} rows in {new.path} and {rows[1]:,} in the base, and is left out: give the "
                f"base as many, and store it whole with --save-module {name}"
            )
    notes += [f"{name} is not in the base, or of another size there, and is stored whole" for name in whole]
    if gone:
        more = f" and {len(gone) - 1} more modules" if len(gone) > 1 else ""
        notes.append(f"{gone[0]}{more} of the base are not in {new.path}: nothing to extract there")
    return _Common(keys, whole)


def _is_vocabulary(key: str, new: Checkpoint) -> bool:
    """Whether a matrix has a row for each token: too large to be stored unasked."""
    return len(new.shapes.get(key, ())) == 2 and new.shapes[key][0] >= 1_000


def _unlike(old: Checkpoint, new: Checkpoint, key: str) -> str:
    for one, other in ((old, new), (new, old)):
        if key not in other.shapes:
            missing = [name for name in one.shapes if name not in other.shapes]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            return (
                f"{other.path} is not a fine-tune of the same model: it has no {key}{more}, which {one.path} has"
                f"{did_you_mean(key, other.shapes)}"
            )
    return (
        f"{new.path} is not a fine-tune of the same model: {key} is {new.shapes[key]} there and {old.shapes[key]} in "
        f"{old.path}"
    )


def _targets(old: Checkpoint, model: nn.Module | None, notes: list[str]) -> dict[str, bool]:
    """{name of a module to adapt: whether its weight is stored transposed}."""
    if model is not None:
        layers = find_targets(model, ALL_LINEAR, heads=find_heads(model))
        found = {n: kind_of(m) == "conv1d" for n, m in layers.items() if len(old.shapes.get(f"{n}.weight", ())) == 2}
        if not found:
            raise AdapterFileError(
                f"{old.path} is not a checkpoint of {type(model).__name__}: it holds none of its layers "
                f"({next(iter(layers))} the first)"
            )
        return found
    notes.append("there is no config.json beside the base, so its layers were told from embeddings and heads by name")
    found = {
        key.removesuffix(".weight"): False for key, shape in old.shapes.items()
        if len(shape) == 2 and key.endswith(".weight") and min(shape) > 1 and not _EMBEDDING.search(key)
    }
    if not found:
        raise AdapterFileError(f"{old.path} holds no weight matrix that could carry an adapter")
    return found


def _copies(model: nn.Module | None, modules: Sequence[str], new: Checkpoint) -> dict[str, str]:
    """{key of a module that shares its weight with one that is stored whole: key of that one}: the file has a copy for
    each, as PEFT gives each its own, and a checkpoint has one for all."""
    if model is None:
        return {}
    names = dict(model.named_modules())
    return {
        f"{partner}.weight": f"{name}.weight" for name in modules if name in names for partner in partners(model, name)
        if f"{partner}.weight" not in new.shapes and f"{name}.weight" in new.shapes
    }


def _heads(new: Checkpoint, modules: Sequence[str]) -> set[str]:
    """The keys of the modules that are copied whole."""
    keys: set[str] = set()
    for module in modules:
        under = {key for key in new.shapes if key.startswith(module + ".")}
        if not under:
            names = sorted({key.rsplit(".", 1)[0] for key in new.shapes})
            near = did_you_mean(module, names)
            raise ConfigError(f"modules_to_save names {module!r}, which {new.path} does not have{near}")
        keys |= under
    return keys


def _shape(name: str, stored: tuple[int, ...], turned: bool, rank: int) -> LayerShape:
    d_out, d_in = reversed(stored) if turned else stored
    return LayerShape(name, d_in, d_out, min(rank, d_in, d_out))


def _demand(budget: RankBudget, shapes: list[LayerShape], rank: int, bytes_per_param: int) -> Demand:
    step = budget.multiple_of
    shapes = [LayerShape(s.name, s.d_in, s.d_out, s.rank // step * step) for s in shapes]
    plan = budget.resolve(
        shapes, bytes_per_param=bytes_per_param, most=f"that rank={rank} allows", way_out="lower it, or raise rank"
    )
    return Demand.of(plan, plan.target)


def _factors(file: Path, rank: int, pad: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of the ``rank`` largest triplets in a file; ``pad`` adds zeros where there are fewer."""
    parts = load_file(file)
    a, b = parts["A"][:rank].to(dtype).clone(), parts["B"][:, :rank].to(dtype).clone()
    missing = rank - len(a) if pad else 0
    return torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), missing)], dim=1)


def _config(old: Checkpoint) -> dict[str, Any]:
    """The base's config.json; {} when there is none."""
    try:
        values = json.loads((old.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _suffixes(lora: PlainLora, old: Checkpoint) -> list[str] | None:
    """Short names if they name exactly the adapted matrices of the checkpoint; else None."""
    written = {name for name, rank in lora.ranks().items() if rank}
    if written != set(lora.pairs):
        return None
    written = {name for name in written if not is_parameter(name, lora.config[KEY])}
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in written})
    modules = {key.rsplit(".", 1)[0] for key in old.shapes}
    hit = {name for name in modules if name.rsplit(".", 1)[-1] in suffixes}
    return suffixes if hit == written else None
