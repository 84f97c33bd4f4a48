"""A setup as the arguments of Hugging Face's Trainer, for the reader who wants to run it.

Names as in `TrainingArguments` of transformers 5.23.  Parameters get their dtype when the model is loaded
(`from_pretrained(..., dtype=...)`); `bf16=True` is autocast and nothing else.  Selective checkpointing is nothing that
the Trainer offers.  Objectives of TRL have configs of their own, with other defaults (trainer/base_config.py of TRL
1.16): checkpointing and ``bf16`` are on, and sequences are cut to 1024 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memplan.specs.adapter import CLASSIFIER_HEADS
from memplan.specs.recipe import ALL_LINEAR
from memplan.specs.training import (
    CLASSIFICATIONS,
    DISTILLATION,
    PRECISIONS,
    SAVE_ATTENTION,
    TASK_TYPE_BY_OBJECTIVE,
    TRAINER_BY_OBJECTIVE,
)

if TYPE_CHECKING:
    from memplan.specs.adapter import Lora
    from memplan.specs.training import Setup

OPTIM_BY_OPTIMIZER = {
    "adamw": "adamw_torch",
    "adamw-foreach": "adamw_torch",
    "adamw-fused": "adamw_torch_fused",
    "adamw-8bit": "adamw_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "sgd-momentum": "sgd",
    "lion": "lion_32bit",
    "lion-8bit": "lion_8bit",
    "paged-lion": "paged_lion_32bit",
    "paged-lion-8bit": "paged_lion_8bit",
    "rmsprop": "rmsprop",
    "rmsprop-32bit": "rmsprop_bnb_32bit",
    "rmsprop-8bit": "rmsprop_bnb_8bit",
    "adagrad": "adagrad",
    "ademamix": "ademamix",
    "ademamix-8bit": "ademamix_8bit",
    "paged-ademamix": "paged_ademamix_32bit",
    "paged-ademamix-8bit": "paged_ademamix_8bit",
    "galore-adamw": "galore_adamw",
    "apollo-adamw": "apollo_adamw",
    "schedule-free-adamw": "schedule_free_adamw",
    "schedule-free-sgd": "schedule_free_sgd",
    "lomo": "lomo",
    "adalomo": "adalomo",
}
"""Ours -> `TrainingArguments.optim`; what the Trainer does not offer is missing."""

TAKES_MODULES = ("galore_adamw", "apollo_adamw")
"""Those that have to be told which modules they project."""

LOSSES_OF_TRAINER = ("full", "fused")
"""The others are TRL's, or those of libraries that replace a model's forward."""

CONFIG_OF_TRAINER = "TrainingArguments"
CONFIG_BY_OBJECTIVE = {
    "dpo": "DPOConfig",
    "dpo-precomputed": "DPOConfig",
    "orpo": "ORPOConfig",
    "reward": "RewardConfig",
    DISTILLATION: "GKDConfig",
    "contrastive": "SentenceTransformerTrainingArguments",
}
"""What holds the arguments of TRL's trainers, and of sentence-transformers'."""
CONFIG_OF_SFT = "SFTConfig"
CONFIG_OF_GENERATION = "Seq2SeqTrainingArguments"
OF_TRANSFORMERS = (CONFIG_OF_TRAINER, CONFIG_OF_GENERATION, CONFIG_BY_OBJECTIVE["contrastive"])
"""Those with the names and defaults of transformers."""
WITHOUT_DROPOUT = tuple(CONFIG_BY_OBJECTIVE[objective] for objective in TRAINER_BY_OBJECTIVE)
"""Those whose trainers switch dropout off unless they are told otherwise (``disable_dropout``)."""

VERSIONS_OF_SFT_BY_LOSS = {
    "full": "TRL up to 1.6",
    "chunked": "TRL 1.7 to 1.14",
    "tiled": "TRL from 1.15 on",
    "fused": "TRL",
}
"""Which SFTTrainer computes its loss like this; padding-free and packed batches are its own."""

LOSSES_BESIDE_SAVED_ATTENTION = ("tiled", "fused")
"""Losses of those SFTTrainers that can keep what attention gives (``{"selective": True}``)."""

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def trainer_arguments(setup: Setup) -> dict[str, Any] | None:
    """`dtype` for from_pretrained and `arguments` for `config`; None where the Trainer cannot do it.

    `config` is TrainingArguments, or the class of arguments of the trainer in TRL that has the objective, the loss or
    the batches; `versions` are those of TRL that take the loss like this, empty for any.
    `lora` is for peft's LoraConfig and `quantization` for BitsAndBytesConfig, None where there is none.
    `adapters_as_base` is get_peft_model's ``autocast_adapter_dtype=False``, `upcast` asks for
    prepare_model_for_kbit_training first, and `dropout` is for every probability of the model's config, None to leave
    them.
    """
    if not _is_offered(setup):
        return None
    optim, mode, config = OPTIM_BY_OPTIMIZER[setup.optimizer], setup.activation_checkpointing, config_of(setup)
    parameters, autocast = PRECISIONS[setup.precision]
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": setup.micro_batch_size,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps,
        "activation_checkpointing": mode != "none",
    }
    if mode.startswith("every-"):
        arguments["activation_checkpointing_kwargs"] = {"every_n_layers": int(mode[6:])}
    switches = {"selective": mode == SAVE_ATTENTION, "offload": bool(setup.offload), "use_reentrant": setup.reentrant}
    how = {name: True for name, on in switches.items() if on}
    if how:
        arguments["activation_checkpointing_kwargs"] = arguments.get("activation_checkpointing_kwargs", {}) | how
    arguments["optim"] = optim
    if setup.compile:
        arguments["torch_compile"] = True
    if setup.optimizer == "sgd-momentum":
        arguments["optim_args"] = "momentum=0.9"
    if optim in TAKES_MODULES:
        arguments["optim_target_modules"] = "all-linear"
    arguments["bf16"] = autocast == "bf16"
    arguments["fp16"] = autocast == "fp16"
    if setup.loss == "fused":
        arguments["use_liger_kernel"] = True
        others = dict.fromkeys(("rope", "swiglu", "rms_norm", "cross_entropy"), False)
        arguments["liger_kernel_config"] = {"fused_linear_cross_entropy": True, **others}
    if setup.label_smoothing:
        arguments["label_smoothing_factor"] = setup.label_smoothing
    arguments |= _of_evaluation(setup)
    if config not in OF_TRANSFORMERS:
        arguments |= _of_trl(setup, config)
    return {
        "config": config,
        "versions": _versions(setup) if config == CONFIG_OF_SFT else "",
        "dtype": DTYPE_NAMES[parameters],
        "attn_implementation": _attention(setup),
        "arguments": arguments,
        "lora": None if setup.lora is None else _lora(setup.lora, TASK_TYPE_BY_OBJECTIVE.get(setup.objective)),
        "quantization": _quantization(setup),
        "adapters_as_base": setup.lora is not None and setup.lora.dtype == "base",
        "upcast": setup.upcast,
        "dropout": None if setup.dropout == 0 and config in WITHOUT_DROPOUT else setup.dropout,
    }


def _is_offered(setup: Setup) -> bool:
    """Whether there are arguments that ask for all of it."""
    if setup.optimizer not in OPTIM_BY_OPTIMIZER or setup.freeze:
        return False
    if _generates(setup) and config_of(setup) != CONFIG_OF_GENERATION:
        return False
    return _checkpoints(setup) and has_loss(setup.loss, setup.objective)


def config_of(setup: Setup) -> str:
    """The class of arguments of the trainer that has this objective, its batches and its loss."""
    if setup.objective in CONFIG_BY_OBJECTIVE:
        return CONFIG_BY_OBJECTIVE[setup.objective]
    of_sft = setup.is_flattened or setup.activation_checkpointing == SAVE_ATTENTION
    if of_sft or setup.loss not in LOSSES_OF_TRAINER:
        return CONFIG_OF_SFT
    return CONFIG_OF_GENERATION if _generates(setup) else CONFIG_OF_TRAINER


def _generates(setup: Setup) -> bool:
    return setup.evaluation is not None and setup.evaluation.generate is not None


def has_loss(loss: str, objective: str) -> bool:
    """Whether a trainer takes its loss in this way: TRL's trainers of objectives have one way alone."""
    return objective in CONFIG_BY_OBJECTIVE or loss in LOSSES_OF_TRAINER or loss in VERSIONS_OF_SFT_BY_LOSS


