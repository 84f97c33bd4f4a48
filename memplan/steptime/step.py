"""The time of one optimizer step, put together from its pieces.

    K x (forward + backward + what is computed twice) + gradient clip + optimizer step

The optimizer's share is memory traffic: how often each implementation reads or writes a number of parameters, gradients
and states (torch/optim/adamw.py, sgd.py of PyTorch 2.13, one kernel after the other).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.specs.training import IN_BACKWARD
from memplan.specs.values import NamedTuple
from memplan.steptime.roofline import Speed, Term, Timed, seconds, terms, timed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.architecture import Piece, Recording


class Traffic(NamedTuple):
    """Reads and writes of an optimizer step, for each number of the parameters."""

    accesses: int
    """Of numbers in the parameter's dtype."""
    state_bytes: int = 0
    """Bytes of other dtypes."""


TRAFFIC_BY_OPTIMIZER = {
    "adamw-foreach": Traffic(20),
    "adamw-forloop": Traffic(20),
    "adamw-fused": Traffic(7),
    "adamw-offloaded": Traffic(2),
    "sgd": Traffic(3),
    "sgd-momentum": Traffic(8),
    "rmsprop": Traffic(13),
    "adagrad": Traffic(13),
    "muon": Traffic(34),
    "schedule-free-adamw": Traffic(23),
    "schedule-free-sgd": Traffic(9),
    "adafactor": Traffic(0, 84),
    "galore-adamw": Traffic(7),
    "apollo-adamw": Traffic(11),
    "rmsprop-32bit": Traffic(3, 8),
    "rmsprop-8bit": Traffic(3, 2),
    "adamw-32bit": Traffic(3, 16),
    "adamw-8bit": Traffic(3, 4),
    "paged-adamw": Traffic(3, 16),
    "paged-adamw-8bit": Traffic(3, 4),
    "lion": Traffic(3, 8),
    "lion-8bit": Traffic(3, 2),
    "paged-lion": Traffic(3, 8),
    "paged-lion-8bit": Traffic(3, 2),
    "ademamix": Traffic(3, 24),
    "ademamix-8bit": Traffic(3, 6),
    "paged-ademamix": Traffic(3, 24),
    "paged-ademamix-8bit": Traffic(3, 6),
    "adamw-in-backward": Traffic(7),
    "lomo": Traffic(3),
    "adalomo": Traffic(0, 84),
}
"""Of each implementation, counted kernel by kernel.

Of what is offloaded the gradient is read and the parameter written; the host's work is not counted.
bitsandbytes reads the gradient, reads and writes the parameter and its states.  Adafactor's numbers are all fp32.
Of Muon, GaLore and APOLLO the elementwise part alone: their matrix products come on top.
"""

CLIP_ACCESSES = 3
"""The norm reads each gradient, the scaling reads and writes it."""

ACCUMULATION_ACCESSES = 3
"""Adding a gradient to the one that is there."""


class StepTime(NamedTuple):
    """A lower bound of the seconds of one optimizer step on one GPU."""

    forward_s: float
    """All forward passes."""
    backward_s: float
    """All backward passes, without what is computed twice."""
    recompute_s: float
    """What checkpointing computes twice."""
    optimizer_s: float
    """Gradient clip and optimizer step."""

    @property
    def total_s(self) -> float:
        """The whole step."""
        return self.forward_s + self.backward_s + self.recompute_s + self.optimizer_s


class Pace(NamedTuple):
    """What the time of a step is made of: K micro-steps take K passes, K - 1 additions and one update."""

    pass_s: Any
    """Forward and backward pass of a micro-step, with what is computed twice."""
    added_s: float
    """Adding its gradients to those that are there."""
    update_s: float
    """Gradient clip and optimizer step."""


