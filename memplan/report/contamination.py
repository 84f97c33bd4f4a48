"""What keeps the samples of a packed row apart, trainer by trainer.

Read in the sources that are named; that transformers makes the mask of sdpa and eager attention from positions is tried
with a real model in the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    Document = dict[str, Any]


class Need(NamedTuple):
    """A way to pack, as a trainer does it."""

    how: str
    """Name of a strategy; empty: of none."""
    trainer: str
    setting: str
    says: str
    overflow: str
    """What becomes of samples that are longer than a row."""
    source: str


TRL = "TRL 1.16"
GROUPED = "Packs each 1,000 samples by themselves (the batch size that datasets.map has by default)."
APART = (
    "Samples lie end to end: position_ids begin anew at each, its first label is masked, no mask is given. Flash "
    "attention gets where each begins (cu_seq_lens); for sdpa and eager transformers 5.23 makes a mask per sample from "
    "position_ids, as long as no cache is used. "
)
TRL_SOURCE = (
    "trl/data_utils.py pack_dataset, trl/trainer/sft_trainer.py DataCollatorForLanguageModeling; "
    "transformers/masking_utils.py find_packed_sequence_indices"
)
AXOLOTL_SOURCE = "axolotl/utils/samplers/multipack.py, utils/trainer.py, utils/schemas/validation.py, enums.py"
LLAMA_FACTORY = "LLaMA-Factory (0b3022b)"
LLAMA_FACTORY_SOURCE = "src/llamafactory/data/processor/supervised.py, hparams/data_args.py"

NEEDS = (
    Need("bfd", TRL, "packing=True", APART + GROUPED, "cut off on the right", TRL_SOURCE),
    Need(
        "bfd-split",
        TRL,
        'packing_strategy="bfd_split"',
        APART + "A part of a long sample does not see what came before it. " + GROUPED,
        "packed as samples of their own",
        TRL_SOURCE,
    ),
    Need(
        "wrapped",
        TRL,
        'packing_strategy="wrapped"',
        "Nothing keeps samples apart: positions go on through the row, and its samples see each other. " + GROUPED,
        "cut where a row ends, go on in the next",
        TRL_SOURCE,
    ),
    Need(
        "first-fit",
        "axolotl 0.19",
        "sample_packing: true",
        "position_ids begin anew at each sample. With flash, flex, xformers or sage attention a micro-batch is one "
        "row of micro-batch x maximum tokens, and attention is of variable length; with sdpa or eager (not worked out "
        "here) it has rows of the maximum and a mask per sample. Other attention lets samples see each other, with a "
        "warning. "
        "At most 200 samples a row, groups of 100,000; rows are padded until they are full.",
        "left out, by default: say --truncation drop (excess_length_strategy)",
        AXOLOTL_SOURCE,
    ),
    Need(
        "",
        LLAMA_FACTORY,
        "packing: true",
        "position_ids begin anew at each sample, but the mask is 1 throughout: with sdpa or eager samples see each "
        "other. Rows are filled one after the other with what still fits; none of the ways above is that.",
        "cut, prompt and answer in proportion",
        LLAMA_FACTORY_SOURCE,
    ),
    Need(
        "",
        LLAMA_FACTORY,
        "neat_packing: true",
        "The same, and the mask numbers the samples, so that they do not see each other.",
        "cut, prompt and answer in proportion",
        LLAMA_FACTORY_SOURCE,
    ),
    Need("ffd", "no trainer", "", "The longest first, all data together: what packing could reach.", "cut off", ""),
)


def needs_of(used: Iterable[str]) -> list[Document]:
    """What the strategies that are used need, and trainers that have one of their own; nothing where none is used."""
    names = set(used)
    return [one._asdict() for one in NEEDS if names and (one.how in names or not one.how)]
