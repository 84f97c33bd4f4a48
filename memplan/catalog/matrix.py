"""A grid of trials, as a TOML file says it.

    [defaults]
    precision = "bf16"

    [[trial]]                             # lists are crossed, the last of them runs fastest
    model = "qwen2.5-1.5b"
    micro_batch = [1, 4]
    limit = ["16GB", "24GB"]

    [[trial]]
    model = "qwen2.5-1.5b"
    limit = "24GB"
    target_batch = 32                     # put the plan for this batch to the test, and the next larger micro-batch

    [[trial]]
    model = "qwen2.5-1.5b"
    limit = "24GB"
    find_max = true                       # bisect to the largest micro-batch that survives

Keys are the arguments of `memplan.estimate`, and `limit`, `find_max`, `target_batch`; lists are
texts such as "q_proj,v_proj".  Trials are run in the order of the file: the most telling come first.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

from memplan.catalog.profiles import parse_toml, profile_path
from memplan.errors import MemplanError, did_you_mean
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FOLDER = "matrix"

KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "seq_len": (int,),
    "micro_batch": (int,),
    "accumulation": (int,),
    "precision": (str,),
    "optimizer": (str,),
    "checkpointing": (str,),
    "attention": (str,),
    "loss": (str,),
    "label_smoothing": (int, float),
    "dropout": (int, float),
    "padding": (bool,),
    "batching": (str,),
    "packed_sequences": (int,),
    "lora_rank": (int,),
    "lora_targets": (str,),
    "lora_dropout": (int, float),
    "lora_dtype": (str,),
    "dora": (bool,),
    "modules_to_save": (str,),
    "lora_layers": (str,),
    "lora_ranks": (str,),
    "freeze": (str,),
    "quantize": (str,),
    "offload": (str,),
    "reentrant": (bool,),
    "upcast": (bool,),
    "compile": (bool,),
    "limit": (str,),
    "find_max": (bool,),
    "target_batch": (int,),
}
"""Key of a trial -> the types of its values."""

MAX_TRIALS = 10_000
"""A grid of more is a slip: at ten seconds each they would take a day."""


class MatrixEntry(NamedTuple):
    """One trial, or one search of several."""

    choices: Mapping[str, Any]
    """Arguments of `memplan.measuring.make_trial`."""
    find_max: bool = False
    target_batch: int | None = None


def named_matrices() -> list[str]:
    """Those that memplan comes with."""
    folder = profile_path(FOLDER)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def read_matrix(name: str) -> tuple[MatrixEntry, ...]:
    """The trials of a file, or of a matrix that memplan comes with (``core``, ``full``), in their order.

    Raises:
        MemplanError: there is no such file, or it is not one of trials; the message says which one of them and why.
    """
    own = named_matrices()
    path = profile_path(FOLDER, f"{name}.toml") if name in own and not os.path.exists(name) else name
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as fault:
        raise MemplanError(
            f"The matrix {name} cannot be read: {fault.strerror}.",
            did_you_mean(name, own, otherwise=f"Name a TOML file, or one of {', '.join(own)}."),
        ) from None
    try:
        table = parse_toml(content)
    except ValueError as fault:
        raise MemplanError(f"The matrix {name} is not TOML: {fault}.", "Correct it there.") from None
    return parse_matrix(table, name)


def parse_matrix(table: Mapping[str, Any], name: str) -> tuple[MatrixEntry, ...]:
    """The trials of a parsed file.

    Raises:
        MemplanError: it is not one of trials.
    """
    unknown = sorted(set(table) - {"defaults", "trial"})
    if unknown:
        raise MemplanError(f"{name} has {unknown[0]!r}.", "A matrix has [defaults] and [[trial]] tables.")
    defaults, trials = table.get("defaults", {}), table.get("trial", [])
    if not isinstance(trials, list) or not trials or not isinstance(defaults, dict):
        raise MemplanError(f"{name} has no trials.", 'Write one as [[trial]] and, below it, model = "qwen2.5-1.5b".')
    entries: list[MatrixEntry] = []
    _check(defaults, f"[defaults] of {name}")
    for number, trial in enumerate(trials, 1):
        where = f"trial {number} of {name}"
        if not isinstance(trial, dict):
            raise MemplanError(f"{where[0].upper()}{where[1:]} is no table.", "Write trials as [[trial]].")
        _check(trial, where)
        for entry in _crossed({**defaults, **trial}, where):
            entries.append(entry)
            if len(entries) > MAX_TRIALS:
                raise MemplanError(f"{name} has more than {MAX_TRIALS:,} trials.", "Make its lists shorter.")
    return tuple(entries)


def _check(trial: Mapping[str, Any], where: str) -> None:
    for key, value in trial.items():
        kinds = KINDS.get(key)
        if kinds is None:
            cure = did_you_mean(key, KINDS, otherwise=f"Known: {', '.join(KINDS)}.")
            raise MemplanError(f"{where[0].upper()}{where[1:]} has an unknown key, {key!r}.", cure)
        values = value if isinstance(value, list) else [value]
        for one in values or [None]:
            wrong = not isinstance(one, kinds) or (isinstance(one, bool) and bool not in kinds)
            if wrong:
                names = " or ".join(kind.__name__ for kind in kinds)
                shown = "an empty list" if one is None else repr(one)[:60]
                raise MemplanError(
                    f"{key} is {shown} in {where}.", f"Give a value of type {names}, or a list of such values."
                )


def _crossed(trial: Mapping[str, Any], where: str) -> Iterator[MatrixEntry]:
    if "model" not in trial:
        raise MemplanError(f"{where[0].upper()}{where[1:]} has no model.", 'Say for example model = "qwen2.5-1.5b".')
    values = [value if isinstance(value, list) else [value] for value in trial.values()]
    for chosen in itertools.product(*values):
        choices = dict(zip(trial, chosen, strict=True))
        find_max, target = choices.pop("find_max", False), choices.pop("target_batch", None)
        if find_max and target is not None:
            raise MemplanError(f"find_max and target_batch contradict each other in {where}.", "Leave one of them out.")
        if target is not None and "limit" not in choices:
            raise MemplanError(f"target_batch has no limit in {where}.", 'A plan needs one, such as limit = "24GB".')
        yield MatrixEntry(choices, find_max, target)
