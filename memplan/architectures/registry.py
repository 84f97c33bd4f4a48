"""Which description reads which ``model_type``.

A new family is one file in `families` and one line here.  Families are imported only when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memplan.architectures.config import Config
from memplan.errors import ConfigError, UnknownModelError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memplan.architectures.architecture import Architecture

READER_BY_MODEL_TYPE = {
    "bert": "bert:bert",
    "deberta-v2": "deberta:deberta_v2",
    "cohere": "cohere:cohere",
    "gemma": "gemma:gemma",
    "gemma2": "gemma:gemma2",
    "gemma3": "gemma:gemma3",
    "gemma3_text": "gemma:gemma3_text",
    "granite": "granite:granite",
    "internlm2": "internlm2:internlm2",
    "olmo": "olmo:olmo",
    "olmo2": "olmo:olmo2",
    "phi3": "phi3:phi3",
    "bloom": "bloom:bloom",
    "falcon": "falcon:falcon",
    "gpt2": "gpt2:gpt2",
    "gpt_neox": "gpt_neox:gpt_neox",
    "gptj": "gptj:gptj",
    "mpt": "mpt:mpt",
    "opt": "opt:opt",
    "phi": "phi:phi",
    "stablelm": "stablelm:stablelm",
    "llama": "llama:llama",
    "mistral": "llama:mistral",
    "modernbert": "modernbert:modernbert",
    "qwen2": "llama:qwen2",
    "roberta": "bert:roberta",
    "xlm-roberta": "bert:xlm_roberta",
    "qwen3": "llama:qwen3",
    "smollm3": "llama:smollm3",
}
"""``module:function`` below `memplan.architectures.families`, by the config's ``model_type``."""


def read_architecture(values: Mapping[str, Any], origin: str, *, dropout: float | None = None) -> Architecture:
    """The architecture that a config.json describes; `dropout` overrides all its dropout probabilities.

    Raises:
        UnknownModelError: its ``model_type`` has no description.
        ConfigError: a value is missing, of the wrong type, or contradicts another.
    """
    config = Config(values, origin, dropout=dropout)
    if not config.has("model_type"):
        raise ConfigError(f"{origin} has no model_type.", "Give the config.json that the model was published with.")
    model_type = config.text("model_type")
    if model_type not in READER_BY_MODEL_TYPE:
        known = sorted(READER_BY_MODEL_TYPE)
        near = did_you_mean(model_type, known, otherwise="")
        raise UnknownModelError(
            f"model_type {model_type!r} in {origin} is not modelled.", f"{near} Known: {', '.join(known)}.".strip()
        )
    module, function = READER_BY_MODEL_TYPE[model_type].split(":")
    reader = getattr(import_module(f"memplan.architectures.families.{module}"), function)
    architecture: Architecture = reader(config)
    return architecture
