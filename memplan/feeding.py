"""Which plan for this data?

    memplan.suggest_for_data("train.jsonl", "qwen2.5-1.5b", gpu="rtx4090", target_batch=32).feed.ways

Counts the data, settles the maximum length and lets `memplan.api` plan on the worst micro-batch that can occur; beside
the plan stand the other ways to make batches, by the same search.

Of a sample of the data, what is planned holds for all of it as long as something cuts at the maximum length; shares,
times and tokens are those of the sample, steps of an epoch are counted for all records.
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
from memplan.planner.worst_batch import LABELS_COUNT, mean_share, worst_batch_goal
from memplan.sequences.maximum import choose, losses
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
    from memplan.sequences.survey import Survey
    from memplan.specs.gpu import GpuSpec
    from memplan.specs.training import Setup

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
    sample: int | None = None,
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
        sample: Count so many records alone, drawn at random.
        notify: Is told what is being done.
        choices: As for `memplan.api.suggest`; ``target_batch`` counts sequences, with ``batching="packed"`` rows,
            ``target_tokens`` tokens of the data, without padding.

    Raises:
        UsageError: a value or a combination has no meaning.
        MemplanError: data, tokenizer or model cannot be read or modelled.
    """
    found = checked(model, gpu=gpu, max_loss=max_loss, **choices)
    survey = lengths(
        data,
        max_len=(),
        tokenizer=tokenizer,
        field=field,
        prompt_field=prompt_field,
        truncation=truncation,
        packing=(),
        sample=sample,
        notify=notify,
    )
    return plan_for(survey, found, gpu=gpu, max_loss=max_loss, notify=notify, **choices)


def checked(
    model: str | os.PathLike[str] | api.Model | api.UserModule | None = None,
    *,
    gpu: str,
    max_loss: float | None = None,
    **choices: Any,
) -> api.Model | api.UserModule:
    """The model, where all that is known before data is counted makes sense.

    Raises:
        UsageError: a value or a combination has no meaning.
        MemplanError: the model cannot be read or modelled.
    """
    _allowed(choices, max_loss)
    return _set_up(model, gpu, choices)[0]


def _set_up(model: Any, gpu: str, choices: Mapping[str, Any]) -> tuple[api.Model | api.UserModule, GpuSpec, int, Setup]:
    """The model, the card, how many of it, and what was said about the setup."""
    found = api.find_trained(model, choices)
    spec, ranks = api.find_gpu(gpu, choices.get("gpus"))
    said = {name: one for name, one in choices.items() if name not in OF_GOALS}
    return found, spec, ranks, api.make_setup(found, ranks, said)


def plan_for(
    survey: Survey,
    model: str | os.PathLike[str] | api.Model | api.UserModule | None = None,
    *,
    gpu: str,
    max_loss: float | None = None,
    notify: Callable[[str], None] | None = None,
    **choices: Any,
) -> Plan:
    """The plan of `suggest_for_data` for data that was counted: some models and GPUs can be planned for the same."""
    tell = notify or (lambda _: None)
    allowed = _allowed(choices, max_loss)
    found, spec, ranks, setup = _set_up(model, gpu, choices)
    positions = found.architecture.max_positions if isinstance(found, api.Model) else None
    given = None if choices.get("seq_len") is None else setup.seq_len
    maximum = choose(survey.lengths, max_loss=allowed, side=survey.side, given=given, positions=positions)
    cut = _left(maximum, survey.num_records / survey.lengths.num_samples)
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
        candidates=losses(survey.lengths, maximum, survey.side),
        cut=cut,
        worst=mine.worst,
        has_mask=goal.setup.padding,
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
        all_of_them = survey.num_records if survey.is_sample else None
        look = Search(ways.estimator, plan.goal)
        longer = uncut(look, plan.best, survey.lengths.tokens, positions, num_records=all_of_them)
    return replace(plan, feed=replace(feed, ways=compared, uncut=longer))


def _allowed(choices: Mapping[str, Any], max_loss: float | None) -> float:
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


def _left(maximum: Maximum, weight: float) -> Cut:
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
    return Cut(left.tokens[there], None if left.spans is None else left.supervised()[there], maximum.most, weight)


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
