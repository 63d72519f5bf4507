"""Records for the report's tests, made by a small simulation of an allocation on MiniLM's shapes."""

from __future__ import annotations

import math

import numpy as np

from rankalloc.trace import (
    AllocationRecord,
    BudgetRecord,
    EnvironmentRecord,
    EvaluationRecord,
    LayerRecord,
    LogRecord,
    PairRecord,
    RankTrace,
    ScoreRecord,
    SweepRecord,
    TrialRecord,
)

ROLES = {
    "attention.self.query": (384, 384, 0.7),
    "attention.self.key": (384, 384, 0.6),
    "attention.self.value": (384, 384, 1.5),
    "attention.output.dense": (384, 384, 1.3),
    "intermediate.dense": (384, 1536, 0.9),
    "output.dense": (1536, 384, 1.0),
}


def minilm_layers(blocks: int = 6, initial: int = 12) -> list[LayerRecord]:
    return [
        LayerRecord(
            name=f"bert.encoder.layer.{b}.{role}",
            kind="linear",
            block=b,
            role=role,
            d_in=d_in,
            d_out=d_out,
            initial_rank=initial,
        )
        for b in range(blocks)
        for role, (d_in, d_out, _) in ROLES.items()
    ]


def simulate(layers: list[LayerRecord], target: int, steps: int = 240, every: int = 10, seed: int = 0):
    """Scores with noise, the global top b(t) kept at each allocation: what a real run records."""
    rng = np.random.default_rng(seed)
    depth = max((layer.block or 0 for layer in layers), default=0) or 1
    strength = [
        ROLES.get(layer.role, (0, 0, 1.0))[2] * (0.5 + (layer.block or 0) / depth) * rng.lognormal(0, 0.25)
        for layer in layers
    ]
    true = [
        s * np.exp(-0.28 * np.arange(layer.initial_rank)) * rng.lognormal(0, 0.3, layer.initial_rank)
        for s, layer in zip(strength, layers, strict=True)
    ]
    where = [(i, k) for i, layer in enumerate(layers) for k in range(layer.initial_rank)]
    start, warmup, freeze = len(where), 20, steps - 30
    alive, events, scores = set(where), [], None
    for step in range(warmup + every, freeze + 1, every):
        left = 1 - (step - warmup) / (freeze - warmup)
        budget = round(target + (start - target) * left**3)
        noise = rng.lognormal(0, 0.45 * (0.25 + left), len(where))
        values = {key: 1e-3 * true[key[0]][key[1]] * n for key, n in zip(where, noise, strict=True)}
        kept = set(sorted(where, key=lambda key: (-values[key], key))[:budget])
        ranks = [sum((i, k) in kept for k in range(layer.initial_rank)) for i, layer in enumerate(layers)]
        gone = [values[key] for key in where if key not in kept]
        events.append(
            AllocationRecord(
                step=step,
                asked=budget,
                reached=sum(ranks),
                ranks=ranks,
                lowest_kept=min(values[k] for k in kept),
                highest_dropped=max(gone, default=None),
                dropped=len(alive - kept),
                returned=len(kept - alive),
            )
        )
        scores = ScoreRecord(
            score="sensitivity",
            step=step,
            kept=[
                sorted((values[i, k] for k in range(la.initial_rank) if (i, k) in kept), reverse=True)
                for i, la in enumerate(layers)
            ],
            dropped=[
                sorted((values[i, k] for k in range(la.initial_rank) if (i, k) not in kept), reverse=True)
                for i, la in enumerate(layers)
            ],
        )
        alive = kept
    sigma = [
        sorted((float(0.3 * true[i][k]) for k in range(la.initial_rank) if (i, k) in alive), reverse=True)
        for i, la in enumerate(layers)
    ]
    return events, scores, sigma


def run(blocks: int = 6, target: int = 216, seed: int = 0, **changes) -> RankTrace:
    """A finished MiniLM-like run: 36 layers, 432 ranks down to 216, 19 allocations."""
    layers = changes.pop("layers", None) or minilm_layers(blocks)
    steps = 240
    events, scores, sigma = simulate(layers, target, steps, seed=seed)
    rng = np.random.default_rng(seed + 1)
    logs = []
    for step in range(5, steps + 1, 5):
        values = {"loss": 0.45 + 1.6 * math.exp(-step / 40) + 0.02 * float(rng.normal()), "learning_rate": 4e-3}
        if step % 40 == 0:
            values |= {"eval_loss": 0.46 + 1.3 * math.exp(-step / 45), "eval_f1": 0.515 - 0.4 * math.exp(-step / 60)}
        logs.append(LogRecord(step=step, values=values))
    losses = rng.gamma(2.0, 0.22, 400)
    ranks = events[-1].ranks
    base = {
        "created": "2025-03-01T12:00:00+00:00",
        "name": "punctuation",
        "method": "adalora",
        "method_options": {"beta1": 0.85, "beta2": 0.85},
        "config": {"task": "punctuation", "lr": 0.004, "rank": 12},
        "model": "all-MiniLM-L6-v2",
        "command": "rankalloc train punctuation --rank 12 --budget 216 --seed 0",
        "data_fingerprint": "sha256:5b1c",
        "seed": seed,
        "alpha": 16.0,
        "rank": 12,
        "scaling": 16 / 12,
        "layers": layers,
        "heads": {"classifier": 9240},
        "budget": BudgetRecord(
            given={"ranks": target},
            unit="ranks",
            target=target,
            initial=sum(la.initial_rank for la in layers),
            min_rank=0,
            max_rank=None,
            multiple_of=1,
            shape="cubic",
            total_steps=steps,
            warmup_steps=20,
            freeze_step=210,
            allocate_every=10,
        ),
        "allocations": events,
        "scores": scores,
        "singular_values": sigma,
        "logs": logs,
        "evaluations": [
            EvaluationRecord(split="tune", examples=400, metrics={"loss": 0.452, "f1": 0.512}),
            EvaluationRecord(
                split="report",
                examples=400,
                metrics={"loss": float(losses.mean()), "f1": 0.508},
                example_losses=[float(x) for x in losses],
            ),
        ],
        "steps_done": steps,
        "adapter_params_initial": sum(la.initial_rank * (la.d_in + la.d_out) for la in layers),
        "adapter_params_final": sum(r * (la.d_in + la.d_out) for r, la in zip(ranks, layers, strict=True)),
        "allocator_state_bytes": 663_552,
        "wall_seconds": 148.2,
        "step_seconds_before_freeze": 0.612,
        "step_seconds_after_freeze": 0.574,
        "environment": EnvironmentRecord(
            python="3.11.7",
            platform="Linux-x86_64",
            device="cpu",
            threads=2,
            versions={"rankalloc": "0.1.0", "torch": "2.13.0"},
            git_hash="0123abc",
        ),
        "finished": True,
    }
    return RankTrace(**(base | changes))


