"""How large are the dimensions of a micro-batch: how many rows, how many tokens in each?

==================  ====================================================================
rows                (b, s): a row for each sequence
padding-free        (1, b s): b sequences of s tokens on average, end to end
packed              (1, b s): b rows of s tokens, each holding several sequences, likewise
==================  ====================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.operators.sizes import bind, bind_flattened
from memplan.specs.training import sequences_of

if TYPE_CHECKING:
    from memplan.specs.training import Setup


def dimensions(setup: Setup, micro_batch_size: Any = None, seq_len: Any = None) -> dict[str, Any]:
    """Of the setup, or of arrays of micro-batches and lengths in place of its own."""
    b = (setup.micro_batch_size if micro_batch_size is None else micro_batch_size) * sequences_of(setup.objective)
    s = setup.seq_len if seq_len is None else seq_len
    if not setup.is_flattened:
        return bind(b, s, setup.supervised)
    return bind_flattened(b * s, b * setup.sequences_per_row, setup.supervised)
