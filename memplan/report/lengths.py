"""Lengths of a data set as plain data and as text: their spread, and what candidates for the maximum length cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.ansi import Line
from memplan.report.contamination import needs_of
from memplan.report.document import envelope
from memplan.report.layout import WIDTH, bar, plural, wrap
from memplan.report.spread import cumulative, histogram
from memplan.report.text import paragraphs, table, title
from memplan.sequences.analysis import STRATEGIES
from memplan.sequences.batching import PADDING_FREE
from memplan.units import format_count

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.sequences.analysis import Candidate
    from memplan.sequences.batching import Batching
    from memplan.sequences.survey import Survey

    Document = dict[str, Any]

BAR_CELLS, LEAST_CELLS = 32, 8
"""Of the bars of the histogram: as many as there is room for."""
MANY = 10**7
"""From here on a cell says millions."""

SIDE_WORDS = {
    "right": "on the right: the first tokens stay",
    "left": "on the left: the last tokens stay",
    "middle": "in the middle: the first and the last half stay",
    "drop": "not at all: longer sequences are left out",
}

WHOSE = {
    "fixed": "every row as long as the maximum",
    "longest": "as long as the longest row of the micro-batch, in random order",
    "grouped": "the same, records of about the same length together (group_by_length)",
    PADDING_FREE: "records end to end (TRL's padding_free; flash attention)",
}
"""Ways to make batches without packing -> in words."""


def lengths_document(survey: Survey) -> Document:
    """Everything that a survey says, without the lengths themselves."""
    whole = survey.summary
    return {
        **envelope("lengths"),
        "data": survey.data,
        "num_files": survey.num_files,
        "layout": {"kind": survey.layout, "fields": list(survey.fields)},
        "tokenizer": survey.tokenizer,
        "has_template": survey.has_template,
        "is_sample": survey.is_sample,
        "num_records": survey.num_records,
        "num_samples": whole.num_samples,
        "num_tokens": whole.num_tokens,
        "num_supervised_tokens": whole.num_supervised,
        "mean_length": whole.mean,
        "quantiles": [{"share": share, "num_tokens": value} for share, value in whole.quantiles.items()],
        "histogram": histogram(survey.lengths.tokens, [one.most for one in survey.candidates]),
        "cumulative": cumulative(survey.lengths.tokens, [one.most for one in survey.candidates]),
        "truncation": survey.side,
        "micro_batch_size": survey.micro_batch,
        "global_batch_size": survey.target_batch,
        "candidates": [_candidate(one, survey) for one in survey.candidates],
        "needs": needs_of(name for one in survey.candidates for name in one.packings),
    }


def _candidate(one: Candidate, survey: Survey) -> Document:
    cut = one.truncation
    return {
        "max_len": one.most,
        "num_truncated": cut.num_cut,
        "num_tokens_lost": cut.tokens_lost,
        "num_supervised_tokens_lost": cut.supervised_lost,
        "num_without_labels": cut.num_without,
        "padding": [{"how": name, "num_slots": was.slots, "waste": was.waste} for name, was in one.paddings.items()],
        "batching": [_batching(found, survey.target_batch) for found in survey.batchings(one)],
    }


def _batching(found: Batching, target: int | None) -> Document:
    strategy = STRATEGIES.get(found.name)
    return {
        "how": found.name,
        "whose": WHOSE[found.name] if strategy is None else strategy.who,
        "is_packed": strategy is not None,
        "num_rows": found.num_rows,
        "num_tokens": found.num_tokens,
        "num_slots": found.num_slots,
        "efficiency": found.efficiency,
        "samples_per_row": found.samples_per_row,
        "rows_per_micro_batch": found.rows_per_micro_batch,
        "tokens_per_micro_batch": found.tokens_per_micro_batch,
        "slots_per_micro_batch": found.slots_per_micro_batch,
        "tokens_per_step": None if target is None else found.tokens_per_step(target),
        "steps_per_epoch": None if target is None else found.steps_per_epoch(target),
    }


# -- text --------------------------------------------------------------------------------------------------------------


def render_lengths(document: Document, *, quiet: bool = False) -> list[Line]:
    """The text of a lengths document; `quiet`: the table of candidates alone."""
    if quiet:
        return [*list(_candidates(document))[1:], *_batched(document)]
    return [
        *paragraphs(facts_of(document)),
        *_histogram(document),
        *_candidates(document),
        *_batched(document),
        *_needs(document),
    ]


def facts_of(document: Document) -> Iterator[tuple[str, str]]:
    """What was counted, and how it is spread, as labels and texts."""
    files = "" if document["num_files"] == 1 else f", {plural(document['num_files'], 'file')}"
    fields = ", ".join(document["layout"]["fields"])
    yield "data", f"{document['data']}{files}: {records_words(document)}, {document['layout']['kind']} ({fields})"
    yield "tokens", _tokens(document)
    yield "lengths", f"{document['mean_length']:,.0f} on average, {quantile_words(document)}"
    yield "cut", SIDE_WORDS[document["truncation"]]


def records_words(document: Document) -> str:
    """How many were counted, and of how many."""
    if not document["is_sample"]:
        return plural(document["num_samples"], "record")
    return f"{document['num_samples']:,} of {plural(document['num_records'], 'record')}, drawn at random"


def quantile_words(document: Document) -> str:
    """How many tokens so many of the records have at most."""
    by_share = {one["share"]: one["num_tokens"] for one in document["quantiles"]}
    return (
        f"half up to {by_share[0.5]:,}, 90 % up to {by_share[0.9]:,}, 99 % up to {by_share[0.99]:,}, the longest "
        f"{by_share[1.0]:,}"
    )


def _tokens(document: Document) -> str:
    tokens, supervised = document["num_tokens"], document["num_supervised_tokens"]
    text = f"{format_count(tokens)}"
    text += (
        ", all with a label" if supervised == tokens else f", {100 * supervised / tokens:.1f} % of them with a label"
    )
    if document["tokenizer"] is None:
        return f"{text}, as the records say"
    text += f", counted by {document['tokenizer']}"
    if document["layout"]["kind"] == "messages":
        return f"{text}, chats {'through its template' if document['has_template'] else 'without a template'}"
    return f"{text}, with an end-of-sequence token"


def histogram_rows(document: Document, cells: int = BAR_CELLS) -> list[tuple[str, str, str, str, str]]:
    """Each bin: tokens, records, their share of the largest bin as a bar, share up to here, candidates in it."""
    most = max(one["num"] for one in document["histogram"])
    first = document["histogram"][0]["over"]
    return [
        (
            f"{one['over'] + (one['over'] > first):,} to {one['to']:,}",
            f"{one['num']:,}",
            bar(one["num"] / most, cells).rstrip("░") if one["num"] else "",
            f"{100 * one['share']:.1f} %",
            ", ".join(f"{candidate:,}" for candidate in one["candidates"]),
        )
        for one in document["histogram"]
    ]


def _histogram(document: Document) -> Iterator[Line]:
    yield from title("Lengths")
    names = ("tokens", "records", "", "up to here", "maximum")
    bare = [names, *histogram_rows(document, 0)]
    taken = sum(max(len(row[n]) for row in bare) for n in range(len(names))) + 2 * len(names)
    rows = histogram_rows(document, max(min(WIDTH - taken, BAR_CELLS), LEAST_CELLS))
    yield from table([names, *rows], left=(0, 2, 4), shrink=4)


def percent(part: float, whole: float) -> str:
    """A share; something is never shown as nothing."""
    value = 100 * part / whole if whole else 0.0
    return "<0.1 %" if 0 < value < 0.05 else f"{value:.1f} %"


CANDIDATES_LEGEND = (
    "cut: records that lose something; tokens, labels: what is lost of them; no label: records that have none left. "
    "Padding: every row to the maximum, to the longest of its batch in random order, grouped by length."
)


def candidates_heading(document: Document) -> str:
    """What the table of candidates is about."""
    return f"Maximum length, and padding in batches of {document['micro_batch_size']:,}"


def candidate_rows(document: Document) -> list[tuple[str, ...]]:
    """What each candidate loses and pads, the names of the columns first."""
    rows: list[tuple[str, ...]] = [("max", "cut", "tokens", "labels", "no label", "fixed", "longest", "grouped")]
    for one in document["candidates"]:
        waste = {padding["how"]: f"{100 * padding['waste']:.1f} %" for padding in one["padding"]}
        rows.append(
            (
                f"{one['max_len']:,}",
                percent(one["num_truncated"], document["num_samples"]),
                percent(one["num_tokens_lost"], document["num_tokens"]),
                percent(one["num_supervised_tokens_lost"], document["num_supervised_tokens"]),
                f"{one['num_without_labels']:,}",
                waste["fixed"],
                waste["longest"],
                waste["grouped"],
            )
        )
    return rows


def _candidates(document: Document) -> Iterator[Line]:
    yield from title(candidates_heading(document))
    yield from table(candidate_rows(document), left=())
    yield from (Line(line, "faint") for line in wrap(CANDIDATES_LEGEND, first="  "))


def batching_rows(document: Document, one: Document) -> list[tuple[str, ...]]:
    """The ways to make batches at a maximum length, the names of the columns first."""
    stepped = document["global_batch_size"] is not None
    rows = [("how", "rows", "a row", "full", "computed", "tokens", *(["a step", "steps"] if stepped else []))]
    for found in one["batching"]:
        row = (
            found["how"],
            f"{found['num_rows']:,}",
            f"{found['samples_per_row']:.1f}",
            f"{100 * found['efficiency']:.1f} %",
            _short(found["slots_per_micro_batch"]),
            _short(found["tokens_per_micro_batch"]),
        )
        steps = (_short(found["tokens_per_step"]), f"{found['steps_per_epoch']:,}") if stepped else ()
        rows.append((*row, *steps))
    return rows


def _short(number: float) -> str:
    """In full as long as a column has room for it."""
    return f"{number:,.0f}" if number < MANY else format_count(round(number))


def batching_legend(document: Document) -> str:
    """What the columns of `batching_rows` are."""
    text = (
        "a row: samples in it; full: share of the room that is data; computed and tokens: of a micro-batch, with and "
        "without padding"
    )
    if document["global_batch_size"] is None:
        return f"{text}."
    return f"{text}; a step: tokens of the data in an optimizer step; steps: of an epoch."


def batching_heading(document: Document) -> str:
    """Which batches."""
    micro, target = document["micro_batch_size"], document["global_batch_size"]
    return f"Micro-batches of {micro:,}" + ("" if target is None else f", steps of {target:,}")


def _batched(document: Document) -> Iterator[Line]:
    yield from title(batching_heading(document))
    rows: list[tuple[str, ...]] = []
    for one in document["candidates"]:
        names, *ways = batching_rows(document, one)
        rows += [names] if not rows else []
        rows.append((f"at {one['max_len']:,}", *[""] * (len(names) - 1)))
        rows += ways
    yield from table(rows)
    yield from (Line(line, "faint") for line in wrap(batching_legend(document), first="  "))


NEEDS_HEADING = "What keeps the samples of a packed row apart"


def _needs(document: Document) -> Iterator[Line]:
    if not document["needs"]:
        return
    yield from title(NEEDS_HEADING)
    for need in document["needs"]:
        for line in wrap(need_words(need), first="  ", rest="    "):
            yield Line(line)


def need_words(need: Document) -> str:
    """A way to pack in a few sentences."""
    name = ": ".join(part for part in (need["how"], f"{need['trainer']} {need['setting']}".strip()) if part)
    return f"{name}. {need['says']} Longer samples: {need['overflow']}."
