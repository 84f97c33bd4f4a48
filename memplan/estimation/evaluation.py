"""How many bytes does an evaluation take between two steps of training?

As transformers' Trainer runs it (5.23, trainer.py: ``evaluation_loop``, ``prediction_step``; trainer_pt_utils.py:
``EvalLoopContainer``, ``nested_concat``, ``nested_numpify``): parameters, optimizer states and the inputs of the step
are there, gradients are not.  A batch goes through the model in evaluation mode under ``torch.no_grad``, so that a
tensor lives until its last use.

Where the logits are kept for metrics, those of a batch are concatenated to those of all batches before it, which for
a moment takes twice what there is:

    r sequences at the concatenation     2 r s V e          V words, s tokens, e bytes a number
    n batches of b, the next in forward  n b s V e, and the last batch once more (a variable of the loop) from n = 2 on

They move to the host at the end, or after every `accumulation` batches.  Under autocast accelerate hands them out in
fp32; on the host bf16 becomes fp32, as NumPy has none.

Left out: ``eval_do_concat_batches=False``, ``batch_eval_metrics`` and ``preprocess_logits_for_metrics``, which all
save the concatenation or the logits; what `compute_metrics` itself makes.  Where the loss alone is kept,
that of one batch is counted: 4 bytes a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import UsageError
from memplan.estimation.dimensions import dimensions
from memplan.estimation.step import EVALUATION, GENERATION
from memplan.memory.events import Row, Sizes
from memplan.memory.model_states import Tensors
from memplan.operators.sizes import BYTES_PER_ELEMENT, Size, bind, num_bytes
from memplan.specs.training import PRECISIONS
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.architectures.architecture import Recording
    from memplan.estimation.generation import Generation, Stage
    from memplan.estimation.step import Layout, StepProgram
    from memplan.operators.tape import Tensor
    from memplan.specs.evaluation import Evaluation
    from memplan.specs.training import Setup

CONTAINER_SOURCE = "results of all batches so far (EvalLoopContainer in transformers/trainer_pt_utils.py)"
VARIABLE_SOURCE = "results of the last batch, a variable of evaluation_loop (transformers/trainer.py)"


GENERATED_SOURCE = "a variable of prediction_step (transformers/trainer_seq2seq.py)"


class Result(NamedTuple):
    """What is kept of every sequence."""

    name: str
    size: Size
    """Bytes of one sequence."""
    dtype: str


LOSSES = Result("losses", Size(4), "fp32")


class High(NamedTuple):
    """A high point of an evaluation."""

    held: Tensors
    """What is there beside parameters, states and the inputs of the step."""
    batch: int
    """Sequences in the forward pass that runs; 0: none does, results are concatenated."""
    stage: Stage | None = None
    """Of a generation; None: none runs."""


class EvaluationProgram:
    """An evaluation between the steps of one program."""

    def __init__(
        self,
        program: StepProgram,
        layout: Layout,
        setup: Setup,
        evaluation: Evaluation,
        generation: Generation | None = None,
    ) -> None:
        """`layout`: the forward pass in evaluation mode; `generation`: what runs before it for every batch."""
        self.generation = generation
        self.program = program
        self.layout = layout
        self.setup = setup
        self.evaluation = evaluation

    def sizes(self, batch: int) -> Sizes:
        """Bytes of everything in a batch of so many sequences."""
        if self.setup.is_flattened:
            return Sizes(dimensions(self.setup, batch))
        return Sizes(bind(batch, self.setup.seq_len, self.setup.supervised))

    def peak(self, training_sizes: Sizes) -> int:
        """Highest number of allocated bytes."""
        return max(self.peaks(training_sizes).values())

    def least(self, training_sizes: Sizes) -> int:
        """What the loop itself holds at its highest, beside what is there all the time: no model runs."""
        steps = self.setup.gradient_accumulation_steps
        base = sum(x.total(training_sizes) for x in self.program.resident(steps, with_states=True))
        return int(base + max(high.held.total(self.sizes(high.batch or 1)) for high in self._highs()))

    def peaks(self, training_sizes: Sizes) -> dict[str, int]:
        """The same of the evaluation, and of what it generates."""
        steps = self.setup.gradient_accumulation_steps
        base = sum(x.total(training_sizes) for x in self.program.resident(steps, with_states=True))
        found: dict[str, int] = {}
        for high in self._all_highs():
            instant = EVALUATION if high.stage is None else GENERATION
            found[instant] = max(found.get(instant, 0), int(base + self._height(high)))
        return found

    def high(self) -> High:
        """The highest point."""
        return max(self._all_highs(), key=self._height)

    def height(self) -> int:
        """The highest point above parameters, states and the inputs of the step."""
        return self._height(self.high())

    def _all_highs(self) -> Iterator[High]:
        """Candidates; before each forward pass of an evaluation the generation of its batch."""
        for high in self._highs():
            yield high
            if self.generation is not None and high.batch:
                for stage in self.generation.stages(high.batch):
                    yield high._replace(stage=stage)

    def _height(self, high: High) -> int:
        sizes = self.sizes(high.batch or 1)
        held = high.held.total(sizes)
        if not high.batch:
            return held
        there = held + self.inputs_of_high(high).total(sizes)
        if high.stage is not None:
            stage = high.stage
            return there + stage.held.total(stage.sizes) + self._forward_peak(stage.layout, stage.sizes)
        return there + self._forward_peak(self.layout, sizes)

    @staticmethod
    def _forward_peak(layout: Layout, sizes: Sizes) -> int:
        live = highest = 0
        for part in layout.forward:
            whole = sizes.extent(part.segment).repeated(len(part.places))
            highest = max(highest, live + whole.peak)
            live += whole.net
        return highest

    def inputs(self) -> Tensors:
        """Ids and labels of one batch."""
        return inputs_of(self.layout.recording)

    def inputs_of_high(self, high: High) -> Tensors:
        """What is of one batch at a high point: the number of labels comes once its tokens have been generated."""
        rows = self.inputs().rows
        if high.stage is not None:
            return Tensors(tuple(row for row in rows if row[0].shape))
        if self.evaluation.generate is None:
            return Tensors(rows)
        size = self.generated().size
        size = Size(size.factor, ("b", *size.dims))
        row = Row(EVALUATION, "generated tokens", "temporary", size.dims, "int64", GENERATED_SOURCE)
        return Tensors((*rows, (row, size, 1)))

    def generated(self) -> Result:
        """Prompt and generated tokens of one sequence."""
        length = self.setup.seq_len + (self.evaluation.generate or 0)
        return Result("generated tokens", num_bytes((length,), "int64"), "int64")

    # -- what is kept of the batches ---------------------------------------------------------------------------------

    def _highs(self) -> Iterator[High]:
        """Candidates for the highest point."""
        batch, samples = self.evaluation.batch, self.evaluation.samples
        if samples is None:
            yield High(Tensors((_row(LOSSES, batch, CONTAINER_SOURCE),)), batch)
            return
        whole, rest = divmod(samples, batch)
        most = self.evaluation.accumulation or whole + 1  # batches until they move to the host
        runs = [(min(whole, most), batch), (whole % most + 1, rest)]  # (number of a batch since they did, its size)
        for number, size in runs:
            if number and size:
                yield High(self._held(number - 1, batch), size)
                if number > 1:
                    yield High(self._concatenated((number - 1) * batch, size), 0)

    def _held(self, num: int, batch: int) -> Tensors:
        """Results of `num` whole batches while the next one runs."""
        rows = []
        for one in self.results():
            if num:
                rows.append(_row(one, num * batch, CONTAINER_SOURCE))
            if num > 1:
                rows.append(_row(one, batch, VARIABLE_SOURCE))
        return Tensors(tuple(rows))

    def _concatenated(self, before: int, last: int) -> Tensors:
        """Logits of `before` sequences, of the last batch and of both in one; losses are done, labels are not."""
        losses, logits, labels = self.results()
        sizes = [
            _row(losses, before + last, CONTAINER_SOURCE),
            _row(losses, last, VARIABLE_SOURCE),
            _row(logits, before + last, "the next container (torch.cat in transformers/trainer_pt_utils.py)"),
            _row(logits, before, CONTAINER_SOURCE),
            _row(logits, last, VARIABLE_SOURCE),
            _row(labels, before, CONTAINER_SOURCE),
            *((row, Size(size.factor * last, ("s",)), 1) for row, size in self._input_rows()),
        ]
        return Tensors(tuple(sizes))

    def _input_rows(self) -> Iterator[tuple[Row, Size]]:
        """Inputs of one sequence."""
        for row, size, _ in self.inputs().rows:
            if "b" in size.dims:
                yield row, Size(size.factor, tuple(d for d in size.dims if d != "b"))

    def results(self) -> tuple[Result, Result, Result]:
        """Losses, logits and labels of one sequence.

        Raises:
            UsageError: the model returns no logits.
        """
        labels = Result("labels", num_bytes(("s",), "int64"), "int64")
        if self.evaluation.generate is not None:
            return LOSSES, self.generated(), labels
        logits = logits_of(self.layout.recording)
        low = PRECISIONS[self.setup.precision][1]
        dtype = logits.dtype if low is None else "fp32"
        words = logits.shape[-1]
        assert isinstance(words, int)
        return (
            LOSSES,
            Result("logits", num_bytes(("s", words), dtype), dtype),
            labels,
        )

    def host_bytes(self) -> int:
        """Highest number of bytes of logits on the host; 0 where none are kept.

        Copies of bf16 are there for a moment beside the fp32 that they become; arrays of NumPy are concatenated, too.
        """
        samples, batch = self.evaluation.samples, self.evaluation.batch
        if samples is None or not self.evaluation.keeps_logits:
            return 0
        logits = self.results()[1]
        num = logits.size.value({"s": self.setup.seq_len}) // BYTES_PER_ELEMENT[logits.dtype]
        on_host = 4 if logits.dtype == "bf16" else BYTES_PER_ELEMENT[logits.dtype]
        window = batch * (self.evaluation.accumulation or -(-samples // batch))
        if samples <= window:
            passing = 2 if logits.dtype == "bf16" else 0
            return int(samples * num * (on_host + passing))
        return int(2 * samples * num * on_host)


def _row(result: Result, num: int, source: str) -> tuple[Row, Size, int]:
    size = Size(result.size.factor * num, result.size.dims)
    each = result.size.factor // BYTES_PER_ELEMENT[result.dtype]
    shape = (num, *result.size.dims, *((each,) if each > 1 else ()))
    return Row(EVALUATION, result.name, "temporary", shape, result.dtype, source), size, 1


def inputs_of(recording: Recording) -> Tensors:
    """What one batch brings along."""
    seen = {s.name: s for piece in recording.pieces() for s in piece.tape.storages if s.role == "input"}
    return Tensors(tuple((Row("inputs", s.name, "input", s.shape, s.dtype), s.size, 1) for s in seen.values()))


def logits_of(recording: Recording) -> Tensor:
    """What the model returns beside the loss.

    Raises:
        UsageError: it returns none.
    """
    vocab = recording.architecture.vocab_size
    for op in recording.head.tape.ops:
        if op.module.startswith("loss"):
            for x in op.inputs:
                if x.shape[-1:] == (vocab,):
                    return x
    raise UsageError(
        f"{recording.architecture.model_type} returns no logits that an evaluation could keep.",
        "Leave --eval-samples out.",
    )
