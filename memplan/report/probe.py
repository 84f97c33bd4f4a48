"""A measurement as plain data and as text: what `memplan probe` says, beside what the formula says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.report.ansi import Line
from memplan.report.document import envelope as begin
from memplan.report.document import gpu_document, setup_document
from memplan.report.layout import bar, plural, wrap
from memplan.report.text import choices, equation, paragraph, paragraphs, table, title
from memplan.specs.measurement import DONE, OUT_OF_MEMORY, describe
from memplan.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from memplan.calibration.prediction import Prediction
    from memplan.specs.gpu import GpuSpec
    from memplan.specs.measurement import Measurement

    Document = dict[str, Any]

BAR_CELLS = 24

INSTANT_BY_PHASE = {"clip": "gradient clip", "optimizer": "optimizer step", "zero_grad": "after the update"}
"""What an estimate calls a phase, where it has another name."""

HEADLINE_BY_OUTCOME = {DONE: "It ran", OUT_OF_MEMORY: "OUT OF MEMORY"}


def probe_document(
    found: Measurement, prediction: Prediction, gpu: GpuSpec | None, *, context_bytes: int, records: str | None
) -> Document:
    """A measurement in the shape of an estimate, so that the two can be subtracted.

    Args:
        found: What was measured.
        prediction: What the formula says.
        gpu: The card, capped where it was; None for a CPU.
        context_bytes: Of a CUDA context, where the driver did not say what the process takes.
        records: The file it was written to.
    """
    trial = found.trial
    process, basis = process_bytes(found, context_bytes)
    instants = _instants(found)
    allocated = found.peak_allocated_bytes
    usable = None if gpu is None else gpu.usable_bytes
    fits = None if gpu is None else found.survived
    return {
        **begin("probe"),
        "model": {
            "name": trial.model,
            "model_type": str(trial.config.get("model_type", "")),
            "num_parameters": found.num_parameters,
            "num_trainable_parameters": found.num_trainable_parameters,
        },
        "setup": setup_document(trial.setup),
        "gpu": None if gpu is None else gpu_document(gpu),
        "outcome": found.outcome,
        "message": found.message,
        "phase": found.phase,
        "parameter_bytes": found.parameter_bytes,
        "gradient_bytes": found.gradient_bytes,
        "optimizer_state_bytes": found.optimizer_state_bytes,
        "kept_activation_bytes": found.kept_activation_bytes,
        "kept_activation_bytes_per_layer": None,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": found.peak_reserved_bytes,
        "peak_process_bytes": process,
        "process_basis": basis,
        "context_bytes": found.context_bytes,
        "workspace_bytes": found.workspace_bytes,
        "peak_instant": max(instants, key=lambda one: one["allocated_bytes"])["name"] if instants else None,
        "instants": instants,
        "upper_bound_bytes": process,
        "confidence": 0.0,
        "step_time_s": found.step_time_s,
        "fits": fits,
        "headroom_bytes": None if usable is None or process is None else usable - process,
        "limit_bytes": trial.limit_bytes,
        "predicted": {
            "peak_allocated_bytes": prediction.allocated,
            "peak_reserved_bytes": prediction.reserved,
            "peak_process_bytes": prediction.process,
            "step_time_s": prediction.step_time,
            "reason": prediction.reason,
        },
        "steps": [_step(step) for step in found.steps],
        "step_times_s": list(found.step_times_s),
        "card": {**found.card._asdict(), "clocks": dict(found.card.clocks)},
        "versions": dict(found.versions),
        "rank": found.rank,
        "measured_at": found.measured_at,
        "record": records,
        "ledger": _ledger(found),
        "unmodelled": [],
    }


def process_bytes(found: Measurement, context_bytes: int) -> tuple[int | None, str]:
    """What the process took and who says so: the driver, else reserved bytes and a context."""
    measured = found.peak_process_bytes
    if measured is not None:
        return measured, found.process_basis
    reserved = found.peak_reserved_bytes
    if reserved is None:
        return None, ""
    if found.context_bytes is not None:
        return reserved + found.context_bytes, "reserved and the context as measured"
    return reserved + context_bytes, "reserved and a context as measured elsewhere"


def _instants(found: Measurement) -> list[Document]:
    """The highest point of each phase, in steady state and in the first step."""
    if not found.steady:
        return []
    first = {phase.name: phase.peak_allocated_bytes for phase in found.steps[0].phases}
    steady: dict[str, int] = {}
    for step in found.steady:
        for phase in step.phases:
            steady[phase.name] = max(steady.get(phase.name, 0), phase.peak_allocated_bytes)
    return [
        {
            "name": INSTANT_BY_PHASE.get(name, name),
            "allocated_bytes": num_bytes,
            "first_step_allocated_bytes": first.get(name, 0),
        }
        for name, num_bytes in steady.items()
    ]


def _step(step: Any) -> Document:
    return {**step._asdict(), "phases": [phase._asdict() for phase in step.phases]}


def _ledger(found: Measurement) -> list[Document]:
    """What is known of the bytes by kind: a device does not say which tensor is which."""
    rows = (
        ("parameter", "parameters", found.parameter_bytes),
        ("gradient", "gradients", found.gradient_bytes),
        ("optimizer_state", "optimizer states", found.optimizer_state_bytes),
        ("activation", "kept for the backward pass", found.kept_activation_bytes),
        ("workspace", "cuBLAS workspaces", found.workspace_bytes),
        ("context", "CUDA context", found.context_bytes),
    )
    return [
        {
            "module": "(the model)",
            "tensor": tensor,
            "kind": kind,
            "bytes": num_bytes,
            "formula": str(num_bytes),
            "source": f"measured on {found.card.name}",
        }
        for kind, tensor, num_bytes in rows
        if num_bytes is not None
    ]


# -- text --------------------------------------------------------------------------------------------------------------


def render_probe(document: Document, *, quiet: bool = False) -> list[Line]:
    """The text of a probe document; `quiet`: outcome and numbers alone."""
    return [
        *([] if quiet else _about(document)),
        *_outcome(document),
        *_numbers(document),
        *([] if quiet else _phases(document)),
    ]


def _about(document: Document) -> Iterator[Line]:
    return paragraphs(probed_facts(document))


def probed_facts(document: Document) -> Iterator[tuple[str, str]]:
    """What was measured where, as labels and texts."""
    model, setup, card = document["model"], document["setup"], document["card"]
    size = "" if model["num_parameters"] is None else f", {format_count(model['num_parameters'])} parameters"
    trained = model["num_trainable_parameters"]
    if trained is not None and trained != model["num_parameters"]:
        size += f", {format_count(trained)} of them trained"
    yield "model", f"{model['name']} ({model['model_type']}){size}"
    yield "device", device_words(card, document["limit_bytes"])
    yield "", stack_of(document["versions"], card["driver"])
    yield "setup", f"{choices(setup)}, checkpointing {setup['activation_checkpointing']}"
    yield "", equation(setup)


def device_words(card: Mapping[str, Any], limit_bytes: int | None) -> str:
    """On which device, and what of it."""
    if card["device"] == "cpu":
        return "the CPU: bytes of tensors, no CUDA allocator and no driver"
    text = f"{card['name']}, {format_bytes(card['total_bytes'])}"
    if limit_bytes is not None:
        text += f", capped at {format_bytes(limit_bytes)}"
    others = card["num_other_processes"]
    if others:
        text += f"; {plural(others, 'other process').replace('processs', 'processes')} on it"
    return text


def stack_of(versions: Mapping[str, str], driver: str = "") -> str:
    """Libraries and driver in one line."""
    names = ("torch", "cuda", "transformers", "peft")
    words = [f"{name} {versions[name]}" for name in names if versions.get(name)]
    return ", ".join([*words, *([f"driver {driver}"] if driver else [])])


def _outcome(document: Document) -> Iterator[Line]:
    headline, message = outcome_words(document)
    yield from title(headline, "good" if document["outcome"] == DONE else "bad")
    if document["outcome"] != DONE:
        yield from paragraph("", message)


def outcome_words(document: Document) -> tuple[str, str]:
    """What became of it, and what was said about it."""
    outcome = document["outcome"]
    headline = HEADLINE_BY_OUTCOME.get(outcome, f"No answer: {outcome}")
    if outcome == DONE:
        seconds = document["step_time_s"]
        return headline + ("" if seconds is None else f": {format_seconds(seconds)} a step"), ""
    phase = document["phase"]
    where = f" {phase}" if phase.startswith(("before", "building")) else f" in {phase}" if phase else ""
    return f"{headline}{where}", document["message"]


def _numbers(document: Document) -> Iterator[Line]:
    rows = measured_rows(document)
    if rows:
        yield from title("Bytes in steady state")
        yield from table([("peak", "measured", "formula", "error"), *rows])
    peak, gpu = document["peak_process_bytes"], document["gpu"]
    if peak is not None and gpu is not None:
        whole = gpu["usable_bytes"]
        text = f"{format_bytes(peak)} of {format_bytes(whole)} {bar(peak / whole, BAR_CELLS)} as measured"
        yield from paragraph("card", text)
    yield from paragraphs(("", text) for text in measured_notes(document))


def measured_rows(document: Document) -> list[tuple[str, str, str, str]]:
    """Which peak, as measured, by the formula, and the formula's error."""
    predicted = document["predicted"]
    names = {
        "peak_allocated_bytes": "allocated",
        "peak_reserved_bytes": "reserved",
        "peak_process_bytes": "process",
    }
    rows = []
    for key, name in names.items():
        measured, formula = document[key], predicted[key]
        if measured is None and (formula is None or document["outcome"] == DONE):
            continue
        rows.append((name, *_pair(measured, formula)))
    return rows


