"""Which plan for this data?

    memplan.suggest_for_data("train.jsonl", "qwen2.5-1.5b", gpu="rtx4090", target_batch=32).feed.ways

Counts the data, settles the maximum length and lets `memplan.api` plan on the worst micro-batch that can occur; beside
the plan stand the other ways to make batches, by the same search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan import api
from memplan.errors import UsageError
from memplan.planner.feed import WAY_BY_BATCHING, Cut, Feed
from memplan.planner.goal import Target
from memplan.planner.search import Search
from memplan.planner.uncut import uncut
from memplan.planner.ways import Ways, near_target, rows_of, target_of
from memplan.planner.worst_batch import LABELS_COUNT, mean_share, worst_batch_goal, worst_share
from memplan.sequences.maximum import choose
from memplan.specs.choices import as_count
from memplan.specs.training import PAIRED
from memplan.specs.values import replace
from memplan.surveying import lengths
from memplan.units import parse_count

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from memplan.planner.feed import Rows
    from memplan.planner.goal import Goal
    from memplan.planner.plan import Plan
    from memplan.sequences.maximum import Maximum
    from memplan.specs.gpu import GpuSpec

DEFAULT_MAX_LOSS_PERCENT = 0.1
"""Of the tokens with a label: one in a thousand is less than what most data has of wrong labels."""

OF_GOALS = frozenset(("gpus", "target_batch", "target_tokens", "reserve", "headroom", "confidence"))
"""Arguments that say nothing about the setup."""


def suggest_for_data(
    data: str | os.PathLike[str],
    model: str | os.PathLike[str] | api.Model | api.UserModule | None = None,
    *,
    gpu: str,
    tokenizer: str | os.PathLike[str] | None = None,
    field: str | None = None,
    prompt_field: str | None = None,
    truncation: str = "right",
    max_loss: float | None = None,
    notify: Callable[[str], None] | None = None,
    **choices: Any,
) -> Plan:
    """The plan of `memplan.api.suggest` for a data set; `Plan.feed` says what was made of it.

    Args:
        data: A file, a folder, a pattern or ``-``.
        model: As for `memplan.api.estimate`.
        gpu: Name, size (``24GB``) or ``auto``.
        tokenizer: A ``tokenizer.json`` or the folder of a model; None for records with ``num_tokens``.
        field: The field with the text, the chat or the completion; None: to be found.
        prompt_field: That of the prompt.
        truncation: Where longer sequences are cut: right, left, middle or drop.
        max_loss: Percent of the tokens with a label that a maximum length may lose (0.1); without ``seq_len``.
        notify: Is told what is being done.
        choices: As for `memplan.api.suggest`; ``target_batch`` counts sequences, with ``batching="packed"`` rows,
            ``target_tokens`` tokens of the data, without padding.

    Raises:
        UsageError: a value or a combination has no meaning.
        MemplanError: data, tokenizer or model cannot be read or modelled.
    """
    tell = notify or (lambda _: None)
    allowed = _check(choices, max_loss)
    found = api.find_trained(model, choices)
    spec, ranks = api.find_gpu(gpu, choices.get("gpus"))
    setup = api.make_setup(found, ranks, {name: one for name, one in choices.items() if name not in OF_GOALS})
    told = {"tokenizer": tokenizer, "field": field, "prompt_field": prompt_field, "truncation": truncation}
    survey = lengths(data, max_len=(), packing=(), notify=notify, **told)  # type: ignore[arg-type]
    positions = found.architecture.max_positions if isinstance(found, api.Model) else None
    given = None if choices.get("seq_len") is None else setup.seq_len
    maximum = choose(survey.lengths, max_loss=allowed, side=truncation, given=given, positions=positions)
    cut = _left(maximum)
    tell("packing")
    rows, way = rows_of(cut), WAY_BY_BATCHING[setup.batching]
    samples, target = _target(choices, cut, rows[way], ranks)
    tell("planning")
    counts_labels = choices.get("supervised") is None and setup.loss in LABELS_COUNT
    goal, knows_padding = _goal(found, spec, {**choices, "seq_len": cut.most}, gpu, target, is_even=cut.is_even)
    mine = worst_batch_goal(goal, cut, setup.batching, target, counts_labels=counts_labels)
    plan = api.plan_of(found, mine, spec, choices)
    feed = Feed(
        survey=survey,
        max_loss=allowed,
        maximum=maximum,
        cut=cut,
        supervised=worst_share(cut, setup.batching) if counts_labels else None,
        mean_supervised=mean_share(cut) if counts_labels else None,
        knows_padding=knows_padding,
        way=way,
        samples_per_step=samples,
        target_tokens=_tokens(choices),
    )
    if isinstance(found, api.UserModule):
        return replace(plan, feed=feed)
    tell("comparing ways to make batches")
    ways = Ways(
        api.estimator_of(found, spec, api.find_speed(spec)),
        goal,
        cut,
        counts_labels=counts_labels,
        chooses_attention=choices.get("attention") is None,
    )
    known = plan.nearest if plan.best is None else plan.best
    assert known is not None
    compared = tuple(ways.compare(rows, samples, {setup.batching: known}))
    tell("asking what if nothing is cut")
    longer = None
    if plan.best is not None:
        longer = uncut(Search(ways.estimator, plan.goal), plan.best, survey.lengths.tokens, positions)
    return replace(plan, feed=replace(feed, ways=compared, uncut=longer))


def _check(choices: Mapping[str, Any], max_loss: float | None) -> float:
    """The share that may be lost.

    Raises:
        UsageError: a choice does not go together with data.
    """
    if choices.get("target_batch") is None and choices.get("target_tokens") is None:
        raise UsageError(
            "A plan needs one target: --target-batch or --target-tokens.", "Say for example --target-batch 32."
        )
    if choices.get("packed_sequences") is not None:
        raise UsageError(
            "--packed-sequences and --data contradict each other: the data says how many a row holds.",
            "Leave one of them out.",
        )
    if choices.get("objective") in PAIRED:
        raise UsageError(
            f"Lengths of the pairs of {choices['objective']} are not read from data.",
            "Leave --data out, and say --seq-len.",
        )
    if max_loss is None:
        return DEFAULT_MAX_LOSS_PERCENT / 100
    if choices.get("seq_len") is not None:
        raise UsageError(
            "--max-loss and --seq-len contradict each other: one chooses the maximum length, the other is it.",
            "Leave one of them out.",
        )
    given: object = max_loss
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < 100:
        raise UsageError(f"max_loss is {max_loss!r}.", "Give a percentage from 0 up to, not including, 100.")
    return max_loss / 100


def _left(maximum: Maximum) -> Cut:
    """What is trained on.

    Raises:
        UsageError: nothing.
    """
    left = maximum.cut.lengths
    there = left.tokens > 0
    if not there.any():
        raise UsageError(
            f"At a maximum length of {maximum.most:,} nothing of the data is left.",
            "Give a larger --seq-len, or another --truncation.",
        )
    return Cut(left.tokens[there], None if left.spans is None else left.supervised()[there], maximum.most)


def _target(choices: Mapping[str, Any], cut: Cut, row: Rows, ranks: int) -> tuple[float, Target]:
    """Sequences of an optimizer step, and the rows of the way of the plan that hold them."""
    asked = choices.get("target_batch")
    if asked is not None:
        if choices.get("target_tokens") is not None:
            raise UsageError(
                "--target-batch and --target-tokens both say how large a step is.", "Leave one of them out."
            )
        target = Target(as_count("target_batch", asked))
    else:
        tokens = _tokens(choices)
        assert tokens is not None
        divided = near_target if row.samples > 1 else target_of
        target = divided(row, tokens / cut.mean, ranks)
    return target.global_batch_size * row.samples, target


def _tokens(choices: Mapping[str, Any]) -> int | None:
    """Tokens that were asked for in an optimizer step."""
    tokens = choices.get("target_tokens")
    return parse_count(tokens) if isinstance(tokens, str) else tokens and as_count("target_tokens", tokens)


def _goal(
    found: api.Model | api.UserModule,
    spec: GpuSpec,
    choices: Mapping[str, Any],
    gpu: str,
    target: Target,
    *,
    is_even: bool,
) -> tuple[Goal, bool]:
    """The goal with rows, padded where lengths differ; whether the mask that padding takes is known."""
    plain = {**choices, "batching": None, "target_tokens": None, "target_batch": target.global_batch_size}
    goal, _ = api.goal_of(found, gpu=gpu, **plain)
    if is_even or goal.setup.padding:
        return goal, True
    padded = replace(goal, setup=replace(goal.setup, padding=True))
    if isinstance(found, api.UserModule):
        return goal, False
    estimator = api.estimator_of(found, spec)
    if estimator.accepts(padded.setup) or not estimator.accepts(goal.setup):
        return padded, True
    return goal, False
