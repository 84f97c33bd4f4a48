"""Which models keep sequences apart that lie end to end in one row?

Padding-free and packed batches come with position ids that start again with every sequence.  Most causal language
models of transformers 5.23 hand them to ``create_causal_mask`` (masking_utils.py), which finds the sequences in them
and masks each from the others.  The models named here do not, or are not of transformers; a masked language model's
mask (``create_bidirectional_mask``) never is made by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import UsageError

if TYPE_CHECKING:
    from memplan.architectures.architecture import Architecture
    from memplan.specs.training import Setup

MASKED_BY_PLACE = frozenset({"bloom", "falcon", "gpt_oss", "mpt", "opt"})
"""Their masks go by the place in the row (modeling_*.py: no ``position_ids`` where the mask is made)."""

CODE_OF_THEIR_OWN = frozenset({"internlm2"})
"""Published with code that is not transformers'."""


def check_flattened(architecture: Architecture, setup: Setup) -> None:
    """Raise `UsageError` where sequences in one row would attend to each other, or nobody knows."""
    setup.check_packing()
    name, what = architecture.model_type, f"a {setup.batching} batch"
    if architecture.task != "causal-lm":
        raise UsageError(
            f"{name} is trained on another task ({architecture.task}); {what} is one of causal language models.",
            "Leave --batching out.",
        )
    if name in MASKED_BY_PLACE:
        raise UsageError(
            f"{name} makes its mask without position ids (transformers 5.23): the sequences of {what} would attend to "
            "each other.",
            "Leave --batching out.",
        )
    if name in CODE_OF_THEIR_OWN:
        raise UsageError(f"What {name} does with {what} is not known: its code is its own.", "Leave --batching out.")
