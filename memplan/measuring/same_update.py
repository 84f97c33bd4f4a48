"""Is micro-batch x accumulation x ranks the same update as the whole batch?  Asked with plain values.

    memplan.same_update("qwen3-0.6b", micro_batch=2, accumulation=8)

The mathematics comes from lengths, the measurement from a small model of the same family (or a module of the user's
own) in processes of their own.  What is measured is cut down: which mean a step takes shows with few samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.equivalence.diagnosis import diagnose_loop, diagnose_subject, tolerance
from memplan.equivalence.records import parse_loop, parse_subject
from memplan.equivalence.scaling import accumulation_warning, advise
from memplan.errors import UsageError
from memplan.specs.training import check_choice
from memplan.specs.values import NamedTuple, dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from memplan.equivalence.batches import Weighed
    from memplan.equivalence.diagnosis import Diagnosis, Loop, Subject
    from memplan.equivalence.scaling import Advice
    from memplan.sequences.lengths import Lengths

DEFAULT_MICRO_BATCH, DEFAULT_ACCUMULATION = 2, 4

MOST_MICRO_BATCH, MOST_ACCUMULATION, MOST_RANKS = 4, 8, 2
"""More is not measured: it would take longer and show the same."""

SMALL_SEQ_LEN = 32
"""Tokens of a sequence of the measurement."""

OPTIMIZER = "adamw"

DEFAULT_PACKING = ("bfd",)
"""What TRL does where it is told to pack."""


class Cut(NamedTuple):
    """How a step is cut."""

    micro_batch_size: int
    accumulation: int
    ranks: int
    seq_len: int

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return self.micro_batch_size * self.accumulation * self.ranks


@dataclass(frozen=True, kw_only=True)
class SameUpdate:
    """The answer."""

    name: str
    origin: str
    """Why it is this model."""
    is_small: bool
    """Whether a small model of the family was measured, and not the user's module."""
    num_parameters: int
    """Of what was measured."""
    count: str
    """What the module takes its mean over: next tokens, labels or samples."""
    asked: Cut
    measured: Cut
    subject: Subject
    of_subject: Diagnosis
    loops: Mapping[str, Loop]
    """naive, normalised and, where there is one, own."""
    of_loops: Mapping[str, Diagnosis]
    step: str | None
    weights: tuple[Weighed, ...] | None
    """What naive averaging does to the data, for each way to make batches of it; None: no data was given, and equal
    lengths weigh the same."""
    advice: Advice | None
    """Where another batch is said to have been used before."""
    optimizer: str
    learning_rate: float | None
    warning: str | None
    """Of an accumulation that is unusually long."""

    @property
    def is_same(self) -> bool:
        """Whether the model can be cut, and the step, the user's own or memplan's, is that of the whole batch."""
        judged = self.of_loops["own" if self.step else "normalised"]
        return self.of_subject.is_same and judged.is_same


COUNT_WORDS = {"count_next_tokens": "next tokens", "count_labels": "labels", "num_samples": "samples"}


def find_cut(
    micro_batch: int | None, accumulation: int | None, gpus: int | None, target_batch: int | None, seq_len: int | None
) -> Cut:
    """How a step is cut; what is not given follows from the target, or has its default.

    Raises:
        UsageError: the target is no multiple, or contradicts the accumulation.
    """
    ranks = gpus or 1
    size = micro_batch or DEFAULT_MICRO_BATCH
    if target_batch is None:
        return Cut(size, accumulation or DEFAULT_ACCUMULATION, ranks, seq_len or SMALL_SEQ_LEN)
    if micro_batch is None and accumulation is not None and target_batch % (accumulation * ranks) == 0:
        size = target_batch // (accumulation * ranks)
    steps, rest = divmod(target_batch, size * ranks)
    if rest or not steps or accumulation not in {None, steps}:
        raise UsageError(
            f"A batch of {target_batch} is not micro-batch {size} x a whole accumulation x {ranks} ranks.",
            "Give --micro-batch and --accumulation whose product with --gpus is the target.",
        )
    return Cut(size, steps, ranks, seq_len or SMALL_SEQ_LEN)


