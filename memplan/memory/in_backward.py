"""Which events does a backward pass have whose hooks update each parameter as soon as its gradient is there?

The gradients are made as in any backward pass and go where later micro-steps would add them to those that are there.
Two kinds of hooks: one that follows the gradient (``register_post_accumulate_grad_hook``), and one that comes before it
and updates the parameter of the gradient before that (LOMO's ``register_hook``), so that one gradient waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.memory.events import Event, Segment
from memplan.memory.frames import Frame, Trained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.memory.optimizers import InBackward


def updating(first: Segment, later: Segment, how: InBackward) -> Segment:
    """The backward of a piece with updates.

    `first` and `later`: that of the first micro-step, and of later ones, which has the releases of gradients besides.
    A gradient that waits at the end of a piece is taken to go with it.
    """
    events: list[Event] = []
    waiting: Event | None = None
    for event, complete in _completed(first, later):
        if not complete:
            events.append(event)
            continue
        done, waiting = (waiting, event) if how.waits else (event, None)
        if done is not None:
            events += _update(done, how, len(events))
    if waiting is not None:
        events += _update(waiting, how, len(events))
    return Segment("backward with updates", tuple(events))


def _completed(first: Segment, later: Segment) -> list[tuple[Event, bool]]:
    """The events of `later`, and which of them are of gradients that are complete and would now be added.

    Of a linear layer autograd completes the bias before the weight (both wait in its ready queue, and the bias is the
    first input of addmm).
    """
    found: list[tuple[Event, bool]] = []
    position = 0
    for event in later.events:
        there = first.events[position] if position < len(first.events) else None
        complete = there is None or (there.key, there.sign) != (event.key, event.sign)
        position += not complete
        found.append((event, complete))
        if complete and len(found) > 1 and found[-2][1] and _is_bias_of(event, found[-2][0]):
            found[-2:] = found[-1], found[-2]
    return found


def _is_bias_of(bias: Event, weight: Event) -> bool:
    module, _, name = bias.row.module.rpartition(".")
    same = module == weight.row.module.rpartition(".")[0]
    return same and name == "bias" and len(bias.row.shape or ()) < len(weight.row.shape or ())


def _update(release: Event, how: InBackward, number: int) -> Iterator[Event]:
    """What the update of one parameter allocates and frees, its gradient (`release`) among it."""
    row = release.row
    p = Trained(row.module, tuple(dim for dim in row.shape or () if isinstance(dim, int)), row.dtype)
    frame = Frame(how.source)
    gradient = frame.make(p, "gradient")
    how.loop(frame, p, gradient)
    for block, sign in frame.events[1:]:
        if block.number == gradient.number:
            yield release
        else:
            yield Event(("update", number, block.number), block.size, sign, block.row)
