"""Which module is trained, with which inputs, and what is its loss?  On the default device, mostly the meta device."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from memplan.architectures.undescribed import DIFFUSERS, NO_LENGTH, OWN, kind_of, type_of
from memplan.errors import ConfigError, MemplanError, UsageError
from memplan.probes.adapters import prepared
from memplan.probes.faults import TraceError, clipped, require
from memplan.probes.inputs import class_inputs, diffusion_network, transformers_inputs
from memplan.probes.vision_language import VISION_LANGUAGE
from memplan.specs.training import PRECISIONS
from memplan.specs.values import NamedTuple, dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from memplan.architectures.undescribed import Kind
    from memplan.specs.training import Setup

PARAMETER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLASH_NAME = "maskless_kernel"
"""Under this name transformers finds our flash attention; "flash" in it would make it look for a package."""


class Built(NamedTuple):
    """A module and how to train it."""

    module: nn.Module
    make_inputs: Callable[[int, int], Any]
    """(micro-batch, sequence length) -> the arguments of one forward pass: a dict, a tuple or one tensor."""
    loss_of: Callable[[Any], Any] | None
    """Output of the module -> loss; None: it is, or has, its own."""
    said: tuple[str, ...] = ()
    """What there is to say about the inputs."""


@dataclass(frozen=True, kw_only=True)
class TracedModel:
    """A model that can be built, without numbers or with random ones."""

    name: str
    build: Callable[[Setup], Built]
    """Makes it on the default device; may run code of the user."""
    accepts_padding: bool = False
    """Whether it can be given an ``attention_mask``."""
    kind: Kind = OWN
    """Which loss it has, and what its micro-batches count."""
    teacher: TracedModel | None = None
    """The model that is distilled."""


def model_of(config: Mapping[str, Any], name: str = "") -> TracedModel:
    """The model that a config describes, as transformers builds it or, of a network of a diffusion model, diffusers."""
    return diffusers_model(config, name) if type_of(config) in DIFFUSERS else transformers_model(config, name)


def diffusers_model(config: Mapping[str, Any], name: str = "") -> TracedModel:
    """The network that diffusers builds from a config with a ``_class_name``."""
    values = dict(config)

    def build(setup: Setup) -> Built:
        require("diffusers")
        dtype = PARAMETER_DTYPES[PRECISIONS[setup.precision][0]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module, inputs = diffusion_network(values, dtype)
        return Built(prepared(module, setup), inputs.make, inputs.loss_of, inputs.said)

    return TracedModel(name=name or values["_class_name"], build=build, kind=kind_of(values))


AUTO_CLASS_BY_OBJECTIVE = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "reward": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


def transformers_model(config: Mapping[str, Any], name: str = "", *, auto_class: str | None = None) -> TracedModel:
    """The model that a Hugging Face config.json describes, as the installed transformers library builds it.

    Args:
        config: Content of the config.json.
        name: What to call it; the ``model_type`` if empty.
        auto_class: The auto class that builds it, such as "AutoModelForMaskedLM"; found out if None.
    """
    values = dict(config)
    if not isinstance(values.get("model_type"), str):
        raise ConfigError("The config has no model_type.", "Give the config.json that the model was published with.")

    def build(setup: Setup) -> Built:
        one_score = {"num_labels": 1} if setup.objective == "reward" else {}
        module = _build(values | one_score, setup, auto_class)
        inputs = transformers_inputs(module, PARAMETER_DTYPES[PRECISIONS[setup.precision][0]])
        if setup.objective == "sequence-classification":
            inputs = class_inputs(module)
        return Built(prepared(module, setup), inputs.make, inputs.loss_of, inputs.said)

    kind = kind_of(values)
    return TracedModel(
        name=name or values["model_type"], build=build, accepts_padding=kind.usual != NO_LENGTH, kind=kind
    )


def _build(values: dict[str, Any], setup: Setup, auto_class: str | None) -> nn.Module:
    require("transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.for_model(**values)
    except Exception as error:
        text = clipped(" ".join(str(error).split()))
        raise ConfigError(
            f"transformers {transformers.__version__} does not accept this config: {text}", "Correct the config.json."
        ) from error
    config.use_cache = False  # TrainingArguments.use_cache
    if getattr(config, "apply_spec_augment", False):
        config.apply_spec_augment = False  # masks at random: see `memplan.probes.inputs`
    _set_dropout(config, setup.dropout)
    dtype = PARAMETER_DTYPES[PRECISIONS[setup.precision][0]]
    implementation = _register_flash() if setup.attention == "flash" else setup.attention
    named = auto_class or AUTO_CLASS_BY_OBJECTIVE.get(setup.objective)
    if named in AUTO_CLASS_BY_OBJECTIVE.values():
        _prepare_for_classes(config, setup.dropout)
    maker = getattr(transformers, named or _auto_class(values))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = maker.from_config(config, dtype=dtype, attn_implementation=implementation)
    except MemplanError:
        raise
    except Exception as error:
        text = clipped(" ".join(str(error).split()))
        raise TraceError(
            f"transformers {transformers.__version__} cannot build this model with {setup.attention} attention: {text}",
            "Correct the config.json, or try --attention eager.",
        ) from error
    return model


def _set_dropout(config: Any, dropout: float | None) -> None:
    """Override every dropout probability; layers are not left out at random, the whole depth is traced."""
    for name, value in list(vars(config).items()):
        if name == "layerdrop" and value:
            config.layerdrop = 0.0
        elif dropout is not None and "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, dropout)
    text = getattr(config, "text_config", None)
    if text is not None:
        _set_dropout(text, dropout)


def _prepare_for_classes(config: Any, dropout: float | None) -> None:
    """A padding token, without which transformers tells no sequences of a batch apart; dropout where none is named."""
    if config.pad_token_id is None:
        config.pad_token_id = 0
    if dropout is not None and getattr(config, "classifier_dropout", None) is None:
        config.classifier_dropout = dropout


def _auto_class(values: Mapping[str, Any]) -> str:
    """The auto class for training a model of this config on token ids."""
    from transformers.models.auto import modeling_auto as auto

    model_type = values["model_type"]
    named = (values.get("architectures") or [""])[0]
    if named.endswith("ForCausalLM"):
        return "AutoModelForCausalLM"
    seq2seq = bool(values.get("is_encoder_decoder", model_type in {"t5", "bart"}))
    reads_images = "text_config" in values or model_type in VISION_LANGUAGE
    tables = (
        ("AutoModelForImageTextToText", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, reads_images),
        ("AutoModel", auto.MODEL_MAPPING_NAMES, model_type in {"clip", "siglip"}),
        ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, seq2seq),
        ("AutoModelForSpeechSeq2Seq", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, True),
        ("AutoModelForCTC", auto.MODEL_FOR_CTC_MAPPING_NAMES, True),
        ("AutoModelForImageClassification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, True),
        ("AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, not values.get("is_decoder")),
        ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, True),
    )
    for name, table, applies in tables:
        if applies and model_type in table:
            return name
    raise UsageError(
        f"transformers has no model of type {model_type!r} that memplan knows how to train.",
        "Trace it with a factory of your own: package.module:factory.",
    )


def _register_flash() -> str:
    """An attention implementation that runs the flash kernel and asks for no mask, as flash_attention_2 does."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from memplan.probes import attention as kernels

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
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        missing = query.shape[-1] - value.shape[-1]
        if missing:  # the kernel wants heads of one length; so does flash_attention_forward of transformers
            value = torch.nn.functional.pad(value, [0, missing])
        if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
            ends, longest = (cu_seq_lens_q, cu_seq_lens_k), (max_length_q or 0, max_length_k or 0)
            output = kernels.varlen_attention(query, key, value, ends, longest, dropout, bool(causal), scaling)
            return output[..., : output.shape[-1] - missing], None
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=bool(causal), scale=scaling, enable_gqa=True
        )
        return output[..., : output.shape[-1] - missing].transpose(1, 2).contiguous(), None

    AttentionInterface.register(FLASH_NAME, flash)
    AttentionMaskInterface.register(FLASH_NAME, no_mask)
    return FLASH_NAME
