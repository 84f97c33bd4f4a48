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
Sources: torch/optim/adamw.py, adam.py, sgd.py (2.13); bitsandbytes/optim/optimizer.py (0.50): ``block_wise`` with
blocks of 256, ``min_8bit_size`` 4096; transformers/trainer.py registers embeddings with 32-bit states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.memory.events import Row
from memplan.operators.sizes import Size, count, num_bytes
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memplan.memory.events import Sizes
    from memplan.operators.tape import Parameter

BITSANDBYTES_BLOCK = 256
BITSANDBYTES_MIN_8BIT = 4096
BITSANDBYTES_CODEBOOK_BYTES = 256 * 4
GRADIENT_BUCKETS = "gradient buckets"
ADAMW_SOURCE = "torch.optim.AdamW: zeros_like(parameter)"
FUSED_STEP_SOURCE = "torch.optim.AdamW(fused=True): the number of steps, on the device"
FOREACH_SOURCE = "torch/optim/adam.py: _multi_tensor_adam, _foreach_sqrt of all second moments"
FORLOOP_SOURCE = "torch/optim/adam.py: _single_tensor_adam, of the largest parameter"
MOMENTUM_SOURCE = "torch.optim.SGD: a clone of the gradient"
FOREACH_CHUNK = 65536
"""Elements that one block of a foreach kernel works on (kChunkSize in MultiTensorApply.cuh)."""

CLIP_SOURCE = "torch.nn.utils.clip_grad_norm_ (foreach)"
BITSANDBYTES_SOURCE = "bitsandbytes.optim.AdamW8bit: one byte an element"
BITSANDBYTES_ABSMAX_SOURCE = "bitsandbytes.optim.AdamW8bit: an fp32 for each block of 256"
BITSANDBYTES_FP32_SOURCE = "bitsandbytes.optim.AdamW8bit: 32 bits below 4,096 elements and for embeddings"
BITSANDBYTES_CODE_SOURCE = "bitsandbytes.optim.AdamW8bit: what each of 256 codes stands for"
DDP_SOURCE = "torch/nn/parallel/distributed.py: gradient_as_bucket_view=False"


class Tensors(NamedTuple):
    """Some tensors with the same role: what, bytes, how many alike."""

    rows: tuple[tuple[Row, Size, int], ...]

    def total(self, sizes: Sizes) -> int:
        """Allocated bytes of all of them."""
        return sum(sizes[size] * times for _, size, times in self.rows)

    def requested(self) -> int:
        """Bytes of all of them before rounding."""
        return sum(size.factor * times for _, size, times in self.rows)


