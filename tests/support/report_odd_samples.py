"""Runs at the edges for the report's tests: tiny, empty, hostile, two stacks, very many layers."""

from __future__ import annotations

from rankalloc.trace import AllocationRecord, LayerRecord, LogRecord, RankTrace, ScoreRecord
from tests.support.report_samples import run


def one_layer() -> RankTrace:
    layer = LayerRecord(name="head", kind="linear", block=None, role="head", d_in=8, d_out=4, initial_rank=4)
    return run(target=2, layers=[layer], name="one")


def bare() -> RankTrace:
    """Nothing but what a trace must have: no allocations, scores, logs, environment."""
    full = run()
    return RankTrace(
        created="2025-03-01T12:00:00+00:00",
        method="adalora",
        alpha=16,
        rank=12,
        scaling=1.0,
        layers=full.layers,
        budget=full.budget,
    )


def all_zero() -> RankTrace:
    """Every layer pruned away, every score zero."""
    trace = run()
    last = trace.allocations[-1].model_copy(
        update={"ranks": [0] * 36, "reached": 0, "lowest_kept": None, "highest_dropped": 0.0}
    )
    budget = trace.budget.model_copy(update={"target": 0})
    scores = ScoreRecord(
        score="magnitude", step=210, kept=[[] for _ in range(36)], dropped=[[0.0] * 12 for _ in range(36)]
    )
    return trace.model_copy(
        update={
            "allocations": [*trace.allocations[:-1], last],
            "budget": budget,
            "scores": scores,
            "singular_values": [[] for _ in range(36)],
            "adapter_params_final": 0,
        }
    )


HOSTILE = [
    "<script>alert(1)</script>",
    'a"onmouseover="alert(2)',
    "</script><img src=x onerror=alert(3)>",
    "$x^2$ & ]]>",
    "=HYPERLINK(1)",
    "_hidden 'quote' {{ 7 * 7 }} #0a0101",
    "層\u202e\x07",
    "</style></svg>",
    "long." * 58 + "</td><b>ab",  # 300 characters
]


def hostile() -> RankTrace:
    """Names as data: markup, quotes, formulas, control characters, template syntax, in every text field."""
    layers = [
        LayerRecord(name=name, kind="linear", block=None if i % 2 else i, role=name, d_in=8, d_out=8, initial_rank=4)
        for i, name in enumerate(HOSTILE)
    ]
    trace = run(
        target=16,
        layers=layers,
        name=HOSTILE[0],
        command=HOSTILE[2],
        model=HOSTILE[1],
        method=HOSTILE[5],
        alerts=[HOSTILE[2]],
        config={HOSTILE[0]: HOSTILE[2]},
        heads={HOSTILE[2]: 3},
    )
    logs = [LogRecord(step=s, values={name: 1.0 / s for name in HOSTILE}) for s in range(1, 12)]
    return trace.model_copy(update={"logs": logs})


def mixed() -> RankTrace:
    """Layers outside a stack beside a stack, and two stacks that share roles and indices."""
    layers = [
        LayerRecord(
            name="embeddings.word",
            kind="embedding",
            block=None,
            role="embeddings.word",
            d_in=3000,
            d_out=64,
            initial_rank=8,
        )
    ]
    for stack in ("encoder", "decoder"):
        layers += [
            LayerRecord(
                name=f"{stack}.block.{b}.{role}", kind="linear", block=b, role=role, d_in=64, d_out=64, initial_rank=8
            )
            for b in range(4)
            for role in ("q", "v")
        ]
    layers.append(
        LayerRecord(
            name="pooler.dense", kind="linear", block=None, role="pooler.dense", d_in=64, d_out=64, initial_rank=8
        )
    )
    return run(target=60, layers=layers, name="two stacks")


def llama(blocks: int = 32) -> RankTrace:
    """224 layers: 32 blocks of seven."""
    shapes = {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (576, 192),
        "self_attn.v_proj": (576, 192),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (576, 1536),
        "mlp.up_proj": (576, 1536),
        "mlp.down_proj": (1536, 576),
    }
    layers = [
        LayerRecord(
            name=f"model.layers.{b}.{role}", kind="linear", block=b, role=role, d_in=i, d_out=o, initial_rank=16
        )
        for b in range(blocks)
        for role, (i, o) in shapes.items()
    ]
    return run(target=1792, layers=layers, name="llama-like", rank=16, scaling=1.0)


def two_layers(unit="ranks", ranks=(3, 1), target=4, **changes):
    """A wide and a narrow layer: costs 10 and 30 a rank."""
    layers = [
        LayerRecord(name="a.0.q", kind="linear", block=0, role="q", d_in=4, d_out=6, initial_rank=4),
        LayerRecord(name="a.1.q", kind="linear", block=1, role="q", d_in=10, d_out=20, initial_rank=4),
    ]
    full = run()
    spent = sum(r * (1 if unit == "ranks" else c) for r, c in zip(ranks, (10, 30), strict=True))
    budget = full.budget.model_copy(update={"unit": unit, "target": target, "initial": 8 if unit == "ranks" else 160})
    base = {
        "layers": layers,
        "budget": budget,
        "scores": None,
        "singular_values": None,
        "allocations": [AllocationRecord(step=30, asked=target, reached=spent, ranks=list(ranks))],
    }
    return full.model_copy(update=base | changes)
