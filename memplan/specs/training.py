"""How a model is trained: the numbers and choices of one configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import UsageError, did_you_mean
from memplan.specs.adapter import check_token_targets, with_head
from memplan.specs.recipe import EVERYTHING, Recipe
from memplan.specs.values import dataclass

if TYPE_CHECKING:
    from memplan.specs.adapter import Lora
    from memplan.specs.evaluation import Evaluation

LARGEST_COUNT = 10**9
"""No batch, accumulation or length beyond this is taken seriously."""

PRECISIONS = {
    "fp32": ("fp32", None),
    "bf16": ("bf16", None),
    "fp16": ("fp16", None),
    "bf16-autocast": ("bf16", "bf16"),
    "bf16-mixed": ("fp32", "bf16"),
    "fp16-mixed": ("fp32", "fp16"),
}
"""Precision by name: dtype of the parameters, dtype of autocast (None: off).

``bf16-autocast`` is what ``bf16=True`` of a Trainer does to a model that was loaded in bf16.
"""

OPTIMIZERS = {
    "adamw": "adamw-foreach",
    **{
        name: name
        for name in (
            "adamw-foreach",
            "adamw-fused",
            "adamw-forloop",
            "adamw-32bit",
            "adamw-8bit",
            "adamw-offloaded",
            "paged-adamw",
            "paged-adamw-8bit",
            "adafactor",
            "sgd",
            "sgd-momentum",
            "lion",
            "lion-8bit",
            "paged-lion",
            "paged-lion-8bit",
            "rmsprop",
            "rmsprop-32bit",
            "rmsprop-8bit",
            "adagrad",
            "ademamix",
            "ademamix-8bit",
            "paged-ademamix",
            "paged-ademamix-8bit",
            "muon",
            "galore-adamw",
            "apollo-adamw",
            "schedule-free-adamw",
            "schedule-free-sgd",
            "adamw-in-backward",
            "lomo",
            "adalomo",
        )
    },
}
"""Optimizers by name, and the implementation the name stands for (torch.optim.AdamW picks foreach on CUDA)."""

OFFLOADED = "adamw-offloaded"
"""The optimizer that runs on the host."""
IN_BACKWARD = ("adamw-in-backward", "lomo", "adalomo")
"""Optimizers that update each parameter in the backward pass: no gradient is left to add up, to clip or to reduce."""

LIBRARY_BY_PART = {
    "offloaded": "torchao",
    "8bit": "bitsandbytes",
    "32bit": "bitsandbytes",
    "paged": "bitsandbytes",
    "lion": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "schedule": "schedulefree",
    "adafactor": "transformers",
    "lomo": "lomo_optim",
}
"""Part of an optimizer's name -> the library it comes with; the others are torch's."""

ATTENTIONS = ("eager", "sdpa", "flash")
FUSED = "fused"
LOSSES = ("full", "full-kept", "chunked", "tiled", FUSED, "cut")
WITHOUT_LOGITS = ("chunked", "tiled", "cut")
"""Losses that hand out no logits in an evaluation either.

