"""How far are predictions from measurements?  As text, and as the table of the README.

    error = (predicted - measured) / measured

Negative is the dangerous direction: a plan that counts on too little runs out of memory.  The median has its sign, the
percentiles shown are of the sizes of the errors, and the worst are named in both directions.  The page with the charts
is `pages.accuracy`; the words that the three share are here.

Left out: everything that is not in the document.  The newest record is its date, never the day it is shown.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from memplan.report.ansi import Line
from memplan.report.layout import clip, plural, wrap
from memplan.report.tables import render_markdown
from memplan.report.text import gib, paragraph, table, title

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Document = dict[str, Any]

DEVICES = ("cuda", "cpu")
QUANTITIES = ("allocated", "reserved", "process", "step_time")

SUBJECT_BY_DEVICE = {
    "cuda": "real training steps on GPUs",
    "cpu": "bytes of tensors of real training steps on a CPU",
}
"""What was measured there."""

PLACE_BY_DEVICE = {"cuda": "GPU", "cpu": "CPU, tensors of real training steps"}
SHORT_BY_DEVICE = {"cuda": "GPU", "cpu": "CPU"}
"""The same, for the cell of a table."""

NAME_BY_QUANTITY = {
    "allocated": "allocated",
    "reserved": "reserved",
    "process": "process",
    "step_time": "step time",
}

MEANING_BY_QUANTITY = {
    "allocated": "bytes of tensors",
    "reserved": "bytes that PyTorch's allocator holds",
    "process": "bytes of the whole process",
    "step_time": "seconds of an optimizer step",
}

GROUPS = {
    "model_type": "By architecture",
    "gpu": "By card",
    "precision": "By precision",
    "checkpointing": "By checkpointing",
    "lora": "By adapter",
}
"""Group of errors -> its heading, in the order they are shown in."""

ERROR_LEGEND = (
    "Errors are (predicted - measured) / measured: minus is too little, and a plan that counts on too few bytes runs "
    "out of memory. p90 and p99 are of their sizes: no more than that in 90 and 99 % of the measurements."
)

TIME_LEGEND = (
    "Step times are lower bounds unless a card is calibrated (--calibrated): minus is what the roofline leaves out."
)

CPU_LEGEND = (
    "A CPU has no caching allocator, no CUDA context and other kernels: equal bytes there say that the tensors are "
    "counted rightly, and nothing about reserved or process bytes of a GPU."
)

UNEXPLAINED_LEGEND = (
    "left, unexplained: what remains of the error once the tensors are counted that one of the two runs is known to "
    "hold and the other not"
)

NOT_STATED = "not stated"
"""In place of a card that the source does not name."""

BOUNDS = {"floor": ("lower bounds", "above"), "ceiling": ("upper bounds", "below")}
"""Comparison -> its name, and where memplan's number is if it does not hold."""

BOUND_LEGEND = (
    "bound: memplan's number can only be a lower bound, as the run holds what memplan does not count, or an upper one, "
    "as only the longest a sequence may be is known; it holds where what was measured is not on its other side"
)

VERDICTS = {
    "true_maximum": "named the largest micro-batch that ran",
    "one_below": "stayed one below it",
    "further_below": "stayed further below",
    "too_large": "ran out of memory",
    "undecided": "undecided",
}
"""Count of `decisions` -> what these plans did."""

SHORT_BY_VERDICT = {
    "true_maximum": "largest that ran",
    "one_below": "one below",
    "further_below": "further below",
    "too_large": "too large",
    "undecided": "undecided",
}
"""Verdict on one plan -> the same for the cell of a table."""

MOST_CASES = 20
MOST_REASONS = 8
"""Rows that are listed in text; all are on the page and in the JSON."""

GPU_WIDTH = 12
VERDICT_WIDTH = 16
"""Columns of texts that stand beside a column that is cut already."""


OF_A_POINT = ("quantity", "measured", "predicted", "error")
"""What a chart needs of a point."""

# -- numbers and words -------------------------------------------------------------------------------------------------


