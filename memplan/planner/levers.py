"""What would one change bring?  Each lever is a single change to a configuration, priced in bytes and seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.errors import UsageError
from memplan.planner.plan import Candidate, Lever
from memplan.specs.adapter import Lora
from memplan.specs.training import LOSSES_BY_OBJECTIVE, OFFLOADED, PRECISIONS, SAVE_ATTENTION
from memplan.specs.values import NamedTuple, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memplan.specs.training import Setup

SHORTEST = 128
"""Tokens: neither a lever nor a chart makes sequences shorter than this; the plan's own may be."""


SAME, ROUNDING, WEIGHTS, LESS, LESS_AND_ROUNDED, OTHER = range(6)
"""How far a lever goes from the run that was asked for: the same update; other rounding of states or adapters; of
weights; less is trained, or on less; both; another optimizer."""


class Change(NamedTuple):
    """A lever before it is priced."""

    name: str
    flag: str
    fields: dict[str, Any]
    """What of the setup it changes."""
    departure: int = SAME
    """One of `SAME` to `OTHER`."""
    price: str = ""
    """What it may do to the result of training; empty: nothing, or it is plain."""


USUAL_RANK = 16
"""The rank of the LoRA levers: what TRL's scripts take (`ModelConfig.lora_r`)."""

COPIED = "copies over PCIe, there and back, on the compute stream: their time is not counted"
ON_HOST = (
    "torchao's; the host computes the step, whose time is not counted, and gradients go there before they are clipped"
)
LOW_RANK = (
    "only corrections of low rank are trained: near full fine-tuning on small data as a rule, not in pre-training"
)
FOUR_BITS = "the frozen weights are rounded to 4 bits, and every product makes them anew"
ROUNDED = "moments are rounded to 8 bits, block by block: near the loss of 32 bits as a rule, not the same"
NO_MOMENTS = "without moments the learning rate has to be found anew, and transformers train worse as a rule"
NARROW = "an update below 1/512 of a weight is lost in bf16: watch the loss at small learning rates"

EIGHT_BITS_BY_OPTIMIZER = {
    "lion": "lion-8bit",
    "rmsprop": "rmsprop-8bit",
    "rmsprop-32bit": "rmsprop-8bit",
    "ademamix": "ademamix-8bit",
    **dict.fromkeys(("adamw", "adamw-foreach", "adamw-fused", "adamw-forloop", "adamw-32bit"), "adamw-8bit"),
}
"""The same optimizer with states of 8 bits; of paged ones that would free the host's memory, not the card's."""

PAGED_BY_OPTIMIZER = {
    "adamw-32bit": "paged-adamw",
    "lion": "paged-lion",
    "lion-8bit": "paged-lion-8bit",
    "ademamix": "paged-ademamix",
    "ademamix-8bit": "paged-ademamix-8bit",
    "adamw-8bit": "paged-adamw-8bit",
}
"""The same optimizer with its states in unified memory."""


def levers_of(price: Callable[[Setup], Candidate], start: Candidate) -> tuple[Lever, ...]:
    """Every lever of `start`, what frees most first, SGD last; those that change nothing are left out."""
    levers = []
    for change in _changes(start.setup):
        try:
            candidate = price(replace(start.setup, **change.fields))
        except UsageError:  # the model, or what else was chosen, has no such choice
            continue
        lever = Lever(
            name=change.name,
            flag=change.flag,
            candidate=candidate,
            delta_bytes=candidate.memory.peak_allocated_bytes - start.memory.peak_allocated_bytes,
            delta_step_time_s=candidate.step_time.total_s - start.step_time.total_s,
            departure=change.departure,
            price=change.price,
        )
        if lever.delta_bytes or abs(lever.delta_step_time_s) > 1e-6 * start.step_time.total_s:
            levers.append(lever)
    return tuple(sorted(levers, key=lambda lever: (lever.gives_up_adam, lever.delta_bytes)))


