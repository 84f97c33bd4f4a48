"""What does the answer take for granted, and by how much would it change if it were otherwise?

The peak is a maximum over instants, so an assumption moves it only where its bytes are alive: a temporary of the
optimizer step costs nothing while the loss is higher.  Each effect is therefore a difference of two peaks, never a
size.  Where the other case is a setup that is modelled, it is evaluated; else the instants are moved by its bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import UsageError
from memplan.estimation.step import LOSS, OPTIMIZER
from memplan.memory.loops import RANK
from memplan.memory.model_states import GRADIENT_BUCKETS
from memplan.specs.training import (
    CLASSIFICATIONS,
    DISTILLATION,
    LOSSES_BY_OBJECTIVE,
    OFFLOADED,
    OPTIMIZERS,
    PRECISIONS,
    library_of,
)
from memplan.specs.values import NamedTuple, replace
from memplan.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memplan.estimation.estimate import Estimator
    from memplan.estimation.ledger import LedgerRow
    from memplan.estimation.step import Peaks, StepProgram
    from memplan.memory.events import Sizes
    from memplan.specs.training import Setup

TRAINER_DEFAULT = "the Hugging Face Trainer's own default, adamw_torch_fused (transformers 5.23)"

MUCH = 0.01
"""Share of the peak from which the inputs of a step are spoken of."""

AUTOCAST_CACHE = "to (autocast cache)"
"""Tensor name of a half-precision copy of a weight (`Tape.autocast`)."""

GROUPED_PRODUCT = "grouped_mm"
"""Name of the operator that multiplies rows by the matrices of their experts (`operators.routing.grouped_product`)."""


class Assumption(NamedTuple):
    """Something that was taken for granted."""

    what: str
    value: str
    """How it was counted, with its bytes."""
    otherwise: str
    """The other case, empty where there is none to compare with."""
    effect_bytes: int | None
    """Change of the peak in the other case, None where it is not known."""
    why: str
    """Why it was counted like this."""


class _Case:
    """One estimated setup, and what the peak would be otherwise."""

    def __init__(
        self,
        estimator: Estimator,
        setup: Setup,
        program: StepProgram,
        sizes: Sizes,
        peaks: Peaks,
        rows: Sequence[LedgerRow],
    ) -> None:
        self.estimator, self.setup, self.program = estimator, setup, program
        self.sizes, self.peaks, self.rows = sizes, peaks, rows
        self.optimizer = OPTIMIZERS[setup.optimizer]
        self.dtype = program.states.dtype_of_most()

    def effect(self, other: Setup) -> int:
        """Peak of another setup less that of this one."""
        return self.estimator.memory(other).peak_allocated_bytes - int(self.peaks.peak)

    def effect_if(self, **changes: object) -> int | None:
        """The same of this setup with `changes`; None where that cannot be had."""
        try:
            other = replace(self.setup, **changes)  # type: ignore[arg-type]
            self.estimator.check(other)
            return self.effect(other)
        except UsageError:
            return None

    def effect_at(self, instant: str, change: int) -> int:
        """The same, where one instant changes by so many bytes."""
        moved = {**self.peaks.by_instant, instant: self.peaks.by_instant[instant] + change}
        return int(max(moved.values()) - self.peaks.peak)


def assumptions(
    estimator: Estimator, setup: Setup, program: StepProgram, sizes: Sizes, peaks: Peaks, rows: Sequence[LedgerRow]
) -> tuple[Assumption, ...]:
    """The assumptions of one estimate, the one that moves the peak most first."""
    case = _Case(estimator, setup, program, sizes, peaks, rows)
    found = [
        *_optimizer_states(case),
        *_master_weights(case),
        *_optimizer_temporaries(case),
        *_gradients(case),
        *_gradient_buckets(case),
        *_inputs(case),
        *_attention(case),
        *(_batching(case) if setup.is_flattened else _padding(case)),
        *_routing(case),
        *_adapters(case),
        *_quantised(case),
        *_logits(case),
        *_teachers_cache(case),
        *_autocast_cache(case),
    ]
    return by_effect(*found)


def by_effect(*found: Assumption) -> tuple[Assumption, ...]:
    """The one that moves the peak most first."""
    return tuple(sorted(found, key=lambda a: -abs(a.effect_bytes or 0)))


class _Kept(NamedTuple):
    """In what form an optimizer keeps its states, where it is not the parameters'."""

    how: str
    otherwise: str
    other: str
    """The optimizer to compare with."""
    why: str


