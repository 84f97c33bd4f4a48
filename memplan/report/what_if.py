"""The grid around a plan as plain data, for a page that looks numbers up in it.

A table is an array of little-endian numbers in base64, with the names of the choices that it is over, the last one
running fastest: bytes in blocks of 512, as the allocator hands them out, seconds as 32-bit floats.  How the numbers go
together is said in `memplan.planner.what_if`.
"""

from __future__ import annotations

import base64
import re
import shlex
from typing import TYPE_CHECKING, Any

from memplan.estimation.estimate import SEGMENT_BYTES
from memplan.operators.sizes import ALLOCATION_STEP_BYTES
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from memplan.planner.what_if import WhatIf
    from memplan.specs.training import Setup

    Document = dict[str, Any]

P, R, C, O = "precision", "lora_rank", "activation_checkpointing", "optimizer"  # noqa: E741 -- as in WhatIf
M, L = "micro_batch_size", "seq_len"
SEVERAL_STEPS, SEVERAL_GPUS, IN_BACKWARD = "several_steps", "several_gpus", "in_backward"

OVER_BY_TABLE = {
    "passes_bytes": (IN_BACKWARD, P, R, C, SEVERAL_STEPS, M, L),
    "input_bytes": (M, L),
    "resident_bytes": (P, R, O, SEVERAL_GPUS),
    "end_bytes": (P, R, O),
    "parameter_bytes": (P, R),
    "gradient_bytes": (P, R, O),
    "optimizer_state_bytes": (P, R, O),
    "pass_s": (P, R, C, M, L),
    "added_s": (P, R),
    "update_s": (P, R, O),
    "refused": (P, R, C, O, SEVERAL_STEPS, SEVERAL_GPUS),
}
"""Table -> what it is over."""

FLAG_BY_AXIS = {
    M: "--micro-batch",
    "gradient_accumulation_steps": "--accumulation",
    "data_parallel_size": "--gpus",
    L: "--seq-len",
    C: "--checkpointing",
    O: "--optimizer",
    P: "--precision",
    R: "--lora-rank",
}
CHOSEN = ("--target-batch", "--target-tokens", *FLAG_BY_AXIS.values())
OF_ADAPTERS = ("--lora-targets", "--lora-dropout", "--lora-dtype", "--modules-to-save", "--lora-layers", "--lora-ranks")
OF_DATA = ("--data", "--tokenizer", "--field", "--prompt-field", "--truncation", "--max-loss", "--sample")
"""Options with a value that what is chosen replaces, those that have no meaning without adapters, and those of data."""


def what_if_document(what_if: WhatIf, command: str) -> Document:
    """The grid; `command`: the command line that makes the plan."""
    axes = what_if.axes._asdict()
    return {
        "axes": {name: list(values) for name, values in axes.items()},
        "own": {name: values.index(_own(what_if, name)) for name, values in axes.items()},
        "in_backward": [int(one) for one in what_if.in_backward],
        "sizes": _sizes(what_if),
        "tables": {name: _table(getattr(what_if, name), over) for name, over in OVER_BY_TABLE.items()},
        "reasons": list(what_if.reasons),
        "budget_bytes": what_if.budget_bytes,
        "beside_bytes": what_if.beside_bytes,
        "segment_bytes": SEGMENT_BYTES,
        "tokens_per_length": what_if.setup.tokens_per_example // what_if.setup.seq_len,
        "flags": FLAG_BY_AXIS,
        "commands": [estimate_command(command, what_if.setup, with_adapters=one) for one in (False, True)],
    }


def _own(what_if: WhatIf, name: str) -> Any:
    setup = what_if.setup
    if name == R:
        return None if setup.lora is None else setup.lora.rank
    return getattr(setup, name)


def _sizes(what_if: WhatIf) -> dict[str, int]:
    """How many there are of each choice."""
    found: dict[str, int] = {}
    for name, over in OVER_BY_TABLE.items():
        found |= dict(zip(over, getattr(what_if, name).shape, strict=True))
    return found


def _table(values: Any, over: Sequence[str]) -> Document:
    """An array, in the narrowest type that holds it exactly; seconds in 32 bits."""
    unit, kind = 1, "f4"
    if values.dtype.itemsize == 1:
        kind = "u1"
    elif values.dtype.kind == "i":
        unit = ALLOCATION_STEP_BYTES
        assert not (values % unit).any()
        values = values // unit
        kind = "u4" if values.max() < 2**32 else "f8"
    data = base64.b64encode(values.astype(f"<{kind}").tobytes()).decode()
    return {"over": list(over), "type": kind, "unit": unit, "data": data}


def estimate_command(command: str, setup: Setup, *, with_adapters: bool) -> str:
    """The command line for one configuration, as far as it is not chosen: what `suggest` was asked, without the choice.

    >>> estimate_command("memplan suggest gpt2 --gpu 2xh100 --target-batch 32 --dora", Setup(), with_adapters=False)
    'memplan estimate gpt2 --gpu h100'

    Of a plan for data it has what the data says of the `setup` instead of the data.
    """
    dropped = (*CHOSEN, *OF_DATA) if with_adapters else (*CHOSEN, *OF_DATA, *OF_ADAPTERS)
    program, _, *words = shlex.split(command)
    switch = None if with_adapters else "--dora"
    by_data = list(_by_data(setup, words)) if "--data" in words else []
    return shlex.join([program, "estimate", *_kept(iter(words), dropped, switch), *by_data])


def _by_data(setup: Setup, words: Sequence[str]) -> Iterator[str]:
    """Options in place of data, where they were not given."""
    if setup.padding and "--padding" not in words:
        yield "--padding"
    if setup.supervised != 1 and "--supervised" not in words:
        yield from ("--supervised", repr(setup.supervised))
    if setup.packed_sequences is not None:
        yield from ("--packed-sequences", str(setup.packed_sequences))


def _kept(words: Iterator[str], dropped: Sequence[str], switch: str | None) -> Iterator[str]:
    for word in words:
        if word in dropped:
            next(words)
        elif word == "--gpu":
            yield word
            yield re.sub(r"^\s*\d+\s*[xX]\s*(?=\S)", "", next(words))
        elif word != switch:
            yield word


class Control(NamedTuple):
    """What is moved or chosen on the page."""

    name: str
    label: str
    values: tuple[str, ...]
    own: int
    """Position of the plan's own."""
    is_number: bool
    """Whether it is moved; else it is one of some names."""


LABEL_BY_AXIS = {
    M: "micro-batch",
    "gradient_accumulation_steps": "accumulation",
    "data_parallel_size": "GPUs",
    L: "tokens per sequence",
    R: "LoRA rank",
    C: "checkpointing",
    O: "optimizer",
    P: "precision",
}
"""In the order of the page."""
NUMBERS = (M, "gradient_accumulation_steps", "data_parallel_size", L, R)


def controls(document: Mapping[str, Any]) -> list[Control]:
    """The controls of the grid, of choices that there are."""
    return [
        Control(
            name=name,
            label=label,
            values=tuple("none" if one is None else f"{one:,}" if name in NUMBERS else one for one in values),
            own=document["own"][name],
            is_number=name in NUMBERS,
        )
        for name, label in LABEL_BY_AXIS.items()
        for values in [document["axes"][name]]
        if len(values) > 1
    ]
