"""A comparison as a page, a picture and tables."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dppo.comparison.plan import PlannedRun
from dppo.comparison.results import Table
from dppo.comparison.statistics import Estimate, curve_ci95, improvement_ci95, iqm_ci95
from dppo.output.plots import Curve, comparison_curves
from dppo.output.report import duration, number
from dppo.output.run_directory import write_text

METHOD = """\
Score: the mean return of a run's last evaluation, without exploration noise, in environments with seeds of their own.
IQM: the mean of the middle half of the scores. Intervals: 95 %, percentiles of a bootstrap over runs, stratified by
task (Agarwal et al. 2021). Learning curves: returns while training, with exploration noise."""


def write_report(
    table: Table,
    missing: Sequence[PlannedRun] = (),
    *,
    name: str,
    command: str,
    output: Path,
    settings: Mapping[str, Sequence[str]] | None = None,
    recorded: Mapping[str, Sequence[Curve]] | None = None,
) -> Path:
    """Write report.md, learning_curves.png, scores.csv and curves.csv; the path of the first.

    Args:
        table: at least one result of every task.
        missing: runs that belong to it and are not finished.
        name: of the comparison.
        command: that makes this report again.
        output: the directory.
        settings: overrides that methods have in common, by what they are for.
        recorded: more curves by task, see `read_recorded`.
    """
    curves = _curves(table)
    for task in curves:
        curves[task] += (recorded or {}).get(task, [])
    comparison_curves(curves, output / "learning_curves.png", title=name)
    _write_csv(output / "scores.csv", _score_rows(table))
    _write_csv(output / "curves.csv", _curve_rows(curves))
    text = "\n\n".join(_sections(table, missing, name, command, settings or {})) + "\n"
    write_text(output / "report.md", text)
    return output / "report.md"


def _sections(
    table: Table, missing: Sequence[PlannedRun], name: str, command: str, settings: Mapping[str, Sequence[str]]
) -> Iterable[str]:
    yield f"# {name}"
    yield f"    {command}"
    yield _origin(table)
    if missing:
        yield "Not finished:\n\n" + "\n".join(_missing(missing))
    yield METHOD
    yield "## Methods"
    overrides = {**{f"({what})": shared for what, shared in settings.items() if shared}, **table.methods}
    yield _markdown(
        ["method", "overrides of `dppo finetune`"],
        [[name, f"`{' '.join(own)}`" if own else ""] for name, own in overrides.items()],
    )
    yield "## Scores"
    cells = [pair for pair in product(table.tasks, table.methods) if table.of(*pair)]
    yield _markdown(
        ["task", "method", "runs", "IQM", "mean ± std", "lowest", "highest", "before", "steps", "time"],
        [_score_cells(table, *pair) for pair in cells],
    )
    uneven = [task for task in table.tasks if table.budgets_differ(task)]
    if uneven:
        yield f"The methods had different numbers of environment steps on {', '.join(uneven)}."
    methods = [method for method in table.methods if table.complete(method)]
    if len(table.tasks) > 1:
        yield "## Over all tasks"
        yield "Scores are normalised: 0 is the mean before training, 1 (or -1) the run of any method farthest from it."
        yield _markdown(
            ["method", "IQM of normalised scores"],
            [[method, _interval(iqm_ci95(table.normalized(method)), "{:.2f}".format)] for method in methods],
        )
    if len(methods) > 1 and len(table.results) > len(cells):  # of single runs there is no probability
        yield "## Probability of improvement"
        yield "That a run of a row's method scores higher than one of a column's on the same task, mean over tasks."
        yield _markdown(
            ["", *methods],
            [
                [ours, *("" if ours == theirs else _probability(table, ours, theirs) for theirs in methods)]
                for ours in methods
            ],
            words=1,
        )
    yield "## Learning curves"
    yield "![Learning curves](learning_curves.png)"
    yield "Interquartile means and their intervals. The numbers are in `scores.csv` and `curves.csv`."


def _missing(runs: Sequence[PlannedRun]) -> Iterable[str]:
    """A line for each method."""
    for method in dict.fromkeys(run.method for run in runs):
        yield f"- {method}: {', '.join(f'{run.task} seed {run.seed}' for run in runs if run.method == method)}"


def _probability(table: Table, ours: str, theirs: str) -> str:
    scores = ([table.scores(task, method) for task in table.tasks] for method in (ours, theirs))
    return _interval(improvement_ci95(*scores), "{:.2f}".format)


def _origin(table: Table) -> str:
    """When, where and with what the runs were made; several answers where they differ."""
    facts = [one.provenance for one in table.results]
    started = sorted(fact["started"][:10] for fact in facts)
    machines = {f"{fact['machine']['cpu']}, {fact['machine']['cores']} cores" for fact in facts}
    revisions = {str(fact["git"]["revision"])[:7] + ("+" if fact["git"]["dirty"] else "") for fact in facts}
    names = ("torch", "gymnasium", "mujoco", "numpy")
    versions = {", ".join(f"{name} {fact['packages'][name]}" for name in names) for fact in facts}
    seeds = ", ".join(map(str, sorted({one.run.seed for one in table.results})))
    days = " to ".join(dict.fromkeys((started[0], started[-1])))
    where, revision, libraries = (" and ".join(sorted(those)) for those in (machines, revisions, versions))
    return f"{len(table.results)} runs, seeds {seeds}, {days}, on {where}; revision {revision}; {libraries}."


def _score_cells(table: Table, task: str, method: str) -> list[str]:
    scores, results = table.scores(task, method), table.of(task, method)
    spread = f" ± {number(float(scores.std(ddof=1)))}" if len(scores) > 1 else ""
    seconds = float(np.mean([one.summary["wall_clock_s"] for one in results]))
    return [
        task,
        method,
        str(len(scores)),
        _interval(iqm_ci95([scores]), number),
        f"{number(float(scores.mean()))}{spread}",
        number(float(scores.min())),
        number(float(scores.max())),
        number(float(np.mean([one.start for one in results]))),
        f"{np.mean([one.summary['env_steps'] for one in results]):,.0f}",
        duration(seconds),
    ]


def _interval(estimate: Estimate, form: Any) -> str:
    value, low, high = estimate
    return form(value) if low is None or high is None else f"{form(value)} [{form(low)}, {form(high)}]"


def _curves(table: Table) -> dict[str, list[Curve]]:
    """By task, one for each method that has runs of it."""
    curves: dict[str, list[Curve]] = {}
    for task in table.tasks:
        for method in table.methods:
            results = table.of(task, method)
            if results:
                grid = table.grid(task, method)
                value, low, high = curve_ci95(np.stack([one.curve(grid) for one in results]))
                curves.setdefault(task, []).append(Curve(method, grid, value, low, high))
    return curves


def _score_rows(table: Table) -> list[dict[str, Any]]:
    return [
        {
            "task": one.run.task,
            "method": one.run.method,
            "seed": one.run.seed,
            "score": one.score,
            "success_rate": one.success,
            "before": one.start,
            "env_steps": one.summary["env_steps"],
            "wall_clock_s": one.summary["wall_clock_s"],
        }
        for one in table.results
    ]


def _curve_rows(curves: dict[str, list[Curve]]) -> list[dict[str, Any]]:
    return [
        {"task": task, "method": curve.name, "env_steps": x, "iqm": value, "low": low, "high": high}
        for task, drawn in curves.items()
        for curve in drawn
        for x, value, low, high in zip(curve.x, curve.value, curve.low, curve.high, strict=True)
    ]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 2) -> str:
    """A table whose first columns, so many, hold words; those after them are numbers."""
    numeric = ["---:" if i >= words else "---" for i in range(len(header))]
    lines = [header, numeric, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