def measured_notes(document: Document) -> Iterator[str]:
    """Why numbers are missing, or where they come from."""
    if document["predicted"]["reason"]:
        yield f"no prediction: {document['predicted']['reason']}"
    if document["peak_process_bytes"] is not None and document["process_basis"] not in {"nvml", "device"}:
        yield f"process: {document['process_basis']}, as the driver did not say"


def _pair(measured: int | None, formula: int | None) -> tuple[str, str, str]:
    error = ""
    if measured and formula is not None:
        error = "exact" if formula == measured else f"{100 * (formula - measured) / measured:+.2f} %"
    return (
        "-" if measured is None else format_bytes(measured),
        "-" if formula is None else format_bytes(formula),
        error,
    )


def _phases(document: Document) -> Iterator[Line]:
    steps = document["steps"]
    if not steps:
        return
    yield from title("The highest point of each phase (allocated)")
    yield from table(phase_rows(steps))
    retries = retry_words(steps)
    if retries:
        yield from paragraph("", retries)


def phase_rows(steps: Sequence[Document]) -> list[tuple[str, ...]]:
    """The names of the columns, and a row for each phase."""
    names = list(dict.fromkeys(phase["name"] for step in steps for phase in step["phases"]))
    rows: list[tuple[str, ...]] = [("", *(f"step {step['number'] + 1}" for step in steps))]
    for name in names:
        found = [{p["name"]: p["peak_allocated_bytes"] for p in step["phases"]}.get(name) for step in steps]
        rows.append((INSTANT_BY_PHASE.get(name, name), *("-" if x is None else format_bytes(x) for x in found)))
    return rows


