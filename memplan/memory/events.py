"""Allocations and releases in order, and how high they pile up.

A `Segment` is a straight run of events.  Two numbers say all that a sum of segments needs: the net change and the
highest point above the start.  For segments run one after the other

    net = net1 + net2        peak = max(peak1, net1 + peak2)

and for n runs of the same segment  net = n * net1,  peak = max(peak1, (n - 1) * net1 + peak1):  the highest point lies
in the first or in the last run.  This is exact, works on ints and on arrays alike, and costs the same for 2 layers as
for 200.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.operators.sizes import Size, allocated
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.operators.sizes import Shape


class Row(NamedTuple):
    """What a block of memory holds."""

    module: str
    tensor: str
    kind: str
    """parameter, buffer, input, activation, loss, gradient, optimizer_state or temporary."""
    shape: Shape | None
    dtype: str
    reason: str = ""
    """Why it is there."""


class Event(NamedTuple):
    """A block is taken (+1) or given back (-1)."""

    key: tuple[Any, ...]
    """Names the block within one run of its segment; the release of a block names it as its allocation did."""
    size: Size
    sign: int
    row: Row


class Extent(NamedTuple):
    """What a run of events does to the number of allocated bytes."""

    net: Any
    """Bytes more at the end than at the start."""
    peak: Any
    """Bytes above the start at the highest point, never below 0."""

    def then(self, other: Extent) -> Extent:
        """This, followed by `other`."""
        return Extent(self.net + other.net, maximum(self.peak, self.net + other.peak))

    def repeated(self, times: int) -> Extent:
        """This, `times` in a row."""
        if times == 0:
            return NOTHING
        return Extent(self.net * times, maximum(self.peak, self.net * (times - 1) + self.peak))


NOTHING = Extent(0, 0)


class Segment(NamedTuple):
    """A run of events that belong together."""

    name: str
    events: tuple[Event, ...]

    def extent(self, sizes: Sizes) -> Extent:
        """Net change and highest point, for the dimensions of `sizes`."""
        live: Any = 0
        peak: Any = 0
        rising = False
        for event in self.events:
            if event.sign > 0:
                live = live + sizes[event.size]
                rising = True
            else:
                if rising:
                    peak = maximum(peak, live)
                    rising = False
                live = live - sizes[event.size]
        return Extent(live, maximum(peak, live) if rising else peak)


class Sizes(dict[Size, Any]):
    """Allocated bytes of each size, for one configuration or for arrays of them; each worked out once."""

    def __init__(self, env: Mapping[str, Any]) -> None:
        super().__init__()
        self._env = env
        self._extents: dict[int, tuple[Segment, Extent]] = {}

    def extent(self, segment: Segment) -> Extent:
        """Net change and highest point of a segment, worked out once."""
        known = self._extents.get(id(segment))
        if known is None:
            known = self._extents[id(segment)] = (segment, segment.extent(self))
        return known[1]

    def __missing__(self, size: Size) -> Any:
        value = allocated(size.value(self._env))
        self[size] = value
        return value


def maximum(a: Any, b: Any) -> Any:
    """The larger, of numbers or element by element."""
    if isinstance(a, int) and isinstance(b, int):
        return a if a >= b else b
    import numpy as np

    return np.maximum(a, b)
