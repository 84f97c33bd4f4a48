"""An estimate as text: three totals, by kind, by instant, the largest rows, what was assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.estimation.estimate import SEGMENT_BYTES
from memplan.report.ansi import Line
from memplan.report.layout import bar, plural, wrap
from memplan.report.plan import way_lines
from memplan.report.text import (
    SEQUENCE,
    assumption_lines,
    calibration_facts,
    choices,
    compiled_lines,
    equation,
    exactly,
    gib,
    gpu_facts,
    lint_lines,
    may_fit,
    model_facts,
    paragraph,
    paragraphs,
    table,
    title,
    unmodelled_lines,
    vouched,
)
from memplan.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Document = dict[str, Any]

BAR_CELLS = 30
MOST_ROWS = 12
SMALL = 0.005
"""Kinds with a smaller share of the process than this are listed together."""


def render_estimate(estimate: Document, *, quiet: bool = False) -> list[Line]:
    """The text of an estimate document; `quiet`: the totals alone."""
    if quiet:
        return [line for line in _totals(estimate) if line.text][1:]
    return [
        *_asked(estimate),
        *_totals(estimate),
        *(way_lines(estimate["ways_out"], estimate) if estimate["fits"] is False else ()),
        *_kinds(estimate),
        *_instants(estimate),
        *_rows(estimate["ledger"]),
        *lint_lines(estimate["lints"]),
        *assumption_lines(estimate["assumptions"]),
        *unmodelled_lines(estimate["unmodelled"]),
    ]


def _asked(estimate: Document) -> Iterator[Line]:
    yield from paragraphs(asked_facts(estimate))
    yield from (Line(line) for line in wrap(equation(estimate["setup"], estimate["model"]["unit"]), first="  "))


def asked_facts(estimate: Document) -> Iterator[tuple[str, str]]:
    """What was asked about, as labels and texts."""
    setup = estimate["setup"]
    yield from model_facts(estimate["model"])
    if estimate["gpu"]:
        yield from gpu_facts(estimate["gpu"], num=setup["data_parallel_size"], precision=setup["precision"])
        yield from calibration_facts(estimate["calibration"])
    else:
        yield "GPU", "none in particular, so that no calibration was used"
    if estimate["target"] and estimate["target"]["rounding"]:
        yield "", f"{estimate['target']['rounding']}."
    yield "setup", f"{choices(setup)}, checkpointing {setup['activation_checkpointing']}"
    if estimate["model"]["unit"] == SEQUENCE:
        yield "length", plural(setup["seq_len"], "token")


def _by_the_allocator(estimate: Document) -> str:
    if estimate["alloc_conf"]:
        return f"with PYTORCH_ALLOC_CONF={estimate['alloc_conf']}"
    least = -(-estimate["peak_allocated_bytes"] // SEGMENT_BYTES) * SEGMENT_BYTES
    if estimate["fits"] is False and estimate["peak_reserved_bytes"] == least:
        return "in whole segments, at the least: too much already"
    return "by the caching allocator, the run replayed through it"


def _totals(estimate: Document) -> Iterator[Line]:
    yield from title(f"The peak, at its highest: {estimate['peak_instant']}")
    yield from table([("", "GiB", ""), *total_rows(estimate)], left=(0, 2))
    yield from compiled_lines(estimate["compiled"])
    if estimate["step_time_s"] is not None:
        yield from paragraph("time", time_words(estimate))
    verdict = verdict_words(estimate)
    if verdict:
        yield from title(verdict, "good" if estimate["fits"] else "bad")


def total_rows(estimate: Document) -> list[tuple[str, str, str]]:
    """The three totals and the bound: name, GiB, what it is."""
    rows = [
        ("allocated", gib(estimate["peak_allocated_bytes"]), "tensors, in blocks of 512 bytes"),
        ("reserved", gib(estimate["peak_reserved_bytes"]), _by_the_allocator(estimate)),
        (
            "process",
            gib(estimate["peak_process_bytes"]),
            f"with {format_bytes(estimate['context_bytes'])} CUDA context, "
            f"{format_bytes(estimate['workspace_bytes'])} cuBLAS",
        ),
    ]
    margin = estimate["upper_bound_bytes"] - estimate["peak_process_bytes"]
    if margin:
        said = vouched(estimate["confidence"]) or f"with {format_bytes(margin)} of headroom and reserve"
        rows.append(("bound", gib(estimate["upper_bound_bytes"]), said))
    return rows


def time_words(estimate: Document) -> str:
    """How long a step takes, and how that is known."""
    seconds = format_seconds(estimate["step_time_s"])
    calibration = estimate["calibration"]
    if calibration is not None and calibration["is_timed"] and not estimate["setup"]["compile"]:
        return f"about {seconds} per step, at the speed that was measured"
    return f"at least {seconds} per step (roofline)"


def verdict_words(estimate: Document) -> str:
    """Whether it fits; empty without a GPU."""
    spare, gpu = estimate["headroom_bytes"], estimate["gpu"]
    if gpu is None:
        return ""
    usable = format_bytes(gpu["usable_bytes"])
    if estimate["fits"]:
        return f"It fits: {format_bytes(spare)} of {usable} are to spare"
    if may_fit(estimate["compiled"], gpu):
        return f"It may not fit: at the upper end {exactly(-spare)} are missing of {usable}"
    return f"It does not fit: {exactly(-spare)} are missing of {usable}"


def _kinds(estimate: Document) -> Iterator[Line]:
    by_kind: dict[str, int] = {}
    for row in estimate["ledger"]:
        by_kind[row["kind"]] = by_kind.get(row["kind"], 0) + row["bytes_at_peak"]
    whole = estimate["peak_process_bytes"]
    small = {kind: num for kind, num in by_kind.items() if num < SMALL * whole}
    shown = [(kind, num) for kind, num in by_kind.items() if kind not in small]
    if any(small.values()):
        shown.append(("the rest", sum(small.values())))
    yield from title("What the process is made of, at the peak")
    rows = [
        (kind.replace("_", " "), gib(num), f"{percent} %", bar(num / whole if percent else 0, BAR_CELLS))
        for kind, num in shown
        for percent in [round(100 * num / whole)]
    ]
    yield from table([("kind", "GiB", "", ""), *rows], left=(0, 3))


def _instants(estimate: Document) -> Iterator[Line]:
    highest = estimate["peak_allocated_bytes"]
    yield from title("Over a step (allocated)")
    rows = [("", "GiB", "first step", "")]
    rows += [
        (
            one["name"],
            gib(one["allocated_bytes"]),
            gib(one["first_step_allocated_bytes"]),
            bar(one["allocated_bytes"] / highest, BAR_CELLS),
        )
        for one in estimate["instants"]
    ]
    yield from table(rows, left=(0, 3))


def _rows(ledger: Sequence[Document]) -> Iterator[Line]:
    largest = sorted(ledger, key=lambda row: (-row["bytes_at_peak"], -row["bytes"]))[:MOST_ROWS]
    yield from title(f"The largest {len(largest)} of {len(ledger)} rows (all: --format csv or --json)")
    rows = [("module", "tensor", "count", "dtype", "GiB", "at peak")]
    rows += [
        (
            row["module"],
            row["tensor"],
            f"{row['count']:,}",
            row["dtype"],
            gib(row["bytes"]),
            gib(row["bytes_at_peak"]),
        )
        for row in largest
    ]
    yield from table(rows, left=(0, 1, 3), shrink_too=1, keep_end=True)
