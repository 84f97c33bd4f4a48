"""How fast is a replay through the simulated caching allocator?

    python benchmarks/allocator.py [--events 1000000] [--runs 3]

Prints a Markdown table: seconds for a million events (allocations and releases in random order, 300 tensors live) of
few and of many distinct sizes, of a training step's last-in-first-out order, with and without a limit and expandable
segments.  Nothing but memplan is needed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from memplan.allocator.replay import replay
from memplan.allocator.settings import AllocatorSettings
from memplan.units import MIB

Event = tuple[int, int, int]


def random_order(num_events: int, num_sizes: int, live: int = 300) -> list[Event]:
    """Tensors of random sizes (512 bytes to 256 MiB) that die in random order."""
    rng = random.Random(0)
    sizes = [int(512 * 2 ** rng.uniform(0, 19)) for _ in range(num_sizes)]
    events: list[Event] = []
    alive: list[Event] = []
    for key in range(num_events):
        if len(events) >= num_events:
            break
        if len(alive) >= live:
            at = rng.randrange(len(alive))
            alive[at], alive[-1] = alive[-1], alive[at]
            dead = alive.pop()
            events.append((dead[0], dead[1], -1))
        alive.append((key, rng.choice(sizes), 1))
        events.append(alive[-1])
    return events


def training_order(num_events: int, num_sizes: int = 50) -> list[Event]:
    """Steps that allocate activations layer by layer and free them backwards, with a temporary beside each."""
    rng = random.Random(1)
    sizes = [int(512 * 2 ** rng.uniform(0, 17)) for _ in range(num_sizes)]
    events: list[Event] = []
    key = 0
    while len(events) < num_events:
        kept: list[Event] = []
        for layer in range(32):
            for n, size in enumerate(sizes):
                key += 1
                events.append((key, size, 1))
                if n % 3 == layer % 3:
                    events.append((key, size, -1))
                else:
                    kept.append(events[-1])
        events += [(event[0], event[1], -1) for event in reversed(kept)]
    return events[:num_events]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    few, many = random_order(options.events, 50), random_order(options.events, 5000)
    steps = training_order(options.events)
    tight = replay(few).peak_allocated_bytes * 11 // 10 // MIB * MIB
    cases = {
        "random order, 50 sizes": (few, AllocatorSettings(), None),
        "random order, 5,000 sizes": (many, AllocatorSettings(), None),
        "random order, 50 sizes, 10 % above the peak": (few, AllocatorSettings(), tight),
        "random order, 50 sizes, expandable segments": (few, AllocatorSettings(expandable_segments=True), None),
        "training steps, 50 sizes": (steps, AllocatorSettings(), None),
        "training steps, 50 sizes, expandable segments": (steps, AllocatorSettings(expandable_segments=True), None),
    }
    print(f"{options.events:,} events, median of {options.runs} runs:\n")
    print("| events | seconds | reserved / allocated at their peaks | retries |\n|---|---|---|---|")
    for name, (events, settings, capacity) in cases.items():
        seconds = []
        for _ in range(options.runs):
            begin = time.perf_counter()
            run = replay(events, settings, capacity_bytes=capacity)
            seconds.append(time.perf_counter() - begin)
        ratio = run.peak_reserved_bytes / run.peak_allocated_bytes
        print(f"| {name} | {statistics.median(seconds):.2f} | {ratio:.3f} | {run.num_alloc_retries} |", flush=True)


if __name__ == "__main__":
    main()
