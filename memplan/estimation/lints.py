"""What about this configuration costs memory that its user may not know of?

Each lint is computed from the configuration itself: where another choice would do, the peak of that choice is
evaluated.  Sources are the lines of the libraries that make it so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import MemplanError
from memplan.estimation.step import LOSS
from memplan.operators.attention import MOST_OF_FLASH
from memplan.specs.conversions import converted
from memplan.specs.recipe import ALL_LINEAR
from memplan.specs.training import OPTIMIZERS, PRECISIONS
from memplan.specs.values import NamedTuple, replace
from memplan.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memplan.estimation.estimate import Estimator
    from memplan.estimation.step import Peaks, StepProgram
    from memplan.memory.events import Sizes
    from memplan.specs.training import Setup

LITTLE = 0.05
"""Share of the peak below which checkpointing is said to save little."""

MOST_IN_32_BITS = 0.1
"""Share of the states of an 8-bit optimizer in 32 bits from which it is spoken of."""


CONSTANTS = ("absmax", "code")
"""How the names of states begin that are scales and code books of 8-bit ones."""


class Lint(NamedTuple):
    """Something that is worth knowing before the run."""

    what: str
    says: str
    """In a sentence, with its bytes."""
    source: str
    """Who makes it so."""
    effect_bytes: int | None
    """Change of the peak where it is heeded, None where that is not known."""


class _Run:
    """One configuration and what the others would take."""

    def __init__(self, estimator: Estimator, setup: Setup, program: StepProgram, sizes: Sizes, peaks: Peaks) -> None:
        self.estimator, self.setup, self.program, self.sizes, self.peaks = estimator, setup, program, sizes, peaks

    @property
    def peak(self) -> int:
        return int(self.peaks.peak)

    def effect(self, **changes: object) -> int | None:
        """Peak of another setup less that of this one; None where there is no such setup."""
        try:
            other = replace(self.setup, **changes)  # type: ignore[arg-type]
            return self.estimator.memory(other).peak_allocated_bytes - self.peak
        except MemplanError:
            return None


def lints(estimator: Estimator, setup: Setup, program: StepProgram, sizes: Sizes, peaks: Peaks) -> tuple[Lint, ...]:
    """What there is to say about one estimate, what would move the peak most first."""
    run = _Run(estimator, setup, program, sizes, peaks)
    checks = (
        _fp32,
        _logits,
        _checkpointing,
        _reentrant,
        _frozen_inputs,
        _int8_inputs,
        _adapters,
        _adapted_experts,
        _mask,
        _one_row,
        _wide_heads,
        _small_states,
    )
    found = [lint for check in checks for lint in check(run)]
    return tuple(sorted(found, key=lambda lint: lint.effect_bytes or 0))


def _fp32(run: _Run) -> Iterator[Lint]:
    if run.setup.precision != "fp32":
        return
    effect = run.effect(precision="bf16")
    if effect is not None and effect < 0:
        yield Lint(
            "dtype left at fp32",
            f"bf16 takes {format_bytes(-effect)} less, and matrix products of half precision are several times faster",
            "from_pretrained(dtype=...) is fp32 in TRL's scripts and many configs, whatever the GPU (trl, ModelConfig)",
            effect,
        )


def _logits(run: _Run) -> Iterator[Lint]:
    """All logits at once, where their hump is the peak and larger than all that the layers keep."""
    own = run.setup.objective == "lm" and run.setup.loss == "full" and not run.setup.label_smoothing
    if not own or run.estimator.architecture.task != "causal-lm":
        return
    at_loss = run.peaks.by_instant[LOSS]
    kept = int(run.peaks.kept_activation_bytes)
    logits = 4 * run.setup.tokens_per_micro_batch * run.estimator.architecture.vocab_size
    if at_loss == run.peak and logits > kept - logits:
        effect = run.effect(loss="tiled")
        yield Lint(
            "logits larger than all activations",
            f"one fp32 copy of the logits takes {format_bytes(logits)}, the layers keep "
            f"{format_bytes(max(kept - logits, 0))}; a loss that goes tile by tile holds neither",
            "transformers, loss/loss_utils.py: ForCausalLMLoss upcasts all logits",
            effect,
        )


def _checkpointing(run: _Run) -> Iterator[Lint]:
    if run.setup.activation_checkpointing == "none":
        return
    effect = run.effect(activation_checkpointing="none", offload=None, reentrant=False)
    if effect is not None and effect < LITTLE * run.peak:
        yield Lint(
            "checkpointing that saves little",
            f"without it the peak is {format_bytes(max(effect, 0))} higher, and no layer is computed twice",
            "the peak lies where no activations of layers are alive, or these are few",
            None,
        )


def _reentrant(run: _Run) -> Iterator[Lint]:
    if not run.setup.reentrant:
        return
    effect = run.effect(reentrant=False)
    if effect is not None and effect < 0:
        yield Lint(
            "reentrant checkpointing",
            f"use_reentrant=False takes {format_bytes(-effect)} less: it lets go of a layer's result and of its "
            "gradient when they were used, and does not compute what nothing is needed of",
            "PyTorch, torch/utils/checkpoint.py: CheckpointFunction.backward; the default of transformers 4",
            effect,
        )


def _frozen_inputs(run: _Run) -> Iterator[Lint]:
    """Reentrant checkpointing of layers into which nothing comes that requires a gradient trains nothing of them."""
    if not run.setup.reentrant or any(p.trainable for p in run.program.recording.stem.tape.parameters):
        return
    yield Lint(
        "reentrant checkpointing after a frozen embedding",
        "no gradient would come to the layers, and nothing of them would be trained, if the embedding's result did not "
        "require one: transformers 5.23 sees to that, as counted here; with transformers 4 and peft call "
        "model.enable_input_require_grads()",
        "PyTorch, torch/utils/checkpoint.py: CheckpointFunction; transformers, activation_checkpointing_enable",
        None,
    )


def _int8_inputs(run: _Run) -> Iterator[Lint]:
    if run.setup.quantize != "int8" or run.setup.activation_checkpointing == "none" or run.setup.reentrant:
        return
    kinds = run.program.recording.kinds
    storages = [{x.storage: kind.tape.storages[x.storage] for op in kind.tape.ops for x in op.pins} for kind in kinds]
    held = sum(run.sizes[one.size] for kind in run.program.recording.order for one in storages[kind].values())
    yield Lint(
        "int8 layers hold on to their inputs",
        f"{format_bytes(held)} of them stay until the backward pass is over, checkpointing or not; NF4 layers do not",
        "bitsandbytes, autograd/_functions.py: MatMul8bitLt keeps its input as an attribute of its node",
        run.effect(quantize="nf4"),
    )


def _adapters(run: _Run) -> Iterator[Lint]:
    """Adapters in fp32 beside half-precision weights cast each layer's input, and keep the copy."""
    lora = run.setup.lora
    half = PRECISIONS[run.setup.precision][0] != "fp32"
    if lora is None or lora.dtype != "fp32" or not half:
        return
    effect = run.effect(lora=replace(lora, dtype="base"))
    if effect is not None and effect < -LITTLE * run.peak:
        where = "all linear layers" if lora.targets == (ALL_LINEAR,) else ", ".join(lora.targets)
        yield Lint(
            "adapters in fp32",
            f"beside {where} each keeps an fp32 copy of its input: {format_bytes(-effect)} more than in the dtype of "
            "the weights (--lora-dtype base, autocast_adapter_dtype=False)",
            "peft, tuners/tuners_utils.py: cast_adapter_dtype, _cast_input_dtype",
            effect,
        )


ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _adapted_experts(run: _Run) -> Iterator[Lint]:
    """Adapters of stacked experts, which peft makes anew as whole matrices, and autograd keeps."""
    lora = run.setup.lora
    if lora is None or not converted(run.setup.recipe, run.estimator.architecture.model_type).parameters:
        return
    yield Lint(
        "adapters of experts",
        "in every layer all experts are made anew as one sum of weights and adapters, which is kept for the backward "
        "pass; adapters of the attention alone (--lora-targets q_proj,k_proj,v_proj,o_proj) keep none",
        "peft, tuners/lora/layer.py: ParamWrapper",
        run.effect(lora=replace(lora, targets=ATTENTION_LAYERS)),
    )


