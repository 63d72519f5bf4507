"""Sending a run's curves, ranks and report to wandb, if ``tracking: wandb`` asks for it.

A run that has begun is never ended by its tracking: what goes wrong (the network, a full disk) becomes a note of the
trace. A single run that wandb cannot begin to track is refused, since nothing is lost yet; a trial of a sweep goes on,
offline where that works, because nobody may be there to mend it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..errors import RankallocError, first_line
from ..trace import RankTrace
from ..training.callback import RankCallback
from .config import RunConfig
from .run_folder import RunFolder

_PATIENCE = 30  # seconds that wandb gets to begin with a trial; to end it, twice as many


def trackers(config: RunConfig, folder: Path, ranking: RankCallback, group: str | None = None) -> list[WandbCallback]:
    """The callbacks that ``config.tracking`` asks for: none, or one for wandb. TensorBoard and MLflow are the
    Trainer's own business. ``group``: the sweep that the run is a trial of."""
    return [WandbCallback(config, folder, ranking, group)] if config.tracking == "wandb" else []


class WandbCallback(TrainerCallback):
    """Logs the trace's content: curves, and at every allocation the live rank of each layer and the budget asked
    and reached; :meth:`finish` adds the evaluations, a table of the final ranks and the report, as HTML and as an
    artifact.

    Mode (online, offline) and account come from wandb's settings and environment variables; files go into
    ``folder``.
    """

    def __init__(self, config: RunConfig, folder: Path, ranking: RankCallback, group: str | None = None) -> None:
        self.config, self.folder, self.ranking, self.group = config, folder, ranking, group
        self.run: Any = None
        self.trouble: list[str] = []
        self._seen = 0

    @property
    def _trace(self) -> RankTrace:
        controller = self.ranking.controller
        assert controller is not None  # made when training began, before this callback's turn
        return controller.trace

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import wandb

        self._seen = len(self._trace.allocations)
        try:
            if self.group is None:
                self.run = self._begun()
                return
            self.run = self._begun(settings=wandb.Settings(init_timeout=_PATIENCE, finish_timeout=2 * _PATIENCE))
        except Exception as error:
            if self.group is None:
                raise RankallocError(
                    f"wandb did not start: {error}; log in, set WANDB_MODE=offline, or set tracking: none"
                ) from error
            wandb.teardown()
            self.run = self._guarded("start offline", lambda: self._begun(mode="offline"))
            self.trouble.insert(0, f"wandb could not be reached ({first_line(error)})" + (
                f": this trial was kept offline, and wandb sync {self.run.dir} sends it"
                if self.run is not None else ": this trial was not tracked"
            ))  # fmt: skip

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = {f"train/{k}": v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        self._log(numbers, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trace = self._trace
        for allocation in trace.allocations[self._seen :]:
            ranks = {f"rank/{layer.name}": r for layer, r in zip(trace.layers, allocation.ranks, strict=True)}
            budget = {"budget/asked": allocation.asked, "budget/reached": allocation.reached}
            self._log({**budget, **ranks}, state.global_step)
        self._seen = len(trace.allocations)

    def finish(self, trace: RankTrace) -> None:
        """Log evaluations, final ranks and the report, and close the run; trouble becomes notes of the trace."""
        if self.run is not None:
            self._guarded("send the results", lambda: self._send(trace))
        self.close()
        trace.notes += self.trouble

    def close(self, failed: bool = False) -> None:
        """End wandb's run, whatever became of ours."""
        if self.run is not None:
            self._guarded("finish", lambda: self.run.finish(exit_code=int(failed)))
            self.run = None

    def _send(self, trace: RankTrace) -> None:
        import wandb

        from ..report import write_report

        page = write_report(trace, RunFolder(self.folder).report)
        final = {f"{e.split}/{name}": value for e in trace.evaluations for name, value in e.metrics.items()}
        ranks = dict(zip((layer.name for layer in trace.layers), trace.final_ranks, strict=True))
        table = wandb.Table(columns=["layer", "rank"], data=[list(pair) for pair in ranks.items()])
        self.run.log({
            **final, "rank table": table, "report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)
        })  # fmt: skip
        self.run.summary["ranks"] = ranks
        self.run.summary["adapter_params"] = trace.adapter_params_final
        self.run.summary["trained_params"] = trace.trained_params_final
        artifact = wandb.Artifact(f"rank-report-{self.run.id}", type="rank-report")
        artifact.add_file(str(page))
        self.run.log_artifact(artifact)

    def _begun(self, **options: Any) -> Any:
        import wandb

        return wandb.init(
            project="rankalloc", name=self.config.name, group=self.group, dir=str(self.folder),
            reinit="finish_previous", config=self.config.model_dump(mode="json"), **options,
        )

    def _log(self, values: dict[str, Any], step: int) -> None:
        if self.run is not None:
            self._guarded("log", lambda: self.run.log(values, step=step))

    def _guarded(self, what: str, call: Callable[[], Any]) -> Any:
        """What ``call`` returns; None when it fails, which is noted once."""
        try:
            return call()
        except Exception as error:
            if not any(f"could not {what}" in said for said in self.trouble):
                self.trouble.append(f"wandb could not {what}: {first_line(error)}")
            return None
