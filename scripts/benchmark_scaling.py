"""How the phases of a DPPO iteration grow with environments, chunk, fine-tuned steps, minibatch and width.

One setting at a time moves away from the paper's Hopper setting (with short rollouts and one epoch). Settings take
turns, so that they share the moods of the machine. Beside what was measured stands what a cost model says that knows
nothing but the machine's limits and, from the paper's setting itself, what share of them each phase reaches.

    python scripts/benchmark_scaling.py [--turns N] [--markdown FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import dppo  # noqa: F401 - before torch, as in the commands

# isort: split
from matplotlib.figure import Figure

from throughput.dppo_iteration import build_trainer, useful_flops
from throughput.options import medians, positive, say
from throughput.report import table

BASE = ("experiment=paper_hopper", "checkpoint=scratch", "rollout_steps=25", "algo.batch_size=10_000", "algo.epochs=1")
AXES: dict[str, tuple[int, ...]] = {
    "num_envs": (10, 20, 40, 80, 160),
    "policy.chunk": (1, 2, 4, 8, 16),
    "policy.finetuned_steps": (1, 2, 5, 10, 20),
    "algo.batch_size": (100, 300, 1000, 3000, 10_000),
    "width": (128, 256, 512, 1024),
}
PHASES = ("environment", "sampling", "update")


def overrides(axis: str, value: int) -> list[str]:
    """The settings of one point."""
    chosen = f"network.hidden_dims=[{value},{value},{value}]" if axis == "width" else f"{axis}={value}"
    return [*BASE, chosen]


def measure(turns: int) -> dict[tuple[str, int], dict[str, float]]:
    """Seconds and work of every phase at every point: medians of the turns."""
    trainers = {
        (axis, value): build_trainer(overrides(axis, value)) for axis, values in AXES.items() for value in values
    }
    found: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for turn in range(1 + turns):  # the first one warms up
        say(f"turn {turn}")
        for point, trainer in trainers.items():
            before = trainer.env_steps
            row = trainer.iterate()
            env_steps = trainer.env_steps - before
            work = {"environment": float(env_steps), **useful_flops(trainer, row)}
            seconds = {f"{phase}_s": float(row[f"{phase}_s"] or 0) for phase in PHASES}
            found[point].append({**seconds, **{phase: work[phase] for phase in PHASES}, "env_steps": env_steps})
    for trainer in trainers.values():
        trainer.close()
    return {point: medians(rows[1:]) for point, rows in found.items()}


def rates(found: dict[tuple[str, int], dict[str, float]]) -> dict[str, float]:
    """Work per second of every phase at the paper's setting."""
    base = found["num_envs", 40]
    return {phase: base[phase] / base[f"{phase}_s"] for phase in PHASES}


def per_thousand(row: dict[str, float], seconds: float) -> float:
    """Milliseconds per 1,000 environment steps."""
    return 1e6 * seconds / row["env_steps"]


def tables(found: dict[tuple[str, int], dict[str, float]]) -> str:
    """Milliseconds per 1,000 environment steps, measured and (by the cost model)."""
    rate = rates(found)
    parts = []
    for axis, values in AXES.items():
        rows = []
        for value in values:
            row = found[axis, value]
            cells = [
                f"{per_thousand(row, row[f'{phase}_s']):,.0f} ({per_thousand(row, row[phase] / rate[phase]):,.0f})"
                for phase in PHASES
            ]
            rows.append([f"{value:,}", *cells])
        parts.append(table([axis, *PHASES], rows))
    return "\n\n".join(parts) + "\n"


def plot(found: dict[tuple[str, int], dict[str, float]], path: Path) -> None:
    """A panel for each setting; dashed what the cost model says."""
    rate = rates(found)
    figure = Figure(figsize=(3.1 * len(AXES), 3.2), layout="constrained")
    axes: Any = figure.subplots(1, len(AXES), sharey=True)
    for panel, (axis, values) in zip(axes, AXES.items(), strict=True):
        for color, phase in enumerate(PHASES):
            rows = [found[axis, value] for value in values]
            measured = [per_thousand(row, row[f"{phase}_s"]) for row in rows]
            modelled = [per_thousand(row, row[phase] / rate[phase]) for row in rows]
            panel.plot(values, measured, "o-", color=f"C{color}", label=phase, markersize=4)
            panel.plot(values, modelled, "--", color=f"C{color}", alpha=0.6)
        panel.set(xscale="log", yscale="log", xlabel=axis, xticks=values)
        panel.set_xticklabels([f"{value:,}" for value in values], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("ms per 1,000 environment steps")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=positive, default=5)
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    args = parser.parse_args()
    found = measure(args.turns)
    text = tables(found)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
