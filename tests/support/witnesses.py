"""Both witnesses on one configuration: what the formula says, and what memplan's own trace of the module says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from memplan.architectures.registry import read_architecture
from memplan.estimation.dimensions import dimensions
from memplan.estimation.step import Recordings
from memplan.estimation.timeline import timeline
from memplan.memory.events import Sizes
from memplan.probes.models import transformers_model
from memplan.probes.trace import trace_training
from memplan.specs.values import replace

if TYPE_CHECKING:
    from memplan.estimation.step import StepProgram
    from memplan.estimation.timeline import Moment
    from memplan.specs.training import Setup


class Bytes(NamedTuple):
    """What both say."""

    parameters: int
    gradients: int
    optimizer_states: int
    kept: int
    num_parameters: int
    num_trained: int


class Both(NamedTuple):
    """Formula and trace."""

    formula: Bytes
    trace: Bytes
    formula_peak: int
    trace_peak: int

    @property
    def peak_error(self) -> float:
        """The formula's peak less the trace's, as a share of it."""
        return self.formula_peak / self.trace_peak - 1


def compare(
    config: dict[str, Any], setup: Setup, *, sdpa_kernel: str | None = None, teacher: dict[str, Any] | None = None
) -> Both:
    """Evaluate and trace one setup; `teacher`: the config of the model that is distilled."""
    taught = None if teacher is None else read_architecture(teacher, "teacher", dropout=0.0)
    program = Recordings(read_architecture(config, "config", dropout=setup.dropout), taught).program(setup)
    sizes = Sizes(dimensions(setup))
    peaks = program.peaks(sizes, setup.gradient_accumulation_steps)
    model = transformers_model(config)
    if teacher is not None:
        model = replace(model, teacher=transformers_model(teacher))
    trace = trace_training(model, setup, sdpa_kernel=sdpa_kernel)
    return Both(
        Bytes(
            program.parameter_bytes(sizes),
            program.gradients.total(sizes),
            program.optimizer_states.total(sizes),
            peaks.kept_activation_bytes,
            program.states.num_parameters,
            program.states.num_trained,
        ),
        Bytes(
            trace.category_bytes("parameter"),
            trace.category_bytes("gradient"),
            trace.category_bytes("optimizer_state"),
            trace.kept_activation_bytes,
            trace.num_parameters,
            trace.num_trainable_parameters,
        ),
        int(peaks.peak),
        trace.peak_allocated_bytes,
    )


def walked_to_the_peak(program: StepProgram, sizes: Sizes, accumulation: int) -> int:
    """Highest number of live bytes over the events of two steps; it is the closed form's, and nothing is left over."""
    live, highest = 0, 0
    alive: dict[Any, Moment] = {}
    for moment in timeline(program, sizes, accumulation):
        assert (moment.key in alive) == (moment.sign < 0)
        alive[moment.key] = moment
        if moment.sign < 0:
            del alive[moment.key]
        live += moment.sign * moment.num_bytes
        highest = max(highest, live)
    assert highest == program.peaks(sizes, accumulation).peak
    assert {moment.row.kind for moment in alive.values()} == {"parameter", "buffer", "optimizer_state"}
    return highest
