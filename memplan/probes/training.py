"""One optimizer step after the other, as the Hugging Face Trainer runs them (transformers/trainer.py, accelerate).

The same loop on every device: with tensors that have no numbers for a trace, with real ones for a probe.  A witness is
told where the step is and what tensors are for.

The inputs of all micro-batches are on the device throughout; for each micro-batch: forward with ``num_items_in_batch``
where the model takes it, the output object is dropped once the loss is taken, backward; then the gradient norm is
clipped, the optimizer updates, gradients are set to None.  Mixed precision wraps the forward pass in autocast and casts
floating-point outputs to fp32.  A trace has no gradient scaler.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from memplan.probes.evaluation import evaluate
from memplan.probes.faults import TraceError
from memplan.probes.inputs import flattened
from memplan.specs.training import PRECISIONS
from memplan.specs.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from memplan.probes.models import Built
    from memplan.probes.smoothing import Smoother
    from memplan.specs.training import Setup

    Region = Callable[[], AbstractContextManager[Any]]
    """Makes the region of autocast around a forward pass."""


LEARNING_RATE = 1e-4
"""Of all steps."""


class Witness(Protocol):
    """Who watches the steps."""

    def begin_step(self) -> None:
        """A step begins."""

    def enter(self, phase: str, step: int, micro_step: int) -> None:
        """A phase of a step begins; the one before it ends."""

    def mark_kept(self) -> None:
        """A forward pass has ended; what it keeps for the backward pass is all that is left of it."""

    def label(self, tensor: torch.Tensor, category: str, module: str, op: str) -> None:
        """What a tensor is for."""


class Objective(Protocol):
    """What a model is trained for, where its own forward pass does not take the loss.

    With an attribute `takes_num_items` that is true, `loss` is given `num_items`, the number of labels in the step.
    """

    def make_inputs(self, micro_batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
        """What the data collator gives, on the default device."""

    @property
    def companion(self) -> nn.Module | None:
        """A frozen model that is in memory, too."""

    @property
    def companion_label(self) -> str:
        """What its modules are listed under."""

    def loss(self, inputs: dict[str, torch.Tensor], autocast: Region, **count: Any) -> torch.Tensor:
        """The loss; the model runs within `autocast`."""


class Loop(NamedTuple):
    """What training loops differ in; the Trainer's choices."""

    update: bool = True
    """Clip and update; without, a step ends after the backward pass."""
    clip: bool = True
    """Clip the gradient norm to 1."""
    keep_outputs: bool = False
    """Keep the model's output object until the end of the step."""
    outputs_to_fp32: bool = True
    """Under autocast, cast the outputs to fp32."""
    count_random_states: bool | None = None
    """Count the two scalars of random state that fused attention keeps; None: for attention "flash" alone."""


