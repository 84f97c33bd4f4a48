"""Whether accumulating is the same update, as a page of sentences and tables; the rows are those of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report import same_update as text
from memplan.report.layout import plural
from memplan.report.pages.tables import Page, Section, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    Document = dict[str, Any]

TRAINERS = "What trainers do by default"


def same_update_page(document: Document) -> Page:
    """The page of a document of `memplan same-update`; with nothing measured, of what trainers do."""
    trainers = Section(TRAINERS, [], [_table(TRAINERS, text.trainer_rows(document["trainers"]), (1, 2, 3, 4))])
    if document["is_same"] is None:
        said = [plural(len(document["trainers"]), "trainer")]
        return Page(TRAINERS, said, sections=[trainers, *map(_about_trainer, document["trainers"])])
    sections = [
        Section("The mathematics", EQUATION),
        Section(
            "Relative error of the gradient",
            list(text.step_notes(document)),
            [_table("Steps against the whole batch", text.step_rows(document), (4,))],
        ),
        Section("What naive averaging would do to your data", list(text.weight_words(document)), _weights(document)),
    ]
    if document["advice"] is not None:
        sections.append(Section(text.ADVICE, list(text.advice_words(document["advice"]))))
    if document["warning"]:
        sections.append(Section("Worth knowing", [f"{document['warning']}."]))
    return Page(
        f"{document['model']['name']}: is accumulating the same update?",
        text.verdict(document),
        state="fits" if document["is_same"] else "not",
        facts=list(text.about(document)),
        sections=[*sections, trainers],
    )


EQUATION = (
    "Whole batch: the gradient of the sum of all losses over N, the number of tokens that have one.",
    "Accumulated: the gradient of the sum over micro-batches of L_i / N, which is the same.",
    "Naive average: the gradient of the mean over micro-batches of L_i / n_i. A token weighs mean(n) / n_i: more in a "
    "micro-batch of few tokens.",
)


def _table(label: str, rows: Sequence[Sequence[str]], texts: Sequence[int] = ()) -> Table:
    names, *cells = rows
    return Table(label, names, cells, texts)


def _weights(document: Document) -> list[Table]:
    if document["token_weights"] is None:
        return []
    return [_table("Weights of tokens", text.weight_rows(document))]


def _about_trainer(one: Document) -> Section:
    read = "its source was not read" if one["checked"] == "not read" else f"read: {one['checked']}"
    heading = ", ".join(filter(None, (one["trainer"], one["versions"])))
    return Section(heading, [one["says"], f"{one['source']} ({read})"])
