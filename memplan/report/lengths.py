"""Lengths of a data set as plain data and as text: their spread, and what candidates for the maximum length cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memplan.report.ansi import Line
from memplan.report.document import envelope
from memplan.report.layout import bar, plural, wrap
from memplan.report.text import paragraph, table, title
from memplan.sequences.analysis import STRATEGIES
from memplan.units import format_count

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.sequences.analysis import Candidate
    from memplan.sequences.packing import Packing
    from memplan.sequences.survey import Survey

    Document = dict[str, Any]

BINS = 16
BAR_CELLS = 40

SIDE_WORDS = {
    "right": "on the right: the first tokens stay",
    "left": "on the left: the last tokens stay",
    "middle": "in the middle: the first and the last half stay",
    "drop": "not at all: longer sequences are left out",
}

NEEDS = {
    "bfd": "sequences lie end to end, position_ids begin anew at each: needs flash attention (variable length); with "
    "sdpa or eager they see each other (TRL warns)",
    "bfd-split": "as bfd; the rest of a long sequence goes on in another row, without what came before it",
    "wrapped": "sequences of a row see each other, and are cut where a row ends",
    "first-fit": "position_ids begin anew at each: needs flash, flex, sdpa or eager as axolotl patches them; a row "
    "holds micro-batch x maximum length, and its batch size is 1",
    "ffd": "nobody's default: the best of these that a trainer could reach",
}
"""What a way to pack asks of the attention, by the sources of TRL 1.16 and axolotl 0.19."""


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
        "num_samples": whole.num_samples,
        "num_tokens": whole.num_tokens,
        "num_supervised_tokens": whole.num_supervised,
        "mean_length": whole.mean,
        "quantiles": [{"share": share, "num_tokens": value} for share, value in whole.quantiles.items()],
        "histogram": histogram(survey),
        "truncation": survey.side,
        "micro_batch_size": survey.micro_batch,
        "global_batch_size": survey.target_batch,
        "candidates": [_candidate(one, survey) for one in survey.candidates],
    }


def histogram(survey: Survey) -> list[Document]:
    """Samples by length, in bins of the same width up to the longest, and how many are at most as long."""
    tokens = survey.lengths.tokens
    edges = np.unique(np.linspace(0, int(tokens.max()), BINS + 1).astype(np.int64))
    counts, _ = np.histogram(tokens, bins=np.append(edges[:-1], edges[-1] + 1))
    shares = np.cumsum(counts) / tokens.size
    return [
        {
            "from": int(edges[n]),
            "below": int(edges[n + 1]) + (n == len(counts) - 1),
            "num": int(num),
            "share": float(to),
        }
        for n, (num, to) in enumerate(zip(counts, shares, strict=True))
    ]


def _candidate(one: Candidate, survey: Survey) -> Document:
    cut = one.truncation
    return {
        "max_len": one.most,
        "num_truncated": cut.num_cut,
        "num_tokens_lost": cut.tokens_lost,
        "num_supervised_tokens_lost": cut.supervised_lost,
        "num_without_labels": cut.num_without,
        "padding": [{"how": name, "slots": found.slots, "waste": found.waste} for name, found in one.paddings.items()],
        "packing": [_packing(name, found, survey) for name, found in one.packings.items()],
    }


def _packing(name: str, found: Packing, survey: Survey) -> Document:
    rows, target = found.num_rows, survey.target_batch
    return {
        "how": name,
        "whose": STRATEGIES[name].who,
        "needs": NEEDS[name],
        "num_rows": rows,
        "num_tokens": int(found.tokens.sum()),
        "efficiency": found.efficiency,
        "samples_per_row": found.num_samples / rows if rows else 0.0,
        "tokens_per_step": None if target is None or not rows else float(found.tokens.mean()) * target,
        "steps_per_epoch": None if target is None else -(-rows // target),
    }


# -- text --------------------------------------------------------------------------------------------------------------


def render_lengths(document: Document, *, quiet: bool = False) -> list[Line]:
    """The text of a lengths document; `quiet`: the table of candidates alone."""
    if quiet:
        return [*list(_candidates(document))[1:], *_packed(document)]
    return [
        *_asked(document),
        *_histogram(document),
        *_candidates(document),
        *_packed(document),
        *_needs(document),
    ]


def _asked(document: Document) -> Iterator[Line]:
    files = "" if document["num_files"] == 1 else f", {plural(document['num_files'], 'file')}"
    fields = ", ".join(document["layout"]["fields"])
    some = ", drawn at random" if document["is_sample"] else ""
    records = plural(document["num_samples"], "record")
    yield from paragraph("data", f"{document['data']}{files}: {records}{some}, {document['layout']['kind']} ({fields})")
    yield from paragraph("tokens", _tokens(document))
    by_share = {one["share"]: one["num_tokens"] for one in document["quantiles"]}
    yield from paragraph(
        "lengths",
        f"{document['mean_length']:,.0f} on average, half up to {by_share[0.5]:,}, 90 % up to {by_share[0.9]:,}, "
        f"99 % up to {by_share[0.99]:,}, the longest {by_share[1.0]:,}",
    )
    yield from paragraph("cut", SIDE_WORDS[document["truncation"]])


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


def _histogram(document: Document) -> Iterator[Line]:
    yield from title("Lengths")
    most = max(one["num"] for one in document["histogram"])
    rows = [("tokens", "records", "", "up to here")]
    rows += [
        (
            f"{one['from']:,} to {one['below'] - 1:,}",
            f"{one['num']:,}",
            bar(one["num"] / most, BAR_CELLS).rstrip("░") if one["num"] else "",
            f"{100 * one['share']:.1f} %",
        )
        for one in document["histogram"]
    ]
    yield from table(rows, left=(0, 2))


def _percent(part: float, whole: float) -> str:
    """A share; something is never shown as nothing."""
    value = 100 * part / whole if whole else 0.0
    return "<0.1 %" if 0 < value < 0.05 else f"{value:.1f} %"


def _candidates(document: Document) -> Iterator[Line]:
    yield from title(f"Maximum length, and padding in batches of {document['micro_batch_size']:,}")
    rows = [("max", "cut", "tokens lost", "labels lost", "no label", "fixed", "longest", "grouped")]
    for one in document["candidates"]:
        waste = {padding["how"]: f"{100 * padding['waste']:.1f} %" for padding in one["padding"]}
        rows.append(
            (
                f"{one['max_len']:,}",
                _percent(one["num_truncated"], document["num_samples"]),
                _percent(one["num_tokens_lost"], document["num_tokens"]),
                _percent(one["num_supervised_tokens_lost"], document["num_supervised_tokens"]),
                f"{one['num_without_labels']:,}",
                waste["fixed"],
                waste["longest"],
                waste["grouped"],
            )
        )
    yield from table(rows, left=())
    legend = (
        "cut: records that lose something; no label: records that have none left. Padding: every row to the maximum, "
        "to the longest of its batch in random order, and grouped by length."
    )
    yield from (Line(line, "faint") for line in wrap(legend, first="  "))


def _packed(document: Document) -> Iterator[Line]:
    if not any(one["packing"] for one in document["candidates"]):
        return
    yield from title("Packed")
    stepped = document["global_batch_size"] is not None
    rows = [("max", "how", "rows", "full", "samples/row", *(["steps/epoch", "tokens/step"] if stepped else []))]
    for one in document["candidates"]:
        for packing in one["packing"]:
            row = [
                f"{one['max_len']:,}",
                packing["how"],
                f"{packing['num_rows']:,}",
                f"{100 * packing['efficiency']:.1f} %",
                f"{packing['samples_per_row']:.1f}",
            ]
            if stepped:
                row += [f"{packing['steps_per_epoch']:,}", f"{packing['tokens_per_step'] or 0:,.0f}"]
            rows.append(tuple(row))
    yield from table(rows, left=(1,))


def _needs(document: Document) -> Iterator[Line]:
    used = {packing["how"]: packing for one in document["candidates"] for packing in one["packing"]}
    for name, packing in used.items():
        text = f"{name} ({packing['whose']}): {packing['needs']}"
        yield from (Line(line) for line in wrap(text, first="  ", rest="    "))