class TrainingRun:
    """Training steps of one module."""

    def __init__(
        self,
        built: Built,
        optimizer: Any,
        witness: Witness,
        autocast: Region | None,
        loop: Loop,
        *,
        device: str = "meta",
        module: Any = None,
        scaler: Any = None,
        objective: Objective | None = None,
        smoother: Smoother | None = None,
    ) -> None:
        """`module`: what is called, where that is a wrapper of the model; `scaler`: a torch.amp.GradScaler.

        `objective`: what takes the loss, where the model does not do so itself; `smoother`: the same from what the
        model returns.
        """
        self.objective = objective
        self.smoother = smoother
        self.model: Any = built.module
        self.called: Any = built.module if module is None else module
        self.make_inputs = built.make_inputs
        self.loss_of = built.loss_of
        self.optimizer = optimizer
        self.witness = witness
        self.autocast = autocast
        self.loop = loop
        self.device = device
        self.scaler = scaler
        self.names_tensors = True
        """Whether the witness is told what gradients and states are for: it takes the host some time."""
        self.takes_num_items = (
            accepts_num_items(self.model) if objective is None else getattr(objective, "takes_num_items", False)
        )
        self.updates_in_backward = hasattr(optimizer, "fused_backward")
        """Whether a step consists of a call of ``fused_backward``, as LOMO has it."""
        self._outputs: Any = None

    def step(self, number: int, setup: Setup) -> None:
        """One optimizer step, and after it an evaluation where the setup has one."""
        enter = self.witness.enter
        self.witness.begin_step()
        enter("forward", number, -1)
        inputs = [self.inputs(setup) for _ in range(setup.gradient_accumulation_steps)]
        num_items = (
            self.num_items(setup.tokens_per_micro_batch * setup.gradient_accumulation_steps)
            if self.takes_num_items
            else None
        )
        for micro_step, micro_batch in enumerate(inputs):
            last = micro_step == len(inputs) - 1
            with contextlib.nullcontext() if last or not hasattr(self.called, "no_sync") else self.called.no_sync():
                enter("forward", number, micro_step)
                loss = self._forward(micro_batch, num_items, setup)
                self.witness.mark_kept()
                enter("backward", number, micro_step)
                self._backward(loss if self.scaler is None else self.scaler.scale(loss))
                if not self.loop.keep_outputs:
                    self._outputs = None
            self._name_gradients()
            del loss
        if self.loop.update:
            if self.loop.clip and not self.updates_in_backward:
                enter("clip", number, -1)
                if self.scaler is not None:
                    self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            enter("optimizer", number, -1)
            self._update()
            self._name_states()
        if setup.evaluation is not None:
            self.model.zero_grad(set_to_none=True)
            enter("evaluation", number, -1)
            evaluate(self, setup, setup.evaluation, number)
        enter("zero_grad", number, -1)
        del inputs, micro_batch, num_items
        self._outputs = None
        self.model.zero_grad(set_to_none=True)

    # -- forward -----------------------------------------------------------------------------------------------------

    def inputs(self, setup: Setup) -> Any:
        """One micro-batch."""
        with torch.device(self.device):
            make = self.make_inputs if self.objective is None else self.objective.make_inputs
            inputs = flattened(make, setup) if setup.is_flattened else make(setup.micro_batch_size, setup.seq_len)
        if setup.padding and self.objective is None and "attention_mask" not in inputs:
            inputs["attention_mask"] = padding_mask(inputs["input_ids"])
        if self.smoother is not None:
            inputs = self.smoother.inputs(inputs)
        for name, tensor in _tensors(inputs):
            self.witness.label(tensor, "input", "inputs", name)
        return inputs

    def num_items(self, tokens: int) -> torch.Tensor:
        """How many tokens have a label."""
        num_items = torch.full((), tokens, dtype=torch.int64, device=self.device)
        self.witness.label(num_items, "input", "inputs", "num_items_in_batch")
        return num_items

    def _forward(self, inputs: Any, num_items: torch.Tensor | None, setup: Setup) -> torch.Tensor:
        if self.objective is not None:
            region, count = self.autocast or contextlib.nullcontext, {}
            if self.takes_num_items:
                count["num_items"] = num_items
            loss = self.objective.loss(inputs, region, **count)
            steps = setup.gradient_accumulation_steps
            return loss if steps == 1 or self.takes_num_items else loss / steps
        with self.autocast() if self.autocast else contextlib.nullcontext():
            outputs = self.call(inputs, num_items)
        kept = setup.loss == "full-kept"  # in a loop without accelerate
        if not kept:
            outputs = self.handed_out(outputs)
        loss = self.loss(outputs, inputs, num_items)
        if self.loop.keep_outputs or kept:
            self._outputs = outputs
        accumulation = setup.gradient_accumulation_steps
        return loss if self.takes_num_items or accumulation == 1 else loss / accumulation

    def call(self, inputs: Any, num_items: torch.Tensor | None) -> Any:
        """What the model returns."""
        if isinstance(inputs, dict):
            if self.smoother is not None:
                inputs = {name: x for name, x in inputs.items() if name != "labels"}
            extra = {} if num_items is None else {"num_items_in_batch": num_items}
            return self.called(**inputs, **extra)
        return self.called(*inputs) if isinstance(inputs, (tuple, list)) else self.called(inputs)

    def loss(self, outputs: Any, inputs: Any, num_items: torch.Tensor | None) -> torch.Tensor:
        """The loss of what the model returned."""
        if self.smoother is not None:
            return self.smoother.loss(outputs, inputs["labels"], num_items)
        return find_loss(outputs, self.loss_of)

    def handed_out(self, outputs: Any) -> Any:
        """Outputs of the model as accelerate hands them out: under autocast in fp32."""
        return _to_fp32(outputs) if self.autocast and self.loop.outputs_to_fp32 else outputs

    def _backward(self, loss: torch.Tensor) -> None:
        if self.updates_in_backward:
            self.optimizer.fused_backward(loss, LEARNING_RATE)
        else:
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _update(self) -> None:
        if self.updates_in_backward:
            return
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    # -- names -------------------------------------------------------------------------------------------------------

    def _name_gradients(self) -> None:
        if not self.names_tensors:
            return
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.witness.label(parameter.grad, "gradient", name, "gradient")

    def _name_states(self) -> None:
        if not self.names_tensors:
            return
        for name, parameter in self.model.named_parameters():
            for state, value in self.optimizer.state.get(parameter, {}).items():
                tensor = getattr(value, "ortho_matrix", value)  # GaLore and APOLLO keep projections in objects
                if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                    self.witness.label(tensor, "optimizer_state", name, state)
        for name, value in getattr(self.optimizer, "code_books", {}).items():
            self.witness.label(value, "optimizer_state", "optimizer", f"code book, {name}")