def percent(error: float | None) -> str:
    """A signed error: ``+0.03 %``, ``-12.6 %``; ``exact`` is zero and nothing else."""
    if error is None:
        return "-"
    return "exact" if error == 0 else f"{'+' if error > 0 else ''}{size(error)}"


def size(error: float) -> str:
    """An error with as many decimals as mean something: ``0.03 %``, ``12.6 %``, ``1,250 %``."""
    if error == 0:
        return "exact"
    share = 100 * error
    return f"{share:,.{2 if abs(share) < 0.1 else 1 if abs(share) < 100 else 0}f} %"


def printable(text: str) -> str:
    """Text from outside on one line, without what would move a cursor or colour a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def overall(document: Document, device: str) -> list[Document]:
    """The errors of one device over all its measurements, one row a quantity."""
    rows = {row["quantity"]: row for row in _errors(document, device, "all")}
    return [rows[quantity] for quantity in QUANTITIES if quantity in rows]


def grouped(document: Document, group: str) -> list[Document]:
    """The errors of one group on all devices."""
    return [row for device in DEVICES for row in _errors(document, device, group)]


def _errors(document: Document, device: str, group: str) -> list[Document]:
    return [row for row in document["errors"] if row["device"] == device and row["group"] == group and row["num"] > 0]


def num_measured(document: Document, device: str) -> int:
    """Measurements on `device` that were compared."""
    return max((row["num"] for row in overall(document, device)), default=0)


def is_broken(comparison: Document) -> bool:
    """Whether what can only be a lower bound is above what was measured, or an upper one below it."""
    kind, error = comparison["comparison"], comparison["error"]
    return bool((kind == "floor" and error > 0) or (kind == "ceiling" and error < 0))


def error_of(comparison: Document) -> str:
    """The error of a published number; of a bound, whether it holds."""
    if comparison["comparison"] == "value":
        return percent(comparison["error"])
    if not is_broken(comparison):
        return "bound holds"
    return f"{'above' if comparison['error'] > 0 else 'below'} {percent(comparison['error'])}"


# -- the verdict -------------------------------------------------------------------------------------------------------


def verdict(document: Document) -> list[str]:
    """What can be said in a few sentences, the most important first."""
    return [
        *_on_gpus(document),
        *_on_cpus(document),
        *([] if document["decisions"]["num"] == 0 else [decided(document["decisions"])]),
        *_on_published(document["published"]),
    ]


def _on_gpus(document: Document) -> Iterator[str]:
    rows = overall(document, "cuda")
    if not rows:
        yield _no_gpus(document["measured"])
        return
    row = next(
        (row for name in ("process", "reserved", "allocated") for row in rows if row["quantity"] == name), rows[0]
    )
    yield (f"On GPUs, {plural(row['num'], 'measurement')}: {MEANING_BY_QUANTITY[row['quantity']]} {_spread(row)}.")


def _no_gpus(measured: Document) -> str:
    unknown = "so how accurate memplan is on a GPU is not known"
    if measured["num_on_gpus"]:
        return f"What was measured on GPUs cannot be compared (see what is left out), {unknown}."
    return f"No measurement of our own on a GPU exists yet, {unknown}."


def _on_cpus(document: Document) -> Iterator[str]:
    for row in overall(document, "cpu")[:1]:
        kinds = plural(row["num"], "measurement")
        yield f"CPU, {SUBJECT_BY_DEVICE['cpu']} ({kinds}): {_spread(row)}."


def _spread(row: Document) -> str:
    if row["worst_over"] is None and row["worst_under"] is None:
        return "exact, byte for byte"
    worst = [
        f"{size(abs(row[key]))} too {word}"
        for key, word in (("worst_under", "little"), ("worst_over", "much"))
        if row[key]
    ]
    within = "exact" if row["abs_p90"] == 0 else f"within {size(row['abs_p90'])}"
    return f"{percent(row['median'])} at the median, 90 % of them {within}; worst {' and '.join(worst) or 'exact'}"


def decided(decisions: Document) -> str:
    """``Of 10 plans put to the test, 7 named the largest micro-batch that ran, ...``."""
    counts = [f"{decisions[key]:,} {words}" for key, words in VERDICTS.items() if decisions[key]]
    return f"Of {plural(decisions['num'], 'plan')} put to the test on a device, {', '.join(counts)}."


def _on_published(published: Document) -> Iterator[str]:
    compared = published["compared"]
    if not compared:
        return
    errors = [one["error"] for one in compared if one["comparison"] == "value"]
    text = f"{plural(len(compared), 'GPU number')} that others published"
    if errors:
        text += f": {percent(min(errors))} to {percent(max(errors))}, {percent(median(errors))} at the median"
    for kind, (name, beyond) in BOUNDS.items():
        bounds = [one for one in compared if one["comparison"] == kind]
        if bounds:
            broken = sum(map(is_broken, bounds))
            text += f"; {name}: {len(bounds):,}, {f'{broken:,} {beyond} what was measured' if broken else 'all hold'}"
    yield f"{text}."


# -- in short ----------------------------------------------------------------------------------------------------------


def summary(document: Document) -> Document:
    """What a page about something else says of it: the verdict, the errors of all together, and a point for each."""
    return {
        "memplan_version": document["memplan_version"],
        "last": document["measured"]["last"],
        "verdict": verdict(document),
        "overall": {device: overall(document, device) for device in DEVICES},
        "points": [{name: one[name] for name in ("device", *OF_A_POINT)} for one in document["points"]],
        "published": {
            "compared": [
                {name: one[name] for name in ("comparison", *OF_A_POINT)} for one in document["published"]["compared"]
            ]
        },
    }


# -- text --------------------------------------------------------------------------------------------------------------


def render_accuracy(document: Document, *, quiet: bool = False) -> list[Line]:
    """The text of an accuracy document; `quiet`: the verdict and the overall errors alone."""
    lines = [*_verdict_lines(document), *_overall_lines(document, quiet=quiet)]
    if quiet:
        return lines
    return [
        *lines,
        *_group_lines(document),
        *_decision_lines(document["decisions"]),
        *_published_lines(document["published"]),
        *_reason_lines("Measured and left out", document["left_out"]),
        *_origin_lines(document),
    ]


def _verdict_lines(document: Document) -> Iterator[Line]:
    style = "title" if overall(document, "cuda") else "bad"
    for number, sentence in enumerate(verdict(document)):
        yield from (Line(line, "" if number else style) for line in wrap(sentence))


def _overall_lines(document: Document, *, quiet: bool) -> Iterator[Line]:
    for device in DEVICES:
        rows = overall(document, device)
        if not rows:
            continue
        yield from title(f"Errors: {SUBJECT_BY_DEVICE[device]}")
        yield from table([("", *ERROR_COLUMNS), *((NAME_BY_QUANTITY[row["quantity"]], *_cells(row)) for row in rows)])
        words = {point["id"]: point["words"] for point in document["points"]}
        for row in rows if not quiet else []:
            if row["worst_under_id"] is not None and row["quantity"] != "step_time":
                worst = printable(str(words.get(row["worst_under_id"], row["worst_under_id"])))
                yield from _faint(f"most too little, {NAME_BY_QUANTITY[row['quantity']]}: {worst}")
        if any(row["quantity"] == "step_time" for row in rows) and not quiet:
            yield from _faint(TIME_LEGEND)
        if device == "cpu" and not quiet:
            yield from _faint(CPU_LEGEND)
    if any(overall(document, device) for device in DEVICES):
        yield Line("")
        yield from _faint(ERROR_LEGEND)


ERROR_COLUMNS = ("n", "median", "p90", "p99", "worst over", "worst under")


def _cells(row: Document) -> tuple[str, ...]:
    return (
        f"{row['num']:,}",
        percent(row["median"]),
        *(size(row[key]) for key in ("abs_p90", "abs_p99")),
        percent(row["worst_over"]),
        percent(row["worst_under"]),
    )


def _group_lines(document: Document) -> Iterator[Line]:
    for group, heading in GROUPS.items():
        rows = grouped(document, group)
        if not rows:
            continue
        yield from title(heading)
        cells = [
            (
                printable(row["value"]),
                SHORT_BY_DEVICE[row["device"]],
                NAME_BY_QUANTITY[row["quantity"]],
                f"{row['num']:,}",
                percent(row["median"]),
                size(row["abs_p90"]),
                percent(row["worst_over"]),
                percent(row["worst_under"]),
            )
            for row in rows
        ]
        yield from table([("", "", "", "n", "median", "p90", "worst over", "worst under"), *cells], left=(0, 1, 2))


def _decision_lines(decisions: Document) -> Iterator[Line]:
    if not decisions["num"]:
        return
    yield from title("Plans put to the test: the micro-batch named, and what ran")
    cases = decisions["cases"]
    for case in cases[:MOST_CASES]:
        yield from (Line(line) for line in wrap(printable(case["trial"]), first="  "))
        named, survived, failed, verdict = _case(case)
        text = f"named {named}; the largest that ran {survived}, the smallest that did not {failed}: {verdict}"
        yield from (Line(line, "faint") for line in wrap(text, first="    "))
    if len(cases) > MOST_CASES:
        yield from _faint(f"and {len(cases) - MOST_CASES:,} more: --json")


def _case(case: Document) -> tuple[str, ...]:
    counts = (case["recommended"], case["largest_survivor"], case["smallest_failure"])
    name: str = case["verdict"]
    words = clip(printable(SHORT_BY_VERDICT.get(name, name)), VERDICT_WIDTH)
    return (*("-" if count is None else f"{count:,}" for count in counts), words)


def _published_lines(published: Document) -> Iterator[Line]:
    compared = published["compared"]
    if compared:
        yield from title(f"What others published (GiB): {len(compared):,} of {plural(published['num_rows'], 'row')}")
        rows: list[tuple[str, ...]] = [("model", "GPU", "quantity", "measured", "memplan", "error", "left")]
        rows += [
            (
                printable(one["model"]),
                clip(printable(one["gpu"] or NOT_STATED).removeprefix("NVIDIA "), GPU_WIDTH),
                NAME_BY_QUANTITY.get(one["quantity"], one["quantity"]),
                gib(one["measured"]),
                gib(one["predicted"]),
                error_of(one),
                "" if one["explained_error"] is None else percent(one["explained_error"]),
            )
            for one in compared
        ]
        if not any(row[-1] for row in rows[1:]):
            rows = [row[:-1] for row in rows]
        yield from table(rows, left=(0, 1, 2))
        for line in _published_legend(compared):
            yield from _faint(line)
    yield from _reason_lines("Published and not answered", published["not_answered"])


def _published_legend(compared: Iterable[Document]) -> Iterator[str]:
    compared = list(compared)
    if any(one["explained_error"] is not None for one in compared):
        yield UNEXPLAINED_LEGEND
    if any(one["comparison"] in BOUNDS for one in compared):
        yield BOUND_LEGEND


def _reason_lines(heading: str, reasons: Sequence[Document]) -> Iterator[Line]:
    if not reasons:
        return
    yield from title(f"{heading}: {sum(one['num'] for one in reasons):,}")
    for one in reasons[:MOST_REASONS]:
        for line in wrap(printable(one["reason"]), first=f"  {one['num']:>5,}  "):
            yield Line(line)
    if len(reasons) > MOST_REASONS:
        rest = sum(one["num"] for one in reasons[MOST_REASONS:])
        yield from _faint(f"and {rest:,} for {plural(len(reasons) - MOST_REASONS, 'more reason')}: --json")


def _origin_lines(document: Document) -> Iterator[Line]:
    measured = document["measured"]
    yield Line("")
    yield from paragraph("measured", printable(origin(measured)))
    if measured["cards"]:
        yield from paragraph("cards", printable(", ".join(measured["cards"])))
    if measured["stacks"]:
        yield from paragraph("versions", printable("; ".join(measured["stacks"])))
    yield from paragraph("witness", f"{document['witness']}, memplan {printable(document['memplan_version'])}")
    for bad in document["bad_lines"]:
        yield from paragraph("skipped", printable(f"{bad['path']}, line {bad['number']:,}: {bad['reason']}"))


def origin(measured: Document) -> str:
    """``12 records, 10 compared, from 2026-11-20 to 2026-11-22``."""
    text = f"{plural(measured['num_records'], 'record')}, {measured['num_compared']:,} compared"
    if measured["first"] is None or measured["last"] is None:
        return text
    first, last = day(measured["first"]), day(measured["last"])
    return f"{text}, of {last}" if first == last else f"{text}, from {first} to {last}"


def day(moment: str) -> str:
    """The date of a moment in ISO 8601."""
    return moment.partition("T")[0]


def _faint(text: str) -> Iterator[Line]:
    for line in wrap(text, first="  "):
        yield Line(line, "faint")


# -- the README's table ------------------------------------------------------------------------------------------------


def accuracy_markdown(document: Document) -> str:
    """The short form for the README: one row a device and quantity, the decisions, the published numbers."""
    parts = [_dated(document)]
    rows = [
        {"where": PLACE_BY_DEVICE[device], "quantity": NAME_BY_QUANTITY[row["quantity"]]}
        | dict(zip(ERROR_COLUMNS, _cells(row), strict=True))
        for device in DEVICES
        for row in overall(document, device)
    ]
    if rows:
        parts += [render_markdown(rows), f"{ERROR_LEGEND}\n"]
    if document["decisions"]["num"]:
        parts.append(f"{decided(document['decisions'])}\n")
    compared = document["published"]["compared"]
    if compared:
        parts += [render_markdown([_markdown_row(one) for one in compared]), *_markdown_notes(compared)]
    parts.append(_not_measured(document))
    return "\n".join(parts)


def _dated(document: Document) -> str:
    measured, published = document["measured"], document["published"]
    dates = []
    if measured["last"] is not None:
        dates.append(f"newest record of {_markdown(day(measured['last']))}")
    if published["last"] and published["compared"]:
        dates.append(f"newest published number of {_markdown(published['last'])}")
    text = f"Predicted against measured ({'; '.join(dates) or 'nothing is measured yet'})."
    return f"{text} {'' if overall(document, 'cuda') else next(_on_gpus(document))}".rstrip() + "\n"


def _markdown_row(one: Document) -> Document:
    rest = one["explained_error"]
    return {
        "model": _markdown(one["model"]),
        "GPU": _markdown(one["gpu"] or NOT_STATED),
        "quantity": NAME_BY_QUANTITY.get(one["quantity"], one["quantity"]),
        "measured": f"{gib(one['measured'])} GiB",
        "predicted": f"{gib(one['predicted'])} GiB",
        "error": error_of(one),
        "unexplained": error_of(one) if rest is None else percent(rest),
    }


def _markdown_notes(compared: Sequence[Document]) -> Iterator[str]:
    for line in _published_legend(compared):
        yield f"{line[0].upper()}{line[1:]}.\n"


def _not_measured(document: Document) -> str:
    """What no number above speaks about."""
    missing = [
        f"{NAME_BY_QUANTITY[quantity]} ({MEANING_BY_QUANTITY[quantity]})"
        for quantity in QUANTITIES
        if quantity not in {row["quantity"] for row in overall(document, "cuda")}
    ]
    parts = [f"not measured on a GPU: {', '.join(missing)}"] if missing else []
    for noun, fate, reasons in (
        ("record", "left out", document["left_out"]),
        ("published number", "not answered", document["published"]["not_answered"]),
    ):
        if reasons:
            most = max(reasons, key=lambda one: one["num"])
            what = plural(sum(one["num"] for one in reasons), noun)
            parts.append(f"{what} {fate}, mostly: {_markdown(most['reason'])}")
    text = "; ".join(parts) or "nothing is left out"
    return f"{text[0].upper()}{text[1:]}.\n"


def _markdown(text: str) -> str:
    """Text from outside as Markdown shows it: no markup, no HTML, no end of a cell."""
    marks = {ord(mark): f"&#{ord(mark)};" for mark in "&<>|\\`*[]~$"}
    return printable(text).translate(marks)
