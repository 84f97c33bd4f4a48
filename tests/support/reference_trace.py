"""What does a training step of a real Hugging Face model allocate, byte for byte?

The reference that memplan's formulas are compared with. The model of the installed transformers library is built on
the meta device, whole training steps run on it as the Hugging Face Trainer runs them, and birth and death of every
storage are recorded as CUDA would allocate them (storage_recorder, cuda_semantics). No number is computed, so a model
of eight billion parameters takes seconds.

The step (transformers/trainer.py, accelerate): the inputs of all micro-batches are on the device throughout; for each
micro-batch, forward with `num_items_in_batch`, the output object is dropped once the loss is taken, backward; then the
gradient norm is clipped, the optimizer updates, gradients are set to None. Mixed precision wraps the forward pass in
autocast and casts the model's floating-point outputs to fp32.

Not modelled: CUDA context, cuBLAS workspaces, fragmentation, scratch memory inside kernels other than attention's (see
cuda_semantics), a GradScaler, models whose inputs are not token ids. Where a model looks at its data (is there padding?
are sequences packed?) the answer is that of a batch without padding and packing, unless `padding=True`.

    python -m tests.support.reference_trace CONFIG.json --batch 1 --seq 4096 --precision bf16 --layers 2 --rows
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import inspect
import json
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import torch
from torch import nn

from tests.support.cuda_semantics import SDPA_RANDOM_STATES, TRANSIENT_BYTES, CudaAutocast, cuda_semantics
from tests.support.storage_recorder import Peak, StorageRecord, StorageRecorder, round_to_block

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Precision = Literal["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"]
Attention = Literal["eager", "sdpa", "flash"]
Checkpointing = str
Optimizer = Literal["adamw-foreach", "adamw-fused", "adamw-forloop", "sgd", "sgd-momentum"]

PARAMETER_DTYPE = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bf16-mixed": torch.float32,
    "fp16-mixed": torch.float32,
}
AUTOCAST_DTYPE = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}
FLASH_NAME = "maskless_kernel"
"""Under this name transformers finds our flash attention; "flash" in it would make it look for a package."""
PHASES = ("forward", "backward", "clip", "optimizer_step")


@dataclass(frozen=True, kw_only=True)
class StorageRow:
    """Equal storages, counted together."""

    module: str
    """Path of the module whose forward or backward pass made them; for parameters and gradients, the parameter."""
    op: str
    """The operator that made them, or "parameter", "buffer", "input"."""
    shape: tuple[int, ...]
    dtype: str
    count: int
    num_bytes: int
    """All of them together, not rounded."""


@dataclass(frozen=True, kw_only=True)
class ReferenceStep:
    """What a training step allocates."""

    num_parameters: int
    parameter_bytes: int
    buffer_bytes: int
    kept_activation_bytes: int
    """Alive between the end of the forward pass (loss included) and the start of the backward pass, less what was alive
    before the forward pass. Not rounded."""
    kept_allocated_bytes: int
    """The same with every storage rounded up to 512 bytes, as allocated."""
    kept_rows: tuple[StorageRow, ...]
    """The storages behind `kept_activation_bytes`, in the order of their birth, one row each."""
    phase_peaks: dict[str, int]
    """Peak of allocated bytes during forward, backward, clip and optimizer_step of the last step."""
    first_step_phase_peaks: dict[str, int]
    resident_bytes: int
    """Allocated after the last step: parameters, buffers, optimizer states."""
    peak_allocated_bytes: int
    """The highest of `phase_peaks`: the steady state, if at least two steps were run."""
    first_step_peak_allocated_bytes: int
    peak_phase: str
    peak_op: str
    """The operator running at the peak of the last step."""
    peak_module: str
    peak_transient_bytes: int
    """Bytes at the peak that live only inside the kernel of `peak_op`."""
    peak_rows: tuple[StorageRow, ...]
    """The storages alive at the peak of the last step, largest first."""


def trace_step(  # noqa: PLR0913 - one keyword for each choice of a run
    config: dict[str, Any],
    *,
    batch: int,
    seq: int,
    precision: Precision = "bf16",
    attention: Attention = "sdpa",
    checkpointing: Checkpointing = "none",
    optimizer: Optimizer | None = "adamw-foreach",
    accumulation: int = 1,
    steps: int = 2,
    num_layers: int | None = None,
    keep_outputs: bool = False,
    clip: bool = True,
    padding: bool = False,
    outputs_to_fp32: bool = True,
    auto_class: str = "AutoModelForCausalLM",
    sdpa_kernel: str | None = None,
    count_random_states: bool | None = None,
) -> ReferenceStep:
    """Run `steps` training steps of the model that `config` (a config.json) describes and report what they allocate.

    Args:
        config: The content of a Hugging Face config.json.
        batch: Sequences per micro-batch.
        seq: Tokens per sequence.
        precision: Data type of the parameters; "-mixed" means fp32 parameters under autocast.
        attention: "flash" is the flash-attention kernel without any materialised mask.
        checkpointing: "none", "full" or "every-N" (`every_n_layers=N`).
        optimizer: None skips clipping and update.
        accumulation: Micro-batches per step.
        steps: Optimizer steps; optimizer states exist from the second step's start.
        num_layers: Overrides the number of layers in the config.
        keep_outputs: Keep the model's output object (the logits) alive until the end of the step.
        clip: Clip the gradient norm to 1.0.
        padding: Pass an attention mask, and let it have padding, so that the model must build its masks.
        outputs_to_fp32: Under autocast, cast the model's outputs to fp32 as accelerate does; a plain loop does not.
        auto_class: The auto class that builds the model, for example "AutoModelForMaskedLM".
        sdpa_kernel: Overrules the attention kernel that CUDA would choose: "flash", "efficient" or "math".
        count_random_states: Count the two scalars of random state that a fused attention kernel keeps; by default only
            for attention="flash".
    """
    if attention == "flash" and precision == "fp32":
        raise ValueError("flash attention has no fp32 kernel: choose attention='sdpa' or another precision")
    autocast = CudaAutocast(AUTOCAST_DTYPE[precision]) if precision in AUTOCAST_DTYPE else None
    count_random_states = attention == "flash" if count_random_states is None else count_random_states
    ignored = None if count_random_states else _is_random_state
    recorder = StorageRecorder(TRANSIENT_BYTES, ignored=ignored, all_holds=not padding)
    with recorder:
        model = _build_model(config, precision, attention, num_layers, auto_class)
        _label_model(recorder, model)
        _enable_checkpointing(model, checkpointing, autocast)
        run = _Run(
            model=model,
            recorder=recorder,
            autocast=autocast,
            optimizer=_build_optimizer(model, optimizer),
            keep_outputs=keep_outputs,
            clip=clip,
            padding=padding,
            outputs_to_fp32=outputs_to_fp32,
        )
        with cuda_semantics(autocast=autocast, sdpa_kernel=sdpa_kernel), _named_calls(recorder):
            for _ in range(steps):
                run.step(batch, seq, accumulation)
    return _summarise(model, recorder, run)


def kept_bytes_per_layer(config: dict[str, Any], *, layers: int = 2, **settings: Any) -> int:
    """Bytes that layer number `layers` keeps: the difference of kept bytes between a model with it and one without."""
    settings = {**settings, "steps": 1, "optimizer": None}
    more, fewer = (trace_step(config, num_layers=n, **settings) for n in (layers + 1, layers))
    return more.kept_activation_bytes - fewer.kept_activation_bytes


# --- the model -------------------------------------------------------------------------------------------------------


def _build_model(
    config: dict[str, Any], precision: Precision, attention: Attention, num_layers: int | None, auto_class: str
) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    settings = _with_layers(dict(config), num_layers)
    hf_config = transformers.AutoConfig.for_model(**settings)
    hf_config.use_cache = False  # TrainingArguments.use_cache
    implementation = _register_flash() if attention == "flash" else attention
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = getattr(transformers, auto_class).from_config(
            hf_config, dtype=PARAMETER_DTYPE[precision], attn_implementation=implementation
        )
    return model.train()


def _with_layers(config: dict[str, Any], num_layers: int | None) -> dict[str, Any]:
    """The config with `num_layers` layers, under whatever name this kind of model counts them."""
    if num_layers is None:
        return config
    from transformers import CONFIG_MAPPING

    names = CONFIG_MAPPING[config["model_type"]].attribute_map
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": _with_layers(dict(config["text_config"]), num_layers)}
    config[names.get("num_hidden_layers", "num_hidden_layers")] = num_layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:num_layers]
    return config


def _register_flash() -> str:
    """An attention implementation that runs the flash kernel and asks for no mask, as flash_attention_2 does."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def no_mask(*_: Any, **__: Any) -> None:
        return None

    def flash(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=bool(causal), scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(FLASH_NAME, flash)
    AttentionMaskInterface.register(FLASH_NAME, no_mask)
    return FLASH_NAME


def _is_random_state(func: Any, index: int) -> bool:
    return index in SDPA_RANDOM_STATES.get(func, ())


def _label_model(recorder: StorageRecorder, model: nn.Module) -> None:
    """Name the storages of parameters and buffers after them."""
    gc.collect()
    recorder.trail.describe(model)
    for name, buffer in model.named_buffers():
        recorder.relabel(buffer, name, "buffer")
    for name, parameter in model.named_parameters():
        recorder.relabel(parameter, name, "parameter")


def _enable_checkpointing(model: Any, checkpointing: Checkpointing, autocast: CudaAutocast | None) -> None:
    if checkpointing == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False}  # what activation_checkpointing_enable() itself defaults to
    if autocast is not None:
        region = autocast.region
        kwargs["context_fn"] = lambda: (contextlib.nullcontext(), region())
    every = 1 if checkpointing == "full" else int(checkpointing.removeprefix("every-"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable(kwargs, **({"every_n_layers": every} if every > 1 else {}))


def _build_optimizer(model: nn.Module, name: Optimizer | None) -> torch.optim.Optimizer | None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name is None:
        return None
    if name == "adamw-fused":
        return FusedAdamWAllocations(parameters)
    if name.startswith("adamw"):
        return torch.optim.AdamW(parameters, lr=1e-4, foreach=name == "adamw-foreach")
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9 if name == "sgd-momentum" else 0.0, foreach=True)


class FusedAdamWAllocations(torch.optim.Optimizer):
    """What torch.optim.AdamW(fused=True) allocates: two moments and a step counter on the device, no temporaries."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the states of parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or self.state[parameter]:
                    continue
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@contextlib.contextmanager
def _named_calls(recorder: StorageRecorder) -> Iterator[None]:
    """Let the recorder know which module is running."""
    trail, call = recorder.trail, nn.Module.__call__

    def named_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        trail.enter(module)
        try:
            return call(module, *args, **kwargs)
        finally:
            trail.leave()

    with mock.patch.object(nn.Module, "__call__", named_call):
        yield


# --- the step --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Run:
    """Training steps of one model, with the peaks of each phase and what the last forward pass kept."""

    model: Any
    recorder: StorageRecorder
    autocast: CudaAutocast | None
    optimizer: torch.optim.Optimizer | None
    keep_outputs: bool
    clip: bool
    padding: bool
    outputs_to_fp32: bool
    outputs: Any = None
    kept: list[StorageRecord] = field(default_factory=list)
    peaks: list[dict[str, Peak]] = field(default_factory=list)

    def step(self, batch: int, seq: int, accumulation: int) -> None:
        """One optimizer step."""
        self.recorder.trail.forget_steps()
        self.peaks.append({})
        inputs = [self._inputs(batch, seq) for _ in range(accumulation)]
        num_items = self._labelled(torch.empty((), dtype=torch.int64, device="meta"), "num_items_in_batch")
        for micro_batch in inputs:
            self._micro_step(micro_batch, num_items, accumulation)
        if self.optimizer is not None:
            if self.clip:
                with self._phase("clip"):
                    nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            with self._phase("optimizer_step"):
                self.optimizer.step()
            self._name_optimizer_states(self.optimizer)
        del inputs, micro_batch, num_items
        self.outputs = None
        self.model.zero_grad(set_to_none=True)

    def _micro_step(self, inputs: dict[str, torch.Tensor], num_items: torch.Tensor, accumulation: int) -> None:
        before = {id(record) for record in self.recorder.live_records()}
        with self._phase("forward"):
            loss = self._forward(inputs, num_items, accumulation)
        self.kept = [record for record in self.recorder.live_records() if id(record) not in before]
        with self._phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.recorder.relabel(parameter.grad, name, "gradient")

    def _name_optimizer_states(self, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in self.model.named_parameters():
            for state, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.device.type == "meta":
                    self.recorder.relabel(value, name, state)

    def _forward(self, inputs: dict[str, torch.Tensor], num_items: torch.Tensor, accumulation: int) -> torch.Tensor:
        takes_num_items = _accepts_num_items(self.model)
        arguments = {**inputs, "num_items_in_batch": num_items} if takes_num_items else inputs
        with self.autocast.region() if self.autocast else contextlib.nullcontext():
            outputs = self.model(**arguments)
        if self.autocast and self.outputs_to_fp32:
            _convert_to_fp32(outputs)
        loss: torch.Tensor = outputs["loss"]
        if self.keep_outputs:
            self.outputs = outputs
        if not takes_num_items and accumulation > 1:
            loss = loss / accumulation
        return loss

    def _inputs(self, batch: int, seq: int) -> dict[str, torch.Tensor]:
        names = ("input_ids", "labels", "attention_mask") if self.padding else ("input_ids", "labels")
        return {n: self._labelled(torch.empty((batch, seq), dtype=torch.int64, device="meta"), n) for n in names}

    def _labelled(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        self.recorder.relabel(tensor, name, "input")
        return tensor

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        with self.recorder.phase(name) as peak:
            yield
        best = self.peaks[-1].get(name)
        if best is None or peak.allocated_bytes > best.allocated_bytes:
            self.peaks[-1][name] = peak


def _convert_to_fp32(outputs: Any) -> None:
    """What accelerate's convert_outputs_to_fp32 does, for the tensors at the top of the output object."""
    for name in outputs:
        if isinstance(outputs[name], torch.Tensor) and outputs[name].is_floating_point():
            outputs[name] = outputs[name].float()


def _accepts_num_items(model: Any) -> bool:
    """Trainer.model_accepts_loss_kwargs: the model's own word, else a **kwargs in its forward."""
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


# --- the answer ------------------------------------------------------------------------------------------------------


def _summarise(model: nn.Module, recorder: StorageRecorder, run: _Run) -> ReferenceStep:
    first, last = run.peaks[0], run.peaks[-1]
    peak = max(last.values(), key=lambda p: p.allocated_bytes)
    alive = [record for record in recorder.records if record.is_alive_at(peak.time)]
    parameters, buffers = list(model.parameters()), list(model.buffers())
    return ReferenceStep(
        num_parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        buffer_bytes=sum(b.numel() * b.element_size() for b in buffers),
        kept_activation_bytes=sum(record.num_bytes for record in run.kept),
        kept_allocated_bytes=sum(round_to_block(record.num_bytes) for record in run.kept),
        kept_rows=tuple(row for record in run.kept for row in _rows([record])),
        phase_peaks={name: p.allocated_bytes for name, p in last.items()},
        first_step_phase_peaks={name: p.allocated_bytes for name, p in first.items()},
        resident_bytes=recorder.allocated_bytes,
        peak_allocated_bytes=peak.allocated_bytes,
        first_step_peak_allocated_bytes=max(p.allocated_bytes for p in first.values()),
        peak_phase=peak.phase,
        peak_op=peak.op,
        peak_module=peak.module,
        peak_transient_bytes=peak.transient_bytes,
        peak_rows=tuple(sorted(_rows(alive), key=lambda row: -row.num_bytes)),
    )


def _rows(records: Iterable[StorageRecord]) -> list[StorageRow]:
    groups = Counter((r.module, r.op, r.shape, r.dtype, r.num_bytes) for r in records)
    return [
        StorageRow(module=module, op=op, shape=shape, dtype=dtype, count=count, num_bytes=num_bytes * count)
        for (module, op, shape, dtype, num_bytes), count in groups.items()
    ]


# --- the command line ------------------------------------------------------------------------------------------------


def _table(rows: Iterable[StorageRow], limit: int) -> str:
    rows = list(rows)
    lines = [
        f"{row.num_bytes:>16,}  {row.count:>5}  {row.dtype:<9} {'x'.join(map(str, row.shape)) or 'scalar':<24} "
        f"{row.op:<48} {row.module}"
        for row in rows[:limit]
    ]
    if len(rows) > limit:
        rest = sum(row.num_bytes for row in rows[limit:])
        lines.append(f"{rest:>16,}  in {len(rows) - limit} more rows")
    return "\n".join([f"{'bytes':>16}  count  dtype     shape                    made by{'':<42} module", *lines])


def describe(step: ReferenceStep, *, rows: int) -> str:
    """The answer as text; `rows` limits each of the two tables (0 leaves them out)."""
    gib = 2**30
    lines = [
        f"parameters            {step.num_parameters:>18,}  "
        f"({step.parameter_bytes:,} bytes; buffers {step.buffer_bytes:,})",
        f"kept for backward     {step.kept_activation_bytes:>18,}  "
        f"bytes ({step.kept_allocated_bytes:,} in 512-byte blocks)",
    ]
    lines.append(f"after the step        {step.resident_bytes:>18,}  bytes (parameters, buffers, optimizer states)")
    for name in PHASES:
        if name in step.phase_peaks:
            first, last = step.first_step_phase_peaks[name], step.phase_peaks[name]
            lines.append(f"peak in {name:<14}{last:>18,}  bytes = {last / gib:.3f} GiB  (first step {first:,})")
    lines += [
        f"peak                  {step.peak_allocated_bytes:>18,}  bytes = {step.peak_allocated_bytes / gib:.3f} GiB",
        f"  in {step.peak_phase} at {step.peak_op} of {step.peak_module or '(no module)'}; "
        f"inside the kernel {step.peak_transient_bytes:,} bytes",
    ]
    if rows:
        lines += ["", "kept for the backward pass, in the order of birth", _table(step.kept_rows, rows)]
        lines += ["", "alive at the peak, largest first", _table(step.peak_rows, rows)]
    return "\n".join(lines)


def main() -> None:
    """Trace one configuration and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a Hugging Face config.json")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--precision", choices=list(PARAMETER_DTYPE), default="bf16")
    parser.add_argument("--attention", choices=["eager", "sdpa", "flash"], default="sdpa")
    parser.add_argument("--checkpointing", default="none", help="none, full or every-N")
    parser.add_argument(
        "--optimizer",
        choices=["adamw-foreach", "adamw-fused", "adamw-forloop", "sgd", "sgd-momentum", "none"],
        default="adamw-foreach",
    )
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--layers", type=int, help="overrides the number of layers")
    parser.add_argument("--keep-outputs", action="store_true")
    parser.add_argument("--no-clip", action="store_true")
    parser.add_argument("--padding", action="store_true", help="pass an attention mask with padding")
    parser.add_argument("--auto-class", default="AutoModelForCausalLM")
    parser.add_argument("--sdpa-kernel", choices=["flash", "efficient", "math"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override entries of the config")
    parser.add_argument("--per-layer", action="store_true", help="only the bytes that one more layer keeps")
    parser.add_argument("--rows", nargs="?", type=int, const=200, default=0, help="print the tables, so many rows each")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text())
    for item in arguments.set:
        key, _, value = item.partition("=")
        config[key] = json.loads(value)
    settings: dict[str, Any] = {
        "batch": arguments.batch,
        "seq": arguments.seq,
        "precision": arguments.precision,
        "attention": arguments.attention,
        "checkpointing": arguments.checkpointing,
        "auto_class": arguments.auto_class,
        "sdpa_kernel": arguments.sdpa_kernel,
        "padding": arguments.padding,
    }
    start = time.perf_counter()
    if arguments.per_layer:
        num_bytes = kept_bytes_per_layer(config, **settings)
        tokens = arguments.batch * arguments.seq
        sys.stdout.write(f"kept by one more layer: {num_bytes:,} bytes = {num_bytes / tokens:,.3f} per token\n")
        return
    step = trace_step(
        config,
        **settings,
        optimizer=None if arguments.optimizer == "none" else arguments.optimizer,
        accumulation=arguments.accumulation,
        steps=arguments.steps,
        num_layers=arguments.layers,
        keep_outputs=arguments.keep_outputs,
        clip=not arguments.no_clip,
    )
    sys.stdout.write(f"{describe(step, rows=arguments.rows)}\ntraced in {time.perf_counter() - start:.1f} s\n")


if __name__ == "__main__":
    main()