def _of_evaluation(setup: Setup) -> dict[str, Any]:
    found = setup.evaluation
    if found is None:
        return {}
    moved = {} if found.accumulation is None else {"eval_accumulation_steps": found.accumulation}
    generated: dict[str, Any] = {}
    if found.generate is not None:
        length = setup.seq_len + found.generate
        generated = {"predict_with_generate": True, "generation_max_length": length}
    return {"eval_strategy": "steps", "per_device_eval_batch_size": found.batch} | moved | generated


def _checkpoints(setup: Setup) -> bool:
    """Whether a trainer checkpoints like this."""
    mode = setup.activation_checkpointing
    return saves_attention(setup.loss, setup.objective) if mode == SAVE_ATTENTION else mode != "selective"


def saves_attention(loss: str, objective: str) -> bool:
    """Whether a trainer can keep what attention gives: SFTTrainer without logits, and GKDTrainer, its heir."""
    if objective in CONFIG_BY_OBJECTIVE:
        return objective == DISTILLATION
    return loss in LOSSES_BESIDE_SAVED_ATTENTION


def _versions(setup: Setup) -> str:
    saved = setup.activation_checkpointing == SAVE_ATTENTION
    return "TRL 1.16" if saved else VERSIONS_OF_SFT_BY_LOSS[setup.loss]


