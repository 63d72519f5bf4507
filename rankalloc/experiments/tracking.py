"""Sending a run's curves, ranks and report to wandb, if ``tracking: wandb`` asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..errors import RankallocError
from ..trace import RankTrace
from ..training.callback import RankCallback
from .config import RunConfig
from .run_folder import RunFolder


def trackers(config: RunConfig, folder: Path, ranking: RankCallback) -> list[WandbCallback]:
    """The callbacks that ``config.tracking`` asks for: none, or one for wandb."""
    return [WandbCallback(config, folder, ranking)] if config.tracking == "wandb" else []


class WandbCallback(TrainerCallback):
    """Logs the trace's content: curves, and at every allocation the live rank of each layer and the budget asked
    and reached; :meth:`finish` adds the evaluations and the report as HTML.

    Mode (online, offline) and account come from wandb's settings and environment variables; files go into
    ``folder``.
    """

    def __init__(self, config: RunConfig, folder: Path, ranking: RankCallback) -> None:
        self.config, self.folder, self.ranking = config, folder, ranking
        self.run: Any = None
        self._seen = 0

    @property
    def _trace(self) -> RankTrace:
        controller = self.ranking.controller
        assert controller is not None  # made when training began, before this callback's turn
        return controller.trace

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project="rankalloc", name=self.config.name, dir=str(self.folder), reinit="finish_previous",
                config=self.config.model_dump(mode="json"),
            )
        except (wandb.Error, OSError) as error:
            raise RankallocError(
                f"wandb did not start: {error}; log in, set WANDB_MODE=offline, or set tracking: none"
            ) from error
        self._seen = len(self._trace.allocations)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = {f"train/{k}": v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        self.run.log(numbers, step=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trace = self._trace
        for allocation in trace.allocations[self._seen :]:
            ranks = {f"rank/{layer.name}": r for layer, r in zip(trace.layers, allocation.ranks, strict=True)}
            budget = {"budget/asked": allocation.asked, "budget/reached": allocation.reached}
            self.run.log({**budget, **ranks}, step=state.global_step)
        self._seen = len(trace.allocations)

    def finish(self, trace: RankTrace) -> None:
        """Log evaluations, final ranks and the report, and close the run."""
        import wandb

        from ..report import write_report

        page = write_report(trace, RunFolder(self.folder).report)
        final = {f"{e.split}/{name}": value for e in trace.evaluations for name, value in e.metrics.items()}
        self.run.log({**final, "report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
        self.run.summary["ranks"] = dict(zip((layer.name for layer in trace.layers), trace.final_ranks, strict=True))
        self.run.summary["adapter_params"] = trace.adapter_params_final
        self.run.finish()
