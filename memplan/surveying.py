"""How long is the data, and what would each maximum length cost?

    memplan.lengths("train.jsonl", tokenizer="Qwen2.5-7B/", max_len=(1024, 2048, 4096), micro_batch=4).to_pandas()

Reads the data, counts its tokens and lets `memplan.sequences` work out what is cut, padded and packed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from memplan.catalog.models import cache_dir
from memplan.datasets.counting import Counted, count
from memplan.datasets.records import find_sources, read_records
from memplan.datasets.remembered import RememberedLengths, key_of
from memplan.datasets.tokenizer import read_tokenizer
from memplan.errors import MemplanError, UsageError, did_you_mean
from memplan.sequences.analysis import STRATEGIES, candidate, summary
from memplan.sequences.survey import Survey
from memplan.sequences.truncation import SIDES
from memplan.specs.choices import as_count

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memplan.datasets.records import Source
    from memplan.sequences.analysis import Summary

MOST_CANDIDATES = 6
DEFAULT_STRATEGIES = ("bfd",)
"""What TRL does where it is told to pack."""


def lengths(
    data: str | os.PathLike[str],
    *,
    max_len: Sequence[int] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    field: str | None = None,
    prompt_field: str | None = None,
    truncation: str = "right",
    micro_batch: int = 1,
    target_batch: int | None = None,
    packing: Sequence[str] = DEFAULT_STRATEGIES,
    sample: int | None = None,
    notify: Callable[[str], None] | None = None,
) -> Survey:
    """The lengths of a data set, and what candidates for the maximum length cost.

    Args:
        data: A file, a folder, a pattern or ``-``.
        max_len: Candidates; None: powers of two about the lengths, and the longest.
        tokenizer: A ``tokenizer.json`` or the folder of a model; None for records with ``num_tokens``.
        field: The field with the text, the chat or the completion; None: to be found.
        prompt_field: That of the prompt.
        truncation: Where longer sequences are cut: right, left, middle or drop.
        micro_batch: Rows of a micro-batch.
        target_batch: Rows of an optimizer step, some micro-batches; None: no steps are told.
        packing: Names of `memplan.sequences.analysis.STRATEGIES`.
        sample: Count so many records alone, drawn at random.
        notify: Is told what is being done.

    Raises:
        UsageError: an argument has no meaning.
        MemplanError: the data or the tokenizer cannot be read.
    """
    _check(truncation, packing)
    rows, target = _batches(micro_batch, target_batch)
    drawn = None if sample is None else as_count("sample", sample)
    sources = find_sources(os.fspath(data))
    found = _counted(sources, tokenizer, field, prompt_field, drawn, notify or (lambda _: None))
    if not found.lengths.num_tokens:
        if found.num_records > found.lengths.num_samples:
            raise UsageError("The sample holds no tokens.", "Give a larger --sample, or none.")
        raise UsageError("The data holds no tokens.", "Name a file with text, or with num_tokens above 0.")
    whole = summary(found.lengths)
    candidates = [as_count("max_len", one) for one in (usual(whole) if max_len is None else max_len)]
    return Survey(
        data=os.fspath(data),
        num_files=len(sources),
        layout=found.layout.kind,
        fields=found.layout.fields,
        field=field,
        prompt_field=prompt_field,
        tokenizer=None if found.layout.kind == "counts" or tokenizer is None else os.fspath(tokenizer),
        has_template=found.has_template,
        num_records=found.num_records,
        lengths=found.lengths,
        summary=whole,
        side=truncation,
        micro_batch=rows,
        target_batch=target,
        candidates=tuple(
            candidate(found.lengths, one, side=truncation, micro_batch=rows, strategies=tuple(packing))
            for one in sorted(set(candidates))
        ),
    )


def _check(truncation: str, packing: Sequence[str]) -> None:
    for name, known in ((truncation, SIDES), *((one, tuple(STRATEGIES)) for one in packing)):
        if name not in known:
            raise UsageError(
                f"{name!r} is not known.", did_you_mean(name, list(known), otherwise=f"Known: {', '.join(known)}.")
            )


def _batches(micro_batch: int, target_batch: int | None) -> tuple[int, int | None]:
    """Rows of a micro-batch and of a step, which is some micro-batches."""
    rows = as_count("micro_batch", micro_batch)
    if target_batch is None:
        return rows, None
    target = as_count("target_batch", target_batch)
    if target % rows:
        raise UsageError(
            f"A batch of {target:,} is not made of micro-batches of {rows:,}.",
            f"Give one that can be divided by {rows:,}: {max(target // rows, 1) * rows:,}, for example.",
        )
    return rows, target


def usual(whole: Summary) -> list[int]:
    """Powers of two from the median on, up to the first that is no shorter than the longest; the last ones of many."""
    longest, half = whole.quantiles[1.0], max(whole.quantiles[0.5], 1)
    powers = [1 << two for two in range((half - 1).bit_length(), (longest - 1).bit_length() + 1)]
    return powers[:MOST_CANDIDATES] or [1]


def _counted(
    sources: Sequence[Source],
    tokenizer: str | os.PathLike[str] | None,
    field: str | None,
    prompt: str | None,
    sample: int | None,
    tell: Callable[[str], None],
) -> Counted:
    """The lengths; of text that was counted before as they are remembered."""
    model = None if tokenizer is None else read_tokenizer(os.fspath(tokenizer))
    records = read_records(sources)

    def told(num: int) -> None:
        tell(f"{num:,} records counted")

    if model is None:
        return count(records, None, field=field, prompt=prompt, sample=sample, notify=told)
    remembered = RememberedLengths(cache_dir(os.environ))
    tell("looking for earlier counts")
    try:
        key = key_of([*(one.path for one in sources), *model.files], f"{field} {prompt} {sample}")
    except OSError as fault:
        raise MemplanError(f"{fault.filename} cannot be read: {fault.strerror}.", "Name another file.") from None
    known = None if key is None else remembered.get(key)
    if known is not None:
        return count(records, model, field=field, prompt=prompt, known=known)
    found = count(records, model, field=field, prompt=prompt, sample=sample, notify=told)
    if key is not None:
        remembered.put(key, found.lengths, found.num_records)
    return found
