"""When is each tensor of a recorded piece born, and when does it die?

The forward pass allocates what operators produce and frees what nothing needs any more: a tensor lives until its last
use, or until its backward where an operator keeps it.  The backward pass runs the operators in reverse, as autograd's
engine does (torch/csrc/autograd/engine.cpp): an operator's gradients are allocated while the incoming one and all it
kept are still there; then what it kept and the incoming gradient are let go; gradients that meet at a tensor are added
in place when nothing else holds the first, else into a new tensor (input_buffer.cpp).

Checkpointing replaces what a span of operators keeps by the span's inputs, and runs its forward again at the moment the
backward first needs something of it, stopping as soon as everything needed is there (early stop in
torch/utils/checkpoint.py): its last operators are not computed twice.

Reentrant checkpointing (``CheckpointFunction`` in torch/utils/checkpoint.py) runs the forward pass of a layer under
``torch.no_grad()``.  Its backward computes the whole layer again, with a graph of its own, and calls
``torch.autograd.backward`` on that: what comes in, the result computed again and its gradient are variables of the
call, and live until the gradients of the layer are all there.

What an operator holds as attributes of its node, behind autograd's back, stays until the graph goes: at the end of the
backward pass, or, of what is computed again, as soon as that is done.

Left out: Python variables that hold a tensor longer than its last use, unless the description says so (`keep_alive`).
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from memplan.memory.events import Event, Row, Segment
from memplan.operators.sizes import Size
from memplan.operators.tape import ATTENTION_KERNEL, PAUSE, Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from memplan.architectures.architecture import Piece
    from memplan.memory.tied import Waiting
    from memplan.operators.sizes import Shape
    from memplan.operators.tape import Gradient, Op, Storage, Tensor

    _Kept = tuple[int, dict[int, int], dict[int, tuple[Any, ...]]]
    """A storage, how many hold what was kept, and under which keys."""


def hidden_row(shape: Shape, dtype: str) -> Row:
    """The hidden states between two pieces, under one name for the piece that makes and the piece that frees them."""
    return Row("between layers", "hidden states", "activation", shape, dtype, "the next layer needs them")


def hidden_gradient_row(x: Tensor) -> Row:
    """Their gradient."""
    return Row("between layers", "gradient of the hidden states", "temporary", x.shape, x.dtype)


def fetched_row(x: Tensor) -> Row:
    """What comes back from the host to compute a layer again."""
    return Row("between layers", "hidden states, back from the host", "temporary", x.shape, x.dtype)


WITHOUT_GRAPH = "without graph"
"""Tag of what a forward pass under ``torch.no_grad()`` allocates, beside what the same pieces keep of another one."""

ROOT_ROW = Row("loss", "gradient of the loss", "temporary", (), "")

OUTSIDE = frozenset({"parameter", "buffer", "input", "shared"})
"""Storages that a piece neither allocates nor frees."""


class PieceLifetimes:
    """The lifetimes within one piece under one checkpointing choice."""

    def __init__(
        self,
        piece: Piece,
        *,
        checkpointing: str = "none",
        owns_hidden: bool = True,
        lasting: frozenset[str] = frozenset(),
        offloads: bool = False,
        result: str = "",
        no_grad: Piece | None = None,
    ) -> None:
        """`checkpointing`: ``none``, ``selective`` (the spans the description names) or ``full`` (the whole piece).

        ``save-attention`` is ``full``, but for what fused attention gives, which is kept and not computed again.
        `no_grad`: with ``full``, the piece as recorded without a graph: checkpointing is reentrant.

        `offloads`: with ``full``, what goes in is copied to the host and fetched when the piece is computed again.

        `owns_hidden`: whether the incoming hidden states die here (they do unless the piece before keeps its output).
        `result`: what the piece hands on is called, where it is not the hidden states for the next piece.
        `lasting`: names of the shared tensors made here that other pieces need in their backward pass.
        """
        self.piece = piece
        self.tape = piece.tape
        self.ends_in_loss = not piece.output.shape
        self.owns_hidden = owns_hidden
        self.lasting = lasting
        self.result = result
        self.offloads = offloads and checkpointing == "full"
        self.no_grad = PieceLifetimes(no_grad) if no_grad is not None and checkpointing == "full" else None
        self.spans = self._spans(checkpointing)
        self.saved = frozenset(
            x.storage
            for op in self.tape.ops
            if op.name == ATTENTION_KERNEL and checkpointing == "save-attention" and self.spans
            for x in op.outputs
        )
        """What is kept although it is within what is computed again (torch's selective activation checkpointing)."""
        self._span_of = {i: span for span in self.spans for i in range(span.start, span.stop)}
        self._shared_names = {x.storage: name for name, x in piece.shared.items()} if piece.hidden is not None else {}
        self._backwards: dict[Waiting, tuple[Segment, Segment]] = {}
        self.reasons = self._reasons()
        losses = [op for op in self.tape.ops if op.module.startswith("loss")]
        self._logits = {x.storage for op in losses for x in op.inputs} if self.ends_in_loss else set()

    def _spans(self, checkpointing: str) -> tuple[Span, ...]:
        if checkpointing in {"full", "save-attention"} and self.piece.hidden is not None:
            whole = Span("layer", 0, len(self.tape.ops), () if self.offloads else (self.piece.hidden,))
            return (whole,) if self.no_grad is not None or self._is_recorded(whole) else ()
        if checkpointing == "selective":
            return tuple(span for span in self.tape.spans if self._is_recorded(span))
        return ()

    def _is_recorded(self, span: Span) -> bool:
        """Whether autograd saves anything within the span.

        Where nothing in it has a gradient, nothing refers to the frame of the span, and it goes with its inputs as soon
        as the span has run (``_CheckpointFrame`` in torch/utils/checkpoint.py).
        """
        return any(op.keeps for op in self.tape.ops[span.start : span.stop])

    def _reasons(self) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for op in self.tape.ops:
            for x in (*op.keeps, *op.pins):
                reasons.setdefault(x.storage, f"kept by {op.name}: {op.reason}" if op.reason else f"kept by {op.name}")
        if self.piece.hidden is None:
            for name in self.lasting:
                reasons.setdefault(self.piece.shared[name].storage, "the backward pass of the layers needs it")
        if self.ends_in_loss:
            reasons[self.piece.output.storage] = "the loss itself"
        for x in self.tape.outlive:
            reasons[x.storage] = "the training loop keeps the model's output"
        for s in self.saved:
            reasons[s] = "attention's result is saved, not computed again"
        for span in self.spans:
            for x in span.inputs:
                reasons[x.storage] = f"kept to compute the {span.name} again"
        return reasons

    # -- what is kept ------------------------------------------------------------------------------------------------

    def _is_kept_across(self, storage: Storage) -> bool:
        """Whether this piece decides about its life at all."""
        return storage.role not in OUTSIDE and (storage.role != "hidden" or self.owns_hidden)

    @cached_property
    def keepers(self) -> Mapping[int, int]:
        """For each storage, how many operators (and spans) hold it between forward and backward."""
        held: dict[int, int] = {}
        for i, op in enumerate(self.tape.ops):
            if self.no_grad is None:
                _hold(held, op.pins)
            if i not in self._span_of:
                _hold(held, op.keeps)
        for span in self.spans:
            _hold(held, span.inputs)
        for s in self.saved:
            held[s] = held.get(s, 0) + 1
        _hold(held, self.tape.outlive)
        return held

    def kept_shared(self) -> set[str]:
        """Names of shared tensors that have to live until the backward of this piece."""
        names = {self._shared_names[s] for s in self.keepers if s in self._shared_names}
        for span in self.spans:
            if span.stop - span.start == len(self.tape.ops):
                return set(self.piece.shared)
            for op in self.tape.ops[span.start : span.stop]:
                names |= {self._shared_names[x.storage] for x in op.inputs if x.storage in self._shared_names}
        return names

    def keeps_output(self) -> bool:
        """Whether the piece itself keeps the tensor it hands on."""
        return self.piece.output.storage in self.keepers

    def keeps_hidden(self) -> bool:
        """Whether the piece keeps what comes in for its backward pass."""
        return self.piece.hidden is not None and self.piece.hidden.storage in self.keepers

    # -- events ------------------------------------------------------------------------------------------------------

    def row(self, storage: Storage, *, tag: str = "") -> Row:
        """What a storage of this piece holds.

        `tag`: in which run other than the first forward pass: one that computes it again, or one without a graph.
        """
        if tag and tag != WITHOUT_GRAPH:
            return Row(storage.module, f"{storage.name}, computed again", "temporary", storage.shape, storage.dtype)
        is_result = storage.number == self.piece.output.storage
        if is_result and self.result:
            return Row(storage.module, self.result, "temporary", storage.shape, storage.dtype)
        if storage.role == "hidden" or (is_result and not self.ends_in_loss):
            return hidden_row(storage.shape, storage.dtype)
        if tag:
            return Row(storage.module, f"{storage.name}, {tag}", "temporary", storage.shape, storage.dtype)
        kept = storage.number in self.reasons or storage.cached
        kind = "temporary" if not kept else "loss" if self._belongs_to_loss(storage) else "activation"
        reason = "held by autocast's cache until the forward pass ends" if storage.cached else ""
        reason = self.reasons.get(storage.number, reason)
        return Row(storage.module, storage.name, kind, storage.shape, storage.dtype, reason)

    def _belongs_to_loss(self, storage: Storage) -> bool:
        return self.ends_in_loss and (storage.module.startswith("loss") or storage.number in self._logits)

    def _scratch(self, op: Op, where: str, sizes: Sequence[Size], sign: int) -> Sequence[Event]:
        if not sizes:
            return ()
        row = Row(op.module, f"scratch of {op.name}{where}", "temporary", None, "", "")
        return [Event(("scratch", where, n), size, sign, row) for n, size in enumerate(sizes)]

    def _moments(self, op: Op, where: str, moments: Sequence[Sequence[Size]]) -> Sequence[Event]:
        """High points one after the other, those of a loop as a rule."""
        return [event for moment in moments for sign in (+1, -1) for event in self._scratch(op, where, moment, sign)]

    def _run(
        self,
        ops: Sequence[Op],
        kept: Mapping[int, int],
        *,
        tag: str,
        stay: frozenset[int],
        skip_last_outputs: bool = False,
        there: frozenset[int] = frozenset(),
    ) -> list[Event]:
        """The forward of `ops`; what is in `kept` or `stay` is not freed, what is `there` is not computed."""
        frees_hidden = self.owns_hidden and tag in {"", WITHOUT_GRAPH}
        hidden_key = ("hidden", tag) if tag else ("hidden",)
        last: dict[int, int] = {}
        for i, op in enumerate(ops):
            for x in (*op.inputs, *op.outputs):
                last[x.storage] = i
        dies: dict[int, list[int]] = {}
        for s, i in last.items():
            dies.setdefault(i, []).append(s)
        events: list[Event] = []
        born: set[int] = set()
        storages = self.tape.storages
        for i, op in enumerate(ops):
            if op.name == PAUSE:
                events.append(Event((PAUSE,), Size(0), +1, Row(op.module, PAUSE, "temporary", (), "")))
            stop_here = skip_last_outputs and i == len(ops) - 1
            stop_here = stop_here or _is_there(op, there, born)
            if not stop_here:
                events += self._moments(op, "", op.loop.moments if op.loop else ())
                events += self._scratch(op, "", op.scratch, +1)
                for storage in self._made(op, born):
                    born.add(storage.number)
                    events.append(Event((tag, storage.number), storage.size, +1, self.row(storage, tag=tag)))
                events += self._scratch(op, "", op.scratch, -1)
            for s in dies.get(i, ()):
                storage = storages[s]
                dead = s not in kept and s not in stay and not storage.cached
                if dead and (s in born or (storage.role == "hidden" and frees_hidden) or storage.role == "cache"):
                    key = (tag, s) if s in born or storage.role == "cache" else hidden_key
                    events.append(Event(key, storage.size, -1, self.row(storage, tag=tag)))
                    born.discard(s)
        return events

    def _made(self, op: Op, born: set[int]) -> list[Storage]:
        """The storages that an operator makes, those that are there already (`born`) left out."""
        new = dict.fromkeys(x.storage for x in op.outputs if x.storage not in born)
        for x in op.inputs:
            new.pop(x.storage, None)
        return [storage for storage in map(self.tape.storages.__getitem__, new) if storage.role == "activation"]

    @cached_property
    def forward(self) -> Segment:
        """The forward pass of the piece, once; up to the pause where it has one."""
        return self._forward_and_rest[0]

    @property
    def after_pause(self) -> Segment | None:
        """The rest of it, None where there is no pause."""
        return self._forward_and_rest[1]

    @cached_property
    def _forward_and_rest(self) -> tuple[Segment, Segment | None]:
        events = self._first_run()
        pause = next((i for i, event in enumerate(events) if event.key == (PAUSE,)), None)
        if pause is None:
            return Segment("forward", tuple(events)), None
        return Segment("forward", tuple(events[:pause])), Segment("after pause", tuple(events[pause + 1 :]))

    def _first_run(self) -> list[Event]:
        alone = self.no_grad
        if alone is None:
            return self._run(self.tape.ops, self.keepers, tag="", stay=self._stay)
        hidden = alone.piece.hidden
        kept = {} if hidden is None or self.offloads or not self.owns_hidden else {hidden.storage: 1}
        alone.owns_hidden = self.owns_hidden
        return alone._run(alone.tape.ops, kept, tag="", stay=alone._stay)

    @property
    def _stay(self) -> frozenset[int]:
        """What a forward pass of the piece does not free: its result and, of the stem, what the layers share."""
        tape = self.tape
        handed_out = {x.storage for x in (self.piece.output, *tape.handed_out, *tape.in_next, *tape.in_cache)}
        return frozenset(handed_out | (self._stays if self.piece.hidden is None else set()))

    @cached_property
    def without_graph(self) -> Segment:
        """The forward pass under ``torch.no_grad()``, once: nothing is kept, only handed on."""
        return Segment("forward without graph", tuple(self._run(self.tape.ops, {}, tag=WITHOUT_GRAPH, stay=self._stay)))

    def released_without_graph(self, *kinds: str) -> Segment:
        """What a run without a graph has left of the piece goes: all that is of one of these `kinds`.

        ``cached``: autocast's copies; ``result``: what it hands on; ``handed out``: what the model returns besides (its
        cache of keys and values); ``returned``: what a layer does, held until the next has run; ``shared``: the rest,
        of the stem what the layers share.
        """
        alive: dict[tuple[Any, ...], Event] = {}
        for event in self.without_graph.events:
            if event.sign > 0:
                alive[event.key] = event
            else:
                alive.pop(event.key, None)
        gone = tuple(e._replace(sign=-1) for k, e in alive.items() if self._kind_without_graph(k[-1]) in kinds)
        return Segment("released without graph", gone)

    def _kind_without_graph(self, s: int) -> str:
        if s == self.piece.output.storage:
            return "result"
        if self.tape.storages[s].cached:
            return "cached"
        if s in {x.storage for x in self.tape.in_next}:
            return "returned"
        return "handed out" if s in {x.storage for x in self.tape.handed_out} else "shared"

    @property
    def _stays(self) -> set[int]:
        return {x.storage for x in (*self.piece.shared.values(), *self.tape.in_model)}

    @cached_property
    def held_into_next(self) -> Segment:
        """What the layer has returned beside its result goes."""
        storages = dict.fromkeys(self.tape.storages[x.storage] for x in self.tape.in_next)
        return Segment("returned by the layer", tuple(Event(("", s.number), s.size, -1, self.row(s)) for s in storages))

    @cached_property
    def output_released(self) -> Segment:
        """The result of the piece goes, where a variable held it longer than the next piece needed it."""
        storage = self.tape.storages[self.piece.output.storage]
        return Segment("output released", (Event(("", storage.number), storage.size, -1, self.row(storage)),))

    @cached_property
    def autocast_exit(self) -> Segment:
        """Autocast lets its cached copies go at the end of the forward pass, except those that a backward needs."""
        run = self if self.no_grad is None else self.no_grad
        events = [
            Event(("", s.number), s.size, -1, run.row(s))
            for s in run.tape.storages
            if s.cached and s.number not in run.keepers
        ]
        return Segment("autocast exit", tuple(events))

    @cached_property
    def loss_released(self) -> Segment:
        """The end of the backward pass: the loss, its gradient and what else its caller holds so long go."""
        out = self.piece.output
        loss = self.tape.storages[out.storage]
        row = ROOT_ROW._replace(dtype=out.dtype)
        outliving = [self.tape.storages[s] for s in sorted({x.storage for x in self.tape.outlive})]
        events = (
            Event(("gradient of loss",), out.bytes, -1, row),
            *(Event(("", storage.number), storage.size, -1, self.row(storage)) for storage in (loss, *outliving)),
        )
        return Segment("loss released", events)

    @cached_property
    def graph_released(self) -> Segment:
        """The graph goes with the loss, and with its nodes what they hold behind autograd's back."""
        pinned = {} if self.no_grad is not None else dict.fromkeys(x.storage for op in self.tape.ops for x in op.pins)
        storages = [x for x in map(self.tape.storages.__getitem__, pinned) if self._is_kept_across(x)]
        return Segment("graph released", tuple(Event(_forward_key(x), x.size, -1, self.row(x)) for x in storages))

    def backward(self, tied: Waiting = frozenset()) -> tuple[Segment, Segment]:
        """The backward pass of the piece, once: in the first micro-step, and in later ones.

        In the first, gradients of parameters are born and stay; in later ones they are added to those that are there.
        `tied`: parameters that the head and the stem share; the head's gradient waits for the stem's.
        """
        if tied not in self._backwards:
            self._backwards[tied] = _Backward(self, tied).run()
        return self._backwards[tied]


def _forward_key(storage: Storage) -> tuple[Any, ...]:
    """Under which key the forward pass has allocated it."""
    return ("hidden",) if storage.role == "hidden" else ("", storage.number)


def _is_there(op: Op, there: frozenset[int], born: set[int]) -> bool:
    """Whether an operator need not run, as what it would make is there."""
    return bool(there) and any(x.storage in there for x in op.outputs if x.storage not in born)


def _hold(held: dict[int, int], tensors: Iterable[Tensor]) -> None:
    """One holder more for every storage of `tensors`."""
    for storage in {x.storage for x in tensors}:
        held[storage] = held.get(storage, 0) + 1


class _Backward:
    """One walk of autograd's engine through a piece."""

    def __init__(self, lifetimes: PieceLifetimes, tied: Waiting) -> None:
        self.lifetimes = lifetimes
        self.tape = lifetimes.tape
        self.tied = dict(tied)
        self.reentrant = lifetimes.no_grad is not None
        self.events: list[Event] = []
        self.added: set[int] = set()
        """Positions of the releases of parameter gradients that only later micro-steps have."""
        self.blocks: dict[int, tuple[tuple[Any, ...], Size, Row]] = {}
        self.holders: dict[int, int] = {}
        self.pending: dict[int, int] = {}
        self.shown: set[int] = set()
        """Of which tensors the pending gradient is shown for more elements than it has."""
        self.parameter_of = {row.tensor: row for row in self.tape.parameters}
        self.first_use: dict[int, int] = {}
        for i, op in enumerate(self.tape.ops):
            for g in op.gradients:
                self.first_use.setdefault(g.of.number, i)

    def run(self) -> tuple[Segment, Segment]:
        """The events of the first micro-step and of later ones."""
        out = self.lifetimes.piece.output
        if self.lifetimes.ends_in_loss:
            root = self._allocate(out.bytes, ROOT_ROW._replace(dtype=out.dtype))
            self._rename(root, ("gradient of loss",))
            self.holders[root] += 1  # torch.autograd.backward's until it returns
            self.pending[out.number] = root
        elif out.requires_grad:
            self.pending[out.number] = self._adopt(("gradient of output",), out)
        self._walk()
        self._hand_on()
        stays = [event for i, event in enumerate(self.events) if i not in self.added]
        passes = [
            e._replace(row=e.row._replace(kind="temporary")) if e.row.kind == "gradient" else e for e in self.events
        ]
        return Segment("backward", tuple(stays)), Segment("backward", tuple(passes))

    def _walk(self) -> None:
        """The operators in reverse; a span is computed again when the first of them needs something of it."""
        held = dict(self.lifetimes.keepers)
        keys = {s: _forward_key(self.tape.storages[s]) for s in held}
        waiting = set(self.lifetimes.spans)
        starts = {span.start: span for span in self.lifetimes.spans}
        again: dict[int, int] = {}
        again_keys: dict[int, tuple[Any, ...]] = {}
        incoming: list[int] = []
        for i in range(len(self.tape.ops) - 1, -1, -1):
            op = self.tape.ops[i]
            kept = {x.storage for x in op.keeps}
            span = self.lifetimes._span_of.get(i)
            if span in waiting and (kept or self.reentrant):
                waiting.discard(span)
                again, again_keys = self._recompute(span)
                self._hand_over_saved(again, held, keys)
                incoming = self._call() if self.reentrant else []
            if span is not None and self.reentrant:
                self._step(i, op, [(s, again, again_keys) for s in kept if s in again])
            elif span is not None:  # what comes from outside the span stays until its start is reached
                found = [(s, again, again_keys) for s in kept if s in again]
                found += [(s, held, keys) for s in kept & self.lifetimes.saved]
                self._step(i, op, found, recomputed=True)
            else:
                self._step(i, op, [(s, held, keys) for s in kept])
            if i in starts and self.reentrant:
                self._return(starts[i], again, again_keys, incoming)
            if i in starts:
                for s in {x.storage for x in starts[i].inputs}:
                    self._let_go(s, held, keys)
                again, again_keys = {}, {}

    # -- blocks and their holders ------------------------------------------------------------------------------------

    def _allocate(self, size: Size, row: Row) -> int:
        number = len(self.blocks)
        self.blocks[number] = (("grad", number), size, row)
        self.holders[number] = 1
        self.events.append(Event(("grad", number), size, +1, row))
        return number

    def _adopt(self, key: tuple[Any, ...], x: Tensor) -> int:
        number = len(self.blocks)
        self.blocks[number] = (key, x.bytes, hidden_gradient_row(x))
        self.holders[number] = 1
        return number

    def _release(self, number: int) -> None:
        self.holders[number] -= 1
        if self.holders[number] == 0:
            key, size, row = self.blocks[number]
            self.events.append(Event(key, size, -1, row))

    def _let_go(self, s: int, held: dict[int, int], keys: dict[int, tuple[Any, ...]]) -> None:
        """One keeper less of what the forward pass kept."""
        if s not in held:
            return
        storage = self.tape.storages[s]
        held[s] -= 1
        again = keys[s][0] if keys[s][0].startswith("again") else ""
        if held[s] == 0 and (again or self.lifetimes._is_kept_across(storage)):
            self.events.append(Event(keys[s], storage.size, -1, self.lifetimes.row(storage, tag=again)))

    # -- the walk ----------------------------------------------------------------------------------------------------

    def _recompute(self, span: Span) -> tuple[dict[int, int], dict[int, tuple[Any, ...]]]:
        """Run the forward of the span again, as far as something is still to be kept; what it keeps, and its keys."""
        ops = self.tape.ops[span.start : span.stop]
        stay: set[int] = set()
        while ops and not ops[-1].keeps and not self.reentrant:
            stay |= {x.storage for x in ops[-1].inputs}  # they wait for what is not computed again
            ops = ops[:-1]
        stay |= {x.storage for op in ops for x in op.pins}  # by nodes of the second graph, which goes with its result
        made = {x.storage for op in ops for x in op.outputs if self.tape.storages[x.storage].role == "activation"}
        made -= {x.storage for x in span.inputs}
        fetched = self.lifetimes.piece.hidden if self.lifetimes.offloads else None
        if fetched is not None:
            made.add(fetched.storage)
        held: dict[int, int] = {}
        for tensors in (*(op.keeps for op in ops), self._variables(span) if self.reentrant else ()):
            _hold(held, [x for x in tensors if x.storage in made])
        tag = f"again {span.name}"
        stops_before = bool(ops) and not ops[-1].keeps_output and not self.reentrant
        saved = self.lifetimes.saved
        events = self.lifetimes._run(
            ops, held, tag=tag, stay=frozenset(stay), skip_last_outputs=stops_before, there=saved
        )
        if fetched is not None:
            events.insert(0, Event((tag, fetched.storage), fetched.bytes, +1, fetched_row(fetched)))
        alive = {event.key: event for event in events if event.sign > 0}
        for event in events:
            if event.sign < 0:
                alive.pop(event.key, None)
        self.events += events
        for key, event in alive.items():
            if key[-1] not in held:
                self.events.append(event._replace(sign=-1))
        return held, {s: (tag, s) for s in held}

    def _hand_over_saved(self, again: dict[int, int], held: dict[int, int], keys: dict[int, tuple[Any, ...]]) -> None:
        """What was saved is held by the operators of the second run now, and by those that pinned it in the first."""
        for s in sorted(self.lifetimes.saved):
            held[s] += again.pop(s, 0)
            self._let_go(s, held, keys)

    # -- reentrant checkpointing -------------------------------------------------------------------------------------

    def _variables(self, span: Span) -> list[Tensor]:
        """What lives until a layer has its gradients: by variables of CheckpointFunction.backward, or by the nodes."""
        piece = self.lifetimes.piece
        pins = [x for op in self.tape.ops[span.start : span.stop] for x in op.pins]
        return [
            piece.output,
            *self.tape.returned,
            *([piece.hidden] if piece.hidden and self.lifetimes.offloads else []),
            *pins,
        ]

    def _call(self) -> list[int]:
        """The gradients that are handed to CheckpointFunction.backward have a holder more until that returns.

        Results that nobody uses have gradients of zeros (``materialize_grads``).
        """
        for x in self.tape.returned:
            self.pending[x.number] = self._allocate(x.bytes, Row("", "zeros", "temporary", x.shape, x.dtype))
        numbers = [
            self.pending[x.number]
            for x in (self.lifetimes.piece.output, *self.tape.returned)
            if x.number in self.pending
        ]
        for number in numbers:
            self.holders[number] += 1
        return numbers

    def _return(self, span: Span, again: dict[int, int], keys: dict[int, tuple[Any, ...]], incoming: list[int]) -> None:
        """The call returns: its variables go, and the gradient of what came in is its own."""
        hidden = self.lifetimes.piece.hidden
        number = None if hidden is None else self.pending.get(hidden.number)
        if hidden is not None and number is not None and self.holders[number] > 1:
            self.pending[hidden.number] = self._allocate(hidden.bytes, hidden_gradient_row(hidden))
            self._release(number)
        for s in {x.storage for x in self._variables(span)}:
            self._let_go(s, again, keys)
        for given in incoming:
            self._release(given)

    def _step(
        self,
        i: int,
        op: Op,
        kept: list[_Kept],
        *,
        recomputed: bool = False,
    ) -> None:
        """The backward of one operator.

        Gradients that have to be cast or summed to the form of their input are so once all are computed
        (validate_outputs in engine.cpp).  What was kept is still there then, unless it was `recomputed`: checkpointing
        hands its tensors over for good.
        """
        incoming = [self.pending.pop(x.number) for x in op.outputs if x.number in self.pending]
        results: list[tuple[Gradient, int]] = []
        if incoming:
            loop = op.loop.backward_moments if op.loop else ()
            self.events += self.lifetimes._moments(op, " backward", loop)
            self.events += self.lifetimes._scratch(op, " backward", op.backward_scratch, +1)
            for g in op.gradients:
                if g.alias:
                    number = incoming[0]
                    self.holders[number] += 1
                elif g.kept is not None:
                    kept = self._hand_out(g.kept.storage, kept)
                    number = self._allocate(g.of.bytes, self._gradient_row(op, g.of))
                elif g.computed_at is not None:
                    row = Row(op.module, f"gradient from {op.name} before it is reduced", "temporary", None, "")
                    number = self._allocate(g.computed_at, row)
                else:
                    where = f" gradient of {g.of.number}"
                    self.events += self.lifetimes._moments(op, where, g.moments)
                    self.events += self.lifetimes._scratch(op, where, g.scratch, +1)
                    number = self._allocate(g.of.bytes, self._gradient_row(op, g.of))
                    self.events += self.lifetimes._scratch(op, where, g.scratch, -1)
                results.append((g, number))
            self.events += self.lifetimes._scratch(op, " backward", op.backward_scratch, -1)
        if recomputed:
            self._let_all_go(kept)
        results = [(g, self._reduced(op, g, number)) for g, number in results]
        if not recomputed:
            self._let_all_go(kept)
        for number in incoming:
            self._release(number)
        for g, number in results:
            self._accumulate(i, g.of, number)
            self.shown |= {g.of.number} if g.shown else set()

    def _hand_out(self, s: int, kept: list[_Kept]) -> list[_Kept]:
        """What the forward pass kept becomes a gradient: it is let go in the instant in which that is there."""
        for storage, held, keys in kept:
            if storage == s:
                self._let_go(storage, held, keys)
        return [one for one in kept if one[0] != s]

    def _reduced(self, op: Op, g: Gradient, number: int) -> int:
        """The gradient in the form of its input."""
        if g.computed_at is None:
            return number
        final = self._allocate(g.of.bytes, self._gradient_row(op, g.of))
        self._release(number)
        return final

    def _let_all_go(self, kept: list[_Kept]) -> None:
        for s, held, keys in kept:
            self._let_go(s, held, keys)

    def _gradient_row(self, op: Op, x: Tensor) -> Row:
        parameter = self.parameter_of.get(x.number)
        if parameter is None:
            return Row(op.module, f"gradient from {op.name}", "temporary", x.shape, x.dtype)
        if parameter.name in self.tied and not self.lifetimes.ends_in_loss:
            return Row(parameter.name, "gradient to be added to that of the tied head", "temporary", x.shape, x.dtype)
        return _parameter_gradient_row(parameter.name, x)

    def _accumulate(self, i: int, x: Tensor, number: int) -> None:
        old = self.pending.get(x.number)
        if old is None:
            self.pending[x.number] = number
        elif self.holders[old] == 1 and x.number not in self.shown:
            self._release(number)
        else:
            self.shown.discard(x.number)
            row = Row("", "sum of gradients", "temporary", x.shape, x.dtype)
            self.pending[x.number] = self._allocate(x.bytes, row)
            self._release(old)
            self._release(number)
        if x.number in self.parameter_of and self.first_use[x.number] == i:
            self._finish_parameter(x)

    def _finish_parameter(self, x: Tensor) -> None:
        """The gradient of a parameter is complete: it is handed to the parameter, or added to what is there."""
        name = self.parameter_of[x.number].name
        number = self.pending.pop(x.number)
        if self.holders[number] > 1:
            copied = self._allocate(x.bytes, _parameter_gradient_row(name, x))
            self._release(number)
            number = copied
        elif (
            name not in self.tied and self.blocks[number][2].kind != "gradient"
        ):  # it came through a view of the parameter
            self._rename(number, self.blocks[number][0], _parameter_gradient_row(name, x))
        if name in self.tied:
            if self.lifetimes.ends_in_loss:
                self._rename(number, ("tied", name))
                return
            number = self._add_to_waiting(name, x, number)
        self.added.add(len(self.events))
        self._release(number)

    def _add_to_waiting(self, name: str, x: Tensor, number: int) -> int:
        """The stem's gradient of a shared parameter is added to the head's; the block of the sum."""
        row = _parameter_gradient_row(name, x)
        if not self.tied[name]:
            both = self._allocate(x.bytes, row)
            self._release(number)
            self.events.append(Event(("tied", name), x.bytes, -1, row))
            return both
        self._release(number)
        waits = len(self.blocks)
        self.blocks[waits], self.holders[waits] = (("tied", name), x.bytes, row), 1
        return waits

    def _rename(self, number: int, name: tuple[Any, ...], row: Row | None = None) -> None:
        """Give a block another name, from its allocation on."""
        key, size, old_row = self.blocks[number]
        row = row or old_row
        self.events = [e._replace(key=name, row=row) if e.key == key else e for e in self.events]
        self.blocks[number] = (name, size, row)

    def _hand_on(self) -> None:
        """What is still pending: the gradient of the incoming hidden states goes to the piece before."""
        hidden = self.lifetimes.piece.hidden
        for x, number in list(self.pending.items()):
            if hidden is None or x != hidden.number:
                self._release(number)
            elif self.blocks[number][0] != ("gradient of output",):
                self._rename(number, ("gradient of hidden",), hidden_gradient_row(hidden))


def _parameter_gradient_row(name: str, x: Tensor) -> Row:
    return Row(name, "gradient", "gradient", x.shape, x.dtype)