_FEW_IN_32 = "bitsandbytes keeps small tensors and embeddings in 32 bits"
_ALL_IN_32 = "bitsandbytes keeps them in fp32, whatever the parameters"
_PROJECTED = f"of matrices in rank {RANK}, the Trainer's default, with their projections"
_KEPT_BY_OPTIMIZER = {
    "adamw-8bit": _Kept("8 bits a number", "torch's AdamW", "adamw-fused", _FEW_IN_32),
    "lion-8bit": _Kept("8 bits a number", "32 bits", "lion", _FEW_IN_32),
    "rmsprop-8bit": _Kept("8 bits a number", "32 bits", "rmsprop-32bit", _FEW_IN_32),
    "ademamix-8bit": _Kept("8 bits a number", "32 bits", "ademamix", _FEW_IN_32),
    "adamw-32bit": _Kept("fp32", "8 bits", "adamw-8bit", _ALL_IN_32),
    "lion": _Kept("fp32", "8 bits", "lion-8bit", _ALL_IN_32),
    "rmsprop-32bit": _Kept("fp32", "8 bits", "rmsprop-8bit", _ALL_IN_32),
    "ademamix": _Kept("fp32", "8 bits", "ademamix-8bit", _ALL_IN_32),
    "adafactor": _Kept("fp32, rows and columns", "torch's AdamW", "adamw-fused", "transformers keeps no first moment"),
    "adalomo": _Kept("fp32, rows and columns", "torch's AdamW", "adamw-fused", "lomo_optim keeps no first moment"),
    "galore-adamw": _Kept(_PROJECTED, "torch's AdamW", "adamw-fused", "embeddings and vectors are not projected"),
    "apollo-adamw": _Kept(_PROJECTED, "torch's AdamW", "adamw-fused", "embeddings and vectors are not projected"),
}


def _optimizer_states(case: _Case) -> Iterator[Assumption]:
    held, host = case.program.optimizer_states.total(case.sizes), case.program.host_bytes
    if host and case.optimizer == OFFLOADED:
        yield Assumption(
            "optimizer",
            f"runs on the host: {format_bytes(host)} of pinned memory for weights, gradients and states there",
            "all on the device",
            case.effect(replace(case.setup, optimizer="adamw-fused")),
            "torchao's CPUOffloadOptimizer, gradients left on the device; clipping does not reach those on the host",
        )
        return
    if host:
        yield Assumption(
            "optimizer states",
            f"paged: {format_bytes(host)} in unified memory, {format_bytes(held)} on the device",
            "all on the device",
            host,
            "the driver keeps pages on the card while there is room, else in the host's memory",
        )
        return
    if not held:
        return
    kept = _KEPT_BY_OPTIMIZER.get(case.optimizer)
    if kept:
        effect = case.effect(replace(case.setup, optimizer=kept.other))
        yield Assumption("optimizer states", f"{kept.how}: {format_bytes(held)}", kept.otherwise, effect, kept.why)
        return
    trained = "parameters" if case.setup.lora is None else "adapters"
    own = f"{case.dtype}, as the {trained}: {format_bytes(held)}"
    why = "torch.optim makes them with zeros_like of the parameter"
    if library_of(case.optimizer) != "torch":
        why = f"{library_of(case.optimizer)} makes them like the parameter"
    if case.dtype == "fp32":
        yield Assumption("optimizer states", own, "", None, why)
    else:
        yield Assumption("optimizer states", own, "fp32 states", held, why)