def retry_words(steps: Sequence[Document]) -> str:
    """How often the allocator had to start over; empty where never."""
    retries = steps[-1]["num_alloc_retries"]
    return f"The allocator emptied its cache and tried again {plural(retries, 'time')}." if retries else ""


# -- several -----------------------------------------------------------------------------------------------------------


def trial_row(found: Measurement, prediction: Prediction) -> Document:
    """One trial of many."""
    trial = found.trial
    return {
        "model": trial.model,
        "setup": setup_document(trial.setup),
        "limit": trial.limit,
        "limit_bytes": trial.limit_bytes,
        "words": describe(trial),
        "role": trial.role,
        "target_batch": trial.target_batch,
        "outcome": found.outcome,
        "message": found.message,
        "peak_allocated_bytes": found.peak_allocated_bytes,
        "peak_reserved_bytes": found.peak_reserved_bytes,
        "peak_process_bytes": found.peak_process_bytes,
        "step_time_s": found.step_time_s,
        "predicted_allocated_bytes": prediction.allocated,
        "predicted_process_bytes": prediction.process,
        "id": found.id,
    }


def render_trials(document: Document, *, quiet: bool = False) -> list[Line]:
    """The text of a document of several trials."""
    if quiet:
        return [Line(count_words(document))]
    card = document["card"]
    return [
        *paragraph("device", device_words(card, None)),
        *paragraph("", stack_of(document["versions"], card["driver"])),
        *_largest(document["largest"]),
        *_decisions(document["decisions"]),
        *_trials(document["trials"]),
        *_reasons("Without an answer", document["failed"]),
        *_reasons("Not asked", document["not_asked"]),
        Line(""),
        *paragraph("", count_words(document)),
        *paragraph("", f"records: {document['records']}" if document["records"] else "nothing was recorded"),
    ]