Those of TRL 1.14 and of cut cross-entropy have none; TRL 1.16 runs the model once more for them, which is deprecated
(``compute_loss`` in trainer/sft_trainer.py).  Liger's model computes them in evaluation mode.
"""
OFFLOADS = ("activations",)
SAVE_ATTENTION = "save-attention"
"""Checkpointing of all but what attention gives."""
BATCHINGS = ("rows", "padding-free", "packed")
LEAST_PACKED = 2
"""Sequences that a packed row holds at the least."""
QUANTIZATIONS = ("nf4", "nf4-double", "int8")

DISTILLATION = "distillation"
OBJECTIVES = (
    "lm",
    "dpo",
    "dpo-precomputed",
    "orpo",
    "reward",
    DISTILLATION,
    "contrastive",
    "sequence-classification",
    "token-classification",
)
TRACED = ("contrastive",)
"""Objectives that no formula describes: the real module is run."""
IN_BATCH = ("contrastive",)
"""Those whose loss compares all examples of a micro-batch: accumulated, it is another loss."""
CLASSIFICATIONS = ("sequence-classification", "token-classification")
TASK_TYPE_BY_OBJECTIVE = {"sequence-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS"}
"""Objectives for which peft does more than for others, and what it calls them."""
SCORED = ("reward", *CLASSIFICATIONS)
"""Objectives of models that have a layer of scores in place of the words' output layer."""
PREFERRED = ("dpo", "dpo-precomputed")
"""Those of direct preference optimisation."""
PAIRED = (*PREFERRED, "orpo", "reward", "contrastive")
"""Objectives whose micro-batch counts pairs: a chosen and a rejected sequence, or an anchor and its positive."""
LOSSES_BY_OBJECTIVE = {
    "dpo": ("tiled",),
    "dpo-precomputed": ("tiled",),
    "orpo": ("full",),
    "reward": ("full",),
    DISTILLATION: ("full",),
    "contrastive": ("full",),
    "sequence-classification": ("full",),
    "token-classification": ("full",),
}
"""How the losses of objectives are computed, the default first, where not in all of the ways of `LOSSES`.

DPOTrainer of TRL up to 1.14 had all logits, and kernels of its own for them, which are not modelled.
"""
TEACHER_DTYPES = ("fp32", "bf16", "fp16")