def _master_weights(case: _Case) -> Iterator[Assumption]:
    held = case.program.layout.gradients.total(case.sizes)
    trained = "parameters" if case.setup.lora is None else "adapters"
    if case.dtype == "fp32":
        value = f"the {trained} themselves, fp32: {format_bytes(held)}"
        yield Assumption("master weights", value, "", None, "the update goes to them as they are")
        return
    why = "the update goes to the parameters as loaded; DeepSpeed and Megatron keep a copy"
    copy = 4 * case.program.states.num_trained
    yield Assumption("master weights", f"none beside the {case.dtype} {trained}", "an fp32 copy", copy, why)


def _optimizer_temporaries(case: _Case) -> Iterator[Assumption]:
    held = case.program.end_temporaries[1].total(case.sizes)
    copy = case.program.gradients.total(case.sizes)
    if case.optimizer == "adamw-fused":
        yield Assumption(
            "AdamW kernel",
            f"fused: nothing on top, as with {TRAINER_DEFAULT}",
            "foreach",
            case.effect_at(OPTIMIZER, copy),
            "one kernel updates in place",
        )
    elif held and case.optimizer not in {"adamw-foreach", "adamw-forloop"}:
        how = _PASSING_BY_OPTIMIZER.get(case.optimizer, "copies of all parameters at once (foreach)")
        yield Assumption(
            "optimizer step",
            f"{format_bytes(held)} more for a moment: {how}",
            "nothing on top",
            case.effect_at(OPTIMIZER, -held),
            "its intermediate results are tensors",
        )
    elif held:
        name = case.optimizer.removeprefix("adamw-")
        why = "torch.optim.AdamW picks it on CUDA" if name == "foreach" else "one parameter after the other"
        value = f"{name}: {format_bytes(held)} more during the step, unlike {TRAINER_DEFAULT}"
        yield Assumption("AdamW kernel", value, "fused", case.effect_at(OPTIMIZER, -held), why)


_PASSING_BY_OPTIMIZER = {
    "muon": "Newton-Schulz iterations of a matrix, or AdamW's square roots of all the rest",
    "galore-adamw": "of a step that computes its projections anew, every 200th",
    "apollo-adamw": "of a step that draws its projections anew, every 200th",
    "adafactor": "one parameter after the other, in fp32",
}


def left_out_of(optimizer: str) -> tuple[tuple[str, str], ...]:
    """(what, why) of what the numbers leave out for an optimizer."""
    if optimizer.startswith("paged-"):
        return (("the time to move pages", "it depends on how much room the card has left"),)
    found = _LEFT_OUT_BY_OPTIMIZER.get(optimizer)
    return () if found is None else (found,)


_LEFT_OUT_BY_OPTIMIZER = {
    OFFLOADED: (
        "the optimizer's step on the host",
        "it takes as long as the host's memory and cores do",
    ),
    "muon": ("the time of Newton-Schulz iterations", "the step time counts the optimizer's memory traffic alone"),
    "galore-adamw": (
        "cuSOLVER's workspace and the time of decompositions",
        "only a GPU says what a decomposition needs besides its factors, every 200 steps",
    ),
    "apollo-adamw": ("the time of projections", "the step time counts the optimizer's memory traffic alone"),
}


def _gradients(case: _Case) -> Iterator[Assumption]:
    held = format_bytes(case.program.layout.gradients.total(case.sizes))
    if case.program.states.in_backward is not None:
        yield Assumption(
            "gradients",
            f"each gone once its parameter is updated, never all at once ({held}); no clipping of their norm",
            "an update after the backward pass (torch's AdamW)",
            case.effect(replace(case.setup, optimizer="adamw-fused")),
            "hooks update in the backward pass",
        )
    elif case.setup.gradient_accumulation_steps > 1:
        yield Assumption(
            "gradients",
            f"resident from the second micro-step on: {held}",
            "no accumulation",
            case.effect(replace(case.setup, gradient_accumulation_steps=1)),
            "they are added up over the micro-steps",
        )
    else:
        yield Assumption(
            "gradients",
            f"freed after each update ({held}), so absent at the loss",
            "kept or accumulated",
            case.effect(replace(case.setup, gradient_accumulation_steps=2)),
            "zero_grad sets them to None",
        )


