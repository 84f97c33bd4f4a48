"""How long does a trace take, and how much memory?

    python benchmarks/trace.py [--model llama-3-8b] [--micro-batch 1] [--seq-len 4096]

Runs `memplan trace` in a process of its own and prints its time and its largest resident set as Markdown.  PyTorch and
transformers have to be installed; a GPU is neither needed nor used.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=4096)
    options = parser.parse_args()
    size = ["--micro-batch", str(options.micro_batch), "--seq-len", str(options.seq_len)]
    command = [sys.executable, "-m", "memplan", "trace", options.model, *size, "--json", "--quiet"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    answer = json.loads(done.stdout)
    what = f"{options.model}, micro-batch {options.micro_batch}, {options.seq_len:,} tokens"
    print("| traced | parameters | peak of the step (GiB allocated) | seconds | resident set (MiB) |")
    print("|---|---:|---:|---:|---:|")
    print(
        f"| {what} | {answer['model']['num_parameters']:,} | {answer['peak_allocated_bytes'] / 2**30:.2f} "
        f"| {seconds:.1f} | {peak_mib:,.0f} |"
    )
    print(f"\n{os.cpu_count()} cores; Python's start and the import of PyTorch and transformers are included.")


if __name__ == "__main__":
    main()
