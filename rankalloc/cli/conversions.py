"""``export``, ``import`` and ``extract``: adapters in other tools' formats, and from checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import AdapterOutput, Command, For, Json, Layout, PadTo, TrustRemoteCode, declare
from .output import count, number, results_only, say, show, show_json, show_table, stored_text
from .progress import Bar

_SHOWN = 10


def export(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA, saved by rankalloc or PEFT.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUT", help="Folder; a file for kohya, diffusers and gguf.")
    ],
    reader: Annotated[
        str | None,
        typer.Option("--for", metavar="READER", help="The reader: peft, vllm, llama.cpp, tgi, diffusers or kohya."),
    ] = None,
    layout: Layout = None,
    pad_to: PadTo = 1,
    form: Annotated[
        str | None, typer.Option("--format", metavar="F", help="In the place of --for: peft, kohya, diffusers or gguf.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", metavar="P", help="Of a file's names: lora_unet, lora_te, ...; diffusers: unet, ..."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="For gguf: the base. [default: as the adapter says]")
    ] = None,
) -> None:
    """Write a finished adapter in the format that another tool reads.

    The adapter computes the same function.
    """
    with results_only():
        from ..storage.exporting import write_export

        if base is not None:
            from ..experiments.tasks.packages import reference_of

            base = reference_of(base)
        done = write_export(
            adapter, output, reader=reader, layout=layout, pad_to=pad_to, format=form, prefix=prefix, base=base
        )
    show(f"wrote {output}: {stored_text(done.params, done.stored, done.padding_bytes, reader)}")


def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A kohya, diffusers or bare PEFT .safetensors file.")],
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The base model: a folder or a hub id.")],
    output: AdapterOutput,
    component: Annotated[
        str | None, typer.Option("--component", metavar="C", help="Which part of the file: unet, text_encoder, ...")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Turn another tool's LoRA file into an adapter folder.

    Of the model only the configuration is read: its layers are needed to resolve kohya's names.
    """
    with results_only():
        from ..experiments.tasks.packages import reference_of
        from ..storage.importing import import_lora
        from ..storage.skeletons import build_skeleton

        model = build_skeleton(reference_of(base), trust_remote_code)
        lora = import_lora(file, model, output, component=component)
    show(f"wrote {output}: {count(len(lora.pairs), 'layer')}, {number(lora.num_params())} parameters")


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or safetensors file of the base.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Folder or safetensors file of the fine-tuned model.")],
    output: AdapterOutput,
    ranks: Annotated[int | None, typer.Option("--ranks", metavar="N", help="Budget: ranks of all layers.")] = None,
    params: Annotated[int | None, typer.Option("--params", metavar="N", help="Budget: parameters.")] = None,
    bytes_: Annotated[int | None, typer.Option("--bytes", metavar="N", help="Budget: bytes, in --dtype.")] = None,
    fraction: Annotated[
        float | None,
        typer.Option("--fraction", metavar="X", help="Budget: share of the parameters of --rank in every layer."),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", min=1, metavar="R", help="The highest rank of a layer.")] = 64,
    reader: For = None,
    layout: Layout = None,
    pad_to: PadTo = 1,
    dtype: Annotated[str, typer.Option("--dtype", metavar="T", help="float32, float16 or bfloat16.")] = "float32",
    modules_to_save: Annotated[
        list[str] | None, typer.Option("--save-module", metavar="NAME", help="Store a module whole. Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a fully fine-tuned checkpoint into an adapter of its base, within a budget.

    Both are read tensor by tensor. Changes that low-rank matrices cannot hold are left out and listed.
    """
    with results_only(), Bar() as bar:
        from ..budget import RankBudget
        from ..posthoc.extracting import extract as run

        budget = RankBudget(ranks=ranks, params=params, bytes=bytes_, fraction=fraction)
        done = run(
            base, tuned, budget, output, rank=rank, layout=layout, pad_to=pad_to, reader=reader, dtype=dtype,
            modules_to_save=modules_to_save or (),
            progress=lambda done, total, name: bar(done, total, {"tensor": name}),
        )
        for note in done.notes:
            say(note)
    if as_json:
        return show_json(done.record())
    show(f"wrote {output}: {done}")
    rows = [
        (layer.name, layer.rank, number(layer.relative), number(layer.error / layer.change if layer.change else 0.0))
        for layer in done.layers
    ]
    show_table(rows, ("layer", "rank", "change", "error"), right=(1, 2, 3))
    if done.leftovers:
        show("left out, by relative change:")
        show_table([("", row.name, number(row.relative)) for row in done.leftovers[:_SHOWN]], right=(2,))
        if len(done.leftovers) > _SHOWN:
            show(f"  and {len(done.leftovers) - _SHOWN} more (all of them with --json)")


COMMANDS: dict[str, Command] = {
    "export": (
        export, "rankalloc export out/adapter --for tgi -o out/served",
        "rankalloc export out/adapter --for llama.cpp --base ./my-model -o out/adapter.gguf",
        "rankalloc export out/adapter --for kohya --prefix lora_te -o out/lora.safetensors",
    ),
    "import": (
        import_, "rankalloc import lora.safetensors --base ./my-model -o out/adapter",
        "rankalloc import lora.safetensors --base ./text-encoder --component text_encoder -o out/adapter",
    ),
    "extract": (
        extract, "rankalloc extract ./base ./tuned --params 2000000 -o out/adapter",
        "rankalloc extract ./base ./tuned --ranks 448 --save-module classifier -o out/adapter --json",
    ),
}


def register(app: typer.Typer) -> None:
    """Add the commands of this file to ``app``."""
    declare(app, COMMANDS)