def count_words(document: Document) -> str:
    """How many trials have which end."""
    parts = [f"{plural(document['num_measured'], 'trial')} measured"]
    parts += [f"{document['num_known']} known from before"] if document["num_known"] else []
    parts += [f"{document['num_failed']} without an answer"] if document["num_failed"] else []
    parts += [f"{len(document['not_asked'])} that cannot be asked"] if document["not_asked"] else []
    parts += [f"{document['num_left']} left, as the time was over"] if document["num_left"] else []
    return ", ".join(parts)


def _largest(largest: Sequence[Document]) -> Iterator[Line]:
    if not largest:
        return
    yield from title("The largest micro-batch that survives")
    for one in largest:
        tried = ", ".join(f"{b} {'fits' if ok else 'does not'}" for b, ok in one["tried"])
        yield from _said(one["trial"])
        found = largest_words(one["micro_batch_size"], one["complete"])
        yield from _below(f"{found}; the formula says {one['predicted']} without headroom. Tried: {tried or 'nothing'}")


def largest_words(micro_batch_size: int | None, complete: bool) -> str:
    """The largest micro-batch, as far as it is known."""
    text = "none" if micro_batch_size is None else str(micro_batch_size)
    return text if complete else f">= {text}" if micro_batch_size else "?"


def _decisions(decisions: Sequence[Document]) -> Iterator[Line]:
    if not decisions:
        return
    yield from title("Plans put to the test")
    for one in decisions:
        yield from _said(one["trial"])
        yield from _below(f"the plan, {tested_words(one['plan'])}; the next larger, {tested_words(one['larger'])}")


def tested_words(one: Document | None) -> str:
    """What was tested, and how it ended."""
    if one is None:
        return "none or not measured"
    return f"micro {one['micro_batch_size']}, checkpointing {one['activation_checkpointing']}: {one['outcome']}"


def _said(text: str) -> Iterator[Line]:
    yield from (Line(line) for line in wrap(text, first="  "))


def _below(text: str) -> Iterator[Line]:
    yield from (Line(line, "faint") for line in wrap(text, first="    "))


def _trials(trials: Sequence[Document]) -> Iterator[Line]:
    if not trials:
        return
    yield from title("Trials: allocated as measured, error of the formula, time of a step")
    for one in trials:
        yield from _said(one["words"])
        yield from _below(result_words(one))


def result_words(one: Document) -> str:
    """Allocated as measured, error of the formula, time of a step; or why there are none."""
    measured, formula = one["peak_allocated_bytes"], one["predicted_allocated_bytes"]
    if measured is None:
        return str(one["outcome"])
    seconds = one["step_time_s"]
    error = _pair(measured, formula)[2] or "no prediction"
    return f"{format_bytes(measured)}, {error}{'' if seconds is None else f', {format_seconds(seconds)} a step'}"


def _reasons(heading: str, rows: Sequence[Document]) -> Iterator[Line]:
    """Trials of several with the same reason together."""
    if not rows:
        return
    yield from title(heading, "bad")
    by_reason: dict[str, list[str]] = {}
    for one in rows:
        by_reason.setdefault(one["reason"], []).append(one["trial"])
    for reason, trials in by_reason.items():
        more = f" and {plural(len(trials) - 1, 'other')}" if len(trials) > 1 else ""
        yield from _said(f"{trials[0]}{more}")
        yield from _below(reason)
