"""Parameters, gradients and optimizer states, and what an optimizer step needs for a moment.

=================  ===========================  =====================================================================
optimizer          states a parameter           temporaries of the step
=================  ===========================  =====================================================================
adamw-foreach      2 x its dtype                sqrt of all second moments at once: as much as all parameters
adamw-fused        2 x its dtype, 1 fp32 scalar none
adamw-forloop      2 x its dtype                two tensors of the largest parameter
adamw-8bit         2 x 1 byte + 4 bytes/256     none; below 4,096 elements and for embeddings fp32 states
sgd                none                         none
sgd-momentum       1 x its dtype                none
=================  ===========================  =====================================================================

torch.optim keeps its states in the dtype of the parameter (``zeros_like``): bf16 parameters have bf16 moments.
Sources: torch/optim/adamw.py, adam.py, sgd.py (2.13); bitsandbytes/optim/optimizer.py (0.50): ``block_wise`` with blocks
of 256, ``min_8bit_size`` 4096; transformers/trainer_optimizer.py registers embeddings with 32-bit states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from memplan.memory.events import Event, Row, Segment
from memplan.operators.sizes import Size, count, num_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from memplan.operators.tape import Parameter

BITSANDBYTES_BLOCK = 256
BITSANDBYTES_MIN_8BIT = 4096
BITSANDBYTES_CODEBOOK_BYTES = 256 * 4
DDP_SOURCE = "torch/nn/parallel/distributed.py: gradient_as_bucket_view=False"


class Tensors(NamedTuple):
    """Some tensors with the same role."""

    rows: tuple[tuple[Row, Size], ...]

    def taken(self) -> tuple[Event, ...]:
        """Their allocations."""
        return tuple(Event(("state", row.module, row.tensor), size, +1, row) for row, size in self.rows)

    def given_back(self) -> tuple[Event, ...]:
        """Their releases."""
        return tuple(Event(("state", row.module, row.tensor), size, -1, row) for row, size in self.rows)


def parameters(table: Sequence[Parameter], dtype: str) -> Tensors:
    """The parameters themselves."""
    return Tensors(tuple((_row(p, "parameter", "parameter", dtype), num_bytes(p.shape, dtype)) for p in table))


def gradients(table: Sequence[Parameter], dtype: str) -> Tensors:
    """One gradient for each parameter that is trained, in its dtype."""
    trained = (p for p in table if p.trainable)
    return Tensors(tuple((_row(p, "gradient", "gradient", dtype), num_bytes(p.shape, dtype)) for p in trained))


def _row(p: Parameter, tensor: str, kind: str, dtype: str) -> Row:
    return Row(p.name, tensor, kind, p.shape, dtype)


def optimizer_states(optimizer: str, table: Sequence[Parameter], dtype: str) -> Tensors:
    """What the optimizer remembers between steps, on the device."""
    rows: list[tuple[Row, Size]] = []
    for p in table:
        if p.trainable:
            rows += (
                (_row(p, name, "optimizer_state", kept_as), size)
                for name, kept_as, size in _states(optimizer, p, dtype)
            )
    if optimizer == "adamw-8bit":
        for name in ("code book of exp_avg", "code book of exp_avg_sq"):
            rows.append((Row("optimizer", name, "optimizer_state", (256,), "fp32"), Size(BITSANDBYTES_CODEBOOK_BYTES)))
    return Tensors(tuple(rows))


def _states(optimizer: str, p: Parameter, dtype: str) -> Iterable[tuple[str, str, Size]]:
    own = num_bytes(p.shape, dtype)
    if optimizer.startswith("adamw") and optimizer != "adamw-8bit":
        yield "exp_avg", dtype, own
        yield "exp_avg_sq", dtype, own
        if optimizer == "adamw-fused":
            yield "step", "fp32", num_bytes((), "fp32")
    elif optimizer == "adamw-8bit":
        yield from _states_8bit(p)
    elif optimizer == "sgd-momentum":
        yield "momentum_buffer", dtype, own


def _states_8bit(p: Parameter) -> Iterable[tuple[str, str, Size]]:
    elements = count(p.shape).factor
    if elements < BITSANDBYTES_MIN_8BIT or _is_embedding(p):
        yield "exp_avg", "fp32", num_bytes(p.shape, "fp32")
        yield "exp_avg_sq", "fp32", num_bytes(p.shape, "fp32")
        return
    blocks = -(-elements // BITSANDBYTES_BLOCK)
    for name in ("exp_avg", "exp_avg_sq"):
        yield name, "uint8", Size(elements)
        yield f"absmax of {name}", "fp32", Size(blocks * 4)


def _is_embedding(p: Parameter) -> bool:
    """Whether the weight belongs to an ``nn.Embedding``; tied heads share it."""
    return p.of_embedding


def optimizer_step(optimizer: str, table: Sequence[Parameter], dtype: str) -> Segment:
    """The temporaries of one step."""
    trained = [(p, num_bytes(p.shape, dtype)) for p in table if p.trainable]
    temporaries: list[tuple[Row, Size]] = []
    if optimizer == "adamw-foreach":
        temporaries = [(_row(p, "square root of exp_avg_sq", "temporary", dtype), size) for p, size in trained]
    elif optimizer == "adamw-forloop" and trained:
        p, size = max(trained, key=lambda pair: pair[1].factor)
        temporaries = [(_row(p, name, "temporary", dtype), size) for name in ("sqrt of exp_avg_sq", "denominator")]
    held = Tensors(tuple(temporaries))
    return Segment("optimizer step", held.taken() + held.given_back())


def gradient_clip(table: Sequence[Parameter], dtype: str) -> Segment:
    """``clip_grad_norm_`` (foreach): a norm for each gradient and all of them stacked."""
    trained = [p for p in table if p.trainable]
    norms = [(_row(p, "norm of its gradient", "temporary", dtype), num_bytes((), dtype)) for p in trained]
    norms.append((Row("clip", "stacked norms", "temporary", (len(trained),), dtype), num_bytes((len(trained),), dtype)))
    held = Tensors(tuple(norms))
    return Segment("gradient clip", held.taken() + held.given_back())


def gradient_buckets(table: Sequence[Parameter], dtype: str, data_parallel_size: int) -> Tensors:
    """DistributedDataParallel's flat copies of all gradients (none on one GPU)."""
    if data_parallel_size == 1:
        return Tensors(())
    total = sum(num_bytes(p.shape, dtype).factor for p in table if p.trainable)
    row = Row("DistributedDataParallel", "gradient buckets", "gradient", None, dtype, DDP_SOURCE)
    return Tensors(((row, Size(total)),))
