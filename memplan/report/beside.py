"""What a page shows beside a plan, as plain data: maps of what fits, growth, the frontier, the schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.estimation.dimensions import dimensions
from memplan.operators.sizes import Size
from memplan.report.document import candidate_document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memplan.estimation.growth import Growth, GrowthPoint
    from memplan.estimation.kept import Kept
    from memplan.estimation.sweep import Sweep
    from memplan.planner.frontier import FrontierPoint
    from memplan.planner.schedule import Schedule
    from memplan.specs.training import Setup

    Document = dict[str, Any]


CHART_NAMES = ("breakdown", "timeline", "map", "length", "micro-batch", "frontier", "levers", "schedule", "lengths")
"""The charts of a report (`memplan.report.charts.named` draws them)."""


def maps_document(maps: Sequence[Sweep]) -> list[Document]:
    """What fits, for each way of checkpointing; points go by micro-batch, and for each by length."""
    return [
        {
            "activation_checkpointing": one.grid.setup.activation_checkpointing,
            "gradient_accumulation_steps": one.grid.setup.gradient_accumulation_steps,
            "micro_batch_sizes": list(one.micro_batch_sizes),
            "seq_lens": list(one.seq_lens),
            "points": [
                {"peak_process_bytes": num, "verdict": verdict}
                for num, verdict in zip(one.grid.peak_process_bytes.tolist(), one.verdicts(), strict=True)
            ],
        }
        for one in maps
    ]


def growth_document(growth: Growth) -> Document:
    """How memory grows with the length and with the micro-batch."""
    return {
        "micro_batch_size": growth.setup.micro_batch_size,
        "seq_len": growth.setup.seq_len,
        "by_length": [_point(one) for one in growth.by_length],
        "by_micro_batch": [_point(one) for one in growth.by_micro_batch],
        "kept": _kept(growth.kept, growth.setup),
        "kept_bytes": growth.kept_bytes,
        "state_bytes": growth.state_bytes,
        "takes_over": growth.takes_over._asdict(),
        "windows": list(growth.windows),
    }


def _point(point: GrowthPoint) -> Document:
    return {"size": point.size, "bytes_by_kind": dict(point.by_kind)}


def _kept(kept: Kept, setup: Setup) -> Document:
    env = dimensions(setup)
    return {
        "formula": kept.formula(),
        "symbols": list(kept.symbols),
        "is_one_row": kept.is_one_row,
        "sequences": setup.sequences_per_micro_batch,
        "tokens": setup.tokens_per_micro_batch,
        "bytes": kept.value(env),
        "rounding_bytes": kept.rounding_bytes,
        "terms": [
            {
                "text": ("-" if term.factor < 0 else "") + term.text(is_one_row=kept.is_one_row),
                "bytes": Size(term.factor, term.dims).value(env),
            }
            for term in kept.terms
        ],
    }


def frontier_document(points: Sequence[FrontierPoint]) -> list[Document]:
    """Configurations that reach the batch, fastest first; nothing is replayed."""
    return [
        {
            **_brief(candidate_document(one.candidate)),
            "is_undominated": one.is_undominated,
            "is_plan": one.is_plan,
            "fits": one.candidate.fits,
        }
        for one in points
    ]


OF_SETUP = ("micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing")
OF_CANDIDATE = ("peak_process_bytes", "upper_bound_bytes", "step_time_s")


def _brief(candidate: Document) -> Document:
    """Without what all have in common."""
    setup = candidate["setup"]
    return {**{key: setup[key] for key in OF_SETUP}, **{key: candidate[key] for key in OF_CANDIDATE}}


def schedule_document(schedule: Schedule) -> Document:
    """Which samples go where; a run of samples is its first, last, step and number."""
    return {
        "num_gpus": schedule.num_gpus,
        "num_micro_steps": schedule.num_micro_steps,
        "micro_batch_size": schedule.micro_batch_size,
        "global_batch_size": schedule.global_batch_size,
        "gpus": list(schedule.gpus),
        "micro_steps": list(schedule.micro_steps),
        "shares": [
            {"micro_step": one.micro_step, "gpu": one.gpu, "first": one.samples[0], "last": one.samples[-1]}
            for one in schedule.shares
        ],
    }