def _gradient_buckets(case: _Case) -> Iterator[Assumption]:
    """DistributedDataParallel: with views the gradients lie in the buckets, so that one of the two is saved."""
    held = sum(row.num_bytes for row in case.rows if row.tensor == GRADIENT_BUCKETS)
    if held:
        resident = case.setup.gradient_accumulation_steps > 1
        yield Assumption(
            "DDP's buckets",
            f"a second copy of all gradients: {format_bytes(held)}, which gradient_as_bucket_view=True would save",
            "gradient_as_bucket_view=True" if resident else "",
            -case.program.gradients.total(case.sizes) if resident else None,
            "DistributedDataParallel(gradient_as_bucket_view=False) is the default of torch and the Trainer",
        )


def _inputs(case: _Case) -> Iterator[Assumption]:
    steps = case.setup.gradient_accumulation_steps
    held = case.program.inputs(steps).total(case.sizes)
    if steps > 1 and held > MUCH * case.peaks.peak:
        one = case.program.inputs(1).total(case.sizes)
        yield Assumption(
            "inputs",
            f"ids and labels of all {steps:,} micro-batches are fetched at once: {format_bytes(held)}",
            "one micro-batch at a time",
            one - held,
            "the Trainer counts the tokens of a step before the first forward pass",
        )


def _attention(case: _Case) -> Iterator[Assumption]:
    now = case.setup.attention
    values = {
        "eager": ("eager: every score is stored", "the score of every pair of tokens is a number of a tensor"),
        "sdpa": ("sdpa, a fused kernel: no scores stored", "torch picks a fused kernel where dtype and heads allow it"),
        "flash": ("flash: no scores stored", "the kernel keeps its output and one number a row"),
    }
    other = "sdpa" if now == "eager" else "eager"
    effect = case.effect_if(attention=other)
    value, why = values[now]
    yield Assumption("attention", value, other if effect is not None else "", effect, why)


def _padding(case: _Case) -> Iterator[Assumption]:
    if case.setup.padding:
        other = replace(case.setup, padding=False)
        why = "a kernel that is given a mask is another one, and the mask is a tensor"
        yield Assumption("padding", "padded, so a mask is passed", "packed batches", case.effect(other), why)
        return
    effect = case.effect_if(padding=True)
    if effect is None:  # it is not modelled what padding does to this architecture
        return
    if case.setup.passes_mask:
        why = "under torch.compile transformers does not look whether a mask hides anything (torch before 2.14)"
        yield Assumption("padding", "none, and a mask all the same", "padded batches", effect, why)
        return
    why = "the mask is left out where it would hide nothing: packed or equally long sequences"
    yield Assumption("padding", "none, so no mask", "padded batches", effect, why)


def _batching(case: _Case) -> Iterator[Assumption]:
    """What sequences in one row are taken to be."""
    setup = case.setup
    other = replace(setup, batching="rows", packed_sequences=None)
    if setup.batching == "padding-free":
        yield Assumption(
            "batching",
            f"padding-free: {setup.tokens_per_micro_batch:,} tokens in one row, however long each sequence is",
            f"rows of {setup.seq_len:,} tokens",
            case.effect(other),
            "--seq-len is the mean length: a micro-batch of longer sequences takes more, none takes padding",
        )
        return
    num = setup.sequences_per_row
    given = "" if setup.packed_sequences is not None else ", the fewest there can be"
    twice = 2 * num
    yield Assumption(
        "batching",
        f"packed: {num} sequences in a row of {setup.seq_len:,} tokens{given}",
        f"--packed-sequences {twice}",
        case.effect_if(packed_sequences=twice),
        "the backward of flash attention takes 128 rows more for each of them; nothing else depends on their number",
    )


