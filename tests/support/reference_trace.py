"""What does a training step of a real Hugging Face model allocate, byte for byte?

The reference that memplan's formulas are compared with. The model of the installed transformers library is built on
the meta device, whole training steps run on it as the Hugging Face Trainer runs them, and birth and death of every
storage are recorded as CUDA would allocate them (`memplan.probes.trace`, of which this is a view for tests).

The step (transformers/trainer.py, accelerate): the inputs of all micro-batches are on the device throughout; for each
micro-batch, forward with `num_items_in_batch`, the output object is dropped once the loss is taken, backward; then the
gradient norm is clipped, the optimizer updates, gradients are set to None. Mixed precision wraps the forward pass in
autocast and casts the model's floating-point outputs to fp32.

Not modelled: CUDA context, cuBLAS workspaces, fragmentation, scratch memory inside kernels other than attention's (see
memplan.probes.kernels), a GradScaler, models whose inputs are not token ids. Where a model looks at its data (is there
padding? are sequences packed?) the answer is that of a batch without padding and packing, unless `padding=True`.

    python -m tests.support.reference_trace CONFIG.json --batch 1 --seq 4096 --precision bf16 --layers 2 --rows
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memplan.operators.sizes import allocated
from memplan.probes.events import rows
from memplan.probes.models import transformers_model
from memplan.probes.trace import trace_training
from memplan.probes.training import Loop
from memplan.specs.training import PRECISIONS, Setup

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memplan.probes.events import Trace, TraceEvent

Precision = Literal["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"]
Attention = Literal["eager", "sdpa", "flash"]
Checkpointing = str
Optimizer = Literal["adamw-foreach", "adamw-fused", "adamw-forloop", "sgd", "sgd-momentum"]

PHASE_BY_NAME = {"forward": "forward", "backward": "backward", "clip": "clip", "optimizer_step": "optimizer"}
PHASES = tuple(PHASE_BY_NAME)


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
    setup = Setup(
        micro_batch_size=batch,
        seq_len=seq,
        gradient_accumulation_steps=accumulation,
        precision=precision,
        attention=attention,
        activation_checkpointing=checkpointing,
        optimizer=optimizer or "sgd",
        padding=padding,
    )
    loop = Loop(
        update=optimizer is not None,
        clip=clip,
        keep_outputs=keep_outputs,
        outputs_to_fp32=outputs_to_fp32,
        count_random_states=count_random_states,
    )
    model = transformers_model(_with_layers(dict(config), num_layers), auto_class=auto_class)
    return _summarise(trace_training(model, setup, sdpa_kernel=sdpa_kernel, num_steps=steps, loop=loop))


def kept_bytes_per_layer(config: dict[str, Any], *, layers: int = 2, **settings: Any) -> int:
    """Bytes that layer number `layers` keeps: the difference of kept bytes between a model with it and one without."""
    settings = {**settings, "steps": 1, "optimizer": None}
    more, fewer = (trace_step(config, num_layers=n, **settings) for n in (layers + 1, layers))
    return more.kept_activation_bytes - fewer.kept_activation_bytes


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


def _summarise(trace: Trace) -> ReferenceStep:
    peak, first = trace.peak(), trace.phase_peaks(0)
    last = trace.phase_peaks()
    alive = trace.alive_at_peak
    scratch = [event for event in alive if event.op.startswith("scratch of ")]
    loaded = [event for event in trace.events if event.phase == "load"]
    return ReferenceStep(
        num_parameters=trace.num_parameters,
        parameter_bytes=sum(event.num_bytes for event in loaded if event.category == "parameter"),
        buffer_bytes=sum(event.num_bytes for event in loaded if event.category == "buffer"),
        kept_activation_bytes=trace.kept_activation_requested_bytes,
        kept_allocated_bytes=trace.kept_activation_bytes,
        kept_rows=tuple(row for event in trace.kept for row in _rows([event])),
        phase_peaks={name: last[phase] for name, phase in PHASE_BY_NAME.items() if phase in last},
        first_step_phase_peaks={name: first[phase] for name, phase in PHASE_BY_NAME.items() if phase in first},
        resident_bytes=trace.levels[-1],
        peak_allocated_bytes=peak.allocated_bytes,
        first_step_peak_allocated_bytes=max(first.values()),
        peak_phase={phase: name for name, phase in PHASE_BY_NAME.items()}.get(peak.phase, peak.phase),
        peak_op=peak.op.removeprefix("scratch of "),
        peak_module=peak.module,
        peak_transient_bytes=sum(allocated(event.num_bytes) for event in scratch),
        peak_rows=_rows(event for event in alive if event not in scratch),
    )


def _rows(events: Iterable[TraceEvent]) -> tuple[StorageRow, ...]:
    listed = list(events)
    requested = {(e.module, e.op, e.category, e.shape, e.dtype, allocated(e.num_bytes)): e.num_bytes for e in listed}
    return tuple(
        StorageRow(
            module=row.module,
            op=row.op,
            shape=row.shape,
            dtype=row.dtype,
            count=row.num,
            num_bytes=row.num * requested[(*row[:5], row.num_bytes // row.num)],
        )
        for row in rows(listed)
    )


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
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
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