def _of_trl(setup: Setup, config: str) -> dict[str, Any]:
    """What TRL's trainers take besides."""
    found: dict[str, Any] = {"max_length": setup.seq_len}
    if config in WITHOUT_DROPOUT and setup.dropout != 0:
        found["disable_dropout"] = False
    if setup.objective == "dpo-precomputed":
        found["precompute_ref_log_probs"] = True
    if setup.objective == DISTILLATION:
        found |= {"lmbda": 0.0, "teacher_model_init_kwargs": _teacher(setup)}
    if setup.is_flattened:
        found |= {"packing": True} if setup.batching == "packed" else {"padding_free": True}
    return found


def _teacher(setup: Setup) -> dict[str, Any]:
    """Arguments with which GKDTrainer loads a teacher that it is given by name."""
    return {"dtype": DTYPE_NAMES[setup.teacher_numerics[0]], "attn_implementation": _attention(setup)}


def _lora(lora: Lora, task_type: str | None) -> dict[str, Any]:
    """Arguments of LoraConfig."""
    targets = ALL_LINEAR if lora.targets == (ALL_LINEAR,) else list(lora.targets)
    found: dict[str, Any] = {"r": lora.rank, "target_modules": targets}
    found |= {"lora_dropout": lora.dropout} if lora.dropout else {}
    found |= {"use_dora": True} if lora.dora else {}
    found |= {"modules_to_save": list(lora.modules_to_save)} if lora.modules_to_save else {}
    found |= {"layers_to_transform": list(lora.layers)} if lora.layers else {}
    found |= {"rank_pattern": dict(lora.ranks)} if lora.ranks else {}
    found |= {"task_type": task_type} if task_type is not None else {}
    return found


def _quantization(setup: Setup) -> dict[str, Any] | None:
    """Arguments of BitsAndBytesConfig."""
    if setup.quantize is None:
        return None
    skipped = {"llm_int8_skip_modules": list(CLASSIFIER_HEADS)} if setup.objective in CLASSIFICATIONS else {}
    if setup.quantize == "int8":
        return {"load_in_8bit": True, **skipped}
    parameters, autocast = PRECISIONS[setup.precision]
    found: dict[str, Any] = {"load_in_4bit": True, **skipped, "bnb_4bit_quant_type": "nf4"}
    found["bnb_4bit_compute_dtype"] = DTYPE_NAMES[autocast or parameters]
    if setup.quantize == "nf4-double":
        found["bnb_4bit_use_double_quant"] = True
    return found


def _attention(setup: Setup) -> str:
    return "flash_attention_2" if setup.attention == "flash" else setup.attention