def _adapters(case: _Case) -> Iterator[Assumption]:
    lora = case.setup.lora
    if lora is None:
        return
    if lora.dtype == "fp32" and PRECISIONS[case.setup.precision][0] != "fp32":
        effect = case.effect_if(lora=replace(lora, dtype="base"))
        value = "fp32, and so are the copies of what goes into them"
        why = "peft casts them up (autocast_adapter_dtype)"
        yield Assumption("adapters", value, "--lora-dtype base", effect, why)
    if lora.dropout:
        value = "before adapters: a mask of one byte an element, as CUDA's fused kernel makes it"
        why = "written out, as on a CPU, it would be in the dtype of its input (Dropout.cpp)"
        yield Assumption("dropout", value, "", None, why)
    if case.setup.objective in CLASSIFICATIONS:
        value = "a full copy of the head is trained beside the original"
        why = "peft's task types SEQ_CLS and TOKEN_CLS add it to modules_to_save"
        if case.setup.quantize is not None:
            value += ", in the dtype of the model"
            why += "; peft cannot copy what is quantised: name the head in llm_int8_skip_modules"
        yield Assumption("head", value, "", None, why)


def _quantised(case: _Case) -> Iterator[Assumption]:
    """What few bits leave open."""
    how = case.setup.quantize
    if how is None:
        return
    if not case.setup.upcast:
        value = "norms, embeddings and head stay in the dtype of the model"
        why = "TRL's trainers leave them so; prepare_model_for_kbit_training (--upcast) casts them to fp32"
        yield Assumption("not quantised", value, "all in fp32", case.effect_if(upcast=True), why)
    if how == "int8":
        why = "how many columns have some depends on the data"
        yield Assumption("outliers", "none, so that no column is multiplied in half precision", "", None, why)
    else:
        value = "made again for each product, one at a time, in the dtype of its input"
        why = "bitsandbytes' kernels that need no such copy are for few rows (at most 1,536)"
        yield Assumption("weights of 4 bits", value, "", None, why)


def _routing(case: _Case) -> Iterator[Assumption]:
    """What tokens are routed through, and in which dtype that runs."""
    products = [op for kind in case.program.recording.kinds for op in kind.tape.ops if op.name == GROUPED_PRODUCT]
    if not products:
        return
    first = products[0]
    chosen, num = first.outputs[0].shape[-2], first.inputs[1].shape[0]
    assert isinstance(chosen, int)
    rows = chosen * case.setup.tokens_per_micro_batch
    value = f"{chosen} of {num} experts a token: {rows:,} rows a layer, however uneven the routing"
    yield Assumption(
        "routing", value, "", None, "grouped_mm, transformers' default, takes the rows of all experts at once"
    )
    if first.outputs[0].dtype == "fp32" and PRECISIONS[case.setup.precision][1] is not None:
        value = "the experts run in fp32, the dtype of their weights"
        yield Assumption("autocast", value, "", None, "autocast does not know grouped_mm (PyTorch 2.13)")


