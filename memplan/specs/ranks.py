"""Which layers get adapters, and of which ranks?  How both are said, and whether a model has what is named.

Sources: peft 0.21, tuners/tuners_utils.py (``check_target_module_exists``), utils/other.py (``get_pattern_key``,
``_set_trainable``, ``ModulesToSaveWrapper.check_module``): a number or a pattern that means nothing is passed over
there, and refused here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError
from memplan.specs.recipe import ALL_LINEAR, check_known, ends_in, is_named, is_within, layer_number

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from memplan.specs.adapter import Lora
    from memplan.specs.recipe import Recipe

LARGEST_RANK = 2**16
"""No rank beyond the width of a model is taken seriously."""

MOST_LAYERS = 10_000
"""No model with more layers is taken seriously."""


def check_rank(rank: object) -> None:
    """Raise `UsageError` unless `rank` is one."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= LARGEST_RANK:
        raise UsageError(f"The rank of LoRA is {rank!r}.", f"Give a whole number from 1 to {LARGEST_RANK:,}.")


def check_adapters(recipe: Recipe, lora: Lora, modules: Collection[str]) -> None:
    """Raise `UsageError` where targets or layers are named that `modules`, paths of linear ones, are not."""
    if lora.targets != (ALL_LINEAR,):
        check_known("--lora-targets", lora.targets, modules, is_named, also=ALL_LINEAR)
    numbers = sorted({number for number in map(layer_number, modules) if number is not None})
    for number in lora.layers:
        if number not in numbers:
            raise UsageError(f"--lora-layers {number}: the model has no such layer.", f"Known: {in_ranges(numbers)}.")
    if lora.layers and not any(map(recipe.adapts, modules)):
        raise UsageError(
            f"No layer of --lora-layers {in_ranges(lora.layers)} has any {' or '.join(lora.targets)}.",
            "Name layers that have one, or other targets.",
        )


def check_ranks(lora: Lora, adapted: Collection[str]) -> None:
    """Raise `UsageError` where a rank is given for none of `adapted`, paths of what gets an adapter."""
    check_known("--lora-ranks", [pattern for pattern, _ in lora.ranks], adapted, ends_in)


def check_copies(lora: Lora, adapted: Collection[str], *, layers: str = "") -> None:
    """Raise `UsageError` where a copy would be one of adapters, too: `adapted`, paths of what gets an adapter.

    `layers`: the path of the list of layers, of which there is no copy.  peft takes the end of any path for what is
    to be copied, and whole names alone for what is to have no adapter.
    """
    for name in lora.modules_to_save:
        if layers.endswith(name):
            raise UsageError(
                f"--modules-to-save {name}: peft copies modules, and {layers} is a list of them.",
                "Name one of them, or what all of them have.",
            )
        both = next((path for path in adapted if is_within(name, path)), None)
        if both is not None:
            raise UsageError(
                f"--modules-to-save {name}: {both} is within what ends so, and gets an adapter.",
                "Give whole names, or other --lora-targets.",
            )


def check_nested(lora: Lora, modules: Iterable[str]) -> None:
    """Raise `UsageError` where one of `modules` would be copied by itself and within another.

    The copy of its own would be trained, and the model would use the other (``ModulesToSaveWrapper.forward``).
    """
    for path in modules:
        parts = path.split(".")
        above = [".".join(parts[: n + 1]) for n in range(len(parts))]
        copied = [one for one in above if one.endswith(tuple(lora.modules_to_save))]
        if len(copied) > 1:
            raise UsageError(
                f"--modules-to-save {' '.join(lora.modules_to_save)}: {copied[1]} would be copied twice, by itself and "
                f"within {copied[0]}.",
                "Give names that only one of them ends with.",
            )


def as_layers(name: str, value: Any) -> tuple[int, ...]:
    """Numbers of layers, ascending, of a text such as ``0,16-31``, of one number, or of several.

    Raises:
        UsageError: it is none of these; the message names the argument.
    """
    found = _numbers(value) if isinstance(value, str) else [value] if isinstance(value, int) else list(_several(value))
    good = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MOST_LAYERS for n in found)
    if not found or not good:
        raise UsageError(f"{name} is {str(value)[:40]!r}, not numbers of layers.", "Give them as in 0,2 or 16-31.")
    return tuple(sorted(set(found)))


def _several(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple, range)) else ()


def _numbers(text: str) -> list[int]:
    """The numbers of ``0,16-31``; none where a part of it is no number and no range."""
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part, re.ASCII)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            return []
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return found


def in_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers, those that follow each other as a range: ``0, 16-31``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def as_ranks(name: str, value: Any) -> tuple[tuple[str, int], ...]:
    """(pattern, rank) of a text such as ``down_proj=8,layers.0.*=64``, or of a mapping.

    Raises:
        UsageError: it is neither, or what stands for a name is no regular expression; the message names the argument.
    """
    found: list[tuple[Any, Any]] = []
    if isinstance(value, str):
        parts = [part.rpartition("=") for part in value.split(",")]
        found = [(key.strip(), int(rank) if rank.strip().isdecimal() else rank.strip()) for key, _, rank in parts]
    elif isinstance(value, dict):
        found = list(value.items())
    elif isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        found = list(value)
    if not found or not all(isinstance(key, str) and _is_pattern(key) for key, _ in found):
        raise UsageError(
            f"{name} is {str(value)[:40]!r}, not names and ranks.", "Give them as in down_proj=8,q_proj=64."
        )
    for _, rank in found:
        check_rank(rank)
    return tuple((key, int(rank)) for key, rank in found)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(f"({text})")
    except re.error:
        return False
    return bool(text)
