"""``dppo compare``: methods over tasks and seeds, in parallel processes, and a report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dppo.comparison.plan import ComparisonConfig, PlannedRun, plan
from dppo.comparison.recorded import read_recorded
from dppo.comparison.report import write_report
from dppo.comparison.results import Result, Table, finished
from dppo.comparison.running import run_all
from dppo.locking import held
from dppo.output.progress import bar
from dppo.output.report import duration, number
from dppo.output.run_directory import command_line
from dppo.processors import usable_processors
from policies.config import config_from_dict
from policies.errors import UserError

COMPARISONS = Path("comparisons")
LOOK_EVERY_S = 5.0
"""Between two looks at how far the runs are."""


def run(
    config: Mapping[str, Any], overridden: Collection[str], overrides: Sequence[str] = (), extra: Path | None = None
) -> Path:
    """Run what is not finished yet, and write the report; its path.

    Args:
        config: of ``configs/compare.yaml``.
        overridden: keys and groups that the user set explicitly.
        overrides: of `dppo finetune`, for all runs.
        extra: the user's directory of choices.

    Raises:
        UserError: wrong settings, a finished run with other ones, or failed runs (the report is then of the others).
    """
    if isinstance(config.get("comparison"), Mapping):
        raise UserError("the comparison's file must begin with the line `# @package _global_`")
    names = [field.name for field in dataclasses.fields(ComparisonConfig)]
    comparison = config_from_dict(ComparisonConfig, {name: config[name] for name in names if name in config}, "compare")
    output = COMPARISONS / comparison.name if config["output"] is None else Path(str(config["output"])).expanduser()
    processors = usable_processors()
    processes = processors if config["processes"] is None else config["processes"]
    if not isinstance(processes, int) or processes < 1:
        raise UserError(f"processes must be a positive number, or null for one per processor, not {processes!r}")
    runs = plan(comparison, output, overrides, extra)
    recorded = read_recorded(comparison.recorded)
    with held(output, f"another `dppo compare` is at work in {output}; choose another output=..."):
        failed = _run_missing(comparison, runs, processes, max(processors // min(processes, len(runs)), 1), extra)
        results = finished(runs)
        if results:
            tasks = [task for task in comparison.tasks if any(one.run.task == task for one in results)]
            table = Table(results, tasks, comparison.methods)
            missing = [run for run in runs if run.summary is None]
            settings = {"all runs": [*comparison.settings, *overrides], **comparison.task_settings}
            about = {"name": comparison.name, "command": command_line(), "output": output, "recorded": recorded}
            report = write_report(table, missing, settings=settings, **about)
            print(f"report  {report}\ncurves  {output / 'learning_curves.png'}", flush=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, the first of them {failed[0]}: see {failed[0].log_path}"
        )
    return output / "report.md"


def _run_missing(
    comparison: ComparisonConfig, runs: Sequence[PlannedRun], processes: int, threads: int, extra: Path | None
) -> list[PlannedRun]:
    """Those that failed."""
    waiting = [run for run in runs if run.summary is None]
    print(
        f"comparing {' | '.join(comparison.methods)} on {', '.join(comparison.tasks)}: {len(runs)} runs, of which "
        f"{len(runs) - len(waiting)} are finished; {processes} at a time with {threads} of the processors each",
        flush=True,
    )
    if not waiting:
        return []
    shown = {run: run.share for run in waiting if run.can_go_on}
    with bar("running", len(waiting), done=sum(shown.values())) as advance:
        shares = Shares(advance, shown)

        def ended(run: PlannedRun, status: int, seconds: float) -> None:
            shares.end(run)
            print(_line(run, status, seconds), flush=True)

        told: dict[str, Any] = {"on_end": ended, "on_wait": shares.look}
        try:
            return run_all(waiting, processes=processes, threads=threads, extra=extra, **told)
        except BaseException:
            print("stopped; runs are kept as they are, and the same command goes on with them", flush=True)
            raise


class Shares:
    """How far the runs are, on a bar with one step for each of them."""

    def __init__(self, advance: Callable[[float], None], shown: Mapping[PlannedRun, float]) -> None:
        """``shown``: what the bar says of those that go on with what an earlier comparison left."""
        self._advance = advance
        self._shown = dict(shown)
        self.next_look = time.monotonic() + LOOK_EVERY_S

    def look(self, running: Collection[PlannedRun]) -> None:
        """Show how far those are that go on, if that was not done just now."""
        if time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + LOOK_EVERY_S
            self._show({run: run.share for run in running})

    def end(self, run: PlannedRun) -> None:
        """One has ended, in whatever way."""
        self._show({run: 1.0})

    def _show(self, shares: Mapping[PlannedRun, float]) -> None:
        self._advance(sum(share - self._shown.get(run, 0.0) for run, share in shares.items()))
        self._shown.update(shares)


def _line(run: PlannedRun, status: int, seconds: float) -> str:
    summary = run.summary
    if status or summary is None:
        return f"{run}: failed with status {status} after {duration(seconds)}: {run.last_words} (see {run.log_path})"
    result = Result(run, summary)
    return f"{run}: {number(result.start)} -> {number(result.score)} in {duration(seconds)}"
