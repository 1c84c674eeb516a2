"""The results as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from throughput.opponents import OPPONENTS
from throughput.options import TASKS

Result = dict[str, Any]


def markdown(results: Result) -> str:
    """Everything that was measured."""
    parts = [_machine(results)]
    for name, section in results["sections"].items():
        parts.append(_TABLES[name](section["result"]))
    for name, comparison in results["against"].items():
        parts.append(_against(name, comparison))
    if results["sections"]:
        parts.append(_memory(results["sections"]))
    return "\n\n".join(parts) + "\n"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the first column holds names, the others numbers."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _machine(results: Result) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    threads = {str(section["threads"]) for section in results["sections"].values()}
    counted = f", {'/'.join(sorted(threads))} threads of torch" if threads else ""
    quick = "\n\nA quick trial: these numbers mean nothing." if results["options"]["quick"] else ""
    return (
        f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores{counted}, {machine['memory_gib']} GiB, load "
        f"{machine['load_at_start']} at the start; {versions}.{quick}"
    )


def _limits(result: Result) -> str:
    rows = [[f"MuJoCo alone, {task}, all cores", f"{rate:,.0f} steps/s"] for task, rate in result["simulation"].items()]
    for precision, uses in result["products"].items():
        for use, product in uses.items():
            rates = [f"{rate / 1e9:,.0f} ({threads})" for threads, rate in product["flops_per_s"].items()]
            name = f"{product['rows']} x 512 by 512 x 512 ({use}), {precision}"
            rows.append([name, f"GFLOP/s (threads): {', '.join(rates)}"])
    return "## Limits of the machine\n\n" + table(["limit", "median"], rows)


def _iteration(task: str, result: Result) -> str:
    header = ["phase"]
    for precision in result:
        header += [precision, "of its limit"]
    rows = []
    for phase in next(iter(result.values()))["seconds"]:
        cells = [phase]
        for median in result.values():
            fraction = median["fractions"].get(phase)
            cells += [f"{median['seconds'][phase]:.2f} s", "" if fraction is None else f"{fraction:.0%}"]
        rows.append(cells)
    for name, unit in (("total_s", "{:.2f} s"), ("env_steps", "{:,.0f}"), ("env_steps_per_s", "{:,.0f}")):
        rows.append([_WORDS[name], *(cell for m in result.values() for cell in (unit.format(m["whole"][name]), ""))])
    turns = "/".join(str(median["turns"]) for median in result.values())
    return f"## One DPPO iteration, {task}\n\nMedians of {turns} iterations.\n\n" + table(header, rows)


def _gaussian(result: Result) -> str:
    columns = {f"{task}, {way}": rates for task, ways in result.items() for way, rates in ways.items()}
    best = {name: max(rate["env_steps_per_s"] for rate in rates.values()) for name, rates in columns.items()}
    rows = []
    for count in next(iter(columns.values())):
        cells = []
        for name, rates in columns.items():
            rate = rates[count]["env_steps_per_s"]
            cells.append(f"**{rate:,.0f}**" if rate == best[name] else f"{rate:,.0f}")
        rows.append([count, *cells])
    title = "## Gaussian PPO, 2,048 steps per update, minibatches of 64: environment steps per second"
    return title + "\n\n" + table(["environments", *columns], rows)


def _cloning(result: Result) -> str:
    rows = [
        [precision, f"{median['samples_per_s']:,.0f}", f"{median['fraction']:.0%}"]
        for precision, median in result.items()
    ]
    return "## Behaviour cloning, batch 128\n\n" + table(["precision", "samples/s", "of its limit"], rows)


def _against(opponent: str, comparison: Result) -> str:
    rows = []
    for task, measured in comparison.items():
        for name, pair in measured.items():
            if name in ("trial", "final"):
                continue
            cells = [f"{pair[side]['steps_per_s']:,.0f} ({_way(pair[side])})" for side in ("ours", "theirs")]
            compiled = ", compiled" if "compiled" in name else ""
            rows.append([f"{task}, {_WORDS[name.split(', ')[-1]]}{compiled}", *cells, f"{pair['ratio']:.2f}"])
    title = OPPONENTS[opponent].title
    return f"## Gaussian PPO against {title}\n\n" + table(["", "ours, steps/s", f"{title}, steps/s", "ratio"], rows)


def _way(settings: Result) -> str:
    threads = "" if settings["threads"] is None else f", {settings['threads']} thread"
    return f"{settings['num_envs']} {settings['vector']}{threads}, {settings['memory_bytes'] / 2**20:,.0f} MiB"


def _memory(sections: Result) -> str:
    rows = [[name, f"{section['memory_bytes'] / 2**20:,.0f} MiB"] for name, section in sections.items()]
    return "## Peak memory of a section's process\n\n" + table(["section", "peak"], rows)


_WORDS = {
    "total_s": "total",
    "env_steps": "environment steps",
    "env_steps_per_s": "environment steps/s",
    "best": "each at its best",
    "single": "one environment",
}

_TABLES: dict[str, Callable[[Result], str]] = {
    "limits": _limits,
    **{task: lambda result, task=task: _iteration(task, result) for task in TASKS},
    "gaussian": _gaussian,
    "cloning": _cloning,
}
