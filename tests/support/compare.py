"""The formula against the reference trace, tensor by tensor, for finding the tensor that explains a difference.

python -m tests.support.compare CONFIG.json --batch 2 --seq 64 --layers 3 [--precision ...] [--attention ...] \
        [--checkpointing ...] [--dropout P] [--rows]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.architectures.registry import read_architecture
from memplan.estimation.step import HEAD, STEM, Recordings
from memplan.memory.events import Sizes
from memplan.operators.sizes import allocated, bind
from memplan.specs.training import Setup
from tests.support.reference_trace import ReferenceStep, trace_step

if TYPE_CHECKING:
    from memplan.estimation.step import Peaks, StepProgram

DROPOUT_KEYS = ("drop", "pdrop")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def resized(config: dict[str, Any], *, layers: int | None = None, dropout: float | None = None) -> dict[str, Any]:
    """The config with another number of layers, or with every dropout probability replaced."""
    changed = dict(config)
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = resized(config["text_config"], layers=layers, dropout=dropout)
    if layers is not None:
        names = [name for name in LAYER_KEYS if name in config]
        changed |= dict.fromkeys(names, layers)
        if isinstance(changed.get("layer_types"), list):
            changed["layer_types"] = changed["layer_types"][:layers]
    if dropout is not None:
        for name, value in config.items():
            if any(key in name for key in DROPOUT_KEYS) and isinstance(value, (int, float)):
                changed[name] = dropout
    return changed


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both witnesses on one configuration."""

    program: StepProgram
    sizes: Sizes
    formula: Peaks
    formula_first: Peaks
    reference: ReferenceStep


def run_both(
    config: dict[str, Any], *, auto_class: str = "AutoModelForCausalLM", sdpa_kernel: str | None = None, **setup: Any
) -> Pair:
    """Evaluate the formula and run the reference (`sdpa_kernel`: see `trace_step`)."""
    chosen = Setup(**setup)
    architecture = read_architecture(config, "config")
    program = Recordings(architecture).program(chosen)
    sizes = Sizes(bind(chosen.micro_batch_size, chosen.seq_len))
    accumulation = chosen.gradient_accumulation_steps
    reference = trace_step(
        config,
        batch=chosen.micro_batch_size,
        seq=chosen.seq_len,
        precision=chosen.precision,  # type: ignore[arg-type]
        attention=chosen.attention,  # type: ignore[arg-type]
        checkpointing=chosen.activation_checkpointing,
        optimizer=program.states.optimizer,  # type: ignore[arg-type]
        accumulation=accumulation,
        auto_class=auto_class,
        sdpa_kernel=sdpa_kernel,
        padding=chosen.padding,
    )
    return Pair(
        program=program,
        sizes=sizes,
        formula=program.peaks(sizes, accumulation),
        formula_first=program.peaks(sizes, accumulation, first_step=True),
        reference=reference,
    )


def formula_kept(pair: Pair) -> list[tuple[int, str]]:
    """(allocated bytes, what) of every storage that the formula says is kept."""
    rows = []
    for part in pair.program.layout.forward:
        alive: Counter[Any] = Counter()
        row_of = {}
        for event in part.segment.events:
            alive[event.key] += event.sign
            row_of[event.key] = event
        for key, n in alive.items():
            if n == 0 or key == ("hidden",):
                continue
            event = row_of[key]
            what = f"{event.row.module}: {event.row.tensor} {event.row.shape} {event.row.dtype}"
            for place in map(_place, part.places):
                rows.append((n * pair.sizes[event.size], f"{place} {what}"))
        if ("hidden",) in alive:
            for place in map(_place, part.places):
                rows.append((-pair.sizes[row_of[("hidden",)].size], f"{place} hidden states released"))
    return rows


def _place(number: int) -> str:
    return {STEM: "stem", HEAD: "head"}.get(number, f"layer {number}")


def differences(pair: Pair) -> str:
    """Kept storages that only one of the two has, by size."""
    ours, theirs = Counter(), Counter()
    labels: dict[int, list[str]] = {}
    for size, what in formula_kept(pair):
        ours[abs(size)] += 1 if size > 0 else -1
        labels.setdefault(abs(size), []).append(f"formula   {what}" + (" (released)" if size < 0 else ""))
    for row in pair.reference.kept_rows:
        size = allocated(row.num_bytes // row.count)
        theirs[size] += row.count
        labels.setdefault(size, []).append(f"reference {row.module}: {row.op} {row.shape} {row.dtype} x{row.count}")
    lines = []
    for size in sorted(set(ours) | set(theirs), reverse=True):
        if ours[size] != theirs[size]:
            lines.append(f"{size:,} bytes: formula {ours[size]}, reference {theirs[size]}")
            lines += [f"    {label}" for label in labels[size]]
    return "\n".join(lines)


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--padding", action="store_true")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--auto-class", default="AutoModelForCausalLM")
    parser.add_argument("--sdpa-kernel", choices=["flash", "efficient", "math"])
    parser.add_argument("--rows", action="store_true")
    args = parser.parse_args()
    config = resized(json.loads(args.config.read_text()), layers=args.layers, dropout=args.dropout)
    pair = run_both(
        config,
        auto_class=args.auto_class,
        sdpa_kernel=args.sdpa_kernel,
        micro_batch_size=args.batch,
        seq_len=args.seq,
        precision=args.precision,
        attention=args.attention,
        activation_checkpointing=args.checkpointing,
        optimizer=args.optimizer,
        gradient_accumulation_steps=args.accumulation,
        padding=args.padding,
    )
    formula, reference = pair.formula, pair.reference
    num = sum(_product(p.shape) for p in pair.program.recording.parameters())
    print(f"parameters: formula {num:,} reference {reference.num_parameters:,}")
    print(f"kept: formula {formula.kept_activation_bytes:,} reference {reference.kept_allocated_bytes:,}")
    by = formula.by_instant
    ours = {
        "forward": max(by["forward"], by["loss"]),
        "backward": max(by["loss"], by["backward"]),
        "clip": by["gradient clip"],
        "optimizer_step": by["optimizer step"],
    }
    for name, value in ours.items():
        other = reference.phase_peaks[name]
        print(f"peak {name:15} formula {value:>16,} reference {other:>16,} {100 * (value / other - 1):+.3f} %")
    print(f"formula instants: {by}")
    print(f"reference peak: {reference.peak_op} in {reference.peak_module}")
    print(f"peak: formula {formula.peak:,} reference {reference.peak_allocated_bytes:,}", end=" ")
    print(f"{100 * (formula.peak / reference.peak_allocated_bytes - 1):+.3f} %")
    print(
        f"first: formula {pair.formula_first.peak:,} reference {reference.first_step_peak_allocated_bytes:,} "
        f"{100 * (pair.formula_first.peak / reference.first_step_peak_allocated_bytes - 1):+.3f} %"
    )
    print(differences(pair) or "kept tensors agree, one by one")
    if args.rows:
        for row in reference.peak_rows[:40]:
            print(f"  {row.num_bytes:>14,} x{row.count} {row.dtype} {row.shape} {row.op} {row.module}")


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for dim in shape:
        product *= dim
    return product


if __name__ == "__main__":
    main()