def find_loss(outputs: Any, loss_of: Callable[[Any], Any] | None) -> torch.Tensor:
    """The loss in what a module returned.

    Raises:
        TraceError: there is none that could be differentiated.
    """
    loss = outputs
    if loss_of is not None:
        loss = loss_of(outputs)
    elif isinstance(outputs, dict):
        loss = outputs.get("loss")
    elif not isinstance(outputs, torch.Tensor):
        loss = getattr(outputs, "loss", None)
    cure = "Return it as output.loss or output['loss'], or let the factory return (module, inputs, loss)."
    if not isinstance(loss, torch.Tensor):
        what = f"The loss is a {type(loss).__name__}" if loss is not None else f"A {type(outputs).__name__} has no loss"
        raise TraceError(f"The module has no loss: {what[0].lower()}{what[1:]}.", cure)
    if loss.numel() != 1:
        raise TraceError(f"The module has no loss: its output has the shape {tuple(loss.shape)}.", cure)
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise TraceError("The loss depends on no parameter that is trained.", "Check requires_grad and no_grad().")
    return loss


def accepts_num_items(model: Any) -> bool:
    """Trainer.model_accepts_loss_kwargs: the model's own word, else a **kwargs in its forward; of transformers only."""
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    if not hasattr(model, "gradient_checkpointing_enable"):
        return False
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def padding_mask(ids: torch.Tensor) -> torch.Tensor:
    """An attention mask: every sequence lacks its last token, as transformers drops a mask that hides nothing."""
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    return mask


def outputs_to_fp32(outputs: Any, setup: Setup) -> Any:
    """Outputs of the model as accelerate hands them out under the precision of `setup`."""
    return outputs if PRECISIONS[setup.precision][1] is None else _to_fp32(outputs)


def _to_fp32(outputs: Any) -> Any:
    """What accelerate's convert_outputs_to_fp32 does, for the tensors at the top of the output."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        for name in list(outputs):
            if isinstance(outputs[name], torch.Tensor):
                outputs[name] = _to_fp32(outputs[name])
    elif type(outputs) in {tuple, list}:
        return type(outputs)(_to_fp32(x) if isinstance(x, torch.Tensor) else x for x in outputs)
    return outputs


def _tensors(inputs: Any, name: str = "input") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(inputs, torch.Tensor):
        yield name, inputs
    elif isinstance(inputs, dict):
        for key, value in inputs.items():
            yield from _tensors(value, str(key))
    elif isinstance(inputs, (tuple, list)):
        for n, value in enumerate(inputs):
            yield from _tensors(value, f"{name} {n}")
