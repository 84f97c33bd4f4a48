"""`memplan same-update` as plain data: what `--json` prints and the text is made of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from memplan.catalog.trainers import find_trainers
from memplan.equivalence.diagnosis import TOKEN
from memplan.equivalence.scaling import CRITICAL_BATCH, SOURCE_BY_RULE
from memplan.report.document import envelope

if TYPE_CHECKING:
    from memplan.catalog.trainers import Trainer
    from memplan.equivalence.batches import Weighed
    from memplan.equivalence.diagnosis import Diagnosis, Loop
    from memplan.equivalence.scaling import Advice
    from memplan.measuring.same_update import Cut, SameUpdate

    Document = dict[str, Any]

STEPS = {"naive": "naive averaging", "normalised": "memplan.accumulate", "own": "your step"}
"""Key of a loop -> what the text calls it."""


def update_document(found: SameUpdate | None, trainers: tuple[Trainer, ...] | None = None) -> Document:
    """An answer; None: nothing was measured, and the trainers are listed."""
    rows = find_trainers() if trainers is None else trainers
    empty = dict.fromkeys(
        ("model", "setup", "measured", "is_same", "subject", "token_weights", "advice", "warning"), None
    )
    measured = {**empty, "steps": []} if found is None else _measured(found)
    return {**envelope("same-update"), **measured, "trainers": [_trainer(one) for one in rows]}


def _measured(found: SameUpdate) -> Document:
    return {
        "model": {
            "name": found.name,
            "origin": found.origin,
            "is_small": found.is_small,
            "num_parameters": found.num_parameters,
            "mean_over": found.count,
        },
        "setup": _cut(found.asked),
        "measured": _cut(found.measured),
        "is_same": found.is_same,
        "subject": {
            "error": _finite(found.subject.error),
            "repeat_error": _finite(found.subject.repeat_error),
            "rounding_error": _finite(found.subject.floor),
            **_diagnosis(found.of_subject),
        },
        "steps": [_step(name, loop, found) for name, loop in found.loops.items()],
        "token_weights": None if found.weights is None else [_weights(one) for one in found.weights],
        "advice": None if found.advice is None else _advice(found.advice, found),
        "warning": found.warning,
    }


def _cut(cut: Cut) -> Document:
    return {
        "micro_batch_size": cut.micro_batch_size,
        "gradient_accumulation_steps": cut.accumulation,
        "data_parallel_size": cut.ranks,
        "global_batch_size": cut.batch,
        "seq_len": cut.seq_len,
    }


def _finite(number: float) -> float | None:
    """JSON has no NaN."""
    return number if math.isfinite(number) else None


def _diagnosis(diagnosis: Diagnosis) -> Document:
    return {
        "is_same": diagnosis.is_same,
        "causes": [cause._asdict() for cause in diagnosis.causes],
        "notes": list(diagnosis.notes),
    }


def _step(name: str, loop: Loop, found: SameUpdate) -> Document:
    windows = [
        {
            "num_micro_batches": one.num_micro_batches,
            "error": _finite(one.error),
            "ratio": _finite(one.matches[TOKEN].ratio) if TOKEN in one.matches else None,
        }
        for one in loop.windows
    ]
    return {
        "name": name,
        "title": STEPS[name],
        "function": found.step if name == "own" else None,
        "windows": windows,
        **_diagnosis(found.of_loops[name]),
    }


def _weights(found: Weighed) -> Document:
    weights = found.weights
    return {
        "batching": found.batching,
        "row_tokens": found.row_tokens,
        "why_not": found.why or None,
        "weights": None if weights is None else {**weights._asdict(), "spread": weights.spread},
    }


def _advice(advice: Advice, found: SameUpdate) -> Document:
    return {
        **advice._asdict(),
        "betas": None if advice.betas is None else list(advice.betas),
        "optimizer": found.optimizer,
        "previous_learning_rate": found.learning_rate,
        "source": SOURCE_BY_RULE[advice.rule],
        "sources": {name: source for name, source in SOURCE_BY_RULE.items() if name != "unknown"},
        "limit": CRITICAL_BATCH,
    }


def _trainer(trainer: Trainer) -> Document:
    row = trainer.row
    return {
        "trainer": row.trainer,
        "package": row.package,
        "installed": trainer.installed,
        "versions": row.versions,
        "checked": row.checked,
        "tokens": row.tokens,
        "ranks": row.ranks,
        "window": row.window,
        "says": row.says,
        "source": row.source,
    }
