"""How long are the records of a data set, and which tokens have a label?  Counted in batches on all cores.

A token has a label where one of its letters has one, as in ``apply_chat_template`` with a mask of what the assistant
says.  TRL counts a prompt by itself: a token that reaches over its end makes a difference of one.  Text and
completions end with an end-of-sequence token, as TRL's SFTTrainer appends it.
"""

from __future__ import annotations

import random
from array import array
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from memplan.datasets.layout import Layout, counted, find_layout, text_of
from memplan.datasets.tokenizer import tokens_of
from memplan.errors import MemplanError, UsageError
from memplan.sequences.lengths import Lengths, Spans, at_the_end
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from memplan.datasets.layout import Record, Text
    from memplan.datasets.tokenizer import Tokenizer

BATCH = 1000
"""Records that are counted at a time."""


class Counted(NamedTuple):
    """A data set, counted."""

    lengths: Lengths
    layout: Layout
    has_template: bool
    """Whether chats went through a template; without one, what it adds is not counted."""
    num_records: int
    """All that there are; more than were counted where some were drawn."""


def count(
    records: Iterable[Record],
    tokenizer: Tokenizer | None,
    *,
    field: str | None = None,
    prompt: str | None = None,
    sample: int | None = None,
    known: tuple[Lengths, int] | None = None,
    seed: int = 0,
    notify: Callable[[int], None] | None = None,
) -> Counted:
    """The lengths of records.

    Args:
        records: Dicts, one after the other.
        tokenizer: Counts the tokens of text; None for records that say their counts.
        field: The field with the text; None: to be found.
        prompt: That of the prompt, where there is one.
        sample: Count so many alone, drawn at random; None: all.
        known: What was counted before, with how many records there are: then the first record alone is looked at.
        seed: Of the draw.
        notify: Is told how many were counted.

    Raises:
        UsageError: there are no records, or nothing says which field holds the text.
        MemplanError: a record is laid out otherwise, or has no counts and there is no tokenizer.
    """
    stream = iter(records)
    first = next(stream, None)
    if first is None:
        raise UsageError("The data holds no records.", "Name a file with records.")
    layout = find_layout(first, field, prompt)
    everything = chain((first,), stream)
    num_records = None
    chosen: Iterable[Record] = everything
    if sample is not None and known is None:
        chosen, num_records = _drawn(everything, sample, seed)
    if known is not None:
        lengths, num_records = known
    elif layout.kind == "counts":
        lengths = _said(chosen, layout, numbered=sample is None)
    elif tokenizer is None:
        raise MemplanError("The records hold text, and no tokenizer is named.", "Say --tokenizer FOLDER.")
    else:
        lengths = _tokenised(chosen, layout, tokenizer, notify or (lambda _: None))
    used = layout.kind == "messages" and tokenizer is not None and tokenizer.template is not None
    return Counted(lengths, layout, used, lengths.num_samples if num_records is None else num_records)


def _drawn(records: Iterable[Record], num: int, seed: int) -> tuple[list[Record], int]:
    """`num` of them, each with the same chance, in the order in which they come, and how many there are.

    Vitter 1985, algorithm R.
    """
    draw = random.Random(seed)
    kept: list[tuple[int, Any]] = []
    at = -1
    for at, record in enumerate(records):
        if at < num:
            kept.append((at, record))
        elif (place := draw.randrange(at + 1)) < num:
            kept[place] = (at, record)
    return [record for _, record in sorted(kept, key=lambda pair: pair[0])], at + 1


def _said(records: Iterable[Record], layout: Layout, *, numbered: bool) -> Lengths:
    """Counts as they are said; `numbered`: whether these are all records, so that a fault can say which one it is."""
    tokens, supervised = array("q"), array("q")
    whole, part = layout.fields[0], layout.fields[-1]
    for record in records:
        num, labelled = record.get(whole), record.get(part)
        if type(num) is not int or type(labelled) is not int or not 0 <= labelled <= num:
            num, labelled = counted(record, layout, f"Record {len(tokens) + 1:,}" if numbered else "A record")
        tokens.append(num)
        supervised.append(labelled)
    if len(layout.fields) == 1:
        return Lengths(_numbers(tokens))
    return at_the_end(_numbers(tokens), _numbers(supervised))


def _tokenised(
    records: Iterable[Record], layout: Layout, tokenizer: Tokenizer, notify: Callable[[int], None]
) -> Lengths:
    found = _Found()
    specials = layout.kind != "messages" or tokenizer.template is None
    ended = int(layout.kind != "messages" and not tokenizer.ends_by_itself)
    stream = iter(records)
    while some := [text_of(record, layout, tokenizer.template) for record in islice(stream, BATCH)]:
        encodings = tokenizer.encode([one.text for one in some], specials=specials)
        for one, encoding in zip(some, encodings, strict=True):
            found.add(one, encoding, ended, whole=layout.kind == "text")
        notify(len(found.tokens))
    if layout.kind == "text":
        return Lengths(_numbers(found.tokens))
    return Lengths(_numbers(found.tokens), Spans(*map(_numbers, (found.sample, found.start, found.stop))))


class _Found:
    """The columns of `Lengths`, as they grow."""

    def __init__(self) -> None:
        self.tokens, self.sample, self.start, self.stop = (array("q") for _ in range(4))

    def add(self, one: Text, encoding: Any, ended: int, *, whole: bool) -> None:
        """A record; `ended`: tokens behind it; `whole`: all of it has a label."""
        num = len(encoding) + ended
        for first, behind in () if whole else one.labelled:
            start, stop = tokens_of(encoding, first, behind)
            stop += ended * (behind == len(one.text))
            if stop > start:
                self.sample.append(len(self.tokens))
                self.start.append(start)
                self.stop.append(stop)
        self.tokens.append(num)


def _numbers(values: array[int]) -> Any:
    return np.frombuffer(values, np.int64).copy() if len(values) else np.zeros(0, np.int64)
