"""Parameters, gradients and optimizer states, and what an optimizer step needs for a moment.

What each optimizer remembers and makes is a row of `memplan.memory.optimizers`; here it is applied to a model.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from memplan.memory.events import Row, Sizes
from memplan.memory.frames import Frame, Trained
from memplan.memory.optimizers import CODE_BOOK, CODE_SOURCE, OPTIMIZER_BY_NAME
from memplan.operators.sizes import Size, count, num_bytes
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.memory.optimizers import InBackward, Phase, State
    from memplan.operators.tape import Parameter

GRADIENT_BUCKETS = "gradient buckets"
FOREACH_CHUNK = 65536
"""Elements that one block of a foreach kernel works on (kChunkSize in MultiTensorApply.cuh)."""

CLIP_SOURCE = "torch.nn.utils.clip_grad_norm_ (foreach)"
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
    """What a model and its optimizer hold."""

    groups: tuple[tuple[Parameter, int], ...]
    """Rows of the parameter table and how many layers have them alike."""
    dtype: str
    """Of parameters that do not say theirs."""
    optimizer: str
    order: tuple[int, ...] = ()
    """The rows in the order of the model, one for each layer."""
    in_layers: frozenset[int] = frozenset()
    """Which rows are parameters of layers."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(count(p.shape).factor * times for p, times in self.groups)

    @property
    def num_trained(self) -> int:
        """Those that are trained."""
        return sum(count(p.shape).factor * times for p, times in self.groups if p.trainable)

    def dtype_of(self, p: Parameter) -> str:
        """The dtype of a parameter, its gradient, and what is made like it."""
        return p.dtype or self.dtype

    def dtype_of_most(self) -> str:
        """The dtype of most that is trained."""
        totals: Counter[str] = Counter()
        for p, times in self.groups:
            if p.trainable:
                totals[self.dtype_of(p)] += count(p.shape).factor * times
        return max(totals, key=lambda dtype: totals[dtype], default=self.dtype)

    def _each(self, tensor: str, kind: str, *, trained_only: bool = False, reason: str = "") -> Tensors:
        return Tensors(
            tuple(
                (
                    Row(p.name, tensor, kind, p.shape, self.dtype_of(p), reason),
                    num_bytes(p.shape, self.dtype_of(p)),
                    times,
                )
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
        rows = [
            (Row(p.name, state.name, "optimizer_state", state.shape, state.dtype, state.source), size, times)
            for p, state, size, times in self._states()
            if not state.on_host
        ]
        books = OPTIMIZER_BY_NAME[self.optimizer].num_code_books
        if books and any(state.dtype == "uint8" for _, state, _, _ in self._states()):
            row = Row("optimizer", "code books", "optimizer_state", CODE_BOOK, "fp32", CODE_SOURCE)
            rows.append((row, num_bytes(CODE_BOOK, "fp32"), books))
        return Tensors(tuple(rows))

    @property
    def from_start(self) -> bool:
        """Whether the states are there before the first step; of updates in the backward pass they are taken to be."""
        return OPTIMIZER_BY_NAME[self.optimizer].from_start or self.in_backward is not None

    @property
    def in_backward(self) -> InBackward | None:
        """How parameters are updated in the backward pass; None: after it."""
        return OPTIMIZER_BY_NAME[self.optimizer].in_backward

    def host_state_bytes(self) -> int:
        """Bytes of the states that lie in unified memory."""
        return sum(size.factor * times for _, state, size, times in self._states() if state.on_host)

    def _states(self) -> Iterator[tuple[Trained, State, Size, int]]:
        rule = OPTIMIZER_BY_NAME[self.optimizer].states
        for number, p in self._trained().items():
            for state in rule(p):
                yield p, state, num_bytes(state.shape, state.dtype), self.groups[number][1]

    def _trained(self) -> dict[int, Trained]:
        """The rows that are trained, as an optimizer sees them."""
        return {
            number: Trained(p.name, p.shape, self.dtype_of(p), p.of_embedding, number in self.in_layers)
            for number, (p, _) in enumerate(self.groups)
            if p.trainable
        }

    def step_temporaries(self) -> Tensors:
        """What the optimizer step needs for a moment: all that is alive at its highest point."""
        sizes = Sizes({})
        phases = [self._phase(phase) for phase in OPTIMIZER_BY_NAME[self.optimizer].phases]
        return max(phases, key=lambda tensors: tensors.total(sizes), default=Tensors(()))

    def _phase(self, phase: Phase) -> Tensors:
        if phase.loop is None:
            times_of = {p: self.groups[number][1] for number, p in self._trained().items()}
            return Tensors(
                tuple(
                    (
                        Row(p.name, what, "temporary", p.shape, p.dtype, phase.source),
                        num_bytes(p.shape, p.dtype),
                        times_of[p],
                    )
                    for what in phase.together
                    for p in phase.select(list(times_of))
                )
            )
        frame = Frame(phase.source)
        rows = self._trained()
        for p in phase.select([rows[number] for number in self.order if number in rows]):
            phase.loop(frame, p)
        alike = Counter((block.row, block.size) for block in frame.highest())
        return Tensors(tuple((row, size, times) for (row, size), times in alike.items()))

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
        total = sum(num_bytes(p.shape, self.dtype_of(p)).factor * times for p, times in self.groups if p.trainable)
        row = Row("DistributedDataParallel", GRADIENT_BUCKETS, "gradient", None, self.dtype, DDP_SOURCE)
        return Tensors(((row, Size(total), 1),))