def uniform_run(seed: int = 0, rank: int = 6) -> RankTrace:
    """The control: every layer at ``rank`` from the first step to the last."""
    layers = minilm_layers(initial=rank)
    budget = run(seed=seed).budget.model_copy(update={"initial": 36 * rank, "target": 36 * rank})
    size = sum(rank * (la.d_in + la.d_out) for la in layers)
    return run(seed=seed + 40).model_copy(
        update={
            "name": "uniform",
            "method": "uniform",
            "layers": layers,
            "rank": rank,
            "budget": budget,
            "allocations": [],
            "scores": None,
            "singular_values": None,
            "adapter_params_initial": size,
            "adapter_params_final": size,
        }
    )


def sweep(low: float = -0.012, high: float = 0.004, seed: int = 3) -> SweepRecord:
    """24 trials, a front, importances, and a pair whose interval is ``low`` to ``high``."""
    rng = np.random.default_rng(seed)
    trials = []
    for n in range(24):
        uniform = n in (0, 5, 11, 17)
        rank, lr = int(rng.choice([2, 4, 8, 12])), float(10 ** rng.uniform(-3.3, -2))
        params = {
            "method": "uniform" if uniform else str(rng.choice(["adalora", "canonical"])),
            "rank": rank,
            "lr": lr,
            "alpha": float(rng.choice([8, 16, 32])),
        }
        size = 36 * rank * (800 if uniform else int(rng.integers(801, 880)))
        value = 0.44 + 0.05 / rank + 0.02 * (math.log10(lr) + 2.5) ** 2 + 0.004 * float(rng.normal())
        role = "uniform control" if n == 0 else "start" if n == 1 else "matched control" if n == 17 else "sampled"
        trials.append(
            TrialRecord(
                number=n,
                state="complete",
                role=role,
                params=params,
                value=value,
                metrics={"loss": value},
                ranks=36 * rank,
                adapter_params=size,
                seconds=60 + 4.0 * rank,
                trace=f"trials/{n:04d}/trace.json",
            )
        )
    trials[7] = TrialRecord(
        number=7, state="failed", params=trials[7].params, message="loss became non-finite at step 41"
    )
    done = [t for t in trials if t.state == "complete"]
    best = min((t for t in done if t.params["method"] != "uniform"), key=lambda t: t.value)
    front, least = [], math.inf
    for t in sorted(done, key=lambda t: (t.adapter_params, t.value)):
        if t.value < least:
            least = t.value
            front.append(t.number)
    fitting = [t for t in done if t.params["method"] == "uniform" and t.adapter_params <= best.adapter_params]
    control = min(fitting, key=lambda t: t.value)
    ahead, behind = (0.511, 0.508) if low + high < 0 else (0.508, 0.511)
    pair = PairRecord(
        adaptive=best.number,
        uniform=control.number,
        metric="f1",
        adaptive_metrics={"loss": 0.449, "f1": ahead},
        uniform_metrics={"loss": 0.453, "f1": behind},
        difference=(low + high) / 2,
        low=low,
        high=high,
        p_value=0.34,
        examples=400,
    )
    return SweepRecord(
        created="2025-03-01T14:00:00+00:00",
        name="punctuation sweep",
        task="punctuation",
        metric="loss",
        direction="minimize",
        space={"rank": [2, 4, 8, 12], "lr": {"low": 5e-4, "high": 1e-2, "log": True}},
        storage="study.log",
        command="rankalloc sweep punctuation --trials 24",
        config={"trials": 24},
        trials=trials,
        best=best.number,
        front=front,
        importances={"lr": 0.61, "rank": 0.27, "alpha": 0.08, "method": 0.04},
        pair=pair,
        seconds=1900.0,
    )


def sweep_folder(folder, **changes) -> SweepRecord:
    """Write a sweep with the traces of its best trial and of the uniform one beside it."""
    record = sweep(**changes)
    record.save(folder / "sweep.json")
    for number, trace in ((record.best, run()), (record.pair.uniform, uniform_run())):
        trace.save(folder / record.trial(number).trace)
    return record