TRAINER_BY_OBJECTIVE = {
    "dpo": "DPOTrainer",
    "dpo-precomputed": "DPOTrainer",
    "orpo": "ORPOTrainer",
    "reward": "RewardTrainer",
    DISTILLATION: "GKDTrainer",
}
"""TRL's, of objectives that are not transformers' own; all of them switch dropout off (``disable_dropout=True``)."""
UNEVALUATED = (*PREFERRED, "orpo", "reward", DISTILLATION, "contrastive")
"""Objectives whose trainer has an evaluation of its own, which is not modelled."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One training configuration."""

    micro_batch_size: int = 1
    """Sequences in one forward and backward pass on one data-parallel rank; of `PAIRED` objectives pairs of them."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    data_parallel_size: int = 1
    """Ranks (GPUs) with different data."""
    seq_len: int = 1024
    """Tokens in one sequence, padding included."""
    precision: str = "bf16"
    """Key of `PRECISIONS`; ``-mixed`` is fp32 parameters under autocast."""
    optimizer: str = "adamw"
    """Key of `OPTIMIZERS`."""
    activation_checkpointing: str = "none"
    """``none``, ``selective`` (attention recomputed), ``save-attention`` (all but attention recomputed: SFTTrainer's
    ``{"selective": True}`` of TRL 1.16), ``full``, or ``every-N`` (each N-th layer, from the first)."""
    attention: str = "sdpa"
    """``eager``, ``sdpa`` or ``flash``."""
    loss: str = "full"
    """How the loss of a language model is computed, one of `LOSSES`:

    ``full``      all logits at once (transformers; the default of Trainer and of SFTTrainer up to TRL 1.6)
    ``full-kept`` the same in a plain loop that keeps the model's output until the backward pass is over
    ``chunked``   256 tokens at a time, computed again in the backward pass (default of TRL 1.7 to 1.14, chunked_nll)
    ``tiled``     4096 tokens by 32768 words at a time (TRL from 1.15 on)
    ``fused``     logits of a chunk turned into gradients in the forward pass (Liger Kernel)
    ``cut``       no logits in memory at all (cut cross-entropy)
    """
    objective: str = "lm"
    """What is trained for, one of `OBJECTIVES`:

    ``lm``               the language model's own loss (pre-training, SFT)
    ``dpo``              direct preference optimisation (DPOTrainer of TRL from 1.15 on): the reference is a second
                         model, or with adapters the same one without them; it runs after each pass of the policy
    ``dpo-precomputed``  the same with ``precompute_ref_log_probs=True``: no reference while training
    ``orpo``             odds-ratio preference optimisation (ORPOTrainer of TRL 1.16): likelihood of the chosen sequence
                         and odds against the rejected one, from all logits; no reference
    ``reward``           a score of each sequence, compared within pairs (RewardTrainer of TRL 1.16)
    ``distillation``     the distribution of a teacher, which runs after each pass of the student (GKDTrainer of TRL
                         1.16 on the sequences of the data, lmbda=0)
    ``contrastive``      embeddings of anchors against those of all positives of the micro-batch
                         (MultipleNegativesRankingLoss of sentence-transformers 6.2); by a trace
    ``sequence-classification``, ``token-classification``
                         classes in place of words (AutoModelForSequenceClassification, AutoModelForTokenClassification)
    """
    teacher: str | None = None
    """Name of the model that is distilled, frozen and in memory beside the one that is trained."""
    teacher_dtype: str | None = None
    """dtype of its parameters, one of `TEACHER_DTYPES`; None: that in which the trained model is loaded."""
    label_smoothing: float = 0.0
    """Share of the probability that is spread over all words (`label_smoothing_factor` of TrainingArguments); above 0
    the Trainer takes the loss from all logits itself."""
    supervised: float = 1.0
    """Share of the tokens that have a label; the others (prompts, padding) are ignored by the loss."""
    dropout: float | None = None
    """Overrides every dropout probability of the model's config; None keeps them."""
    padding: bool = False
    """Micro-batches hold padding, so that the model is given an attention mask; packed or equally long ones do not."""
    batching: str = "rows"
    """How sequences become a micro-batch, one of `BATCHINGS`:

    ``rows``          a row for each, as long as the longest (sequences cut out of one stream of tokens, without regard
                      to documents, are rows, too: ``packing_strategy="wrapped"`` of TRL)
    ``padding-free``  end to end in one row of as many tokens as they have: `seq_len` is their mean length
                      (``padding_free=True`` of TRL 1.16, DataCollatorWithFlattening of transformers)
    ``packed``        each row of `seq_len` tokens is full of shorter sequences, and the rows lie end to end in one
                      (``packing=True`` of TRL 1.16 with its default strategy, ``bfd``)
    """
    packed_sequences: int | None = None
    """Sequences in a packed row, on average; None: `LEAST_PACKED`."""
    lora: Lora | None = None
    """Adapters that are trained in place of the weights; None: all weights are trained."""
    freeze: tuple[str, ...] = ()
    """Patterns of the names of parameters, or of modules, that are not trained: ``model.layers.[0-3]``."""
    quantize: str | None = None
    """How the frozen weights of linear layers are stored, one of `QUANTIZATIONS`; None: in the model's dtype."""
    offload: str | None = None
    """``activations``: what checkpointing keeps waits in the host's memory (`activation_checkpointing_kwargs`
    ``{"offload": True}`` of transformers 5.23, Unsloth's checkpointing); None: all is kept on the device."""
    reentrant: bool = False
    """Layers are checkpointed by ``use_reentrant=True`` of torch.utils.checkpoint, the default of transformers 4;
    False: as transformers 5 does it."""
    upcast: bool = False
    """What is not quantised is cast to fp32, as peft's ``prepare_model_for_kbit_training`` does."""
    evaluation: Evaluation | None = None
    """An evaluation between the steps; None: none is counted."""
    compile: bool = False
    """``torch.compile`` of the model with inductor (``TrainingArguments.torch_compile``)."""

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "gradient_accumulation_steps", "data_parallel_size", "seq_len"):
            check_count(name, getattr(self, name))
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("loss", self.loss, LOSSES)
        self._check_objective()
        self._check_evaluation()
        self._check_smoothing()
        check_checkpointing(self.activation_checkpointing)
        check_dropout(self.dropout)
        check_share("supervised", self.supervised)
        self._check_batching()
        self._check_quantization()
        self._check_offload()
        self._check_reentrant()
        self._check_switched_back()
        self._check_updates()
        self._check_compiled()

    def unlike_the_default(self) -> str:
        """The fields that are not the default, with their values: ``seq_len=2048, optimizer='lion'``."""
        unlike = [(name, value) for name, value in vars(self).items() if value != getattr(Setup, name)]
        return ", ".join(f"{name}={value!r}" for name, value in unlike)

    def _check_objective(self) -> None:
        """Raise `UsageError` where the loss of the objective is not computed like this."""
        check_choice("objective", self.objective, OBJECTIVES)
        known = LOSSES_BY_OBJECTIVE.get(self.objective, LOSSES)
        if self.loss not in known:
            raise UsageError(
                f"The loss of {self.objective} is not modelled as --loss {self.loss}.",
                f"Use --loss {' or '.join(known)}.",
            )
        if self.objective == "token-classification" and self.lora is not None:
            check_token_targets(self.lora)
        if self.objective == "reward" and self.lora is not None:
            raise UsageError("Adapters of a reward model are not modelled.", "Leave --lora-rank or --objective out.")
        if self.objective in UNEVALUATED and self.evaluation is not None:
            raise UsageError(
                f"What the trainer evaluates for {self.objective} is not modelled.",
                "Leave --eval-batch and --objective apart.",
            )
        trainer = TRAINER_BY_OBJECTIVE.get(self.objective)
        if trainer is not None and self.lora is not None and self.lora.dropout:
            raise UsageError(
                f"{trainer} switches dropout off, that of adapters, too (disable_dropout=True).",
                "Leave --lora-dropout out.",
            )
        self._check_teacher()

    def _check_evaluation(self) -> None:
        """Raise `UsageError` where an evaluation would keep logits that the loss does not hand out."""
        if self.evaluation is not None and self.evaluation.keeps_logits and self.loss in WITHOUT_LOGITS:
            raise UsageError(
                f"An evaluation with --loss {self.loss} has no logits that it could keep.",
                "Leave --eval-samples out, or use --loss full or fused.",
            )

    def _check_teacher(self) -> None:
        """Raise `UsageError` where a teacher is missing, has nothing to teach, or speaks in another dtype."""
        if self.objective != DISTILLATION:
            for flag, given in (("--teacher", self.teacher), ("--teacher-dtype", self.teacher_dtype)):
                if given is not None:
                    raise UsageError(
                        f"{flag} is about distillation, and the objective is {self.objective}.",
                        f"Say --objective {DISTILLATION}, or leave {flag} out.",
                    )
            return
        if not isinstance(self.teacher, str) or not self.teacher:
            raise UsageError("Distillation needs a teacher.", "Say --teacher MODEL, of the same vocabulary.")
        if self.teacher_dtype is not None:
            check_choice("teacher_dtype", self.teacher_dtype, TEACHER_DTYPES)
        loaded, autocast = PRECISIONS[self.precision]
        if autocast is None and self.teacher_dtype not in {None, loaded}:
            raise UsageError(
                f"Logits of two dtypes, {self.teacher_dtype} of the teacher and {loaded}, are not modelled.",
                "Leave --teacher-dtype out, or use a --precision with autocast.",
            )

    def _check_smoothing(self) -> None:
        """Raise `UsageError` where no smoothed loss is taken from the logits."""
        check_label_smoothing(self.label_smoothing)
        if not self.label_smoothing:
            return
        if self.objective != "lm":
            raise UsageError(
                f"Label smoothing is modelled for language models, not for --objective {self.objective}.",
                "Leave --label-smoothing out.",
            )
        if self.loss != "full":
            raise UsageError(
                f"The Trainer smooths labels with all logits at hand, and --loss {self.loss} has none.",
                "Use --loss full, or leave --label-smoothing out.",
            )

    def _check_batching(self) -> None:
        """Raise `UsageError` where sequences do not become a micro-batch like this."""
        check_choice("batching", self.batching, BATCHINGS)
        num = self.packed_sequences
        if num is not None:
            check_count("packed_sequences", num)
            if self.batching != "packed":
                raise UsageError(
                    "--packed-sequences is about rows that hold several sequences.", "Give --batching packed."
                )
            if num < LEAST_PACKED:
                raise UsageError(
                    "A packed row holds several sequences.",
                    "Give --packed-sequences 2 or more, or leave --batching out.",
                )
        if not self.is_flattened:
            return
        if self.padding:
            raise UsageError(f"A {self.batching} batch holds no padding.", "Leave --padding or --batching out.")
        if self.objective != "lm":
            raise UsageError(
                f"--batching {self.batching} is modelled for language models' own loss, not for {self.objective}.",
                "Leave --batching or --objective out.",
            )
        if self.evaluation is not None and self.evaluation.samples is not None:
            raise UsageError(
                f"What an evaluation of {self.batching} batches keeps of the logits is not modelled.",
                "Leave --eval-samples or --batching out.",
            )

    def _check_quantization(self) -> None:
        if self.quantize is not None:
            check_choice("quantize", self.quantize, QUANTIZATIONS)
            if self.lora is None:
                raise UsageError("A quantised model cannot be trained itself.", "Train adapters: give --lora-rank.")
        elif self.upcast:
            raise UsageError("Only what a quantised model leaves unquantised is cast up.", "Give --quantize nf4.")

    def _check_offload(self) -> None:
        if self.offload is None:
            return
        check_choice("offload", self.offload, OFFLOADS)
        if self.activation_checkpointing == SAVE_ATTENTION:
            raise UsageError(
                "What attention gives is saved on the device: --offload activations with it is not modelled.",
                "Give --checkpointing full or every-2.",
            )
        if self.activation_checkpointing in {"none", "selective"}:
            raise UsageError(
                "What is offloaded is what checkpointing keeps, and no layer is checkpointed.",
                "Give --checkpointing full or every-2.",
            )

    def _check_reentrant(self) -> None:
        if self.reentrant and self.activation_checkpointing == SAVE_ATTENTION:
            raise UsageError(
                "What attention gives is saved by non-reentrant checkpointing alone.",
                "Give --checkpointing full, or leave --reentrant out.",
            )
        if self.reentrant and self.activation_checkpointing in {"none", "selective"}:
            raise UsageError(
                "Reentrant is a way of checkpointing whole layers, and no layer is checkpointed.",
                "Give --checkpointing full or every-2, or leave --reentrant out.",
            )

    def _check_switched_back(self) -> None:
        """Raise `UsageError` where checkpointing does not come back as it was after the reference has run.

        DPOTrainer (TRL 1.16) switches it off for the reference, a second model or the same one, and on again with all
        of its arguments handed to torch.utils.checkpoint (``disable_gradient_checkpointing`` in models/utils.py): that
        raises "Unexpected keyword arguments", or with ``use_reentrant=False`` from the second micro-step on every layer
        is checkpointed, on the device (transformers 5.23, modeling_utils.py: ``_activation_checkpointing_enable``).
        """
        if not self.has_reference:
            return
        cure = "Use --objective dpo-precomputed, or {}."
        what = "DPOTrainer of TRL 1.16 loses {} when it switches checkpointing on again after the reference."
        if self.offload is not None:
            raise UsageError(what.format("offloading"), cure.format("leave --offload out"))
        if self.activation_checkpointing.startswith("every-"):
            raise UsageError(what.format("the choice of layers"), cure.format("--checkpointing full"))

    def _check_updates(self) -> None:
        """Raise `UsageError` where gradients are gone before they are needed."""
        if self.optimizer not in IN_BACKWARD:
            return
        what = f"{self.optimizer} updates in the backward pass"
        if self.gradient_accumulation_steps > 1:
            raise UsageError(
                f"{what}: no gradients are left to accumulate.", "Use --accumulation 1 or another --optimizer."
            )
        if self.data_parallel_size > 1:
            raise UsageError(
                f"{what}, before GPUs could exchange their gradients.", "Use one GPU or another --optimizer."
            )

    def _check_compiled(self) -> None:
        """Raise `UsageError` for what is not modelled together with ``torch.compile``."""
        if not self.compile:
            return
        cure = "Leave --compile or {} out."
        if self.optimizer in IN_BACKWARD:
            raise UsageError(
                f"{self.optimizer} updates in the backward pass; a compiled one hands out gradients at its end.",
                "Use another --optimizer, or leave --compile out.",
            )
        for is_given, what, flag in (
            (self.objective != "lm", f"Training for {self.objective}", "--objective"),
            (self.quantize is not None, "bitsandbytes' kernels", "--quantize"),
            (self.lora is not None and self.lora.dora, "DoRA", "--dora"),
            (self.offload is not None, "Offloading to the host", "--offload"),
            (self.loss != "full", f"The {self.loss} loss", "--loss"),
            (self.label_smoothing > 0, "Label smoothing", "--label-smoothing"),
            (self.activation_checkpointing == "selective", "Selective checkpointing", "--checkpointing"),
            (self.activation_checkpointing == SAVE_ATTENTION, "Saving what attention gives", "--checkpointing"),
            (self.reentrant, "Reentrant checkpointing", "--reentrant"),
            (self.is_flattened, "Several sequences in a row", "--batching"),
        ):
            if is_given:
                raise UsageError(f"{what} under torch.compile is not modelled.", cure.format(flag))

    @property
    def passes_mask(self) -> bool:
        """Whether attention is given a mask.

        Under ``torch.compile`` transformers (5.23, masking_utils.py) may not look at data, and makes one for
        scaled_dot_product_attention even where it hides nothing but the future.
        """
        return self.padding or (self.compile and self.attention == "sdpa")

    @property
    def recipe(self) -> Recipe:
        """What of the model is trained, and how the rest is stored."""
        if self.lora is None and not self.freeze:
            return EVERYTHING
        return Recipe(
            lora=with_head(self.lora) if self.lora and self.objective in CLASSIFICATIONS else self.lora,
            freeze=self.freeze,
            quantize=self.quantize,
            upcast=self.upcast,
            input_gradients=self.activation_checkpointing not in {"none", "selective"},
        )

    @property
    def global_batch_size(self) -> int:
        """Sequences (or pairs) per optimizer step, over all ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.data_parallel_size

    @property
    def sequences_per_micro_batch(self) -> int:
        """Sequences in one forward pass on one rank: two a pair."""
        return self.micro_batch_size * sequences_of(self.objective)

    @property
    def tokens_per_example(self) -> int:
        """Tokens of a sequence, or of the two of a pair."""
        return sequences_of(self.objective) * self.seq_len

    @property
    def is_flattened(self) -> bool:
        """Whether all sequences of the micro-batch lie end to end in one row, with position ids for each."""
        return self.batching != "rows"

    @property
    def sequences_per_row(self) -> int:
        """Sequences in what the micro-batch counts: several where rows are packed."""
        return (self.packed_sequences or LEAST_PACKED) if self.batching == "packed" else 1

    @property
    def num_sequences(self) -> int:
        """Sequences in one forward pass on one rank, those in packed rows one by one."""
        return self.sequences_per_micro_batch * self.sequences_per_row

    @property
    def has_several_in_a_row(self) -> bool:
        """Whether a row holds several sequences, so that a mask or the kernel has to keep them apart."""
        return self.is_flattened and self.num_sequences > 1

    def check_packing(self) -> None:
        """Raise `UsageError` where a row has fewer tokens than sequences."""
        if self.sequences_per_row > self.seq_len:
            raise UsageError(
                f"A row of {self.seq_len} tokens does not hold {self.sequences_per_row} sequences.",
                "Give a longer --seq-len or fewer --packed-sequences.",
            )

    @property
    def has_reference(self) -> bool:
        """Whether a reference runs in every micro-step."""
        return self.objective == "dpo"

    @property
    def teacher_numerics(self) -> tuple[str, str | None]:
        """Dtype of the teacher's parameters, dtype of autocast (None: off)."""
        loaded, autocast = PRECISIONS[self.precision]
        return self.teacher_dtype or loaded, autocast

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens in one forward pass on one rank."""
        return self.sequences_per_micro_batch * self.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, over all ranks."""
        return self.global_batch_size * sequences_of(self.objective) * self.seq_len


