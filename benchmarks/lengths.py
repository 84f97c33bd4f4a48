"""How fast is `memplan lengths`: whole processes that read, cut, pad and pack a million lengths.

    python benchmarks/lengths.py [--records 1000000] [--runs 3] [--core 0] [--micro-batch 4]

Lengths are drawn from a log-normal distribution (median 545 tokens, a hundredth above 4,400), from 10 to 80 % of each
with a label, and written as JSON lines with num_tokens and num_supervised_tokens.  Prints a Markdown table: the median
of wall and processor seconds, and the largest resident set, of processes that have one core.  A row of axolotl's
first-fit has the room of a micro-batch: the smaller that is, the more rows there are to look for room in.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

CANDIDATES = ("2048", "1024,2048,4096")
PACKINGS = ("bfd", "bfd-split", "wrapped", "first-fit", "ffd", "bfd,bfd-split,wrapped,first-fit,ffd")
MOST_TOKENS = 32_768


def write_counts(path: str, num: int) -> None:
    """The records, always the same ones."""
    draw = np.random.default_rng(0)
    tokens = np.minimum(draw.lognormal(6.3, 0.9, num).astype(np.int64) + 1, MOST_TOKENS)
    labelled = (tokens * draw.uniform(0.1, 0.8, num)).astype(np.int64)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(
            f'{{"num_tokens": {whole}, "num_supervised_tokens": {part}}}\n'
            for whole, part in zip(tokens.tolist(), labelled.tolist(), strict=True)
        )


def measured(command: list[str], core: int) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and MiB of a process on one core."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    os.sched_setaffinity(child.pid, {core})
    _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--micro-batch", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "counts.jsonl")
        write_counts(path, options.records)
        print(
            f"{options.records:,} records, median of {options.runs} runs, Python {sys.version.split()[0]}, one core:\n"
        )
        print("| maximum lengths | packing | wall time | processor time | memory |\n|---|---|---|---|---|")
        for candidates in CANDIDATES:
            for packing in PACKINGS:
                command = [sys.executable, "-m", "memplan", "lengths", path, "--max-len", candidates]
                rows = options.micro_batch
                command += ["--packing", packing, "--micro-batch", str(rows), "--target-batch", str(8 * rows)]
                runs = [measured(command, options.core) for _ in range(options.runs)]
                wall, used, peak = (statistics.median(column) for column in zip(*runs, strict=True))
                print(f"| {candidates} | {packing} | {wall:.1f} s | {used:.1f} s | {peak:.0f} MiB |")


if __name__ == "__main__":
    main()
