"""An answer as plain data: what `--json` prints, and all that text and pages are made of.

Keys never change their meaning within a `SCHEMA_VERSION`; new ones may come.  The shapes are written down in
`schemas/`.  Bytes are ints; nothing is rounded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from memplan.export.trainer import trainer_arguments
from memplan.specs.adapter import lora_record
from memplan.specs.evaluation import evaluation_record
from memplan.specs.training import PAIRED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memplan.estimation.compiled import Compiled
    from memplan.estimation.difference import Difference
    from memplan.estimation.estimate import Estimate, ModelSummary
    from memplan.estimation.ledger import LedgerRow
    from memplan.planner.feed import Feed
    from memplan.planner.goal import Target
    from memplan.planner.plan import Candidate, Lever, Plan, WayOut
    from memplan.specs.gpu import GpuSpec
    from memplan.specs.training import Setup

    Document = dict[str, Any]

SCHEMA_VERSION = 1
"""Raised when a key changes its meaning or goes."""


def envelope(kind: str) -> Document:
    """What every document begins with."""
    version = sys.modules["memplan"].__version__  # the parent package; importing the facade is for users
    return {"schema_version": SCHEMA_VERSION, "kind": kind, "memplan_version": version}


def estimate_document(
    estimate: Estimate,
    *,
    kind: str = "estimate",
    origin: str = "",
    target: Target | None = None,
    plan: Plan | None = None,
) -> Document:
    """The bytes of one configuration.

    Args:
        estimate: The answer.
        kind: ``estimate``, or ``trace`` where it comes from the real module.
        origin: Why it is this model.
        target: The batch that the accumulation was derived from.
        plan: Where it does not fit: what would reach the same batch.
    """
    memory = estimate.memory
    return {
        **envelope(kind),
        "model": model_document(estimate.model, origin),
        "setup": setup_document(estimate.setup),
        "target": None if target is None else target_document(target, estimate.setup),
        "gpu": None if estimate.gpu is None else gpu_document(estimate.gpu),
        "parameter_bytes": estimate.parameter_bytes,
        "gradient_bytes": estimate.gradient_bytes,
        "optimizer_state_bytes": estimate.optimizer_state_bytes,
        "host_bytes": estimate.host_bytes,
        "kept_activation_bytes": estimate.kept_activation_bytes,
        "kept_activation_bytes_per_layer": estimate.kept_activation_bytes_per_layer,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "peak_process_bytes": memory.peak_process_bytes,
        "alloc_conf": memory.alloc_conf,
        "context_bytes": memory.context_bytes,
        "workspace_bytes": memory.workspace_bytes,
        "peak_instant": estimate.peak_instant,
        "instants": instants_document(estimate),
        "upper_bound_bytes": estimate.upper_bound_bytes,
        "compiled": compiled_document(estimate.compiled),
        "confidence": estimate.confidence,
        "calibration": calibration_document(estimate.gpu),
        "step_time_s": None if estimate.step_time is None else estimate.step_time.total_s,
        "fits": estimate.fits,
        "headroom_bytes": estimate.headroom_bytes,
        "ways_out": [] if plan is None else ways_to_reach(plan, estimate.setup),
        "ledger": [row_document(row) for row in estimate.ledger],
        "lints": lints_document(estimate),
        "assumptions": assumptions_document(estimate),
        "unmodelled": unmodelled_document(estimate),
    }


def difference_document(difference: Difference, estimate: Estimate, *, origin: str = "") -> Document:
    """Formula against trace.

    Args:
        difference: What they differ in.
        estimate: What the trace says.
        origin: Why it is this model.
    """
    return {
        **envelope("trace-diff"),
        "model": model_document(estimate.model, origin),
        "setup": setup_document(estimate.setup),
        "totals": [{**one._asdict(), "percent": one.percent} for one in difference.totals],
        "instants": [{**one._asdict(), "percent": one.percent} for one in difference.instants],
        "kept": [
            {
                "bytes": one.num_bytes,
                "num_in_formula": one.num_in_formula,
                "num_in_trace": one.num_in_trace,
                "rows": [
                    {
                        "witness": row.witness,
                        "module": row.module,
                        "tensor": row.tensor,
                        "dtype": row.dtype,
                        "bytes": row.num_bytes,
                        "count": row.num,
                    }
                    for row in one.rows
                ],
            }
            for one in difference.kept
        ],
    }


def plan_document(plan: Plan, *, origin: str = "", cards: Sequence[Document] = ()) -> Document:
    """What to run.

    Args:
        plan: The answer.
        origin: Why it is this model.
        cards: Where nothing fits: the smallest cards that hold the nearest configuration (`cards_that_hold`).
    """
    goal, best = plan.goal, plan.best
    return {
        **envelope("plan"),
        "model": model_document(plan.model, origin),
        "gpu": gpu_document(plan.gpu),
        "target": {**target_document(plan.target, goal.setup), "coarseness": plan.coarseness()},
        "budget": {
            "usable_bytes": goal.usable_bytes,
            "reserve_bytes": goal.reserve_bytes,
            "headroom_percent": goal.headroom_percent,
            "margin_bytes": goal.margin_bytes,
            "bound_ratio": goal.bound_ratio,
        },
        "compiled": compiled_document(plan.estimate.compiled),
        "confidence": plan.estimate.confidence,
        "calibration": calibration_document(plan.gpu),
        "speed_source": plan.speed_source,
        "fits": best is not None,
        "best": None if best is None else candidate_document(best),
        "trainer": None if best is None else _trainer(best.setup, plan.feed),
        "data": data_document(plan.feed),
        "long_accumulation": _long_accumulation(plan),
        "alternatives": [candidate_document(candidate) for candidate in plan.alternatives],
        "rejections": [
            {
                "setup": setup_document(rejection.candidate.setup),
                "short_by_bytes": rejection.candidate.short_by_bytes,
                "reason": rejection.reason,
                "peak_process_bytes": rejection.candidate.memory.peak_process_bytes,
            }
            for rejection in plan.rejections
        ],
        "levers": [lever_document(lever) for lever in plan.levers],
        "nearest": None if plan.nearest is None else candidate_document(plan.nearest),
        "ways_out": _ways(plan),
        "cards": list(cards),
        "peak_instant": plan.estimate.peak_instant,
        "instants": instants_document(plan.estimate),
        "lints": lints_document(plan.estimate),
        "assumptions": assumptions_document(plan.estimate),
        "unmodelled": unmodelled_document(plan.estimate),
    }


def _trainer(setup: Setup, feed: Feed | None) -> Document | None:
    """What a trainer is told; of data the length at which it is cut, which is not that of the worst micro-batch."""
    found = trainer_arguments(setup)
    if found is not None and feed is not None and "max_length" in found["arguments"]:
        found["arguments"]["max_length"] = feed.cut.most
    return found


def _long_accumulation(plan: Plan) -> Document | None:
    """What there is to say about accumulation beyond the usual; its module is imported where there is."""
    if plan.long_accumulation is None:
        return None
    from memplan.report.long_accumulation import long_accumulation_document

    return long_accumulation_document(plan.long_accumulation)


def data_document(feed: Feed | None) -> Document | None:
    """The data of a plan, null without; what shows it is imported where there is some."""
    if feed is None:
        return None
    from memplan.report.feed import feed_document

    return feed_document(feed)


def model_document(model: ModelSummary, origin: str) -> Document:
    """Which model, and why this one."""
    return {
        "name": model.name,
        "model_type": model.model_type,
        "num_parameters": model.num_parameters,
        "num_trainable_parameters": model.num_trainable_parameters,
        "task": model.task,
        "attentions": list(model.attentions),
        "unit": model.unit,
        "origin": origin,
    }


def setup_document(setup: Setup) -> Document:
    """How it is trained."""
    return {
        "micro_batch_size": setup.micro_batch_size,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps,
        "data_parallel_size": setup.data_parallel_size,
        "global_batch_size": setup.global_batch_size,
        "seq_len": setup.seq_len,
        "tokens_per_micro_batch": setup.tokens_per_micro_batch,
        "tokens_per_step": setup.tokens_per_step,
        "precision": setup.precision,
        "optimizer": setup.optimizer,
        "activation_checkpointing": setup.activation_checkpointing,
        "attention": setup.attention,
        "loss": setup.loss,
        "objective": setup.objective,
        "label_smoothing": setup.label_smoothing,
        "teacher": setup.teacher,
        "teacher_dtype": setup.teacher_dtype,
        "supervised": setup.supervised,
        "dropout": setup.dropout,
        "padding": setup.padding,
        "batching": setup.batching,
        "packed_sequences": setup.sequences_per_row if setup.batching == "packed" else None,
        "lora": None if setup.lora is None else lora_record(setup.lora),
        "freeze": list(setup.freeze),
        "quantize": setup.quantize,
        "offload": setup.offload,
        "reentrant": setup.reentrant,
        "upcast": setup.upcast,
        "compile": setup.compile,
        "evaluation": None if setup.evaluation is None else evaluation_record(setup.evaluation),
    }


def target_document(target: Target, setup: Setup) -> Document:
    """The batch to reach; `rounding` says what became of a number of tokens."""
    return {
        "global_batch_size": target.global_batch_size,
        "seq_len": setup.seq_len,
        "tokens_per_step": target.global_batch_size * setup.tokens_per_example,
        "target_tokens": target.target_tokens,
        "rounding": target.rounding(setup.tokens_per_example, "pair" if setup.objective in PAIRED else "sequence"),
    }


def calibration_document(gpu: GpuSpec | None) -> Document | None:
    """The measurements that a prediction for this card stands on; None: none."""
    found = None if gpu is None else gpu.calibration
    if found is None:
        return None
    return {
        "name": found.name,
        "gpu": found.gpu,
        "num_records": found.num_fitted + len(found.scores),
        "num_scored": len(found.scores),
        "is_timed": found.launch_s is not None,
        "first": found.first,
        "last": found.last,
    }


def gpu_document(gpu: GpuSpec) -> Document:
    """The card, its bytes and why these."""
    return {
        "name": gpu.name,
        "label": gpu.label,
        "total_bytes": gpu.total_bytes,
        "usable_bytes": gpu.usable_bytes,
        "usable_basis": gpu.usable_basis,
        "is_from_nvidia_smi": gpu.is_from_nvidia_smi,
        "unsupported_dtypes": list(gpu.unsupported_dtypes),
        "notes": " ".join(gpu.notes.split()),
    }


def compiled_document(compiled: Compiled | None) -> Document | None:
    """The ranges under ``torch.compile``, null without."""
    if compiled is None:
        return None
    ranges = ("kept_activation_bytes", "peak_allocated_bytes", "peak_process_bytes")
    return {**{name: getattr(compiled, name)._asdict() for name in ranges}, "is_traced": compiled.is_traced}


def candidate_document(candidate: Candidate) -> Document:
    """A configuration with its bytes and its time."""
    return {
        "setup": setup_document(candidate.setup),
        "peak_allocated_bytes": candidate.memory.peak_allocated_bytes,
        "peak_reserved_bytes": candidate.memory.peak_reserved_bytes,
        "peak_process_bytes": candidate.memory.peak_process_bytes,
        "alloc_conf": candidate.memory.alloc_conf,
        "upper_bound_bytes": candidate.upper_bound_bytes,
        "headroom_bytes": candidate.headroom_bytes,
        "step_time_s": candidate.step_time.total_s,
        "tokens_per_s": candidate.tokens_per_s,
    }


def lever_document(lever: Lever) -> Document:
    """One change and its price."""
    return {
        "lever": lever.name,
        "flag": lever.flag,
        "delta_bytes": lever.delta_bytes,
        "delta_step_time_s": lever.delta_step_time_s,
        "peak_allocated_bytes": lever.candidate.memory.peak_allocated_bytes,
        "same_update": lever.same_update,
        "price": lever.price,
    }


def way_document(way: WayOut) -> Document:
    """Some changes that together make it fit."""
    return {
        "options": " ".join(lever.flag for lever in way.levers),
        "same_update": way.same_update,
        **candidate_document(way.candidate),
    }


def _ways(plan: Plan) -> list[Document]:
    """The ways out; those that give up AdamW are the last."""
    gives_up = [any(lever.gives_up_adam for lever in way.levers) for way in plan.ways_out]
    ranked = sorted(zip(gives_up, plan.ways_out, strict=True), key=lambda pair: pair[0])
    return [way_document(way) for _, way in ranked]


def ways_to_reach(plan: Plan, setup: Setup) -> list[Document]:
    """How the batch of a `setup` that does not fit can be reached: the plan's best, or its ways out."""
    if plan.best is None:
        smallest = options_of(plan.nearest.setup, beside=setup) if plan.nearest is not None else ""
        ways = _ways(plan)
        return [{**way, "options": f"{smallest} {way['options']}".strip()} for way in ways]
    best = candidate_document(plan.best)
    return [{"options": options_of(plan.best.setup, beside=setup), "same_update": True, **best}]


