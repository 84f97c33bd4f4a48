"""What is trained in place of the weights: low-rank adapters."""

from __future__ import annotations

from memplan.errors import UsageError
from memplan.specs.values import dataclass

LARGEST_RANK = 2**16
"""No rank beyond the width of a model is taken seriously."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of low rank beside frozen linear layers (Hu et al., 2021), as peft adds them."""

    rank: int
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the linear layers, or ``all-linear`` alone: all of them but the head."""
    dropout: float = 0.0
    """Probability before the first of the two matrices."""

    def __post_init__(self) -> None:
        rank: object = self.rank
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= LARGEST_RANK:
            raise UsageError(f"The rank of LoRA is {rank!r}.", f"Give a whole number from 1 to {LARGEST_RANK:,}.")
        names: tuple[object, ...] = self.targets
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise UsageError("LoRA has no targets.", "Name linear layers, as in q_proj,v_proj, or say all-linear.")
        dropout: object = self.dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise UsageError(f"The dropout of LoRA is {self.dropout!r}.", "Give a probability from 0 up to, not 1.")
