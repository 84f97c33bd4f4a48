"""A sweep as plain data and as text: a map of what fits, and the largest micro-batch of each length."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from memplan.estimation.estimate import context_bytes, workspace_bytes
from memplan.estimation.sweep import MOST_LENGTHS_REPLAYED, spread
from memplan.report.ansi import Line
from memplan.report.document import (
    calibration_document,
    envelope,
    gpu_document,
    model_document,
    setup_document,
)
from memplan.report.layout import WIDTH, bar, plural, wrap
from memplan.report.text import (
    calibration_facts,
    choices,
    exactly,
    gpu_facts,
    model_facts,
    paragraphs,
    table,
    title,
    unmodelled_lines,
)
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memplan.estimation.sweep import Sweep

    Document = dict[str, Any]

MOST_LINES = 16
BAR_CELLS = 12
SYMBOL_BY_VERDICT = {"fits": " +", "tight": " ~", "oom": " x", None: ""}
LEGEND = "+ fits   ~ tight   x out of memory"
SWEPT = ("micro_batch_size", "seq_len", "global_batch_size", "tokens_per_micro_batch", "tokens_per_step")
"""Keys of a setup that differ from point to point."""


def sweep_document(sweep: Sweep, *, origin: str = "") -> Document:
    """The table.

    Args:
        sweep: The answer.
        origin: Why it is this model.
    """
    setup = setup_document(sweep.grid.setup)
    return {
        **envelope("sweep"),
        "model": model_document(sweep.model, origin),
        "setup": {key: value for key, value in setup.items() if key not in SWEPT},
        "gpu": None if sweep.gpu is None else gpu_document(sweep.gpu),
        "calibration": calibration_document(sweep.gpu),
        "budget": None
        if sweep.gpu is None
        else {
            "usable_bytes": sweep.gpu.usable_bytes,
            "free_bytes": sweep.margin.num_bytes,
            "bound_ratio": sweep.margin.ratio,
            "process_bytes": sweep.margin.budget(sweep.gpu.usable_bytes),
        },
        "context_bytes": context_bytes(sweep.gpu),
        "workspace_bytes": workspace_bytes(sweep.gpu),
        "micro_batch_sizes": list(sweep.micro_batch_sizes),
        "seq_lens": list(sweep.seq_lens),
        "fits": sweep.fits,
        "largest": [one._asdict() for one in sweep.largest],
        "num_replays": sweep.num_replays,
        "points": sweep.records(),
        "unmodelled": [{"what": what, "why": why} for what, why in sweep.unmodelled],
    }


def render_sweep(sweep: Document, *, quiet: bool = False) -> list[Line]:
    """The text of a sweep document; `quiet`: the largest micro-batches alone, without a GPU the map."""
    chosen = shown_lengths(sweep)
    answer = [*_map(sweep, chosen)] if sweep["gpu"] is None else [*_largest(sweep, chosen)]
    if quiet:
        return answer[1:]
    return [
        *paragraphs(swept_facts(sweep)),
        *(_map(sweep, chosen) if sweep["gpu"] else ()),
        *answer,
        *_basis(sweep),
        *unmodelled_lines(sweep["unmodelled"], briefly=True),
    ]


def swept_facts(sweep: Document) -> Iterator[tuple[str, str]]:
    """What was asked about, as labels and texts."""
    setup, gpu = sweep["setup"], sweep["gpu"]
    yield from model_facts(sweep["model"])
    if gpu:
        yield from gpu_facts(gpu, num=setup["data_parallel_size"], precision=setup["precision"])
        yield from calibration_facts(sweep["calibration"])
        yield "budget", _budget(sweep["budget"])
    else:
        yield "GPU", "none in particular: say --gpu to see what fits"
    yield "setup", f"{choices(setup)}, checkpointing {setup['activation_checkpointing']}"
    yield from _compiled(sweep)
    steps, gpus = setup["gradient_accumulation_steps"], plural(setup["data_parallel_size"], "GPU")
    yield (
        "sweep",
        f"{_from_to(sweep['micro_batch_sizes'], 'micro-batch', 'micro-batches')} x "
        f"{_from_to(sweep['seq_lens'], 'length', 'lengths')} = "
        f"{plural(len(sweep['points']), 'point')}, accumulation {steps:,} x {gpus}",
    )


def _compiled(sweep: Document) -> Iterator[tuple[str, str]]:
    """Under torch.compile: between which bounds the numbers lie."""
    if not sweep["setup"]["compile"]:
        return
    lowest, highest = (by(point["least_peak_process_bytes"] for point in sweep["points"]) for by in (min, max))
    text = (
        "the map shows the upper ends of ranges, what is kept without the compiler; their lower ends, what products "
        f"need, go from {format_bytes(lowest)} to {format_bytes(highest)} (all: --format csv or --json)"
    )
    may = "; an x is out of memory at the upper end, and may run all the same" if sweep["gpu"] else ""
    yield "compiled", f"{text}{may}"


def _from_to(numbers: Sequence[int], noun: str, nouns: str) -> str:
    """``7 micro-batches (1 to 64)``."""
    if len(numbers) == 1:
        return f"1 {noun} ({numbers[0]:,})"
    return f"{len(numbers):,} {nouns} ({numbers[0]:,} to {numbers[-1]:,})"


def _budget(budget: Document) -> str:
    text = f"{format_bytes(budget['process_bytes'])} for the process"
    if budget["free_bytes"]:
        text += f", {format_bytes(budget['free_bytes'])} of headroom and reserve stay free"
    if budget["bound_ratio"]:
        text += f", and a bound {100 * budget['bound_ratio']:.1f} % above the prediction has to hold"
    return text


# -- the map -----------------------------------------------------------------------------------------------------------


def shown_lengths(sweep: Document) -> list[int]:
    """Positions of the lengths that are shown: as many as 80 columns hold of those that may have been replayed."""
    widest = max(len(_cell(point)) for point in sweep["points"])
    widest = max(widest, *(len(f"{length:,}") for length in sweep["seq_lens"]))
    first = 2 + max(len("micro"), len(f"{sweep['micro_batch_sizes'][-1]:,}"))
    positions = spread(len(sweep["seq_lens"]), MOST_LENGTHS_REPLAYED)
    return [positions[n] for n in spread(len(positions), max(2, (WIDTH - first) // (widest + 2)))]


def shown_batches(sweep: Document, chosen: Sequence[int]) -> list[int]:
    """Positions of the micro-batches that are shown: the ends, those at the boundary, then doublings."""
    batches = sweep["micro_batch_sizes"]
    if len(batches) <= MOST_LINES:
        return list(range(len(batches)))
    found = [0, len(batches) - 1]
    for key in ("micro_batch_size", "at_the_least"):
        edges = [sweep["largest"][n][key] for n in chosen] if sweep["largest"] else []
        found += [bisect_left(batches, edge) for edge in edges if edge is not None]
    found += [bisect_left(batches, 1 << power) for power in range(batches[-1].bit_length())]
    return sorted(list(dict.fromkeys(found))[:MOST_LINES])


def _cell(point: Document) -> str:
    """``12.34 +``: three digits at least, so that cells stay narrow."""
    number = point["peak_process_bytes"] / GIB
    if number >= 10**5:
        return f"{format_bytes(point['peak_process_bytes'])}{SYMBOL_BY_VERDICT[point['verdict']]}"
    return f"{number:,.{2 if number < 100 else 0}f}{SYMBOL_BY_VERDICT[point['verdict']]}"


def _map(sweep: Document, chosen: Sequence[int]) -> Iterator[Line]:
    batches, lengths = sweep["micro_batch_sizes"], sweep["seq_lens"]
    shown = shown_batches(sweep, chosen)
    yield from title("GiB of the process at its peak: micro-batches down, tokens per sequence across")
    if sweep["gpu"]:
        yield Line(f"  {LEGEND}")
    pad = " " * len(SYMBOL_BY_VERDICT["fits" if sweep["gpu"] else None])
    rows = [("micro", *(f"{lengths[n]:,}{pad}" for n in chosen))]
    for m in shown:
        cells = [_cell(sweep["points"][m * len(lengths) + n]) for n in chosen]
        rows.append((f"{batches[m]:,}", *cells))
    yield from table(rows, left=())
    if (len(shown), len(chosen)) != (len(batches), len(lengths)):
        text = (
            f"{len(shown)} of {len(batches):,} micro-batches and {len(chosen)} of {len(lengths):,} lengths; "
            "all: --format csv or --json"
        )
        yield from (Line(line, "faint") for line in wrap(text, first="  "))


# -- the largest -------------------------------------------------------------------------------------------------------


def _largest(sweep: Document, chosen: Sequence[int]) -> Iterator[Line]:
    if not sweep["fits"]:
        yield from _nothing(sweep)
        return
    yield from title("The largest micro-batch that fits", "good")
    yield from table(largest_rows(sweep, chosen, bars=True), left=())


def largest_rows(sweep: Document, chosen: Sequence[int], *, bars: bool = False) -> list[list[str]]:
    """The largest micro-batch of lengths by their positions, the names of the columns first; empty ones left out.

    `bars`: with a bar of characters for what they take of the card.
    """
    last = sweep["micro_batch_sizes"][-1]

    def largest(batch: int | None) -> str:
        return "none" if batch is None else f"{batch:,}{' or more' if batch == last else ''}"

    rows = [("length", "micro-batch", "tokens", "card, at least", "with expandable segments", "")]
    for n in chosen:
        one = sweep["largest"][n]
        plain, expandable = one["micro_batch_size"], one["with_expandable_segments"]
        rows.append(
            (
                f"{one['seq_len']:,}",
                largest(plain),
                "" if plain is None else f"{plain * one['seq_len']:,}",
                "" if plain is None else _taken(sweep, plain, n),
                "" if plain == expandable else largest(expandable),
                "" if one["is_replayed"] else "or more: not replayed",
            )
        )
    always = 4 if bars else 3
    filled = [
        n for n, heading in enumerate(rows[0]) if (bars or n != 3) and (n < always or any(row[n] for row in rows[1:]))
    ]
    if len(filled) == len(rows[0]):
        filled.remove(3)  # 80 columns do not hold everything
    return [[row[n] for n in filled] for row in rows]


def _taken(sweep: Document, batch: int, n: int) -> str:
    """How much of the card a micro-batch takes at the n-th length, at the least: ``85 %`` and a bar."""
    at = bisect_left(sweep["micro_batch_sizes"], batch) * len(sweep["seq_lens"]) + n
    share = sweep["points"][at]["peak_process_bytes"] / sweep["gpu"]["usable_bytes"]
    return f"{bar(share, BAR_CELLS)} {math.floor(100 * share):2} %"


def _nothing(sweep: Document) -> Iterator[Line]:
    """What the smallest point lacks; where it is tight, what decides."""
    headline, facts = nothing_words(sweep)
    yield from title(headline, "bad")
    yield from paragraphs(facts)


def nothing_words(sweep: Document) -> tuple[str, list[tuple[str, str]]]:
    """The same as a headline, and labels and texts."""
    point = sweep["points"][0]
    size = f"{point['micro_batch_size']:,} x {plural(point['seq_len'], 'token')}"
    ways = ("ways out", "memplan suggest and memplan estimate, with this --gpu, name them")
    if point["verdict"] == "tight":
        said = f"{size}: the tensors fit, and the segments around them do not"
        return "Nothing fits as the allocator cuts its segments", [("smallest", said), ways]
    said = f"{size} takes {format_bytes(point['peak_process_bytes'])} at the least"
    return f"Nothing fits: {exactly(-point['headroom_bytes'])} are missing", [("smallest", said), ways]


def _basis(sweep: Document) -> Iterator[Line]:
    """What the numbers of the map are, and what stands behind the symbols."""
    yield from title("How it was found")
    yield from paragraphs(basis_facts(sweep))


def basis_facts(sweep: Document) -> Iterator[tuple[str, str]]:
    """The same as labels and texts."""
    rest = sweep["context_bytes"] + sweep["workspace_bytes"]
    yield (
        "GiB",
        "tensors in whole segments of 2 MiB, the least that PyTorch's allocator can hold, and "
        f"{format_bytes(rest)} of CUDA context and cuBLAS; memplan estimate replays the run and finds as much or more",
    )
    if not sweep["gpu"]:
        return
    yield "x", "even that is more than the budget"
    if sweep["num_replays"]:
        text = (
            f"at the boundary {plural(sweep['num_replays'], 'run')} went through a simulator of the allocator; "
            "what fits is taken to fit with fewer sequences or shorter ones, too"
        )
        yield "+", text
    if any(point["verdict"] == "tight" for point in sweep["points"]):
        text = (
            "the least fits, and the run as replayed with the allocator's default settings does not: it may run "
            "out of memory; expandable segments (PYTORCH_ALLOC_CONF=expandable_segments:True) help some of them"
        )
        yield "~", text
