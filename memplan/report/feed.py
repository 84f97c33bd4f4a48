"""The data of a plan as plain data: its maximum length, the ways to make batches, what if nothing is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.planner.feed import GROUPED, SMALLER
from memplan.planner.worst_batch import Sum, Worst
from memplan.report.spread import cumulative, histogram

if TYPE_CHECKING:
    from memplan.planner.feed import Feed, Uncut, Way
    from memplan.sequences.maximum import Loss

    Document = dict[str, Any]


def feed_document(feed: Feed) -> Document:
    """Everything about the data of a plan, without the lengths themselves."""
    survey, whole = feed.survey, feed.survey.summary
    marked = [one.most for one in feed.candidates]
    return {
        "name": survey.data,
        "layout": {"kind": survey.layout, "fields": list(survey.fields)},
        "field": survey.field,
        "prompt_field": survey.prompt_field,
        "tokenizer": survey.tokenizer,
        "is_sample": survey.is_sample,
        "num_records": survey.num_records,
        "unseen": feed.unseen,
        "num_samples": whole.num_samples,
        "num_tokens": whole.num_tokens,
        "num_supervised_tokens": whole.num_supervised,
        "median_length": whole.quantiles[0.5],
        "longest": whole.quantiles[1.0],
        "quantiles": [{"share": share, "num_tokens": value} for share, value in whole.quantiles.items()],
        "histogram": histogram(survey.lengths.tokens, marked),
        "cumulative": cumulative(survey.lengths.tokens, marked),
        "candidates": [_loss(one) for one in feed.candidates],
        "truncation": survey.side,
        "max_loss": feed.max_loss,
        "why": feed.maximum.why,
        "length": _loss(feed.maximum.loss),
        "shorter": None if feed.maximum.shorter is None else _loss(feed.maximum.shorter),
        "mean_length": feed.cut.mean,
        "supervised": feed.worst.supervised,
        "mean_supervised": feed.mean_supervised,
        "worst": worst_document(feed.worst, has_mask=feed.has_mask),
        "knows_padding": feed.knows_padding,
        "way": feed.way,
        "target_tokens": feed.target_tokens,
        "samples_per_step": feed.samples_per_step,
        "tokens_per_step": feed.samples_per_step * feed.cut.mean,
        "ways": [_way(way, feed) for way in feed.ways],
        "uncut": None if feed.uncut is None else _uncut(feed.uncut),
    }


def _loss(loss: Loss) -> Document:
    return {
        "max_len": loss.most,
        "num_truncated": loss.num_cut,
        "share_truncated": loss.of_sequences,
        "share_tokens_lost": loss.of_tokens,
        "share_supervised_lost": loss.of_supervised,
        "num_without_labels": loss.num_without,
    }


def _way(way: Way, feed: Feed) -> Document:
    plan = way.candidate
    row: Document = {
        "how": way.name,
        "is_plan": way.name == feed.way,
        "refused": way.refused,
        "num_rows": way.rows.num,
        "samples_per_row": way.rows.samples,
        "fits": False,
        "options": "",
        "global_batch_size": None,
        "steps_per_epoch": None,
        "samples_per_step": None,
        "tokens_per_step": None,
        "padding": None,
        "epoch_time_s": None,
        "plan": None,
    }
    if plan is None:
        return row
    from memplan.report.document import candidate_document

    return row | {
        "fits": plan.fits,
        "options": options_of_way(way, feed),
        "global_batch_size": way.target,
        "steps_per_epoch": way.steps_per_epoch,
        "samples_per_step": way.samples_per_step,
        "tokens_per_step": way.tokens_per_step,
        "padding": way.waste,
        "epoch_time_s": way.epoch_s,
        "plan": candidate_document(plan),
    }


def options_of_way(way: Way, feed: Feed) -> str:
    """What to add to the command so that the plan is made of these batches; empty for those of the plan."""
    if way.candidate is None or way.name in {feed.way, GROUPED}:
        return ""
    setup = way.candidate.setup
    plan = next((one.candidate.setup for one in feed.ways if one.candidate and one.name == feed.way), setup)
    words = [] if setup.batching == plan.batching else ["--batching", setup.batching]
    words += [] if setup.attention == plan.attention else ["--attention", setup.attention]
    if setup.global_batch_size != plan.global_batch_size and feed.target_tokens is None:
        words += ["--target-batch", str(setup.global_batch_size)]
    words += ["--micro-batch", str(setup.micro_batch_size)] if way.name == SMALLER else []
    return " ".join(words)


def _uncut(found: Uncut) -> Document:
    chance = found.chance
    return {
        "fits": found.fits,
        "num_longer": found.num_longer,
        "chance": None if chance is None else chance.value,
        "num_epochs_drawn": 0 if chance is None else chance.num_epochs,
        "is_exact": chance is not None and chance.is_exact,
    }


def worst_document(worst: Worst, *, has_mask: bool) -> Document:
    """The micro-batches that a plan is made for; `has_mask`: whether those of several padded rows have one."""
    return {
        "seq_len": worst.seq_len,
        "has_mask": has_mask,
        "batching": worst.batching,
        "supervised": worst.supervised,
        "packed_sequences": worst.packed_sequences,
        "sums": [one._asdict() for one in worst.sums],
    }


def worst_of_document(document: Document) -> Worst:
    """The same read again.

    Raises:
        LookupError, TypeError: something is missing.
    """
    sums = tuple(Sum(one["micro_batch_size"], one["num_tokens"], one["num_labelled"]) for one in document["sums"])
    fields = {name: document[name] for name in ("seq_len", "batching", "supervised", "packed_sequences")}
    return Worst(**fields, sums=sums)