def same_update(  # noqa: PLR0913 - one keyword for each thing that is asked
    model: str | None = None,
    *,
    micro_batch: int | None = None,
    accumulation: int | None = None,
    gpus: int | None = None,
    target_batch: int | None = None,
    seq_len: int | None = None,
    step: str | None = None,
    lengths: Lengths | None = None,
    truncation: str = "right",
    packing: Sequence[str] = DEFAULT_PACKING,
    optimizer: str = OPTIMIZER,
    previous_batch: int | None = None,
    learning_rate: float | None = None,
    warmup_steps: int | None = None,
    total_steps: int | None = None,
    notify: Callable[[str], None] | None = None,
) -> SameUpdate:
    """Compare accumulated gradients with those of the whole batch, and say why they differ.

    Args:
        model: A name, a config.json, a hub id, or ``package.module:factory``; the default model where None.
        micro_batch: Sequences in one forward pass on one rank (2).
        accumulation: Micro-steps of a step (4, or what reaches the target).
        gpus: Ranks with different data (1).
        target_batch: Sequences of a step over all ranks.
        seq_len: Tokens of a sequence; data is cut to it, too.
        step: The user's own step function, ``package.module:function``: called with the module and a list of the
            rank's micro-batches, it leaves the gradient in the parameters and does not step the optimizer.
        lengths: Of the data, for the weights of its tokens: ``memplan.lengths("train.jsonl").lengths``.
        truncation: Where sequences longer than `seq_len` are cut: right, left, middle or drop.
        packing: Strategies to pack, names of `memplan.sequences.analysis.STRATEGIES`; rows of `seq_len` tokens, or as
            long as the longest sequence.
        optimizer: Key of `memplan.specs.training.OPTIMIZERS`, for the advice.
        previous_batch: Sequences of a step before, where the batch changes.
        learning_rate: With that batch.
        warmup_steps: With that batch.
        total_steps: With that batch.
        notify: Is told what is being done.

    Raises:
        UsageError: a value or a combination has no meaning.
        MemplanError: the model is not known, or the module or the step function raise.
    """
    from memplan.probes.update_launch import compare_updates

    name, origin, config = _find(model)
    asked = find_cut(micro_batch, accumulation, gpus, target_batch, seq_len)
    measured = Cut(
        min(asked.micro_batch_size, MOST_MICRO_BATCH),
        min(asked.accumulation, MOST_ACCUMULATION),
        min(asked.ranks, MOST_RANKS),
        min(asked.seq_len, SMALL_SEQ_LEN) if config is not None else asked.seq_len,
    )
    weights = None if lengths is None else _weights(lengths, asked, seq_len, truncation, packing)
    if notify is not None:
        notify(f"comparing updates of {name}")
    found = compare_updates(name=name, config=config, shape=measured._asdict(), step=step)
    subject = parse_subject(found["subject"])
    loops = {key: parse_loop(loop) for key, loop in found["loops"].items()}
    advice = None
    if previous_batch is not None:
        advice = advise(
            previous_batch,
            asked.batch,
            optimizer=optimizer,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
        )
    return SameUpdate(
        name=name,
        origin=origin,
        is_small=config is not None,
        num_parameters=found["num_parameters"],
        count=COUNT_WORDS[found["count"]],
        asked=asked,
        measured=measured,
        subject=subject,
        of_subject=diagnose_subject(subject),
        loops=loops,
        of_loops={key: diagnose_loop(loop, tolerance(subject.floor)) for key, loop in loops.items()},
        step=step,
        weights=weights,
        advice=advice,
        optimizer=optimizer,
        learning_rate=learning_rate,
        warning=accumulation_warning(asked.accumulation),
    )


def _find(model: str | None) -> tuple[str, str, dict[str, Any] | None]:
    """Name, why it is this one, and its config; no config for a factory."""
    from memplan import api
    from memplan.architectures.undescribed import DIFFUSERS

    found = api.find_model(model)
    values = found.values
    if isinstance(found, api.UserModule) and found.model_type in DIFFUSERS:
        raise UsageError(f"{found.name} is a network of a diffusion model.", "Name a factory: package.module:factory.")
    return found.name, found.origin, None if values is None else dict(values)


def _weights(
    lengths: Lengths, cut: Cut, seq_len: int | None, truncation: str, packing: Sequence[str]
) -> tuple[Weighed, ...]:
    from memplan.equivalence.batches import Step, weigh
    from memplan.sequences.analysis import STRATEGIES
    from memplan.sequences.truncation import SIDES

    check_choice("truncation", truncation, SIDES)
    for name in packing:
        check_choice("packing", name, STRATEGIES)
    step = Step(cut.micro_batch_size, cut.accumulation, cut.ranks)
    return weigh(lengths, step, most=seq_len, side=truncation, strategies=packing)
