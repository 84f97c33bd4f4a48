"""What happens between the steps of a run, and what does it take: evaluation, saving a checkpoint, resuming from one?

As transformers' Trainer does it (5.23, trainer.py) on one GPU or under DistributedDataParallel.

saving     ``save_pretrained`` hands all weights of a file (50 GB at most) to safetensors, which has them on the host
           at once (``_flatten_as_ptr`` in safetensors/torch.py).  Experts that are one tensor in memory and two in the
           file are split on the device first: slices of one that do not lie in a row are copied
           (``revert_weight_conversion``, then ``contiguous``).  Of a peft model the adapters alone are saved.
           ``torch.save`` copies the states to the host one storage after the other (``_save`` in
           torch/serialization.py).
resuming   weights are read to the host and copied into the parameters (``_load_from_checkpoint``); states are read to
           the host on one GPU and to the device on several, and are on the device before the first forward pass
           (``_load_optimizer_and_scheduler``).  bitsandbytes' optimizers copy what was read once more
           (``deepcopy`` in ``Optimizer8bit.load_state_dict``).

Left out: FSDP and DeepSpeed, whose checkpoints are gathered; paged states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.estimation.assumptions import Assumption
from memplan.estimation.step import EVALUATION, GENERATION
from memplan.operators.sizes import num_bytes
from memplan.specs.evaluation import DEFAULT_EVAL_BATCH, Evaluation
from memplan.specs.training import OPTIMIZERS, TRAINER_BY_OBJECTIVE, UNEVALUATED, library_of
from memplan.specs.values import replace
from memplan.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.estimation.estimate import Estimator
    from memplan.estimation.step import Peaks, StepProgram
    from memplan.memory.events import Sizes
    from memplan.specs.training import Setup

SHARD_BYTES = 50 * 10**9
"""``max_shard_size`` of ``save_pretrained`` in transformers 5: "50GB"."""

SPLIT_WHEN_SAVED = "experts.gate_up_proj"
"""Name of a tensor that is two in the file, each a slice of it that does not lie in a row."""


SPLIT_MODEL_TYPES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"})
"""Of which models (transformers/conversion_mapping.py); gpt_oss has one tensor in its file, too."""


def between_steps(estimator: Estimator, setup: Setup, sizes: Sizes, peaks: Peaks) -> Iterator[Assumption]:
    """What was counted of it; `peaks`: those of the step, and of the evaluation where there is one."""
    yield _evaluation(estimator, setup, sizes, peaks)
    yield _saving(estimator.program(setup), setup, sizes, peaks)
    yield _resuming(estimator.program(setup), setup, sizes)


def left_out_between_steps(setup: Setup) -> list[tuple[str, str]]:
    """(what, why) of what the numbers leave out."""
    if setup.evaluation is None:
        return []
    found = []
    if setup.evaluation.generate is not None:
        why = "a cache that grows token by token leaves holes in reserved memory"
        found.append(("the allocator during generation", why))
    if setup.evaluation.samples is not None:
        found.append(("what metrics make of the logits", "compute_metrics is the user's own"))
    return found


def _evaluation(estimator: Estimator, setup: Setup, sizes: Sizes, peaks: Peaks) -> Assumption:
    if setup.objective in UNEVALUATED:
        why = f"{TRAINER_BY_OBJECTIVE[setup.objective]} evaluates with code of its own"
        return Assumption(EVALUATION, "not counted, and not modelled for this objective", "", None, why)
    if setup.evaluation is None:
        one = Evaluation()
        need = estimator.evaluation(setup, one).peak(sizes)
        more = max(need - int(peaks.peak), 0)
        compared = "more than the step" if more else "not more than the step"
        return Assumption(
            EVALUATION,
            f"not counted; {DEFAULT_EVAL_BATCH} sequences (the Trainer's) take {format_bytes(need)}, {compared}",
            f"--eval-batch {DEFAULT_EVAL_BATCH}",
            more,
            "per_device_eval_batch_size of TrainingArguments is 8, whatever the micro-batch (transformers 5.23)",
        )
    need = max(peaks.by_instant[EVALUATION], peaks.by_instant.get(GENERATION, 0))
    value = f"batches of {setup.evaluation.batch} take {format_bytes(need)}"
    host = estimator.evaluation(setup, setup.evaluation).host_bytes()
    num = setup.evaluation.samples
    if host and num is not None:
        value += f"; the logits of {num:,} sequences are concatenated, and {format_bytes(host)} on the host"
        if num > setup.evaluation.batch and setup.evaluation.accumulation != 1:
            value += "; the allocator caches every smaller block they were in, until the card is full"
    step = max(value for name, value in peaks.by_instant.items() if name not in {EVALUATION, GENERATION})
    otherwise = "no evaluation"
    if host and setup.evaluation.accumulation != 1:
        otherwise = "--eval-accumulation 1"
        moved = replace(setup.evaluation, accumulation=1)
        step = max(step, estimator.evaluation(setup, moved).peak(sizes))
    return Assumption(
        EVALUATION,
        value,
        otherwise,
        int(step - peaks.peak),
        "evaluation_loop of transformers/trainer.py: states are there, gradients are not, nothing is kept",
    )


def _saving(program: StepProgram, setup: Setup, sizes: Sizes, peaks: Peaks) -> Assumption:
    saved, copies = saved_bytes(program, setup), split_bytes(program, setup)
    there = sum(x.total(sizes) for x in program.resident(setup.gradient_accumulation_steps, with_states=True))
    on_host = format_bytes(min(saved, SHARD_BYTES))
    what = "adapters" if setup.lora is not None else "weights"
    value = f"nothing more on the device; on the host {on_host} of {what} at once, states one by one"
    if copies:
        value = f"{format_bytes(copies)} more on the device for slices of experts, and {on_host} on the host"
    return Assumption(
        "saving",
        value,
        "a checkpoint saved" if copies else "",
        max(int(there + copies - peaks.peak), 0) if copies else None,
        "save_pretrained by safetensors, torch.save of the optimizer's state_dict",
    )


def saved_bytes(program: StepProgram, setup: Setup) -> int:
    """Bytes of the weights in a checkpoint: of all, or of what is trained beside a frozen base."""
    return sum(
        num_bytes(p.shape, p.dtype).factor * times
        for p, times in program.states.groups
        if setup.lora is None or p.trainable
    )


def split_bytes(program: StepProgram, setup: Setup) -> int:
    """Bytes of copies on the device while the weights are saved."""
    if setup.lora is not None:
        return 0
    return sum(
        num_bytes(p.shape, p.dtype).factor * times
        for p, times in program.states.groups
        if p.name.endswith(SPLIT_WHEN_SAVED) and program.recording.architecture.model_type in SPLIT_MODEL_TYPES
    )


def _resuming(program: StepProgram, setup: Setup, sizes: Sizes) -> Assumption:
    held = program.optimizer_states.total(sizes)
    twice = library_of(OPTIMIZERS[setup.optimizer]) == "bitsandbytes"
    where = "on the device" if setup.data_parallel_size > 1 else "on the host"
    copied = f", {'twice' if twice else 'once'} {where} while they are read" if held else ""
    value = f"states ({format_bytes(held)}) are there before the first forward pass{copied}"
    return Assumption(
        "resuming",
        value if held else "there are no states to read",
        "",
        None,
        "torch.load, then load_state_dict (_load_optimizer_and_scheduler in transformers/trainer.py)",
    )
