"""What would other numbers and other choices take?  A grid around a plan, for a page on which they are moved.

    peak = resident + K inputs + max(passes, end)          step = K pass + (K - 1) added + update

with K micro-steps.  The peak of a step is the highest of its instants: those of the forward and backward passes, and
its end, gradient clip and update (`memplan.estimation.step.StepProgram.peaks`).  All of them stand on what is there
during the whole step, so that each number depends on a few choices alone, and small tables hold a large grid: GPUs
matter as one or several (DistributedDataParallel's buckets), micro-steps as one or several (gradients that are there),
and by the ids and labels that wait for their turn.

An evaluation between the steps stands on the same, and counts with the passes.

Left out: ``torch.compile``, and the replay through the caching allocator.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError
from memplan.estimation.dimensions import dimensions
from memplan.estimation.estimate import context_bytes, workspace_bytes
from memplan.memory.events import Sizes
from memplan.planner.axes import Axes, axes_of
from memplan.specs.adapter import Lora
from memplan.specs.training import IN_BACKWARD
from memplan.specs.values import NamedTuple, dataclass, replace

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from memplan.estimation.estimate import Estimator
    from memplan.estimation.step import StepProgram
    from memplan.planner.goal import Goal
    from memplan.specs.evaluation import Evaluation
    from memplan.specs.training import Setup


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """Bytes and seconds around a plan.

    Arrays have an axis for precision p, rank r, checkpointing c, optimizer o, micro-batch m and length l, in the order
    of `Axes`; k is 0 for one micro-step and 1 for several, g the same of GPUs, and w is 0 for gradients that are kept
    until the end of the step, 1 for updates in the backward pass.  Where choices are refused, the numbers mean
    nothing.
    """

    setup: Setup
    """The plan's."""
    axes: Axes
    in_backward: tuple[bool, ...]
    """Of each optimizer: w."""
    passes_bytes: NDArray[np.int64]
    """(w, p, r, c, k, m, l): highest point of the passes above what is resident and the inputs."""
    input_bytes: NDArray[np.int64]
    """(m, l): ids and labels of one micro-step."""
    resident_bytes: NDArray[np.int64]
    """(p, r, o, g): what is there during the whole step."""
    end_bytes: NDArray[np.int64]
    """(p, r, o): highest point of clip and update above it."""
    parameter_bytes: NDArray[np.int64]
    """(p, r): of what is resident."""
    gradient_bytes: NDArray[np.int64]
    """(p, r, o): left after the last backward pass."""
    optimizer_state_bytes: NDArray[np.int64]
    """(p, r, o): of what is resident."""
    pass_s: NDArray[np.float64]
    """(p, r, c, m, l): seconds of a micro-step."""
    added_s: NDArray[np.float64]
    """(p, r): seconds to add its gradients to those that are there."""
    update_s: NDArray[np.float64]
    """(p, r, o): seconds of clip and update."""
    refused: NDArray[np.uint8]
    """(p, r, c, o, k, g): 0, or the position in `reasons` from 1."""
    reasons: tuple[str, ...]
    """Why some choices do not go together."""
    budget_bytes: int
    """The most that a process may take for the plan's margins to be kept."""
    beside_bytes: int
    """What a process takes beside what the allocator reserves: CUDA context and workspaces."""


def what_if(estimator: Estimator, goal: Goal, setup: Setup) -> WhatIf | None:
    """The grid around `setup`; None where there is a compiler, whose bytes are a range.

    Raises:
        UsageError: the model cannot be trained like `setup` itself.
    """
    estimator.check(setup)
    if setup.compile or estimator.step_time(setup) is None:
        return None
    return _Survey(estimator, setup, axes_of(estimator, setup)).found(goal)


class _Block(NamedTuple):
    """Points of micro-batch and length at which the same program runs."""

    points: Any
    """Their positions in a flat grid."""
    micro_batch_size: int
    """Of one of them."""
    seq_len: int
    env: Mapping[str, Any]
    sizes: Sizes