def _logits(case: _Case) -> Iterator[Assumption]:
    if case.setup.objective in LOSSES_BY_OBJECTIVE:
        value, why = OBJECTIVE_WORDS[case.setup.objective]
        yield Assumption("objective", value, "", None, why)
        return
    if case.setup.label_smoothing:
        yield _smoothing(case)
        return
    if case.setup.loss != "full":
        value, why = LOSS_WORDS[case.setup.loss]
        effect = case.effect(replace(case.setup, loss="full"))
        yield Assumption("loss", value, "all logits at once, as Trainer computes them", effect, why)
        return
    vocab = case.estimator.architecture.vocab_size
    wide = [row for row in case.rows if row.shape and row.shape[-1] == vocab and row.kind in _PASSING]
    if not wide:
        return
    alive = sum(row.bytes_at_peak for row in wide)
    largest = max(row.num_bytes // row.num for row in wide)
    at_loss = case.peaks.by_instant[LOSS] == case.peaks.peak
    value = f"all logits at once: {format_bytes(alive)} at the peak" if at_loss else "all logits at once"
    causal = case.estimator.architecture.task == "causal-lm"
    other = case.effect_if(loss=OTHER_LOSS) if causal else None
    yield Assumption(
        "loss",
        f"{value}, {format_bytes(largest)} the largest of them",
        f"--loss {OTHER_LOSS}, TRL's from 1.15 on" if other is not None else "",
        other,
        "so transformers computes it; TRL, Liger and others go chunk by chunk",
    )


def _teachers_cache(case: _Case) -> Iterator[Assumption]:
    companion = case.program.layout.companion
    if companion is None or not companion.recording.stem.tape.caches:
        return
    kinds = [piece.tape.handed_out for piece in companion.recording.kinds]
    held = sum(case.sizes[x.bytes] for kind in companion.recording.order for x in kinds[kind])
    value = f"keys and values of its layers, held until the loss is there: {format_bytes(held)}"
    why = "use_cache of a config is true, and the Trainer changes the student's alone: set teacher.config.use_cache"
    yield Assumption("teacher's cache", value, "", None, why)


def _smoothing(case: _Case) -> Assumption:
    """The loss of smoothed labels."""
    value = "labels smoothed by the Trainer, of all logits at once; no other loss has them"
    why = "LabelSmoother of transformers keeps log-probabilities of all words, and their negative"
    return Assumption("loss", value, "no smoothing", case.effect(replace(case.setup, label_smoothing=0.0)), why)


OTHER_LOSS = "tiled"
"""What all logits at once are compared with."""

LOSS_WORDS = {
    "full-kept": ("all logits at once, kept until the backward pass is over", "a loop that holds the model's output"),
    "chunked": ("256 tokens at a time, computed twice", "chunked_nll of TRL 1.7 to 1.14"),
    "tiled": ("4096 tokens by 32768 words at a time, computed twice", "SFTTrainer of TRL from 1.15 on"),
    "fused": ("chunk by chunk, gradients made in the forward pass", "Liger Kernel's; its other kernels are left out"),
    "cut": ("no logits in memory", "cut cross-entropy: kernels keep logits in registers"),
}
"""What each loss is, and whose."""

OBJECTIVE_WORDS = {
    "dpo": (
        "the reference runs on top of what the policy keeps; a micro-batch of n is n pairs, 2n sequences",
        "DPOTrainer of TRL from 1.15 on; a model of its own, or the same without its adapters",
    ),
    "dpo-precomputed": (
        "no reference while training; a micro-batch of n is n pairs, 2n sequences",
        "DPOTrainer of TRL from 1.15 on, precompute_ref_log_probs=True",
    ),
    DISTILLATION: (
        "the teacher runs on top of what the student keeps, then the divergence of both at beta 0.5 over all logits",
        "GKDTrainer of TRL 1.16, lmbda=0: the sequences of the data, none generated",
    ),
    "orpo": (
        "all logits of both sequences at once, no reference; a micro-batch of n is n pairs, 2n sequences; ids and mask "
        "of the prompts alone are not counted",
        "ORPOTrainer of TRL 1.16 (experimental), with its Triton kernel of log-probabilities",
    ),
    "reward": (
        "one score a sequence, no margins; a micro-batch of n is n pairs, 2n sequences",
        "RewardTrainer of TRL 1.16, center_rewards_coefficient=None; AutoModelForSequenceClassification, num_labels=1",
    ),
    "sequence-classification": (
        "a class of each sequence, one of those that the config names",
        "AutoModelForSequenceClassification of transformers, trained by Trainer",
    ),
    "token-classification": (
        "a class of each token, one of those that the config names",
        "AutoModelForTokenClassification of transformers, trained by Trainer",
    ),
}
"""What each objective takes for granted, and whose it is."""

_PASSING = ("activation", "loss", "temporary")


def _autocast_cache(case: _Case) -> Iterator[Assumption]:
    held = sum(row.num_bytes for row in case.rows if row.tensor == AUTOCAST_CACHE)
    if held:
        value = f"half-precision copies of the weights: {format_bytes(held)}"
        yield Assumption("autocast's cache", value, "", None, "kept from the forward pass until the backward is done")