def options_of(setup: Setup, *, beside: Setup) -> str:
    """The options that split the batch of `beside` like `setup`, and compute the same again."""
    options = []
    if setup.micro_batch_size != beside.micro_batch_size:
        options.append(f"--micro-batch {setup.micro_batch_size} --accumulation {setup.gradient_accumulation_steps}")
    if setup.activation_checkpointing != beside.activation_checkpointing:
        options.append(f"--checkpointing {setup.activation_checkpointing}")
    return " ".join(options)


def instants_document(estimate: Estimate) -> list[Document]:
    """The highest point of each part of a step."""
    return [
        {
            "name": instant.name,
            "allocated_bytes": instant.allocated_bytes,
            "first_step_allocated_bytes": instant.first_step_allocated_bytes,
        }
        for instant in estimate.instants
    ]


def row_document(row: LedgerRow) -> Document:
    """Some equal tensors."""
    return {
        "module": row.module,
        "tensor": row.tensor,
        "kind": row.kind,
        "bytes": row.num_bytes,
        "bytes_at_peak": row.bytes_at_peak,
        "count": row.num,
        "shape": None if row.shape is None else list(row.shape),
        "dtype": row.dtype,
        "formula": row.formula,
        "source": row.source,
    }


def assumptions_document(estimate: Estimate) -> list[Document]:
    """What was taken for granted; `effect_bytes` is the change of the peak in the case `otherwise`."""
    return [assumption._asdict() for assumption in estimate.assumptions]


def lints_document(estimate: Estimate) -> list[Document]:
    """What is worth knowing before the run; `effect_bytes` is the change of the peak where it is heeded."""
    return [lint._asdict() for lint in estimate.lints]


def unmodelled_document(estimate: Estimate) -> list[Document]:
    """What the numbers leave out."""
    return [{"what": what, "why": why} for what, why in estimate.unmodelled]


def gpus_document(gpus: Iterable[GpuSpec]) -> Document:
    """The catalogue of GPUs."""
    return {
        **envelope("gpus"),
        "gpus": [
            {
                **gpu_document(gpu),
                "aliases": list(gpu.aliases),
                "label_bytes": gpu.label_bytes,
                "physical_bytes": gpu.physical_bytes,
                "torch_bytes": gpu.torch_bytes,
                "context_bytes": gpu.context_bytes,
                "memory_bandwidth_bytes_per_s": gpu.memory_bandwidth_bytes_per_s,
                "link_bytes_per_s": gpu.link_bytes_per_s,
                "flops_per_s": dict(gpu.flops_per_s),
                "compute_capability": gpu.compute_capability,
                "sources": dict(gpu.sources),
            }
            for gpu in gpus
        ],
    }
