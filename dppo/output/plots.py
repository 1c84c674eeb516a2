"""Pictures of a run: the learning curve of fine-tuning, and the loss curve of pretraining; and of several runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dppo.statistics import EvaluationSummary, Interval

if TYPE_CHECKING:  # matplotlib takes 0.4 s to import: only those who draw pay for it
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
"""Metrics rows, as `dppo.output.metrics.read_metrics` returns them."""

LOSSES = {"train_loss": "training", "validation_loss": "validation"}
EVALUATIONS = ("return_mean", "success_rate")
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
BLUE, ORANGE, GREY = "#1f6fb4", "#d1580f", "#666666"
COLORS = (BLUE, ORANGE, "#2a8c4a", "#8c3fa0", "#b8860b", "#0f8f97", "#c2306a", GREY)
"""Of several methods, in their order."""
DASHES = ("-", "--", ":")
"""Of as many methods each as there are colours."""


def learning_curve(
    rows: Rows,
    path: Path,
    *,
    title: str,
    before: EvaluationSummary | None = None,
    after: EvaluationSummary | None = None,
) -> Path:
    """Draw return, and success rate where there is one, against environment steps as a PNG.

    Args:
        rows: with ``env_steps``, ``return_mean`` and perhaps ``success_rate`` of the training episodes, and
            ``eval_return_mean`` and ``eval_success_rate`` where the policy was evaluated.
        path: the file to write; its folder is made.
        title: what was trained, on what, how.
        before: evaluation of the policy at 0 environment steps.
        after: evaluation of the policy at the last row's environment steps.
    """
    last = max((row["env_steps"] for row in rows), default=0)
    points = [
        (0, before, "before (95 % CI)", {"color": GREY, "marker": "s"}),
        (last, after, "after (95 % CI)", {"color": ORANGE, "marker": "o"}),
    ]
    evaluations = [(x, summary, label, style) for x, summary, label, style in points if summary is not None]
    has_success = any(row.get("success_rate") is not None for row in rows)
    has_success |= any(summary.success_rate is not None for _, summary, _, _ in evaluations)
    with _panels(path, title, count=2 if has_success else 1) as panels:
        _line(panels[0], rows, "env_steps", "return_mean", "training (exploring)", BLUE)
        _line(panels[0], rows, "env_steps", "eval_return_mean", "evaluation", GREY)
        for x, summary, label, style in evaluations:
            _point(panels[0], x, summary.return_mean, summary.return_ci95, label, style)
        panels[0].set_ylabel("return (mean over episodes)")
        _format_counts(panels[0].yaxis.set_major_formatter, panels[0].get_ylim())
        if has_success:
            _line(panels[1], rows, "env_steps", "success_rate", "training (exploring)", BLUE)
            _line(panels[1], rows, "env_steps", "eval_success_rate", "evaluation", GREY)
            for x, summary, label, style in evaluations:
                if summary.success_rate is not None:
                    _point(panels[1], x, summary.success_rate, summary.success_ci95, label, style)
            _as_success_rate(panels[1])
        for panel in panels:
            panel.set_xlabel("environment steps")
            _format_counts(panel.xaxis.set_major_formatter, (0, last))
    return path


def pretraining_curve(rows: Rows, path: Path, *, title: str = "Behaviour cloning") -> Path:
    """Draw the loss, and evaluations where there are some, against epochs (else updates) as a PNG.

    The loss has a log scale, unless it is a likelihood that becomes negative.

    Args:
        rows: with ``epoch`` or ``updates``, ``train_loss``, and perhaps ``validation_loss``, ``return_mean`` and
            ``success_rate`` of evaluations; a quantity may be missing or None in rows that did not measure it.
        path: the file to write; its folder is made.
        title: what was trained, on what.
    """
    x_axis = "epoch" if any("epoch" in row for row in rows) else "updates"
    measured = [key for key in EVALUATIONS if any(row.get(key) is not None for row in rows)]
    with _panels(path, title, count=1 + len(measured)) as panels:
        for (key, label), color in zip(LOSSES.items(), (BLUE, ORANGE), strict=True):
            _line(panels[0], rows, x_axis, key, label, color)
        _as_loss(panels[0], log_scale=all(row[key] > 0 for key in LOSSES for row in rows if row.get(key) is not None))
        for panel, key in zip(panels[1:], measured, strict=True):
            _line(panel, rows, x_axis, key, "evaluation", GREY)
            if key == "success_rate":
                _as_success_rate(panel)
            else:
                panel.set_ylabel("return (mean over episodes)")
                _format_counts(panel.yaxis.set_major_formatter, panel.get_ylim())
        for panel in panels:
            panel.set_xlabel("epochs" if x_axis == "epoch" else x_axis)
            _format_counts(panel.xaxis.set_major_formatter, panel.get_xlim())
    return path


class Curve(NamedTuple):
    """One method on one task; all [X]."""

    name: str
    x: np.ndarray
    """Environment steps."""
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def comparison_curves(curves: Mapping[str, Sequence[Curve]], path: Path, *, title: str) -> Path:
    """Draw a panel for each task, with a line and a band for each method, as a PNG.

    Args:
        curves: by task; a method has the same colour, and dashes beyond the colours that there are, in all of them.
        path: the file to write; its folder is made.
        title: what was compared.
    """
    names = list(dict.fromkeys(curve.name for drawn in curves.values() for curve in drawn))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    dashes = {name: DASHES[i // len(COLORS) % len(DASHES)] for i, name in enumerate(names)}
    with _panels(path, title, count=len(curves)) as panels:
        for panel, (task, drawn) in zip(panels, curves.items(), strict=True):
            for curve in drawn:
                marker = "o" if len(curve.x) == 1 else None  # one point alone makes no line
                style = {"color": colors[curve.name], "linestyle": dashes[curve.name], "marker": marker}
                panel.plot(curve.x, curve.value, label=curve.name, **style)
                panel.fill_between(curve.x, curve.low, curve.high, color=colors[curve.name], alpha=0.18, linewidth=0)
            panel.set_title(task)
            panel.set_xlabel("environment steps")
            panel.set_ylabel("return")
            panel.set_xlim(0, 1.03 * max(curve.x[-1] for curve in drawn))
            _format_counts(panel.xaxis.set_major_formatter, panel.get_xlim())
            _format_counts(panel.yaxis.set_major_formatter, panel.get_ylim())
    return path


@contextmanager
def _panels(path: Path, title: str, *, count: int) -> Iterator[list[Axes]]:
    """Axes side by side under one title, with one legend for all; written to the file at the end."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 5.5 * count, 4.8), dpi=130, layout="constrained")
        axes = list(figure.subplots(1, count, squeeze=False)[0])
        figure.suptitle(title, fontweight="bold", fontsize=15)
        yield axes
        legend = {}
        for panel in axes:
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
                legend.setdefault(label, handle)
        if legend:
            figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=min(len(legend), 3 * count))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _line(panel: Axes, rows: Rows, x_axis: str, key: str, label: str, color: str) -> None:
    """The rows that have a value for ``key``."""
    points = [(row[x_axis], row[key]) for row in rows if row.get(key) is not None]
    if points:
        marker = "o" if len(points) <= 40 else None  # one point alone makes no line
        panel.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, markersize=4)


def _point(panel: Axes, x: float, mean: float, interval: Interval | None, label: str, style: Mapping[str, Any]) -> None:
    """One evaluation with its confidence interval, over a faint line to compare the curve with."""
    low, high = interval or (None, None)
    error = None if low is None or high is None else [[max(mean - low, 0)], [max(high - mean, 0)]]
    panel.errorbar(x, mean, yerr=error, label=label, linestyle="none", markersize=8, capsize=5, zorder=3, **style)
    panel.axhline(mean, color=style["color"], linewidth=1, linestyle=":", alpha=0.7)


def _as_loss(panel: Axes, *, log_scale: bool) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_ylabel("imitation loss")
    if log_scale:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())


def _as_success_rate(panel: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    panel.set_ylim(-0.03, 1.03)
    panel.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    panel.set_ylabel("success rate")


def _format_counts(set_formatter: Callable[[Any], None], limits: tuple[float, float]) -> None:
    """Write ticks as 0.5M or 20k, in one unit along the axis."""
    size = max(map(abs, limits))
    scale, unit = (1e6, "M") if size >= 1e6 else (1e3, "k") if size >= 1e4 else (1, "")
    set_formatter(lambda value, _: f"{value / scale:g}{unit}" if value else "0")
