"""Bytes as the caching allocator counts them: what tests of the reference trace take from `memplan`."""

from __future__ import annotations

from memplan.operators.sizes import ALLOCATION_STEP_BYTES as BLOCK_BYTES
from memplan.operators.sizes import allocated as round_to_block

__all__ = ["BLOCK_BYTES", "round_to_block"]
