"""How fast everything is, beside what the machine could do at best and, where asked, beside other people's PPO.

limits       MuJoCo alone, and matrix products alone, on all cores
hopper       seconds per phase of a DPPO iteration at the paper's Hopper setting
halfcheetah  the same settings on HalfCheetah
gaussian     environment steps per second of Gaussian PPO, by number of environments
cloning      samples per second of behaviour cloning

Each is measured in a fresh process, with torch's own choice of threads. Results are written after each one.

    python scripts/benchmark_throughput.py [--quick] [--json FILE] [--markdown FILE]
    python scripts/benchmark_throughput.py --only hopper gaussian --turns 5
    python scripts/benchmark_throughput.py --only --against sb3 cleanrl     # nothing but the comparison
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from throughput.comparison import compare
from throughput.machine import describe_machine
from throughput.opponents import CACHE, OPPONENTS, install
from throughput.options import PRECISIONS, TASKS, Options, positive
from throughput.report import markdown
from throughput.section import SECTIONS, run_section


def arguments() -> argparse.Namespace:
    """What the user asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="sections (default: all)")
    parser.add_argument("--against", nargs="+", choices=OPPONENTS, default=[], help="compare Gaussian PPO with these")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out")
    parser.add_argument(
        "--turns", type=positive, help="how often each thing is measured (default: the section's choice)"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="of limits, gaussian and --against")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of the arithmetic")
    parser.add_argument("--environments", type=Path, default=CACHE, help=f"of --against (default: {CACHE})")
    parser.add_argument("--json", type=Path, help="where to write everything")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    return parser.parse_args()


def main() -> None:
    """Measure, write, and print the tables."""
    args = arguments()
    options = Options(args.quick, args.turns, args.tasks, args.precision)
    pythons = {name: install(name, args.environments) for name in args.against}
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "options": dataclasses.asdict(options),
        "sections": {},
        "against": {},
    }

    def write() -> None:
        if args.json:
            args.json.write_text(json.dumps(results, indent=2) + "\n")
        if args.markdown:
            args.markdown.write_text(markdown(results))

    for name in args.only:
        print(f"{name} ...", flush=True)
        results["sections"][name] = run_section(name, options)
        write()
    for name, python in pythons.items():
        print(f"against {OPPONENTS[name].title} ...", flush=True)
        results["against"][name] = compare(name, python, options)
        write()
    print(markdown(results))


if __name__ == "__main__":
    main()
