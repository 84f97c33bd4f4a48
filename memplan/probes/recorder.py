"""Which storages are born and die while a program runs, and which operator made each of them?

A dispatch mode sees every operator below autograd.  Each storage that an operator creates gets a record and a weak
reference whose callback writes down its death.  Nothing here holds a tensor, so lifetimes are exactly those of the
program.  Only storages on one device are counted: those on the meta device stand for the GPU, and CPU tensors (the step
counters of foreach optimizers) do not; or the CPU's, of a run with numbers.
"""

from __future__ import annotations

import sys
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.probes.events import Span, TraceEvent
from memplan.probes.faults import TraceError
from memplan.probes.results import Operator
from memplan.probes.trail import ModuleTrail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Scratch = Mapping[Any, Callable[..., Sequence[int]]]
    """Operator -> bytes of each buffer that its CUDA kernel allocates and frees again before it returns."""

aten = torch.ops.aten
_storage_use_count = torch._C._storage_Use_Count

WRITTEN_IN_PLACE = {
    aten.index_put.default: aten.index_put_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.scatter_add.default: aten.scatter_add_.default,
}
"""What gradients do in place, and to a copy only where a mode like this one looks on.

``areAnyTensorSubclassLike`` in torch/csrc/autograd/FunctionsManual.cpp and aten/src/ATen/TensorSubclassLikeUtils.h.
"""

ADD, ADD_IN_PLACE = aten.add.Tensor, aten.add_.Tensor
HOLDERS, HOLDERS_OF_STORAGE = 4, 2
"""Of a gradient that only autograd's engine holds, and of its storage, as seen from here."""

ASK_FOR_A_NUMBER = aten._local_scalar_dense.default


SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class StorageRecord:
    """One storage: who made it, how large it is, what it is for."""

    __slots__ = ("category", "dtype", "key", "module", "num_bytes", "op", "shape")

    def __init__(self, key: int, num_bytes: int, op: str, module: str, shape: tuple[int, ...], dtype: str) -> None:
        self.key = key
        self.num_bytes = num_bytes
        self.op = op
        self.module = module
        self.shape = shape
        self.dtype = dtype
        self.category = "temporary"


class _Watch(weakref.ref):  # type: ignore[type-arg]  # the class is generic for type checkers alone
    """A weak reference to a storage that knows where it is listed."""

    __slots__ = ("address",)
    address: int


class StorageRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Records birth and death of every storage made while it is active, span by span."""

    def __init__(
        self,
        scratch: Scratch,
        ignored: Mapping[Any, tuple[int, ...]],
        *,
        has_padding: bool,
        trust: Iterable[str],
        device: str = "meta",
        has_several: bool = False,
    ) -> None:
        """`scratch`: see `Scratch`.

        `ignored`: operator -> outputs that are not counted.
        `has_padding`: what code that asks about its data is told, see `_answer`.
        `trust`: packages whose questions are answered; those of others are errors.
        `has_several`: whether a row holds several sequences, which the same code asks for.
        `device`: whose storages are recorded: "meta" or "cpu".
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.trail = ModuleTrail()
        self.assumptions: dict[str, None] = {}
        self._scratch = scratch
        self._ignored = ignored
        self._has_padding = has_padding
        self._has_several = has_several
        self._trust = tuple(trust)
        self._device = device
        self._operators: dict[int, Operator] = {}
        self._events: list[tuple[StorageRecord, int]] = []
        self._spans: list[tuple[str, int, int, int]] = []
        self._flops: list[int] = []
        self._live: dict[int, tuple[StorageRecord, _Watch]] = {}
        self._left_out: dict[int, _Watch] = {}
        self._num_keys = 0
        self._failure = (0, "", "")
        self.enter("load", -1, -1)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: without this, torch imports its compiler, which takes longer than the trace."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator (or remember what it returns) and list the storages that are new."""
        kwargs = kwargs or {}
        if func is ASK_FOR_A_NUMBER and args[0].is_meta:
            return self._answer(args[0])
        if func in WRITTEN_IN_PLACE and _computes_gradients():
            func = WRITTEN_IN_PLACE[func]
        elif func is ADD and not kwargs and _adds_gradients(*args):
            func = ADD_IN_PLACE
        operator = self._operators.get(id(func))
        if operator is None:
            operator = self._operators[id(func)] = Operator(func)
        try:
            outputs = operator.run(self._on_device(args), kwargs)
        except Exception as error:
            self._failure = (id(error), operator.name, self.trail.current())
            raise
        self._flops[-1] += operator.flops(args, kwargs, outputs)
        self._adopt(operator, outputs)
        scratch = self._scratch.get(func)
        if scratch is not None:
            self._add_scratch(operator.name, scratch(*args, **kwargs))
        return outputs

    def _on_device(self, args: Sequence[Any]) -> Sequence[Any]:
        """Arguments for an operator without numbers: small ones that Python read on the host, as a GPU holds them."""
        if not any(isinstance(x, torch.Tensor) and x.is_meta for x in args):
            return args
        return [x.to("meta") if isinstance(x, torch.Tensor) and x.is_cpu and x.ndim else x for x in args]

    # -- what the run says -------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A step begins."""
        self.trail.forget_graph()

    def enter(self, phase: str, step: int, micro_step: int) -> None:
        """Begin a span; it ends where the next begins."""
        self._spans.append((phase, step, micro_step, len(self._events)))
        self._flops.append(0)

    def label(self, tensor: torch.Tensor, category: str, module: str, op: str) -> None:
        """Say what a storage is for: a parameter, a buffer, a gradient, a state, an input."""
        self._adopt_tensor(op, tensor)  # torch.tensor(...) makes one without an operator
        found = self._live.get(tensor.untyped_storage()._cdata)
        if found is None:  # not on the device, or empty
            return
        record = found[0]
        record.category, record.module, record.op = category, module, op
        record.shape, record.dtype = tuple(tensor.shape), dtype_name(tensor.dtype)

    def drop_dead(self) -> None:
        """Forget what was only there for a moment so far: a model is built elsewhere, then moved to the device."""
        self._events = [(record, +1) for record, _ in self._live.values()]
        for record, _ in self._events:
            if record.category == "temporary":
                record.category = "buffer"

    def mark_kept(self) -> None:
        """Call activations what was made in this span and is alive."""
        alive: dict[int, StorageRecord] = {}
        for record, sign in self._events[self._spans[-1][3] :]:
            if sign > 0:
                alive[record.key] = record
            else:
                alive.pop(record.key, None)
        for record in alive.values():
            if record.category == "temporary":
                record.category = "activation"

    def failure(self, error: BaseException) -> tuple[str, str]:
        """(operator, module) that raised `error`, as far as known."""
        if self._failure[0] == id(error):
            return self._failure[1:]
        return "", self.trail.failed_in(error)

    # -- the answer --------------------------------------------------------------------------------------------------

    def spans(self) -> tuple[Span, ...]:
        """The spans so far."""
        stops = [*(start for *_, start in self._spans[1:]), len(self._events)]
        return tuple(
            Span(phase, step, micro_step, start, stop, flops)
            for (phase, step, micro_step, start), stop, flops in zip(self._spans, stops, self._flops, strict=True)
        )

    def events(self) -> tuple[TraceEvent, ...]:
        """The events so far, with what became known of their storages later."""
        return tuple(
            TraceEvent(
                record.key,
                record.num_bytes,
                sign,
                record.op,
                record.module,
                span.phase,
                span.step,
                span.micro_step,
                record.category,
                record.shape,
                record.dtype,
            )
            for span in self.spans()
            for record, sign in self._events[span.start : span.stop]
        )

    def raw_events(self, start: int) -> list[tuple[int, int]]:
        """(bytes, sign) of the events from number `start` on."""
        return [(record.num_bytes, sign) for record, sign in self._events[start:]]

    # -- storages ----------------------------------------------------------------------------------------------------

    def _adopt(self, operator: Operator, outputs: Any) -> None:
        if isinstance(outputs, torch.Tensor):
            self._adopt_tensor(operator.name, outputs)
        elif isinstance(outputs, (tuple, list)):
            ignored = self._ignored.get(operator.func, ())
            for index, output in enumerate(outputs):
                if not isinstance(output, torch.Tensor):
                    continue
                if index in ignored:
                    self._leave_out(output)
                else:
                    self._adopt_tensor(operator.name, output)

    def _leave_out(self, tensor: torch.Tensor) -> None:
        """Its storage is not counted, whatever shows it later."""
        storage = tensor.untyped_storage()
        watch = _Watch(storage, lambda watch: self._left_out.pop(watch.address))
        watch.address = storage._cdata
        self._left_out[watch.address] = watch

    def _adopt_tensor(self, op: str, tensor: torch.Tensor) -> None:
        if tensor.device.type != self._device:
            if tensor.is_cuda:
                raise TraceError(
                    f"{op} of {self.trail.current()!r} makes a tensor on a GPU.",
                    "Leave the device to memplan: no .cuda() or .to('cuda') in the module.",
                )
            return
        storage = tensor.untyped_storage()
        address, num_bytes = storage._cdata, storage.nbytes()
        if address in self._live or address in self._left_out or not num_bytes:
            return
        record = self._record(num_bytes, op, tuple(tensor.shape), dtype_name(tensor.dtype))
        watch = _Watch(storage, self._on_death)
        watch.address = address
        self._live[address] = (record, watch)
        self._events.append((record, +1))

    def _record(self, num_bytes: int, op: str, shape: tuple[int, ...], dtype: str) -> StorageRecord:
        self._num_keys += 1
        return StorageRecord(self._num_keys, num_bytes, op, self.trail.current(), shape, dtype)

    def _on_death(self, watch: _Watch) -> None:
        record, _ = self._live.pop(watch.address)
        self._events.append((record, -1))

    def _add_scratch(self, op: str, sizes: Sequence[int]) -> None:
        records = [self._record(size, f"scratch of {op}", (size,), "uint8") for size in sizes if size]
        self._events += [(record, +1) for record in records]
        self._events += [(record, -1) for record in reversed(records)]

    # -- questions about data ----------------------------------------------------------------------------------------

    def _answer(self, question: torch.Tensor) -> bool:
        """What the program is told when it looks at data that do not exist.

        The questions that models of transformers ask are "is every token real?" and "is each row one sequence?".  A
        batch without padding and packing answers yes to all() and no to any(); one with either the other way round.
        """
        found = self._live.get(question.untyped_storage()._cdata)
        op = found[0].op if found else "an operator"
        package, where = _asker()
        if question.dtype != torch.bool or package not in self._trust:
            raise TraceError(
                f"{self.trail.current() or 'The training step'!r} asks for the value of {op} ({where}): "
                "it depends on the data.",
                "A trace has shapes but no numbers: keep .item(), if and bool() on tensors out of the training step.",
            )
        answer = (self._has_padding or self._has_several) == op.startswith("aten.any")
        batch = "has padding" if self._has_padding else "has neither padding nor packed sequences"
        batch = "has several sequences in a row" if self._has_several else batch
        self.assumptions[f"{op} in {where} is {answer}: the batch {batch}"] = None
        return answer


def _asker() -> tuple[str, str]:
    """(package, place) of the code that asked: the innermost that is neither torch nor this."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        package = name.split(".")[0]
        if package != "torch" and not name.startswith("memplan.probes."):
            return package, f"line {frame.f_lineno} of {name}"
        frame = frame.f_back
    return "", "an unknown place"


def _computes_gradients() -> bool:
    """Whether autograd runs a backward pass, and not a forward pass once more within it."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def _adds_gradients(first: Any, second: Any) -> bool:
    """Whether autograd's engine adds a gradient to one that nothing else holds: in place, if no mode looks on.

    ``can_accumulate_inplace`` in torch/csrc/autograd/input_buffer.cpp; ``isTensorSubclassLike`` is what a mode answers.
    """
    if not _computes_gradients() or sys._getframe(2).f_code.co_name != "_engine_run_backward":
        return False
    alone = first._use_count() == HOLDERS and _storage_use_count(first.untyped_storage()._cdata) == HOLDERS_OF_STORAGE
    return alone and (first.shape, first.dtype) == (second.shape, second.dtype) and first.is_contiguous()


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in memplan."""
    name = str(dtype).removeprefix("torch.")
    return SHORT_NAMES.get(name, name)