def _mask(run: _Run) -> Iterator[Lint]:
    if not run.setup.padding or run.setup.attention != "sdpa" or PRECISIONS[run.setup.precision] == ("fp32", None):
        return
    yield Lint(
        "a mask rules flash attention out",
        "padded batches are given a mask, which PyTorch's flash kernel does not take; rows of equal length do without, "
        "and padding-free or packed ones with --attention flash",
        "PyTorch, sdp_utils.cpp: check_for_attn_mask",
        run.effect(padding=False),
    )


def _one_row(run: _Run) -> Iterator[Lint]:
    """Several sequences in one row, which nothing but a mask of all pairs of its tokens keeps apart."""
    setup = run.setup
    if not setup.has_several_in_a_row or setup.attention == "flash":
        return
    tokens = setup.tokens_per_micro_batch
    mask = format_bytes(tokens * tokens)
    yield Lint(
        "sequences in one row without flash attention",
        f"a mask of {tokens:,} x {tokens:,} tokens ({mask}, and more in every layer) keeps them apart, and attention "
        "takes the time of one sequence as long as all; flash attention is told where they end",
        "transformers, masking_utils.py: find_packed_sequence_indices; modeling_flash_attention_utils.py: cu_seq_lens",
        run.effect(attention="flash") if run.estimator.accepts(replace(setup, attention="flash")) else None,
    )


def _wide_heads(run: _Run) -> Iterator[Lint]:
    if run.setup.attention != "sdpa" or run.estimator.longest_head(run.setup) <= MOST_OF_FLASH:
        return
    yield Lint(
        "heads too wide for flash attention",
        f"they have {run.estimator.longest_head(run.setup)} numbers, and PyTorch's flash kernel takes "
        f"{MOST_OF_FLASH} at most",
        "PyTorch, sdp_utils.cpp: check_head_dim_size_flash",
        None,
    )


def _small_states(run: _Run) -> Iterator[Lint]:
    if not OPTIMIZERS[run.setup.optimizer].endswith("8bit"):
        return
    rows = run.program.optimizer_states.rows
    total = sum(run.sizes[size] * times for _, size, times in rows)
    of_weights = [one for one in rows if not one[0].tensor.startswith(CONSTANTS)]
    wide = sum(run.sizes[size] * times for row, size, times in of_weights if row.dtype == "fp32")
    if total and wide > MOST_IN_32_BITS * total:
        yield Lint(
            "8-bit states that are not",
            f"{format_bytes(wide)} of {format_bytes(total)} are in 32 bits: embeddings, and tensors of fewer than "
            "4,096 numbers",
            "bitsandbytes, optim/optimizer.py: min_8bit_size; transformers, trainer.py: embeddings keep 32 bits",
            None,
        )