def sequences_of(objective: str) -> int:
    """Sequences that an example of the micro-batch consists of."""
    return 2 if objective in PAIRED else 1


def library_of(optimizer: str) -> str:
    """The library that an optimizer comes with."""
    return next((library for part, library in LIBRARY_BY_PART.items() if part in optimizer), "torch")


def _shown(value: object) -> str:
    """A value to quote in a sentence, cut where it is long."""
    if isinstance(value, int) and abs(value) > 10**40:
        return "a number of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}..."


def check_count(name: str, value: object) -> None:
    """Raise `UsageError` unless `value` is a whole number from 1 to 10**9."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(
            f"{name} is {_shown(value)}, not a whole number.", f"Give {name} as a number from 1 to {LARGEST_COUNT}."
        )
    if not 1 <= value <= LARGEST_COUNT:
        raise UsageError(f"{name} is {_shown(value)}.", f"It has to lie between 1 and {LARGEST_COUNT}.")


def check_choice(name: str, value: object, known: object) -> None:
    """Raise `UsageError` unless `value` is one of `known`."""
    names = list(known)  # type: ignore[call-overload]
    if value not in names:
        cure = did_you_mean(str(value), names, otherwise=f"Known: {', '.join(names)}.")
        raise UsageError(f"{name} {_shown(value)} is not known.", cure)


def check_checkpointing(value: object) -> None:
    """Raise `UsageError` unless `value` is none, selective, full or every-N."""
    if value in {"none", "selective", SAVE_ATTENTION, "full"}:
        return
    every = value[6:] if isinstance(value, str) and value.startswith("every-") else ""
    if not (every.isascii() and every.isdigit() and len(every) <= 10 and 1 <= int(every) <= LARGEST_COUNT):
        raise UsageError(
            f"activation_checkpointing {_shown(value)} is not known.",
            "Known: none, selective, save-attention, full, every-2, every-3, ...",
        )


def check_share(name: str, value: object) -> None:
    """Raise `UsageError` unless `value` is a share above 0 and up to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise UsageError(f"{name} is {_shown(value)}.", "Give a share above 0 and up to 1.")


def check_label_smoothing(value: object) -> None:
    """Raise `UsageError` unless `value` is a share below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UsageError(f"label_smoothing is {_shown(value)}.", "Give a number from 0 up to, but not including, 1.")


def check_dropout(value: object) -> None:
    """Raise `UsageError` unless `value` is None or a probability below 1."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UsageError(f"dropout is {value!r}.", "Give a probability from 0 up to, but not including, 1.")


def checkpointed_layers(activation_checkpointing: str, num_layers: int) -> tuple[str, ...]:
    """For each layer ``none``, ``selective``, ``save-attention`` or ``full``.

    ``every-N`` checkpoints layers 0, N, 2N, ... (`every_n_layers` of transformers 5.23).
    """
    if activation_checkpointing.startswith("every-"):
        every = int(activation_checkpointing[6:])
        return tuple("full" if i % every == 0 else "none" for i in range(num_layers))
    return (activation_checkpointing,) * num_layers


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small, large = [], []
    candidate = 1
    while candidate * candidate <= number:
        if number % candidate == 0:
            small.append(candidate)
            if candidate * candidate != number:
                large.append(number // candidate)
        candidate += 1
    return small + large[::-1]