class TimedModel:
    """The work of a recorded model, ready to be timed for any size."""

    def __init__(
        self, recording: Recording, speed: Speed, reference: Recording | None = None, *, fused: bool = False
    ) -> None:
        """`speed`: what the GPU can do; `reference`: a model that runs forward in every micro-step, too.

        `fused`: a compiler may put everything but the products into kernels that run anyway: they alone are timed.
        """
        self.speed = speed
        self.stem = timed(recording.stem.tape, fused=fused)
        self.head = timed(recording.head.tape, fused=fused)
        self.kinds = tuple(timed(kind.tape, fused=fused) for kind in recording.kinds)
        self.order = recording.order
        self.reference = () if reference is None else tuple(timed(piece.tape) for piece in _each_run(reference))
        self._known: dict[tuple[int, ...], tuple[Any, Any, dict[str, Any], object]] = {}

    def step(
        self,
        env: Mapping[str, int],
        modes: tuple[str, ...],
        *,
        accumulation: int,
        optimizer: str,
        trained_bytes: int,
        trained: int,
    ) -> StepTime:
        """The time of a step.

        Args:
            env: The dimensions of one micro-batch.
            modes: For each layer ``none``, ``selective``, ``save-attention`` or ``full``.
            accumulation: Micro-steps in the step.
            optimizer: Its implementation.
            trained_bytes: Bytes of the parameters that are trained.
            trained: Number of them.
        """
        forward, backward, again = self.passes(env, modes)
        later = _accumulated(accumulation, trained_bytes) / self.speed.bytes_per_s
        update = bytes_of_update(optimizer, trained_bytes, trained) / self.speed.bytes_per_s
        return StepTime(accumulation * forward, accumulation * backward + later, accumulation * again, update)

    def passes(self, env: Mapping[str, Any], modes: tuple[str, ...]) -> tuple[Any, Any, Any]:
        """Seconds of one micro-step: forward, backward, what is computed twice; arrays where `env` holds arrays."""
        pieces = [self._piece(kind, env) for kind in self.kinds]
        stem, head = self._piece(self.stem, env), self._piece(self.head, env)
        forward = stem[0] + head[0] + sum(pieces[kind][0] for kind in self.order)
        forward = forward + sum(self._piece(piece, env)[0] for piece in self.reference)
        backward = stem[1] + head[1] + sum(pieces[kind][1] for kind in self.order)
        again: Any = 0.0
        for kind, mode in zip(self.order, modes, strict=True):
            again = again + pieces[kind][2].get(mode, 0.0)
        return forward, backward, again

    def _piece(self, piece: Timed, env: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any], object]:
        """Forward, backward, by mode what is computed twice; worked out once for equal numbers, or the same arrays."""
        is_one = isinstance(env["n"], int)
        key = (id(piece), env["b"], env["s"], env["n"]) if is_one else (id(piece), id(env))
        if key not in self._known:
            works = (piece.forward, piece.backward, piece.spans, piece.saved)
            forward, backward, spans, saved = (seconds(work, self.speed, env) for work in works)
            again = {"full": forward, "selective": spans, "save-attention": saved}
            self._known[key] = (forward, backward, again, None if is_one else env)  # which keeps the key its own
        return self._known[key]

    def terms(
        self,
        env: Mapping[str, int],
        modes: tuple[str, ...],
        *,
        accumulation: int,
        optimizer: str,
        trained_bytes: int,
        trained: int,
    ) -> tuple[Term, ...]:
        """The same step, operator by operator: what is timed when rates are learnt. Arguments as for `step`."""
        found: list[Term] = []
        for piece in (self.stem, self.head):
            for work in (piece.forward, piece.backward):
                found += terms(work, self.speed, env, accumulation)
        for piece in self.reference:
            found += terms(piece.forward, self.speed, env, accumulation)
        for number, kind in enumerate(self.kinds):
            layers = [mode for mode, of in zip(modes, self.order, strict=True) if of == number]
            found += terms(kind.forward, self.speed, env, accumulation * (len(layers) + layers.count("full")))
            found += terms(kind.backward, self.speed, env, accumulation * len(layers))
            found += terms(kind.spans, self.speed, env, accumulation * layers.count("selective"))
            found += terms(kind.saved, self.speed, env, accumulation * layers.count("save-attention"))
        moved = _accumulated(accumulation, trained_bytes) + bytes_of_update(optimizer, trained_bytes, trained)
        return (*(term for term in found if term.num), Term(0.0, moved / self.speed.bytes_per_s, 1, launches=False))


def _each_run(recording: Recording) -> list[Piece]:
    """The pieces of a model, each as often as it runs."""
    return [recording.stem, *(recording.kinds[kind] for kind in recording.order), recording.head]


def _accumulated(accumulation: int, trained_bytes: int) -> int:
    """Bytes moved to add later gradients to the first."""
    return (accumulation - 1) * ACCUMULATION_ACCESSES * trained_bytes


def seconds_of_update(optimizer: str, trained_bytes: int, trained: int, speed: Speed) -> tuple[float, float]:
    """Of adding the gradients of a micro-step to those that are there; of clip and update."""
    update = bytes_of_update(optimizer, trained_bytes, trained)
    return _accumulated(2, trained_bytes) / speed.bytes_per_s, update / speed.bytes_per_s


def bytes_of_update(optimizer: str, trained_bytes: int, trained: int) -> int:
    """Bytes moved by the gradient clip and the optimizer step, of `trained` numbers in `trained_bytes`."""
    traffic = TRAFFIC_BY_OPTIMIZER[optimizer]
    clip = 0 if optimizer in IN_BACKWARD else CLIP_ACCESSES
    return (clip + traffic.accesses) * trained_bytes + traffic.state_bytes * trained
