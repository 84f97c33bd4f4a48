"""Which description reads which ``model_type``.

A new family is one file in `families` and one line here.  Families are imported only when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memplan.architectures.classifiers import SEQUENCE_CLASSIFIERS, classes_of
from memplan.architectures.config import Config, shown
from memplan.architectures.undescribed import KIND_BY_MODEL_TYPE
from memplan.errors import ConfigError, UnknownModelError, did_you_mean
from memplan.specs.values import replace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.architecture import Architecture

READER_BY_MODEL_TYPE = {
    "bert": "bert:bert",
    "deberta-v2": "deberta:deberta_v2",
    "cohere": "cohere:cohere",
    "deepseek_v2": "deepseek:deepseek_v2",
    "deepseek_v3": "deepseek:deepseek_v3",
    "gemma": "gemma:gemma",
    "gemma2": "gemma:gemma2",
    "gemma3": "gemma:gemma3",
    "gemma3_text": "gemma:gemma3_text",
    "granite": "granite:granite",
    "internlm2": "internlm2:internlm2",
    "olmo": "olmo:olmo",
    "olmo2": "olmo:olmo2",
    "olmoe": "moe:olmoe",
    "phi3": "phi3:phi3",
    "bloom": "bloom:bloom",
    "falcon": "falcon:falcon",
    "gpt2": "gpt2:gpt2",
    "gpt_neox": "gpt_neox:gpt_neox",
    "gpt_oss": "gpt_oss:gpt_oss",
    "gptj": "gptj:gptj",
    "mixtral": "moe:mixtral",
    "mpt": "mpt:mpt",
    "opt": "opt:opt",
    "phi": "phi:phi",
    "stablelm": "stablelm:stablelm",
    "llama": "llama:llama",
    "mistral": "llama:mistral",
    "modernbert": "modernbert:modernbert",
    "qwen2": "llama:qwen2",
    "qwen2_moe": "moe:qwen2_moe",
    "roberta": "bert:roberta",
    "xlm-roberta": "bert:xlm_roberta",
    "qwen3": "llama:qwen3",
    "qwen3_moe": "moe:qwen3_moe",
    "smollm3": "llama:smollm3",
}
"""``module:function`` below `memplan.architectures.families`, by the config's ``model_type``."""


TRACE_IT = "Where PyTorch and transformers are installed, memplan trace runs the model itself."
"""The way out for what transformers can build and memplan does not describe."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys that say how many experts a layer has."""

MIXTURES = frozenset({"deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})
"""Families that have experts."""

PUBLISHED_METHOD = {"deepseek_v3": "fp8", "gpt_oss": "mxfp4"}
"""Families whose originals are quantised, and how; they are described as training loads them, with dequantize=True."""


def read_architecture(values: Mapping[str, Any], origin: str, *, dropout: float | None = None) -> Architecture:
    """The architecture that a config.json describes; `dropout` overrides all its dropout probabilities.

    Raises:
        UnknownModelError: its ``model_type`` has no description.
        ConfigError: a value is missing, of the wrong type, or contradicts another.
    """
    config = Config(values, origin, dropout=dropout)
    key = "model_type" if config.has("model_type") else "_class_name"
    if not config.has(key):
        raise ConfigError(f"{origin} has no model_type.", "Give the config.json that the model was published with.")
    model_type = config.text(key)
    if key != "model_type" or model_type not in READER_BY_MODEL_TYPE:
        raise _unknown(model_type, origin, key)
    _refuse_quantised(config, model_type)
    if model_type not in MIXTURES:
        _refuse_experts(config)
    module, function = READER_BY_MODEL_TYPE[model_type].split(":")
    reader = getattr(import_module(f"memplan.architectures.families.{module}"), function)
    architecture: Architecture = reader(config)
    return replace(architecture, classes=classes_of(config)) if model_type in SEQUENCE_CLASSIFIERS else architecture


def _unknown(model_type: str, origin: str, key: str) -> UnknownModelError:
    known = sorted(READER_BY_MODEL_TYPE)
    listed = f"Known: {', '.join(known)}.{f' {TRACE_IT}' if key == 'model_type' else ''}"
    if model_type in KIND_BY_MODEL_TYPE:
        kind = KIND_BY_MODEL_TYPE[model_type].name
        return UnknownModelError(f"{origin} is {kind} ({model_type}), which is not modelled yet.", listed)
    near = did_you_mean(model_type, known, otherwise="") if key == "model_type" else ""
    return UnknownModelError(f"{key} {shown(model_type)} in {origin} is not modelled.", f"{near} {listed}".strip())


def _parts(config: Config) -> list[Config]:
    """The config, and that of its text model where it has one."""
    return [config, *([config.part("text_config")] if isinstance(config.raw("text_config"), dict) else [])]


def _refuse_quantised(config: Config, model_type: str) -> None:
    for part in _parts(config):
        if not part.has("quantization_config"):
            continue
        method = part.part("quantization_config").raw("quant_method")
        if method is None or method != PUBLISHED_METHOD.get(model_type):
            raise ConfigError(
                f"{part.origin} has a quantization_config: quantised bases are not modelled yet.",
                "Give the config.json of the model that was quantised.",
            )


def _refuse_experts(config: Config) -> None:
    """Layers of experts make a dense family another model than its ``model_type`` says."""
    for part in _parts(config):
        for name in EXPERTS:
            if part.has(name) and part.integer(name, least=0) > 1:
                raise ConfigError(
                    f"{name} in {part.origin} is {part.integer(name)}, and {config.text('model_type')} has no experts.",
                    f"Take {name} out if the model has none. {TRACE_IT}",
                )