def _changes(setup: Setup) -> Iterator[Change]:
    if setup.activation_checkpointing != "full":
        fields: dict[str, Any] = {"activation_checkpointing": "full"}
        yield Change("recompute every layer in the backward pass", "--checkpointing full", fields)
    if setup.activation_checkpointing == "full" and setup.attention != "eager":
        fields = {"activation_checkpointing": SAVE_ATTENTION}
        yield Change("recompute every layer but its attention", f"--checkpointing {SAVE_ATTENTION}", fields)
    if setup.activation_checkpointing != "none":
        yield Change("keep all activations", "--checkpointing none", {"activation_checkpointing": "none"})
    if setup.activation_checkpointing not in {"none", "selective", SAVE_ATTENTION} and setup.offload is None:
        fields = {"offload": "activations"}
        yield Change("what checkpointing keeps on the host", "--offload activations", fields, SAME, COPIED)
    if setup.attention == "eager":
        yield Change("fused attention", "--attention sdpa", {"attention": "sdpa"})
    yield from _evaluations(setup)
    yield from _losses(setup)
    yield from _other_optimizers(setup)
    yield from _adapters(setup)
    if setup.precision in {"fp32", "bf16-mixed", "fp16-mixed"}:
        fields = {"precision": "bf16"}
        yield Change("parameters, gradients and states in bf16", "--precision bf16", fields, WEIGHTS, NARROW)
    if setup.seq_len // 2 >= SHORTEST:
        half = setup.seq_len // 2
        yield Change("sequences half as long", f"--seq-len {half}", {"seq_len": half}, LESS)
    if setup.micro_batch_size % 2 == 0:
        micro, steps = setup.micro_batch_size // 2, setup.gradient_accumulation_steps * 2
        fields = {"micro_batch_size": micro, "gradient_accumulation_steps": steps}
        yield Change("half the micro-batch, twice the accumulation", f"--micro-batch {micro}", fields)


def _evaluations(setup: Setup) -> Iterator[Change]:
    """Evaluations that take less at once and measure the same."""
    found = setup.evaluation
    if found is None:
        return
    if found.batch > 1:
        fields = {"evaluation": replace(found, batch=1)}
        yield Change("evaluation of one sequence at a time", "--eval-batch 1", fields)
    if found.samples is not None and found.accumulation != 1:
        fields = {"evaluation": replace(found, accumulation=1)}
        yield Change("logits moved to the host after every batch", "--eval-accumulation 1", fields)


def _losses(setup: Setup) -> Iterator[Change]:
    """Losses that give the same gradients, but for rounding, without holding all logits."""
    names = {"tiled": "TRL's loss, tile by tile", "fused": "Liger's fused loss"}
    if setup.loss == "full" and setup.objective not in LOSSES_BY_OBJECTIVE and not setup.label_smoothing:
        for loss, name in names.items():
            yield Change(name, f"--loss {loss}", {"loss": loss})


def _adapters(setup: Setup) -> Iterator[Change]:
    """Adapters in place of the weights, and a base in few bits beside them."""
    lora = setup.lora
    if lora is None:
        adapters = {"lora": Lora(rank=USUAL_RANK)}
        yield Change("adapters of all linear layers", f"--lora-rank {USUAL_RANK}", adapters, LESS, LOW_RANK)
        quantised = {**adapters, "quantize": "nf4"}
        price = f"as --lora-rank {USUAL_RANK}, and {FOUR_BITS}"
        yield Change("QLoRA", f"--lora-rank {USUAL_RANK} --quantize nf4", quantised, LESS_AND_ROUNDED, price)
        return
    if setup.quantize is None:
        yield Change("a base of 4 bits", "--quantize nf4", {"quantize": "nf4"}, WEIGHTS, FOUR_BITS)
    if lora.dtype == "fp32" and PRECISIONS[setup.precision][0] != "fp32":
        narrow = {"lora": replace(lora, dtype="base")}
        yield Change("adapters in the dtype of the weights", "--lora-dtype base", narrow, ROUNDING, NARROW)
    if lora.dropout:
        plain = {"lora": replace(lora, dropout=0.0)}
        yield Change("no dropout before adapters", "--lora-dropout 0", plain, ROUNDING, "less regularisation")


def _other_optimizers(setup: Setup) -> Iterator[Change]:
    if setup.optimizer in {"adamw", "adamw-foreach", "adamw-forloop"}:
        yield Change("fused AdamW", "--optimizer adamw-fused", {"optimizer": "adamw-fused"})
    eight, paged = EIGHT_BITS_BY_OPTIMIZER.get(setup.optimizer), PAGED_BY_OPTIMIZER.get(setup.optimizer)
    if eight:
        yield Change("8-bit optimizer states", f"--optimizer {eight}", {"optimizer": eight}, ROUNDING, ROUNDED)
    if paged:
        yield Change("optimizer states in unified memory", f"--optimizer {paged}", {"optimizer": paged})
    if eight == "adamw-8bit" and setup.lora is None:
        fields = {"optimizer": OFFLOADED}
        yield Change("the optimizer on the host", f"--optimizer {OFFLOADED}", fields, ROUNDING, ON_HOST)
    if setup.optimizer != "sgd":
        yield Change("no optimizer states", "--optimizer sgd", {"optimizer": "sgd"}, OTHER, NO_MOMENTS)