class ModelStates(NamedTuple):
    """What a model and its optimizer hold, for one dtype of parameters."""

    groups: tuple[tuple[Parameter, int], ...]
    """Rows of the parameter table and how many layers have them alike."""
    dtype: str
    optimizer: str

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(count(p.shape).factor * times for p, times in self.groups)

    @property
    def num_trained(self) -> int:
        """Those that are trained."""
        return sum(count(p.shape).factor * times for p, times in self.groups if p.trainable)

    def _each(self, tensor: str, kind: str, *, trained_only: bool = False, reason: str = "") -> Tensors:
        return Tensors(
            tuple(
                (Row(p.name, tensor, kind, p.shape, p.dtype, reason), num_bytes(p.shape, p.dtype), times)
                for p, times in self.groups
                if (p.trainable or not trained_only) and not p.stored
            )
        )

    def parameters(self) -> Tensors:
        """The parameters themselves, and what stores those that are quantised."""
        stored = (
            (Row(p.name, one.name, "parameter", one.shape, one.dtype, one.source), num_bytes(one.shape, one.dtype), n)
            for p, n in self.groups
            for one in p.stored
        )
        return Tensors((*self._each("parameter", "parameter").rows, *stored))

    def gradients(self) -> Tensors:
        """One gradient for each parameter that is trained, in its dtype."""
        return self._each("gradient", "gradient", trained_only=True)

    def optimizer_states(self) -> Tensors:
        """What the optimizer remembers between steps, on the device."""
        rows: list[tuple[Row, Size, int]] = []
        for p, times in self.groups:
            if p.trainable:
                for name, dtype, size, reason in _states(self.optimizer, p, p.dtype):
                    shape = () if name == "step" else p.shape
                    rows.append((Row(p.name, name, "optimizer_state", shape, dtype, reason), size, times))
        if self.optimizer == "adamw-8bit":
            what = "code books of both moments"
            row = Row("optimizer", what, "optimizer_state", (256,), "fp32", BITSANDBYTES_CODE_SOURCE)
            rows.append((row, Size(BITSANDBYTES_CODEBOOK_BYTES), 2))
        return Tensors(tuple(rows))

    def step_temporaries(self) -> Tensors:
        """What the optimizer step needs for a moment, all at once."""
        if self.optimizer == "adamw-foreach":
            return self._each("square root of exp_avg_sq", "temporary", trained_only=True, reason=FOREACH_SOURCE)
        if self.optimizer == "adamw-forloop":
            trained = [(p, num_bytes(p.shape, p.dtype)) for p, _ in self.groups if p.trainable]
            p, size = max(trained, key=lambda pair: pair[1].factor)
            what = "sqrt of exp_avg_sq, denominator"
            return Tensors(((Row(p.name, what, "temporary", p.shape, p.dtype, FORLOOP_SOURCE), size, 2),))
        return Tensors(())

    def clip_temporaries(self) -> Tensors:
        """``clip_grad_norm_`` (foreach): norms of chunks, from them one tensor of all norms, these stacked, the total.

        Norms of single gradients are views of one tensor (ForeachReduceOp.cu); every gradient has as many chunks as the
        largest.  Counted as if all were there at once.
        """
        trained = sum(times for p, times in self.groups if p.trainable)
        largest = max((count(p.shape).factor for p, _ in self.groups if p.trainable), default=0)
        partial = (trained, -(-largest // FOREACH_CHUNK))
        rows = (
            ("norms of chunks of each gradient", partial, "fp32"),
            ("norms of the gradients", (trained,), self.dtype),
            ("stacked norms", (trained,), self.dtype),
            ("norm of all gradients", (), self.dtype),
        )
        return Tensors(
            tuple(
                (Row("clip_grad_norm_", name, "temporary", shape, dtype, CLIP_SOURCE), num_bytes(shape, dtype), 1)
                for name, shape, dtype in rows
            )
        )

    def gradient_buckets(self, data_parallel_size: int) -> Tensors:
        """DistributedDataParallel's flat copies of all gradients (none on one GPU)."""
        if data_parallel_size == 1:
            return Tensors(())
        total = sum(num_bytes(p.shape, p.dtype).factor * times for p, times in self.groups if p.trainable)
        row = Row("DistributedDataParallel", GRADIENT_BUCKETS, "gradient", None, self.dtype, DDP_SOURCE)
        return Tensors(((row, Size(total), 1),))


def _states(optimizer: str, p: Parameter, dtype: str) -> Iterable[tuple[str, str, Size, str]]:
    """(name, dtype, bytes, source) of each state of one parameter."""
    own = num_bytes(p.shape, dtype)
    if optimizer == "adamw-8bit":
        yield from _states_8bit(p)
    elif optimizer.startswith("adamw"):
        yield "exp_avg", dtype, own, ADAMW_SOURCE
        yield "exp_avg_sq", dtype, own, ADAMW_SOURCE
        if optimizer == "adamw-fused":
            yield "step", "fp32", num_bytes((), "fp32"), FUSED_STEP_SOURCE
    elif optimizer == "sgd-momentum":
        yield "momentum_buffer", dtype, own, MOMENTUM_SOURCE


def _states_8bit(p: Parameter) -> Iterable[tuple[str, str, Size, str]]:
    elements = count(p.shape).factor
    if elements < BITSANDBYTES_MIN_8BIT or p.of_embedding:
        yield "exp_avg", "fp32", num_bytes(p.shape, "fp32"), BITSANDBYTES_FP32_SOURCE
        yield "exp_avg_sq", "fp32", num_bytes(p.shape, "fp32"), BITSANDBYTES_FP32_SOURCE
        return
    blocks = -(-elements // BITSANDBYTES_BLOCK)
    for name in ("exp_avg", "exp_avg_sq"):
        yield name, "uint8", Size(elements), BITSANDBYTES_SOURCE
        yield f"absmax of {name}", "fp32", Size(blocks * 4), BITSANDBYTES_ABSMAX_SOURCE
