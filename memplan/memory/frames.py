"""What is alive while Python runs the update of one parameter after the other?

An optimizer written as a loop keeps its local variables from one parameter to the next: the denominator of the last
parameter is freed only when the name is given to that of the next one.  A `Frame` follows the names of such a loop, and
says what was alive at its highest point.  A nested call has names of its own (``call.name``) that go when it returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.memory.events import Row
from memplan.operators.sizes import allocated, num_bytes
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from memplan.operators.sizes import Size


class Trained(NamedTuple):
    """A parameter that is trained, as an optimizer sees it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    of_embedding: bool = False
    """Whether it is the table of an ``nn.Embedding``."""
    in_layers: bool = False
    """Whether it belongs to one of the repeated layers: neither embedding nor head."""

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a linear layer, for all an optimizer can see."""
        return len(self.shape) == 2 and not self.of_embedding


class Block(NamedTuple):
    """A tensor that a loop makes."""

    number: int
    row: Row
    size: Size
    allocated: int


class Frame:
    """The tensors of a loop and the names that hold them."""

    def __init__(self, source: str) -> None:
        """`source`: the code that is followed."""
        self.source = source
        self.peak = 0
        self._live = 0
        self.events: list[tuple[Block, int]] = []
        """Every tensor made (+1) and freed (-1), in order."""
        self._peak_at = 0
        self._named: dict[str, Block] = {}
        self._names: dict[int, int] = {}

    def make(self, p: Trained, what: str, shape: tuple[int, ...] | None = None, dtype: str = "") -> Block:
        """Allocate a tensor, by default of the shape and dtype of the parameter; nothing holds it yet."""
        shape, dtype = p.shape if shape is None else shape, dtype or p.dtype
        size = num_bytes(shape, dtype)
        block = Block(len(self.events), Row(p.name, what, "temporary", shape, dtype, self.source), size, 0)
        block = block._replace(allocated=allocated(size.factor))
        self.events.append((block, +1))
        self._live += block.allocated
        if self._live > self.peak:
            self.peak, self._peak_at = self._live, len(self.events)
        return block

    def drop(self, *blocks: Block | None) -> None:
        """Free tensors that no name holds."""
        for block in blocks:
            if block is not None:
                self.events.append((block, -1))
                self._live -= block.allocated

    def bind(self, name: str, block: Block | None) -> None:
        """Give a name to a tensor (None: to something that is none); what had the name before loses it."""
        if block is not None:
            self._names[block.number] = self._names.get(block.number, 0) + 1
        old = self._named.pop(name, None)
        if block is not None:
            self._named[name] = block
        if old is not None:
            self._names[old.number] -= 1
            if not self._names[old.number]:
                self.drop(old)

    def leave(self, call: str) -> None:
        """A nested call returns: its names (``call.name``) go."""
        for name in [name for name in self._named if name.startswith(f"{call}.")]:
            self.bind(name, None)

    def held(self, name: str) -> Block | None:
        """What has a name."""
        return self._named.get(name)

    def highest(self) -> tuple[Block, ...]:
        """The tensors alive at the highest point."""
        alive: dict[int, Block] = {}
        for block, sign in self.events[: self._peak_at]:
            if sign > 0:
                alive[block.number] = block
            else:
                del alive[block.number]
        return tuple(alive.values())
