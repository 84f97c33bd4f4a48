"""An evaluation as calls of the allocator, in the order in which the Trainer makes and drops its tensors.

A batch's inputs come while the variables of the loop still hold those of the batch before; its forward pass runs; of
its results, one after the other goes into the container of its kind, and the old container goes (``evaluation_loop`` in
transformers/trainer.py, ``EvalLoopContainer`` in transformers/trainer_pt_utils.py).

Of a generation, which comes before the forward pass of its batch, the prefill and two steps are replayed (`Stage`): the
first, and the last.

All batches are replayed where there are few; of many, those in the middle begin with the head: what runs before it
under ``torch.no_grad`` leaves nothing behind, and takes the blocks that the batch before has freed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.estimation.evaluation import LOSSES, logits_of
from memplan.estimation.step import HEAD
from memplan.estimation.unrolling import Unrolling
from memplan.operators.sizes import Size, num_bytes

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from memplan.estimation.evaluation import EvaluationProgram, Result
    from memplan.estimation.generation import Stage
    from memplan.estimation.unrolling import Call, Keys
    from memplan.memory.events import Sizes

FIRST_KEY, GENERATION_KEY = 1 << 48, 1 << 49
"""Above all keys of a step."""

MOST_WHOLE = 16
"""So many batches at most are replayed from their first operator on."""


def evaluation_calls(program: EvaluationProgram, keys: Keys) -> Iterator[Call]:
    """(key, bytes, +1 or -1) of every call of one evaluation, which leaves nothing behind."""
    return _Evaluation(program, keys).run()


class _Evaluation:
    """One evaluation under way."""

    def __init__(self, program: EvaluationProgram, keys: Keys) -> None:
        self.program = program
        self.keys = keys
        self.keeps = program.evaluation.samples is not None
        self.kinds = program.results() if self.keeps else (LOSSES,)
        self.unrollings: dict[int, Unrolling] = {}
        self.stages: dict[int, list[tuple[Stage, Unrolling]]] = {}
        self.held: dict[str, tuple[int, ...]] = {}
        """The tensors that each variable of the loop and each container holds."""
        self.num_kept = 0
        """Sequences whose results are in the containers."""

    def run(self) -> Iterator[Call]:
        """All batches; where the loss alone is kept, the first two: later ones do what the second does."""
        evaluation = self.program.evaluation
        samples = 2 * evaluation.batch if evaluation.samples is None else evaluation.samples
        num = -(-samples // evaluation.batch)
        for number in range(num):
            size = min(evaluation.batch, samples - number * evaluation.batch)
            yield from self._batch(size, whole=num <= MOST_WHOLE or not 2 <= number < num - 2)
            if evaluation.accumulation is not None and (number + 1) % evaluation.accumulation == 0:
                yield from self._all_released()
        yield from self._all_released()

    def _batch(self, size: int, *, whole: bool) -> Iterator[Call]:
        unrolling = self._unrolling(size)
        rows = self.program.inputs().rows
        brought = [(row, (self.keys.new(), unrolling.sizes[row_size], 1)) for row, row_size, _ in rows]
        scalars = [call for row, call in brought if not row.shape]
        inputs = {row.tensor: call for row, call in brought if row.shape}
        yield from inputs.values()
        yield from self._bind("inputs", *(call[0] for call in inputs.values()))
        tokens = yield from self._generated(size)
        yield from scalars
        logits = yield from self._forward(unrolling, whole=whole)
        losses = self.keys.new()
        yield losses, _bytes(LOSSES, size, unrolling.sizes), 1
        for key, _, _ in scalars:
            yield key, 0, -1
        kept = logits if tokens is None else tokens
        results = (losses, *((kept, inputs["labels"][0]) if self.keeps else ()))
        if tokens is not None and not self.keeps:
            yield tokens, 0, -1
        yield from self._bind("results", *results)
        for kind, key in zip(self.kinds, results, strict=True):
            yield from self._add(kind, key, size, unrolling.sizes)
        self.num_kept += size

    def _unrolling(self, size: int) -> Unrolling:
        if size not in self.unrollings:
            self.unrollings[size] = Unrolling(self.program.layout, self.program.sizes(size), first_key=FIRST_KEY)
        return self.unrollings[size]

    def _generated(self, size: int) -> Generator[Call, None, int | None]:
        """What is generated behind one batch; gives the key of its tokens, None where nothing is."""
        generation = self.program.generation
        if generation is None:
            return None
        if size not in self.stages:
            stages = generation.stages(size)
            self.stages[size] = [(x, Unrolling(x.layout, x.sizes, first_key=GENERATION_KEY)) for x in stages]
        for stage, unrolling in self.stages[size]:
            yield from self._stage(stage, unrolling)
        tokens = self.keys.new()
        yield tokens, _bytes(self.program.generated(), size, self._unrolling(size).sizes), 1
        return tokens

    def _stage(self, stage: Stage, unrolling: Unrolling) -> Iterator[Call]:
        """A forward pass of a generation, after which nothing is left."""
        taken, back = self.keys.take(stage.variables, stage.sizes)
        yield from taken
        alive: dict[int, None] = {}
        for key, size, sign in (*_cached(stage, unrolling), *unrolling.parts(stage.layout.forward)):
            if sign > 0 and size:
                alive[key] = None
                yield key, size, sign
            elif sign < 0 and key in alive:
                del alive[key]
                yield key, size, sign
        for key in alive:
            yield key, 0, -1
        yield from back

    def _forward(self, unrolling: Unrolling, *, whole: bool) -> Generator[Call, None, int]:
        """A forward pass, of which the logits are left where they are kept; gives their key."""
        logits = logits_of(self.program.layout.recording) if self.program.evaluation.keeps_logits else None
        leaving = None if logits is None else unrolling.key(HEAD, logits.storage)
        left = self.keys.new()
        parts = self.program.layout.forward
        alive: dict[int, None] = {}
        for key, size, sign in unrolling.parts(parts if whole else [part for part in parts if part.places == (HEAD,)]):
            if key == leaving:
                if sign > 0:
                    yield left, size, sign
            elif sign > 0:
                alive[key] = None
                yield key, size, sign
            elif key in alive:
                del alive[key]
                yield key, size, sign
        handed_out = self.program.results()[1].dtype if logits is not None else ""
        if logits is not None and logits.dtype != handed_out:  # accelerate casts them under autocast
            low, left = left, self.keys.new()
            yield left, unrolling.sizes[num_bytes(logits.shape, handed_out)], 1
            yield low, 0, -1
        for key in alive:
            yield key, 0, -1
        return left

    def _add(self, kind: Result, key: int, size: int, sizes: Sizes) -> Iterator[Call]:
        """What one more batch gave goes into its container."""
        if kind.name in self.held:
            together = self.keys.new()
            yield together, _bytes(kind, self.num_kept + size, sizes), 1
            key = together
        yield from self._bind(kind.name, key)

    def _bind(self, holder: str, *keys: int) -> Iterator[Call]:
        """`holder` holds these tensors from now on; what it alone held goes."""
        before = self.held.pop(holder, ())
        if keys:
            self.held[holder] = keys
        held = {key for some in self.held.values() for key in some}
        for key in before:
            if key not in held:
                yield key, 0, -1

    def _all_released(self) -> Iterator[Call]:
        """The containers move to the host, and the variables of the loop go."""
        for holder in tuple(self.held):
            yield from self._bind(holder)
        self.num_kept = 0


def _cached(stage: Stage, unrolling: Unrolling) -> Iterator[Call]:
    """What the cache has before the stage."""
    recording = stage.layout.recording
    for place, kind in enumerate(recording.order):
        for s in recording.kinds[kind].tape.storages:
            if s.role == "cache":
                yield unrolling.key(place, s.number), stage.sizes[s.size], 1


def _bytes(result: Result, num: int, sizes: Sizes) -> int:
    """Of the results of so many sequences."""
    return int(sizes[Size(result.size.factor * num, result.size.dims)])
