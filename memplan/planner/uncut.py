"""What if nothing is cut: which lengths does the plan hold, and how likely is it that an epoch has longer ones?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memplan.planner.feed import Uncut
from memplan.sequences.worst import chance_of_long_row, chance_of_long_sum, largest_sums
from memplan.specs.values import replace

if TYPE_CHECKING:
    from collections.abc import Callable

    from memplan.planner.feed import Integers
    from memplan.planner.plan import Candidate
    from memplan.planner.search import Search


def uncut(
    look: Search, plan: Candidate, tokens: Integers, positions: int | None, *, num_records: int | None = None
) -> Uncut | None:
    """The chance that an epoch of a plan has a micro-batch that does not fit, were nothing cut.

    Args:
        look: Where candidates are looked at.
        plan: What fits.
        tokens: Of each sequence, as long as it is.
        positions: How many tokens the model takes: none is longer.
        num_records: Sequences of an epoch, where `tokens` are a sample of them; None: these are all.

    Returns:
        None where no micro-batch can be larger than that of the plan, or rows are packed to one length.
    """
    setup = plan.setup
    if setup.batching == "packed" or (positions is not None and setup.seq_len >= positions):
        return None
    tokens = tokens[tokens > 0] if positions is None else np.minimum(tokens[tokens > 0], positions)
    micro = setup.micro_batch_size
    ends_to_end = setup.batching == "padding-free"
    is_sample, most = num_records is not None, int(tokens.max())
    if is_sample:  # others may be as long as the model takes
        most = positions or max(most, setup.seq_len)
    elif ends_to_end:
        most = -(-int(largest_sums(tokens, micro)[-1]) // micro)
    if most <= setup.seq_len and not is_sample:
        return None
    length = longest_that_fits(lambda at: _fits(look, plan, at), setup.seq_len, most)
    if length == positions:
        return None
    fits = length * micro if ends_to_end else length
    chance = (chance_of_long_sum if ends_to_end else chance_of_long_row)(tokens, micro, fits, num_records=num_records)
    is_known = chance.value or chance.num_epochs or not is_sample
    return Uncut(fits, int((tokens > fits).sum()), chance if is_known else None)


def longest_that_fits(fits: Callable[[int], bool], known: int, most: int) -> int:
    """The largest length up to `most`, from one that is known to fit."""
    if fits(most):
        return most
    low, high = known, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(look: Search, plan: Candidate, length: int) -> bool:
    """As replayed; the replay is spared where the least that it can say is too much."""
    candidate = look.candidate(replace(plan.setup, seq_len=length))
    return candidate.fits and look.replayed(candidate).fits
