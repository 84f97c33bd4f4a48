"""Answers that were written by `--json`, read again; and the plan of such a file with what its page shows beside it.

What is in a file was written by anybody: its names are looked up as models are, a module that it names is not run, and
what is missing or of another shape is a fault of the file.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

from memplan import api, studies
from memplan.cli.command_line import command_line
from memplan.cli.values import Options
from memplan.errors import MemplanError
from memplan.feeding import DEFAULT_MAX_LOSS_PERCENT
from memplan.report.document import SCHEMA_VERSION, envelope, setup_document
from memplan.report.pages.answers import MISFITS, PAGE_BY_KIND, damaged
from memplan.report.study import study_document
from memplan.safety import DEFAULT_HEADROOM_PERCENT
from memplan.sequences.maximum import GIVEN
from memplan.specs.adapter import Lora
from memplan.specs.choices import FIELD_BY_ARGUMENT, LORA_FIELD_BY_ARGUMENT, choices_of
from memplan.specs.training import Setup
from memplan.specs.values import replace
from memplan.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.planner.plan import Plan
    from memplan.planner.study import Study

    Document = dict[str, Any]

LARGEST_FILE_BYTES = 64 * 2**20
SAME = 1e-9
"""Numbers this near to each other are the same, once written and read."""
CHOSEN = ("micro_batch", "accumulation", "checkpointing")
"""What a plan chooses where it was not given."""
DEFAULTS: dict[str, Any] = {
    **{name: getattr(Setup(), field) for name, field in FIELD_BY_ARGUMENT.items() if name not in {"seq_len", *CHOSEN}},
    **{name: getattr(Lora(rank=1), field) for name, field in LORA_FIELD_BY_ARGUMENT.items() if name != "lora_rank"},
    "gpus": 1,
    "headroom": DEFAULT_HEADROOM_PERCENT,
}
"""What a command line need not say."""
NAME_ONE = "Name an answer that was written by --json, or a model's config.json."
WRITE_AGAIN = "Write one with memplan suggest ... --json --output FILE."


def read_saved(path: str | None) -> Document | None:
    """The answer in a .json file; None for everything else, such as a model's config.json.

    Raises:
        MemplanError: it is no JSON, an answer of a kind or a version that this memplan does not know, or too large.
    """
    if path is None or not path.endswith(".json") or not os.path.isfile(path):
        return None
    if os.path.getsize(path) > LARGEST_FILE_BYTES:
        raise MemplanError(f"{path} is larger than {format_bytes(LARGEST_FILE_BYTES)}.", WRITE_AGAIN)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file, parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as fault:
        reason = getattr(fault, "strerror", None) or str(fault)
        raise MemplanError(f"{path} could not be read as JSON: {reason}.", NAME_ONE) from None
    if not isinstance(found, dict) or "kind" not in found or "model_type" in found:
        return None
    _check(found, path)
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _check(document: Document, path: str) -> None:
    kind, version = document["kind"], document.get("schema_version")
    if not isinstance(kind, str) or (kind not in PAGE_BY_KIND and kind != "plan"):
        raise MemplanError(f"{path} holds {kind!r:.40}, which is no answer of memplan.", WRITE_AGAIN)
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise MemplanError(
            f"{path} has schema_version {version!r:.20}; this version of memplan reads {SCHEMA_VERSION}.",
            "Write it again with this version, or read it with the one that wrote it.",
        )


def report_of_saved(plan: Document, path: str, notify: Callable[[str], None] | None) -> Document:
    """The document of the page of a plan from a file: the plan as it is there, the rest worked out again.

    Raises:
        MemplanError: the file is not complete.
    """
    try:
        shown = plan["best"] or plan["nearest"]
        choices = {**choices_of(shown["setup"]), **_asked(plan, shown["setup"])}
        data = plan.get("data")
        if data is not None:
            choices = without_data(choices, data)
        if notify is not None:
            notify(f"planning {path} again")
        found, choices = _again(plan, shown, choices, notify)
        command = command_line("suggest", _options(plan, choices))
        if isinstance(found, str):
            return study_document(None, plan, command, notes=[found])
        difference = _difference(plan, shown, found)
        notes = [difference] if difference else []
        return study_document(found, plan, command, notes=notes)
    except MISFITS as fault:
        raise damaged(plan, path) from fault


def _asked(plan: Document, setup: Document) -> Document:
    """The batch and the budget, as the arguments of `memplan.api.suggest`."""
    budget = plan["budget"]
    return {
        "target_batch": plan["target"]["global_batch_size"],
        "gpus": setup["data_parallel_size"],
        "headroom": budget["headroom_percent"],
        **({"reserve": f"{budget['reserve_bytes']}B"} if budget["reserve_bytes"] else {}),
        **({"confidence": plan["confidence"]} if budget["bound_ratio"] and plan["confidence"] else {}),
    }


def _again(
    plan: Document, shown: Document, choices: Document, notify: Callable[[str], None] | None
) -> tuple[Study | str, Document]:
    """The plan as this version makes it, or why it cannot; and the choices that make it.

    What a plan chooses is left free; where that leads elsewhere it was given, and is.
    """
    name, gpu = plan["model"]["name"], plan["gpu"]["name"]
    free = {key: value for key, value in choices.items() if key not in CHOSEN}
    if api.names_factory(name):
        why = f"{name} is a module that a file names, and is not run for it, so only what the file says is shown."
        return why, free
    try:
        model = api.find_trained(name, choices)
        if isinstance(model, api.UserModule):
            model = model._replace(notify=notify)
        made = _made(model, gpu, free, plan.get("data"))
        candidate = made.best or made.nearest
        if candidate is None or setup_document(candidate.setup) != shown["setup"]:
            free = choices
            made = _made(model, gpu, choices, plan.get("data"))
        return studies.study_of(made, model, notify=notify), free
    except MemplanError as fault:
        return _printable(f"Only what the file says is shown, as the plan could not be made again: {fault.cause}"), free


def _made(model: api.Model | api.UserModule, gpu: str, choices: Document, data: Document | None) -> Plan:
    """The plan that `choices` ask for; of data on the micro-batches that the file says, as the data is not read."""
    if data is None:
        return api.suggest(model, gpu=gpu, **choices)
    from memplan.planner.worst_batch import goal_on
    from memplan.report.feed import worst_of_document

    longest = {"seq_len": data["length"]["max_len"], "batching": None}
    goal, spec = api.goal_of(model, gpu=gpu, **{**choices, **longest})
    padded = replace(goal, setup=replace(goal.setup, padding=bool(data["worst"]["has_mask"])))
    return api.plan_of(model, goal_on(padded, worst_of_document(data["worst"]), goal.target), spec, choices)


def without_data(choices: Document, data: Document) -> Document:
    """The choices without what the data says of a setup; the length where it was asked for."""
    by_data = {"seq_len", "padding", "packed_sequences", *(["supervised"] if data["supervised"] is not None else [])}
    left = {name: value for name, value in choices.items() if name not in by_data}
    return left | ({"seq_len": data["length"]["max_len"]} if data["why"] == GIVEN else {})


def data_options(data: Document) -> Document:
    """What the command line said of the data, without what is a default."""
    percent = round(100 * data["max_loss"], 9)
    said = {
        "data": data["name"],
        "tokenizer": data["tokenizer"],
        "field": data["field"],
        "prompt_field": data["prompt_field"],
        "truncation": None if data["truncation"] == "right" else data["truncation"],
        "max_loss": None if data["why"] == GIVEN or percent == DEFAULT_MAX_LOSS_PERCENT else percent,
        "sample": data["num_samples"] if data["is_sample"] else None,
    }
    return {name: value for name, value in said.items() if value is not None}


def _printable(text: str) -> str:
    """The text without what a terminal would take for an order."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _difference(plan: Document, shown: Document, found: Study) -> str:
    """What the file says otherwise than this version, with both numbers; empty where nothing."""
    now = found.plan.best or found.plan.nearest
    assert now is not None
    pairs: tuple[tuple[str, Callable[[Any], str], float, float], ...] = (
        ("a peak", format_bytes, shown["peak_process_bytes"], now.memory.peak_process_bytes),
        ("a step", format_seconds, shown["step_time_s"], now.step_time.total_s),
    )
    said = [
        f"{what} of {written(before)} where this one ({envelope('plan')['memplan_version']}) {written(after)}"
        for what, written, before, after in pairs
        if not math.isclose(before, after, rel_tol=SAME)
    ]
    if not said:
        return ""
    wrote = plan["memplan_version"]
    return f"The memplan that wrote the plan ({wrote}) found {', '.join(said)}; the plan is shown as it is in the file."


def _options(plan: Document, choices: Document) -> Options:
    """The command line that asks for `choices`, without what is a default."""
    fields = {name: _hashable(value) for name, value in choices.items()}
    given = {name: value for name, value in fields.items() if name not in DEFAULTS or value != DEFAULTS[name]}
    data = plan.get("data")
    of_data = {} if data is None else data_options(data)
    return Options(model=plan["model"]["name"], gpu=plan["gpu"]["name"], **given, **of_data)


def _hashable(value: Any) -> Any:
    """Lists and mappings of JSON as options have them."""
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value