class _Survey:
    """Fills the tables."""

    def __init__(self, estimator: Estimator, setup: Setup, axes: Axes) -> None:
        import numpy as np

        self.estimator, self.setup, self.axes = estimator, setup, axes
        self.blocks = tuple(_blocks(estimator, setup, axes))
        self.kinds = 1 + (setup.optimizer in IN_BACKWARD)
        p, r, c, o, m, n = (len(values) for values in axes[:6])
        self.passes = np.zeros((self.kinds, p, r, c, 2, m * n), np.int64)
        self.inputs = np.zeros(m * n, np.int64)
        self.resident, self.end = np.zeros((p, r, o, 2), np.int64), np.zeros((p, r, o), np.int64)
        self.parameters = np.zeros((p, r), np.int64)
        self.gradients, self.states = np.zeros((p, r, o), np.int64), np.zeros((p, r, o), np.int64)
        self.pass_s, self.added_s = np.zeros((p, r, c, m * n)), np.zeros((p, r))
        self.update_s = np.zeros((p, r, o))
        self.refused = np.zeros((p, r, c, o, 2, 2), np.uint8)
        self.reasons: list[str] = []

    def found(self, goal: Goal) -> WhatIf:
        """All of it."""
        for block in self.blocks:
            program = self._program(self._at(block, self.setup))
            self.inputs[block.points] = _inputs(program, block.sizes)
        p, r, c, o = self.axes[:4]
        for place in product(range(len(p)), range(len(r))):
            for mode in range(len(c)):
                allowed = [(i, self._allowed((*place, mode, i))) for i in range(len(o))]
                self._fill(place, mode, [(i, setup) for i, setup in allowed if setup is not None])
        size = (len(self.axes.micro_batch_size), len(self.axes.seq_len))
        return WhatIf(
            setup=self.setup,
            axes=self.axes,
            in_backward=tuple(name in IN_BACKWARD for name in self.axes.optimizer),
            passes_bytes=self.passes.reshape(*self.passes.shape[:-1], *size),
            input_bytes=self.inputs.reshape(size),
            resident_bytes=self.resident,
            end_bytes=self.end,
            parameter_bytes=self.parameters,
            gradient_bytes=self.gradients,
            optimizer_state_bytes=self.states,
            pass_s=self.pass_s.reshape(*self.pass_s.shape[:-1], *size),
            added_s=self.added_s,
            update_s=self.update_s,
            refused=self.refused,
            reasons=tuple(self.reasons),
            budget_bytes=goal.margin.budget(goal.usable_bytes),
            beside_bytes=context_bytes(self.estimator.gpu) + workspace_bytes(self.estimator.gpu),
        )

    def _program(self, setup: Setup) -> StepProgram:
        return self.estimator.program(setup)

    @staticmethod
    def _at(block: _Block, setup: Setup) -> Setup:
        return replace(setup, micro_batch_size=block.micro_batch_size, seq_len=block.seq_len)

    def _allowed(self, place: tuple[int, int, int, int]) -> Setup | None:
        """The choices at a place, of one micro-step on one GPU; None where they do not go together."""
        found: Setup | None = None
        for steps, gpus in product((1, 2), (1, 2)):
            try:
                setup = self._chosen(place, steps, gpus)
                if steps == gpus == 1:
                    self.estimator.check(setup)
                    self._program(setup)
                    found = setup
            except MemplanError as refusal:
                if found is None:
                    self.refused[place] = self._reason(refusal)
                    return None
                self.refused[(*place, steps - 1, gpus - 1)] = self._reason(refusal)
        return found

    def _chosen(self, place: tuple[int, int, int, int], steps: int, gpus: int) -> Setup:
        precision, rank, mode, optimizer = place
        return replace(
            self.setup,
            precision=self.axes.precision[precision],
            lora=_adapters(self.setup.lora, self.axes.lora_rank[rank]),
            activation_checkpointing=self.axes.activation_checkpointing[mode],
            optimizer=self.axes.optimizer[optimizer],
            gradient_accumulation_steps=steps,
            data_parallel_size=gpus,
        )

    def _reason(self, refusal: MemplanError) -> int:
        """The position of a refusal in the list of reasons, from 1."""
        if str(refusal) not in self.reasons:
            self.reasons.append(str(refusal))
        return 1 + self.reasons.index(str(refusal))

    def _fill(self, place: tuple[int, int], mode: int, allowed: list[tuple[int, Setup]]) -> None:
        """What the optimizers that may be chosen have in common, and what each of them has by itself."""
        for optimizer, setup in allowed:
            if not self.end[(*place, optimizer)]:
                self._fill_states(place, optimizer, setup)
        for kind in range(self.kinds):
            alike = [setup for _, setup in allowed if (setup.optimizer in IN_BACKWARD) == bool(kind)]
            for setup in alike[:1]:
                self._fill_passes((kind, *place, mode), setup)
                self._fill_times((*place, mode), setup)

    def _fill_states(self, place: tuple[int, int], optimizer: int, setup: Setup) -> None:
        sizes = self.estimator.sizes(setup)
        for gpus in (1, 2) if setup.optimizer not in IN_BACKWARD else (1,):
            program = self._program(replace(setup, data_parallel_size=gpus))
            always = program.inputs(1).total(sizes) - _inputs(program, sizes)
            self.resident[(*place, optimizer, gpus - 1)] = program.resident_bytes + always
        program = self._program(setup)
        self.end[(*place, optimizer)] = program.end_bytes
        self.parameters[place] = program.parameter_bytes(sizes)
        self.gradients[(*place, optimizer)] = program.gradients.total(sizes)
        self.states[(*place, optimizer)] = program.optimizer_states.total(sizes)
        pace = self.estimator.pace(setup, dimensions(setup))
        assert pace is not None
        self.added_s[place], self.update_s[(*place, optimizer)] = pace.added_s, pace.update_s

    def _fill_passes(self, place: tuple[int, int, int, int], setup: Setup) -> None:
        for block in self.blocks:
            program = self._program(self._at(block, setup))
            for steps in (1, 2) if setup.optimizer not in IN_BACKWARD else (1,):
                highest = program.peaks(block.sizes, steps).highest_of_passes
                base = program.resident_bytes + program.inputs(steps).total(block.sizes)
                self.passes[(*place, steps - 1, block.points)] = highest - base
        if setup.evaluation is not None:
            self._fill_evaluation(self.passes[place], setup, setup.evaluation)

    def _fill_evaluation(self, passes: NDArray[np.int64], setup: Setup, evaluation: Evaluation) -> None:
        """Raise the points (k, m l) at which an evaluation, whose batches are its own, needs more than any pass."""
        num = len(self.axes.seq_len)
        for number, length in enumerate(self.axes.seq_len):
            height = self.estimator.evaluation(replace(setup, seq_len=length), evaluation).height()
            passes[:, number::num] = passes[:, number::num].clip(min=height)

    def _fill_times(self, place: tuple[int, int, int], setup: Setup) -> None:
        for block in self.blocks:
            pace = self.estimator.pace(self._at(block, setup), block.env)
            assert pace is not None
            self.pass_s[(*place, block.points)] = pace.pass_s


def _adapters(own: Lora | None, rank: int | None) -> Lora | None:
    """Adapters of a rank, otherwise like the plan's own."""
    if rank is None:
        return None
    return Lora(rank=rank) if own is None else replace(own, rank=rank)


def _inputs(program: StepProgram, sizes: Sizes) -> Any:
    """Bytes that one more micro-step has waiting."""
    return program.inputs(2).total(sizes) - program.inputs(1).total(sizes)


def _blocks(estimator: Estimator, setup: Setup, axes: Axes) -> Iterable[_Block]:
    """All pairs of a micro-batch and a length."""
    import numpy as np

    from memplan.estimation.grid import blocks

    grid = np.meshgrid(axes.micro_batch_size, axes.seq_len, indexing="ij")
    batches, lengths = (one.ravel().astype(np.int64) for one in grid)
    alone = setup.batching == "padding-free"  # a single sequence in the row needs no mask
    for points in blocks(batches > alone, lengths, sorted(estimator.architecture.windows)):
        b, s = batches[points], lengths[points]
        env = dimensions(setup, b, s)
        yield _Block(points, int(b[0]), int(s[0]), env, Sizes(env))
