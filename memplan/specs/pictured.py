"""Answers that can be looked at as pictures.

The one place below the edges that knows `memplan.report`, and only when somebody asks for a picture.  A picture may
need more than the answer holds: a timeline, say, is worked out when it is drawn.  `Behind` is what it is asked of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

TRACED = "memplan has no formula for this model, only traces of the sizes that were asked for"
PICKLED = "it was pickled, and what it was worked out with was not"


class Behind:
    """What an answer was worked out with, so that it can be asked for more.

    It is no part of the answer's value: it equals any other, is not shown, and a pickled one comes back empty.
    """

    __slots__ = ("_make", "_reason")

    def __init__(self, make: Callable[[], Any] | None = None, reason: str = TRACED) -> None:
        """`make` makes the estimator; where there is none, `reason` says why."""
        self._make = make
        self._reason = reason

    def estimator(self, wanted: str) -> Any:
        """The estimator; `wanted`: the chart that it is asked for.

        Raises:
            MemplanError: there is none, so that nothing can be worked out.
        """
        if self._make is None:
            cure = "Ask for the answer anew, with memplan.suggest or memplan.estimate."
            cure = cure if self._reason == PICKLED else "Ask for --chart breakdown, or plot_breakdown()."
            raise MemplanError(f"There is no {wanted} chart of this answer: {self._reason}.", cure)
        return self._make()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Behind)

    def __hash__(self) -> int:
        return hash(Behind)

    def __reduce__(self) -> Any:
        return Behind, (None, PICKLED if self._make is not None else self._reason)

    def __copy__(self) -> Behind:
        return self

    def __deepcopy__(self, _: Any) -> Behind:
        return self


class Pictured:
    """Something that a notebook shows with a picture."""

    def _repr_html_(self) -> str:
        from memplan.report.pictures import fragment

        return fragment(self)

    def _plot(self, name: str) -> Figure:
        from memplan.report.pictures import chart

        return chart(self, name).figure


class PicturedBytes(Pictured):
    """The bytes of a configuration."""

    def plot_breakdown(self) -> Figure:
        """What the memory is made of at the peak."""
        return self._plot("breakdown")

    def plot_timeline(self) -> Figure:
        """How memory goes up and down over the first two steps.

        Raises:
            MemplanError: nobody knows: the model is known from traces alone, or the answer was pickled.
        """
        return self._plot("timeline")


class PicturedPlan(PicturedBytes):
    """A plan; what is not in it is worked out when it is drawn, and may raise as `plot_timeline` does."""

    def plot_levers(self) -> Figure:
        """What single changes free or take.

        Raises:
            MemplanError: none is priced.
        """
        return self._plot("levers")

    def plot_map(self) -> Figure:
        """Which micro-batches and lengths fit around it."""
        return self._plot("map")

    def plot_length(self) -> Figure:
        """How memory grows with the length."""
        return self._plot("length")

    def plot_micro_batch(self) -> Figure:
        """How memory grows with the micro-batch."""
        return self._plot("micro-batch")

    def plot_frontier(self) -> Figure:
        """Memory against the time of a step, of everything that reaches the batch."""
        return self._plot("frontier")

    def plot_schedule(self) -> Figure:
        """Which samples go to which GPU in which micro-step."""
        return self._plot("schedule")

    def plot_lengths(self) -> Figure:
        """How long the records of the data are, with the maximum length marked.

        Raises:
            MemplanError: the plan was made without data.
        """
        return self._plot("lengths")


class PicturedMap(Pictured):
    """A map of sizes."""

    def plot(self) -> Figure:
        """GiB and verdict of each micro-batch and length; of many, some."""
        return self._plot("map")


class PicturedLengths(Pictured):
    """Lengths of a data set."""

    def plot(self) -> Figure:
        """The histogram and the cumulative curve, with the candidates marked."""
        return self._plot("lengths")
