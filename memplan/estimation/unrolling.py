"""Segments of events turned into calls of the allocator, each segment translated once.

A call is (key, bytes, +1 or -1); a key is a whole number, negative for what is taken by itself (`Keys`), else made of
the place in the model and of the tensor's position within its segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.estimation.step import HEAD, STEM
from memplan.memory.lifetimes import WITHOUT_GRAPH

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Sequence

    from memplan.estimation.step import Layout, Part
    from memplan.memory.events import Segment, Sizes
    from memplan.memory.model_states import Tensors

    Call = tuple[int, int, int]

MOST_ALIKE = 4096
"""So many equal tensors have a block each; the ids of further micro-batches share one."""

PLACE_STRIDE = 1 << 20
"""Keys of one layer; no layer has so many tensors."""


class Keys:
    """Keys of what is no part of a segment."""

    def __init__(self) -> None:
        self.next = -1

    def new(self) -> int:
        """One that no block has had."""
        self.next -= 1
        return self.next + 1

    def take(self, tensors: Tensors, sizes: Sizes) -> tuple[list[Call], list[Call]]:
        """Calls that allocate some tensors, and those that free them."""
        taken = []
        for _, size, times in tensors.rows:
            alone = min(times, MOST_ALIKE)
            blocks = [sizes[size]] * alone
            if times > alone:
                blocks.append(sizes[size] * (times - alone))
            taken += [(self.new(), num_bytes, 1) for num_bytes in blocks]
        return taken, [(key, 0, -1) for key, _, _ in taken]


class Unrolling:
    """The parts of one layout as calls, for one micro-batch and length."""

    def __init__(self, layout: Layout, sizes: Sizes, *, first_key: int = 0) -> None:
        """`first_key`: where its keys begin; layouts whose tensors are alive together need different ones."""
        self.layout = layout
        self.sizes = sizes
        self.slots: dict[Any, int] = {}
        self.translated: dict[tuple[int, bool], tuple[Segment, Any]] = {}
        """By the id of a segment, which is held, so that no other one gets its id."""
        self.gradients: dict[int, None] = {}
        layers = layout.num_places
        self.base_of = {place: first_key + place * PLACE_STRIDE for place in range(layers)}
        self.base_of |= {STEM: first_key + layers * PLACE_STRIDE, HEAD: first_key + (layers + 1) * PLACE_STRIDE}
        self.tied_base = first_key + (layers + 2) * PLACE_STRIDE
        self.hidden_gradient = 0

    def parts(self, parts: Iterable[Part], *, again: bool = False) -> Iterator[Call]:
        """The calls of some parts; `again`: gradients are those of a later micro-step."""
        for part in parts:
            translated = self._translate(part.segment, again=again)
            for place in part.places:
                yield from self._run_segment(translated, place)

    def gradients_released(self, besides: Container[int] = ()) -> Iterator[Call]:
        """The gradients that the backward passes have left go, but for those of these keys."""
        for key in [key for key in self.gradients if key not in besides]:
            del self.gradients[key]
            yield key, 0, -1

    def key(self, place: int, storage: int) -> int:
        """The key of a tensor that a forward pass makes at a place."""
        return self.base_of[place] + self._slot(("", storage))

    def _run_segment(self, translated: Sequence[Any], place: int) -> Iterator[Call]:
        base = self.base_of[place]
        events, hands_on, gradients = translated
        for kind, slot, num_bytes, sign in events:
            if kind == 0:
                yield base + slot, num_bytes, sign
            elif kind in {1, 4}:
                yield self._hidden(place, WITHOUT_GRAPH if kind == 4 else ""), num_bytes, sign
            elif kind == 2:
                yield self.hidden_gradient, num_bytes, sign
            else:
                yield self.tied_base + slot, num_bytes, sign
        if hands_on is not None:
            self.hidden_gradient = base + hands_on
        for tied, slot, stays in gradients:
            key = (self.tied_base if tied else base) + slot
            if stays:
                self.gradients[key] = None
            else:
                self.gradients.pop(key, None)

    def _hidden(self, place: int, tag: str) -> int:
        recording = self.layout.recording_of(tag)
        layers = len(recording.order)
        before = STEM if place == 0 or (place == HEAD and not layers) else layers - 1 if place == HEAD else place - 1
        piece = recording.stem if before == STEM else recording.kinds[recording.order[before]]
        return self.base_of[before] + self._slot((tag, piece.output.storage))

    def _slot(self, key: Any) -> int:
        return self.slots.setdefault(key, len(self.slots))

    def _translate(self, segment: Segment, *, again: bool) -> Any:
        """Events as (kind, slot, bytes, sign); the slot of the gradient handed on; gradients that stay or go."""
        known = self.translated.get((id(segment), again))
        if known is not None:
            return known[1]
        events = []
        hands_on = None
        alive: dict[tuple[bool, int], bool] = {}
        for event in segment.events:
            key = event.key
            tied = key[0] == "tied"
            if key[0] == "hidden":
                kind, slot = (4 if WITHOUT_GRAPH in key else 1), 0
            elif key == ("gradient of output",):
                kind, slot = 2, 0
            else:
                kind, slot = (3 if tied else 0), self._slot((again, *key) if key[0] in {"grad", "tied"} else key)
            if key == ("gradient of hidden",):
                hands_on = slot
            if event.row.kind == "gradient" and kind in {0, 3}:
                alive[tied, slot] = event.sign > 0
            events.append((kind, slot, self.sizes[event.size], event.sign))
        gradients = [(tied, slot, stays) for (tied, slot), stays in alive.items()]
        translated = events, hands_on, gradients
        self.translated[id(segment), again] = segment, translated
        return translated
