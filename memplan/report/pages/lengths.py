"""Lengths of a data set as a page: their spread as a chart; what each maximum length cuts, pads and packs in tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report import lengths as text
from memplan.report.charts.drawing import PAGE
from memplan.report.charts.lengths import said_of, spread
from memplan.report.layout import plural
from memplan.report.pages.tables import Page, Section, Table

if TYPE_CHECKING:
    Document = dict[str, Any]


def lengths_page(document: Document) -> Page:
    """The page of a document of `memplan.report.lengths`."""
    names, *candidates = text.candidate_rows(document)
    return Page(
        f"lengths of {document['data']}",
        verdict(document),
        facts=list(text.facts_of(document)),
        sections=[
            Section(
                "How long the records are",
                [said_of(document)],
                [histogram_table(document)],
                [spread(document, PAGE)],
            ),
            Section(
                text.candidates_heading(document),
                [text.CANDIDATES_LEGEND],
                [Table("Maximum length", names, candidates)],
            ),
            Section(
                text.batching_heading(document),
                [text.batching_legend(document)],
                [_batches(document)],
            ),
            *_needs(document),
        ],
    )


def histogram_table(document: Document) -> Table:
    """The numbers of the chart, folded away."""
    bins = [(tokens, num, share, marked) for tokens, num, _, share, marked in text.histogram_rows(document)]
    columns = ("tokens", "records", "up to here", "maximum")
    return Table("Records by length", columns, bins, (3,), plural(len(bins), "bin"))


def verdict(document: Document) -> list[str]:
    """The first of the candidates that cuts nothing, and what the longest costs that does."""
    whole = [one["max_len"] for one in document["candidates"] if not one["num_truncated"]]
    cut = [one for one in document["candidates"] if one["num_truncated"]]
    said = [f"A maximum of {whole[0]:,} cuts no record." if whole else "Every candidate cuts records."]
    if cut:
        num = text.percent(cut[-1]["num_truncated"], document["num_samples"])
        lost = text.percent(cut[-1]["num_supervised_tokens_lost"], document["num_supervised_tokens"])
        said.append(
            f"{cut[-1]['max_len']:,} cuts {num} of the records, and {lost} of the tokens with a label are lost."
        )
    if document["is_sample"]:
        said.append("That is of a sample.")
    return said


def _batches(document: Document) -> Table:
    rows = []
    for one in document["candidates"]:
        names, *ways = text.batching_rows(document, one)
        rows += [(f"{one['max_len']:,}", *way) for way in ways]
    return Table("Ways to make batches", ("maximum", *names), rows, (1,))


def _needs(document: Document) -> list[Section]:
    if not document["needs"]:
        return []
    said = [
        f"{text.need_words(one)} Source: {one['source']}." if one["source"] else text.need_words(one)
        for one in document["needs"]
    ]
    return [Section(text.NEEDS_HEADING, said)]
