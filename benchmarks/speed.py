"""How fast is memplan, as a user meets it: whole processes from a cold start, and a grid of a million points.

    python benchmarks/speed.py [--runs 15] [--python /path/to/python]

Prints a Markdown table: median wall time of whole processes, their ratio to a bare ``python -c pass`` run in turn with
them, and the peak memory of the grid.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

COMMANDS = {
    "`python -c pass`": ["-c", "pass"],
    "`python -c 'import click'`": ["-c", "import click"],
    "`memplan estimate llama-3-8b`": ["-m", "memplan", "estimate", "llama-3-8b"],
    "`memplan suggest --gpu 24GB --target-batch 32`": [
        "-m",
        "memplan",
        "suggest",
        "--gpu",
        "24GB",
        "--target-batch",
        "32",
    ],
}

GRID = """
import json, resource, time
import numpy as np
import memplan
begin = time.perf_counter()
grid = memplan.estimate_grid("llama-3-8b", micro_batch=np.arange(1, 1001)[:, None], seq_len=np.arange(8, 8008, 8))
seconds = time.perf_counter() - begin
peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"points": int(grid.peak_allocated_bytes.size), "seconds": seconds, "peak_mib": peak_mib}))
"""


def wall_seconds(command: list[str], folder: str) -> float:
    """Time of one whole process, run where no project file is found."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for run in range(options.runs + 1):
            for name, arguments in COMMANDS.items():
                seconds = wall_seconds([options.python, *arguments], folder)
                if run:  # the first one warms the file cache
                    times[name].append(seconds)
        grids = [
            json.loads(subprocess.run([options.python, "-c", GRID], check=True, cwd=folder, capture_output=True).stdout)
            for _ in range(3)
        ]
    bare = statistics.median(times["`python -c pass`"])
    print(f"Median of {options.runs} runs, Python {sys.version.split()[0]}, {os.cpu_count()} cores:\n")
    print("| whole process | wall time | times a bare Python |\n|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.3f} s | {median / bare:.1f} |")
    grid = sorted(grids, key=lambda g: g["seconds"])[1]
    print(f"\n{grid['points']:,} points of `estimate_grid`: {grid['seconds']:.2f} s, {grid['peak_mib']:.0f} MiB")


if __name__ == "__main__":
    main()
